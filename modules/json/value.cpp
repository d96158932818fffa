module;
#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

module cobuild.json;

namespace cobuild::json {

namespace {

std::string_view name_of(kind k) {
    switch (k) {
        case kind::null: return "null";
        case kind::boolean: return "a boolean";
        case kind::integer:
        case kind::real: return "a number";
        case kind::string: return "a string";
        case kind::array: return "an array";
        case kind::object: return "an object";
    }
    return "nothing";
}

[[noreturn]] void mismatch(std::string_view wanted, const value& found) {
    throw error{errc::corrupt, cat("expected ", wanted, ", found ", name_of(found.type()))};
}

// Runs a getter so that its failure names the member.
template<class F>
auto named(std::string_view key, F f) -> decltype(f()) {
    try {
        return f();
    } catch (error& e) {
        throw std::move(e).with(quoted(key));
    }
}

const value* present(const object& o, std::string_view key) {
    const auto* v = o.find(key);
    return v != nullptr && !v->is_null() ? v : nullptr;
}

}  // namespace

object::object() noexcept = default;
object::object(const object&) = default;
object::object(object&&) noexcept = default;
object& object::operator=(const object&) = default;
object& object::operator=(object&&) noexcept = default;
object::~object() = default;
object::object(std::initializer_list<member> members) : members_(members) {}

const value* object::find(std::string_view key) const noexcept {
    for (const auto& m : members_)
        if (m.key == key) return &m.val;
    return nullptr;
}

value* object::find(std::string_view key) noexcept { return const_cast<value*>(std::as_const(*this).find(key)); }

value& object::set(std::string_view key, value v) {
    auto& slot = (*this)[key];
    slot = std::move(v);
    return slot;
}

value& object::operator[](std::string_view key) {
    if (auto* found = find(key)) return *found;
    members_.push_back({std::string(key), {}});
    return members_.back().val;
}

bool object::erase(std::string_view key) {
    return std::erase_if(members_, [&](const member& m) { return m.key == key; }) != 0;
}

std::size_t object::size() const noexcept { return members_.size(); }

value::value(array v) : data_(std::move(v)) {}
value::value(object v) : data_(std::move(v)) {}
value::value(const std::vector<std::string>& v) : data_(array(v.begin(), v.end())) {}
value::value(const std::map<std::string, std::string>& v) {
    object o;
    for (const auto& [k, text] : v) o.members().push_back({k, text});
    data_ = std::move(o);
}

void value::set_unsigned(std::uint64_t v) {
    if (v <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
        data_ = static_cast<std::int64_t>(v);
    } else {
        data_ = v;
    }
}

kind value::type() const noexcept {
    static constexpr kind kinds[] = {kind::null, kind::boolean, kind::integer, kind::integer, kind::real, kind::string, kind::array, kind::object};
    return kinds[data_.index()];
}

bool value::as_bool() const {
    if (const auto* v = std::get_if<bool>(&data_)) return *v;
    mismatch("a boolean", *this);
}

std::int64_t value::as_int() const {
    if (const auto* v = std::get_if<std::int64_t>(&data_)) return *v;
    mismatch("a whole number", *this);
}

std::uint64_t value::as_uint() const {
    if (const auto* v = std::get_if<std::uint64_t>(&data_)) return *v;
    if (const auto* v = std::get_if<std::int64_t>(&data_)) {
        if (*v >= 0) return static_cast<std::uint64_t>(*v);
        throw error{errc::corrupt, cat("expected a number of at least 0, found ", *v)};
    }
    mismatch("a whole number", *this);
}

double value::as_double() const {
    if (const auto* v = std::get_if<double>(&data_)) return *v;
    if (const auto* v = std::get_if<std::uint64_t>(&data_)) return static_cast<double>(*v);
    if (const auto* v = std::get_if<std::int64_t>(&data_)) return static_cast<double>(*v);
    mismatch("a number", *this);
}

const std::string& value::as_string() const {
    if (const auto* v = std::get_if<std::string>(&data_)) return *v;
    mismatch("a string", *this);
}

const array& value::as_array() const {
    if (const auto* v = std::get_if<array>(&data_)) return *v;
    mismatch("an array", *this);
}

const object& value::as_object() const {
    if (const auto* v = std::get_if<object>(&data_)) return *v;
    mismatch("an object", *this);
}

array& value::as_array() { return const_cast<array&>(std::as_const(*this).as_array()); }
object& value::as_object() { return const_cast<object&>(std::as_const(*this).as_object()); }

std::vector<std::string> value::as_strings() const {
    std::vector<std::string> out;
    if (is_null()) return out;
    for (const auto& v : as_array()) out.push_back(v.as_string());
    return out;
}

const value* value::find(std::string_view key) const noexcept {
    const auto* o = std::get_if<object>(&data_);
    return o != nullptr ? o->find(key) : nullptr;
}

bool operator==(const value& a, const value& b) { return a.data_ == b.data_; }
bool operator==(const member& a, const member& b) { return a.key == b.key && a.val == b.val; }
bool operator==(const object& a, const object& b) { return a.members() == b.members(); }

const value& at(const object& o, std::string_view key) {
    if (const auto* v = o.find(key)) return *v;
    throw error{errc::corrupt, cat("missing ", quoted(key))};
}

std::string string_at(const object& o, std::string_view key) {
    return named(key, [v = &at(o, key)] { return v->as_string(); });
}
std::int64_t int_at(const object& o, std::string_view key) {
    return named(key, [v = &at(o, key)] { return v->as_int(); });
}
std::uint64_t uint_at(const object& o, std::string_view key) {
    return named(key, [v = &at(o, key)] { return v->as_uint(); });
}
const array& array_at(const object& o, std::string_view key) {
    return named(key, [v = &at(o, key)]() -> const array& { return v->as_array(); });
}
const object& object_at(const object& o, std::string_view key) {
    return named(key, [v = &at(o, key)]() -> const object& { return v->as_object(); });
}

std::optional<std::string> optional_string(const object& o, std::string_view key) {
    if (present(o, key) == nullptr) return std::nullopt;
    return string_at(o, key);
}
std::optional<std::int64_t> optional_int(const object& o, std::string_view key) {
    if (present(o, key) == nullptr) return std::nullopt;
    return int_at(o, key);
}
std::optional<bool> optional_bool(const object& o, std::string_view key) {
    const auto* v = present(o, key);
    if (v == nullptr) return std::nullopt;
    return named(key, [v] { return v->as_bool(); });
}
const array* optional_array(const object& o, std::string_view key) { return present(o, key) != nullptr ? &array_at(o, key) : nullptr; }
const object* optional_object(const object& o, std::string_view key) { return present(o, key) != nullptr ? &object_at(o, key) : nullptr; }

std::vector<std::string> strings_at(const object& o, std::string_view key) {
    const auto* v = present(o, key);
    if (v == nullptr) return {};
    return named(key, [v] { return v->as_strings(); });
}

std::map<std::string, std::string> string_map_at(const object& o, std::string_view key) {
    std::map<std::string, std::string> out;
    if (const auto* members = optional_object(o, key))
        for (const auto& m : members->members()) out[m.key] = named(key, [&] { return m.val.as_string(); });
    return out;
}

}  // namespace cobuild::json
