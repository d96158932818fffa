// The attributes of --cache-to and --cache-from.
#include "support/support.hpp"

#include <functional>
#include <string>

import cobuild.base;
import cobuild.remotecache;

using namespace cobuild;
using remotecache::parse_export;
using remotecache::parse_import;

namespace {

std::string failure(const std::function<void()>& f, errc kind) {
    try {
        f();
    } catch (const error& e) {
        BOOST_TEST((e.kind() == kind));
        return e.what();
    }
    return "";
}

}  // namespace

BOOST_AUTO_TEST_CASE(defaults_are_those_of_buildkit) {
    const auto out = parse_export("registry", {{"ref", "example.test/cache"}});
    BOOST_TEST(out.ref == "example.test/cache:latest");
    BOOST_TEST(!out.max);
    BOOST_TEST(out.image_manifest);
    BOOST_TEST(out.oci_types);
    BOOST_TEST(!out.ignore_error);
    // Docker's types have no manifest for it; another mode means min.
    BOOST_TEST(!parse_export("registry", {{"ref", "x"}, {"oci-mediatypes", "false"}}).image_manifest);
    BOOST_TEST(!parse_export("registry", {{"ref", "x"}, {"mode", "most"}}).max);
    BOOST_TEST(parse_export("local", {{"dest", "d"}, {"mode", "max"}}).max);
    BOOST_TEST(parse_export("local", {{"dest", "d"}}).tag == "latest");
    BOOST_TEST(!parse_export("inline", {{"mode", "max"}}).max);
    BOOST_TEST(parse_export("local", {{"dest", "d"}, {"compression", "zstd"}}).rest.at("compression") == "zstd");
    BOOST_TEST(parse_import("registry", {{"ref", "busybox"}}).ref == "docker.io/library/busybox:latest");
    BOOST_TEST(parse_import("local", {{"src", "d"}, {"tag", "t"}}).tag == "t");
}

BOOST_AUTO_TEST_CASE(mistakes_are_named) {
    const auto says = [](const std::string& text, const std::string& part) { BOOST_TEST(text.find(part) != std::string::npos, text); };
    says(failure([] { parse_export("registry", {}); }, errc::invalid), "ref= is missing");
    says(failure([] { parse_export("local", {}); }, errc::invalid), "dest= is missing");
    says(failure([] { parse_import("local", {{"dest", "x"}}); }, errc::invalid), "src= is missing");
    says(failure([] { parse_export("lokal", {}); }, errc::invalid), "did you mean local?");
    says(failure([] { parse_export("gha", {}); }, errc::unsupported), "type=gha is not supported yet");
    says(failure([] { parse_export("inline", {{"ref", "x"}}); }, errc::invalid), "unknown attribute \"ref\"");
    says(failure([] { parse_export("local", {{"dest", "x"}, {"ignore-error", "perhaps"}}); }, errc::invalid), "neither true nor false");
    says(failure([] { parse_export("registry", {{"ref", "x"}, {"oci-mediatypes", "false"}, {"image-manifest", "true"}}); }, errc::invalid),
         "needs oci-mediatypes=true");
    says(failure([] { parse_import("inline", {}); }, errc::invalid), "by the image's name");
    says(failure([] { parse_import("local", {{"src", "x"}, {"digest", "md5:1"}}); }, errc::invalid), "md5:1");
}
