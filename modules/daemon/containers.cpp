module;
#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include "gateway.pb.h"

module cobuild.daemon;

import cobuild.llb;
import cobuild.process;
import :internal;

namespace cobuild::daemon {

namespace wire = moby::buildkit::v1::frontend;

namespace {

constexpr std::size_t max_containers = 256;  // of one frontend, at once
constexpr std::size_t max_processes = 1024;  // of one stream
constexpr std::size_t max_waiting = std::size_t{1} << 20;
constexpr std::uint32_t unknown_exit = 255;

template<class M>
M parse(const std::string& bytes) {
    M out;
    if (!out.ParseFromString(bytes)) throw error{errc::invalid, "the request cannot be read"};
    return out;
}

std::shared_ptr<build::container> find_container(const bridge_call& c, const std::string& id) {
    const auto at = c.f->containers.find(id);
    if (at == c.f->containers.end()) throw error{errc::not_found, cat("container ", quoted(id), " previously released or not created")};
    return at->second;
}

// ---------------------------------------------------------------- making and releasing

llb::mount mount_of(const pb::Mount& m) {
    llb::mount out{.selector = m.selector(), .dest = m.dest(), .readonly = m.readonly()};
    switch (m.mounttype()) {
        case pb::BIND: break;
        case pb::SECRET: out.type = llb::mount_type::secret; break;
        case pb::SSH: out.type = llb::mount_type::ssh; break;
        case pb::CACHE: out.type = llb::mount_type::cache; break;
        case pb::TMPFS: out.type = llb::mount_type::tmpfs; break;
        default: throw error{errc::unsupported, cat("mounts of type ", static_cast<int>(m.mounttype()), " are not supported")};
    }
    const auto secret = [](const auto& s) {
        return llb::secret_opt{.id = s.id(), .uid = s.uid(), .gid = s.gid(), .mode = s.mode(), .optional = s.optional()};
    };
    if (m.has_tmpfsopt()) out.tmpfs = llb::tmpfs_opt{m.tmpfsopt().size()};
    if (out.type == llb::mount_type::cache) {
        out.cache = llb::cache_opt{.id = m.cacheopt().id()};
        if (m.cacheopt().sharing() == pb::PRIVATE) out.cache->sharing = llb::cache_sharing::private_;
        if (m.cacheopt().sharing() == pb::LOCKED) out.cache->sharing = llb::cache_sharing::locked;
    }
    if (out.type == llb::mount_type::secret) out.secret = secret(m.secretopt());
    if (out.type == llb::mount_type::ssh) out.ssh = secret(m.sshopt());
    return out;
}

async::task<std::string> new_container(bridge_call c, std::string bytes) {
    const auto r = parse<wire::NewContainerRequest>(bytes);
    const auto& id = r.containerid();
    const auto taken = [&] {
        if (c.f->containers.contains(id)) throw error{errc::exists, cat("Container ", id, " already exists")};
        if (c.f->containers.size() >= max_containers) throw error{errc::invalid, cat("a build has at most ", max_containers, " containers at once")};
    };
    taken();
    build::container_request q{.id = id, .mounts = {}, .refs = {}, .hostname = r.hostname(), .extra_hosts = {}, .os = r.platform().os()};
    for (const auto& m : r.mounts()) {
        q.mounts.push_back(mount_of(m));
        q.refs.push_back(m.resultid().empty() ? nullptr : find_ref(c, m.resultid()));
    }
    if (r.network() == pb::HOST) q.network = llb::net_mode::host;
    if (r.network() == pb::NONE) q.network = llb::net_mode::none;
    for (const auto& h : r.extrahosts()) q.extra_hosts.push_back({h.host(), h.ip()});
    const auto made = co_await c.b->job->open_container(std::move(q));
    std::exception_ptr late;
    try {
        taken();
        if (c.f->closed) throw error{errc::canceled, "the build has ended"};
        c.f->containers[id] = made;
    } catch (...) {
        late = std::current_exception();
    }
    if (late) {
        co_await made->release();
        std::rethrow_exception(late);
    }
    co_return wire::NewContainerResponse().SerializeAsString();
}

async::task<std::string> release_container(bridge_call c, std::string bytes) {
    const auto r = parse<wire::ReleaseContainerRequest>(bytes);
    const auto gone = find_container(c, r.containerid());
    c.f->containers.erase(r.containerid());
    co_await gone->release();
    co_return wire::ReleaseContainerResponse().SerializeAsString();
}

// ---------------------------------------------------------------- files

std::size_t index_of(std::int32_t n) {
    if (n < 0) throw error{errc::invalid, cat("mount index ", n, " is out of bounds")};
    return static_cast<std::size_t>(n);
}

async::task<std::string> read_file(bridge_call c, std::string bytes) {
    const auto r = parse<wire::ReadFileRequest>(bytes);
    const auto at = [](std::int64_t v) { return static_cast<std::uint64_t>(v < 0 ? 0 : v); };
    wire::ReadFileResponse out;
    out.set_data(
        co_await find_container(c, r.ref())->read_file(index_of(r.mount_index()), r.file_path(), at(r.range().offset()), at(r.range().length())));
    co_return out.SerializeAsString();
}

async::task<std::string> read_directory(bridge_call c, std::string bytes) {
    const auto r = parse<wire::ReadDirRequest>(bytes);
    wire::ReadDirResponse out;
    for (const auto& e : co_await find_container(c, r.ref())->read_directory(index_of(r.mount_index()), r.dir_path(), r.include_pattern()))
        out.add_entries()->ParseFromString(wire_stat(e));
    co_return out.SerializeAsString();
}

async::task<std::string> stat_file(bridge_call c, std::string bytes) {
    const auto r = parse<wire::StatFileRequest>(bytes);
    wire::StatFileResponse out;
    out.mutable_stat()->ParseFromString(wire_stat(co_await find_container(c, r.ref())->stat(index_of(r.mount_index()), r.path())));
    co_return out.SerializeAsString();
}

// ---------------------------------------------------------------- processes

int signal_number(const std::string& name) {
    for (int n = 1; n < NSIG; ++n)
        if (const char* known = ::sigabbrev_np(n); known != nullptr && name == known) return n;
    if (name == "RTMIN") return SIGRTMIN;
    if (name == "RTMAX") return SIGRTMAX;
    throw error{errc::invalid, cat("Unknown signal ", name)};
}

async::task<void> feed(std::shared_ptr<async::byte_pipe> from, unique_fd to) {
    while (const auto piece = co_await from->read()) co_await process::write_all(to.duplicate(), std::string(text_of(*piece)));
}

/// The processes of one ExecProcess stream.
class exec_stream : public std::enable_shared_from_this<exec_stream> {
public:
    exec_stream(bridge_call c, std::shared_ptr<rpc::call> rpc, async::executor ex)
        : c_(std::move(c)), rpc_(std::move(rpc)), ex_(ex), followers_(ex) {}

