module;
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

module cobuild.llb;

import :fields;

namespace cobuild::llb {
namespace {

template<class T>
concept scalar = std::is_integral_v<T> || std::is_enum_v<T>;
template<class T>
concept text = std::is_same_v<T, std::string>;

enum wire : unsigned { varint = 0, fixed64 = 1, delimited = 2, group_start = 3, group_end = 4, fixed32 = 5 };

// ---------------------------------------------------------------- encoding

class encoder {
public:
    explicit encoder(std::string& out) : out_(out) {}

    void number(std::uint64_t v) {
        for (; v >= 0x80; v >>= 7) out_.push_back(static_cast<char>(v | 0x80));
        out_.push_back(static_cast<char>(v));
    }
    void key(unsigned field, wire type) { number(field << 3 | type); }
    void blob(unsigned field, std::string_view data) {
        key(field, delimited);
        number(data.size());
        out_.append(data);
    }
    /// Negative numbers of any width are sign-extended to 64 bits, as protobuf wants it.
    template<scalar T>
    static std::uint64_t raw(T v) {
        if constexpr (std::is_enum_v<T>) {
            return static_cast<std::uint64_t>(static_cast<std::int64_t>(static_cast<std::int32_t>(v)));
        } else if constexpr (std::is_signed_v<T>) {
            return static_cast<std::uint64_t>(static_cast<std::int64_t>(v));
        } else {
            return v;
        }
    }

    // A value even if it is the default one: list elements, map entries, cases of a oneof.
    template<scalar T>
    void always(unsigned field, const T& v) {
        key(field, varint);
        number(raw(v));
    }
    template<text T>
    void always(unsigned field, const T& v) {
        blob(field, v);
    }
    void always(unsigned field, const digest& v) { blob(field, v.str()); }
    template<class T>
        requires(!scalar<T> && !text<T>)
    void always(unsigned field, const T& v) {
        std::string inner;
        encoder nested(inner);
        fields(nested, v);
        blob(field, inner);
    }

    template<class T>
    void operator()(unsigned field, std::string_view, const T& v) {
        if constexpr (scalar<T>) {
            if (raw(v) != 0) always(field, v);
        } else if constexpr (text<T>) {
            if (!v.empty()) always(field, v);
        } else {
            always(field, v);
        }
    }
    void operator()(unsigned field, std::string_view, const digest& v) {
        if (!v.empty()) always(field, v);
    }
    template<class T>
    void operator()(unsigned field, std::string_view, const std::optional<T>& v) {
        if (v) always(field, *v);
    }
    template<class T>
    void operator()(unsigned field, std::string_view, const std::shared_ptr<T>& v) {
        if (v) always(field, *v);
    }
    template<class T>
    void operator()(unsigned field, std::string_view, const std::vector<T>& list) {
        if constexpr (scalar<T>) {
            if (list.empty()) return;
            std::string inner;
            encoder packed(inner);
            for (const T& v : list) packed.number(raw(v));
            blob(field, inner);
        } else {
            for (const T& v : list) always(field, v);
        }
    }
    template<class K, class T>
    void operator()(unsigned field, std::string_view, const std::map<K, T>& map) {
        for (const auto& [k, v] : map) {
            std::string inner;
            encoder entry(inner);
            entry.always(1, k);
            entry.always(2, v);
            blob(field, inner);
        }
    }
    template<class T>
    void binary(unsigned field, std::string_view name, const T& v) {
        (*this)(field, name, v);
    }

