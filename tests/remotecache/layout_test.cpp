// Caches in a directory: an OCI layout with one document per tag.
#include "support/support.hpp"

#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <vector>

import cobuild.base;
import cobuild.async;
import cobuild.content;
import cobuild.oci;
import cobuild.remotecache;
import cobuild.state;

using namespace cobuild;
namespace stdfs = std::filesystem;

namespace {

struct world {
    test::scratch_dir dir;
    async::blocking_pool pool{2};
    std::shared_ptr<state::directory> state = state::directory::open((dir.path() / "state").string(), pool);
    std::unique_ptr<content::store> content = std::make_unique<content::store>(state);
    std::string cache = (dir.path() / "new" / "cache").string();

    struct made {
        oci::descriptor manifest;
        std::string bytes;
        std::vector<oci::descriptor> blobs;
    };
    /// A document of the layers named.
    made make(const std::vector<std::string>& layers) {
        made out;
        std::vector<remotecache::layer> list;
        for (const auto& text : layers) {
            remotecache::layer l;
            l.blob = {.media_type = std::string(oci::media::oci_layer_gzip), .digest = content->put(text).digest, .size = text.size()};
            list.push_back(l);
            out.blobs.push_back(l.blob);
        }
        oci::descriptor config{.media_type = std::string(remotecache::config_type), .digest = content->put("{}").digest, .size = 2};
        out.blobs.push_back(config);
        const auto around = remotecache::make_manifest(config, list, true, true);
        out.manifest = {.media_type = around.media_type, .digest = digest::of(around.bytes), .size = around.bytes.size()};
        out.bytes = around.bytes;
        return out;
    }
    remotecache::written write(const made& m, const std::string& tag, bool reset = false) {
        return remotecache::write_layout(*content, cache, tag, m.manifest, m.bytes, m.blobs, reset);
    }
    [[nodiscard]] stdfs::path blob(const digest& d) const { return stdfs::path(cache) / "blobs/sha256" / d.hex(); }
};

errc kind_of(const std::function<void()>& f) {
    try {
        f();
    } catch (const error& e) {
        return e.kind();
    }
    return errc::internal;
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_document_is_found_by_tag_and_by_digest) {
    world w;
    const auto one = w.make({"one"}), two = w.make({"two"});
    w.write(one, "latest");
    w.write(two, "two");
    BOOST_TEST((remotecache::find_document(w.cache, "latest", {}).digest == one.manifest.digest));
    BOOST_TEST((remotecache::find_document(w.cache, "two", {}).digest == two.manifest.digest));
    BOOST_TEST((remotecache::find_document(w.cache, "none", two.manifest.digest).digest == two.manifest.digest));
    BOOST_TEST((kind_of([&] { (void)remotecache::find_document(w.cache, "none", {}); }) == errc::not_found));
    BOOST_TEST((kind_of([&] { (void)remotecache::find_document(w.cache + "x", "latest", {}); }) == errc::not_found));
    BOOST_TEST(remotecache::read_document(w.cache, one.manifest) == one.bytes);
}

BOOST_AUTO_TEST_CASE(a_tag_moves_and_what_is_there_is_not_written_again) {
    world w;
    const auto first = w.make({"layer one", "layer two"});
    const auto all = w.write(first, "latest");
    BOOST_TEST(all.blobs == 3u);
    BOOST_TEST(all.bytes == 9u + 9u + 2u);
    BOOST_TEST(w.write(first, "latest").blobs == 0u);
    const auto second = w.make({"layer one", "layer three"});
    const auto again = w.write(second, "latest");
    BOOST_TEST(again.blobs == 1u);
    BOOST_TEST(again.bytes == 11u);
    BOOST_TEST((remotecache::find_document(w.cache, "latest", {}).digest == second.manifest.digest));
    BOOST_TEST(stdfs::exists(w.blob(digest::of("layer two"))));
}

BOOST_AUTO_TEST_CASE(reset_removes_what_no_tag_needs) {
    world w;
    const auto old = w.make({"old"}), kept = w.make({"kept"}), fresh = w.make({"fresh"});
    w.write(old, "latest");
    w.write(kept, "other");
    w.write(fresh, "latest", true);
    BOOST_TEST(!stdfs::exists(w.blob(digest::of("old"))));
    BOOST_TEST(!stdfs::exists(w.blob(old.manifest.digest)));
    BOOST_TEST(stdfs::exists(w.blob(digest::of("kept"))));
    BOOST_TEST(stdfs::exists(w.blob(digest::of("fresh"))));
    BOOST_TEST(stdfs::exists(w.blob(digest::of("{}"))));
}

BOOST_AUTO_TEST_CASE(nothing_is_taken_that_is_not_what_its_name_says) {
    world w;
    const auto one = w.make({"layer"});
    w.write(one, "latest");
    std::ofstream(w.blob(digest::of("layer")), std::ios::binary) << "layEr";
    std::ofstream(w.blob(one.manifest.digest), std::ios::binary) << "{}";
    BOOST_TEST((kind_of([&] { (void)remotecache::read_document(w.cache, one.manifest); }) == errc::corrupt));
    world other;
    BOOST_TEST((kind_of([&] { (void)remotecache::take_blob(*other.content, w.cache, one.blobs.front()); }) == errc::corrupt));
    BOOST_TEST(!other.content->find(digest::of("layer")).has_value());
    stdfs::remove(w.blob(digest::of("layer")));
    BOOST_TEST((kind_of([&] { (void)remotecache::take_blob(*other.content, w.cache, one.blobs.front()); }) == errc::not_found));
}
