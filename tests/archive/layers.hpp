// Layers for the tests of apply and diff. Include after support.hpp, after the imports of base, fs and archive.
#pragma once

namespace layers {

using namespace cobuild;
using namespace cobuild::archive;

inline unique_fd open_dir(const std::filesystem::path& p) {
    std::filesystem::create_directories(p);
    return unique_fd{::open(p.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
}

/// One entry in short: "d dir", "f file body", "l link target", "h hardlink target".
inline std::string tar(const std::vector<std::string>& entries, std::uint32_t uid = 0) {
    std::string out;
    tar_writer w{[&](std::span<const std::byte> b) { out += text_of(b); }};
    for (const auto& text : entries) {
        const auto parts = split(text, ' ');
        tar_entry e;
        e.path = parts[1];
        e.mode = parts[0] == "d" ? 0755 : 0644;
        e.uid = uid;
        e.mtime = {1000, 0};
        const std::string body = parts[0] == "f" && parts.size() > 2 ? std::string(parts[2]) : "";
        if (parts[0] == "d") e.type = entry_type::directory;
        if (parts[0] == "l") e.type = entry_type::symlink;
        if (parts[0] == "h") e.type = entry_type::hard_link;
        if (parts[0] == "l" || parts[0] == "h") e.link = parts[2];
        e.size = body.size();
        w.add(e, bytes_of(body));
    }
    w.finish();
    return out;
}

inline apply_result unpack(const std::string& text, int dir, const extract_options& o = {}) { return apply_layer(read_from(bytes_of(text)), dir, o); }

struct listed {
    tar_entry entry;
    std::string body;
};
inline std::string diff(int upper, std::vector<int> lower, const diff_options& o = {}) {
    std::string out;
    tar_writer w{[&](std::span<const std::byte> b) { out += text_of(b); }};
    lower_chain chain{std::move(lower)};
    diff_layer(upper, chain, w, o);
    return out;
}
inline std::vector<listed> read_tar(const std::string& text) {
    tar_reader r{read_from(bytes_of(text))};
    std::vector<listed> out;
    for (tar_entry e; r.next(e);) {
        std::string body;
        for (auto p = r.data(); !p.empty(); p = r.data()) body += text_of(p);
        out.push_back({e, body});
    }
    return out;
}
inline std::vector<std::string> names(const std::string& text) {
    std::vector<std::string> out;
    for (const auto& l : read_tar(text)) out.push_back(l.entry.path);
    return out;
}

}  // namespace layers
