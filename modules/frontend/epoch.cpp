module;
#include <algorithm>
#include <charconv>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.frontend;

import :state;

namespace cobuild::frontend {
namespace {

constexpr std::string_view epoch_name = "SOURCE_DATE_EPOCH";

std::optional<std::int64_t> parse_seconds(std::string_view text) {
    std::int64_t n = 0;
    const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), n);
    // Its nanoseconds must fit as well.
    if (failed != std::errc{} || end != text.data() + text.size() || n < -9'000'000'000 || n > 9'000'000'000) return std::nullopt;
    return n;
}

/// What SOURCE_DATE_EPOCH names besides a number, as a source that has a time; empty: one that has none.
struct timed {
    std::optional<llb::source_op> source;
    std::string log_name;
};

}  // namespace

/// SOURCE_DATE_EPOCH is a time in seconds, or names the build context, a named context, or a stage that is one remote ADD.
async::task<void> converter::read_epoch() {
    const std::string name(epoch_name);
    auto text = build_arg(name);
    if (!text) {
        text = global_args_.get(name);
        if (text && text->empty()) text.reset();
    }
    if (!text) co_return;
    const auto forget = [&] {
        global_args_.erase(name);
        req_.build_args.erase(name);
    };
    if (text->empty()) {  // given as empty: reset
        forget();
        co_return;
    }
    epoch_ = parse_seconds(*text);
    if (epoch_) co_return;
    timed from;
    if (*text == "context") {
        from = {req_.remote_context, "[internal] resolve main build context metadata"};
    } else if (const auto* named = named_context(*text)) {
        from = {timed_context(*text, *named), cat("[internal] resolve SOURCE_DATE_EPOCH named context ", *text)};
    } else if (const auto* stage = parsed_.find(to_lower(*text))) {
        from = {timed_stage(*stage), cat("[internal] resolve SOURCE_DATE_EPOCH source stage ", stage->name)};
    } else {
        throw error{errc::invalid,
                    cat("invalid SOURCE_DATE_EPOCH: ", *text, ": seconds since 1970, \"context\", a named context or a stage is expected")};
    }
    if (from.source) epoch_ = co_await engine_.source_time(std::move(*from.source), std::move(from.log_name));
    if (!epoch_) {
        forget();
        co_return;
    }
    // Steps see the time, not what it was taken from.
    if (global_args_.get(name)) global_args_.set(name, cat(*epoch_));
    req_.build_args[name] = cat(*epoch_);
}

/// Only git repositories and files behind URLs have a time.
std::optional<llb::source_op> converter::timed_context(const std::string& name, const std::string& what) const {
    try {
        if (const auto git = remote::parse_git_context(what)) return git_source(*git, git->keep_git_dir.value_or(false), git->checksum);
    } catch (const error& e) {
        throw error(e).with(cat("the named context ", name));
    }
    if (!remote::is_http(what)) return std::nullopt;
    return http_source(what, remote::file_name(what), {});
}

/// The one ADD of a stage that is FROM scratch with nothing else but ARGs.
llb::source_op converter::timed_stage(const df::stage& stage) const {
    const auto lines = stage.from.lines;
    auto env = global_args_;
    env.erase(epoch_name);
    if (df::expand_word(stage.base, env.lookup(), file_.escape).text != "scratch")
        fail(errc::invalid, "SOURCE_DATE_EPOCH stage must use FROM scratch", lines);
    const df::add_instruction* only = nullptr;
    for (const auto& in : stage.instructions) {
        if (const auto* args = std::get_if<df::arg_instruction>(&in.body)) {
            for (const auto& arg : args->args) {
                auto value = build_arg(arg.key);
                if (!value && arg.value) value = df::expand_word(*arg.value, env.lookup(), file_.escape).text;
                if (value) env.set(arg.key, *value);
            }
            continue;
        }
        const auto* add = std::get_if<df::add_instruction>(&in.body);
        if (add == nullptr)
            fail(errc::invalid,
                 cat("SOURCE_DATE_EPOCH stage does not meet source-only requirements: unsupported ",
                     to_lower(in.source.substr(0, in.source.find(' '))), " instruction"),
                 in.lines);
        if (only != nullptr || add->sources.size() != 1 || !add->heredocs.empty())
            fail(errc::invalid, "SOURCE_DATE_EPOCH stage must contain exactly one remote ADD", in.lines);
        only = add;
    }
    if (only == nullptr) fail(errc::invalid, "SOURCE_DATE_EPOCH stage must contain exactly one remote ADD", lines);
    try {
        const auto expanded = [&](const std::string& word) { return df::expand_word(word, env.lookup(), file_.escape).text; };
        const auto what = expanded(only->sources.front());
        const auto sum = expanded(only->checksum);
        if (const auto git = remote::parse_git(what))
            return git_source(*git, only->keep_git_dir.value_or(git->keep_git_dir.value_or(false)), sum.empty() ? git->checksum : sum);
        if (remote::is_http(what)) return http_source(what, remote::file_name(what), sum);
    } catch (const error& e) {
        fail(e.kind(), e.what(), lines);
    }
    fail(errc::invalid, "SOURCE_DATE_EPOCH stage source must be a single HTTP(S) or Git ADD", lines);
}

}  // namespace cobuild::frontend
