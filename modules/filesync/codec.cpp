module;
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.filesync;

import cobuild.base;

namespace cobuild::filesync {

namespace {
constexpr std::array<std::pair<std::uint32_t, std::uint32_t>, 7> types{{
    {S_IFDIR, go_mode::dir},
    {S_IFREG, 0},
    {S_IFLNK, go_mode::symlink},
    {S_IFBLK, go_mode::device},
    {S_IFCHR, go_mode::device | go_mode::char_device},
    {S_IFIFO, go_mode::fifo},
    {S_IFSOCK, go_mode::socket},
}};
constexpr std::array<std::pair<std::uint32_t, std::uint32_t>, 3> flags{{
    {S_ISUID, go_mode::setuid},
    {S_ISGID, go_mode::setgid},
    {S_ISVTX, go_mode::sticky},
}};

[[noreturn]] void malformed(std::string_view what) { throw error{errc::corrupt, cat("a packet of the file transfer is malformed: ", what)}; }

enum wire : unsigned { varint = 0, fixed64 = 1, delimited = 2, fixed32 = 5 };

class writer {
public:
    explicit writer(std::string& out) : out_(out) {}
    void number(unsigned field, std::uint64_t v) {
        if (v == 0) return;
        raw(field << 3 | varint);
        raw(v);
    }
    void text(unsigned field, std::string_view v) {
        if (!v.empty()) always(field, v);
    }
    void always(unsigned field, std::string_view v) {
        raw(field << 3 | delimited);
        raw(v.size());
        out_ += v;
    }

private:
    void raw(std::uint64_t v) {
        for (; v >= 0x80; v >>= 7) out_ += static_cast<char>(v | 0x80);
        out_ += static_cast<char>(v);
    }
    std::string& out_;
};

class reader {
public:
    explicit reader(std::string_view text) : text_(text) {}
    /// False at the end. Afterwards exactly one of number(), text() or skip() is called.
    bool next() {
        if (at_ == text_.size()) return false;
        const std::uint64_t key = raw();
        if (key > UINT32_MAX || key >> 3 == 0) malformed("a field number out of range");
        field_ = static_cast<unsigned>(key >> 3);
        type_ = static_cast<unsigned>(key & 7);
        return true;
    }
    [[nodiscard]] unsigned field() const { return field_; }
    std::uint64_t number() {
        if (type_ != varint) malformed("a number of another type");
        return raw();
    }
    std::uint32_t small() {
        const std::uint64_t v = number();
        if (v > UINT32_MAX) malformed("a number of more than 32 bits");
        return static_cast<std::uint32_t>(v);
    }
    std::string_view text() {
        if (type_ != delimited) malformed("a text of another type");
        return take(raw());
    }
    void skip() {
        switch (type_) {
            case varint: raw(); break;
            case fixed64: take(8); break;
            case delimited: take(raw()); break;
            case fixed32: take(4); break;
            default: malformed("an unknown wire type");
        }
    }

private:
    std::uint64_t raw() {
        std::uint64_t v = 0;
        for (unsigned shift = 0; shift < 70; shift += 7) {
            if (at_ == text_.size()) malformed("it ends in a number");
            const auto byte = static_cast<unsigned char>(text_[at_++]);
            if (shift == 63 && byte > 1) break;
            v |= static_cast<std::uint64_t>(byte & 0x7f) << shift;
            if (byte < 0x80) return v;
        }
        malformed("a number of more than 64 bits");
    }
    std::string_view take(std::uint64_t size) {
        if (size > text_.size() - at_) malformed("it ends in a field");
        const auto out = text_.substr(at_, static_cast<std::size_t>(size));
        at_ += out.size();
        return out;
    }
    std::string_view text_;
    std::size_t at_ = 0;
    unsigned field_ = 0;
    unsigned type_ = 0;
};

std::string encode_stat(const file_stat& s) {
    std::string out;
    writer w(out);
    w.text(1, s.path);
    w.number(2, s.mode);
    w.number(3, s.uid);
    w.number(4, s.gid);
    w.number(5, static_cast<std::uint64_t>(s.size));
    w.number(6, static_cast<std::uint64_t>(s.mtime));
    w.text(7, s.link);
    w.number(8, static_cast<std::uint64_t>(s.dev_major));
    w.number(9, static_cast<std::uint64_t>(s.dev_minor));
    for (const auto& [key, value] : s.xattrs) {
        std::string entry;
        writer e(entry);
        e.always(1, key);
        e.always(2, value);
        w.always(10, entry);
    }
    return out;
}

std::pair<std::string, std::string> decode_xattr(std::string_view text) {
    std::pair<std::string, std::string> out;
    for (reader r(text); r.next();) {
        switch (r.field()) {
            case 1: out.first = r.text(); break;
            case 2: out.second = r.text(); break;
            default: r.skip();
        }
    }
    return out;
}

file_stat decode_stat(std::string_view text) {
    file_stat s;
    for (reader r(text); r.next();) {
        switch (r.field()) {
            case 1: s.path = r.text(); break;
            case 2: s.mode = r.small(); break;
            case 3: s.uid = r.small(); break;
            case 4: s.gid = r.small(); break;
            case 5: s.size = static_cast<std::int64_t>(r.number()); break;
            case 6: s.mtime = static_cast<std::int64_t>(r.number()); break;
            case 7: s.link = r.text(); break;
            case 8: s.dev_major = static_cast<std::int64_t>(r.number()); break;
            case 9: s.dev_minor = static_cast<std::int64_t>(r.number()); break;
            case 10: s.xattrs.push_back(decode_xattr(r.text())); break;
            default: r.skip();
        }
    }
    std::ranges::sort(s.xattrs);
    if (std::ranges::adjacent_find(s.xattrs, {}, &std::pair<std::string, std::string>::first) != s.xattrs.end())
        malformed("an attribute is named twice");
    return s;
}
}  // namespace

std::uint32_t to_go_mode(std::uint32_t st_mode) {
    std::uint32_t out = st_mode & 0777;
    for (const auto& [unix_bit, go_bit] : flags)
        if ((st_mode & unix_bit) != 0) out |= go_bit;
    for (const auto& [unix_type, go_type] : types)
        if ((st_mode & S_IFMT) == unix_type) return out | go_type;
    throw error{errc::corrupt, "a file of an unknown type"};
}

std::uint32_t from_go_mode(std::uint32_t mode) {
    std::uint32_t out = mode & 0777;
    for (const auto& [unix_bit, go_bit] : flags)
        if ((mode & go_bit) != 0) out |= unix_bit;
    for (const auto& [unix_type, go_type] : types)
        if ((mode & go_mode::type) == go_type) return out | unix_type;
    throw error{errc::corrupt, "a file of an unknown type"};
}

bool is_local_xattr(std::string_view key) noexcept {
    return key.starts_with("trusted.overlay.") || key.starts_with("user.overlay.") || key == "security.selinux" || key.starts_with("com.apple.");
}

std::string encode(const packet& p) {
    std::string out;
    out.reserve(p.data.size() + 24);
    writer w(out);
    w.number(1, static_cast<std::uint32_t>(p.type));
    if (p.stat) w.always(2, encode_stat(*p.stat));
    w.number(3, p.id);
    w.text(4, p.data);
    return out;
}

packet decode(std::string_view message) {
    packet p;
    for (reader r(message); r.next();) {
        switch (r.field()) {
            case 1: {
                const std::uint32_t type = r.small();
                if (type > static_cast<std::uint32_t>(packet_type::failure)) malformed(cat("its type ", type, " is not known"));
                p.type = static_cast<packet_type>(type);
                break;
            }
            case 2:
                if (p.stat) malformed("it describes two entries");
                p.stat = decode_stat(r.text());
                break;
            case 3: p.id = r.small(); break;
            case 4: p.data = r.text(); break;
            default: r.skip();
        }
    }
    return p;
}

}  // namespace cobuild::filesync
