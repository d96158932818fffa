// Ten Dockerfiles and what their images must hold, field by field: the OCI image specification, and for texts BuildKit's
// rules (history, inheritance, whiteouts).
#include "support/program.hpp"

#include <algorithm>
#include <filesystem>
#include <map>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/test/data/monomorphic.hpp>
#include <boost/test/data/test_case.hpp>

import cobuild.base;
import cobuild.json;

using namespace cobuild;
using namespace cobuild::test;
namespace stdfs = std::filesystem;

namespace {

constexpr const char* epoch = "2023-11-14T22:13:20Z";  // SOURCE_DATE_EPOCH=1700000000

struct image_case {
    const char* name;
    const char* dockerfile;
    const char* config;  ///< the member "config", whole
    strings history;     ///< what this Dockerfile adds: "+" makes a layer, "-" does not, then created_by
    /// The layers this Dockerfile adds: "mode owner/group path", "-> target" for links, "= content" for small files.
    std::vector<strings> layers;
    strings flags{};
    bool on_busybox = true;  ///< one layer and three history entries below
};

const std::vector<image_case> cases{
    {"copy onto nothing",
     "FROM scratch\nCOPY f /d/f\n",
     R"({"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],"WorkingDir":"/"})",
     {"+COPY f /d/f # buildkit"},
     {{"drwxr-xr-x 0/0 d/", "-rw-r--r-- 0/0 d/f = one"}},
     {},
     false},

    {"all that is only written down",
     "FROM scratch\nARG V=1\nENV A=1 B=\"x y\"\nLABEL a=\"b c\" z=1\nEXPOSE 80 53/udp\nVOLUME /data \"/other\"\nUSER 7:8\n"
     "HEALTHCHECK --interval=5s --retries=3 CMD [\"/h\", \"x\"]\nSTOPSIGNAL SIGINT\nONBUILD RUN later\nSHELL [\"/bin/ash\", \"-c\"]\nENTRYPOINT "
     "[\"/e\", \"a\\\"b\"]\nCMD c d\nCOPY f /\n",
     R"({"User":"7:8","ExposedPorts":{"53/udp":{},"80/tcp":{}},"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin","A=1","B=x y"],
         "Entrypoint":["/e","a\"b"],"Cmd":["/bin/ash","-c","c d"],"Volumes":{"/data":{},"/other":{}},"WorkingDir":"/","Labels":{"a":"b c","z":"1"},"StopSignal":"SIGINT",
         "ArgsEscaped":true,"Healthcheck":{"Test":["CMD","/h","x"],"Interval":5000000000,"Retries":3},"OnBuild":["RUN later"],"Shell":["/bin/ash","-c"]})",
     {"-ARG V=1", "-ENV A=1 B=x y", "-LABEL a=b c z=1", "-EXPOSE [53/udp 80/tcp]", "-VOLUME [/data /other]", "-USER 7:8",
      R"(-HEALTHCHECK &{["CMD" "/h" "x"] "5s" "0s" "0s" "0s" '\x03'})", "-STOPSIGNAL SIGINT", "-SHELL [/bin/ash -c]", R"(-ENTRYPOINT ["/e" "a\"b"])",
      R"(-CMD ["/bin/ash" "-c" "c d"])", "+COPY f / # buildkit"},
     {{"-rw-r--r-- 0/0 f = one"}},
     {},
     false},

    {"a step with arguments",
     "FROM busybox\nARG V=1\nARG W\nENV E=2\nRUN echo $V$W$E > /out\n",
     R"({"Env":["PATH=/bin","E=2"],"Cmd":["sh"],"WorkingDir":"/","ArgsEscaped":true})",
     {"-ARG V=1", "-ARG W=7", "-ENV E=2", "+RUN |2 V=1 W=7 /bin/sh -c echo $V$W$E > /out # buildkit"},
     {{"-rw-r--r-- 0/0 out = 172"}},
     {"--build-arg", "W=7"}},

    {"an entrypoint clears the base's command",
     "FROM busybox\nENTRYPOINT [\"echo\"]\nRUN [\"/bin/busybox\", \"touch\", \"/x\"]\n",
     R"({"Env":["PATH=/bin"],"Entrypoint":["echo"],"WorkingDir":"/","ArgsEscaped":true})",
     {R"(-ENTRYPOINT ["echo"])", "+RUN /bin/busybox touch /x # buildkit"},
     {{"-rw-r--r-- 0/0 x"}}},

    {"but not its own",
     "FROM busybox\nCMD [\"own\"]\nENTRYPOINT echo it\nCOPY f /\n",
     R"({"Env":["PATH=/bin"],"Entrypoint":["/bin/sh","-c","echo it"],"Cmd":["own"],"WorkingDir":"/","ArgsEscaped":true})",
     {R"(-CMD ["own"])", R"(-ENTRYPOINT ["/bin/sh" "-c" "echo it"])", "+COPY f / # buildkit"},
     {{"-rw-r--r-- 0/0 f = one"}}},

    {"labels and variables overridden",
     "FROM busybox AS a\nENV A=1 B=1\nLABEL x=1 y=1\nVOLUME /v\nEXPOSE 1\nUSER guest\nFROM a\nENV A=2 PATH=$PATH:/more\nLABEL y=2\nVOLUME /w\nEXPOSE "
     "2\n",
     R"({"User":"guest","ExposedPorts":{"1/tcp":{},"2/tcp":{}},"Env":["PATH=/bin:/more","A=2","B=1"],"Cmd":["sh"],"Volumes":{"/v":{},"/w":{}},"WorkingDir":"/","Labels":{"x":"1","y":"3","z":"4"},"ArgsEscaped":true})",
     {"-ENV A=1 B=1", "-LABEL x=1 y=1", "-VOLUME [/v]", "-EXPOSE [1/tcp]", "-USER guest", "-ENV A=2 PATH=/bin:/more", "-LABEL y=2", "-VOLUME [/w]",
      "-EXPOSE [2/tcp]"},
     {},
     {"--label", "y=3", "--label", "z=4"}},

    {"deleted and replaced",
     "FROM busybox\nRUN mkdir /d /e && echo old > /d/old && echo e > /e/f\nRUN rm -r /d && mkdir /d && echo new > /d/new && rm -r /e && rm /bin/vi\n",
     R"({"Env":["PATH=/bin"],"Cmd":["sh"],"WorkingDir":"/","ArgsEscaped":true})",
     {"+RUN /bin/sh -c mkdir /d /e && echo old > /d/old && echo e > /e/f # buildkit",
      "+RUN /bin/sh -c rm -r /d && mkdir /d && echo new > /d/new && rm -r /e && rm /bin/vi # buildkit"},
     {{"drwxr-xr-x 0/0 d/", "-rw-r--r-- 0/0 d/old = old", "drwxr-xr-x 0/0 e/", "-rw-r--r-- 0/0 e/f = e"},
      {"---------- 0/0 .wh.e", "drwxr-xr-x 0/0 bin/", "---------- 0/0 bin/.wh.vi", "drwxr-xr-x 0/0 d/", "---------- 0/0 d/.wh.old",
       "-rw-r--r-- 0/0 d/new = new"}}},

    {"owners and modes",
     "FROM busybox\nCOPY --chown=guest:users --chmod=4750 f /a\nCOPY --chown=12 sub /s\nUSER guest\nWORKDIR /w/x\nRUN id -u > me\n",
     R"({"User":"guest","Env":["PATH=/bin"],"Cmd":["sh"],"WorkingDir":"/w/x","ArgsEscaped":true})",
     {"+COPY --chown=guest:users --chmod=4750 f /a # buildkit", "+COPY --chown=12 sub /s # buildkit", "-USER guest", "+WORKDIR /w/x",
      "+RUN /bin/sh -c id -u > me # buildkit"},
     {{"-rwsr-x--- 405/100 a = one"},
      {"drwxr-xr-x 12/12 s/", "lrwxrwxrwx 12/12 s/l -> t", "-rw-r--r-- 12/12 s/t = two"},
      {"drwxr-xr-x 405/100 w/", "drwxr-xr-x 405/100 w/x/"},
      {"drwxr-xr-x 405/100 w/", "drwxr-xr-x 405/100 w/x/", "-rw-r--r-- 405/100 w/x/me = 405"}}},

    {"from another stage",
     "FROM busybox AS b\nRUN mkdir /o && echo made > /o/m && ln /o/m /o/n && ln -s m /o/l && mknod /o/p p\nFROM scratch\nCOPY --from=b /o /o\nCMD "
     "[\"/x\"]\n",
     R"({"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],"Cmd":["/x"],"WorkingDir":"/","ArgsEscaped":true})",
     {"+COPY /o /o # buildkit", R"(-CMD ["/x"])"},
     {{"drwxr-xr-x 0/0 o/", "lrwxrwxrwx 0/0 o/l -> m", "-rw-r--r-- 0/0 o/m = made", "hrw-r--r-- 0/0 o/n link to o/m", "prw-r--r-- 0/0 o/p"}},
     {},
     false},

    {"texts in place and an archive",
     "FROM busybox\nCOPY <<EOF /h\ninline <&>\nEOF\nADD sub.tar /t/\nRUN <<EOF\nprintf 'script\\n' > /r\nEOF\n",
     R"({"Env":["PATH=/bin"],"Cmd":["sh"],"WorkingDir":"/","ArgsEscaped":true})",
     {"+COPY <<EOF /h # buildkit", "+ADD sub.tar /t/ # buildkit", "+RUN /bin/sh -c printf 'script\\n' > /r\n # buildkit"},
     {{"-rw-r--r-- 0/0 h = inline <&>"},
      {"drwxr-xr-x 0/0 t/", "drwxr-xr-x 0/0 t/sub/", "lrwxrwxrwx 0/0 t/sub/l -> t", "-rw-r--r-- 0/0 t/sub/t = two"},
      {"-rw-r--r-- 0/0 r = script"}}}};

