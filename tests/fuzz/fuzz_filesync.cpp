// Any bytes as packets: the decoder ends with a packet that encodes and decodes to itself, or an error of ours; a receiver
// fed with them ends too, and touches nothing outside its directory.
#include <stdlib.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include <boost/asio/awaitable.hpp>

import cobuild.base;
import cobuild.async;
import cobuild.fs;
import cobuild.filesync;

using namespace cobuild;
using namespace cobuild::filesync;

namespace {
/// One packet after another, each behind a byte that is its length.
class script : public packet_stream {
public:
    explicit script(std::string_view text) : rest_(text) {}
    async::task<std::optional<std::string>> read() override {
        if (rest_.empty()) co_return std::nullopt;
        const std::size_t size = static_cast<unsigned char>(rest_.front());
        std::string out(rest_.substr(1, size));
        rest_.remove_prefix(1 + out.size());
        co_return out;
    }
    async::task<void> write(std::string) override { co_return; }

private:
    std::string_view rest_;
};

async::task<void> run(std::string_view text, async::blocking_pool& pool, std::shared_ptr<const fs::root> to) {
    receive_options o;
    o.exact_sizes = text.size() % 2 == 0;
    o.max.bytes = 1 << 20;
    o.map = [](file_stat& s) {
        // Devices are the machine's.
        s.uid = s.gid = 0;
        return (s.mode & go_mode::device) == 0;
    };
    co_await receive(std::make_shared<script>(text), pool, std::move(to), std::move(o));
}
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    try {
        const packet p = decode(text);
        const std::string again = encode(p);
        const packet q = decode(again);
        if (q.type != p.type || q.id != p.id || q.data != p.data || q.stat != p.stat) __builtin_trap();
    } catch (const error& e) {
        if (e.kind() != errc::corrupt) __builtin_trap();
    }
    static async::runtime rt;
    std::string top = (std::filesystem::temp_directory_path() / "fuzz-filesync-XXXXXX").string();
    if (::mkdtemp(top.data()) == nullptr) __builtin_trap();
    try {
        std::filesystem::create_directory(top + "/to");
        rt.block_on(run(text, rt.pool(), std::make_shared<const fs::root>(top + "/to")));
    } catch (const std::exception&) {
        if (describe(std::current_exception()).kind() == errc::internal) __builtin_trap();
    }
    std::size_t outside = 0;
    for ([[maybe_unused]] const auto& e : std::filesystem::directory_iterator(top)) ++outside;
    if (outside != 1) __builtin_trap();
    std::filesystem::remove_all(top);
    return 0;
}
