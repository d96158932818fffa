module;
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.script;

import :image;

namespace cobuild::script {

namespace {

namespace stdfs = std::filesystem;

std::string read_text(const stdfs::path& file) {
    std::ifstream in(file, std::ios::binary);
    if (!in) throw error{errc::not_found, cat("the scenario ", file.string(), " cannot be read")};
    return {std::istreambuf_iterator<char>(in), {}};
}

stdfs::path new_directory() {
    std::string pattern = (stdfs::temp_directory_path() / "cobuild-scenario-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw_errno("making a scenario's directory");
    return pattern;
}

void write_files(const scenario& s, const stdfs::path& work) {
    for (const auto& [name, text] : s.files) {
        const auto file = work / name;
        stdfs::create_directories(file.parent_path());
        std::ofstream out(file, std::ios::binary | std::ios::trunc);
        out << text;
        if (!out) throw error{errc::io, cat("cannot write ", file.string())};
    }
}

/// The scenario's text with accepted output put in; all else stays as it is, byte for byte.
std::string with_updates(std::string_view text, const std::map<std::string, std::string>& updates) {
    std::string out;
    bool replaced = false;
    while (!text.empty()) {
        const auto end = text.find('\n');
        const auto line = text.substr(0, end == std::string_view::npos ? text.size() : end + 1);
        text.remove_prefix(line.size());
        const auto raw = line.substr(0, line.size() - (end == std::string_view::npos ? 0 : 1));
        if (!is_marker(raw)) {
            if (!replaced) out += line;
            continue;
        }
        out += line;
        const auto fresh = updates.find(std::string(trim(raw.substr(3, raw.size() - 6))));
        replaced = fresh != updates.end();
        if (!replaced) continue;
        if (!out.ends_with('\n')) out += '\n';
        out += fresh->second;
        if (!out.ends_with('\n')) out += '\n';
    }
    return out;
}

void accept(const stdfs::path& file, const std::map<std::string, std::string>& updates) {
    if (updates.empty()) return;
    const std::string text = with_updates(read_text(file), updates);
    std::ofstream out(file, std::ios::binary | std::ios::trunc);
    out << text;
    if (!out.flush()) throw error{errc::io, cat("cannot write ", file.string())};
}

async::task<outcome> run_one(stdfs::path file, const options& o, process::spawner& programs, async::runtime& rt) {
    const auto started = std::chrono::steady_clock::now();
    outcome out{.name = file.string()};
    stdfs::path work;
    std::exception_ptr failed;
    unsigned at = 0;
    std::unique_ptr<session> s;
    try {
        const auto parsed = parse(read_text(file), file.string());
        work = new_directory();
        write_files(parsed, work);
        s = std::make_unique<session>(work, o.program, o.arguments, programs, rt.pool());
        if (o.update)
            for (const auto& f : parsed.files) s->updatable.insert(f.first);
        for (const auto& l : parsed.script) {
            at = l.number;
            if (co_await s->execute(l.negated, l.words)) continue;
            out.verdict = verdict::skipped;
            out.message = s->why_skipped;
            break;
        }
        accept(file, s->updates);
    } catch (...) {
        failed = std::current_exception();
    }
    co_await async::no_cancel;
    if (s) co_await s->finish();
    if (failed) {
        const auto e = describe(failed);
        out.verdict = verdict::failed;
        const auto where = e.where() ? e.where()->line : at;
        out.message = cat(file.string(), ":", where, ": ", e.what());
    }
    if (!work.empty()) {
        std::error_code ignored;
        if (o.keep)
            out.message += cat(out.message.empty() ? "" : "\n", "kept in ", work.string());
        else
            co_await rt.pool().run([&] { stdfs::remove_all(work, ignored); });
    }
    out.took = std::chrono::steady_clock::now() - started;
    co_return out;
}

}  // namespace

async::task<std::vector<outcome>> run(std::vector<stdfs::path> files, options o, async::runtime& rt, std::function<void(const outcome&)> report) {
    process::spawner programs;
    auto all = std::make_shared<std::vector<outcome>>();
    async::semaphore slots(std::max(1U, o.parallel));
    async::task_group group(co_await async::current_executor);
    const auto one = [](stdfs::path file, const options& opts, process::spawner& p, async::runtime& r, async::semaphore& turn,
                        std::shared_ptr<std::vector<outcome>> out, const std::function<void(const outcome&)>& tell) -> async::task<void> {
        const auto permit = co_await turn.acquire();
        auto result = co_await run_one(std::move(file), opts, p, r);
        if (tell) tell(result);
        out->push_back(std::move(result));
    };
    for (const auto& file : files) group.spawn(one(file, o, programs, rt, slots, all, report));
    std::exception_ptr failed;
    try {
        co_await group.join();
    } catch (...) {
        failed = std::current_exception();
    }
    co_await async::no_cancel;
    co_await group.join();
    if (failed) std::rethrow_exception(failed);
    co_return std::move(*all);
}

}  // namespace cobuild::script
