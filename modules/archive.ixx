/// cobuild.archive: layer archives: tar, gzip and zstd, and layers on disk in overlayfs form.
///
/// Everything is synchronous, streams with bounded memory and blocks: run it on async::blocking_pool. Work stops when a
/// byte_source or byte_sink throws; the exception comes through (that is how a caller cancels). Input is hostile: sizes,
/// names and ratios are limited, nothing is written outside the target. Malformed input is errc::corrupt, a limit that is
/// passed errc::corrupt too, a feature that is not there errc::unsupported.
/// Formats: POSIX ustar and pax, GNU long names, RFC 1952, RFC 8878, image-spec layer.md; what is written has the bytes
/// that Go's archive/tar writes for containerd. Not its job: storing blobs, finding layers, mounting.
module;
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

export module cobuild.archive;

import cobuild.base;
import cobuild.fs;

export namespace cobuild::archive {

// ---------------------------------------------------------------- streams

/// Fills the span from its start, returns how much; 0 is the end.
using byte_source = std::function<std::size_t(std::span<std::byte>)>;
using byte_sink = std::function<void(std::span<const std::byte>)>;

/// Reads a descriptor from its current position; does not own it.
byte_source read_from(int fd);
byte_source read_from(std::span<const std::byte> data);  ///< the data must outlive the source
byte_sink write_to(int fd);
/// Runs `in` on a thread of its own, up to `chunks` pieces of `chunk_bytes` ahead. Its exception is rethrown in order.
/// Dropping the last copy of the result ends the thread after the read under way.
byte_source read_ahead(byte_source in, std::size_t chunk_bytes = std::size_t{1} << 20, unsigned chunks = 4);
/// Passes `in` through and feeds what was read to `hash`, counting into `size` when given. Both must outlive the source.
byte_source hashed(byte_source in, hasher& hash, std::uint64_t* size = nullptr);

// ---------------------------------------------------------------- compression

enum class compression { none, gzip, zstd };
std::string_view to_string(compression kind) noexcept;
/// By magic number; none when it is neither. 4 bytes decide, zstd skippable frames included.
compression detect(std::span<const std::byte> head) noexcept;

struct decompress_limits {
    std::uint64_t max_bytes = std::uint64_t{1} << 44;
    /// Of output to input, looked at after 64 MiB of output. The default passes zeros (holes) in either format.
    unsigned max_ratio = 40'000;
};
/// A streaming reader; all members or frames to the end, trailing zero bytes after gzip members allowed, cut input is
/// errc::corrupt. Checksums are verified.
byte_source decompress(byte_source in, compression kind, decompress_limits limits = {});
/// Looks at the first bytes and decompresses if needed; `kind` tells what it was.
byte_source decompress_auto(byte_source in, compression* kind = nullptr, decompress_limits limits = {});

struct compress_options {
    compression kind = compression::gzip;
    /// gzip: 1 and 2 ISA-L (default 2), 3 to 9 libdeflate, 0 stored; zstd: 1 to 19 (default 3). Clamped.
    std::optional<int> level;
    unsigned threads = 1;  ///< changes the time, never the bytes
};
/// What an image descriptor needs.
struct layer_blob {
    cobuild::digest digest;  ///< of the compressed bytes
    std::uint64_t size = 0;
    cobuild::digest diff_id;  ///< of the uncompressed bytes
    std::uint64_t uncompressed_size = 0;
};
/// Compresses and hashes what is written. gzip is cut into independent members of 1 MiB input, header mtime 0, OS 255.
/// The sink is called in order on the thread that calls write() and finish(). After an exception only destroy it.
class blob_writer {
public:
    blob_writer(byte_sink out, compress_options options);
    blob_writer(blob_writer&&) noexcept;
    blob_writer& operator=(blob_writer&&) noexcept;
    ~blob_writer();
    void write(std::span<const std::byte> data);
    layer_blob finish();
    /// Calls write(); the writer must outlive it.
    [[nodiscard]] byte_sink sink();

private:
    struct state;
    std::unique_ptr<state> state_;
};

// ---------------------------------------------------------------- tar

enum class entry_type { file, hard_link, symlink, char_device, block_device, directory, fifo };

struct tar_entry {
    entry_type type = entry_type::file;
    std::string path;        ///< as written; a directory may end in '/'
    std::string link;        ///< of links
    std::uint32_t mode = 0;  ///< permission bits only
    std::uint32_t uid = 0;
    std::uint32_t gid = 0;
    std::uint64_t size = 0;
    fs::file_time mtime;
    std::uint32_t dev_major = 0;
    std::uint32_t dev_minor = 0;
    std::vector<std::pair<std::string, std::string>> xattrs;  ///< SCHILY.xattr.*
};

struct tar_limits {
    std::size_t max_header_bytes = std::size_t{8} << 20;  ///< of one entry's extended headers together
    std::size_t max_path_bytes = 65536;
    std::uint64_t max_entries = 10'000'000;
};
/// Reads ustar, pax (global headers are ignored, as in Go), GNU long names, base-256 numbers. Sparse entries are errc::unsupported.
class tar_reader {
public:
    explicit tar_reader(byte_source in, tar_limits limits = {});
    tar_reader(tar_reader&&) noexcept;
    ~tar_reader();
    /// The next entry; false at the end (two zero blocks, or the input's end between entries). Skips an unread body.
    bool next(tar_entry& entry);
    /// The next piece of the body, empty at its end; valid until the next call.
    std::span<const std::byte> data();
    /// Reads on to the end of the input, so that a digest over it is whole. Call it after next() returned false.
    void drain();

private:
    struct state;
    std::unique_ptr<state> state_;
};

/// Writes what Go's archive/tar writes in its PAX format: plain ustar headers, pax records sorted by key for what does not
/// fit (names over 100 bytes or not ASCII, large numbers, xattrs), mtime cut to seconds, no user names.
class tar_writer {
public:
    explicit tar_writer(byte_sink out);
    tar_writer(tar_writer&&) noexcept;
    ~tar_writer();
    /// Then exactly `entry.size` bytes by write and write_zeros, for type file.
    void add(const tar_entry& entry);
    void add(const tar_entry& entry, std::span<const std::byte> body);
    /// An empty file ".wh.<name>" beside `path`: mode, owner and time 0.
    void whiteout(std::string_view path);
    void write(std::span<const std::byte> data);
    void write_zeros(std::uint64_t count);
    /// Two zero blocks.
    void finish();

private:
    struct state;
    std::unique_ptr<state> state_;
};

// ---------------------------------------------------------------- what lies below a layer

/// The merged content of layers on disk, as overlayfs would show it, read without a mount. The layers must not change.
/// Not thread-safe. Keeps the descriptors given (duplicated by the caller if needed), opens few more.
class lower_chain {
public:
    lower_chain();
    /// Top layer first. The descriptors must outlive the chain.
    explicit lower_chain(std::vector<int> layers);
    lower_chain(lower_chain&&) noexcept;
    lower_chain& operator=(lower_chain&&) noexcept;
    ~lower_chain();
    struct hit {
        int layer_fd;  ///< the layer whose file it is; open it with openat(layer_fd, path)
        fs::file_info info;
    };
    /// The last component is not followed, and no component may be a link. "" is the root.
    [[nodiscard]] std::optional<hit> find(std::string_view path);
    /// Merged names in a directory, byte order.
    [[nodiscard]] std::vector<std::string> list(std::string_view dir);
    /// The path with links followed as in a mount, relative to the root; what does not exist stays as it is.
    [[nodiscard]] std::string resolve(std::string_view path);
    [[nodiscard]] const std::vector<int>& layers() const noexcept;

private:
    struct state;
    std::unique_ptr<state> state_;
};

// ---------------------------------------------------------------- applying

struct extract_options {
    std::optional<fs::owner> who;  ///< instead of the archive's
    bool user_xattr = false;       ///< user.overlay.opaque instead of trusted.overlay.opaque
    bool skip_devices = false;     ///< leave out device nodes that this user may not make
    tar_limits limits;
};

/// A hard link whose target this layer does not hold.
struct pending_link {
    std::string path;
    std::string target;
};
struct apply_result {
    std::uint64_t entries = 0;
    std::uint64_t bytes = 0;                   ///< of file content
    std::vector<std::string> implied_parents;  ///< directories made though the archive does not list them, parents first
    std::vector<pending_link> pending_links;   ///< in archive order
    bool opaque_root = false;                  ///< hides all below it, which a mount does not do: cut the chain here
    /// True when the layer's directory depends on nothing below it: no finish_layer() needed.
    [[nodiscard]] bool self_contained() const noexcept { return implied_parents.empty() && pending_links.empty(); }
};
/// Unpacks a layer archive (uncompressed tar) into the empty directory `dir` in overlayfs form. Owners, modes, attributes
/// and times are the archive's, zeros become holes. Whiteouts hide only what is below the layer. On failure the directory
/// is left as it is, for the caller to remove. Reads the input to its end.
apply_result apply_layer(byte_source tar, int dir, const extract_options& options = {});
/// Finishes a layer that leans on what is below: implied parents take owner, mode, attributes and times from there (those
/// that are nowhere below stay 0755, owner 0), link targets are copied up. An implied parent that is a link below is
/// resolved there and its content moved to the place the link names.
void finish_layer(int dir, lower_chain& lower, const apply_result& pending, const extract_options& options = {});

/// Unpacks a tar into `dest` inside `root` as it is, without whiteout translation; what exists is replaced, directories
/// merge, parents through links inside the root. `dest` must exist.
apply_result extract_plain(byte_source tar, const fs::root& root, std::string_view dest, const extract_options& options = {});

/// Whether ADD would unpack this file: a tar, plain or through gzip, bzip2, xz or zstd, with at least one entry. The
/// position is back at 0.
bool is_add_archive(int fd);
/// The uncompressed tar of such a file (libarchive's filters).
byte_source open_add_archive(int fd, decompress_limits limits = {});

// ---------------------------------------------------------------- diffing

struct diff_options {
    /// Later times are cut to this (SOURCE_DATE_EPOCH), in seconds.
    std::optional<std::int64_t> clamp_mtime;
};
struct diff_result {
    std::uint64_t entries = 0;
    std::uint64_t bytes = 0;
};
/// Writes the layer archive of the directory `upper` in overlayfs form above `lower`, entries in path order, parents of
/// every entry first, the same bytes for the same content. What was copied up without a change is left out. Only the
/// attribute security.capability is kept. Calls out.finish(). errc::unsupported for a redirected directory.
diff_result diff_layer(int upper, lower_chain& lower, tar_writer& out, const diff_options& options = {});

/// Whether a directory in overlayfs form holds nothing but changes: no mark that hides what is below it, and no copy that
/// is as it was. Such a layer means the same on any other.
bool tells_changes_only(int upper, lower_chain& lower);
/// Writes what `upper` changes of `lower` into the empty directory `out`, in overlayfs form and so that tells_changes_only().
/// `whole`: `upper` is a tree as it is seen (a mount), and what it does not have is deleted. Else it is in overlayfs form, and
/// its files are linked, so both must be on one file system and never change.
void diff_directory(int upper, lower_chain& lower, int out, bool whole);

}  // namespace cobuild::archive
