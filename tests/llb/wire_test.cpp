#include "support/support.hpp"

#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

import cobuild.base;
import cobuild.llb;

using namespace cobuild;
using namespace std::string_literals;

namespace {

std::string hex(std::string_view data) {
    static constexpr std::string_view digits = "0123456789abcdef";
    std::string out;
    for (const char c : data) {
        out += digits[static_cast<unsigned char>(c) >> 4];
        out += digits[static_cast<unsigned char>(c) & 15];
    }
    return out;
}

errc kind_of(std::string_view data, const llb::limits& l = {}) {
    try {
        (void)llb::unmarshal_op(data, l);
    } catch (const error& e) {
        return e.kind();
    }
    BOOST_FAIL("accepted " + hex(data));
    return errc::internal;
}

/// An op with every field of every message set to something.
llb::op everything() {
    llb::exec_op e;
    e.meta = {.args = {"/bin/sh", "-c", ""},
              .env = {"A=b"},
              .cwd = "/w",
              .user = "u:g",
              .proxy = llb::proxy_env{.http = "1", .https = "2", .ftp = "3", .no = "4", .all = "5"},
              .extra_hosts = {{"h", "1.2.3.4"}},
              .hostname = "name",
              .ulimits = {{"nofile", 1, -1}},
              .cgroup_parent = "cg",
              .remove_mount_stubs_recursive = true,
              .valid_exit_codes = {0, 300, -1}};
    e.mounts = {
        {.input = 0, .dest = "/", .output = 0},
        {.input = llb::scratch, .dest = "/t", .output = llb::no_output, .type = llb::mount_type::tmpfs, .tmpfs = llb::tmpfs_opt{1 << 20}},
        {.input = 1,
         .selector = "/cache",
         .dest = "/c",
         .output = llb::no_output,
         .type = llb::mount_type::cache,
         .cache = llb::cache_opt{"id", llb::cache_sharing::locked}},
        {.input = llb::scratch, .dest = "/s", .output = 0, .type = llb::mount_type::secret, .secret = llb::secret_opt{"s", 1, 2, 0400, true}},
        {.input = llb::scratch, .dest = "/a", .output = 0, .type = llb::mount_type::ssh, .ssh = llb::secret_opt{"default", 0, 0, 0600, false}},
        {.input = 1, .dest = "/r", .output = llb::no_output, .readonly = true, .result_id = "r", .content = llb::content_cache::off}};
    e.network = llb::net_mode::none;
    e.security = llb::security_mode::insecure;
    e.secret_envs = {{"id", "NAME", true}};
    e.devices = {{"vendor.com/gpu=all", true}};
    return {.inputs = {{digest::of("a"), 0}, {digest::of("b"), 3}},
            .what = e,
            .platform = llb::platform{"arm64", "linux", "v8", "1.2", {"f"}},
            .constraints = llb::worker_constraints{{"x==y"}}};
}

llb::op all_files() {
    const llb::chown_opt owner{.user = llb::user_opt{llb::named_user{"daemon", 0}}, .group = llb::user_opt{std::uint32_t{0}}};
    llb::file_op f;
    f.actions.push_back({.input = 0,
                         .secondary_input = 1,
                         .output = llb::no_output,
                         .what = llb::copy_action{.src = "/a*",
                                                  .dest = "/b/",
                                                  .owner = owner,
                                                  .mode = 0644,
                                                  .follow_symlink = true,
                                                  .dir_copy_contents = true,
                                                  .attempt_unpack = true,
                                                  .create_dest_path = true,
                                                  .allow_wildcard = true,
                                                  .allow_empty_wildcard = true,
                                                  .timestamp = 5,
                                                  .include_patterns = {"i"},
                                                  .exclude_patterns = {"e"},
                                                  .always_replace_existing = true,
                                                  .mode_str = "u+x",
                                                  .required_paths = {"p"}}});
    f.actions.push_back({.input = 2,
                         .secondary_input = -1,
                         .output = llb::no_output,
                         .what = llb::mkfile_action{.path = "/f", .mode = 0755, .data = "\0\xff"s, .owner = {}, .timestamp = -1}});
    f.actions.push_back({.input = 3,
                         .secondary_input = -1,
                         .output = llb::no_output,
                         .what = llb::mkdir_action{.path = "/d", .mode = 0755, .make_parents = true, .owner = llb::chown_opt{}, .timestamp = 0}});
    f.actions.push_back({.input = 4, .secondary_input = -1, .output = llb::no_output, .what = llb::rm_action{"/x", true, true}});
    f.actions.push_back({.input = 5, .secondary_input = -1, .output = 0, .what = llb::symlink_action{"/o", "/n", {}, -1}});
    return {.inputs = {{digest::of("a"), 0}, {digest::of("b"), 0}}, .what = f, .platform = {}};
}

}  // namespace

