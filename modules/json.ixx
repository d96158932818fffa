/// cobuild.json: JSON texts as plain values: a small insertion-ordered tree, a parser with limits, Go's output form.
///
/// Objects keep the order of their members, so what is read and written again differs in nothing but the fields changed.
/// Numbers are kept as 64-bit integers where they are whole, else as doubles. A member named twice counts once, with the
/// last value, as in Go. Thread safety: distinct values from distinct threads; const access to one value from many.
/// Errors: errc::corrupt, naming the byte offset (parse) or the member (getters).
/// Not responsible for: schemas, JSON lines, streams.
module;
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

export module cobuild.json;

import cobuild.base;

export namespace cobuild::json {

class value;
struct member;
using array = std::vector<value>;

/// Members in the order they were added. Look-up is linear: for documents, not for tables.
class object {
public:
    object() noexcept;
    object(const object&);
    object(object&&) noexcept;
    object& operator=(const object&);
    object& operator=(object&&) noexcept;
    ~object();
    object(std::initializer_list<member> members);
    [[nodiscard]] const value* find(std::string_view key) const noexcept;
    [[nodiscard]] value* find(std::string_view key) noexcept;
    [[nodiscard]] bool contains(std::string_view key) const noexcept { return find(key) != nullptr; }
    /// Replaces the value in place or appends the member.
    value& set(std::string_view key, value v);
    /// The member's value; a null one is appended when absent.
    value& operator[](std::string_view key);
    bool erase(std::string_view key);
    [[nodiscard]] std::size_t size() const noexcept;
    [[nodiscard]] bool empty() const noexcept { return size() == 0; }
    [[nodiscard]] std::vector<member>& members() noexcept { return members_; }
    [[nodiscard]] const std::vector<member>& members() const noexcept { return members_; }

private:
    std::vector<member> members_;
};

enum class kind { null, boolean, integer, real, string, array, object };

class value {
public:
    value() noexcept = default;
    value(std::nullptr_t) noexcept {}
    value(bool v) : data_(v) {}
    template<std::integral T>
        requires(!std::same_as<T, bool>)
    value(T v) {
        if constexpr (std::unsigned_integral<T>) {
            set_unsigned(v);
        } else {
            data_ = static_cast<std::int64_t>(v);
        }
    }
    value(double v) : data_(v) {}
    value(const char* v) : data_(std::string(v)) {}
    value(std::string_view v) : data_(std::string(v)) {}
    value(std::string v) : data_(std::move(v)) {}
    value(array v);
    value(object v);
    /// An array of strings.
    value(const std::vector<std::string>& v);
    /// An object of strings, sorted by key.
    value(const std::map<std::string, std::string>& v);

    [[nodiscard]] kind type() const noexcept;
    [[nodiscard]] bool is_null() const noexcept { return type() == kind::null; }
    [[nodiscard]] bool is_bool() const noexcept { return type() == kind::boolean; }
    [[nodiscard]] bool is_number() const noexcept { return type() == kind::integer || type() == kind::real; }
    [[nodiscard]] bool is_string() const noexcept { return type() == kind::string; }
    [[nodiscard]] bool is_array() const noexcept { return type() == kind::array; }
    [[nodiscard]] bool is_object() const noexcept { return type() == kind::object; }

    /// These throw errc::corrupt "expected a string, found an object" on any other kind.
    [[nodiscard]] bool as_bool() const;
    [[nodiscard]] std::int64_t as_int() const;
    [[nodiscard]] std::uint64_t as_uint() const;
    [[nodiscard]] double as_double() const;
    [[nodiscard]] const std::string& as_string() const;
    [[nodiscard]] const array& as_array() const;
    [[nodiscard]] array& as_array();
    [[nodiscard]] const object& as_object() const;
    [[nodiscard]] object& as_object();
    /// All elements as strings; also for null (empty).
    [[nodiscard]] std::vector<std::string> as_strings() const;

    /// The member of an object; null when absent or when this is no object.
    [[nodiscard]] const value* find(std::string_view key) const noexcept;

    friend bool operator==(const value& a, const value& b);

private:
    void set_unsigned(std::uint64_t v);
    // An unsigned integer stands here only when it does not fit the signed one.
    std::variant<std::monostate, bool, std::int64_t, std::uint64_t, double, std::string, array, object> data_;
};

struct member {
    std::string key;
    value val;
    friend bool operator==(const member& a, const member& b);
};
bool operator==(const object& a, const object& b);

// ---------------------------------------------------------------- members by name

/// The member `key`; a failure says `missing "key"` or `"key": expected a string, found null`.
const value& at(const object& o, std::string_view key);
std::string string_at(const object& o, std::string_view key);
std::int64_t int_at(const object& o, std::string_view key);
std::uint64_t uint_at(const object& o, std::string_view key);
const array& array_at(const object& o, std::string_view key);
const object& object_at(const object& o, std::string_view key);

/// Empty when absent or null; another kind is an error all the same.
std::optional<std::string> optional_string(const object& o, std::string_view key);
std::optional<std::int64_t> optional_int(const object& o, std::string_view key);
std::optional<bool> optional_bool(const object& o, std::string_view key);
const array* optional_array(const object& o, std::string_view key);
const object* optional_object(const object& o, std::string_view key);
/// Empty list or map when absent or null.
std::vector<std::string> strings_at(const object& o, std::string_view key);
std::map<std::string, std::string> string_map_at(const object& o, std::string_view key);

// ---------------------------------------------------------------- text

struct parse_limits {
    std::size_t max_bytes = std::size_t{64} << 20;
    std::size_t max_depth = 64;
};

/// Exactly one value and white space around it, as RFC 8259. Throws errc::corrupt "JSON at byte 17: ...".
value parse(std::string_view text, parse_limits limits = {});

struct format {
    bool indent = false;      ///< two spaces a level, as Go's MarshalIndent(v, "", "  ")
    bool escape_html = true;  ///< < > & as \u003c \u003e \u0026, as Go's Marshal does
    bool sorted = false;      ///< members by key, in byte order, at every level
};

/// Byte for byte what Go's encoding/json writes for the same data. No newline at the end.
std::string serialize(const value& v, format f = {});

}  // namespace cobuild::json