    template<scalar T>
    void wrapped(unsigned field, std::string_view, std::string_view, const T& v) {
        std::string inner;
        encoder nested(inner);
        nested(1, {}, v);
        blob(field, inner);
    }
    void wrapped(unsigned field, std::string_view name, std::string_view inner, const std::optional<bool>& v) {
        if (v) wrapped(field, name, inner, *v);
    }
    void wrapped(unsigned field, std::string_view name, std::string_view inner, const std::vector<std::int64_t>& list) {
        for (const auto v : list) wrapped(field, name, inner, v);
    }
    void wrapped(unsigned field, std::string_view name, std::string_view inner, const std::map<std::string, std::int64_t>& map) {
        for (const auto& [k, v] : map) {
            std::string data;
            encoder entry(data);
            entry.always(1, k);
            entry.wrapped(2, name, inner, v);
            blob(field, data);
        }
    }
    template<class T, class... Cases>
    void alternative(unsigned field, std::string_view, const std::variant<Cases...>& v) {
        if (const T* chosen = std::get_if<T>(&v)) always(field, *chosen);
    }
    template<class F>
    void group(std::string_view, F f) {
        f();
    }

private:
    std::string& out_;
};

// ---------------------------------------------------------------- decoding

[[noreturn]] void bad(const char* why) { throw error{errc::corrupt, cat("not a valid build definition: ", why)}; }

/// What one unmarshalling may still use.
struct budget {
    std::size_t messages;
    unsigned max_depth;
    void take() {
        if (messages-- == 0) throw error{errc::invalid, "build definition has too many elements"};
    }
};

/// Absent in proto3 means zero, whatever a member's default is here. (-2 is an index that validation refuses: a diff's
/// inputs must be there.)
template<class T>
void zero(T&) {}
void zero(copy_action& a) { a.mode = 0, a.timestamp = 0; }
void zero(mkfile_action& a) { a.timestamp = 0; }
void zero(mkdir_action& a) { a.timestamp = 0; }
void zero(symlink_action& a) { a.timestamp = 0; }
void zero(file_action& a) { a.secondary_input = 0, a.output = 0; }
void zero(diff_op& d) { d.lower = d.upper = -2; }
void zero(op& o) { o.constraints.reset(); }

class decoder {
public:
    decoder(std::string_view data, budget& left, unsigned depth) : data_(data), left_(left), depth_(depth) {
        if (depth > left.max_depth) throw error{errc::invalid, "build definition is nested too deeply"};
    }

    template<class M>
    void message(M& m) {
        while (!data_.empty()) {
            const auto key = number();
            field_ = static_cast<unsigned>(key >> 3);
            type_ = static_cast<wire>(key & 7);
            if (key > 0xffffffffU || field_ == 0) bad("a field number is out of range");
            value();
            fields(*this, m);
        }
    }

    template<class T>
    void operator()(unsigned field, std::string_view, T& v) {
        if (field != field_) return;
        if constexpr (scalar<T>) {
            if (type_ == varint) store(v, number_);
        } else if (type_ == delimited) {
            take(v);
        }
    }
    template<scalar T>
    void operator()(unsigned field, std::string_view, std::vector<T>& list) {
        if (field != field_) return;
        if (type_ == varint) {
            left_.take();
            store(list.emplace_back(), number_);
        } else if (type_ == delimited) {
            decoder packed(blob_, left_, depth_);
            while (!packed.data_.empty()) {
                left_.take();
                store(list.emplace_back(), packed.number());
            }
        }
    }
    template<class T>
    void binary(unsigned field, std::string_view name, T& v) {
        (*this)(field, name, v);
    }

    template<class T>
    void wrapped(unsigned field, std::string_view, std::string_view, T& v) {
        if (field == field_ && type_ == delimited) unwrap(v, blob_);
    }
    template<class T, class... Cases>
    void alternative(unsigned field, std::string_view, std::variant<Cases...>& v) {
        if (field != field_) return;
        if constexpr (scalar<T>) {
            if (type_ == varint) store(v.template emplace<T>(), number_);
        } else if (type_ == delimited) {
            // Naming the same case twice merges, another case replaces.
            if (!std::holds_alternative<T>(v)) zero(v.template emplace<T>());
            take(std::get<T>(v));
        }
    }
    template<class F>
    void group(std::string_view, F f) {
        f();
    }

private:
    std::uint64_t number() {
        std::uint64_t v = 0;
        for (unsigned shift = 0; shift < 70; shift += 7) {
            if (data_.empty()) bad("it ends within a number");
            const auto byte = static_cast<unsigned char>(data_.front());
            data_.remove_prefix(1);
            if (shift == 63 && byte > 1) bad("a number is too long");
            v |= static_cast<std::uint64_t>(byte & 0x7f) << shift;
            if (byte < 0x80) return v;
        }
        bad("a number is too long");
    }
    std::string_view cut(std::uint64_t n) {
        if (n > data_.size()) bad("it ends within a field");
        const auto part = data_.substr(0, static_cast<std::size_t>(n));
        data_.remove_prefix(part.size());
        return part;
    }
    void value() {
        switch (type_) {
            case varint: number_ = number(); break;
            case fixed64: cut(8); break;
            case delimited: blob_ = cut(number()); break;
            case fixed32: cut(4); break;
            case group_start: skip_group(); break;
            default: bad("a field has no known wire type");
        }
    }
    /// Groups are a relic; BuildKit has none, a newer message might.
    void skip_group() {
        std::vector<std::uint64_t> open{field_};
        while (!open.empty()) {
            const auto key = number();
            switch (key & 7) {
                case varint: number(); break;
                case fixed64: cut(8); break;
                case delimited: cut(number()); break;
                case fixed32: cut(4); break;
                case group_start:
                    left_.take();
                    open.push_back(key >> 3);
                    break;
                case group_end:
                    if (open.back() != key >> 3) bad("a group does not end");
                    open.pop_back();
                    break;
                default: bad("a field has no known wire type");
            }
        }
    }

