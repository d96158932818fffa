// Any text either reads as a configuration, which then survives being written and read again, or is refused with a reason.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

import cobuild.base;
import cobuild.config;

using namespace cobuild;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    const auto findings = config::check_text(text, "fuzz.toml");
    try {
        const auto got = config::parse(text, "fuzz.toml");
        const auto again = config::parse(config::to_toml(got.config), "again.toml");
        if (!(again.config == got.config)) std::abort();
        for (const auto& [domain, table] : got.config.registries)
            if (config::hosts_for(got.config, domain).size() != table.mirrors.size() + 1) std::abort();
        (void)config::gc_rules(got.config.oci.gc, size);
    } catch (const error& e) {
        if (findings.empty() || (e.kind() != errc::invalid && e.kind() != errc::unsupported)) std::abort();
    }
    return 0;
}
