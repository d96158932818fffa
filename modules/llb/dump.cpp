module;
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

module cobuild.llb;

import :fields;

namespace cobuild::llb {
namespace {

template<class T>
concept number = std::is_integral_v<T> && !std::is_same_v<T, bool>;

/// JSON as BuildKit dumps its messages: protobuf's names, defaults left out, bytes in base64.
class json_writer {
public:
    explicit json_writer(std::string& out) : out_(out) {}

    void string(std::string_view text) {
        static constexpr std::string_view hex = "0123456789abcdef";
        out_ += '"';
        for (const char c : text) {
            const auto u = static_cast<unsigned char>(c);
            if (c == '"' || c == '\\') {
                out_ += '\\';
                out_ += c;
            } else if (c == '\n') {
                out_ += "\\n";
            } else if (u < 0x20 || u == 0x7f) {
                out_ += "\\u00";
                out_ += hex[u >> 4];
                out_ += hex[u & 15];
            } else {
                out_ += c;
            }
        }
        out_ += '"';
    }
    void name(std::string_view key) {
        if (!first_) out_ += ',';
        first_ = false;
        string(key);
        out_ += ':';
    }

    void value(bool v) { out_ += v ? "true" : "false"; }
    template<number T>
    void value(T v) {
        out_ += cat(static_cast<std::conditional_t<std::is_signed_v<T>, long long, unsigned long long>>(v));
    }
    void value(const std::string& v) { string(v); }
    void value(const digest& v) { string(v.str()); }
    template<class T>
        requires std::is_enum_v<T>
    void value(T v) {
        value(static_cast<int>(v));
    }
    template<class T>
        requires std::is_class_v<T>
    void value(const T& v) {
        object([&](json_writer& nested) { fields(nested, v); });
    }
    template<class F>
    void object(F f) {
        out_ += '{';
        json_writer nested(out_);
        f(nested);
        out_ += '}';
    }
    template<class List, class F>
    void array(const List& list, F one) {
        out_ += '[';
        bool first = true;
        for (const auto& v : list) {
            if (!std::exchange(first, false)) out_ += ',';
            one(v);
        }
        out_ += ']';
    }

