module;
#include <sys/stat.h>
#include <unistd.h>

#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <regex>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.script;

import :image;

namespace cobuild::script {

namespace {

namespace stdfs = std::filesystem;

error wrong(std::string message) { return {errc::invalid, std::move(message)}; }

std::string tail(const std::string& text, std::size_t lines = 15) {
    std::size_t at = text.size();
    for (std::size_t n = 0; at > 0 && n <= lines; --at)
        if (text[at - 1] == '\n') ++n;
    return text.substr(at == 0 ? 0 : at + 1);
}

std::string slurp(const stdfs::path& file) {
    std::ifstream in(file, std::ios::binary);
    if (!in) throw wrong(cat("the file ", file.string(), " cannot be read"));
    return {std::istreambuf_iterator<char>(in), {}};
}

void spill(const stdfs::path& file, std::string_view text, bool append = false) {
    if (file.has_parent_path()) stdfs::create_directories(file.parent_path());
    std::ofstream out(file, std::ios::binary | (append ? std::ios::app : std::ios::trunc));
    out << text;
    if (!out) throw wrong(cat("the file ", file.string(), " cannot be written"));
}

}  // namespace

session::session(stdfs::path work, std::string program, std::vector<std::string> arguments, process::spawner& programs, async::blocking_pool& pool)
    : work_(std::move(work)), program_(std::move(program)), arguments_(std::move(arguments)), programs_(programs), pool_(pool) {
    variables_["WORK"] = work_.string();
    if (!stdfs::exists(path_of("buildkitd.toml"))) spill(path_of("buildkitd.toml"), "");
}

std::string session::expand(const std::string& word) const {
    std::string out;
    for (std::size_t i = 0; i < word.size(); ++i) {
        if (word[i] != '$') {
            out += word[i];
            continue;
        }
        std::size_t end = i + 1;
        while (end < word.size() && (std::isalnum(static_cast<unsigned char>(word[end])) != 0 || word[end] == '_')) ++end;
        const auto at = variables_.find(word.substr(i + 1, end - i - 1));
        if (at == variables_.end()) {
            out += '$';  // regular expressions end in it
            continue;
        }
        out += at->second;
        i = end - 1;
    }
    return out;
}

async::task<bool> session::execute(bool negated, std::vector<std::string> words) {
    for (auto& w : words) w = expand(w);
    const std::string name = words.front();
    static const std::set<std::string> negatable{"cobuild", "exec", "stdout", "stderr", "image"};
    if (negated && !negatable.contains(name)) throw wrong(cat("'!' means nothing before ", name));
    if (name == "cobuild")
        co_await run_cobuild(negated, std::move(words));
    else if (name == "exec")
        co_await run_program(negated, std::move(words));
    else if (name == "stdout")
        match(negated, words, last_.out);
    else if (name == "stderr")
        match(negated, words, last_.err);
    else if (name == "exit") {
        if (words.size() != 2) throw wrong("exit CODE is expected");
        if (cat(last_.code) != words[1]) throw wrong(cat("exit code ", last_.code, ", expected ", words[1]));
    } else if (name == "count")
        count_runs(words);
    else if (name == "cmp")
        compare(words);
    else if (name == "registry")
        co_await start_registry(words.size() > 1 ? words[1] : "docker.io");
    else if (name == "http")
        co_await start_http(words.size() > 1 ? words[1] : "www");
    else if (name == "git")
        co_await commit_files(words);
    else if (name == "stdin") {
        if (words.size() != 2) throw wrong("stdin FILE is expected");
        input_ = slurp(path_of(words[1]));
    } else if (name == "base")
        co_await make_base(words.size() > 1 ? words[1] : "busybox");
    else if (name == "image")
        co_await check_image(negated, std::move(words));
    else if (name == "write" || name == "append" || name == "rm" || name == "chmod")
        file_command(words);
    else if (name == "env") {
        for (std::size_t i = 1; i < words.size(); ++i) {
            const auto eq = words[i].find('=');
            if (eq == std::string::npos) throw wrong(cat("env ", words[i], ": NAME=VALUE is expected"));
            variables_[words[i].substr(0, eq)] = words[i].substr(eq + 1);
        }
    } else if (name == "skip") {
        if (words.size() != 3 || words[1] != "unless" || to_lower(words[2]) != "root") throw wrong("only 'skip unless root' is known");
        if (::geteuid() != 0) {
            why_skipped = "needs root";
            co_return false;
        }
    } else {
        static constexpr std::string_view known[] = {"cobuild", "exec", "stdout", "stderr", "exit",   "count", "cmp",   "registry", "http", "git",
                                                     "stdin",   "base", "image",  "write",  "append", "rm",    "chmod", "env",      "skip"};
        const auto near = nearest(name, known);
        throw wrong(cat("unknown command ", quoted(name), near.empty() ? "" : cat(", did you mean ", near, "?")));
    }
    co_return true;
}

async::task<command_result> session::capture(std::vector<std::string> args) {
    process::command c{.args = std::move(args)};
    c.cwd = work_.string();
    std::vector<std::string> env;
    static constexpr std::string_view passed[] = {"PATH", "HOME", "TMPDIR", "LANG", "ASAN_OPTIONS", "TSAN_OPTIONS"};
    for (const auto key : passed)
        if (const char* value = std::getenv(std::string(key).c_str()); value != nullptr && !variables_.contains(std::string(key)))
            env.push_back(cat(key, "=", value));
    for (const auto& [key, value] : variables_) env.push_back(cat(key, "=", value));
    c.env = std::move(env);
    auto done = co_await programs_.capture(
        std::move(c), {.input = std::exchange(input_, {}), .max_output = std::size_t{8} << 20, .time_limit = std::chrono::minutes(5)});
    co_return command_result{done.status.code, std::move(done.out), std::move(done.err)};
}

void session::check_outcome(bool negated, const std::vector<std::string>& words) const {
    if ((last_.code != 0) == negated) return;
    std::string command;
    for (const auto& w : words) command += cat(command.empty() ? "" : " ", w);
    throw wrong(cat(command, negated ? ": succeeded, but must fail" : cat(": exit code ", last_.code), "\n", tail(last_.out), tail(last_.err)));
}

async::task<void> session::run_cobuild(bool negated, std::vector<std::string> words) {
    std::vector<std::string> args{program_};
    args.insert(args.end(), words.begin() + 1, words.end());
    static const std::set<std::string> with_engine{"build", "images", "image", "du", "prune", "registry", "login"};
    if (words.size() > 1 && with_engine.contains(words[1])) {
        const auto given = [&](std::string_view flag) {
            for (const auto& w : words)
                if (w == flag || w.starts_with(cat(flag, "="))) return true;
            return false;
        };
        if (!given("--root")) args.insert(args.end(), {"--root", path_of("root").string()});
        if (!given("--config")) args.insert(args.end(), {"--config", path_of("buildkitd.toml").string()});
        if (words[1] == "build") {
            args.insert(args.end(), arguments_.begin(), arguments_.end());
            if (!given("--progress") && !given("-q")) args.emplace_back("--progress=plain");
        }
    }
    last_ = co_await capture(std::move(args));
    check_outcome(negated, words);
}

async::task<void> session::run_program(bool negated, std::vector<std::string> words) {
    if (words.size() < 2) throw wrong("exec PROGRAM is expected");
    last_ = co_await capture({words.begin() + 1, words.end()});
    check_outcome(negated, words);
}

void session::match(bool negated, const std::vector<std::string>& words, const std::string& text) const {
    if (words.size() != 2) throw wrong(cat(words[0], " REGEX is expected"));
    bool found = false;
    try {
        found = std::regex_search(text, std::regex(words[1], std::regex::ECMAScript | std::regex::multiline));
    } catch (const std::regex_error&) {
        throw wrong(cat(quoted(words[1]), " is no regular expression"));
    }
    if (found == negated) throw wrong(cat(words[0], found ? " matches " : " does not match ", quoted(words[1]), "; it is:\n", tail(text, 40)));
}

void session::count_runs(const std::vector<std::string>& words) const {
    if (words.size() != 3 || words[1] != "runs") throw wrong("count runs N is expected");
    // "#7 [stage 2/3] RUN ..." names a step, "#7 DONE 0.1s" says that it ran.
    std::set<std::string> steps, ran;
    for (const auto l : split(last_.err, '\n')) {
        if (!l.starts_with('#')) continue;
        const std::string number(l.substr(0, l.find(' ')));
        if (l.find("] RUN ") != std::string_view::npos) steps.insert(number);
        if (l.find(" DONE ") == number.size() && steps.contains(number)) ran.insert(number);
    }
    if (cat(ran.size()) != words[2]) throw wrong(cat(ran.size(), " RUN steps ran, expected ", words[2], "\n", tail(last_.err, 40)));
}

void session::compare(const std::vector<std::string>& words) {
    if (words.size() != 3) throw wrong("cmp A B is expected");
    const auto text = [&](const std::string& name) { return name == "stdout" ? last_.out : name == "stderr" ? last_.err : slurp(path_of(name)); };
    const std::string a = text(words[1]), b = text(words[2]);
    if (a == b) return;
    if (updatable.contains(words[2])) {
        updates[words[2]] = a;
        spill(path_of(words[2]), a);
        return;
    }
    throw wrong(cat(words[1], " and ", words[2], " differ:\n--- ", words[1], "\n", tail(a, 30), "--- ", words[2], "\n", tail(b, 30)));
}

async::task<void> session::make_base(std::string name) {
    if (!variables_.contains("REGISTRY")) co_await start_registry("docker.io");
    const auto root = path_of(".base");
    std::optional<std::string> busybox;
    for (const auto* candidate : {"/bin/busybox", "/usr/bin/busybox"})
        if (stdfs::exists(candidate)) busybox = candidate;
    if (!busybox) throw wrong("base needs a static busybox in /bin (Debian's busybox-static)");
    for (const auto* dir : {"bin", "etc", "tmp", "root"}) stdfs::create_directories(root / "rootfs" / dir);
    stdfs::copy_file(*busybox, root / "rootfs/bin/busybox", stdfs::copy_options::overwrite_existing);
    const auto applets = co_await capture({*busybox, "--list"});
    for (const auto applet : split(applets.out, '\n')) {
        std::error_code exists;
        if (!applet.empty() && applet != "busybox") stdfs::create_symlink("busybox", root / "rootfs/bin" / applet, exists);
    }
    spill(root / "rootfs/etc/passwd", "root:x:0:0:root:/root:/bin/sh\nguest:x:405:100:guest:/tmp:/bin/sh\n");
    spill(root / "rootfs/etc/group", "root:x:0:\nusers:x:100:\n");
    ::chmod((root / "rootfs/tmp").c_str(), 01777);
    spill(root / "Dockerfile", "FROM scratch\nCOPY rootfs /\nENV PATH=/bin\nCMD [\"sh\"]\n");
    const std::string target = cat(variables_["REGISTRY"], "/", name.find('/') == std::string::npos ? "library/" : "", name);
    const auto made = co_await capture({program_, "build", root.string(), "-t", target, "--push", "--root", path_of(".base-root").string(),
                                        "--config", path_of("buildkitd.toml").string(), "--progress=plain"});
    if (made.code != 0) throw wrong(cat("base ", name, ": the image could not be made\n", tail(made.err)));
}

async::task<void> session::check_image(bool negated, std::vector<std::string> words) {
    if (words.size() < 4) throw wrong("image NAME path PATH ... or image NAME config REGEX is expected");
    const auto view = co_await pool_.run([&] { return read_image(path_of("root"), words[1], pool_); });
    if (words[2] == "config") {
        match(negated, {"config", words[3]}, view.config);
        co_return;
    }
    if (words[2] != "path") throw wrong(cat("image ", words[1], " ", words[2], ": path or config is expected"));
    std::string path = words[3];
    while (path.starts_with('/')) path.erase(0, 1);
    while (path.ends_with('/')) path.pop_back();
    const auto at = view.files.find(path);
    if (words.size() % 2 != 0) throw wrong(cat("image ... path ... ", words.back(), ": a value is missing"));
    if (negated) {
        if (words.size() > 4) throw wrong("! image NAME path PATH is expected");
        if (at != view.files.end()) throw wrong(cat(words[1], " has ", words[3], ", but must not"));
        co_return;
    }
    if (at == view.files.end()) throw wrong(cat(words[1], " has no ", words[3]));
    const auto& f = at->second;
    for (std::size_t i = 4; i + 1 < words.size(); i += 2) {
        char mode[16];
        std::snprintf(mode, sizeof mode, "%04o", f.mode);
        const std::string& key = words[i];
        const std::string found = key == "mode"      ? mode
                                  : key == "owner"   ? cat(f.uid, ":", f.gid)
                                  : key == "content" ? f.content
                                  : key == "link"    ? f.link
                                  : key == "type"    ? f.type
                                                  : throw wrong(cat("image ... path ... ", key, ": mode, owner, content, link or type is expected"));
        const bool same = found == words[i + 1] || (key == "content" && found == words[i + 1] + "\n");
        if (!same) throw wrong(cat(words[1], " ", words[3], ": ", key, " is ", quoted(found), ", expected ", quoted(words[i + 1])));
    }
}

void session::file_command(const std::vector<std::string>& words) {
    const std::string& name = words[0];
    if (words.size() != (name == "rm" ? 2U : 3U))
        throw wrong(name == "rm"      ? "rm FILE is expected"
                    : name == "chmod" ? "chmod MODE FILE is expected"
                                      : cat(name, " FILE TEXT is expected, a text with blanks in quotes"));
    if (name == "rm") {
        if (stdfs::remove_all(path_of(words[1])) == 0) throw wrong(cat("rm ", words[1], ": there is no such file"));
    } else if (name == "chmod") {
        unsigned mode = 0;
        const auto& text = words[1];
        const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), mode, 8);
        if (failed != std::errc{} || end != text.data() + text.size() || mode > 07777)
            throw wrong(cat("chmod ", text, ": an octal mode is expected"));
        if (::chmod(path_of(words[2]).c_str(), static_cast<mode_t>(mode)) != 0) throw_errno(cat("chmod ", words[2]));
    } else {
        spill(path_of(words[1]), words[2] + "\n", name == "append");
    }
}

async::task<void> session::finish() {
    for (auto& c : children_) {
        c.signal(15);
        co_await c.wait();
    }
    children_.clear();
}

}  // namespace cobuild::script
