#include <sys/stat.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include "flags.hpp"

namespace cobuild::buildctl {

namespace {

namespace stdfs = std::filesystem;

/// The fields of one CSV line; quotes protect commas, doubled quotes stand for one (RFC 4180).
std::vector<std::string> csv_fields(const std::string& text, std::string_view flag) {
    std::vector<std::string> fields(1);
    bool inside = false;
    for (std::size_t i = 0; i < text.size(); ++i) {
        if (text[i] == '"' && inside && i + 1 < text.size() && text[i + 1] == '"')
            fields.back() += text[i++];
        else if (text[i] == '"')
            inside = !inside;
        else if (text[i] == ',' && !inside)
            fields.emplace_back();
        else
            fields.back() += text[i];
    }
    if (inside) throw error{errc::invalid, cat(flag, " ", text, ": a double quote is not closed")};
    return fields;
}

/// type=...,key=value,... Keys in any case.
std::pair<std::string, client::attributes> typed(const std::string& text, std::string_view flag) {
    std::pair<std::string, client::attributes> out;
    for (const auto& field : csv_fields(text, flag)) {
        const auto eq = field.find('=');
        if (eq == std::string::npos) throw error{errc::invalid, cat(flag, " ", text, ": invalid value ", quoted(field), ", KEY=VALUE is expected")};
        const auto key = to_lower(field.substr(0, eq));
        (key == "type" ? out.first : out.second[key]) = field.substr(eq + 1);
    }
    if (out.first.empty()) throw error{errc::invalid, cat(flag, " ", text, ": ", flag, " requires type=<type>")};
    return out;
}

/// Go's ParseBool; anything else is `otherwise`.
bool truth(const std::string& text, bool otherwise) {
    for (const auto* t : {"1", "t", "T", "true", "TRUE", "True"})
        if (text == t) return true;
    for (const auto* f : {"0", "f", "F", "false", "FALSE", "False"})
        if (text == f) return false;
    return otherwise;
}

std::string environment(const char* name) {
    const char* value = std::getenv(name);
    return value == nullptr ? std::string() : std::string(value);
}

/// What GitHub's runner tells its steps.
void add_github(client::attributes& attrs) {
    const bool second = !environment("ACTIONS_CACHE_SERVICE_V2").empty() && truth(environment("ACTIONS_CACHE_SERVICE_V2"), false);
    if (!attrs.contains("url"))
        if (const auto url = environment("ACTIONS_CACHE_URL"); !url.empty()) attrs["url"] = url;
    if (!attrs.contains("url_v2") && second)
        if (const auto url = environment("ACTIONS_RESULTS_URL"); !url.empty()) attrs["url_v2"] = url;
    if (!attrs.contains("token"))
        if (const auto token = environment("ACTIONS_RUNTIME_TOKEN"); !token.empty()) attrs["token"] = token;
}

}  // namespace

output parse_output(const std::string& text, bool stdout_is_terminal) {
    output out;
    auto [type, attrs] = typed(text, "--output");
    if (attrs.contains("output"))
        throw error{errc::invalid, cat("--output ", text, ": output=", attrs["output"], " is not supported, you meant dest=", attrs["output"], "?")};
    const auto dest = attrs.contains("dest") ? attrs["dest"] : std::string();
    const bool archive = type == "oci" || type == "docker";
    if (archive && attrs["tar"].empty()) attrs.erase("tar");
    if (archive && attrs.contains("tar") && !truth(attrs["tar"], true)) {
        if (dest.empty()) throw error{errc::invalid, cat("output directory is required for ", type, " exporter with tar=false: add dest=")};
        attrs.erase("dest");
        out.exporter = {type, std::move(attrs)};
        out.layout = dest;
        return out;
    }
    client::target where;
    if (type == "local") {
        if (dest.empty()) throw error{errc::invalid, "--output type=local: dest= is missing, output directory is required for local exporter"};
        where.directory = dest;
        const auto mode = attrs.contains("mode") ? attrs["mode"] : std::string("copy");
        if (mode != "copy" && mode != "delete")
            throw error{errc::invalid, cat("--output type=local: unknown mode ", quoted(mode), " (copy and delete are known)")};
        where.mirror = mode == "delete";
    } else if (type == "tar" || archive) {
        std::error_code ec;
        if (!dest.empty() && dest != "-") {
            if (stdfs::is_directory(dest, ec)) throw error{errc::invalid, cat("--output ", text, ": destination file is a directory")};
            where.file = dest;
        } else if (stdout_is_terminal) {
            throw error{errc::invalid, cat("output file is required for ", type, " exporter. refusing to write to console")};
        } else {
            where.fd = 1;
        }
    } else {
        if (!dest.empty()) throw error{errc::invalid, cat("--output ", text, ": output ", dest, " is not supported by ", type, " exporter")};
        out.exporter = {type, std::move(attrs)};
        return out;
    }
    attrs.erase("dest");
    out.exporter = {type, std::move(attrs)};
    out.target = std::move(where);
    return out;
}

client::attributes parse_options(const std::vector<std::string>& items) {
    static constexpr std::string_view argument = "build-arg:";
    client::attributes out;
    if (const auto epoch = environment("SOURCE_DATE_EPOCH"); !epoch.empty()) out["build-arg:SOURCE_DATE_EPOCH"] = epoch;
    for (const auto& item : items) {
        const auto eq = item.find('=');
        if (eq != std::string::npos) {
            out[item.substr(0, eq)] = item.substr(eq + 1);
        } else if (item.starts_with(argument) && item.size() > argument.size()) {
            if (const char* value = std::getenv(item.substr(argument.size()).c_str())) out[item] = value;
        } else {
            throw error{errc::invalid, cat("invalid opt: invalid value ", item, ", KEY=VALUE is expected")};
        }
    }
    return out;
}

std::map<std::string, stdfs::path> parse_directories(const std::vector<std::string>& items, std::string_view flag) {
    std::map<std::string, stdfs::path> out;
    for (const auto& item : items) {
        const auto eq = item.find('=');
        if (eq == std::string::npos || eq == 0) throw error{errc::invalid, cat(flag, " ", item, ": NAME=DIRECTORY is expected")};
        const stdfs::path dir = item.substr(eq + 1);
        std::error_code ec;
        if (!stdfs::is_directory(dir, ec)) throw error{errc::not_found, cat(flag, " ", item, ": ", dir.string(), " is not a directory")};
        out[item.substr(0, eq)] = stdfs::absolute(dir);
    }
    return out;
}

client::cache_entry parse_cache_export(const std::string& text) {
    if (text.find("type=") == std::string::npos) return {"registry", {{"mode", "min"}, {"ref", text}}};
    auto [type, attrs] = typed(text, "--export-cache");
    attrs.try_emplace("mode", "min");
    if (type == "gha") add_github(attrs);
    if (type == "registry" && attrs["ref"].empty()) throw error{errc::invalid, "registry cache exporter requires ref"};
    if (type == "local" && attrs["dest"].empty()) throw error{errc::invalid, "local cache exporter requires dest"};
    return {type, std::move(attrs)};
}

std::vector<client::cache_entry> parse_cache_imports(const std::string& text) {
    std::vector<client::cache_entry> out;
    if (text.find("type=") == std::string::npos) {
        for (const auto& ref : csv_fields(text, "--import-cache")) out.push_back({"registry", {{"ref", ref}}});
        return out;
    }
    auto [type, attrs] = typed(text, "--import-cache");
    if (type == "gha") add_github(attrs);
    if (type == "registry" && attrs["ref"].empty()) throw error{errc::invalid, "registry cache importer requires ref"};
    if (type == "local" && attrs["src"].empty()) throw error{errc::invalid, "local cache importer requires src"};
    out.push_back({type, std::move(attrs)});
    return out;
}

std::pair<std::string, client::secret> parse_secret(const std::string& text) {
    std::string id, file, variable, type;
    for (const auto& field : csv_fields(text, "--secret")) {
        const auto eq = field.find('=');
        if (eq == std::string::npos)
            throw error{errc::invalid, cat("--secret ", text, ": invalid field ", quoted(field), " must be a key=value pair")};
        const auto key = to_lower(field.substr(0, eq));
        auto value = field.substr(eq + 1);
        if (key == "id")
            id = value;
        else if (key == "src" || key == "source")
            file = value;
        else if (key == "env")
            variable = value;
        else if (key == "type" && (value == "file" || value == "env"))
            type = value;
        else
            throw error{errc::invalid, cat("--secret ", text, ": unexpected ", key == "type" ? "type " : "key ", quoted(key == "type" ? value : key),
                                           key == "type" ? " (file and env are known)" : " (id, src, env and type are known)")};
    }
    if (id.empty()) throw error{errc::invalid, cat("--secret ", text, ": id= is missing")};
    if (type == "env" && variable.empty()) variable = std::exchange(file, {});
    if (file.empty() && variable.empty()) {
        if (type != "file" && std::getenv(id.c_str()) != nullptr)
            variable = id;
        else if (type == "env")
            variable = id;
        else
            file = id;
    }
    if (!variable.empty()) return {id, {.file = {}, .environment = variable}};
    struct stat info{};
    if (::stat(file.c_str(), &info) != 0) throw error{errc::not_found, cat("--secret ", text, ": failed to stat ", file, ": there is no such file")};
    if (info.st_size > 500 * 1024) throw error{errc::invalid, cat("--secret ", text, ": the secret is larger than 500 KiB")};
    return {id, {.file = stdfs::absolute(file), .environment = {}}};
}

std::pair<std::string, std::string> parse_ssh(const std::string& text) {
    const auto eq = text.find('=');
    const std::string id = text.substr(0, eq);
    std::vector<std::string> paths;
    if (eq != std::string::npos)
        for (const auto part : split(std::string_view(text).substr(eq + 1), ','))
            if (!part.starts_with("raw=") && !part.empty()) paths.emplace_back(part);
    if (id.empty()) throw error{errc::invalid, cat("--ssh ", text, ": an id is missing, as in --ssh default")};
    if (paths.size() > 1)
        throw error{errc::unsupported, cat("--ssh ", text, ": keys from files are not supported yet; load them into an agent with ssh-add")};
    if (paths.empty()) paths.push_back(environment("SSH_AUTH_SOCK"));
    if (paths.front().empty()) throw error{errc::not_found, cat("--ssh ", text, ": invalid empty ssh agent socket, make sure SSH_AUTH_SOCK is set")};
    std::error_code ec;
    if (!stdfs::exists(paths.front(), ec)) throw error{errc::not_found, cat("--ssh ", text, ": there is no ", paths.front())};
    if (!stdfs::is_socket(paths.front(), ec))
        throw error{errc::unsupported,
                    cat("--ssh ", text, ": keys from files are not supported yet; load the key into an agent with ssh-add and give --ssh ", id)};
    return {id, stdfs::absolute(paths.front()).string()};
}

void check_entitlement(const std::string& name) {
    static constexpr std::string_view known[] = {"network.host", "security.insecure", "device"};
    const auto plain = name.substr(0, name.find('='));
    if (std::find(std::begin(known), std::end(known), plain) == std::end(known))
        throw error{errc::invalid, cat("--allow ", quoted(name), ": unknown entitlement (network.host, security.insecure and device are known)")};
}

}  // namespace cobuild::buildctl
