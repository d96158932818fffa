module;
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.content;

import cobuild.base;
import cobuild.db;
import cobuild.state;
import :internal;

namespace cobuild::content {
namespace {

/// key NUL value NUL ...: neither may hold a NUL, as in an image configuration's labels.
std::string encode(const std::map<std::string, std::string>& labels) {
    std::string out;
    for (const auto& [key, value] : labels) {
        if (key.find('\0') != std::string::npos || value.find('\0') != std::string::npos)
            throw error{errc::invalid, cat("the label ", quoted(key), " holds a NUL character")};
        out.append(key).append(1, '\0').append(value).append(1, '\0');
    }
    return out;
}

std::map<std::string, std::string> decode(std::string_view text) {
    std::map<std::string, std::string> out;
    const auto parts = split(text, '\0');
    for (std::size_t i = 0; i + 1 < parts.size(); i += 2) out.emplace(parts[i], parts[i + 1]);
    return out;
}

constexpr std::string_view columns = "SELECT name,target,descriptor,created,labels FROM images";

image from(const db::cursor& row) {
    return {.name = std::string(row.text(0)),
            .target = row.digest(1),
            .descriptor = std::string(row.text(2)),
            .created = time_point(nanoseconds(row.integer(3))),
            .labels = decode(text_of(row.bytes(4)))};
}

}  // namespace

void store::put_image(const image& i) {
    const auto labels = encode(i.labels);
    impl_->dir->database().write(
        [&](db::connection& c) {
            c.run("INSERT OR REPLACE INTO images VALUES(?,?,?,?,?)", i.name, i.target, i.descriptor, i.created.time_since_epoch().count(),
                  bytes_of(labels));
        },
        db::durability::full);
}

std::optional<image> store::get_image(const std::string& name) const {
    return impl_->dir->database().read([&](db::connection& c) -> std::optional<image> {
        auto rows = c.query(cat(columns, " WHERE name=?"), name);
        if (!rows.next()) return std::nullopt;
        return from(rows);
    });
}

std::vector<image> store::list_images() const {
    return impl_->dir->database().read([&](db::connection& c) {
        std::vector<image> out;
        for (auto rows = c.query(cat(columns, " ORDER BY name")); rows.next();) out.push_back(from(rows));
        return out;
    });
}

bool store::remove_image(const std::string& name) {
    return impl_->dir->database().write([&](db::connection& c) { return c.run("DELETE FROM images WHERE name=?", name) != 0; }, db::durability::full);
}

void store::add_root(const std::string& name, const digest& d) {
    impl_->dir->database().write([&](db::connection& c) { c.run("INSERT OR IGNORE INTO roots VALUES(?,?)", name, d); }, db::durability::full);
}

void store::remove_roots(const std::string& name) {
    impl_->dir->database().write([&](db::connection& c) { c.run("DELETE FROM roots WHERE name=?", name); });
}

}  // namespace cobuild::content
