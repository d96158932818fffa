/// cobuild.script: scripted builds. One text file holds a script and the files it works on; running it proves a Dockerfile.
///
/// A scenario is in txtar form: the script first, then each file after a line `-- name --`. It runs in a directory of its
/// own with a state directory of its own. One command a line, words split at blanks, "double quotes" keep blanks together,
/// `#` starts a comment, $NAME is a variable ($WORK, the directory, is set). Commands:
///
///     cobuild ARGS            runs cobuild with this scenario's --root and --config; must succeed (`! cobuild`: must fail)
///     exec PROGRAM ARGS       runs a program; likewise with `!`
///     exit CODE               the last command's exit code
///     stdout REGEX            the last command printed this (`! stdout`: did not); likewise stderr
///     count runs N            RUN steps that the last build really ran
///     cmp A B                 the files are equal (with `update`, B is rewritten if it is a file of the scenario)
///     registry NAME           a registry on loopback (docker-registry) stands in as mirror of NAME; $REGISTRY is its address
///     http DIR                busybox' file server on loopback shows DIR; $HTTP is "http://ADDRESS"
///     git NAME DIR [TAG]      DIR's files become the next commit of a repository, which that server shows as $GIT/NAME.git;
///                             $COMMIT is its id
///     stdin FILE              what the next program reads on its standard input
///     base NAME               a busybox image under that name in the registry
///     image NAME path PATH [mode M] [owner U:G] [content TEXT] [link T] [type file|dir|link]    (`! image ... path`: absent)
///     image NAME@PLATFORM ... the same of an index's image for a platform, as NAME@linux/arm64
///     image NAME config REGEX the image's config, one line of JSON, matches
///     write FILE TEXT · append FILE TEXT · rm FILE · chmod MODE FILE
///     env NAME=VALUE          for the commands that follow
///     skip unless root        the rest is skipped, with a message, when not root
///
/// Patterns are ECMAScript regular expressions, searched for. A failure names file and line and shows what differed.
/// Nothing is left: what was started is ended, the directory is removed (unless asked to keep it).
/// Thread safety: run() from one executor. Not its job: anything a build itself does; it uses the program as a user does.
module;
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

export module cobuild.script;

import cobuild.base;
import cobuild.async;

export namespace cobuild::script {

struct line {
    unsigned number = 0;  ///< in the scenario's file, from 1
    bool negated = false;
    std::vector<std::string> words;
};

struct scenario {
    std::string name;  ///< the file's path
    std::vector<line> script;
    std::vector<std::pair<std::string, std::string>> files;
};

/// Throws errc::invalid with file and line.
scenario parse(std::string_view text, std::string name);

struct options {
    std::string program;                 ///< the cobuild to run
    std::vector<std::string> arguments;  ///< given to every `cobuild build`, for example --oci-worker-net=none
    unsigned parallel = 1;               ///< scenarios at once
    bool update = false;                 ///< accept new output in `cmp`
    bool keep = false;                   ///< leave the working directories, and tell where they are
};

enum class verdict { passed, failed, skipped };

struct outcome {
    std::string name;
    script::verdict verdict = verdict::passed;
    std::string message;  ///< what differed, or why it was skipped
    nanoseconds took{};
};

/// Runs all; `report` is called as each ends, in that order. Cancelling ends what runs and cleans up.
async::task<std::vector<outcome>> run(std::vector<std::filesystem::path> files, options o, async::runtime& rt,
                                      std::function<void(const outcome&)> report);

}  // namespace cobuild::script
