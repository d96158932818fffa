// Any bytes as an op and as a definition: refused, or read, validated, dumped, and written back to something that reads the same.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

import cobuild.base;
import cobuild.llb;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    try {
        const auto o = cobuild::llb::unmarshal_op(text);
        const auto bytes = cobuild::llb::marshal(o);
        if (cobuild::llb::marshal(cobuild::llb::unmarshal_op(bytes)) != bytes) std::abort();
        cobuild::llb::validate(o);
    } catch (const cobuild::error&) {
    }
    try {
        const auto d = cobuild::llb::unmarshal_definition(text);
        const auto bytes = cobuild::llb::marshal(d);
        if (cobuild::llb::marshal(cobuild::llb::unmarshal_definition(bytes)) != bytes) std::abort();
        (void)cobuild::llb::load(d);
        (void)cobuild::llb::to_json(d);
        (void)cobuild::llb::to_dot(d);
    } catch (const cobuild::error&) {
    }
    return 0;
}
