// What buildctl's flags mean: texts to the client's requests. No command, no daemon; errors name the flag and the text.
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

import cobuild.base;
import cobuild.client;

namespace cobuild::buildctl {

/// One --output: the exporter as the daemon is told of it, and where its bytes go here (nothing for an image).
struct output {
    client::exporter exporter;
    std::optional<client::target> target;
    std::string layout;  ///< of oci and docker with tar=false: the directory
};
/// As BuildKit's: local needs a directory; tar, oci and docker write a file or, without dest, standard output, which must
/// then be no terminal; with tar=false they need a directory.
output parse_output(const std::string& text, bool stdout_is_terminal);
/// KEY=VALUE each. "build-arg:NAME" alone takes the environment's value, or is left out; SOURCE_DATE_EPOCH is passed on.
client::attributes parse_options(const std::vector<std::string>& items);
/// NAME=DIR each; the directories exist.
std::map<std::string, std::filesystem::path> parse_directories(const std::vector<std::string>& items, std::string_view flag);
client::cache_entry parse_cache_export(const std::string& text);
/// type=...; or the older form, a comma-separated list of images.
std::vector<client::cache_entry> parse_cache_imports(const std::string& text);
std::pair<std::string, client::secret> parse_secret(const std::string& text);
/// ID[=SOCKET]; without a socket the agent of SSH_AUTH_SOCK.
std::pair<std::string, std::string> parse_ssh(const std::string& text);
void check_entitlement(const std::string& name);

}  // namespace cobuild::buildctl
