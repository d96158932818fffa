module;
#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <ctime>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>
#include <boost/system/system_error.hpp>

module cobuild.registry;

import :internal;

namespace cobuild::registry {

namespace {

constexpr unsigned max_resumes = 64;

struct failure {
    std::string host;  // with its part and the configuration entry that speaks for it
    host_error why;
};

bool waits_help(const host_error& e) {
    switch (e.status) {
        case 0: return e.reached && (e.kind() == errc::unavailable || e.kind() == errc::timed_out);
        case 408:
        case 429:
        case 500:
        case 502:
        case 503:
        case 504: return true;
        default: return false;
    }
}

// Between half and all of first_wait * 2^n.
nanoseconds backoff(const retry_policy& policy, unsigned attempt) {
    thread_local std::minstd_rand random{std::random_device{}()};
    auto wait = policy.first_wait;
    for (unsigned i = 1; i < attempt && wait < policy.longest_wait; ++i) wait *= 2;
    wait = std::min(wait, policy.longest_wait);
    return wait / 2 + nanoseconds(std::uniform_int_distribution<std::int64_t>(0, wait.count() / 2)(random));
}

std::vector<host_state*> candidates(registry_state& r, const attempt_plan& plan) {
    std::vector<host_state*> out;
    const auto now = clock::now();
    for (const auto& h : r.hosts) {
        const bool last = h == r.hosts.back();
        if (plan.push && h->settings.mirror) continue;
        if (!last) {
            if (h->rests_until > now || h->distrusted.contains(plan.digest)) continue;
            const auto lack = h->lacks.find(plan.repository);
            if (plan.by_digest && lack != h->lacks.end() && lack->second > now) continue;
        }
        out.push_back(h.get());
    }
    return out;
}

void note(registry_state& r, host_state& h, const attempt_plan& plan, const host_error& e, bool last, const call_options& call) {
    const auto until = clock::now() + r.opts->host_rest;
    if (e.status == 404) {
        if (h.lacks.size() > 1000) h.lacks.clear();
        if (!last) h.lacks.insert_or_assign(plan.repository, until);
        log(log_level::debug, "not on this host", {{"host", h.name()}, {"repository", plan.repository}});
        return;
    }
    if (last) return;
    if (e.rest || e.status == 0) h.rests_until = until;
    const auto text = cat(plan.doing, ": ", e.what(), "; trying the next host");
    // Once for all the operations of a pull; after a while again.
    if (h.warned_status == e.status && h.warned_until > clock::now()) return log(log_level::debug, text);
    h.warned_status = e.status;
    h.warned_until = until;
    log(log_level::warning, text);
    if (call.warn) call.warn(text);
}

[[noreturn]] void give_up(const attempt_plan& plan, std::vector<failure> all) {
    const auto kind = all.back().why.kind();
    if (all.size() == 1) {
        error e = std::move(all.back().why);
        throw std::move(e).with(plan.doing);
    }
    std::string text = cat(plan.doing, ": every host failed");
    for (const auto& f : all) text.append("; ").append(f.host).append(": ").append(f.why.what());
    throw error{kind, std::move(text)};
}

std::string titled(const host_state& h) { return cat(h.name(), " (", h.settings.mirror ? "mirror, " : "", entry_of(h), ')'); }

// What went wrong with one attempt, or a rethrow of what no other host can cure.
host_error classify(const std::exception_ptr& thrown, const socket_pool::lease* slot) {
    try {
        std::rethrow_exception(thrown);
    } catch (const host_error& e) {
        return e;
    } catch (const error& e) {
        if (e.kind() == errc::canceled) throw;
        host_error out{e};
        const auto* c = slot != nullptr ? slot->current() : nullptr;
        out.reached = c == nullptr || c->reached();
        return out;
    }
}

void log_start(const attempt_plan& plan, const host_state& h, const std::string& trace) {
    if (!log_enabled(log_level::debug)) return;
    const auto span = next_span(trace).span;
    if (plan.digest.empty())
        return log(log_level::debug, "resolving", {{"host", h.name()}, {"repository", plan.repository}, {"spanID", span}, {"traceID", trace}});
    log(log_level::debug, plan.push ? "push" : "fetch",
        {{"digest", plan.digest},
         {"host", h.name()},
         {"mediatype", plan.media_type},
         {"size", cat(plan.size)},
         {"spanID", span},
         {"traceID", trace}});
}

}  // namespace

std::string entry_of(const host_state& h) {
    if (h.settings.section.empty()) return "no configuration entry";
    return h.settings.configured ? h.settings.section : cat("no ", h.settings.section, " in the configuration");
}

std::optional<nanoseconds> parse_retry_after(std::string_view text) {
    text = trim(text);
    long seconds = 0;
    const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), seconds);
    if (ec == std::errc{} && end == text.data() + text.size()) {
        if (seconds < 0) return std::nullopt;
        return nanoseconds(std::chrono::seconds(std::min(seconds, 31'536'000L)));
    }
    std::tm tm{};
    const std::string copy(text);
    const char* rest = ::strptime(copy.c_str(), "%a, %d %b %Y %H:%M:%S GMT", &tm);
    if (rest == nullptr || *rest != '\0') return std::nullopt;
    const auto at = std::chrono::system_clock::from_time_t(::timegm(&tm));
    return std::max(nanoseconds(at - std::chrono::system_clock::now()), nanoseconds(0));
}

