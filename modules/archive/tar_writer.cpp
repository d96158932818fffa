module;
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.archive;

import cobuild.base;
import cobuild.fs;

namespace cobuild::archive {

namespace {
constexpr std::size_t block = 512;
using records = std::map<std::string, std::string>;

bool ascii(std::string_view s) {
    return std::ranges::all_of(s, [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

std::string to_ascii(std::string_view s) {
    std::string out;
    std::ranges::copy_if(s, std::back_inserter(out), [](char c) { return c != 0 && static_cast<unsigned char>(c) < 0x80; });
    return out;
}

bool fits_octal(std::int64_t value, std::size_t width) { return value >= 0 && value < (std::int64_t{1} << (3 * (width - 1))); }

std::string octal(std::uint64_t value) {
    std::string out;
    do out.insert(out.begin(), static_cast<char>('0' + (value & 7)));
    while ((value >>= 3) != 0);
    return out;
}

class raw_header {
public:
    void text(std::size_t at, std::size_t width, std::string_view s) {
        if (!s.empty()) std::memcpy(raw_.data() + at, s.data(), std::min(s.size(), width));
        if (s.size() < width) raw_[at + s.size()] = 0;
        // A cut name must not look like a directory's.
        if (s.size() > width && raw_[at + width - 1] == '/') {
            std::string_view cut = s.substr(0, width - 1);
            while (cut.ends_with('/')) cut.remove_suffix(1);
            raw_[at + cut.size()] = 0;
        }
    }
    void number(std::size_t at, std::size_t width, std::int64_t value) {
        const std::string digits = octal(fits_octal(value, width) ? static_cast<std::uint64_t>(value) : 0);
        text(at, width, std::string(width - 1 - digits.size(), '0') + digits);
    }
    void type(char c) { raw_[156] = c; }
    std::span<const std::byte> seal() {
        std::memcpy(raw_.data() + 257, "ustar\00000", 8);
        std::memset(raw_.data() + 148, ' ', 8);
        std::int64_t sum = 0;
        for (const char c : raw_) sum += static_cast<unsigned char>(c);
        number(148, 7, sum);
        return std::as_bytes(std::span(raw_));
    }

private:
    std::array<char, block> raw_{};
};

/// "<length> <key>=<value>\n", the length counting itself.
std::string record(std::string_view key, std::string_view value) {
    const std::size_t rest = key.size() + value.size() + 3;
    std::size_t size = rest + cat(rest).size();
    std::string out = cat(size, " ", key, "=", value, "\n");
    if (out.size() != size) out = cat(out.size(), " ", key, "=", value, "\n");
    return out;
}

/// Where "<dir>/PaxHeaders.0/<file>" of an entry's extended header stands (path.Split and path.Join).
std::string extension_name(std::string_view path) {
    const auto slash = path.rfind('/');
    const std::string_view dir = slash == std::string_view::npos ? std::string_view{} : path.substr(0, slash + 1);
    const std::string_view file = slash == std::string_view::npos ? path : path.substr(slash + 1);
    std::string name = to_ascii(fs::clean_path(cat(dir, dir.empty() ? "" : "/", "PaxHeaders.0/", file)));
    if (name.size() > 100) name.resize(100);
    while (name.ends_with('/')) name.pop_back();
    return name;
}

char type_flag(entry_type t) {
    switch (t) {
        case entry_type::file: return '0';
        case entry_type::hard_link: return '1';
        case entry_type::symlink: return '2';
        case entry_type::char_device: return '3';
        case entry_type::block_device: return '4';
        case entry_type::directory: return '5';
        case entry_type::fifo: return '6';
    }
    return '0';
}

records extended(const tar_entry& e) {
    records r;
    const auto text = [&](const char* key, const std::string& value) {
        if (value.find('\0') != std::string::npos) throw error{errc::invalid, cat("a NUL byte in the name ", quoted(value))};
        if (value.size() > 100 || !ascii(value)) r[key] = value;
    };
    const auto number = [&](const char* key, std::int64_t value, std::size_t width) {
        if (!fits_octal(value, width)) r[key] = cat(value);
    };
    text("path", e.path);
    text("linkpath", e.link);
    number("size", static_cast<std::int64_t>(e.size), 12);
    number("uid", e.uid, 8);
    number("gid", e.gid, 8);
    number("mtime", e.mtime.seconds, 12);
    if (!fits_octal(e.dev_major, 8) || !fits_octal(e.dev_minor, 8))
        throw error{errc::unsupported, cat("the device number of ", quoted(e.path), " does not fit into a tar header")};
    for (const auto& [key, value] : e.xattrs) r[cat("SCHILY.xattr.", key)] = value;
    return r;
}

/// USTAR's way of a path over 100 bytes: prefix and name, or empty.
std::optional<std::pair<std::string_view, std::string_view>> split_ustar(std::string_view path) {
    if (path.size() <= 100 || !ascii(path)) return std::nullopt;
    std::size_t length = path.size();
    if (length > 156)
        length = 156;
    else if (path.ends_with('/'))
        --length;
    const auto slash = path.substr(0, length).rfind('/');
    if (slash == std::string_view::npos || slash == 0) return std::nullopt;
    const std::size_t rest = path.size() - slash - 1;
    if (rest > 100 || rest == 0 || slash > 155) return std::nullopt;
    return std::pair{path.substr(0, slash), path.substr(slash + 1)};
}
}  // namespace

struct tar_writer::state {
    byte_sink out;
    std::uint64_t body = 0;  ///< still to come
    std::size_t padding = 0;
    std::string path;

    void zeros(std::uint64_t count) {
        static const std::vector<std::byte> some(65536);
        while (count > 0) {
            const auto n = static_cast<std::size_t>(std::min<std::uint64_t>(count, some.size()));
            out(std::span(some).first(n));
            count -= n;
        }
    }
    void pad() {
        if (body != 0) return;
        zeros(padding);
        padding = 0;
    }
    void count(std::uint64_t n) {
        if (n > body) throw error{errc::internal, cat("more bytes than announced for ", quoted(path))};
        body -= n;
    }
    void begin() {
        if (body != 0) throw error{errc::internal, cat("fewer bytes than announced for ", quoted(path))};
    }
    void extension(const tar_entry& e, const records& all) {
        std::string text;
        for (const auto& [key, value] : all) text += record(key, value);
        raw_header h;
        h.text(0, 100, extension_name(e.path));
        for (const std::size_t at : {100, 108, 116}) h.number(at, 8, 0);
        h.number(124, 12, static_cast<std::int64_t>(text.size()));
        h.number(136, 12, 0);
        h.type('x');
        out(h.seal());
        out(bytes_of(text));
        zeros((block - text.size() % block) % block);
    }
    void main_header(const tar_entry& e, std::string_view name, std::string_view prefix) {
        raw_header h;
        h.text(0, 100, to_ascii(name));
        h.text(157, 100, to_ascii(e.link));
        h.number(100, 8, e.mode & 07777);
        h.number(108, 8, e.uid);
        h.number(116, 8, e.gid);
        h.number(124, 12, static_cast<std::int64_t>(e.size));
        h.number(136, 12, e.mtime.seconds);
        h.number(329, 8, e.dev_major);
        h.number(337, 8, e.dev_minor);
        h.text(345, 155, prefix);
        h.type(type_flag(e.type));
        out(h.seal());
    }
};

tar_writer::tar_writer(byte_sink out) : state_(std::make_unique<state>(state{std::move(out)})) {}
tar_writer::tar_writer(tar_writer&&) noexcept = default;
tar_writer::~tar_writer() = default;

void tar_writer::add(const tar_entry& entry) {
    state& s = *state_;
    s.begin();
    if (entry.type != entry_type::file && entry.size != 0)
        throw error{errc::internal, cat("a size for ", quoted(entry.path), ", which is not a file")};
    if (const records all = extended(entry); !all.empty()) s.extension(entry, all);
    s.main_header(entry, entry.path, {});
    s.path = entry.path;
    s.body = entry.size;
    s.padding = static_cast<std::size_t>((block - entry.size % block) % block);
}

void tar_writer::add(const tar_entry& entry, std::span<const std::byte> body) {
    add(entry);
    write(body);
}

void tar_writer::whiteout(std::string_view path) {
    const auto slash = path.rfind('/');
    const std::string_view dir = slash == std::string_view::npos ? std::string_view{} : path.substr(0, slash + 1);
    tar_entry e;
    e.path = cat(dir, ".wh.", path.substr(dir.size()));
    // Its format is left open to Go's writer, which then prefers the ustar prefix to an extended header.
    const auto parts = split_ustar(e.path);
    if (!parts) return add(e);
    state_->begin();
    state_->main_header(e, parts->second, parts->first);
}

void tar_writer::write(std::span<const std::byte> data) {
    if (data.empty()) return;
    state_->count(data.size());
    state_->out(data);
    state_->pad();
}

void tar_writer::write_zeros(std::uint64_t count) {
    if (count == 0) return;
    state_->count(count);
    state_->zeros(count);
    state_->pad();
}

void tar_writer::finish() {
    state_->begin();
    state_->zeros(2 * block);
}

}  // namespace cobuild::archive
