/// Internal to cobuild.build: requests to frontends, and what provenance tells of them.
module;
#include <chrono>
#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.build:calls;

import cobuild.base;
import cobuild.async;
import cobuild.config;
import cobuild.exporter;
import cobuild.frontend;
import cobuild.llb;
import cobuild.ops;
import cobuild.policy;
import cobuild.snapshot;
import cobuild.solver;
import :types;

namespace cobuild::build {

/// What a frontend gives before anything of it is run: graphs by platform (of a single one the key is empty).
struct frontend_result {
    std::map<std::string, llb::definition> graphs;
    bool map = false;
    std::map<std::string, std::string> metadata;
    std::optional<frontend::foreign_frontend> foreign;  ///< the Dockerfile is for that one, and nothing else is told
};
/// What policies make of a source; `platform` is of an image. None: it is used as it is.
using source_check = std::function<async::task<llb::source_op>(llb::source_op what, std::optional<llb::platform> platform)>;
struct frontend_question {
    std::map<std::string, std::string> attrs;
    std::map<std::string, llb::definition> inputs;
    source_check check;                    ///< for what the frontend looks at
    std::vector<policy::policy> policies;  ///< for named contexts
};
/// What an error is about: lines of the Dockerfile, or something that the frontend does not know.
struct frontend_problem {
    llb::source_info file;
    std::vector<llb::range> ranges;
    std::string unknown_kind, unknown_name;  ///< see job::failure
};

/// "cache-imports", a JSON list of cache options, or the older "cache-from", images separated by commas.
std::vector<cache_entry> named_caches(const std::map<std::string, std::string>& attrs);

// ---------------------------------------------------------------- provenance

/// A graph that was solved for a client, for provenance.
struct noted_graph {
    llb::definition graph;
    bool brought = false;  ///< its result is there
};
/// A request to a frontend and what was looked at for it, for provenance; or (`asked` without a frontend) the client itself.
struct frontend_call {
    std::shared_ptr<const exporter::asked_request> asked;
    std::set<std::string> locals;  ///< the client's directories of which the frontend read files
    std::vector<std::shared_ptr<noted_graph>> graphs;
    std::vector<std::shared_ptr<frontend_call>> calls;  ///< made for this one
};

/// Which requests made which graphs, as long as their builds last: two that differ make none of them the maker.
class origins {
public:
    void add(const llb::definition& made, const std::shared_ptr<const exporter::asked_request>& by);
    [[nodiscard]] std::shared_ptr<const exporter::asked_request> of(const llb::definition& what) const;

private:
    std::multimap<digest, std::weak_ptr<const exporter::asked_request>> known_;
};
/// What provenance tells of a build: materials from the sources of its graph and of those in `also`, as `found` has them, secrets
/// and agents from the steps. For the command line and the daemon alike; `settings` may name a directory with more to tell.
exporter::build_record make_record(exporter::asked_request asked, const llb::definition& graph, const std::vector<const llb::definition*>& also,
                                   const ops::found_sources& found, std::chrono::sys_time<nanoseconds> started,
                                   const config::configuration& settings);
/// What of a call besides `not_these` was brought about, and the directories it read.
void add_call(const frontend_call& call, const std::set<const noted_graph*>& not_these, std::vector<const llb::definition*>& graphs,
              std::set<std::string>& locals);
/// A request for provenance; what made its inputs is found in `known`.
std::shared_ptr<const exporter::asked_request> note_request(std::string frontend, std::map<std::string, std::string> attrs,
                                                            const std::map<std::string, llb::definition>& inputs, const origins& known,
                                                            std::shared_ptr<const exporter::asked_request> root);
/// Of how many layers of the image, from the bottom, the results of its steps are made. Results that stand beside the image's
/// layers are not told of, nor (unless `look`: all is here) those that nobody needed.
async::task<std::map<std::string, std::size_t>> layers_of(const std::vector<solver::solved>& report, const exporter::build_record& record,
                                                          snapshot::chain root, bool look);
/// What is about the request itself is no part of what was asked.
std::map<std::string, std::string> client_attrs(std::map<std::string, std::string> attrs);

}  // namespace cobuild::build
