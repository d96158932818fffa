// The program under test and what it needs around it. Include before any import.
//
// Root only. Everything started here runs in a mount and a network namespace of the test program's own (see `isolation`),
// and every process left over is found and ended: what the program under test must not leave behind can so be counted, and
// a failed assertion leaves nothing either. One thread uses all this.
#pragma once

#include <chrono>
#include <filesystem>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "support/certs.hpp"
#include "support/support.hpp"

namespace cobuild::test {

using strings = std::vector<std::string>;

/// The program under test: $COBUILD_PROGRAM, else the one built beside the tests.
std::string program();

/// Global fixture: own mounts, own network with loopback only, orphans become our children; at the end all of them are killed.
/// Does nothing without root.
struct isolation {
    isolation();
    ~isolation();
};

/// Descendants of this process, helpers included. Takes what has ended and belongs to nobody.
std::set<int> descendants();

// ---------------------------------------------------------------- running programs

struct outcome {
    int code = 0;  ///< 128 + signal when a signal ended it
    std::string out, err;
    std::chrono::milliseconds took{0};
    [[nodiscard]] std::string str() const;  ///< for messages
};

struct run_options {
    strings env;  ///< "KEY=value", on top of ours
    std::string cwd;
    std::chrono::seconds limit{60};  ///< then it is killed and the test fails
    int inherit = -1;                ///< becomes descriptor 3
};

/// A program in a process group of its own; the group is killed when this goes, and the program when its starter dies.
class running {
public:
    explicit running(strings args, run_options options = {});
    ~running();
    running(const running&) = delete;
    running& operator=(const running&) = delete;
    [[nodiscard]] int pid() const { return pid_; }
    void signal(int number) const;
    /// Waits until its standard error contains `text`; false when it ends before.
    bool wait_stderr(std::string_view text);
    outcome wait();
    /// kill -9 of the program alone.
    outcome kill();
    [[nodiscard]] bool ended(std::chrono::milliseconds within) const;

private:
    std::string name_;
    std::chrono::seconds limit_;
    std::chrono::steady_clock::time_point started_;
    int pid_ = -1, pidfd_ = -1, out_ = -1, err_ = -1;
    bool waited_ = false;
};

outcome run(strings args, run_options options = {});
/// The same; the test ends when it fails.
outcome must_run(strings args, run_options options = {});

// ---------------------------------------------------------------- a place to build in

/// A directory with a registry that stands in for docker.io, configuration and state directory.
class workshop {
    scratch_dir dir_;

public:
    workshop();
    ~workshop();
    std::filesystem::path operator/(std::string_view name) const { return dir_ / name; }
    [[nodiscard]] std::string path(std::string_view name) const { return (dir_ / name).string(); }
    [[nodiscard]] const docker_registry& registry() const { return *registry_; }
    /// A static busybox with its applets, /etc/passwd (root, guest) and /etc/group, pushed as docker.io/library/NAME. `extra`
    /// is appended to its Dockerfile.
    void make_base(const std::string& name, const std::string& extra = "", const std::string& own_file = "");
    /// cobuild build CONTEXT --root ... --config ... --progress=plain EXTRA...
    [[nodiscard]] strings build(const std::string& context, strings extra = {}) const;
    /// Environment of all runs: HOME, TMPDIR and DOCKER_CONFIG inside, SOURCE_DATE_EPOCH set.
    [[nodiscard]] run_options options(strings more = {}, std::chrono::seconds limit = std::chrono::seconds(60)) const;
    outcome run_build(const std::string& context, strings extra = {}, strings env = {}) const;
    /// What a dead or finished cobuild must not leave: one line each. Empty is right.
    [[nodiscard]] strings leftovers() const;
    /// The owners that stand in the state directory now: a dead one's cgroups are named by it.
    void note_owners();

    std::string root;    ///< state directory
    std::string config;  ///< buildkitd.toml
    strings flags{"--oci-worker-net=none"};

private:
    std::unique_ptr<docker_registry> registry_;
    std::set<int> helpers_;
    std::set<std::string> owners_;
    std::set<std::string> other_namespaces_;  ///< of the machine, before the test
};

/// "sha256:..." behind containerimage.digest in a metadata file.
std::string image_digest(const std::filesystem::path& metadata_file);

/// The lines of standard error that begin with "error: ".
strings error_lines(const outcome& o);

}  // namespace cobuild::test
