/// Internal to cobuild.archive: what a tree changes of the layers below it, whatever is made of it.
module;
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

module cobuild.archive:changes;

import cobuild.archive;
import cobuild.base;
import cobuild.fs;

namespace cobuild::archive {

inline constexpr std::string_view capability = "security.capability";

unique_fd open_to_read(int dirfd, std::string_view path);
std::size_t read_some(int fd, std::span<std::byte> into, std::uint64_t offset);

/// Walks a tree and tells what is changed, in path order, directories before what is in them. A directory that is as it was
/// is told of once something below it has changed.
class changes {
public:
    enum class form {
        archive,  ///< `upper` is in overlayfs form; whiteouts of nothing are left out
        layer,    ///< the same, and they count: on other layers they may hide something
        whole,    ///< `upper` is a tree as it is seen; what it does not have is deleted
    };
    changes(int upper, lower_chain& lower, form how) : upper_(upper), lower_(lower), form_(how), other_(std::size_t{64} << 10) {}
    changes(const changes&) = delete;
    changes& operator=(const changes&) = delete;

protected:
    /// A directory of the upper tree that the walk is in.
    struct level {
        std::string path;
        fs::file_info info;
        std::optional<std::string> caps;
        bool written = false;
        bool opaque = false;              ///< nothing of what is below the layer shows through
        std::vector<std::string> hidden;  ///< of an opaque one: lower names not yet passed
        std::size_t next_hidden = 0;
    };
    ~changes() = default;
    void run();
    virtual void directory(level& l) = 0;
    virtual void entry(const fs::walk_entry& e) = 0;
    virtual void deleted(const std::string& path) = 0;
    virtual void left(const level&) {}
    /// Something of the upper directory is not told of: a mark, or what is as it was.
    virtual void left_out() {}
    [[nodiscard]] int upper() const noexcept { return upper_; }
    [[nodiscard]] bool whole() const noexcept { return form_ == form::whole; }

private:
    fs::walk_step visit(const fs::walk_entry& e);
    void leave();
    void pass_hidden(std::string_view name);
    void whiteout(const fs::walk_entry& e);
    void enter(const fs::walk_entry& e);
    void other(const fs::walk_entry& e);
    bool same(const lower_chain::hit& base, const fs::walk_entry& e);
    bool same_content(const lower_chain::hit& base, const fs::walk_entry& e);
    void write_levels();
    void write_deleted(const std::string& path);

    int upper_;
    lower_chain& lower_;
    form form_;
    std::vector<level> levels_;
    bool replaced_ = false;
    std::vector<std::byte> other_, buffer_;
};

}  // namespace cobuild::archive
