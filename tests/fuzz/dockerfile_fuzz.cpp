#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <variant>

import cobuild.base;
import cobuild.dockerfile;

using namespace cobuild;
namespace df = cobuild::dockerfile;

namespace {

void require(bool holds) {
    if (!holds) std::abort();
}

/// What holds for every file: lines are in order and within the file, texts can be shown, triggers can be read again.
void check_nodes(const df::file& f) {
    unsigned last = 0;
    for (const auto& n : f.nodes) {
        require(n.lines.first > last && n.lines.last >= n.lines.first);
        last = n.lines.last;
        require(!df::render_source(f, n.lines).empty());
        require(n.trigger.size() <= 1);
    }
    df::dump(f);
}

void check_instruction(const df::instruction& i) {
    df::history(i.body);
    if (const auto* run = std::get_if<df::run_instruction>(&i.body)) static_cast<void>(run->shell_text());
    if (const auto* onbuild = std::get_if<df::onbuild_instruction>(&i.body)) require(static_cast<bool>(onbuild->trigger));
    df::instruction copy = i;
    try {
        df::expand_fields(copy.body, [](std::string_view word) { return df::expand_word(word, {}).text; });
    } catch (const error& e) {
        require(e.kind() == errc::invalid);
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    df::detect_syntax(text);
    try {
        const df::file f = df::parse(text);
        check_nodes(f);
        const auto r = df::parse_instructions(f);
        if (!r.errors.empty()) df::to_error(f, r.errors);
        df::check_file(f, r.value, {.experimental_all = true});
        for (const auto& s : r.value.stages) {
            df::blank_base_message(r.value, s, f.escape);
            for (const auto& i : s.instructions) check_instruction(i);
        }
    } catch (const error& e) {
        require(e.kind() == errc::invalid);
    }
    return 0;
}