async::task<void> try_hosts(registry_state& r, attempt_plan plan, call_options call,
                            std::function<async::task<void>(host_state&, socket_pool::lease&)> op, std::shared_ptr<bool> fatal) {
    const auto& policy = r.opts->retry;
    std::vector<failure> failures;
    const auto hosts = candidates(r, plan);
    if (hosts.empty()) throw error{errc::invalid, cat(plan.doing, ": no host is configured for the registry ", r.domain)};
    const auto trace = log_enabled(log_level::debug) ? random_id() : std::string();
    for (auto* h : hosts) {
        log_start(plan, *h, trace);
        const bool last = h == hosts.back();
        unsigned without_progress = 0;
        for (unsigned tries = 1;; ++tries) {
            std::optional<host_error> why;
            {
                auto slot = co_await r.pool->acquire(plan.transfer);
                slot.trace = trace;
                std::exception_ptr thrown;
                try {
                    co_await op(*h, slot);
                    co_return;
                } catch (...) {
                    thrown = std::current_exception();
                }
                if (fatal && *fatal) std::rethrow_exception(thrown);
                why = classify(thrown, &slot);
            }
            without_progress = why->progress ? 1 : without_progress + 1;
            const bool again = (why->broken_body || (last && waits_help(*why))) && without_progress < policy.attempts && tries < max_resumes;
            if (why->retry_after && again && *why->retry_after > policy.longest_retry_after) {
                failures.push_back(
                    {titled(*h), host_error{error{why->kind(),
                                                  cat(why->what(), " and wants us to wait ", format_duration(*why->retry_after), ", longer than the ",
                                                      format_duration(policy.longest_retry_after), " we would: try again later")},
                                            why->status}});
                break;
            }
            if (!again) {
                note(r, *h, plan, *why, last, call);
                failures.push_back({titled(*h), std::move(*why)});
                break;
            }
            auto wait = why->progress ? nanoseconds(0) : backoff(policy, without_progress);
            if (why->retry_after) wait = std::max(wait, *why->retry_after);
            const auto text =
                cat(plan.doing, ": ", why->what(), "; trying again in ", format_duration(std::chrono::ceil<std::chrono::milliseconds>(wait)));
            log(log_level::warning, text);
            if (call.warn) call.warn(text);
            co_await async::sleep_for(wait);
        }
    }
    give_up(plan, std::move(failures));
}

std::string pull_scope(const oci::reference& ref) { return cat("repository:", ref.path(), ":pull"); }
std::string push_scope(const oci::reference& ref) { return cat("repository:", ref.path(), ":pull,push"); }

}  // namespace cobuild::registry
