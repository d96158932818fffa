/// Internal to cobuild.script: what an image of a state directory holds.
module;
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

module cobuild.script:image;

import cobuild.base;
import cobuild.async;
import cobuild.process;

namespace cobuild::script {

struct image_file {
    std::string type;  ///< "file", "dir", "link", "other"
    std::uint32_t mode = 0, uid = 0, gid = 0;
    std::string link, content;
};

struct image_view {
    std::string config;                       ///< compact JSON
    std::map<std::string, image_file> files;  ///< by path without a leading slash, layers applied in order
};

/// Reads a named image from a state directory, as a stranger would: manifest, config, layer archives. Blocks.
image_view read_image(const std::filesystem::path& root, const std::string& name, async::blocking_pool& pool);

/// "-- name --": a file begins after this line.
bool is_marker(std::string_view line);

struct command_result {
    int code = 0;
    std::string out, err;
};

/// One running scenario: its directory, variables, last command, helpers it started.
class session {
public:
    session(std::filesystem::path work, std::string program, std::vector<std::string> arguments, process::spawner& programs,
            async::blocking_pool& pool);
    /// One command; throws errc::invalid with the reason when it did not hold. False: the rest is skipped (`why_skipped`).
    async::task<bool> execute(bool negated, std::vector<std::string> words);
    /// Ends what was started.
    async::task<void> finish();
    std::string why_skipped;
    /// Files of the scenario that `cmp` may rewrite; none unless it was asked to.
    std::set<std::string> updatable;
    /// Of these, those that differed, with their new content.
    std::map<std::string, std::string> updates;

private:
    async::task<void> run_cobuild(bool negated, std::vector<std::string> words);
    async::task<void> run_program(bool negated, std::vector<std::string> words);
    async::task<command_result> capture(std::vector<std::string> args);
    void check_outcome(bool negated, const std::vector<std::string>& words) const;
    void match(bool negated, const std::vector<std::string>& words, const std::string& text) const;
    void count_runs(const std::vector<std::string>& words) const;
    void compare(const std::vector<std::string>& words);
    async::task<void> start_registry(std::string name);
    async::task<void> serve(std::vector<std::string> args, int port);
    async::task<void> start_http(std::string directory);
    async::task<void> commit_files(std::vector<std::string> words);
    async::task<void> make_base(std::string name);
    async::task<void> check_image(bool negated, std::vector<std::string> words);
    void file_command(const std::vector<std::string>& words);
    [[nodiscard]] std::string expand(const std::string& word) const;
    [[nodiscard]] std::filesystem::path path_of(const std::string& name) const { return work_ / name; }

    std::filesystem::path work_;
    std::string program_;
    std::vector<std::string> arguments_;
    process::spawner& programs_;
    async::blocking_pool& pool_;
    std::map<std::string, std::string> variables_;
    std::vector<process::child> children_;
    command_result last_;
    std::string input_;  ///< of the next program
};

}  // namespace cobuild::script
