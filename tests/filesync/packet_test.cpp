// The bytes of packets, put down by hand from the field numbers in proto/fsutil.proto.
#include "support/support.hpp"

#include <sys/stat.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

import cobuild.base;
import cobuild.filesync;

using namespace cobuild;
using namespace cobuild::filesync;
using namespace std::string_literals;

namespace {
bool refused(std::string_view message) {
    try {
        decode(message);
    } catch (const error& e) {
        return e.kind() == errc::corrupt;
    }
    return false;
}
}  // namespace

BOOST_AUTO_TEST_CASE(packets_without_a_stat) {
    BOOST_TEST(encode({}).empty());  // the end of the entries: every field has its zero value
    BOOST_TEST(!decode("").stat.has_value());
    BOOST_TEST((encode({.type = packet_type::request, .id = 300}) == "\x08\x01\x18\xac\x02"));
    BOOST_TEST((encode({.type = packet_type::request, .id = 0}) == "\x08\x01"));
    BOOST_TEST((encode({.type = packet_type::data, .id = 5, .data = "abc"}) == "\x08\x02\x18\x05\x22\x03"
                                                                               "abc"));
    BOOST_TEST((encode({.type = packet_type::data, .id = 5}) == "\x08\x02\x18\x05"));
    BOOST_TEST((encode({.type = packet_type::fin}) == "\x08\x03"));
    BOOST_TEST((encode({.type = packet_type::failure, .data = "no"}) == "\x08\x04\x22\x02no"));
    const auto p = decode(
        "\x08\x02\x18\x05\x22\x03"
        "abc");
    BOOST_TEST((p.type == packet_type::data));
    BOOST_TEST(p.id == 5U);
    BOOST_TEST(p.data == "abc");
}

BOOST_AUTO_TEST_CASE(a_stat_with_every_field) {
    const file_stat s{.path = "a/\xff",
                      .mode = go_mode::dir | 0755,
                      .uid = 1,
                      .gid = 1000,
                      .size = 3,
                      .mtime = -1,
                      .link = "l",
                      .dev_major = 8,
                      .dev_minor = 1,
                      .xattrs = {{"k", "v\0w"s}, {"z", ""}}};
    const std::string stat =
        "\x0a\x03"
        "a/\xff"                                                    // path
        "\x10\xed\x83\x80\x80\x08"                                  // mode: 1<<31 | 0755
        "\x18\x01\x20\xe8\x07\x28\x03"                              // uid, gid, size
        "\x30\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"              // modTime -1
        "\x3a\x01l\x40\x08\x48\x01"                                 // linkname, devmajor, devminor
        "\x52\x08\x0a\x01k\x12\x03v\0w\x52\x05\x0a\x01z\x12\x00"s;  // xattrs
    const std::string message = "\x12"s + static_cast<char>(stat.size()) + stat;
    BOOST_TEST((encode({.stat = s}) == message));
    BOOST_TEST((decode(message).stat == s));
}

BOOST_AUTO_TEST_CASE(unknown_fields_are_passed_over) {
    const auto p = decode(
        "\x08\x01\x78\x05\x7a\x01x\x7d"
        "1234"
        "\x79"
        "12345678"
        "\x18\x07");
    BOOST_TEST((p.type == packet_type::request));
    BOOST_TEST(p.id == 7U);
}

BOOST_AUTO_TEST_CASE(malformed_packets_are_refused) {
    for (const auto& message : std::vector<std::string>{
             "\x08"s,       // no value
             "\x08\x80"s,   // half a number
             "\x08\x05"s,   // no such type
             "\x0a\x01x"s,  // a text as the type
             "\x22\x05"
             "abc"s,                                               // shorter than it says
             "\x22\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"s,      // a length of 2^64 - 1
             "\x18\xff\xff\xff\xff\x1f"s,                          // an id of 33 bits
             "\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02"s,      // a number of 65 bits
             "\x18\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01"s,  // eleven bytes
             "\x00\x01"s,                                          // field 0
             "\x0b\x0c"s,                                          // a group
             "\x12\x00\x12\x00"s,                                  // two stats
             "\x12\x03\x0a\x05"
             "a"s,                                                             // a path longer than its stat
             "\x12\x10\x52\x06\x0a\x01k\x12\x01v\x52\x06\x0a\x01k\x12\x01w"s,  // an attribute twice
         })
        BOOST_TEST(refused(message), quoted(message));
}

// Go's os.FileMode: each as Go's os.Lstat would say it.
BOOST_AUTO_TEST_CASE(modes) {
    const std::vector<std::pair<std::uint32_t, std::uint32_t>> modes{
        {S_IFREG | 0644, 0644},
        {S_IFREG | 04755, 0x800000U | 0755},
        {S_IFREG | 02755, 0x400000U | 0755},
        {S_IFDIR | 01777, 0x80000000U | 0x100000U | 0777},
        {S_IFLNK | 0777, 0x8000000U | 0777},
        {S_IFBLK | 0660, 0x4000000U | 0660},
        {S_IFCHR | 0666, 0x4000000U | 0x200000U | 0666},
        {S_IFIFO | 0600, 0x2000000U | 0600},
        {S_IFSOCK | 0755, 0x1000000U | 0755},
    };
    for (const auto& [st, go] : modes) {
        BOOST_TEST(to_go_mode(st) == go);
        BOOST_TEST(from_go_mode(go) == st);
    }
    for (const std::uint32_t bad : {go_mode::dir | go_mode::symlink, go_mode::irregular, go_mode::char_device | 0U})
        BOOST_CHECK_THROW(from_go_mode(bad), error);
}
