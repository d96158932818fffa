/// cobuild.base: the words every other module speaks: errors, digests, owned descriptors, sizes, durations, log lines.
///
/// Knows nothing of images, files' meaning or coroutines. Thread safety: distinct objects may be used from distinct
/// threads; the log functions may be called from any thread.
module;
#include <array>
#include <chrono>
#include <compare>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

export module cobuild.base;

export namespace cobuild {

std::string_view version() noexcept;  ///< as CMake's project() states it: "0.1.0"
// ---------------------------------------------------------------- errors

/// What kind of thing went wrong; decides the exit code and whether a retry can help. See docs/errors.md.
enum class errc {
    invalid,       ///< the user's input is wrong: fix the file, flag or key that the message names
    not_found,     ///< a named thing does not exist
    exists,        ///< a named thing exists already and must not
    permission,    ///< this user may not do that
    unauthorized,  ///< a registry or server refused the login
    unavailable,   ///< a peer could not be reached or answered 5xx: trying again may help
    timed_out,     ///< a limit on time ran out
    canceled,      ///< somebody asked to stop; the message is the cause
    no_space,      ///< a disk or quota is full
    corrupt,       ///< bytes are not what their digest, size or format says
    unsupported,   ///< a feature that is not there, said by name
    step_failed,   ///< a build step ended with a non-zero exit code
    io,            ///< the operating system refused; the message has its reason
    internal,      ///< a broken invariant of cobuild itself
};

/// A kind's stable lower-case name ("not_found"), as `rawjson` progress and logs show it.
std::string_view to_string(errc kind) noexcept;

/// A place in a file the user wrote; `line` counts from 1, 0 means "the whole file".
struct source_location {
    std::string file;
    unsigned line = 0;
    bool operator==(const source_location&) const = default;
};

/// The one exception type. `what()` is a sentence for the user: contexts added on the way up come first, joined by ": ".
///
/// Throw it by value: `throw error{errc::not_found, cat("no such stage: ", name)}`. On the way up, add context with
/// `with("pull of busybox")` only where the reader would otherwise not know what was being done.
class error : public std::exception {
public:
    error(errc kind, std::string message);
    error(const error&);
    error(error&&) noexcept;
    error& operator=(const error&);
    error& operator=(error&&) noexcept;
    ~error() override;

    [[nodiscard]] errc kind() const noexcept;
    /// The whole sentence, contexts included, no location.
    [[nodiscard]] const char* what() const noexcept override;
    [[nodiscard]] const std::optional<source_location>& where() const noexcept;
    /// The exit code of a failed step (errc::step_failed), else empty.
    [[nodiscard]] std::optional<int> exit_code() const noexcept;

