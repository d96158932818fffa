module;
#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

module cobuild.json;

namespace cobuild::json {

namespace {

constexpr std::string_view hex_digits = "0123456789abcdef";

class writer {
public:
    explicit writer(format f) : format_(f) {}

    void put(const value& v) {
        switch (v.type()) {
            case kind::null: out_ += "null"; break;
            case kind::boolean: out_ += v.as_bool() ? "true" : "false"; break;
            case kind::integer: put_integer(v); break;
            case kind::real: put_real(v.as_double()); break;
            case kind::string: put_string(v.as_string()); break;
            case kind::array: put_array(v.as_array()); break;
            case kind::object: put_object(v.as_object()); break;
        }
    }
    std::string take() { return std::move(out_); }

private:
    void put_integer(const value& v) {
        std::array<char, 24> buffer{};
        auto end = buffer.data() + buffer.size();
        try {
            out_.append(buffer.data(), std::to_chars(buffer.data(), end, v.as_int()).ptr);
        } catch (const error&) {
            out_.append(buffer.data(), std::to_chars(buffer.data(), end, v.as_uint()).ptr);
        }
    }

    // Go: shortest form; exponent below 1e-6 and from 1e21, with no leading zero in the exponent.
    void put_real(double d) {
        if (!std::isfinite(d)) throw error{errc::invalid, "JSON has no form for an infinite number"};
        const double magnitude = std::fabs(d);
        const bool exponent = magnitude != 0 && (magnitude < 1e-6 || magnitude >= 1e21);
        std::array<char, 512> buffer{};
        const auto end =
            std::to_chars(buffer.data(), buffer.data() + buffer.size(), d, exponent ? std::chars_format::scientific : std::chars_format::fixed);
        std::string text(buffer.data(), end.ptr);
        if (const auto e = text.find("e-0"); e != std::string::npos) text.erase(e + 2, 1);
        out_ += text;
    }

    void put_string(std::string_view text) {
        out_ += '"';
        for (std::size_t i = 0; i < text.size(); ++i) {
            const auto c = static_cast<unsigned char>(text[i]);
            if (c == '"' || c == '\\') {
                out_ += '\\';
                out_ += text[i];
            } else if (c < 0x20) {
                put_control(c);
            } else if (format_.escape_html && (c == '<' || c == '>' || c == '&')) {
                put_u(c);
            } else if (c == 0xe2 && (text.substr(i, 3) == "\u2028" || text.substr(i, 3) == "\u2029")) {
                out_ += text[i + 2] == '\xa8' ? "\\u2028" : "\\u2029";
                i += 2;
            } else {
                out_ += text[i];
            }
        }
        out_ += '"';
    }

    void put_control(unsigned char c) {
        switch (c) {
            case '\b': out_ += "\\b"; break;
            case '\f': out_ += "\\f"; break;
            case '\n': out_ += "\\n"; break;
            case '\r': out_ += "\\r"; break;
            case '\t': out_ += "\\t"; break;
            default: put_u(c);
        }
    }
    void put_u(unsigned char c) {
        out_ += "\\u00";
        out_ += hex_digits[c >> 4];
        out_ += hex_digits[c & 15];
    }

    void line() {
        if (!format_.indent) return;
        out_ += '\n';
        out_.append(2 * depth_, ' ');
    }

    void put_array(const array& a) {
        out_ += '[';
        ++depth_;
        bool first = true;
        for (const auto& v : a) {
            if (!std::exchange(first, false)) out_ += ',';
            line();
            put(v);
        }
        --depth_;
        if (!first) line();
        out_ += ']';
    }

    void put_object(const object& o) {
        std::vector<const member*> order;
        order.reserve(o.size());
        for (const auto& m : o.members()) order.push_back(&m);
        if (format_.sorted) std::sort(order.begin(), order.end(), [](const member* a, const member* b) { return a->key < b->key; });
        out_ += '{';
        ++depth_;
        bool first = true;
        for (const auto* m : order) {
            if (!std::exchange(first, false)) out_ += ',';
            line();
            put_string(m->key);
            out_ += format_.indent ? ": " : ":";
            put(m->val);
        }
        --depth_;
        if (!first) line();
        out_ += '}';
    }

    format format_;
    std::string out_;
    std::size_t depth_ = 0;
};

}  // namespace

std::string serialize(const value& v, format f) {
    writer w(f);
    w.put(v);
    return w.take();
}

}  // namespace cobuild::json