BOOST_AUTO_TEST_SUITE(wire)

// Written out by hand from protobuf's encoding rules: key = field << 3 | type, lengths before texts.
BOOST_AUTO_TEST_CASE(a_source_op_byte_by_byte) {
    const llb::op o{.inputs = {}, .what = llb::source_op{"local://x", {{"b", ""}, {"a", "1"}}}, .platform = {}};
    const std::string source = "0a09" + hex("local://x") + "1206" + "0a0161" + "120131" + "1205" + "0a0162" + "1200";
    BOOST_TEST(hex(llb::marshal(o)) == "1a1a" + source + "5a00");
}

// A definition that BuildKit's own client wrote (its solver's test data has it): the names of its two vertices.
BOOST_AUTO_TEST_CASE(names_equal_buildkits) {
    const llb::op image{
        .inputs = {}, .what = llb::source_op{"docker-image://docker.io/library/busybox:latest", {}}, .platform = {}, .constraints = {}};
    const auto id = digest::of(llb::marshal(image));
    BOOST_TEST(id.str() == "sha256:74ecb5d790c33a213ba00f8f43d62947df1d4dea72f5ec13353a9b943f469f0f");
    llb::graph g;
    const auto d = g.finish(g.add(image));
    BOOST_TEST(digest::of(d.ops.back()).str() == "sha256:fdd990931001ae92f1971673ff21204ef6a5ccc8c1a4dd133d8f0f9bff67a3c2");
}

BOOST_AUTO_TEST_CASE(negative_numbers_take_ten_bytes_and_zero_none) {
    llb::exec_op e;
    e.mounts = {{.input = -1, .dest = "/", .output = 0}};
    const llb::op o{.inputs = {}, .what = e, .platform = {}, .constraints = {}};
    // exec{ meta{} mounts{ input -1, dest "/" } }
    BOOST_TEST(hex(llb::marshal(o)) ==
               "1212"
               "0a00"
               "120e"
               "08ffffffffffffffffff01"
               "1a012f");
}

BOOST_AUTO_TEST_CASE(a_case_of_a_oneof_is_written_even_when_zero) {
    llb::file_op f;
    f.actions = {{.input = 0,
                  .secondary_input = 0,
                  .output = 0,
                  .what = llb::mkdir_action{.path = "",
                                            .mode = 0,
                                            .make_parents = false,
                                            .owner = llb::chown_opt{.user = llb::user_opt{std::uint32_t{0}}, .group = {}},
                                            .timestamp = 0}}};
    const llb::op o{.inputs = {}, .what = f, .platform = {}, .constraints = {}};
    // file{ actions{ mkdir{ owner{ user{ byID 0 } } } } }
    BOOST_TEST(hex(llb::marshal(o)) ==
               "220a"
               "1208"
               "3206"
               "2204"
               "0a02"
               "1000");
}

