// A reference that parses must print as one that parses to the same, and nothing else than errc::invalid may be thrown.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>

import cobuild.base;
import cobuild.oci;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    try {
        const auto ref = cobuild::oci::reference::parse(text);
        if (cobuild::oci::reference::parse(ref.str()) != ref) std::abort();
        if (cobuild::oci::reference::parse(ref.familiar()) != ref) std::abort();
    } catch (const cobuild::error& e) {
        if (e.kind() != cobuild::errc::invalid) std::abort();
    }
    try {
        const auto p = cobuild::oci::parse_platform(text);
        if (!(cobuild::oci::normalize(cobuild::oci::normalize(p)) == cobuild::oci::normalize(p))) std::abort();
        (void)cobuild::oci::match_rank(p, p);
    } catch (const cobuild::error& e) {
        if (e.kind() != cobuild::errc::invalid) std::abort();
    }
    return 0;
}