    async::task<void> run() {
        std::exception_ptr failed;
        try {
            while (auto bytes = co_await rpc_->read()) co_await take(parse<wire::ExecMessage>(*bytes));
            co_await followers_.join();
        } catch (...) {
            failed = std::current_exception();
        }
        co_await async::no_cancel;
        // Nobody hears them any more.
        for (auto& [id, p] : processes_) {
            close_input(*p);
            if (p->process) co_await p->process->signal(SIGKILL);
        }
        followers_.cancel();
        try {
            co_await followers_.join();
        } catch (const std::exception&) {
            // The first reason counts.
        }
        if (failed) std::rethrow_exception(failed);
    }

private:
    struct one {
        std::string id;
        std::shared_ptr<build::container_process> process;
        std::shared_ptr<async::byte_pipe> input;  ///< null where it has none, or that has ended
        std::vector<std::uint32_t> outputs;
        async::event told;  ///< that it was started: what it prints comes after that
    };

    async::task<void> send(wire::ExecMessage m) {
        const auto turn = co_await writing_.acquire();
        co_await rpc_->write(m.SerializeAsString());
    }

    static wire::ExecMessage about(const one& p) {
        wire::ExecMessage out;
        out.set_processid(p.id);
        return out;
    }

    async::task<void> take(wire::ExecMessage m) {
        if (m.processid().empty()) throw error{errc::invalid, "ProcessID required"};
        const auto at = processes_.find(m.processid());
        if (m.has_init()) {
            if (at != processes_.end()) throw error{errc::exists, cat("Process ", m.processid(), " already exists")};
            co_return co_await begin(m);
        }
        if (at == processes_.end()) throw error{errc::not_found, cat("IO for process ", quoted(m.processid()), " not found")};
        const auto p = at->second;
        if (m.has_file()) {
            co_await give(*p, m.file());
        } else if (m.has_resize()) {
            p->process->resize(m.resize().rows(), m.resize().cols());
        } else if (m.has_signal()) {
            co_await p->process->signal(signal_number(m.signal().name()));
        }
    }

    static async::task<void> give(one& p, const wire::FdMessage& m) {
        if (m.fd() != 0) throw error{errc::invalid, cat("fd ", m.fd(), " unavailable to write")};
        const auto to = p.input;
        if (!to) co_return;  // it has ended meanwhile
        std::exception_ptr deaf;
        try {
            const auto data = bytes_of(m.data());
            if (!data.empty()) co_await to->write({data.begin(), data.end()});
        } catch (...) {
            deaf = std::current_exception();
        }
        if (deaf && p.input) std::rethrow_exception(deaf);
        if (m.eof()) {
            to->close();
            p.input.reset();
        }
    }

    static void close_input(one& p) {
        if (const auto to = std::exchange(p.input, nullptr)) to->fail(std::make_exception_ptr(error{errc::canceled, "the process has ended"}));
    }