/// An OCI archive, unpacked.
struct layout {
    stdfs::path dir;
    [[nodiscard]] stdfs::path blob(const std::string& digest) const { return dir / "blobs/sha256" / digest.substr(7); }
    /// A blob named by a descriptor, its size and digest checked.
    [[nodiscard]] std::string read(const json::object& descriptor) const {
        const auto text = read_file(blob(json::string_at(descriptor, "digest")));
        BOOST_TEST(json::uint_at(descriptor, "size") == text.size());
        BOOST_TEST(json::string_at(descriptor, "digest") == digest::of(text).str());
        return text;
    }
};

/// "mode owner/group path" of each entry, with link targets and the content of small files.
strings entries_of(const stdfs::path& tar) {
    strings out;
    std::istringstream listed(must_run({"tar", "--numeric-owner", "--full-time", "-tvf", tar.string()}).out);
    for (std::string line; std::getline(listed, line);) {
        std::istringstream words(line);
        std::string mode, owner, size, day, time, path;
        words >> mode >> owner >> size >> day >> time;
        std::getline(words >> std::ws, path);
        auto entry = mode + " " + owner + " " + path;
        if (mode.front() == '-' && size != "0" && size.size() < 4) {
            auto content = must_run({"tar", "-xOf", tar.string(), path}).out;
            if (content.ends_with('\n')) content.pop_back();
            entry += " = " + content;
        }
        out.push_back(std::move(entry));
    }
    return out;
}

