// Stands after the imports of base, async, fs, archive, state, content, snapshot, oci, json, progress, exporter.
#pragma once

using namespace cobuild;
using namespace cobuild::async;
namespace stdfs = std::filesystem;
using test::read_file;
using test::write_file;

namespace {

struct world {
    explicit world(runtime& r)
        : rt(r), d(state::directory::open((dir / "state").string(), rt.pool())), content(d), snapshots(snapshot::open_overlay(d)) {}
    [[nodiscard]] exporter::stores stores() { return {rt.pool(), content, *snapshots, 2}; }

    /// One more layer on `below`, with what `fill` does to the mounted root.
    task<snapshot::chain> layer(snapshot::chain below, std::function<void(const stdfs::path&)> fill) {
        auto w = co_await snapshots->begin(below);
        {
            const auto m = co_await w.mount();
            fill(stdfs::path(cat("/proc/self/fd/", m.get())));
        }
        const auto done = co_await snapshots->commit(std::move(w), {});
        keep.push_back(done.keep);
        below.layers.push_back(done.id);
        co_return below;
    }
    /// A layer as a pull leaves it, its blob made by another tool.
    task<snapshot::chain> pulled(std::string path, std::string text, archive::compression kind) {
        std::string blob, tar_bytes;
        archive::blob_writer out([&blob](std::span<const std::byte> data) { blob += text_of(data); }, {.kind = kind});
        archive::tar_writer tar([&](std::span<const std::byte> data) {
            tar_bytes += text_of(data);
            out.write(data);
        });
        // The attribute is one that our own diffs do not keep.
        tar.add({.type = archive::entry_type::file,
                 .path = path,
                 .mode = 0644,
                 .size = text.size(),
                 .mtime = {1'900'000'000, 0},
                 .xattrs = {{"user.note", "n"}}},
                bytes_of(text));
        tar.finish();
        const auto made = out.finish();
        keep.push_back(content.put(blob).keep);
        auto u = co_await snapshots->begin_unpack();
        archive::apply_layer(archive::read_from(bytes_of(tar_bytes)), u.fd());
        snapshot::pulled_info info{.diff_id = made.diff_id};
        info.blob = {.variant = "pulled",
                     .blob = made.digest,
                     .size = made.size,
                     .media_type = std::string(kind == archive::compression::gzip ? oci::media::docker_layer_gzip : oci::media::oci_layer_zstd),
                     .diff_id = made.diff_id};
        const auto done = co_await snapshots->commit(std::move(u), std::move(info));
        keep.push_back(done.keep);
        co_return snapshot::chain{{done.id}};
    }
    runtime& rt;
    test::scratch_dir dir;
    std::shared_ptr<state::directory> d;
    content::store content;
    std::shared_ptr<snapshot::store> snapshots;
    std::vector<state::pin> keep;
};

inline exporter::input input_of(snapshot::chain root, std::string config = "", std::optional<std::int64_t> epoch = {}) {
    return {.root = std::move(root), .config = std::move(config), .platform = oci::parse_platform("linux/amd64"), .epoch = epoch};
}

inline std::vector<exporter::tree> trees_of(const exporter::input& in) { return {exporter::as_tree(in)}; }

inline bool shell(const std::string& command) { return std::system((command + " >/dev/null 2>&1").c_str()) == 0; }

template<class T>
task<std::optional<error>> failure(task<T> t) {
    std::exception_ptr thrown;
    try {
        if constexpr (std::is_void_v<T>)
            co_await std::move(t);
        else
            (void)co_await std::move(t);
    } catch (...) {
        thrown = std::current_exception();
    }
    if (!thrown) co_return std::nullopt;
    const auto e = describe(thrown);
    BOOST_TEST_MESSAGE(e.what());
    co_return e;
}

}  // namespace

#define WORLD_CASE(name)                             \
    static task<void> name##_in(world& w);           \
    CO_TEST_CASE(name) {                             \
        if (!cobuild::test::needs_root()) co_return; \
        world w(rt);                                 \
        co_await name##_in(w);                       \
    }                                                \
    static task<void> name##_in([[maybe_unused]] world& w)
