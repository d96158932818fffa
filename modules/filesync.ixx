/// cobuild.filesync: directory trees between two programs, by the protocol of BuildKit and its clients (fsutil).
///
/// One end sends: it walks its trees and says of every entry what it is, parents first, names in byte order. The other
/// receives: it asks for the bytes of the regular files it has not got, and says when it has all. Either end may be
/// BuildKit's own. A client's build context comes this way, and `-o type=local` goes this way.
///
/// Both calls run on the caller's executor, use one stream each and put all system calls on the pool. They may be
/// cancelled; then, as after any failure, the other end is told in a packet (for at most `farewell`), and no temporary file
/// stays. `on_progress` runs on the caller's executor; the other callbacks on pool threads, never two at once for one call. None may
/// block for long; what they throw ends the call.
/// Memory: a few megabytes, and the paths of the files announced (`limits` bounds them).
///
/// Errors: errc::corrupt for a peer that breaks the protocol (order, "..", bytes nobody asked for, limits), errc::io with
/// the peer's own words when it gave up, errc::unavailable when the stream ends early, errc::io naming a file that changed while it was sent.
///
/// Not its job: the transport (gRPC), its keep-alive and half-close; who may read which directory; ignore files.
module;
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <boost/asio/awaitable.hpp>

export module cobuild.filesync;

import cobuild.base;
import cobuild.async;
import cobuild.fs;
export import :packet;

export namespace cobuild::filesync {

/// The transport: one encoded packet a message, an empty message included. One read and one write may be under way at a
/// time, never two of a kind. Both can be cancelled.
class packet_stream {
public:
    virtual ~packet_stream() = default;
    /// Empty when the other end will send no more.
    virtual async::task<std::optional<std::string>> read() = 0;
    virtual async::task<void> write(std::string message) = 0;
};

/// How long a failed call tries to tell the other end.
inline constexpr nanoseconds farewell = std::chrono::seconds(2);

struct progress {
    std::uint64_t entries = 0;
    std::uint64_t files = 0;  ///< sent, or made anew (an empty one is made without being asked for)
    std::uint64_t bytes = 0;  ///< of files
};

/// Attributes that say something about the machine rather than the file: overlayfs' own, SELinux labels, Apple's.
bool is_local_xattr(std::string_view key) noexcept;

// ---------------------------------------------------------------- sending

/// One tree to send. Patterns are relative to it; a directory that is not taken itself goes along once something below
/// it is.
struct tree {
    std::shared_ptr<const fs::root> root;
    std::vector<std::string> include;  ///< fs::ignore_patterns; empty: all
    std::vector<std::string> exclude;
    /// Paths that go along, and so do the links on their way and what these lead to; wildcards in the names. Added to
    /// `include`.
    std::vector<std::string> follow;
    /// Sends the tree as a directory of this name (no '/'); absolute links are put below it, as BuildKit does. Empty:
    /// the tree's entries themselves, and it must be the only name. Trees of one name are sent as one; a file (not a
    /// directory) that two of them have is errc::exists. The first one should be the largest: the others' entries are kept in memory.
    std::string name;
    file_stat dir{.mode = go_mode::dir | 0755};  ///< of that directory; the path is not read
};

struct send_options {
    /// Changes what is said of an entry (owner, mode, time; not path, type, size or link). False: it is left out, a
    /// directory with all below it.
    std::function<bool(file_stat&)> map;
    /// Which attributes go along; default: all but is_local_xattr.
    std::function<bool(std::string_view key)> xattr;
    std::size_t frame_bytes = std::size_t{256} << 10;  ///< of a file in one packet; 1 to 2 MiB (old clients refuse over 4)
    unsigned readers = 4;                              ///< files read at a time
    std::function<void(const progress&)> on_progress;
};

/// Sends the trees and answers what the receiver asks, until it has all. Sockets are left out. The caller half-closes the
/// stream afterwards.
async::task<progress> send(std::shared_ptr<packet_stream> stream, async::blocking_pool& pool, std::vector<tree> trees, send_options options = {});

/// Which include patterns `paths` come to in `root`: the paths with every link on the way, sorted, none below another;
/// empty when one of them is the root. Blocks.
std::vector<std::string> follow_links(const fs::root& root, const std::vector<std::string>& paths);

// ---------------------------------------------------------------- receiving

enum class into {
    mirror,  ///< the directory becomes what is sent: the rest is removed, and files that seem unchanged are not asked for
    copy,    ///< a user's directory: what is not sent stays, everything sent is transferred
};
enum class differ {
    metadata,  ///< unchanged: size, mtime, mode, owner, link and device numbers agree (not the attributes)
    none,      ///< everything is transferred
};

struct limits {
    std::uint64_t entries = 4'000'000;
    std::uint64_t path_bytes = 4095;  ///< of one path or link
    std::uint64_t all_paths = std::uint64_t{512} << 20;
    std::uint64_t xattrs = 256;           ///< of one entry
    std::uint64_t xattr_bytes = 1 << 20;  ///< of one entry
    std::uint64_t bytes = std::uint64_t{4} << 40;
    std::uint64_t packet_bytes = std::uint64_t{16} << 20;
};

enum class change_kind { added, modified, removed };
struct change {
    change_kind kind{};
    std::string path;  ///< of a directory removed, what was below it is not listed
    bool operator==(const change&) const = default;
};

struct receive_options {
    into how = into::mirror;
    differ compare = differ::metadata;  ///< for `mirror`
    /// As send_options::map, before anything is compared. What is left out also stays as it is here.
    std::function<bool(file_stat&)> map;
    std::function<bool(std::string_view key)> xattr;  ///< default: all but is_local_xattr
    /// A file whose bytes are not as many as announced is an error that names it; else it is taken as it came.
    bool exact_sizes = true;
    bool metadata_only = false;  ///< `local.metadatatransfer`: errc::unsupported
    unsigned window = 128;       ///< files asked for at a time
    limits max;
    std::function<void(const progress&)> on_progress;
};

struct received {
    progress transferred;
    std::uint64_t unchanged = 0;
    std::vector<change> changes;
};

/// Receives into the directory, which itself keeps owner, mode and time. Nothing outside it is touched and no link in it
/// followed: one that stands where a directory is sent is replaced. A file gets its name only when it is whole. Owners and attributes
/// that this process may not set: the former is an error (see `map`), the latter are passed over, as BuildKit does.
async::task<received> receive(std::shared_ptr<packet_stream> stream, async::blocking_pool& pool, std::shared_ptr<const fs::root> to,
                              receive_options options = {});

}  // namespace cobuild::filesync
