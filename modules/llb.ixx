/// cobuild.llb: the build graph as plain data, and as BuildKit's bytes.
///
/// Words. An **op** is a node's work with its inputs; its marshalled bytes (protobuf, proto/ops.proto) name it: a
/// **vertex** is the sha256 of them. A **definition** is a list of such bytes, whose last one is the *terminal*: an op
/// without work whose first input is the result; beside it stands metadata that does not count for the name.
/// Marshalling writes fields in number order and maps by key, as Go's deterministic marshal does, so our digests equal
/// BuildKit's for equal graphs. Unmarshalling takes any valid message, ignores what it does not know, and has limits.
///
/// Not its job: what ops do, cache keys, images. Pure: no files, no clock. Bytes are held in std::string; paths and
/// arguments are bytes too and need not be UTF-8. Distinct objects may be used from distinct threads.
/// Errors: errc::invalid for what breaks a rule below, errc::corrupt for bytes that are no such message.
module;
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

export module cobuild.llb;

import cobuild.base;
export import :ops;

export namespace cobuild::llb {

// ---------------------------------------------------------------- bytes

struct limits {
    std::size_t max_bytes = std::size_t{64} << 20;
    std::size_t max_ops = 100'000;
    std::size_t max_messages = 1'000'000;  ///< messages and list elements in all: what bounds memory
    unsigned max_depth = 24;               ///< of messages within messages
};

bytes marshal(const op& o);
bytes marshal(const definition& d);
op unmarshal_op(std::string_view data, const limits& l = {});
definition unmarshal_definition(std::string_view data, const limits& l = {});

// ---------------------------------------------------------------- graphs

/// The rules of one op alone: an exec has arguments and a root mount, a file op has actions, every index points to an
/// input or an earlier action, enumerations have known values. Throws errc::invalid.
void validate(const op& o);
/// How many outputs an op has (0 for the terminal).
std::int64_t output_count(const op& o);

/// Builds a definition: equal ops become one vertex. Inputs must have been added before.
class graph {
public:
    /// `where` are ranges in source `set_source` tells; several adds of one vertex keep all of them.
    input add(const op& o, op_metadata meta = {}, std::vector<range> where = {});
    /// All that `d` is made of, byte for byte and with what is known of it; its result, or nothing when it is empty. A source
    /// that is here already is not told twice. Throws as load() does.
    std::optional<input> add(const definition& d);
    /// The first source. To be called before anything is added.
    void set_source(source_info info);
    [[nodiscard]] std::size_t size() const noexcept { return entries_.size(); }
    /// What `result` needs, in an order in which inputs come first, and the terminal. Without a result ("scratch") it is
    /// an empty definition.
    [[nodiscard]] definition finish(std::optional<input> result) const;

private:
    struct entry {
        digest id;
        bytes data;
        std::vector<digest> inputs;
        std::int64_t outputs = 0;
        op_metadata meta;
        std::vector<location> where;
    };
    std::vector<entry> entries_;
    std::unordered_map<digest, std::size_t> index_;
    std::vector<source_info> sources_;
};

struct vertex {
    digest id;
    op what;
    op_metadata meta;
};
struct loaded {
    std::vector<vertex> vertices;  ///< inputs come before those that need them; the terminal is not among them
    std::optional<input> result;   ///< empty for an empty definition
};
/// Checks a definition as a whole: every input exists, has that output, and every op is valid. Vertices that the result
/// does not need are left out.
loaded load(const definition& d, const limits& l = {});

/// One JSON object a line for every vertex: {"Digest", "Op", "OpMetadata"}; what `--print-llb` shows.
std::string to_json(const definition& d);
/// A Graphviz digraph.
std::string to_dot(const definition& d);
/// The name progress shows: the custom name, else one made from the op ("docker-image://...", "mkdir /x", "/bin/sh -c ...").
std::string display_name(const op& o, const op_metadata& meta);

}  // namespace cobuild::llb
