/// cobuild.content: blobs by digest, in an OCI image layout's `blobs/sha256`, and the named images that point at them.
///
/// A blob's file appears under its digest by rename, after its bytes were verified and fsynced: what is there is whole. Any
/// number of processes may write the same blob; one wins, the others find it done. A blob that somebody relies on without a
/// root (image, named root) is *pinned* (state::pin); collect() takes neither pinned nor reachable blobs.
///
/// Thread-safe. Everything that is not a task blocks and belongs on pool threads; find() is one system call.
/// Sizes are bytes. Errors: errc::corrupt (digest or size differ; names both), errc::not_found, errc::no_space (names the
/// path), errc::invalid.
/// Not its job: what blobs mean (the caller tells their children), compression, pulling.
module;
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

export module cobuild.content;

import cobuild.base;
import cobuild.async;
import cobuild.state;

export namespace cobuild::content {

using time_point = std::chrono::sys_time<nanoseconds>;

struct blob_info {
    cobuild::digest digest;
    std::uint64_t size = 0;
    time_point last_used;  ///< when it was written or last pinned
    bool pinned = false;
};

/// A named image: its top descriptor as JSON text (opaque here) and the digest in it, which is a root for collect().
struct image {
    std::string name;  ///< a normalised reference: "docker.io/library/busybox:1.36"
    digest target;
    std::string descriptor;
    time_point created;
    std::map<std::string, std::string> labels;
};

/// What a written blob is.
struct stored {
    cobuild::digest digest;
    std::uint64_t size = 0;
    state::pin keep;
};

/// Takes one blob's bytes in order. Used by one thread at a time. Destruction without commit() removes what was written, but
/// for a writer of store::resume().
class writer {
public:
    writer(writer&&) noexcept;
    writer& operator=(writer&&) noexcept;
    ~writer();
    /// Appends. Hashes unless the digest is known by other means (see store::adopt).
    void write(std::span<const std::byte> data);
    void write(std::string_view data);
    [[nodiscard]] std::uint64_t written() const noexcept;
    /// Bytes that an earlier writer of the blob left (store::resume), and which this one begins with.
    [[nodiscard]] std::uint64_t kept() const noexcept;
    /// The next of those bytes; 0 when all were read, and only then write() may be called.
    std::size_t replay(std::span<std::byte> out);
    /// Verifies, fsyncs, renames. What is empty in `expected` is not compared.
    stored commit(std::optional<digest> expected = {}, std::optional<std::uint64_t> size = {});
    /// Nothing of it stays.
    void abort() noexcept;
    struct state;

private:
    friend class store;
    explicit writer(std::unique_ptr<state> s) noexcept;
    std::unique_ptr<state> state_;
};

/// An unnamed place to write a blob whose digest another party computes (parallel compression): write to `fd`, then adopt.
class draft {
public:
    draft(draft&&) noexcept;
    draft& operator=(draft&&) noexcept;
    ~draft();                               ///< removes it unless adopted
    [[nodiscard]] int fd() const noexcept;  ///< read-write, at offset 0
    struct state;

private:
    friend class store;
    explicit draft(std::unique_ptr<state> s) noexcept;
    std::unique_ptr<state> state_;
};

struct collected {
    std::size_t blobs = 0;
    std::uint64_t bytes = 0;
};

class store {
public:
    explicit store(std::shared_ptr<state::directory> dir);
    ~store();
    store(const store&) = delete;
    store& operator=(const store&) = delete;

    /// The size of a blob that is here.
    [[nodiscard]] std::optional<std::uint64_t> find(const digest& d) const;
    /// find() and pin in one: what this returns stays while `keep` lives.
    [[nodiscard]] std::optional<stored> hold(const digest& d);
    /// Read-only descriptor; stays readable even when the blob is removed. Throws errc::not_found.
    [[nodiscard]] unique_fd open(const digest& d) const;
    /// The whole blob, verified against its digest. Throws errc::invalid when it is larger than `limit`.
    [[nodiscard]] std::string read_all(const digest& d, std::uint64_t limit = std::uint64_t{8} << 20) const;

    /// `size_hint` is preallocated (an early errc::no_space instead of a late one).
    [[nodiscard]] writer ingest(std::uint64_t size_hint = 0);
    /// As ingest(), for bytes that come from afar. A megabyte or more that this writer, or one killed in the middle, leaves
    /// uncommitted is there for the next one of the same blob, in any process: see writer::kept(). A blob has one such writer at
    /// a time; another gets a plain one. It does not hash: who reads it through anyhow does, and commit() believes the digest it
    /// is told. collect() removes what nobody is writing.
    [[nodiscard]] writer resume(const digest& d, std::uint64_t size);
    /// A whole blob at once.
    stored put(std::string_view data);
    [[nodiscard]] draft new_draft();
    /// Trusts `d`; compares the size with the file's.
    stored adopt(draft file, const digest& d, std::uint64_t size);

    /// Removes one blob; false when it is pinned or absent.
    bool remove(const digest& d);
    [[nodiscard]] std::vector<blob_info> list() const;

    void put_image(const image& i);  ///< replaces one of the same name; on disk when it returns
    [[nodiscard]] std::optional<image> get_image(const std::string& name) const;
    [[nodiscard]] std::vector<image> list_images() const;
    bool remove_image(const std::string& name);

    /// Named roots other than images: "history:<ref>". A name may have several digests.
    void add_root(const std::string& name, const digest& d);
    void remove_roots(const std::string& name);

    /// Removes what neither images, named roots nor `roots` reach and nobody pins, and beginnings of blobs (resume()). `children` tells what a blob
    /// points at (empty for leaves and for what is absent); it is called once a digest. Blobs written or pinned since the call began are left. Runs
    /// on the pool.
    using children_of = std::function<std::vector<digest>(const digest&)>;
    async::task<collected> collect(std::vector<digest> roots, children_of children);
    collected collect_blocking(const std::vector<digest>& roots, const children_of& children);
    /// What `roots` reach, themselves included.
    static std::vector<digest> reachable(const std::vector<digest>& roots, const children_of& children);

    /// content/, an OCI layout: has oci-layout and blobs/.
    [[nodiscard]] const std::string& path() const noexcept;
    struct impl;

private:
    std::shared_ptr<impl> impl_;
};

}  // namespace cobuild::content
