#include <cstdint>
#include "frontend/fixture.hpp"

using namespace frontend_test;

BOOST_AUTO_TEST_SUITE(copy)

BOOST_AUTO_TEST_CASE(a_plain_copy) {
    const auto o = build("FROM busybox\nWORKDIR /w\nCOPY a b/* dir/\n");
    const auto& v = o.step("[3/3] COPY a b/* dir/");
    const auto& f = std::get<llb::file_op>(v.what.what);
    BOOST_REQUIRE(f.actions.size() == 2U);
    BOOST_REQUIRE(v.what.inputs.size() == 2U);
    BOOST_TEST((v.what.inputs[0].vertex == o.step("[2/3] WORKDIR /w").id));
    BOOST_TEST((v.what.inputs[1].vertex == o.step("[internal] load build context").id));
    BOOST_TEST(f.actions[0].input == 0);
    BOOST_TEST(f.actions[0].secondary_input == 1);
    BOOST_TEST(f.actions[0].output == llb::no_output);
    BOOST_TEST(f.actions[1].input == 2);  // the first action's result
    BOOST_TEST(f.actions[1].output == 0);
    const auto& c = o.copy("[3/3] COPY a b/* dir/", 1);
    BOOST_TEST(c.src == "/b/*");
    BOOST_TEST(c.dest == "/w/dir/");
    BOOST_TEST(c.mode == -1);
    BOOST_TEST(c.timestamp == -1);
    BOOST_TEST((c.follow_symlink && c.dir_copy_contents && c.create_dest_path && c.allow_wildcard && c.allow_empty_wildcard && !c.attempt_unpack));
    BOOST_TEST(!v.what.platform.has_value());
}

BOOST_AUTO_TEST_CASE(destinations) {
    const auto dest = [](std::string_view d) { return build(cat("FROM busybox\nWORKDIR /w\nCOPY a ", d, "\n")).copy(cat("[3/3] COPY a ", d)).dest; };
    BOOST_TEST(dest("b") == "/w/b");
    BOOST_TEST(dest(".") == "/w/");
    BOOST_TEST(dest("./") == "/w/");
    BOOST_TEST(dest("b/") == "/w/b/");
    BOOST_TEST(dest("/b//c/") == "/b/c/");
    BOOST_TEST(dest("/") == "/");
    BOOST_TEST(dest("../x") == "/x");
    BOOST_TEST(dest("b/.") == "/w/b/.");
}

BOOST_AUTO_TEST_CASE(the_context_is_asked_for_what_is_used) {
    const auto o = build("FROM busybox\nCOPY b a/../c /x/\nADD d.tar /y/\nCOPY --from=busybox /q /q\n");
    const auto& attrs = o.context().attrs;
    BOOST_TEST(o.context().identifier == "local://context");
    BOOST_TEST(attrs.at("local.followpaths") == R"(["b","c","d.tar"])");
    BOOST_TEST(attrs.at("local.sharedkeyhint") == "context");
    BOOST_TEST(!attrs.contains("local.excludepatterns"));
    const auto all = build("FROM busybox\nCOPY b /x/\nCOPY . /y/\n", [](auto& r, auto&) { r.ignore_file = "# c\n/out/\n\n!out/<keep>\n"; });
    BOOST_TEST(!all.context().attrs.contains("local.followpaths"));
    BOOST_TEST(all.context().attrs.at("local.excludepatterns") == R"(["out","!out/\u003ckeep\u003e"])");
    // What is not built asks for nothing.
    const auto part = build("FROM busybox AS no\nCOPY . /\nFROM busybox\nCOPY b /x/\n");
    BOOST_TEST(part.context().attrs.at("local.followpaths") == R"(["b"])");
}