    error&& with(std::string_view context) &&;
    error&& at(source_location where) &&;
    error&& exited(int code) &&;

private:
    struct state;
    std::shared_ptr<const state> state_;
};

/// The error of a failed system call: kind by `errnum` (ENOENT not_found, EACCES/EPERM permission, ENOSPC/EDQUOT
/// no_space, ECANCELED canceled, else io), message "<what>: <strerror>".
error os_error(int errnum, std::string_view what);
/// `throw os_error(errno, what)`; keeps errno from before any allocation.
[[noreturn]] void throw_errno(std::string_view what);

/// The sentence for any exception in flight: an `error`'s own, a standard exception's what() with its kind `internal`,
/// never a type name. Asio's operation_aborted becomes `canceled`.
error describe(const std::exception_ptr& thrown);

// ---------------------------------------------------------------- text

/// Joins strings, characters and integers without a format string.
namespace detail {
struct piece {
    std::string_view text;
    std::array<char, 24> digits{};
    std::size_t size = 0;
    piece(std::string_view t) : text(t) {}
    piece(const std::string& t) : text(t) {}
    piece(const char* t) : text(t) {}
    piece(char c) : size(1) { digits[0] = c; }
    piece(int v);
    piece(unsigned v);
    piece(long v);
    piece(unsigned long v);
    piece(long long v);
    piece(unsigned long long v);
    [[nodiscard]] std::string_view view() const { return size != 0 ? std::string_view(digits.data(), size) : text; }
};
std::string join_pieces(std::initializer_list<piece> pieces);
}  // namespace detail

template<class... T>
std::string cat(const T&... parts) {
    return detail::join_pieces({detail::piece(parts)...});
}

/// `text` in double quotes with control characters, quotes and backslashes escaped: safe to show on a terminal.
std::string quoted(std::string_view text);
// Exact matches, so that a call never means std::quoted, which argument-dependent lookup finds for strings.
inline std::string quoted(const std::string& text) { return quoted(std::string_view(text)); }
inline std::string quoted(std::string& text) { return quoted(std::string_view(text)); }
inline std::string quoted(const char* text) { return quoted(std::string_view(text)); }

/// The nearest of `candidates` by edit distance; empty when it is more than a third of the longer word, or more than 3.
std::string_view nearest(std::string_view word, std::span<const std::string_view> candidates);
std::vector<std::string_view> split(std::string_view text, char separator);
template<std::same_as<std::string> S>
std::vector<std::string_view> split(S&& temporary, char separator) = delete;  // the pieces would outlive their text
std::string_view trim(std::string_view text);
std::string to_lower(std::string_view text);

// ---------------------------------------------------------------- digests

/// A sha256 digest (the only algorithm cobuild accepts), as image-spec descriptor.md spells it: "sha256:" + 64 lower-case hex.
class digest {
public:
    static constexpr std::size_t size = 32;
    digest() = default;
    explicit digest(std::span<const std::byte, size> raw);
    /// Throws errc::invalid for any other spelling, naming the text.
    static digest parse(std::string_view text);
    static std::optional<digest> try_parse(std::string_view text) noexcept;
    /// The digest of `data`.
    static digest of(std::span<const std::byte> data);
    static digest of(std::string_view data);

