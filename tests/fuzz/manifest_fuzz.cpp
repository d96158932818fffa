// Documents: what is read and written again reads the same.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

import cobuild.base;
import cobuild.json;
import cobuild.oci;

namespace {
template<class F>
void may_fail(F f) {
    try {
        f();
    } catch (const cobuild::error& e) {
        if (e.kind() != cobuild::errc::corrupt && e.kind() != cobuild::errc::unsupported) std::abort();
    }
}
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    namespace oci = cobuild::oci;
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    may_fail([&] {
        const auto once = oci::encode(oci::parse_manifest(text));
        if (oci::encode(oci::parse_manifest(once)) != once) std::abort();
    });
    may_fail([&] {
        const auto i = oci::parse_index(text);
        (void)oci::select(i, oci::platform{.os = "linux", .architecture = "arm64"});
        const auto once = oci::encode(i);
        if (oci::encode(oci::parse_index(once)) != once) std::abort();
    });
    may_fail([&] {
        const auto once = oci::encode(oci::parse_image(text));
        if (oci::encode(oci::parse_image(once)) != once) std::abort();
    });
    may_fail([&] {
        const auto once = cobuild::json::serialize(cobuild::json::parse(text));
        if (cobuild::json::serialize(cobuild::json::parse(once)) != once) std::abort();
    });
    (void)oci::sniff_media_type(text);
    return 0;
}
