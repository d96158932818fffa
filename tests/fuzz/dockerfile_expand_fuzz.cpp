#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>

import cobuild.base;
import cobuild.dockerfile;

using namespace cobuild;
namespace df = cobuild::dockerfile;

namespace {

void require(bool holds) {
    if (!holds) std::abort();
}

template<class F>
void only_invalid(F f) {
    try {
        f();
    } catch (const error& e) {
        require(e.kind() == errc::invalid);
    }
}

}  // namespace

/// The first line is the value of V, the rest the word.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    const std::size_t end = text.find('\n');
    const std::string value(text.substr(0, end));
    const std::string_view word = end == std::string_view::npos ? text : text.substr(end + 1);
    const df::lookup look = [&](std::string_view name) { return name == "V" ? std::optional(value) : std::nullopt; };
    for (const char escape : {'\\', '`'}) {
        only_invalid([&] {
            const auto e = df::expand_word(word, look, escape);
            require(e.text.size() <= df::max_expansion);
        });
        only_invalid([&] {
            for (const auto& w : df::expand_words(word, look, escape).words) require(!w.empty());
        });
    }
    only_invalid([&] { df::expand_heredoc(word, look); });
    df::expand_for_display(word, look);
    only_invalid([&] { df::parse_mount(word, [&](std::string_view w) { return df::expand_word(w, look).text; }); });
    only_invalid([&] { df::parse_port(word); });
    df::parse_heredoc_word(word);
    df::is_signal(word);
    df::go_quote(word);
    return 0;
}