std::string sorted_text(const json::value& v) { return json::serialize(v, {.escape_html = false, .sorted = true}); }

void check_layers(const layout& l, const image_case& c, const json::object& manifest, const json::object& config, std::size_t below) {
    const auto& layers = json::array_at(manifest, "layers");
    const auto ids = json::strings_at(json::object_at(config, "rootfs"), "diff_ids");
    BOOST_TEST(json::string_at(json::object_at(config, "rootfs"), "type") == "layers");
    BOOST_TEST(ids.size() == below + c.layers.size());
    BOOST_REQUIRE(layers.size() == ids.size());
    for (std::size_t i = 0; i < layers.size(); ++i) {
        const auto& descriptor = layers[i].as_object();
        BOOST_TEST(json::string_at(descriptor, "mediaType") == "application/vnd.oci.image.layer.v1.tar+gzip");
        (void)l.read(descriptor);
        const auto tar = l.dir / ("layer" + std::to_string(i) + ".tar");
        must_run({"sh", "-c", "gzip -dc < " + l.blob(json::string_at(descriptor, "digest")).string() + " > " + tar.string()});
        BOOST_TEST(digest::of(read_file(tar)).str() == ids[i]);
        if (i < below || i - below >= c.layers.size()) continue;
        auto found = entries_of(tar), expected = c.layers[i - below];
        std::sort(found.begin(), found.end());
        std::sort(expected.begin(), expected.end());
        BOOST_TEST(found == expected, boost::test_tools::per_element());
    }
}

