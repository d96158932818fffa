// Plugins for tests: shell scripts that note every call and then do what the test wrote for them.
#pragma once

#include <sys/stat.h>

#include <string>
#include <utility>
#include <vector>

namespace cobuild::test {

class stub_plugins {
public:
    stub_plugins() {
        test::write_file(dir_ / "calls", "");
        ::mkdir((dir_ / "bin").c_str(), 0755);
    }
    /// A plugin; `snippet` is run before the usual answer (an ADD answers with one address, its previous result's otherwise).
    void add(const std::string& type, const std::string& snippet = "") {
        const auto file = dir_ / "bin" / type;
        const auto logs = dir_.path().string();
        test::write_file(
            file, "#!/bin/sh\nin=$(cat)\nprintf '%s' \"$in\" > " + logs + "/" + type + ".$CNI_COMMAND\n" +
                      "[ \"$CNI_COMMAND\" = VERSION ] || echo \"$CNI_COMMAND " + type + " $CNI_CONTAINERID $CNI_IFNAME ${CNI_NETNS:+netns}\" >> " +
                      logs + "/calls\n" + "env | grep ^CNI_ | sort > " + logs + "/" + type + ".env\n" + snippet +
                      "\n[ \"$CNI_COMMAND\" = ADD ] && echo '{\"cniVersion\":\"1.0.0\",\"by\":\"" + type +
                      "\",\"ips\":[{\"address\":\"10.1.0.2/16\",\"gateway\":\"10.1.0.1\"}],\"routes\":[{\"dst\":\"0.0.0.0/0\",\"gw\":\"10.1.0.1\"}],"
                      "\"dns\":{\"nameservers\":[\"10.1.0.1\"],\"search\":[\"a.b\"]}}'\nexit 0\n");
        ::chmod(file.c_str(), 0755);
    }
    /// A list of these types as a configuration file.
    std::string config(const std::vector<std::string>& types, const std::string& more = "\"cniVersion\":\"1.0.0\"") {
        std::string plugins;
        for (const auto& t : types)
            plugins += (plugins.empty() ? "" : ",") +
                       ("{\"type\":\"" + t + "\",\"own\":\"" + t + "\",\"capabilities\":{\"portMappings\":true,\"mac\":false}}");
        const auto file = dir_ / "net.conflist";
        test::write_file(file, "{\"name\":\"test\"," + more + ",\"plugins\":[" + plugins + "]}");
        return file.string();
    }
    std::vector<std::string> calls() const {
        std::vector<std::string> out;
        std::string line;
        for (const char c : test::read_file(dir_ / "calls")) {
            if (c != '\n')
                line += c;
            else
                out.push_back(std::exchange(line, ""));
        }
        return out;
    }
    std::string seen(const std::string& type, const std::string& command) const { return test::read_file(dir_ / (type + "." + command)); }
    std::string dir() const { return dir_.path().string(); }
    std::string bin() const { return dir_.path().string() + "/bin"; }

private:
    scratch_dir dir_;
};

}  // namespace cobuild::test
