// Attestations that a frontend gives with its result.
module;
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.build;

import cobuild.json;
import :parts;

namespace cobuild::build {

namespace {

constexpr std::string_view provenance_type = "https://slsa.dev/provenance/", spdx = "https://spdx.dev/Document";

// clang 19 crashes where the first such map it meets is a member's default from another module.
[[maybe_unused]] const std::map<std::string, std::string> none;

std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

std::string text_of(const std::map<std::string, std::string>& m, const std::string& key) {
    const auto at = m.find(key);
    return at == m.end() ? std::string() : at->second;
}

/// What this engine says of a build nobody else may say in its name.
void refuse_provenance(const std::string& type) {
    if (type.starts_with(provenance_type)) throw error{errc::invalid, "frontend may not set provenance attestations"};
}

exporter::attestation single(const attested_ref& given, std::string predicate) {
    refuse_provenance(given.predicate_type);
    if (given.path.empty()) throw error{errc::invalid, "attestation does not have set path"};
    exporter::attestation out{.predicate_type = given.predicate_type, .predicate = std::move(predicate), .filename = base_name(given.path)};
    for (const auto& s : given.subjects) {
        exporter::attested about{.self = s.self, .name = s.name, .digests = {}};
        for (const auto& d : s.digests)
            if (const auto colon = d.find(':'); colon != std::string::npos) about.digests[d.substr(0, colon)] = d.substr(colon + 1);
        out.about.push_back(std::move(about));
    }
    return out;
}

/// A statement as it stands in a bundle.
exporter::attestation unbundled(const attested_ref& given, const std::string& name, const std::string& text) {
    json::value statement;
    try {
        statement = json::parse(text);
    } catch (const error& e) {
        throw error(e).with(cat("cannot decode in-toto statement ", name));
    }
    const auto* type = statement.find("predicateType");
    if (type == nullptr || !type->is_string()) throw error{errc::invalid, cat("the in-toto statement ", name, " has no predicateType")};
    if (!given.predicate_type.empty() && type->as_string() != given.predicate_type)
        throw error{errc::invalid, cat("bundle entry ", type->as_string(), " does not match required predicate type ", given.predicate_type)};
    refuse_provenance(type->as_string());
    exporter::attestation out{.predicate_type = type->as_string(), .predicate = {}, .filename = name};
    if (const auto* predicate = statement.find("predicate"); predicate != nullptr) out.predicate = json::serialize(*predicate);
    const auto* subjects = statement.find("subject");
    if (subjects == nullptr || !subjects->is_array()) return out;
    for (const auto& s : subjects->as_array()) {
        exporter::attested about{.self = false, .name = {}, .digests = {}};
        if (const auto* n = s.find("name"); n != nullptr && n->is_string()) about.name = n->as_string();
        if (const auto* all = s.find("digest"); all != nullptr && all->is_object())
            for (const auto& m : all->as_object().members()) about.digests[m.key] = m.val.as_string();
        out.about.push_back(std::move(about));
    }
    return out;
}

/// The scanner's own document comes first.
bool is_core(const attested_ref& given, const std::string& name) {
    const auto core = text_of(given.metadata, "sbom-core");
    return !core.empty() && name.substr(0, name.find('.')) == core;
}

}  // namespace

async::task<std::vector<exporter::attestation>> read_attestations(std::vector<attested_ref> given) {
    std::vector<exporter::attestation> first, rest;
    for (const auto& one : given) {
        if (!one.ref) throw error{errc::invalid, "attestation does not have available content"};
        const bool only_inline = text_of(one.metadata, "inline-only") == "true";
        if (!one.bundle) {
            auto made = single(one, co_await one.ref->read_file(one.path, 0, 0));
            made.inline_only = only_inline;
            made.contents = made.predicate_type == spdx && is_core(one, made.filename);
            (is_core(one, made.filename) ? first : rest).push_back(std::move(made));
            continue;
        }
        const auto directory = one.path.empty() ? std::string("/") : one.path;
        for (const auto& entry : co_await one.ref->read_directory(directory, "")) {
            if (!entry.info.is_file()) throw error{errc::invalid, cat(entry.name, " is not a regular file")};
            auto made = unbundled(one, entry.name, co_await one.ref->read_file(cat(directory, "/", entry.name), 0, 0));
            made.inline_only = only_inline;
            made.contents = made.predicate_type == spdx && is_core(one, made.filename);
            (is_core(one, made.filename) ? first : rest).push_back(std::move(made));
        }
    }
    for (auto& r : rest) first.push_back(std::move(r));
    co_return first;
}

}  // namespace cobuild::build
