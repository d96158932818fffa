module;
#include <fcntl.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include <boost/asio/awaitable.hpp>

module cobuild.build;

import cobuild.archive;
import cobuild.fs;
import cobuild.llb;
import :parts;

namespace cobuild::build {

// inputs.cpp
async::task<std::shared_ptr<snapshot::view>> solve_tree(parts& p, llb::definition what, const ops::build_scope& scope,
                                                        std::shared_ptr<progress::sink> sink);

namespace {

/// "committer NAME <MAIL> 1700000000 +0000" of a commit as git keeps it.
std::optional<std::int64_t> commit_time(std::string_view commit) {
    for (const auto line : split(commit, '\n')) {
        if (line.empty()) break;  // the message
        if (!line.starts_with("committer ")) continue;
        const auto end = line.rfind(' ');
        const auto begin = line.rfind(' ', end - 1);
        if (end == std::string_view::npos || begin == std::string_view::npos) return std::nullopt;
        std::int64_t out = 0;
        const auto number = line.substr(begin + 1, end - begin - 1);
        const auto [stop, failed] = std::from_chars(number.data(), number.data() + number.size(), out);
        return failed == std::errc{} && stop == number.data() + number.size() ? std::optional(out) : std::nullopt;
    }
    return std::nullopt;
}

/// The time of the newest file of an archive; empty for what is none.
std::optional<std::int64_t> newest_of(const fs::root& tree, const std::string& name) {
    const auto file = tree.open(name, O_RDONLY);
    if (!archive::is_add_archive(file.get())) return std::nullopt;
    archive::tar_reader tar(archive::open_add_archive(file.get()));
    std::optional<std::int64_t> out;
    archive::tar_entry entry;
    while (tar.next(entry))
        if (entry.type == archive::entry_type::file) out = std::max(out.value_or(entry.mtime.seconds), entry.mtime.seconds);
    return out;
}

}  // namespace

async::task<std::optional<std::int64_t>> build_gateway::source_time(llb::source_op source, std::string log_name) {
    llb::op op;
    op.what = source;
    const bool git = source.identifier.starts_with("git://");
    const auto facts = co_await shown<ops::source_facts>(sink_, "resolve", log_name, [this, op, git](progress::writer w) {
        return ops::look_at_source(op, *parts_.environment, scope_, {.progress = w, .cancelled = {}}, git);
    });
    if (git) co_return commit_time(facts.commit_object);
    if (facts.modified != 0) co_return facts.modified;
    llb::graph g;
    const auto made = g.add(op);
    const auto tree = co_await solve_tree(parts_, g.finish(made), scope_, sink_);
    co_return co_await parts_.runtime.pool().run([&] { return newest_of(fs::root(tree->mount().duplicate()), facts.filename); });
}

}  // namespace cobuild::build
