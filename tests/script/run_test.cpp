// Scenarios run with a stand-in for cobuild: a shell script that shows its arguments and exits as told.
#include "support/support.hpp"

#include <algorithm>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

import cobuild.base;
import cobuild.async;
import cobuild.script;

using namespace cobuild;
using namespace cobuild::async;
using script::verdict;

namespace {

struct bench {
    test::scratch_dir dir;
    std::filesystem::path program = dir / "stand-in";
    bench() {
        test::write_file(program,
                         "#!/bin/sh\ncase $1 in fail) echo out; echo err >&2; exit 7;; steps) printf '#1 [1/2] RUN a\\n#1 DONE 0.1s\\n#2 [2/2] RUN "
                         "b\\n#2 CACHED\\n#3 [x] COPY\\n#3 DONE 0.1s\\n' >&2;; *) echo \"args: $@\";; esac\n");
        std::filesystem::permissions(program, std::filesystem::perms(0755));
    }
    task<script::outcome> run(runtime& rt, std::string text, script::options o = {}) {
        test::write_file(dir / "s.txtar", text);
        o.program = program.string();
        std::vector<std::filesystem::path> files{dir / "s.txtar"};
        auto out = co_await script::run(std::move(files), std::move(o), rt, {});
        BOOST_TEST_MESSAGE(out.at(0).message);
        co_return out.at(0);
    }
};

bool says(const script::outcome& o, std::string_view part) { return o.message.find(part) != std::string::npos; }

}  // namespace

CO_TEST_CASE(what_holds_passes) {
    bench b;
    const auto out = co_await b.run(rt, R"(# every command once
cobuild build ctx
stdout "^args: build ctx --root .*/root --config .*/buildkitd.toml --extra --progress=plain$"
exit 0
cobuild version
stdout "^args: version$"
! stdout root
! cobuild fail
exit 7
stdout ^out$
stderr ^err$
! stderr out
cobuild steps
count runs 1
exec cat ctx/f
cmp stdout ctx/f
! exec false
write new/file "two words"
append new/file more
exec cat new/file
cmp stdout expected
chmod 640 new/file
exec stat -c %a new/file
stdout ^640$
rm new
! exec test -e new
env A=b C=$WORK/d
exec sh -c "echo $A $C $UNKNOWN"
stdout "^b .*/d"
exec printenv C
stdout /d$
cobuild build --root=elsewhere ctx
! stdout "/root --config"
-- ctx/f --
text
-- expected --
two words
more
)",
                                    {.program = {}, .arguments = {"--extra"}});
    BOOST_TEST((out.verdict == verdict::passed), out.message);
    BOOST_TEST(out.message == "");
}

// Every way to fail says where and what.
CO_TEST_CASE(what_does_not_hold_fails) {
    bench b;
    const std::vector<std::pair<std::string, std::string>> table{
        {"cobuild fail", "exit code 7"},
        {"! cobuild version", "must fail"},
        {"exec false", "exit code 1"},
        {"! exec true", "must fail"},
        {"exec", "exec PROGRAM is expected"},
        {"exec no-such-program-here", "no-such-program-here"},
        {"stdout nothing", "does not match \"nothing\""},
        {"! stdout args", "matches \"args\""},
        {"stderr x", "stderr does not match"},
        {"stdout", "REGEX is expected"},
        {"stdout (", "no regular expression"},
        {"exit 3", "exit code 0, expected 3"},
        {"exit", "exit CODE is expected"},
        {"count runs 1", "0 RUN steps ran, expected 1"},
        {"count 1", "count runs N is expected"},
        {"cmp stdout f", "differ"},
        {"cmp f", "cmp A B is expected"},
        {"cmp f none", "none cannot be read"},
        {"write f", "write FILE TEXT is expected"},
        {"write f two words", "write FILE TEXT is expected"},
        {"rm none", "no such file"},
        {"chmod rw f", "octal"},
        {"chmod 644 none", "chmod none"},
        {"env A", "NAME=VALUE is expected"},
        {"skip unless tuesday", "only 'skip unless root' is known"},
        {"image x", "is expected"},
        {"image x path /y", "no image x"},
        {"! cmp f f", "'!' means nothing before cmp"},
        {"! exit 0", "'!' means nothing before exit"},
        {"stdput x", "did you mean stdout?"},
        {"frobnicate", "unknown command \"frobnicate\""},
    };
    for (const auto& [line, expected] : table) {
        const auto out = co_await b.run(rt, cat("cobuild version\n\n", line, "\n-- f --\ntext\n"));
        BOOST_TEST((out.verdict == verdict::failed), line);
        BOOST_TEST(says(out, expected), line << ": " << out.message);
        BOOST_TEST(says(out, cat((b.dir / "s.txtar").string(), ":3: ")), line << ": " << out.message);
    }
    const auto unparsed = co_await b.run(rt, "exec a\nexec \"b\n");
    BOOST_TEST((unparsed.verdict == verdict::failed));
    BOOST_TEST(says(unparsed, "s.txtar:2: "));
}