BOOST_AUTO_TEST_CASE(what_was_written_is_read_back) {
    for (const auto& o : {everything(), all_files(), llb::op{.inputs = {{digest::of("a"), 0}}, .what = llb::merge_op{{0, -1, 0}}, .platform = {}},
                          llb::op{.inputs = {{digest::of("a"), 0}}, .what = llb::diff_op{-1, 0}, .platform = {}},
                          llb::op{.inputs = {{digest::of("a"), 0}}, .what = llb::passthrough_op{"id", {0, 1, 200}}, .platform = {}},
                          llb::op{.inputs = {},
                                  .what = llb::build_op{.builder = -1,
                                                        .inputs = {{"buildkit.llb.definition", 0}},
                                                        .def = std::make_shared<llb::definition>(llb::definition{{"x"}, {}, {}}),
                                                        .attrs = {{"k", "v"}}},
                                  .platform = {}}}) {
        const auto data = llb::marshal(o);
        const auto again = llb::unmarshal_op(data);
        BOOST_TEST(hex(llb::marshal(again)) == hex(data));
        BOOST_TEST(again.what.index() == o.what.index());
    }
    const auto back = llb::unmarshal_op(llb::marshal(everything()));
    const auto& e = std::get<llb::exec_op>(back.what);
    BOOST_TEST(e.meta.args.size() == 3U);
    BOOST_TEST(e.meta.ulimits.at(0).hard == -1);
    BOOST_TEST(e.meta.valid_exit_codes.at(1) == 300);
    BOOST_TEST(e.mounts.at(2).cache->id == "id");
    BOOST_TEST((e.mounts.at(5).content == llb::content_cache::off));
    BOOST_TEST(back.inputs.at(1).index == 3);
    BOOST_TEST(back.platform->variant == "v8");
}

// libprotobuf's compiler as an oracle: it reads our bytes, and writes the same ones from its own text.
BOOST_AUTO_TEST_CASE(protoc_agrees) {
    if (std::system("protoc --version >/dev/null 2>&1") != 0) {
        BOOST_TEST_MESSAGE("skipped: no protoc here");
        return;
    }
    const cobuild::test::scratch_dir dir;
    const std::string proto = cat("--proto_path=", std::getenv("COBUILD_SOURCE_DIR"), "/proto ops.proto");
    llb::graph g;
    const auto base = g.add({.inputs = {},
                             .what = llb::source_op{"docker-image://docker.io/library/busybox:latest", {}},
                             .platform = llb::platform{"amd64", "linux", "", "", {}}},
                            {.ignore_cache = true,
                             .description = {{"llb.customname", "x"}, {"a", ""}},
                             .export_cache = false,
                             .caps = {{"c", true}},
                             .progress_group = llb::progress_group{"i", "n", true},
                             .linux_resources = llb::linux_resources{1, -1, 2, 3, 4, "0", "1"}},
                            {{{1, 0}, {2, 0}}});
    g.set_source({"Dockerfile", "FROM x\n\xc3\xa4", nullptr, "Dockerfile"});
    int n = 0;
    const auto check = [&](const std::string& data, const std::string& type) {
        const auto in = (dir / cat("in", ++n)).string();
        const auto out = (dir / cat("out", n)).string();
        cobuild::test::write_file(in, data);
        const auto command = cat("protoc ", proto, " --decode=pb.", type, " <", in, " >", in, ".txt && protoc ", proto,
                                 " --deterministic_output --encode=pb.", type, " <", in, ".txt >", out);
        BOOST_REQUIRE(std::system(command.c_str()) == 0);
        BOOST_TEST(hex(cobuild::test::read_file(out)) == hex(data));
        // A field unknown to the .proto would be shown by its number.
        const auto text = cobuild::test::read_file(in + ".txt");
        BOOST_TEST(text.find("\n1: ") == std::string::npos);
    };
    check(llb::marshal(everything()), "Op");
    check(llb::marshal(all_files()), "Op");
    check(llb::marshal(g.finish(base)), "Definition");
}

BOOST_AUTO_TEST_CASE(unknown_fields_and_relics_are_skipped) {
    const std::string known = "\x1a\x03\x0a\x01x"s;
    const std::string unknown_varint = "\xf8\x07\x05"s;
    const std::string unknown_text = "\xfa\x07\x02hi"s;
    const std::string fixed = "\xf9\x07"s + "12345678" + "\xfd\x07"s + "1234";
    const std::string group = "\xfb\x07\x08\x01\xfb\x07\xfc\x07\xfc\x07"s;
    const std::string wrong_type = "\x18\x05"s;  // field 3 as a number
    const auto o = llb::unmarshal_op(unknown_varint + group + known + unknown_text + fixed + wrong_type);
    BOOST_TEST(std::get<llb::source_op>(o.what).identifier == "x");
    BOOST_TEST(!o.constraints.has_value());
}

