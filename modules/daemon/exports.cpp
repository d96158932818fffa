module;
#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include "session.pb.h"

module cobuild.daemon;

import cobuild.filesync;
import cobuild.fs;
import :internal;

namespace cobuild::daemon {

namespace {

constexpr std::string_view file_send = "/moby.filesync.v1.FileSend/DiffCopy";
constexpr std::size_t chunk = std::size_t{1} << 20;

rpc::metadata send_metadata(std::size_t exporter, bool several) {
    rpc::metadata out{{"buildkit-attachable-exporter-id", cat(exporter)}};
    if (several) out.emplace("buildkit-exporter-multi-platform", "1");
    return out;
}

std::shared_ptr<rpc::stream> open_send(const std::shared_ptr<tunnel>& client, std::size_t exporter, bool several = false) {
    if (!client) throw error{errc::invalid, "the output goes to the client, which has no session"};
    if (!client->offers(file_send)) throw error{errc::invalid, cat("method ", file_send, " not supported by the client")};
    return client->channel->open(std::string(file_send), send_metadata(exporter, several));
}

/// How a transfer to the client ended. That the client has it already is a success.
async::task<void> finish(std::shared_ptr<rpc::stream> s) {
    co_await s->writes_done();
    while (co_await s->read()) {
    }
    const auto end = co_await s->finish();
    if (!end.ok() && end.code != rpc::code::already_exists) throw rpc::to_error(end).with("sending the result to the client");
}

std::string read_some(int fd) {
    std::string out(chunk, '\0');
    for (;;) {
        const auto n = ::read(fd, out.data(), out.size());
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) throw_errno("reading what is exported");
        out.resize(static_cast<std::size_t>(n));
        return out;
    }
}

/// What comes out of the pipe goes to the client.
async::task<void> pump(std::shared_ptr<rpc::stream> to, std::shared_ptr<unique_fd> from, async::blocking_pool& pool) {
    std::exception_ptr failed;
    bool ended = false;
    try {
        for (;;) {
            auto data = co_await pool.run([from] { return read_some(from->get()); });
            if (data.empty()) break;
            if (ended) continue;
            moby::session::BytesMessage m;
            m.set_data(std::move(data));
            if (co_await to->write(m.SerializeAsString())) continue;
            // Who has it already need not be sent it; the exporter writes on.
            co_await finish(to);
            ended = true;
        }
        if (!ended) co_await finish(to);
    } catch (...) {
        failed = std::current_exception();
    }
    from->reset();  // a writer that is still there learns it
    if (failed) std::rethrow_exception(failed);
}

/// Runs the exporters; `writing` are the ends of pipes they write to, closed when they are done.
async::task<void> run_exports(std::shared_ptr<build_state> b, build::job_result result, std::vector<build::output> outputs,
                              std::vector<std::shared_ptr<unique_fd>> writing, std::map<std::string, std::string>* response) {
    std::exception_ptr failed;
    try {
        auto made = co_await b->job->finish(std::move(result), std::move(outputs));
        *response = std::move(made.exporter_response);
        b->images = std::move(made.images);
        b->provenance = std::move(made.provenance);
    } catch (...) {
        failed = std::current_exception();
    }
    for (const auto& end : writing) end->reset();
    if (failed) std::rethrow_exception(failed);
}

async::task<void> send_trees(std::shared_ptr<tunnel> client, std::size_t exporter, std::vector<build::result_tree> trees,
                             async::blocking_pool& pool) {
    const auto s = open_send(client, exporter, true);
    std::vector<filesync::tree> all;
    std::optional<std::int64_t> epoch;
    for (const auto& t : trees) {
        filesync::tree one;
        one.root = std::make_shared<const fs::root>(unique_fd{::fcntl(t.fd, F_DUPFD_CLOEXEC, 3)});
        one.name = t.name;
        all.push_back(std::move(one));
        if (t.epoch) epoch = t.epoch;
    }
    filesync::send_options o;
    if (epoch)
        o.map = [epoch](filesync::file_stat& f) {
            f.mtime = *epoch * 1'000'000'000;
            return true;
        };
    (void)co_await filesync::send(packets_over(s), pool, std::move(all), std::move(o));
    co_await finish(s);
}

}  // namespace

namespace {
/// tar=false, by Go's rules.
bool is_directory(const build::output& o) {
    const auto tar = o.attributes.find("tar");
    return tar != o.attributes.end() && (tar->second == "0" || to_lower(tar->second) == "f" || to_lower(tar->second) == "false");
}
}  // namespace

async::task<std::map<std::string, std::string>> export_result(std::shared_ptr<world> w, std::shared_ptr<build_state> b,
                                                              std::shared_ptr<tunnel> client, build::job_result result,
                                                              std::vector<build::output> outputs) {
    std::map<std::string, std::string> response;
    std::vector<std::shared_ptr<unique_fd>> writing;
    std::vector<async::task<void>> all;
    std::size_t exporter = 0;
    for (auto& o : outputs) {
        const auto id = exporter++;
        o.lenient = true;
        o.attributes.erase("dest");  // a path at the client
        if (o.type == "local") {
            o.receive = [client, id, w](std::vector<build::result_tree> trees) { return send_trees(client, id, std::move(trees), w->pool); };
        } else if ((o.type == "oci" || o.type == "docker") && is_directory(o)) {
            o.blobs = make_blobs(client, "export");
            if (!o.blobs) throw error{errc::invalid, "tar=false puts the image into a store of the client, which offers none"};
        } else if (o.type == "oci" || o.type == "docker" || o.type == "tar") {
            std::array<int, 2> ends{};
            if (::pipe2(ends.data(), O_CLOEXEC) != 0) throw_errno("making a pipe");
            const auto reading = std::make_shared<unique_fd>(ends[0]);
            writing.push_back(std::make_shared<unique_fd>(ends[1]));
            o.fd = ends[1];
            all.push_back(pump(open_send(client, id), reading, w->pool));
        }
    }
    all.push_back(run_exports(b, std::move(result), std::move(outputs), std::move(writing), &response));
    co_await async::when_all(std::move(all));
    co_return response;
}

}  // namespace cobuild::daemon
