/// Partition of cobuild.exporter: attestations, and the one that is made here: provenance (SLSA v1 and v0.2).
///
/// Pure: what a build was asked and what it used goes in, JSON comes out. The command line and the daemon give the same
/// record. Mode `min` holds nothing that a user may have kept secret: no build arguments, labels, sources or graph; in `max`
/// URLs lose their credentials all the same. Errors: errc::invalid for parameters that are not known or not as they should be.
module;
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

export module cobuild.exporter:provenance;

import cobuild.base;
import cobuild.oci;

export namespace cobuild::exporter {

/// What a statement is about: the result itself, which only the exporter knows, or something that its maker names.
struct attested {
    bool self = true;
    std::string name{};
    std::map<std::string, std::string> digests{};  ///< by algorithm, hexadecimal
};

/// A statement about a result.
struct attestation {
    std::string predicate_type;     ///< "https://slsa.dev/provenance/v1"
    std::string predicate;          ///< JSON; empty: null
    std::string filename;           ///< in a directory or tar
    bool inline_only = false;       ///< for images only
    bool contents = false;          ///< an SPDX list of the result's own contents: images get their layers' digests into it
    std::vector<attested> about{};  ///< empty: the result itself
    /// Provenance: how many of the image's layers, from the bottom, the result of a step ("step2:0") is made of. Their
    /// descriptors are added when the image is written.
    std::map<std::string, std::size_t> layers{};
};

/// What `attest:provenance` and `--provenance` may say.
struct provenance_options {
    bool max = false;
    bool v1 = true;  ///< false: v0.2
    bool inline_only = false;
    bool reproducible = false;
    bool complete_materials = false;  ///< it is an error when a source of the build has no digest
    std::string builder_id;
    std::string filename = "provenance.json";
};

/// What is to be attested. Nothing for an empty map.
struct attest_request {
    std::optional<provenance_options> provenance;
    std::optional<std::map<std::string, std::string>> sbom{};  ///< parameters; "generator" is the scanner's image
};
/// By kind what its parameters are, as a CSV list: {"provenance", "mode=max"}. "disabled=true" leaves a kind out. Throws
/// errc::invalid for an unknown kind. `default_max`: the mode when none is named.
attest_request parse_attests(const std::map<std::string, std::string>& attests, bool default_max);
/// From frontend attributes: "attest:KIND", and "build-arg:BUILDKIT_ATTEST_KIND" where the former is not.
std::map<std::string, std::string> attests_of(const std::map<std::string, std::string>& attrs);

/// Something the build was made from.
struct material {
    std::string uri;
    std::map<std::string, std::string> digests;  ///< by algorithm, hexadecimal
    bool operator==(const material&) const = default;
};
/// "pkg:docker/NAME@TAG?platform=linux%2Famd64" (`kind` docker or oci); a reference with a digest and no tag has that.
std::string package_url(std::string_view kind, const oci::reference& ref, const std::optional<oci::platform>& platform);
/// A URL whose user and password are xxxxx, as BuildKit shows them.
std::string hide_credentials(std::string_view url);

struct named_demand {
    std::string id;
    bool optional = false;
};
/// A vertex of the graph for mode max.
struct provenance_step {
    std::string id;                   ///< "step0"
    std::string digest;               ///< of the vertex
    std::string op;                   ///< JSON
    std::vector<std::string> inputs;  ///< "step0:0"
};
struct provenance_source {
    std::string filename, language, data;
    std::vector<provenance_step> steps{};  ///< of the graph that the file was read from
};

/// A request to a frontend: the one that made what is attested, or an input of it.
struct asked_request {
    std::string frontend;                                                  ///< empty: the client works by itself
    std::map<std::string, std::string> attrs;                              ///< as the client gave them
    std::map<std::string, std::shared_ptr<const asked_request>> inputs{};  ///< those of which it is known who made them
    std::shared_ptr<const asked_request> root{};                           ///< the client's own request, where that is another one
};

/// What a build was and did.
struct build_record {
    asked_request request{.frontend = "dockerfile.v0", .attrs = {}};
    std::vector<named_demand> secrets, ssh;
    std::vector<std::string> locals;
    std::vector<material> materials;
    bool complete = true;  ///< every source has a digest: no local one, no unknown
    bool network = false;  ///< a step could reach the network
    oci::platform builder;
    std::string invocation;  ///< an id of the build
    std::chrono::sys_time<nanoseconds> started{}, finished{};
    std::vector<provenance_step> steps;      ///< used in mode max
    std::vector<provenance_source> sources;  ///< likewise
    /// Where steps stand in `sources`: by step BuildKit's pb.Locations as JSON; likewise.
    std::map<std::string, std::string> locations;
    std::map<std::string, std::size_t> layers;  ///< see attestation::layers; likewise
    std::string dockerfile_version;             ///< of the built-in frontend, told where it made the result
    std::string environment;                    ///< members of provenanceEnvDir's files as one JSON object; may be empty
};

/// The members of all "*.json" below the directory, those of later names first; empty when there is none. Throws errc::invalid
/// naming the file for what is no JSON object or has a key that is BuildKit's own.
std::string read_environment(const std::string& directory);

/// Throws errc::invalid when complete materials are demanded and they are not.
attestation make_provenance(const provenance_options& options, const build_record& record);

/// An in-toto statement: `attestation` about `subjects` (name, and sha256 in hexadecimal).
struct subject {
    std::string name;
    std::string sha256;
};
std::string make_statement(const attestation& a, const std::vector<subject>& subjects);
/// `a` with the descriptors of its layers, given those of the whole image.
attestation with_layers(attestation a, const std::vector<oci::descriptor>& layers);

}  // namespace cobuild::exporter
