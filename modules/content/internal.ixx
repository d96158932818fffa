/// What the bodies of cobuild.content share. Not installed.
module;
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

module cobuild.content:internal;

import cobuild.base;
import cobuild.state;
import cobuild.content;

namespace cobuild::content {

struct store::impl {
    explicit impl(std::shared_ptr<state::directory> d);
    std::shared_ptr<state::directory> dir;
    unique_fd blobs, ingests;
    unique_fd partials;  ///< beginnings of blobs, by digest; who writes one holds a lock on it
    std::string path;
    state::pin_table pins;

    /// Pins a digest, outwaiting a removal under way.
    state::pin pin(const digest& d);
    /// Moves the finished file `name` below `from` to its place, or drops it when the blob is here.
    stored place(int from, int fd, const std::string& name, const digest& d, std::uint64_t size);
    /// The beginning of that blob, made when absent, with its lock; empty when another writer has it.
    unique_fd lock_partial(const digest& d) const;
    /// Removes the beginnings that nobody is writing.
    collected drop_partials();
    std::optional<std::uint64_t> size_of(const digest& d) const;
    /// Counts as a use now: collect() leaves what was used since it began.
    void touch(const digest& d) const noexcept;
    std::string file_of(const digest& d) const;
};

std::uint64_t number_of(const digest& d) noexcept;
void write_all(int fd, const std::byte* data, std::size_t n, const std::string& path);

}  // namespace cobuild::content
