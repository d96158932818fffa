module;
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <deque>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include "control.pb.h"

module cobuild.daemon;

import cobuild.fs;
import :internal;

namespace cobuild::daemon {

namespace wire = moby::buildkit::v1;
namespace stdfs = std::filesystem;

namespace {

constexpr std::size_t max_file = std::size_t{256} << 20;

stdfs::path record_file(const stdfs::path& at, const std::string& ref) { return at / "records" / digest::of(ref).hex(); }
stdfs::path blob_file(const stdfs::path& at, const std::string& hex) { return at / "blobs" / hex; }

std::optional<std::string> read_whole(const stdfs::path& file) {
    const unique_fd fd{::open(file.c_str(), O_RDONLY | O_CLOEXEC)};
    if (!fd) return std::nullopt;
    return fs::read_all(fd.get(), max_file);
}

void write_whole(const stdfs::path& file, const std::string& bytes) {
    const unique_fd dir{::open(file.parent_path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
    if (!dir) throw_errno(cat("opening ", file.parent_path().string()));
    fs::atomic_write(dir.get(), file.filename().string(), bytes, 0600, false);
}

/// What the records of the directory say; one that cannot be read is left out and removed.
std::map<std::string, std::string> load(const stdfs::path& at) {
    std::map<std::string, std::string> out;
    stdfs::create_directories(at / "records");
    stdfs::create_directories(at / "blobs");
    std::error_code ignored;
    for (const auto& e : stdfs::directory_iterator(at / "blobs"))
        if (e.path().filename().string().starts_with(".")) stdfs::remove(e.path(), ignored);  // somebody died over it
    for (const auto& e : stdfs::directory_iterator(at / "records")) {
        const auto bytes = read_whole(e.path());
        wire::BuildHistoryRecord r;
        if (bytes && r.ParseFromString(*bytes) && !r.ref().empty()) {
            out[r.ref()] = *bytes;
            continue;
        }
        log(log_level::warning, "a record of the build history is damaged and is removed", {{"file", e.path().string()}});
        stdfs::remove(e.path(), ignored);
    }
    return out;
}

/// A file that is being written; the directory is this daemon's alone.
bool unfinished(const stdfs::path& file) { return file.filename().string().starts_with("."); }

/// Blobs that no record names any more.
void drop_blobs(const stdfs::path& at, const std::vector<std::string>& named) {
    std::error_code ec;
    for (const auto& e : stdfs::directory_iterator(at / "blobs", ec))
        if (!unfinished(e.path()) && std::find(named.begin(), named.end(), e.path().filename().string()) == named.end()) stdfs::remove(e.path(), ec);
}

std::int64_t seconds_of(const google::protobuf::Timestamp& t) { return t.seconds(); }

}  // namespace

history::history(std::string root, async::blocking_pool& pool, config::history_table limits)
    : at_(stdfs::path(std::move(root)) / "history"), pool_(pool), limits_(limits) {}

async::task<void> history::open() {
    if (opened_) co_return;
    auto found = co_await pool_.run([at = at_] { return load(at); });
    if (std::exchange(opened_, true)) co_return;
    for (auto& [ref, bytes] : found) done_.emplace(ref, std::move(bytes));
}

void history::tell(int type, const std::string& record) {
    wire::BuildHistoryEvent e;
    e.set_type(static_cast<wire::BuildHistoryEventType>(type));
    e.mutable_record()->ParseFromString(record);
    const auto bytes = e.SerializeAsString();
    for (const auto& s : listeners_) {
        s->waiting.emplace_back(e.record().ref(), bytes);
        std::exchange(s->more, std::make_shared<async::event>())->set();
    }
}

void history::begin(const std::string& ref, std::string record) {
    active_[ref] = std::move(record);
    tell(wire::STARTED, active_[ref]);
}

async::task<void> history::complete(std::string ref, std::string record, std::string logs, std::vector<std::string> blobs) {
    co_await open();
    wire::BuildHistoryRecord r;
    r.ParseFromString(record);
    const auto id = digest::of(logs);
    auto* d = r.mutable_logs();
    d->set_media_type("application/vnd.buildkit.status.v0");
    d->set_digest(id.str());
    d->set_size(static_cast<std::int64_t>(logs.size()));
    r.set_generation(1);
    const auto bytes = r.SerializeAsString();
    // Nobody is sent to a file that is not there yet, and no sweep takes it away meanwhile.
    blobs.push_back(std::move(logs));
    std::vector<std::multiset<std::string>::iterator> mine;
    for (const auto& b : blobs) mine.push_back(writing_.insert(digest::of(b).hex()));
    const scope_exit written([this, mine] {
        for (const auto& at : mine) writing_.erase(at);
    });
    co_await pool_.run([at = at_, ref, bytes, blobs = std::move(blobs)] {
        for (const auto& b : blobs) write_whole(blob_file(at, digest::of(b).hex()), b);
        write_whole(record_file(at, ref), bytes);
    });
    active_.erase(ref);
    done_[ref] = bytes;
    tell(wire::COMPLETE, bytes);
    co_await sweep();
}

void history::forget_active(const std::string& ref) { active_.erase(ref); }

std::optional<std::string> history::logs_of(const std::string& ref) const {
    const auto at = done_.find(ref);
    if (at == done_.end()) return std::nullopt;
    wire::BuildHistoryRecord r;
    r.ParseFromString(at->second);
    const auto id = digest::try_parse(r.logs().digest());
    return id ? std::optional(blob_file(at_, id->hex()).string()) : std::nullopt;
}

async::task<std::optional<std::string>> history::read_blob(digest id) {
    co_await open();
    co_return co_await pool_.run([file = blob_file(at_, id.hex())] { return read_whole(file); });
}

async::task<std::vector<std::pair<std::string, std::uint64_t>>> history::blobs() {
    co_await open();
    co_return co_await pool_.run([at = at_ / "blobs"] {
        std::vector<std::pair<std::string, std::uint64_t>> out;
        std::error_code ec;
        for (const auto& e : stdfs::directory_iterator(at, ec)) out.emplace_back(cat("sha256:", e.path().filename().string()), e.file_size(ec));
        return out;
    });
}

async::task<void> history::update(std::string ref, bool remove, bool pinned) {
    co_await open();
    const auto at = done_.find(ref);
    if (at == done_.end()) throw error{errc::not_found, cat("there is no record of the build ", ref)};
    if (remove) {
        const auto bytes = at->second;
        done_.erase(at);
        co_await pool_.run([file = record_file(at_, ref)] {
            std::error_code ignored;
            stdfs::remove(file, ignored);
        });
        tell(wire::DELETED, bytes);
        co_return co_await sweep();
    }
    wire::BuildHistoryRecord r;
    r.ParseFromString(at->second);
    if (r.pinned() == pinned) co_return;
    r.set_pinned(pinned);
    r.set_generation(r.generation() + 1);
    at->second = r.SerializeAsString();
    co_await pool_.run([file = record_file(at_, ref), bytes = at->second] { write_whole(file, bytes); });
    tell(wire::COMPLETE, done_[ref]);
}

/// A record goes when it is beyond the most there may be and older than the oldest there may be.
async::task<void> history::sweep() {
    std::vector<std::pair<std::int64_t, std::string>> age;
    for (const auto& [ref, bytes] : done_) {
        wire::BuildHistoryRecord r;
        r.ParseFromString(bytes);
        if (!r.pinned()) age.emplace_back(seconds_of(r.completed_at()), ref);
    }
    std::sort(age.rbegin(), age.rend());
    const auto now = std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
    const auto limit = std::chrono::duration_cast<std::chrono::seconds>(limits_.max_age).count();
    std::vector<std::string> gone;
    for (std::size_t i = static_cast<std::size_t>(std::max<std::int64_t>(0, limits_.max_entries)); i < age.size(); ++i)
        if (now - age[i].first > limit) gone.push_back(age[i].second);
    for (const auto& ref : gone) done_.erase(ref);
    std::vector<std::string> named(writing_.begin(), writing_.end());
    for (const auto& [ref, bytes] : done_) {
        wire::BuildHistoryRecord r;
        r.ParseFromString(bytes);
        const auto add = [&named](const wire::Descriptor& d) {
            if (const auto id = digest::try_parse(d.digest())) named.push_back(id->hex());
        };
        for (const auto* d : {&r.logs(), &r.external_error(), &r.trace()}) add(*d);
        for (const auto& d : r.result().attestations()) add(d);
        for (const auto& [platform, result] : r.results())
            for (const auto& d : result.attestations()) add(d);
    }
    co_await pool_.run([at = at_, gone, named] {
        std::error_code ignored;
        for (const auto& ref : gone) stdfs::remove(record_file(at, ref), ignored);
        drop_blobs(at, named);
    });
}

async::task<rpc::status> history::listen(std::shared_ptr<rpc::call> c, std::string request) {
    co_await open();
    wire::BuildHistoryRequest asked;
    if (!asked.ParseFromString(request)) throw error{errc::invalid, "the request cannot be read"};
    const auto wanted = parse_history_filters({asked.filter().begin(), asked.filter().end()});
    if (asked.limit() < 0) throw error{errc::invalid, cat("invalid limit ", asked.limit())};
    auto me = std::make_shared<listener_state>();
    listeners_.insert(me);
    const scope_exit leave([this, me] { listeners_.erase(me); });
    std::vector<wire::BuildHistoryEvent> now;
    const auto add = [&](const std::map<std::string, std::string>& from, wire::BuildHistoryEventType type) {
        for (const auto& [ref, bytes] : from) {
            if (!asked.ref().empty() && asked.ref() != ref) continue;
            wire::BuildHistoryEvent e;
            e.set_type(type);
            e.mutable_record()->ParseFromString(bytes);
            now.push_back(std::move(e));
        }
    };
    add(active_, wire::STARTED);
    const auto active = now.size();
    if (!asked.active_only()) add(done_, wire::COMPLETE);
    std::erase_if(now, [&, i = std::size_t{0}](const auto& e) mutable { return i++ >= active && !wanted(e.record().SerializeAsString()); });
    if (asked.limit() > 0) {
        std::stable_sort(now.begin(), now.end(), [](const auto& a, const auto& b) {
            return std::pair(a.record().created_at().seconds(), a.record().created_at().nanos()) >
                   std::pair(b.record().created_at().seconds(), b.record().created_at().nanos());
        });
        if (now.size() > static_cast<std::size_t>(asked.limit())) now.resize(static_cast<std::size_t>(asked.limit()));
    }
    for (const auto& e : now) co_await c->write(e.SerializeAsString());
    if (asked.early_exit()) co_return rpc::status{};
    for (;;) {
        while (!me->waiting.empty()) {
            auto [ref, bytes] = std::move(me->waiting.front());
            me->waiting.pop_front();
            if (asked.ref().empty() || asked.ref() == ref) co_await c->write(std::move(bytes));
        }
        const auto more = me->more;
        co_await more->wait();
    }
}

}  // namespace cobuild::daemon
