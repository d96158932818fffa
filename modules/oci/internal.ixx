/// What the bodies of cobuild.oci share. Not installed.
module;
#include <initializer_list>
#include <map>
#include <string>
#include <string_view>
#include <vector>

module cobuild.oci:internal;

import cobuild.base;
import cobuild.json;
import cobuild.oci;

namespace cobuild::oci::detail {
json::object unknown_members(const json::object& o, std::initializer_list<std::string_view> known);
void append_unknown(json::object& out, const json::object& unknown);
/// These leave out what is empty, as Go's omitempty.
void put(json::object& out, std::string_view key, const std::string& v);
void put(json::object& out, std::string_view key, const std::vector<std::string>& v);
void put(json::object& out, std::string_view key, const std::map<std::string, std::string>& v);
platform read_platform(const json::object& o);
void write_platform(json::object& out, const platform& p);
digest read_digest(const json::object& o, std::string_view key);
}  // namespace cobuild::oci::detail
