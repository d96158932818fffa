/// Internal to cobuild.source: one git program after the other, safely.
module;
#include <optional>
#include <string>
#include <utility>
#include <vector>

module cobuild.source:git_run;

import cobuild.base;
import cobuild.async;
import cobuild.process;
import :git;

namespace cobuild::source {

struct git_result {
    bool ok = false;
    std::string out, err;
};

/// How git is started for one remote: environment, login, repository. Copies share nothing.
class git_runner {
public:
    git_runner(process::spawner& programs, std::string remote, std::string repository, std::string home);
    /// Asks the client for a token (http) or its agent's socket (ssh).
    async::task<void> log_in(git_request r, git_access access);

    /// Runs git with these arguments; a failure is the caller's to judge.
    [[nodiscard]] async::task<git_result> run(std::vector<std::string> args) const;
    /// Throws failure() when it fails.
    async::task<git_result> must(std::vector<std::string> args) const;
    /// What git said, as one sentence.
    [[nodiscard]] error failure(const git_result& r) const;

    [[nodiscard]] git_runner with_work_tree(std::string path, std::string index) const;
    [[nodiscard]] git_runner in(std::string git_dir, std::string work_tree) const;
    /// May read repositories of this machine, and nothing else.
    [[nodiscard]] git_runner local_files() const;
    [[nodiscard]] const std::string& repository() const { return repository_; }

private:
    process::spawner* programs_;
    std::string remote_, repository_, home_, work_tree_, index_;
    std::string protocols_ = "http:https:ssh:git";
    std::vector<std::pair<std::string, std::string>> config_;
    std::vector<std::string> env_;
};

}  // namespace cobuild::source
