module;
#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <isa-l.h>
#include <libdeflate.h>
#include <zstd.h>

module cobuild.archive;

import cobuild.base;

namespace cobuild::archive {

namespace {
constexpr std::size_t member_size = std::size_t{1} << 20;
using bytes = std::vector<std::byte>;

/// One thread's compressor. The bytes depend on level and input only.
class member_maker {
public:
    explicit member_maker(int level) : level_(level) {
        if (level_ == 1 || level_ == 2) {
            stream_ = std::make_unique<isal_zstream>();
            level_buffer_.resize(level_ == 1 ? ISAL_DEF_LVL1_DEFAULT : ISAL_DEF_LVL2_DEFAULT);
        } else {
            compressor_.reset(libdeflate_alloc_compressor(level_));
            if (!compressor_) throw error{errc::internal, cat("no gzip compressor for level ", level_)};
        }
    }

    /// A whole gzip member (RFC 1952): mtime 0, no extra flags, OS unknown.
    void make(std::span<const std::byte> in, bytes& out) {
        static constexpr std::array<unsigned char, 10> header{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255};
        const std::size_t bound = in.size() + in.size() / 8 + 4096;
        out.resize(header.size() + bound + 8);
        std::memcpy(out.data(), header.data(), header.size());
        const std::size_t n =
            stream_ ? isal(in, std::span(out).subspan(header.size(), bound)) : deflate(in, std::span(out).subspan(header.size(), bound));
        std::byte* tail = out.data() + header.size() + n;
        const std::uint32_t crc = libdeflate_crc32(0, in.data(), in.size());
        for (unsigned i = 0; i < 4; ++i) tail[i] = static_cast<std::byte>(crc >> (8 * i) & 0xff);
        for (unsigned i = 0; i < 4; ++i) tail[4 + i] = static_cast<std::byte>(in.size() >> (8 * i) & 0xff);
        out.resize(header.size() + n + 8);
    }

private:
    std::size_t isal(std::span<const std::byte> in, std::span<std::byte> out) {
        isal_deflate_init(stream_.get());
        stream_->level = static_cast<std::uint32_t>(level_);
        stream_->level_buf = level_buffer_.data();
        stream_->level_buf_size = static_cast<std::uint32_t>(level_buffer_.size());
        stream_->gzip_flag = IGZIP_DEFLATE;
        stream_->end_of_stream = 1;
        stream_->flush = NO_FLUSH;
        stream_->next_in = reinterpret_cast<std::uint8_t*>(const_cast<std::byte*>(in.data()));
        stream_->avail_in = static_cast<std::uint32_t>(in.size());
        stream_->next_out = reinterpret_cast<std::uint8_t*>(out.data());
        stream_->avail_out = static_cast<std::uint32_t>(out.size());
        const int result = isal_deflate(stream_.get());
        if (result != COMP_OK || stream_->avail_in != 0 || stream_->internal_state.state != ZSTATE_END)
            throw error{errc::internal, cat("gzip compression failed (code ", result, ")")};
        return out.size() - stream_->avail_out;
    }
    std::size_t deflate(std::span<const std::byte> in, std::span<std::byte> out) {
        const std::size_t n = libdeflate_deflate_compress(compressor_.get(), in.data(), in.size(), out.data(), out.size());
        if (n == 0) throw error{errc::internal, "gzip compression failed"};
        return n;
    }

    struct free_compressor {
        void operator()(libdeflate_compressor* c) const noexcept { libdeflate_free_compressor(c); }
    };
    int level_;
    std::unique_ptr<isal_zstream> stream_;
    std::vector<std::uint8_t> level_buffer_;
    std::unique_ptr<libdeflate_compressor, free_compressor> compressor_;
};

/// Threads that make members; the results are taken in order.
class member_team {
public:
    struct job {
        bytes in;
        bytes out;
        std::exception_ptr failed;
        bool done = false;
    };
    member_team(int level, unsigned threads) {
        for (unsigned i = 0; i < threads; ++i) threads_.emplace_back([this, level] { run(level); });
    }
    ~member_team() {
        {
            const std::scoped_lock lock{mutex_};
            stop_ = true;
        }
        work_.notify_all();
        for (auto& t : threads_) t.join();
    }
    void put(const std::shared_ptr<job>& j) {
        {
            const std::scoped_lock lock{mutex_};
            queue_.push_back(j);
        }
        work_.notify_one();
    }
    /// Waits for the job when `wait`; whether it is done.
    bool done(const job& j, bool wait) {
        std::unique_lock lock{mutex_};
        if (wait) finished_.wait(lock, [&] { return j.done; });
        return j.done;
    }

private:
    void run(int level) {
        std::optional<member_maker> maker;
        for (;;) {
            std::shared_ptr<job> j;
            {
                std::unique_lock lock{mutex_};
                work_.wait(lock, [this] { return stop_ || !queue_.empty(); });
                if (stop_) return;
                j = std::move(queue_.front());
                queue_.pop_front();
            }
            std::exception_ptr failed;
            try {
                if (!maker) maker.emplace(level);
                maker->make(j->in, j->out);
            } catch (...) {
                failed = std::current_exception();
            }
            const std::scoped_lock lock{mutex_};
            j->failed = failed;
            j->done = true;
            finished_.notify_all();
        }
    }
    std::mutex mutex_;
    std::condition_variable work_, finished_;
    std::deque<std::shared_ptr<job>> queue_;
    bool stop_ = false;
    std::vector<std::thread> threads_;
};

struct free_zstd {
    void operator()(ZSTD_CCtx* c) const noexcept { ZSTD_freeCCtx(c); }
};
}  // namespace

struct blob_writer::state {
    byte_sink out;
    compress_options options;
    int level = 0;
    hasher packed_hash, plain_hash;
    layer_blob result;
    bytes pending;  ///< gzip: input of the member being collected
    bytes packed;
    bool any_member = false;
    std::optional<member_maker> maker;
    std::unique_ptr<member_team> team;
    std::deque<std::shared_ptr<member_team::job>> jobs;
    std::vector<std::shared_ptr<member_team::job>> spare;
    std::unique_ptr<ZSTD_CCtx, free_zstd> zstd;

