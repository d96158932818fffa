#include "support/support.hpp"

#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "flags.hpp"

import cobuild.base;
import cobuild.client;

using namespace cobuild;
using namespace cobuild::buildctl;

namespace {

/// The sentence of what `f` throws; empty when it does not.
template<class F>
std::string refusal(F f) {
    try {
        f();
    } catch (const error& e) {
        return e.what();
    }
    return {};
}

bool has(const std::string& text, std::string_view part) {
    if (text.find(part) != std::string::npos) return true;
    BOOST_TEST_MESSAGE("it says: " << text);
    return false;
}

}  // namespace

BOOST_AUTO_TEST_CASE(outputs) {
    test::scratch_dir dir;
    const auto local = parse_output("type=local,dest=out", true);
    BOOST_TEST(local.exporter.type == "local");
    BOOST_TEST(local.exporter.attrs.empty());  // the daemon is not told where
    BOOST_TEST(local.target->directory == "out");
    BOOST_TEST(!local.target->mirror);
    BOOST_TEST(parse_output("type=local,dest=out,mode=delete", true).target->mirror);

    const auto oci = parse_output("type=oci,dest=a.tar,\"annotation.x=1,2\"", true);
    BOOST_TEST(oci.target->file == "a.tar");
    BOOST_TEST(oci.exporter.attrs.at("annotation.x") == "1,2");
    BOOST_TEST(parse_output("type=docker,name=x", false).target->fd == 1);
    BOOST_TEST(parse_output("type=tar,dest=-", false).target->fd == 1);

    const auto image = parse_output("type=image,name=reg.test/a,push=true", true);
    BOOST_TEST(!image.target.has_value());
    BOOST_TEST(image.exporter.attrs == (client::attributes{{"name", "reg.test/a"}, {"push", "true"}}));

    BOOST_TEST(has(refusal([] { parse_output("dest=x", false); }), "--output requires type=<type>"));
    BOOST_TEST(has(refusal([] { parse_output("type=oci,x", false); }), "invalid value \"x\""));
    BOOST_TEST(has(refusal([] { parse_output("type=tar,output=x", false); }), "you meant dest=x?"));
    BOOST_TEST(has(refusal([] { parse_output("type=local", false); }), "output directory is required for local exporter"));
    BOOST_TEST(has(refusal([] { parse_output("type=tar", true); }), "refusing to write to console"));
    BOOST_TEST(has(refusal([] { parse_output("type=image,dest=x", false); }), "output x is not supported by image exporter"));
    const auto layout = parse_output("type=oci,tar=false,dest=x", false);
    BOOST_TEST(layout.layout == "x");
    BOOST_TEST(!layout.target.has_value());
    BOOST_TEST(layout.exporter.attrs == (client::attributes{{"tar", "false"}}));
    BOOST_TEST(has(refusal([] { parse_output("type=docker,tar=false", false); }), "output directory is required for docker exporter"));
    BOOST_TEST(has(refusal([&] { parse_output("type=oci,dest=" + dir.path().string(), false); }), "destination file is a directory"));
}

BOOST_AUTO_TEST_CASE(options_of_the_frontend) {
    ::unsetenv("SOURCE_DATE_EPOCH");
    ::setenv("CLIENT_TEST_ARG", "outside", 1);
    ::unsetenv("CLIENT_TEST_UNSET");
    const auto o =
        parse_options({"filename=D=x", "build-arg:CLIENT_TEST_ARG", "build-arg:CLIENT_TEST_UNSET", "build-arg:A=", "target=a", "target=b"});
    BOOST_TEST(o == (client::attributes{{"filename", "D=x"}, {"build-arg:CLIENT_TEST_ARG", "outside"}, {"build-arg:A", ""}, {"target", "b"}}));
    BOOST_TEST(has(refusal([] { parse_options({"target"}); }), "invalid value target"));
    ::setenv("SOURCE_DATE_EPOCH", "1700000000", 1);
    BOOST_TEST(parse_options({}).at("build-arg:SOURCE_DATE_EPOCH") == "1700000000");
    BOOST_TEST(parse_options({"build-arg:SOURCE_DATE_EPOCH=1"}).at("build-arg:SOURCE_DATE_EPOCH") == "1");
    ::unsetenv("SOURCE_DATE_EPOCH");
}