BOOST_AUTO_TEST_CASE(owner_and_mode) {
    const auto one = build("FROM busybox\nCOPY --chown=app:0 --chmod=4755 a /\n").copy("[2/2] COPY --chown=app:0 --chmod=4755 a /");
    BOOST_TEST(std::get<llb::named_user>(*one.owner->user).name == "app");
    BOOST_TEST(std::get<llb::named_user>(*one.owner->user).input == 0);
    BOOST_TEST(std::get<std::uint32_t>(*one.owner->group) == 0U);
    BOOST_TEST(one.mode == 04755);
    const auto symbolic = build("FROM busybox\nCOPY --chown=root --chmod=u=rwX,go=rX a /\n").copy("[2/2] COPY --chown=root --chmod=u=rwX,go=rX a /");
    BOOST_TEST(symbolic.mode_str == "u=rwX,go=rX");
    BOOST_TEST(symbolic.mode == -1);
    BOOST_TEST(std::get<std::uint32_t>(*symbolic.owner->user) == 0U);
    BOOST_TEST(!symbolic.owner->group.has_value());
    for (const auto* bad : {"17777", "999", "rwx", "u~x", "u=z"}) {
        const auto e = failure(cat("FROM busybox\nCOPY --chmod=", bad, " a /\n"));
        BOOST_TEST(says(e, cat("invalid chmod parameter: '", bad, "'")));
        BOOST_TEST(e.where()->line == 2U);
    }
}

BOOST_AUTO_TEST_CASE(link_is_a_copy_onto_nothing_and_a_merge) {
    const auto o = build("FROM busybox\nCOPY --link --chown=app a /x\n");
    const auto& copied = o.step("[2/2] COPY --link --chown=app a /x");
    BOOST_TEST(std::get<llb::file_op>(copied.what.what).actions.at(0).input == llb::scratch);
    BOOST_TEST(std::get<llb::named_user>(*o.copy("[2/2] COPY --link --chown=app a /x").owner->user).input == llb::scratch);
    BOOST_TEST(copied.meta.progress_group->weak);
    const auto& merged = o.step("[2/2] LINK COPY --link --chown=app a /x");
    BOOST_TEST((std::get<llb::merge_op>(merged.what.what).inputs == std::vector<std::int64_t>{0, 1}));
    BOOST_TEST((merged.what.inputs.at(1).vertex == copied.id));
    BOOST_TEST(!merged.meta.progress_group->weak);
    BOOST_TEST(merged.meta.progress_group->id == copied.meta.progress_group->id);
    // With --chmod it is a plain copy; onto scratch there is nothing to merge with.
    BOOST_TEST(build("FROM busybox\nCOPY --link --chmod=644 a /x\n").steps().size() == 3U);
    BOOST_TEST(build("FROM scratch\nCOPY --link a /x\n").steps().size() == 2U);
}

BOOST_AUTO_TEST_CASE(parents_and_exclude) {
    const auto c = build("FROM busybox\nCOPY --parents --exclude=*.o --exclude=tmp x/./y/z /d/\n")
                       .copy("[2/2] COPY --parents --exclude=*.o --exclude=tmp x/./y/z /d/");
    BOOST_TEST(c.src == "/x");
    BOOST_TEST(c.include_patterns == strings{"y/z"}, boost::test_tools::per_element());
    BOOST_TEST(c.required_paths == strings{"/x/y/z"}, boost::test_tools::per_element());
    BOOST_TEST(c.exclude_patterns == (strings{"*.o", "tmp"}), boost::test_tools::per_element());
    const auto all = build("FROM busybox\nCOPY --parents src/**/*.c /d/\n").copy("[2/2] COPY --parents src/**/*.c /d/");
    BOOST_TEST(all.src == "/");
    BOOST_TEST(all.include_patterns == strings{"src/**/*.c"}, boost::test_tools::per_element());
    BOOST_TEST(all.required_paths.empty());
}

