module;
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/write.hpp>

#include "session.pb.h"

module cobuild.daemon;

import cobuild.filesync;
import cobuild.fs;
import :internal;

namespace cobuild::daemon {

namespace {

constexpr std::string_view diff_copy = "/moby.filesync.v1.FileSync/DiffCopy", get_secret = "/moby.buildkit.secrets.v1.Secrets/GetSecret",
                           credentials = "/moby.filesync.v1.Auth/Credentials", check_agent = "/moby.sshforward.v1.SSH/CheckAgent",
                           forward_agent = "/moby.sshforward.v1.SSH/ForwardAgent", upload_pull = "/moby.upload.v1.Upload/Pull";
constexpr std::size_t max_secret = 500 * 1024;

/// Metadata values are ASCII; others go through an encoding that the key's own flag announces.
void add_values(rpc::metadata& m, const std::string& key, const std::vector<std::string>& values) {
    const auto plain = [](const std::string& v) { return std::all_of(v.begin(), v.end(), [](char c) { return c >= 0x20 && c < 0x7f; }); };
    const bool encoded = !std::all_of(values.begin(), values.end(), plain);
    if (encoded) m.emplace(cat(key, "-encoded"), "1");
    for (const auto& v : values) {
        if (!encoded) {
            m.emplace(key, v);
            continue;
        }
        static constexpr std::string_view hex = "0123456789ABCDEF";
        std::string out;
        for (const char c : v) {
            const auto u = static_cast<unsigned char>(c);
            const bool safe =
                (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.' || c == '~';
            if (safe) {
                out += c;
            } else {
                out += '%';
                out += hex[u >> 4U];
                out += hex[u & 15U];
            }
        }
        m.emplace(key, out);
    }
}

// ---------------------------------------------------------------- ssh agents

using local_socket = boost::asio::local::stream_protocol::socket;

async::task<void> to_client(std::shared_ptr<local_socket> from, std::shared_ptr<rpc::stream> to) {
    std::string buffer(std::size_t{32} << 10, '\0');
    boost::system::error_code ended;
    for (;;) {
        const auto n = co_await from->async_read_some(boost::asio::buffer(buffer), boost::asio::redirect_error(async::use_task, ended));
        if (ended) break;
        moby::session::BytesMessage m;
        m.set_data(buffer.data(), n);
        if (!co_await to->write(m.SerializeAsString())) break;
    }
    co_await to->writes_done();
}

/// One connection to the agent, which the client makes at its side.
async::task<void> forward(std::shared_ptr<local_socket> socket, std::shared_ptr<tunnel> t, std::string id) {
    const auto s = t->channel->open(std::string(forward_agent), {{"buildkit.ssh.id", id}});
    async::task_group up(co_await async::current_executor, true);
    up.spawn(to_client(socket, s));
    std::exception_ptr failed;
    try {
        while (auto bytes = co_await s->read()) {
            moby::session::BytesMessage m;
            if (!m.ParseFromString(*bytes)) break;
            co_await boost::asio::async_write(*socket, boost::asio::buffer(m.data()), async::use_task);
        }
    } catch (...) {
        failed = std::current_exception();
    }
    co_await async::no_cancel;
    boost::system::error_code ignored;
    socket->close(ignored);
    s->cancel();
    co_await up.join();
    if (failed) log(log_level::debug, "a connection to the client's ssh agent ended", {{"error", describe(failed).what()}});
}

/// A socket at which the client's agent answers, as long as this lives.
class lent_agent {
public:
    lent_agent(async::executor ex, std::shared_ptr<tunnel> t, std::string id) : state_(std::make_shared<state>(ex)) {
        char name[] = "/tmp/cobuild-agent-XXXXXX";
        if (::mkdtemp(name) == nullptr) throw_errno("making a directory for an ssh agent's socket");
        state_->directory = name;
        const boost::asio::local::stream_protocol::endpoint at(state_->directory + "/agent.sock");
        state_->acceptor.open();
        state_->acceptor.bind(at);
        state_->acceptor.listen();
        boost::asio::co_spawn(ex, serve(state_, std::move(t), std::move(id)), [](const std::exception_ptr&) {});
    }
    ~lent_agent() {
        boost::system::error_code ignored;
        state_->acceptor.close(ignored);
        std::error_code also;
        std::filesystem::remove_all(state_->directory, also);
    }
    lent_agent(const lent_agent&) = delete;
    lent_agent& operator=(const lent_agent&) = delete;
    [[nodiscard]] std::string path() const { return state_->directory + "/agent.sock"; }

private:
    struct state {
        explicit state(async::executor ex) : acceptor(ex) {}
        boost::asio::local::stream_protocol::acceptor acceptor;
        std::string directory;
    };

    /// Ends with the acceptor; connections end with the tunnel at the latest.
    static async::task<void> serve(std::shared_ptr<state> s, std::shared_ptr<tunnel> t, std::string id) {
        async::task_group group(co_await async::current_executor, true);
        std::exception_ptr ended;
        try {
            for (;;) {
                auto socket = std::make_shared<local_socket>(co_await s->acceptor.async_accept(async::use_task));
                group.spawn(async::linked(t->closed.token(), forward(std::move(socket), t, id)));
            }
        } catch (...) {
            ended = std::current_exception();
        }
        co_await async::no_cancel;
        group.cancel();
        try {
            co_await group.join();
        } catch (const std::exception&) {
            // Connections of an agent that is lent no more.
        }
    }

    std::shared_ptr<state> state_;
};

class remote_session final : public session::session, public std::enable_shared_from_this<remote_session> {
public:
    remote_session(std::shared_ptr<tunnel> t, context_store& contexts, async::blocking_pool& pool, tunnel_finder find)
        : tunnel_(std::move(t)), contexts_(contexts), pool_(pool), find_(std::move(find)) {}

    async::task<std::shared_ptr<::cobuild::session::session>> other(std::string id) override {
        if (id == tunnel_->id || !find_) co_return shared_from_this();
        auto& known = others_[id];
        if (!known) known = make_remote(co_await find_(id), contexts_, pool_);
        co_return known;
    }

    async::task<std::optional<std::filesystem::path>> directory(::cobuild::session::directory_request what) override {
        const auto place = co_await synced(std::move(what));
        co_return place ? std::optional<std::filesystem::path>(place->path) : std::nullopt;
    }

    async::task<std::optional<std::string>> read_file(std::string name, std::string path) override {
        const auto place = co_await synced({.name = name,
                                            .include = {},
                                            .exclude = {},
                                            .follow = {path, path + ".dockerignore", ".dockerignore", "dockerfile"},
                                            .shared_key_hint = "files"});
        if (!place) co_return std::nullopt;
        co_return co_await pool_.run([place, path]() -> std::optional<std::string> {
            const fs::root root(place->path);
            const auto info = root.stat(path, fs::links::follow);
            if (!info || !info->is_file()) return std::nullopt;
            return root.read_file(path, std::size_t{16} << 20);
        });
    }

    async::task<std::optional<std::string>> secret(std::string id) override {
        if (!tunnel_->offers(get_secret)) co_return std::nullopt;
        moby::session::GetSecretRequest q;
        q.set_id(id);
        std::optional<std::string> bytes;
        try {
            bytes = co_await tunnel_->channel->unary(std::string(get_secret), q.SerializeAsString());
        } catch (const error& e) {
            if (e.kind() != errc::not_found) throw;
        }
        if (!bytes) co_return std::nullopt;
        moby::session::GetSecretResponse r;
        if (!r.ParseFromString(*bytes)) throw error{errc::corrupt, cat("the client's answer about the secret ", quoted(id), " cannot be read")};
        if (r.data().size() > max_secret) throw error{errc::invalid, cat("the secret ", quoted(id), " is larger than 500 KiB")};
        co_return r.data();
    }

    async::task<std::optional<std::string>> ssh_agent(std::string id) override {
        if (!tunnel_->offers(check_agent) || !tunnel_->offers(forward_agent)) co_return std::nullopt;
        moby::session::CheckAgentRequest q;
        q.set_id(id);
        bool there = true;
        try {
            (void)co_await tunnel_->channel->unary(std::string(check_agent), q.SerializeAsString());
        } catch (const error& e) {
            if (e.kind() == errc::canceled) throw;
            there = false;
        }
        if (!there) co_return std::nullopt;
        auto& agent = agents_[id];
        if (!agent) agent = std::make_shared<lent_agent>(co_await async::current_executor, tunnel_, id);
        co_return agent->path();
    }

    std::shared_ptr<::cobuild::session::blob_store> blobs(std::string id) override { return make_blobs(tunnel_, std::move(id)); }

    async::task<bool> upload(std::string path, ::cobuild::session::piece_sink to) override {
        if (!tunnel_->offers(upload_pull)) co_return false;
        const auto s = tunnel_->channel->open(std::string(upload_pull), {{"urlpath", path}});
        while (const auto bytes = co_await s->read()) {
            moby::session::BytesMessage m;
            if (!m.ParseFromString(*bytes)) throw error{errc::corrupt, "the client's upload cannot be read"};
            co_await to(std::move(*m.mutable_data()));
        }
        const auto end = co_await s->finish();
        if (!end.ok()) throw rpc::to_error(end).with(cat("getting the upload ", path, " of the client"));
        co_return true;
    }

private:
    using place = std::shared_ptr<context_store::place>;

    /// A directory with what is asked for, brought once a session for the same question.
    async::task<place> synced(::cobuild::session::directory_request what) {
        if (!tunnel_->offers(diff_copy)) co_return nullptr;
        std::string rules;
        for (const auto* list : {&what.include, &what.exclude, &what.follow}) {
            for (const auto& item : *list) rules += cat(item.size(), ":", item, "\n");
            rules += "-\n";
        }
        // As BuildKit's: of clients without a shared key, those who send the same names share what was sent.
        const auto key = cat(tunnel_->shared_key, "\n", what.name, "\n", what.shared_key_hint);
        const auto known = cat(key, "\n", rules);
        if (const auto at = synced_.find(known); at != synced_.end()) co_return at->second;
        co_return co_await flights_.run(known, [this, what, rules, key, known]() { return bring(what, key, rules, known); });
    }

    async::task<place> bring(::cobuild::session::directory_request what, std::string key, std::string rules, std::string known) {
        auto to = co_await contexts_.take(key, rules);
        rpc::metadata m;
        m.emplace("dir-name", what.name);
        add_values(m, "include-patterns", what.include);
        add_values(m, "exclude-patterns", what.exclude);
        add_values(m, "followpaths", what.follow);
        const auto s = tunnel_->channel->open(std::string(diff_copy), std::move(m));
        filesync::receive_options o;
        o.exact_sizes = false;  // a log that grows while it is sent is no reason to stop
        if (what.metadata_is_no_difference) o.compare = filesync::differ::none;
        if (what.on_bytes) o.on_progress = [told = what.on_bytes](const filesync::progress& p) { told(p.bytes); };
        std::exception_ptr failed;
        try {
            (void)co_await filesync::receive(packets_over(s), pool_, std::make_shared<const fs::root>(to->path), std::move(o));
        } catch (...) {
            failed = std::current_exception();
        }
        if (failed) {
            const auto e = describe(failed);
            s->cancel();
            const auto end = co_await async::linked(async::cancel_token{}, s->finish());
            // The client's own word ("no such directory") says more than that the stream broke.
            if (!end.ok() && end.code != rpc::code::canceled) {
                if (end.message.find("no access allowed to dir") != std::string::npos) co_return nullptr;
                throw rpc::to_error(end);
            }
            throw e;
        }
        co_await s->writes_done();
        (void)co_await s->finish();
        synced_[known] = to;
        co_return to;
    }

    std::shared_ptr<tunnel> tunnel_;
    context_store& contexts_;
    async::blocking_pool& pool_;
    std::map<std::string, place> synced_;
    async::single_flight<std::string, place> flights_;
    std::map<std::string, std::shared_ptr<lent_agent>> agents_;
    tunnel_finder find_;
    std::map<std::string, std::shared_ptr<::cobuild::session::session>> others_;
};

async::task<std::optional<registry::credential>> ask_login(std::shared_ptr<tunnel> t, std::string host) {
    if (!t->offers(credentials)) co_return std::nullopt;
    moby::session::CredentialsRequest q;
    q.set_host(host);
    const auto bytes = co_await t->channel->unary(std::string(credentials), q.SerializeAsString());
    moby::session::CredentialsResponse r;
    if (!r.ParseFromString(bytes)) throw error{errc::corrupt, cat("the client's answer about its login to ", host, " cannot be read")};
    if (r.username().empty() && r.secret().empty()) co_return std::nullopt;
    co_return registry::credential{.username = r.username(), .secret = r.secret(), .registry_token = {}, .origin = "the client's session"};
}

}  // namespace

std::shared_ptr<session::session> make_remote(std::shared_ptr<tunnel> t, context_store& contexts, async::blocking_pool& pool, tunnel_finder find) {
    return std::make_shared<remote_session>(std::move(t), contexts, pool, std::move(find));
}

std::shared_ptr<const registry::login> make_login(std::shared_ptr<tunnel> t) {
    auto out = std::make_shared<registry::login>();
    out->identity = t->id;
    out->credentials = [t](std::string host) { return ask_login(t, std::move(host)); };
    return out;
}

}  // namespace cobuild::daemon
