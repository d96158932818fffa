/// Internal to cobuild.build: refs whose result is a chain of layers, and containers on them.
module;
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.build:container;

import cobuild.base;
import cobuild.async;
import cobuild.frontend;
import cobuild.ops;
import cobuild.progress;
import cobuild.snapshot;
import :job;
import :parts;

namespace cobuild::build {

/// A ref whose files are those of a chain.
class chain_ref : public ref {
public:
    explicit chain_ref(parts& p) : parts_(p) {}
    virtual async::task<std::shared_ptr<ops::chain_value>> value() = 0;
    async::task<void> evaluate() override { (void)co_await value(); }
    async::task<std::string> read_file(std::string path, std::uint64_t offset, std::uint64_t length) override;
    async::task<std::vector<file_entry>> read_directory(std::string path, std::string include) override;
    async::task<file_entry> stat(std::string path) override;

private:
    async::task<std::shared_ptr<snapshot::view>> view();
    parts& parts_;
    std::shared_ptr<snapshot::view> view_;
};

/// A chain that is there already; null stays null.
std::shared_ptr<ref> make_settled_ref(parts& p, std::shared_ptr<ops::chain_value> value);

std::shared_ptr<container> make_container(parts& p, ops::build_scope scope, std::vector<std::string> allowed, container_request request,
                                          ops::container_base base);

// ---------------------------------------------------------------- frontends that are images (frontends.cpp)

/// By the engine's frontend_runner; `where` is the directive that asks for it. Throws errc::permission where the configuration switches
/// them off, errc::unsupported where nobody runs them.
async::task<job_result> run_foreign(parts& p, std::shared_ptr<job> j, frontend_request r, std::optional<source_location> where);
/// What such a frontend makes of a command line's build: one result for each platform.
async::task<std::vector<frontend::result>> convert_elsewhere(parts& p, build_request r, frontend::request request, ops::build_scope scope,
                                                             frontend::foreign_frontend to, std::shared_ptr<progress::sink> sink);

}  // namespace cobuild::build