void check_history(const image_case& c, const json::object& config, std::size_t below) {
    const auto& history = json::array_at(config, "history");
    BOOST_REQUIRE_MESSAGE(history.size() == below + c.history.size(), history.size() << " history entries");
    std::size_t layers = 0;
    for (std::size_t i = 0; i < history.size(); ++i) {
        const auto& h = history[i].as_object();
        const bool empty = json::optional_bool(h, "empty_layer").value_or(false);
        if (!empty) ++layers;
        BOOST_TEST(json::string_at(h, "comment") == "buildkit.dockerfile.v0");
        BOOST_TEST(json::string_at(h, "created") == epoch);
        if (i < below) continue;
        const auto& expected = c.history[i - below];
        BOOST_TEST(json::string_at(h, "created_by") == expected.substr(1));
        BOOST_TEST(empty == (expected.front() == '-'));
        BOOST_TEST(h.contains("empty_layer") == empty);
    }
    BOOST_TEST(layers == json::strings_at(json::object_at(config, "rootfs"), "diff_ids").size());
}

void check_case(workshop& place, const image_case& c) {
    write_file(place / "ctx/Dockerfile", c.dockerfile);
    const auto file = place.path("x.tar");
    strings flags{"-t", "app:1", "-o", "type=oci,dest=" + file, "--metadata-file", place.path("meta.json")};
    flags.insert(flags.end(), c.flags.begin(), c.flags.end());
    const auto o = run(place.build("ctx", flags), place.options());
    BOOST_REQUIRE_MESSAGE(o.code == 0, o.str());
    const layout l{place / "layout"};
    stdfs::remove_all(l.dir);
    stdfs::create_directories(l.dir);
    must_run({"tar", "-xf", file, "-C", l.dir.string()});

    BOOST_TEST(sorted_text(json::parse(read_file(l.dir / "oci-layout"))) == R"({"imageLayoutVersion":"1.0.0"})");
    const auto index = json::parse(read_file(l.dir / "index.json"));
    BOOST_TEST(json::int_at(index.as_object(), "schemaVersion") == 2);
    const auto& manifests = json::array_at(index.as_object(), "manifests");
    BOOST_REQUIRE(manifests.size() == 1U);
    const auto& top = manifests.front().as_object();
    BOOST_TEST(json::string_at(top, "mediaType") == "application/vnd.oci.image.manifest.v1+json");
    BOOST_TEST(json::string_at(top, "digest") == image_digest(place / "meta.json"));
    const auto names = json::string_map_at(top, "annotations");
    BOOST_TEST(names.at("org.opencontainers.image.ref.name") == "1");
    BOOST_TEST(names.at("io.containerd.image.name") == "docker.io/library/app:1");
    const auto manifest = json::parse(l.read(top));
    BOOST_TEST(json::int_at(manifest.as_object(), "schemaVersion") == 2);
    BOOST_TEST(json::string_at(manifest.as_object(), "mediaType") == "application/vnd.oci.image.manifest.v1+json");
    const auto& config_descriptor = json::object_at(manifest.as_object(), "config");
    BOOST_TEST(json::string_at(config_descriptor, "mediaType") == "application/vnd.oci.image.config.v1+json");
    const auto text = l.read(config_descriptor);
    const auto config = json::parse(text);
    BOOST_TEST(text.find('\n') == std::string::npos);            // compact
    BOOST_TEST(text.find_first_of("<>&") == std::string::npos);  // as Go escapes them
    BOOST_TEST(json::string_at(config.as_object(), "os") == "linux");
    BOOST_TEST(json::string_at(config.as_object(), "architecture") == "amd64");
    BOOST_TEST(json::string_at(config.as_object(), "created") == epoch);
    BOOST_TEST(sorted_text(json::value(json::object_at(config.as_object(), "config"))) == sorted_text(json::parse(c.config)));
    check_layers(l, c, manifest.as_object(), config.as_object(), c.on_busybox ? 1 : 0);
    check_history(c, config.as_object(), c.on_busybox ? 3 : 0);
}

}  // namespace

BOOST_DATA_TEST_CASE(image_field_by_field, boost::unit_test::data::xrange(cases.size()), number) {
    if (!needs_root() || !docker_registry::available()) return;
    workshop place;
    const auto& c = cases[number];
    if (std::string_view(c.dockerfile).starts_with("FROM busybox")) place.make_base("busybox");
    write_file(place / "ctx/f", "one\n");
    write_file(place / "ctx/sub/t", "two\n");
    stdfs::create_symlink("t", place / "ctx/sub/l");
    must_run({"tar", "--owner=0", "--group=0", "-cf", place.path("ctx/sub.tar"), "-C", place.path("ctx"), "sub"});
    BOOST_TEST_CONTEXT(c.name) { check_case(place, c); }
}