CO_TEST_CASE(update_rewrites_the_files_that_cmp_names_and_nothing_else) {
    bench b;
    const std::string head = "# compares; see -- want --\ncobuild version\ncmp stdout want\ncmp stdout want\n-- other --\nkept  \n\n-- want --\n";
    const script::options update{.program = {}, .update = true};
    for (const auto* old : {"stale\n", "stale", "", "several\nlines\n"}) {
        const auto out = co_await b.run(rt, cat(head, old), update);
        BOOST_TEST((out.verdict == verdict::passed), out.message);
        BOOST_TEST(test::read_file(b.dir / "s.txtar") == cat(head, "args: version\n"));
        BOOST_TEST(((co_await b.run(rt, test::read_file(b.dir / "s.txtar"))).verdict == verdict::passed));
    }
    // Files in front of others, a marker at the very end of the text, a name with blanks around it.
    for (const auto& [before, after] :
         std::vector<std::pair<std::string, std::string>>{{"x\n-- tail --\nt\n", "-- tail --\nt\n"}, {"-- tail --", "-- tail --"}}) {
        (void)co_await b.run(rt, cat(head, before), update);
        BOOST_TEST(test::read_file(b.dir / "s.txtar") == cat(head, "args: version\n", after));
    }
    (void)co_await b.run(rt, "cobuild version\ncmp stdout want\n--  want  --", update);
    BOOST_TEST(test::read_file(b.dir / "s.txtar") == "cobuild version\ncmp stdout want\n--  want  --\nargs: version\n");
    // What is no file of the scenario cannot be accepted.
    const auto made = co_await b.run(rt, "cobuild version\nwrite made x\ncmp stdout made\n", update);
    BOOST_TEST((made.verdict == verdict::failed));
    // A failing scenario is left alone.
    const std::string failing = "cobuild version\ncmp stdout want\nexec false\n-- want --\nold\n";
    (void)co_await b.run(rt, failing, update);
    BOOST_TEST(test::read_file(b.dir / "s.txtar") == failing);
}

CO_TEST_CASE(directories_go_or_are_kept) {
    bench b;
    const auto gone = co_await b.run(rt, "exec pwd\nstdout none\n");
    const auto at = gone.message.find("/cobuild-scenario-");
    BOOST_REQUIRE(at != std::string::npos);
    const auto start = gone.message.rfind('\n', at);
    BOOST_TEST(!std::filesystem::exists(gone.message.substr(start + 1, gone.message.find('\n', at) - start - 1)));
    const auto kept = co_await b.run(rt, "write f text\n", {.program = {}, .keep = true});
    const std::string mark = "kept in ";
    BOOST_REQUIRE(kept.message.starts_with(mark));
    const std::filesystem::path left = kept.message.substr(mark.size());
    BOOST_TEST(test::read_file(left / "f") == "text\n");
    std::filesystem::remove_all(left);
}

CO_TEST_CASE(many_at_once_and_each_reported) {
    bench b;
    std::vector<std::filesystem::path> files;
    for (int i = 0; i < 6; ++i) {
        files.push_back(b.dir / cat(i, ".txtar"));
        test::write_file(files.back(), i % 2 == 0 ? "exec true\n" : "exec false\n");
    }
    files.push_back(b.dir / "missing.txtar");
    std::vector<std::string> told;
    const auto out =
        co_await script::run(files, {.program = b.program.string(), .parallel = 3}, rt, [&](const script::outcome& o) { told.push_back(o.name); });
    BOOST_TEST(out.size() == 7U);
    BOOST_TEST(told.size() == 7U);
    BOOST_TEST(std::count_if(out.begin(), out.end(), [](const auto& o) { return o.verdict == verdict::passed; }) == 3);
    for (std::size_t i = 0; i < out.size(); ++i) BOOST_TEST(out[i].name == told[i]);
}