    template<class T>
    void operator()(unsigned, std::string_view key, const T& v) {
        if constexpr (std::is_integral_v<T> || std::is_enum_v<T>) {
            if (v == T{}) return;
        } else if constexpr (std::is_same_v<T, std::string> || std::is_same_v<T, digest>) {
            if (v.empty()) return;
        }
        name(key);
        value(v);
    }
    template<class T>
    void operator()(unsigned, std::string_view key, const std::optional<T>& v) {
        if (!v) return;
        name(key);
        value(*v);
    }
    template<class T>
    void operator()(unsigned, std::string_view key, const std::shared_ptr<T>& v) {
        if (!v) return;
        name(key);
        value(*v);
    }
    template<class T>
    void operator()(unsigned, std::string_view key, const std::vector<T>& list) {
        if (list.empty()) return;
        name(key);
        array(list, [&](const T& v) { value(v); });
    }
    template<class K, class T>
    void operator()(unsigned, std::string_view key, const std::map<K, T>& map) {
        if (map.empty()) return;
        name(key);
        object([&](json_writer& nested) {
            for (const auto& [k, v] : map) {
                if constexpr (std::is_same_v<K, digest>) {
                    nested.name(k.str());
                } else {
                    nested.name(k);
                }
                nested.value(v);
            }
        });
    }
    void binary(unsigned, std::string_view key, const std::string& v) {
        if (v.empty()) return;
        name(key);
        string(base64_encode(v));
    }
    void binary(unsigned, std::string_view key, const std::vector<std::string>& list) {
        if (list.empty()) return;
        name(key);
        array(list, [&](const std::string& v) { string(base64_encode(v)); });
    }
    void wrapped(unsigned, std::string_view key, std::string_view inner, const std::int64_t& v) {
        name(key);
        object([&](json_writer& nested) { nested(0, inner, v); });
    }
    void wrapped(unsigned, std::string_view key, std::string_view inner, const std::optional<bool>& v) {
        if (!v) return;
        name(key);
        object([&](json_writer& nested) { nested(0, inner, *v); });
    }
    void wrapped(unsigned, std::string_view key, std::string_view inner, const std::vector<std::int64_t>& list) {
        if (list.empty()) return;
        name(key);
        array(list, [&](std::int64_t v) { object([&](json_writer& nested) { nested(0, inner, v); }); });
    }
    void wrapped(unsigned, std::string_view key, std::string_view inner, const std::map<std::string, std::int64_t>& map) {
        if (map.empty()) return;
        name(key);
        object([&](json_writer& nested) {
            for (const auto& [k, v] : map) nested.wrapped(0, k, inner, v);
        });
    }
    template<class T, class... Cases>
    void alternative(unsigned, std::string_view key, const std::variant<Cases...>& v) {
        const T* chosen = std::get_if<T>(&v);
        if (chosen == nullptr) return;
        name(key);
        value(*chosen);
    }
    template<class F>
    void group(std::string_view key, F f) {
        name(key);
        out_ += '{';
        first_ = true;
        f();
        out_ += '}';
        first_ = false;
    }

private:
    std::string& out_;
    bool first_ = true;
};

std::string file_action_name(const file_action& a) {
    if (const auto* x = std::get_if<copy_action>(&a.what)) return cat("copy ", x->src, " ", x->dest);
    if (const auto* x = std::get_if<mkfile_action>(&a.what)) return cat("mkfile ", x->path);
    if (const auto* x = std::get_if<mkdir_action>(&a.what)) return cat("mkdir ", x->path);
    if (const auto* x = std::get_if<rm_action>(&a.what)) return cat("rm ", x->path);
    if (const auto* x = std::get_if<symlink_action>(&a.what)) return cat("symlink ", x->oldpath, " -> ", x->newpath);
    return "file";
}

std::string dot_string(std::string_view text) {
    std::string out = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') out += '\\';
        if (c == '\n') {
            out += "\\n";
        } else {
            out += c;
        }
    }
    return out += '"';
}

}  // namespace

std::string display_name(const op& o, const op_metadata& meta) {
    if (const auto named = meta.description.find(std::string(custom_name)); named != meta.description.end()) return named->second;
    if (const auto* s = std::get_if<source_op>(&o.what)) return s->identifier;
    if (const auto* e = std::get_if<exec_op>(&o.what)) {
        std::string out;
        for (const auto& arg : e->meta.args) out += (out.empty() ? "" : " ") + arg;
        return out;
    }
    if (const auto* f = std::get_if<file_op>(&o.what)) {
        std::string out;
        for (const auto& a : f->actions) out += (out.empty() ? "" : ", ") + file_action_name(a);
        return out;
    }
    static constexpr std::array<std::string_view, std::variant_size_v<operation>> names{"result", "exec",  "source", "file",
                                                                                        "build",  "merge", "diff",   "passthrough"};
    return std::string(names[o.what.index()]);
}

std::string to_json(const definition& d) {
    std::string out;
    for (const bytes& data : d.ops) {
        const auto id = digest::of(data);
        json_writer(out).object([&](json_writer& line) {
            line(0, "Op", unmarshal_op(data));
            line(0, "Digest", id);
            line.name("OpMetadata");
            const auto meta = d.metadata.find(id);
            line.value(meta != d.metadata.end() ? meta->second : op_metadata{});
        });
        out += '\n';
    }
    return out;
}

std::string to_dot(const definition& d) {
    std::string out = "digraph {\n";
    for (const bytes& data : d.ops) {
        const auto id = digest::of(data);
        const op o = unmarshal_op(data);
        const auto meta = d.metadata.find(id);
        out +=
            cat("  ", dot_string(id.str()), " [label=", dot_string(display_name(o, meta != d.metadata.end() ? meta->second : op_metadata{})), "];\n");
        for (const input& in : o.inputs) {
            out += cat("  ", dot_string(in.vertex.str()), " -> ", dot_string(id.str()),
                       in.index != 0 ? cat(" [label=", in.index, "]") : std::string(), ";\n");
        }
    }
    return out += "}\n";
}

}  // namespace cobuild::llb