    template<scalar T>
    static void store(T& v, std::uint64_t n) {
        if constexpr (std::is_same_v<T, bool>) {
            v = n != 0;
        } else if constexpr (std::is_enum_v<T>) {
            v = static_cast<T>(static_cast<std::int32_t>(n));
        } else {
            v = static_cast<T>(n);
        }
    }

    // The field's bytes into a member.
    void take(std::string& v) { v.assign(blob_); }
    void take(digest& v) { v = digest::parse(blob_); }
    template<class M>
    void take(M& m) {
        left_.take();
        decoder(blob_, left_, depth_ + 1).message(m);
    }
    template<class T>
    void take(std::optional<T>& v) {
        if (!v) zero(v.emplace());
        take(*v);
    }
    template<class T>
    void take(std::shared_ptr<const T>& v) {
        auto fresh = v ? std::make_shared<T>(*v) : std::make_shared<T>();
        take(*fresh);
        v = std::move(fresh);
    }
    template<class T>
    void take(std::vector<T>& list) {
        left_.take();
        zero(list.emplace_back());
        take(list.back());
    }
    template<class K, class T>
    void take(std::map<K, T>& map) {
        left_.take();
        std::pair<K, T> entry;
        decoder(blob_, left_, depth_ + 1).message(entry);
        map.insert_or_assign(std::move(entry.first), std::move(entry.second));
    }
    template<class K, class T>
    friend void fields(decoder& a, std::pair<K, T>& entry) {
        a(1, {}, entry.first);
        a(2, {}, entry.second);
    }

    template<scalar T>
    struct alone {
        T& v;
    };
    template<scalar T>
    friend void fields(decoder& a, alone<T>& m) {
        a(1, {}, m.v);
    }
    template<scalar T>
    void unwrap(T& v, std::string_view data) {
        left_.take();
        v = T{};
        alone<T> inner{v};
        decoder(data, left_, depth_ + 1).message(inner);
    }
    void unwrap(std::optional<bool>& v, std::string_view data) { unwrap(v.emplace(), data); }
    void unwrap(std::vector<std::int64_t>& list, std::string_view data) { unwrap(list.emplace_back(), data); }
    void unwrap(std::map<std::string, std::int64_t>& map, std::string_view data) {
        left_.take();
        std::pair<std::string, wrapped_number> entry;
        decoder(data, left_, depth_ + 1).message(entry);
        map.insert_or_assign(std::move(entry.first), entry.second.v);
    }
    struct wrapped_number {
        std::int64_t v = 0;
    };
    friend void fields(decoder& a, wrapped_number& m) { a(1, {}, m.v); }

    std::string_view data_;
    budget& left_;
    unsigned depth_;
    unsigned field_ = 0;
    wire type_ = varint;
    std::uint64_t number_ = 0;
    std::string_view blob_;
};

template<class M>
std::string encode(const M& m) {
    std::string out;
    encoder e(out);
    fields(e, m);
    return out;
}

template<class M>
M decode(std::string_view data, const limits& l) {
    if (data.size() > l.max_bytes) throw error{errc::invalid, cat("build definition has ", data.size(), " bytes, more than ", l.max_bytes)};
    budget left{l.max_messages, l.max_depth};
    M m;
    zero(m);
    decoder(data, left, 0).message(m);
    return m;
}

}  // namespace

bytes marshal(const op& o) { return encode(o); }
bytes marshal(const definition& d) { return encode(d); }
op unmarshal_op(std::string_view data, const limits& l) { return decode<op>(data, l); }

definition unmarshal_definition(std::string_view data, const limits& l) {
    auto d = decode<definition>(data, l);
    if (d.ops.size() > l.max_ops) throw error{errc::invalid, cat("build definition has ", d.ops.size(), " steps, more than ", l.max_ops)};
    return d;
}

}  // namespace cobuild::llb