BOOST_AUTO_TEST_CASE(a_message_given_twice_is_merged_and_the_last_case_of_a_oneof_counts) {
    const auto merged = llb::unmarshal_op("\x1a\x03\x0a\x01x\x1a\x08\x12\x06\x0a\x01k\x12\x01v"s);
    BOOST_TEST(std::get<llb::source_op>(merged.what).identifier == "x");
    BOOST_TEST(std::get<llb::source_op>(merged.what).attrs.at("k") == "v");
    const auto last = llb::unmarshal_op("\x1a\x03\x0a\x01x\x32\x02\x0a\x00"s);
    BOOST_TEST(std::get<llb::merge_op>(last.what).inputs.size() == 1U);
    // Packed and unpacked lists of numbers are the same.
    const auto list = llb::unmarshal_op("\x42\x0a\x0a\x01i\x12\x02\x01\x02\x10\x03"s.replace(1, 1, "\x09"s));
    BOOST_TEST((std::get<llb::passthrough_op>(list.what).outputs == std::vector<std::int64_t>{1, 2, 3}));
}

BOOST_AUTO_TEST_CASE(absent_numbers_are_zero_whatever_our_defaults) {
    const auto o = llb::unmarshal_op("\x22\x04\x12\x02\x22\x00"s);
    const auto& a = std::get<llb::file_op>(o.what).actions.at(0);
    BOOST_TEST(a.secondary_input == 0);
    BOOST_TEST(a.output == 0);
    BOOST_TEST(std::get<llb::copy_action>(a.what).mode == 0);
    BOOST_TEST(std::get<llb::copy_action>(a.what).timestamp == 0);
}

BOOST_AUTO_TEST_CASE(damaged_bytes_are_refused) {
    for (const auto& data : {"\x1a"s, "\x1a\x05x"s, "\x08"s, "\x08\xff"s, "\x00\x01"s, "\x0f\x01"s, "\x09\x31"s, "\x0b"s, "\x0b\x14"s, "\x0c"s,
                             "\x1a\xff\xff\xff\xff\xff\xff\xff\xff\x7f"s, "\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02"s,
                             "\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"s, "\xf8\xff\xff\xff\xff\x01\x01"s}) {
        BOOST_TEST((kind_of(data) == errc::corrupt), hex(data));
    }
    // No prefix of a good message may do worse than be refused.
    for (const auto& data : {llb::marshal(everything()), llb::marshal(all_files())}) {
        for (std::size_t n = 0; n < data.size(); ++n) {
            try {
                (void)llb::unmarshal_op(std::string_view(data).substr(0, n));
            } catch (const error&) {
            }
        }
    }
}

BOOST_AUTO_TEST_CASE(limits_hold) {
    std::string nested = "\x1a\x00"s;  // build_op{ def{ source{ infos{ definition{ ... } } } } }
    const auto wrap = [](char key, const std::string& inner) {
        std::string out(1, key);
        for (auto n = inner.size();; n >>= 7) {
            out += static_cast<char>(n >= 0x80 ? n | 0x80 : n);
            if (n < 0x80) break;
        }
        return out + inner;
    };
    std::string def;
    for (int i = 0; i < 30; ++i) def = wrap('\x1a', wrap('\x12', wrap('\x1a', def)));
    BOOST_TEST((kind_of(wrap('\x2a', wrap('\x1a', def))) == errc::invalid));

    std::string many;
    for (int i = 0; i < 1000; ++i) many += "\x0a\x00"s;
    BOOST_TEST(llb::unmarshal_op(many).inputs.size() == 1000U);
    BOOST_TEST((kind_of(many, {.max_messages = 500}) == errc::invalid));
    BOOST_TEST((kind_of(many, {.max_bytes = 100}) == errc::invalid));
    std::string ops;
    for (int i = 0; i < 11; ++i) ops += "\x0a\x01x"s;
    BOOST_CHECK_THROW((void)llb::unmarshal_definition(ops, {.max_ops = 10}), error);
    BOOST_TEST(llb::unmarshal_definition(ops).ops.size() == 11U);
}

BOOST_AUTO_TEST_SUITE_END()
