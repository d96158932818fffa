// WWW-Authenticate headers and addresses: any text ends in a result or in errc::invalid.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

import cobuild.base;
import cobuild.http;
import cobuild.registry;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    if (cobuild::registry::parse_challenges(text).size() > size) std::abort();
    try {
        const auto base = cobuild::http::url::parse("http://h/a/b?c");
        const auto u = base.resolve(text);
        if (u.target.empty() || u.target.front() != '/') std::abort();
        if (cobuild::http::url::parse(u.str()).str() != u.str()) std::abort();
    } catch (const cobuild::error& e) {
        if (e.kind() != cobuild::errc::invalid) std::abort();
    }
    return 0;
}