    [[nodiscard]] std::string str() const;  ///< "sha256:<hex>"
    [[nodiscard]] std::string hex() const;
    [[nodiscard]] const std::array<std::byte, size>& raw() const noexcept { return raw_; }
    [[nodiscard]] bool empty() const noexcept { return *this == digest{}; }
    auto operator<=>(const digest&) const = default;

private:
    std::array<std::byte, size> raw_{};
};

/// A running sha256. Not thread-safe. After finish() it is as new.
class hasher {
public:
    hasher();
    hasher(hasher&&) noexcept;
    hasher& operator=(hasher&&) noexcept;
    ~hasher();
    hasher& update(std::span<const std::byte> data);
    hasher& update(std::string_view data);
    digest finish();

private:
    struct state;
    std::unique_ptr<state> state_;
};

/// 16 random bytes as 32 hex digits: names for steps, owners, temporary files. From the kernel's generator.
std::string random_id();

std::string base64_encode(std::span<const std::byte> data);
std::string base64_encode(std::string_view data);
/// Standard alphabet, padding optional; empty on any other character.
std::optional<std::string> base64_decode(std::string_view text);

inline std::span<const std::byte> bytes_of(std::string_view text) noexcept { return {reinterpret_cast<const std::byte*>(text.data()), text.size()}; }
inline std::string_view text_of(std::span<const std::byte> data) noexcept { return {reinterpret_cast<const char*>(data.data()), data.size()}; }

// ---------------------------------------------------------------- ownership

class unique_fd {  ///< owns a file descriptor and closes it once; -1 means none
public:
    unique_fd() noexcept = default;
    explicit unique_fd(int fd) noexcept : fd_(fd) {}
    unique_fd(unique_fd&& other) noexcept : fd_(other.release()) {}
    unique_fd& operator=(unique_fd&& other) noexcept {
        reset(other.release());
        return *this;
    }
    ~unique_fd() { reset(); }
    [[nodiscard]] int get() const noexcept { return fd_; }
    [[nodiscard]] int release() noexcept { return std::exchange(fd_, -1); }
    void reset(int fd = -1) noexcept;
    /// A new close-on-exec descriptor for the same open file. Throws errc::io.
    [[nodiscard]] unique_fd duplicate() const;
    explicit operator bool() const noexcept { return fd_ >= 0; }

private:
    int fd_ = -1;
};

/// Runs a function when the scope ends, unless dismissed. The function must not throw.
template<class F>
class scope_exit {
public:
    explicit scope_exit(F f) : f_(std::move(f)) {}
    scope_exit(const scope_exit&) = delete;
    scope_exit& operator=(const scope_exit&) = delete;
    ~scope_exit() {
        if (armed_) f_();
    }
    void dismiss() noexcept { armed_ = false; }

private:
    F f_;
    bool armed_ = true;
};

/// A value that cannot be mistaken for another of the same representation: `using layer_id = strong<std::uint64_t, struct layer_tag>`.
template<class T, class Tag>
struct strong {
    T value{};
    auto operator<=>(const strong&) const = default;
};

// ---------------------------------------------------------------- sizes and durations

using nanoseconds = std::chrono::nanoseconds;

/// "12B", "1.21kB", "3.40MB", "1.07GB": SI units, as docker shows sizes.
std::string format_bytes(std::uint64_t bytes);
/// Bytes from "512", "64k", "40MB", "1.5GiB", "10g": units are binary multiples as in docker's --shm-size; throws errc::invalid.
std::uint64_t parse_bytes(std::string_view text);
/// Go's duration syntax ("1h30m", "250ms", "-1s", "0"); throws errc::invalid naming the text.
nanoseconds parse_duration(std::string_view text);
/// Go's Duration.String: "1m30s", "0s", "250ms".
std::string format_duration(nanoseconds d);
/// RFC 3339 in UTC with up to nine fractional digits, trailing zeros cut, as Go's RFC3339Nano: "1970-01-01T00:00:00Z".
std::string format_time(std::chrono::sys_time<nanoseconds> t);
/// Parses what format_time writes, and offsets other than Z; empty when it is not such a text.
std::optional<std::chrono::sys_time<nanoseconds>> parse_time(std::string_view text);

// ---------------------------------------------------------------- log

enum class log_level { trace, debug, info, warning, error, off };
enum class log_format { text, json };

/// One key=value pair of a log line. Never put a secret into one.
struct log_field {
    std::string_view key;
    std::string value;
};

struct log_options {
    log_level level = log_level::warning;
    log_format format = log_format::text;
    int fd = 2;  ///< where lines are written, each by one write(2)
    /// When set, lines go here instead of `fd`: (level, message, the fields).
    std::function<void(log_level, std::string_view, std::span<const log_field>)> sink;
};

/// Process-wide; a library never calls it, programs do.
void configure_log(log_options options);
bool log_enabled(log_level level) noexcept;
/// One line in logrus' forms: `time="2026-..." level=debug msg="do request" host=...`, or one JSON object.
void log(log_level level, std::string_view message, std::initializer_list<log_field> fields = {});
void log(log_level level, std::string_view message, std::span<const log_field> fields);

}  // namespace cobuild

export template<>
struct std::hash<cobuild::digest> {
    std::size_t operator()(const cobuild::digest& d) const noexcept {
        std::size_t value = 0;
        for (std::size_t i = 0; i < sizeof value; ++i) value = value << 8 | static_cast<std::size_t>(d.raw()[i]);
        return value;
    }
};

export template<class T, class Tag>
struct std::hash<cobuild::strong<T, Tag>> {
    std::size_t operator()(const cobuild::strong<T, Tag>& s) const noexcept { return std::hash<T>{}(s.value); }
};
