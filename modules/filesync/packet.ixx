/// Partition of cobuild.filesync: one message of the protocol, as bytes. The numbers stand in proto/fsutil.proto.
///
/// Plain data and pure functions. A packet's `data` looks into the message it was decoded from. Errors: errc::corrupt.
module;
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

export module cobuild.filesync:packet;

export namespace cobuild::filesync {

/// `file_stat::mode` holds Go's os.FileMode bits: these and the lower nine of permission. No type bit: a regular file.
namespace go_mode {
inline constexpr std::uint32_t dir = 1U << 31;
inline constexpr std::uint32_t symlink = 1U << 27;
inline constexpr std::uint32_t device = 1U << 26;  ///< a block device, unless char_device is set as well
inline constexpr std::uint32_t fifo = 1U << 25;
inline constexpr std::uint32_t socket = 1U << 24;
inline constexpr std::uint32_t setuid = 1U << 23;
inline constexpr std::uint32_t setgid = 1U << 22;
inline constexpr std::uint32_t char_device = 1U << 21;
inline constexpr std::uint32_t sticky = 1U << 20;
inline constexpr std::uint32_t irregular = 1U << 19;
inline constexpr std::uint32_t type = dir | symlink | device | fifo | socket | char_device | irregular;
}  // namespace go_mode

/// From st_mode and back; an unknown type, or a combination of types, is errc::corrupt.
std::uint32_t to_go_mode(std::uint32_t st_mode);
std::uint32_t from_go_mode(std::uint32_t mode);

/// What the protocol says of one entry. Text is bytes, not necessarily UTF-8.
struct file_stat {
    std::string path;  ///< relative, "a/b"
    std::uint32_t mode = 0;
    std::uint32_t uid = 0;
    std::uint32_t gid = 0;
    std::int64_t size = 0;
    std::int64_t mtime = 0;  ///< nanoseconds since 1970
    std::string link;        ///< a symbolic link's target, or the path of the entry this regular file is a hard link to
    std::int64_t dev_major = 0;
    std::int64_t dev_minor = 0;
    std::vector<std::pair<std::string, std::string>> xattrs;  ///< sorted by key
    bool operator==(const file_stat&) const = default;

    [[nodiscard]] bool is_dir() const noexcept { return (mode & go_mode::dir) != 0; }
    [[nodiscard]] bool is_symlink() const noexcept { return (mode & go_mode::symlink) != 0; }
    [[nodiscard]] bool is_file() const noexcept { return (mode & go_mode::type) == 0; }
};

enum class packet_type : std::uint32_t {
    stat = 0,     ///< one entry; without a stat: there are no more
    request = 1,  ///< the receiver wants the bytes of entry `id`
    data = 2,     ///< some of them; empty: that was all
    fin = 3,      ///< the receiver has all it wanted; the sender answers with the same
    failure = 4,  ///< either end gave up; `data` is the reason
};

struct packet {
    packet_type type = packet_type::stat;
    std::optional<file_stat> stat;
    std::uint32_t id = 0;   ///< the entry's place in the sequence of stats, directories counted
    std::string_view data;  ///< of others' memory
};

/// As Go's generated code writes it: fields in order, those of value zero left out, attributes sorted by key.
std::string encode(const packet& p);
/// Unknown fields are passed over; what is known must have its own wire type and fit.
packet decode(std::string_view message);

}  // namespace cobuild::filesync