BOOST_AUTO_TEST_CASE(directories) {
    test::scratch_dir dir;
    BOOST_TEST(parse_directories({"context=" + dir.path().string()}, "--local").at("context") == dir.path());
    BOOST_TEST(has(refusal([&] { parse_directories({dir.path().string()}, "--local"); }), "NAME=DIRECTORY is expected"));
    BOOST_TEST(has(refusal([&] { parse_directories({"a=" + (dir / "none").string()}, "--local"); }), "is not a directory"));
}

BOOST_AUTO_TEST_CASE(caches) {
    const auto plain = parse_cache_export("reg.test/cache");
    BOOST_TEST(plain.type == "registry");
    BOOST_TEST(plain.attrs == (client::attributes{{"mode", "min"}, {"ref", "reg.test/cache"}}));
    BOOST_TEST(parse_cache_export("type=registry,ref=r,mode=max").attrs.at("mode") == "max");
    BOOST_TEST(parse_cache_export("type=inline").attrs.at("mode") == "min");
    BOOST_TEST(has(refusal([] { parse_cache_export("type=registry"); }), "registry cache exporter requires ref"));
    BOOST_TEST(parse_cache_export("type=local,dest=d").attrs == (client::attributes{{"dest", "d"}, {"mode", "min"}}));
    BOOST_TEST(has(refusal([] { parse_cache_export("type=local"); }), "local cache exporter requires dest"));
    const auto two = parse_cache_imports("reg.test/a,reg.test/b");
    BOOST_REQUIRE(two.size() == 2U);
    BOOST_TEST(two[1].attrs.at("ref") == "reg.test/b");
    BOOST_TEST(parse_cache_imports("type=local,src=d")[0].attrs.at("src") == "d");
    BOOST_TEST(has(refusal([] { parse_cache_imports("type=local"); }), "local cache importer requires src"));
}

BOOST_AUTO_TEST_CASE(secrets) {
    test::scratch_dir dir;
    test::write_file(dir / "s", "x");
    ::setenv("CLIENT_TEST_SECRET", "x", 1);
    const auto file = parse_secret("id=a,src=" + (dir / "s").string());
    BOOST_TEST(file.first == "a");
    BOOST_TEST(file.second.file == (dir / "s"));
    BOOST_TEST(parse_secret("id=a,env=CLIENT_TEST_SECRET").second.environment == "CLIENT_TEST_SECRET");
    BOOST_TEST(parse_secret("id=a,type=env,src=CLIENT_TEST_SECRET").second.environment == "CLIENT_TEST_SECRET");
    BOOST_TEST(parse_secret("id=CLIENT_TEST_SECRET").second.environment == "CLIENT_TEST_SECRET");
    BOOST_TEST(has(refusal([] { parse_secret("src=x"); }), "id= is missing"));
    BOOST_TEST(has(refusal([] { parse_secret("id=x,src=/none/at/all"); }), "failed to stat /none/at/all"));
    BOOST_TEST(has(refusal([] { parse_secret("id=x,kind=y"); }), "unexpected key \"kind\""));
    BOOST_TEST(has(refusal([] { parse_secret("id=x,type=y"); }), "unexpected type \"y\""));
}

BOOST_AUTO_TEST_CASE(ssh_and_entitlements) {
    test::scratch_dir dir;
    test::write_file(dir / "key", "x");
    ::unsetenv("SSH_AUTH_SOCK");
    BOOST_TEST(has(refusal([] { parse_ssh("default"); }), "make sure SSH_AUTH_SOCK is set"));
    BOOST_TEST(has(refusal([&] { parse_ssh("default=" + (dir / "key").string()); }), "keys from files are not supported yet"));
    BOOST_TEST(has(refusal([] { check_entitlement("network.all"); }), "unknown entitlement"));
    check_entitlement("network.host");
    check_entitlement("security.insecure");
}
