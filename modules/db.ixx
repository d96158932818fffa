/// cobuild.db: a thin, typed face over SQLite. The only module that knows SQLite.
///
/// A `database` is one connection to one file, in WAL mode, shared by all threads of the process behind a mutex. All calls
/// block: a cached single-row read takes some ten microseconds, a deferred write some thirty, but a write may wait for
/// another process's (up to the busy timeout), so writes belong on the pool. Reads and writes are closures over a
/// `connection`; a closure must not call its database again and must not wait for anything else.
///
/// Durability. A `deferred` write survives the death of the process at once and power failure only after the next full
/// write or checkpoint; after power failure the file is an older, consistent state. A `full` write is on disk when it
/// returns (one fsync of the log).
///
/// Errors. errc::corrupt: the file is damaged; what to do is the caller's decision (see cobuild.state). errc::unsupported:
/// a network file system, named. errc::no_space, errc::timed_out (another process kept the write lock), errc::io.
/// A connection never crosses a fork: use in a child throws errc::internal. Nobody may open the file by other means, since
/// closing any descriptor of it drops SQLite's locks.
module;
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

export module cobuild.db;

import cobuild.base;
import cobuild.async;

export namespace cobuild::db {

/// A value on its way into a statement. Text and bytes are borrowed for the call.
class argument {
public:
    enum class type { null, integer, text, bytes };
    argument(std::nullopt_t) noexcept {}
    template<class I>
        requires std::is_integral_v<I> || std::is_enum_v<I>
    argument(I v) noexcept : kind(type::integer), number(static_cast<std::int64_t>(v)) {}
    argument(std::string_view v) noexcept : kind(type::text), data(bytes_of(v)) {}
    argument(const std::string& v) noexcept : argument(std::string_view(v)) {}
    argument(const char* v) noexcept : argument(std::string_view(v)) {}
    argument(std::span<const std::byte> v) noexcept : kind(type::bytes), data(v) {}
    argument(const digest& v) noexcept : kind(type::bytes), data(v.raw()) {}  ///< its 32 bytes
    template<class T>
    argument(const std::optional<T>& v) noexcept : argument(v ? argument(*v) : argument(std::nullopt)) {}

    type kind = type::null;
    std::int64_t number = 0;
    std::span<const std::byte> data;
};

/// The rows of one query, one at a time; columns count from 0. Text and bytes live until next() or destruction.
class cursor {
public:
    cursor(cursor&& other) noexcept : statement_(std::exchange(other.statement_, nullptr)) {}
    cursor& operator=(cursor&&) = delete;
    ~cursor();
    /// To the first or next row; false after the last.
    bool next();
    [[nodiscard]] bool null(int column) const;
    [[nodiscard]] std::int64_t integer(int column) const;
    [[nodiscard]] std::string_view text(int column) const;
    [[nodiscard]] std::span<const std::byte> bytes(int column) const;
    /// Throws errc::corrupt when the column does not hold 32 bytes.
    [[nodiscard]] cobuild::digest digest(int column) const;
    [[nodiscard]] std::optional<cobuild::digest> maybe_digest(int column) const;
    [[nodiscard]] std::optional<std::int64_t> maybe_integer(int column) const;

private:
    friend class connection;
    explicit cursor(void* statement) noexcept : statement_(statement) {}
    void* statement_;
};

/// What a closure works with. Statements are prepared once and kept; `?` or `?N` mark arguments.
class connection {
public:
    template<class... A>
    cursor query(std::string_view sql, const A&... arguments) {
        return query_list(sql, {argument(arguments)...});
    }
    /// Runs a statement that returns no rows; the number of rows it changed.
    template<class... A>
    std::int64_t run(std::string_view sql, const A&... arguments) {
        return run_list(sql, {argument(arguments)...});
    }
    /// Runs several statements without arguments.
    void script(std::string_view sql);
    /// The row id of the last INSERT.
    [[nodiscard]] std::int64_t last_id() const;

private:
    friend class database;
    explicit connection(void* handle) noexcept : handle_(handle) {}
    cursor query_list(std::string_view sql, std::initializer_list<argument> arguments);
    std::int64_t run_list(std::string_view sql, std::initializer_list<argument> arguments);
    void* handle_;
};

enum class durability { deferred, full };
/// When the whole file is checked on opening: `if_changed` skips it when size and time of the file are those that the last
/// clean close noted (in `<file>.ok`). While another process has the file open the caller says `never`.
enum class integrity { never, if_changed, always };

struct options {
    std::chrono::milliseconds busy_timeout{10'000};
    integrity check = integrity::if_changed;
    std::uint64_t max_wal_bytes = std::uint64_t{4} << 20;  ///< the log is written back and cut at about this size
    bool read_only = false;
};

class database {
public:
    /// Opens or makes the file (mode 0600).
    database(std::string file, options o = {});
    ~database();  ///< checkpoints when it is the last one, notes a clean close
    database(const database&) = delete;
    database& operator=(const database&) = delete;

    /// Runs `f(connection&)` on one consistent state of the file.
    template<class F>
    std::invoke_result_t<F&, connection&> read(F f) {
        scope s(*this, false, durability::deferred);
        if constexpr (std::is_void_v<std::invoke_result_t<F&, connection&>>) {
            f(s.connection());
            s.done();
        } else {
            auto out = f(s.connection());
            s.done();
            return out;
        }
    }
    /// The same in a write transaction (BEGIN IMMEDIATE), rolled back when `f` throws.
    template<class F>
    std::invoke_result_t<F&, connection&> write(F f, durability d = durability::deferred) {
        scope s(*this, true, d);
        if constexpr (std::is_void_v<std::invoke_result_t<F&, connection&>>) {
            f(s.connection());
            s.done();
        } else {
            auto out = f(s.connection());
            s.done();
            return out;
        }
    }
    /// Both on the pool, for tasks. The database must outlive the task.
    template<class F>
    async::task<std::invoke_result_t<F&, connection&>> read_on(async::blocking_pool& pool, F f) {
        return pool.run([this, g = std::move(f)]() mutable { return read(std::move(g)); });
    }
    template<class F>
    async::task<std::invoke_result_t<F&, connection&>> write_on(async::blocking_pool& pool, F f, durability d = durability::deferred) {
        return pool.run([this, d, g = std::move(f)]() mutable { return write(std::move(g), d); });
    }

    /// Brings the tables of one module up to date: `steps[i]` is the script from version i to i+1. Steps are only ever
    /// appended. Throws errc::unsupported when the file was written by a newer program.
    void migrate(std::string_view module, std::span<const std::string_view> steps);
    /// Writes the log back into the file, with fsync: afterwards every earlier write is on disk.
    void checkpoint();
    /// Reads every page; throws errc::corrupt.
    void check();
    [[nodiscard]] const std::string& file() const noexcept;

private:
    class scope {
    public:
        scope(database& owner, bool write, durability d);
        ~scope();
        scope(const scope&) = delete;
        db::connection& connection() noexcept;
        void done();

    private:
        database& owner_;
        bool open_ = false;
        bool full_ = false;
    };
    struct state;
    std::unique_ptr<state> state_;
};

/// Moves a damaged file and what belongs to it aside ("<file>.damaged-<time>") and returns the new name. Only when nobody
/// has it open.
std::string set_aside(const std::string& file);

/// The name of the network file system that this directory stands on ("NFS"), or empty when it is local.
std::string_view network_file_system(const std::string& directory);
/// The same for a statfs f_type.
std::string_view network_file_system(long type) noexcept;

}  // namespace cobuild::db