BOOST_AUTO_TEST_CASE(inline_documents) {
    const auto o = build("FROM busybox\nENV V=val\nCOPY <<one <<\"two\" /d/\n$V \\$V \"q\"\none\n$V\ntwo\n");
    const auto& v = o.graph.vertices.back();
    const auto& f = std::get<llb::file_op>(v.what.what);
    BOOST_REQUIRE(f.actions.size() == 2U);
    BOOST_TEST(std::get<llb::copy_action>(f.actions[0].what).src == "/one");
    BOOST_TEST(std::get<llb::copy_action>(f.actions[0].what).dest == "/d/");
    BOOST_TEST(!std::get<llb::copy_action>(f.actions[0].what).allow_wildcard);
    std::map<std::string, llb::mkfile_action> files;
    for (const auto& x : o.graph.vertices) {
        if (const auto* made = std::get_if<llb::file_op>(&x.what.what)) {
            if (const auto* file = std::get_if<llb::mkfile_action>(&made->actions.at(0).what)) files[file->path] = *file;
        }
    }
    BOOST_TEST(files.at("/one").data == "val $V \"q\"\n");
    BOOST_TEST(files.at("/one").mode == 0644);
    BOOST_TEST(files.at("/two").data == "$V\n");
    BOOST_TEST(o.history().back() == "COPY <<one <<two /d/ # buildkit");
}

BOOST_AUTO_TEST_CASE(add_of_local_files_unpacks) {
    BOOST_TEST(build("FROM busybox\nADD a.tar /\n").copy("[2/2] ADD a.tar /").attempt_unpack);
    BOOST_TEST(!build("FROM busybox\nADD --unpack=false a.tar /\n").copy("[2/2] ADD --unpack=false a.tar /").attempt_unpack);
    BOOST_TEST(build("FROM busybox\nADD a.tar /\n").history().back() == "ADD a.tar / # buildkit");
}

// The attributes and copies that BuildKit's own frontend writes.
BOOST_AUTO_TEST_CASE(add_of_what_has_to_be_fetched) {
    const auto source = [](const outcome& o, std::string_view scheme) -> llb::source_op {
        for (const auto& v : o.graph.vertices)
            if (const auto* s = std::get_if<llb::source_op>(&v.what.what); s != nullptr && s->identifier.starts_with(scheme)) return *s;
        BOOST_FAIL("no such source");
        throw 0;
    };
    const auto copy = [](const outcome& o) {
        for (const auto& v : o.graph.vertices)
            if (const auto* f = std::get_if<llb::file_op>(&v.what.what)) return std::get<llb::copy_action>(f->actions.at(0).what);
        throw 0;
    };
    const auto url = build("FROM scratch\nADD https://example.com/d/x.tar?a=b /to/\n");
    BOOST_TEST(source(url, "https://").identifier == "https://example.com/d/x.tar?a=b");
    BOOST_TEST(source(url, "https://").attrs.at("http.filename") == "x.tar");
    BOOST_TEST(copy(url).src == "/x.tar");
    BOOST_TEST(copy(url).dest == "/to/");
    BOOST_TEST(!copy(url).attempt_unpack);
    BOOST_TEST(copy(build("FROM scratch\nADD --unpack https://example.com/x.tar /\n")).attempt_unpack);
    BOOST_TEST(source(build("FROM scratch\nADD https://example.com/ /\n"), "https://").attrs.at("http.filename") == "__unnamed__");
    const auto sum = cat("sha256:", std::string(64, 'a'));
    BOOST_TEST(source(build(cat("FROM scratch\nADD --checksum=", sum, " http://h/x /\n")), "http://").attrs.at("http.checksum") == sum);

    const auto git = source(build("FROM scratch\nADD --keep-git-dir --checksum=0123abc https://u@h/x.git#v1:sub /to\n"), "git://");
    BOOST_TEST(git.identifier == "git://h/x.git#v1:sub");
    BOOST_TEST(git.attrs.at("git.fullurl") == "https://u@h/x.git");
    BOOST_TEST(git.attrs.at("git.keepgitdir") == "true");
    BOOST_TEST(git.attrs.at("git.checksum") == "0123abc");
    BOOST_TEST(git.attrs.at("git.authtokensecret") == "GIT_AUTH_TOKEN");
    BOOST_TEST(source(build("FROM scratch\nADD git@h:x.git /to\n"), "git://").attrs.at("git.mountsshsock") == "default");
    for (const auto* bad : {"ADD --checksum=md5:1 http://h/x /", "ADD --checksum=sha256:xyz https://h/x.git /", "ADD https://h/x.git#-x /",
                            "ADD --keep-git-dir=false https://h/x.git?keep-git-dir=1 /"}) {
        const auto e = failure(cat("FROM scratch\n", bad, "\n"));
        BOOST_TEST((e.kind() == errc::invalid), bad);
        BOOST_TEST(e.where()->line == 2U);
    }
    BOOST_TEST(build("FROM busybox\nADD github.com/x/y a@b /z/\n").context().attrs.at("local.followpaths") == R"(["a@b","github.com/x/y"])");
    BOOST_TEST((failure("FROM busybox\nCOPY http://h/x /\n").kind() == errc::invalid));
    BOOST_TEST(says(failure("FROM busybox\nADD --checksum=sha256:aa a /\n"), "checksum requires HTTP(S) or Git sources"));
}