    state(byte_sink sink, compress_options o) : out(std::move(sink)), options(o) {
        if (o.kind == compression::gzip) {
            level = std::clamp(o.level.value_or(2), 0, 9);
            if (o.threads > 1)
                team = std::make_unique<member_team>(level, std::min(o.threads, 64U));
            else
                maker.emplace(level);
            pending.reserve(member_size);
        } else if (o.kind == compression::zstd) {
            level = std::clamp(o.level.value_or(3), 1, 19);
            begin_zstd();
        }
    }

    void begin_zstd() {
        zstd.reset(ZSTD_createCCtx());
        if (!zstd) throw error{errc::internal, "no memory for zstd"};
        ZSTD_CCtx_setParameter(zstd.get(), ZSTD_c_compressionLevel, level);
        ZSTD_CCtx_setParameter(zstd.get(), ZSTD_c_checksumFlag, 1);
        // One worker and many give the same bytes, none gives others.
        ZSTD_CCtx_setParameter(zstd.get(), ZSTD_c_nbWorkers, static_cast<int>(std::clamp(options.threads, 1U, 64U)));
        packed.resize(std::size_t{1} << 18);
    }

    void emit(std::span<const std::byte> data) {
        packed_hash.update(data);
        result.size += data.size();
        out(data);
    }

    void feed_zstd(std::span<const std::byte> data, ZSTD_EndDirective how) {
        ZSTD_inBuffer in{data.data(), data.size(), 0};
        for (;;) {
            ZSTD_outBuffer to{packed.data(), packed.size(), 0};
            const std::size_t left = ZSTD_compressStream2(zstd.get(), &to, &in, how);
            if (ZSTD_isError(left) != 0) throw error{errc::internal, cat("zstd compression failed (", ZSTD_getErrorName(left), ")")};
            if (to.pos != 0) emit(std::span(packed).first(to.pos));
            if (how == ZSTD_e_end ? left == 0 : in.pos == in.size) return;
        }
    }

    void collect(bool wait_for_all) {
        const std::size_t limit = wait_for_all ? 0 : std::size_t{2} * options.threads;
        while (!jobs.empty() && team->done(*jobs.front(), jobs.size() > limit)) {
            auto j = std::move(jobs.front());
            jobs.pop_front();
            if (j->failed) std::rethrow_exception(j->failed);
            emit(j->out);
            j->done = false;
            j->in.clear();
            spare.push_back(std::move(j));
        }
    }

    void end_member() {
        any_member = true;
        if (maker) {
            maker->make(pending, packed);
            emit(packed);
            pending.clear();
            return;
        }
        std::shared_ptr<member_team::job> j;
        if (spare.empty()) {
            j = std::make_shared<member_team::job>();
            j->in.reserve(member_size);
        } else {
            j = std::move(spare.back());
            spare.pop_back();
        }
        std::swap(j->in, pending);
        jobs.push_back(j);
        team->put(j);
        collect(false);
    }

    void feed_gzip(std::span<const std::byte> data) {
        while (!data.empty()) {
            const std::size_t n = std::min(data.size(), member_size - pending.size());
            pending.insert(pending.end(), data.begin(), data.begin() + static_cast<std::ptrdiff_t>(n));
            data = data.subspan(n);
            if (pending.size() == member_size) end_member();
        }
    }
};

blob_writer::blob_writer(byte_sink out, compress_options options) : state_(std::make_unique<state>(std::move(out), options)) {}
blob_writer::blob_writer(blob_writer&&) noexcept = default;
blob_writer& blob_writer::operator=(blob_writer&&) noexcept = default;
blob_writer::~blob_writer() = default;

void blob_writer::write(std::span<const std::byte> data) {
    state& s = *state_;
    s.result.uncompressed_size += data.size();
    switch (s.options.kind) {
        case compression::gzip: s.plain_hash.update(data); return s.feed_gzip(data);
        case compression::zstd: s.plain_hash.update(data); return s.feed_zstd(data, ZSTD_e_continue);
        case compression::none: return s.emit(data);
    }
}

layer_blob blob_writer::finish() {
    state& s = *state_;
    if (s.options.kind == compression::gzip) {
        if (!s.pending.empty() || !s.any_member) s.end_member();
        if (s.team) s.collect(true);
    } else if (s.options.kind == compression::zstd) {
        s.feed_zstd({}, ZSTD_e_end);
    }
    s.result.digest = s.packed_hash.finish();
    s.result.diff_id = s.options.kind == compression::none ? s.result.digest : s.plain_hash.finish();
    return s.result;
}

byte_sink blob_writer::sink() {
    return [s = this](std::span<const std::byte> data) { s->write(data); };
}

}  // namespace cobuild::archive