    std::function<async::task<void>(std::string)> sink(std::weak_ptr<one> p, std::uint32_t fd) {
        return [self = weak_from_this(), p, fd](std::string data) -> async::task<void> {
            const auto mine = self.lock();
            const auto process = p.lock();
            if (!mine || !process) co_return;
            co_await process->told.wait();
            auto m = about(*process);
            m.mutable_file()->set_fd(fd);
            m.mutable_file()->set_data(std::move(data));
            co_await mine->send(std::move(m));
        };
    }

    async::task<void> begin(wire::ExecMessage m) {
        const auto& init = m.init();
        if (processes_.size() >= max_processes) throw error{errc::invalid, cat("a stream has at most ", max_processes, " processes")};
        const auto in = find_container(c_, init.containerid());
        auto p = std::make_shared<one>();
        p->id = m.processid();
        build::process_request q{.args = {init.meta().args().begin(), init.meta().args().end()},
                                 .env = {init.meta().env().begin(), init.meta().env().end()},
                                 .secret_envs = {},
                                 .cwd = init.meta().cwd(),
                                 .user = init.meta().user(),
                                 .terminal = init.tty(),
                                 .security = static_cast<int>(init.security()),
                                 .remove_stubs_recursively = init.meta().removemountstubsrecursive()};
        for (const auto& s : init.secretenv()) q.secret_envs.push_back({s.id(), s.name(), s.optional()});
        for (const auto fd : init.fds()) {
            if (fd == 0) {
                std::array<int, 2> ends{};
                if (::pipe2(ends.data(), O_CLOEXEC) < 0) throw_errno("pipe2");
                q.in = unique_fd{ends[0]};
                p->input = std::make_shared<async::byte_pipe>(max_waiting);
                followers_.spawn(until_deaf(p->input, unique_fd{ends[1]}));
                continue;
            }
            p->outputs.push_back(fd);
            if (fd == 1) q.out = sink(p, fd);
            if (fd == 2) q.err = sink(p, fd);
        }
        processes_[p->id] = p;
        p->process = co_await in->start(std::move(q));
        followers_.spawn(follow(shared_from_this(), p));
    }

    static async::task<void> until_deaf(std::shared_ptr<async::byte_pipe> from, unique_fd to) {
        try {
            co_await feed(std::move(from), std::move(to));
        } catch (const std::exception&) {
            // The process has ended: what is left is not for it.
        }
    }

    static async::task<void> follow(std::shared_ptr<exec_stream> self, std::shared_ptr<one> p) {
        co_await p->process->started();
        auto m = about(*p);
        m.mutable_started();
        co_await self->send(m);
        p->told.set();
        std::exception_ptr failed;
        int code = 0;
        try {
            code = co_await p->process->wait();
        } catch (...) {
            failed = std::current_exception();
        }
        close_input(*p);
        for (const auto fd : p->outputs) {
            m = about(*p);
            m.mutable_file()->set_fd(fd);
            m.mutable_file()->set_eof(true);
            co_await self->send(m);
        }
        m = about(*p);
        auto& exit = *m.mutable_exit();
        exit.set_code(failed ? unknown_exit : static_cast<std::uint32_t>(code));
        if (failed || code != 0) {
            const auto why = failed ? describe(failed) : error(errc::step_failed, cat("exit code: ", code)).exited(code);
            const auto s = build_status(why, std::nullopt);
            if (!exit.mutable_error()->ParseFromString(s.details)) exit.mutable_error()->Clear();
            exit.mutable_error()->set_code(static_cast<int>(s.code));
            exit.mutable_error()->set_message(s.message);
        }
        co_await self->send(m);
        m = about(*p);
        m.mutable_done();
        co_await self->send(m);
    }

    bridge_call c_;
    std::shared_ptr<rpc::call> rpc_;
    async::executor ex_;
    async::task_group followers_;
    async::semaphore writing_{1};
    std::map<std::string, std::shared_ptr<one>> processes_;
};

async::task<rpc::status> exec_process(bridge_call c, std::shared_ptr<rpc::call> rpc) {
    const auto ex = c.w->ex;
    const auto stream = std::make_shared<exec_stream>(std::move(c), std::move(rpc), ex);
    co_await stream->run();
    co_return rpc::status{};
}

}  // namespace

bridge_handler container_handler(std::string_view name) {
    static const std::map<std::string, bridge_handler, std::less<>> known{
        {"NewContainer", on_bridge(new_container)},  {"ReleaseContainer", on_bridge(release_container)},
        {"ReadFileContainer", on_bridge(read_file)}, {"ReadDirContainer", on_bridge(read_directory)},
        {"StatFileContainer", on_bridge(stat_file)}, {"ExecProcess", exec_process},
    };
    const auto at = known.find(name);
    return at == known.end() ? bridge_handler{} : at->second;
}

async::task<void> close_bridge(std::shared_ptr<bridge_state> f) {
    co_await async::no_cancel;
    f->closed = true;
    for (const auto& [id, container] : std::exchange(f->containers, {})) {
        try {
            co_await container->release();
        } catch (const std::exception& e) {
            log(log_level::debug, "a container's process was ended", {{"container", id}, {"error", e.what()}});
        }
    }
}

}  // namespace cobuild::daemon