BOOST_AUTO_TEST_CASE(o_cp_08_a_path_outside_the_context_is_refused) {
    for (const auto* source : {"../file", "..", "a/../../b"}) {
        const auto e = failure(cat("FROM busybox\nCOPY ", source, " /\n"));
        BOOST_TEST(says(e, "is outside of the build context"));
        BOOST_TEST(e.where()->line == 2U);
    }
    // In a stage ".." stops at its root.
    BOOST_TEST(build("FROM busybox\nCOPY --from=busybox ../x /\n").copy("[2/2] COPY --from=busybox ../x /").src == "/x");
}

BOOST_AUTO_TEST_CASE(o_cp_05_names_are_bytes) {
    BOOST_TEST(build("FROM busybox\nCOPY gr\xc3\xbc\xc3\x9f/\xe6\x97\xa5 /\n").context().attrs.at("local.followpaths") ==
               "[\"gr\xc3\xbc\xc3\x9f/\xe6\x97\xa5\"]");
}

BOOST_AUTO_TEST_CASE(o_cp_03_brackets_stay_a_pattern) {
    BOOST_TEST(build("FROM busybox\nCOPY [\"arr[[]0].txt\", \"/x\"]\n").context().attrs.at("local.followpaths") == R"(["arr[[]0].txt"])");
}

BOOST_AUTO_TEST_CASE(copies_of_ignored_files_are_warned_of) {
    const auto ignore = [](std::string text) { return [text](auto& r, auto&) { r.ignore_file = text; }; };
    BOOST_TEST(build("FROM busybox\nCOPY a b /\n", ignore("a\n")).warnings() == "CopyIgnoredFile:2 ");
    BOOST_TEST(build("FROM busybox\nADD d/x /\n", ignore("d\n")).warnings() == "CopyIgnoredFile:2 ");
    BOOST_TEST(build("FROM busybox\nCOPY . /\n", ignore("a\n")).warnings() == "");
    BOOST_TEST(build("FROM busybox\nCOPY . /\n", ignore("**\n")).warnings() == "CopyIgnoredFile:2 ");
    BOOST_TEST(build("FROM busybox\nCOPY a /\n", ignore("a\n!a/b\n")).warnings() == "");
    BOOST_TEST(build("FROM busybox AS x\nRUN x\nFROM busybox\nCOPY --from=x a /\n", ignore("a\n")).warnings() == "");
}

BOOST_AUTO_TEST_CASE(equal_files_give_equal_graphs) {
    const auto text = "FROM busybox\nCOPY a /a\nRUN --mount=type=cache,target=/c x\n";
    BOOST_TEST(llb::marshal(build(text).r.graph) == llb::marshal(build(text).r.graph));
}

BOOST_AUTO_TEST_SUITE_END()
