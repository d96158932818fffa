module;
#include <algorithm>
#include <cmath>
#include <string>
#include <string_view>
#include <vector>

#include <boost/json/stream_parser.hpp>
#include <boost/json/value.hpp>
#include <boost/system/error_code.hpp>

module cobuild.json;

namespace cobuild::json {

namespace bj = boost::json;

namespace {

// Recursion is bounded by parse_limits::max_depth, which the parser has already enforced.
value convert(const bj::value& v) {
    switch (v.kind()) {
        case bj::kind::null: return nullptr;
        case bj::kind::bool_: return v.get_bool();
        case bj::kind::int64: return v.get_int64();
        case bj::kind::uint64: return v.get_uint64();
        case bj::kind::double_:
            if (!std::isfinite(v.get_double())) throw error{errc::corrupt, "JSON: a number is out of range"};
            return v.get_double();
        case bj::kind::string: return std::string_view(v.get_string());
        case bj::kind::array: {
            array out;
            out.reserve(v.get_array().size());
            for (const auto& element : v.get_array()) out.push_back(convert(element));
            return out;
        }
        case bj::kind::object: {
            object out;
            out.members().reserve(v.get_object().size());
            for (const auto& m : v.get_object()) out.members().push_back({std::string(m.key()), convert(m.value())});
            return out;
        }
    }
    return nullptr;
}

std::string reason(const boost::system::error_code& ec, std::size_t max_depth) {
    switch (static_cast<bj::error>(ec.value())) {
        case bj::error::incomplete: return "the text ends too early";
        case bj::error::extra_data: return "something stands after the value";
        case bj::error::too_deep: return cat("nested deeper than ", max_depth, " levels");
        default: return ec.message();
    }
}

}  // namespace

value parse(std::string_view text, parse_limits limits) {
    if (text.size() > limits.max_bytes) throw error{errc::corrupt, cat("JSON of ", text.size(), " bytes, above the limit of ", limits.max_bytes)};
    bj::parse_options options;
    options.max_depth = limits.max_depth;
    options.numbers = bj::number_precision::precise;  // what is written again must read as the same number
    bj::stream_parser p({}, options);
    boost::system::error_code ec;
    std::size_t offset = p.write_some(text.data(), text.size(), ec);
    if (!ec) {
        offset = std::min(text.find_first_not_of(" \t\r\n", offset), text.size());
        if (offset < text.size()) {
            ec = bj::error::extra_data;
        } else {
            p.finish(ec);
        }
    }
    if (ec) throw error{errc::corrupt, cat("JSON at byte ", offset, ": ", reason(ec, limits.max_depth))};
    return convert(p.release());
}

}  // namespace cobuild::json
