#include "support/support.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

import cobuild.base;
import cobuild.fs;
import cobuild.archive;

#include "layers.hpp"

using namespace layers;
using namespace cobuild::test;
using texts = std::vector<std::string>;

namespace {

/// What is in a directory, a word each: "name/" directories, "-name" whiteouts, "name=text" files.
texts shown(int dir) {
    texts out;
    fs::walk(dir, [&](const fs::walk_entry& e) {
        std::string path(e.path);
        if (e.info.is_whiteout())
            out.push_back("-" + path);
        else if (e.info.is_dir())
            out.push_back(path + "/");
        else if (e.info.is_link())
            out.push_back(path + ">" + fs::read_link_at(e.dir_fd, e.name));
        else
            out.push_back(path + "=" + fs::read_all(unique_fd{::openat(e.dir_fd, std::string(e.name).c_str(), O_RDONLY | O_CLOEXEC)}.get(), 1 << 16));
        return fs::walk_step::go_on;
    });
    return out;
}

struct trees {
    scratch_dir d;
    unique_fd lower = open_dir(d / "lower"), upper = open_dir(d / "upper"), out = open_dir(d / "out");
    lower_chain chain{{lower.get()}};
    void shell(const std::string& script) {
        write_file(d / "script", "set -e\ncd " + d.path().string() + "\n" + script + "\n");
        BOOST_REQUIRE(std::system(cat("sh ", (d / "script").string()).c_str()) == 0);
    }
    /// The kernel's overlayfs writes the upper directory.
    void overlay(const std::string& script) {
        write_file(d / "script", "set -e\ncd " + d.path().string() +
                                     "\nmkdir work m\nmount -t overlay -o "
                                     "redirect_dir=off,metacopy=off,index=off,xino=off,lowerdir=lower,upperdir=upper,workdir=work overlay m\ncd m\n" +
                                     script + "\n");
        BOOST_REQUIRE(std::system(cat("unshare -m sh ", (d / "script").string()).c_str()) == 0);
    }
    texts diff(bool whole) {
        diff_directory(upper.get(), chain, out.get(), whole);
        return shown(out.get());
    }
};

}  // namespace

BOOST_AUTO_TEST_SUITE(diff_directories)

// A step's mounts leave copies of /etc that are as they were, and a file that went away and came back is copied up as well.
BOOST_AUTO_TEST_CASE(copies_without_a_change_and_marks_are_left_out) {
    if (!needs_root()) return;
    trees t;
    t.shell("mkdir -p lower/etc lower/d; echo 1 > lower/etc/a; echo 2 > lower/d/old; echo 3 > lower/d/kept; chmod 750 lower/d");
    t.overlay("touch etc/stub; rm etc/stub; touch -r d/old stamp; mv etc/a x; mv x etc/a; rm stamp; rm -r d; mkdir d; chmod 750 d; echo new > d/new");
    BOOST_TEST(!tells_changes_only(t.upper.get(), t.chain));
    BOOST_TEST(t.diff(false) == (texts{"d/", "-d/kept", "d/new=new\n", "-d/old"}), boost::test_tools::per_element());
    BOOST_TEST(tells_changes_only(t.out.get(), t.chain));
    BOOST_TEST(!fs::get_xattr(t.out.get(), "d", "trusted.overlay.opaque").has_value());
    BOOST_TEST(fs::stat_at(t.out.get(), "d")->permissions() == 0750U);
    // Layers never change: files are shared between them.
    BOOST_TEST(fs::stat_at(t.out.get(), "d/new")->inode == fs::stat_at(t.upper.get(), "d/new")->inode);
}

BOOST_AUTO_TEST_CASE(a_layer_of_changes_alone_is_taken_as_it_is) {
    if (!needs_root()) return;
    trees t;
    t.shell("mkdir lower/d; echo 1 > lower/d/a; echo 2 > lower/d/b");
    t.overlay("echo more > d/c; rm d/a");
    BOOST_TEST(tells_changes_only(t.upper.get(), t.chain));
}

BOOST_AUTO_TEST_CASE(whole_trees_are_compared) {
    if (!needs_root()) return;
    trees t;
    t.shell(
        "mkdir -p lower/same lower/mode lower/gone/below lower/to-file; echo 1 > lower/same/f; echo 2 > lower/gone/below/g; ln -s x lower/link; "
        "echo 3 > lower/to-dir; cp -a lower/. upper/; rm -r upper/gone upper/to-file upper/to-dir; chmod 700 upper/mode; echo 4 > upper/to-file; "
        "mkdir upper/to-dir; echo 5 > upper/to-dir/in; echo 6 > upper/one; ln upper/one upper/two; ln -sfn y upper/link");
    BOOST_TEST(t.diff(true) == (texts{"-gone", "link>y", "mode/", "one=6\n", "to-dir/", "to-dir/in=5\n", "to-file=4\n", "two=6\n"}),
               boost::test_tools::per_element());
    BOOST_TEST(fs::stat_at(t.out.get(), "mode")->permissions() == 0700U);
    BOOST_TEST(fs::stat_at(t.out.get(), "one")->inode == fs::stat_at(t.out.get(), "two")->inode);
    BOOST_TEST(fs::stat_at(t.out.get(), "one")->inode != fs::stat_at(t.upper.get(), "one")->inode);
}

// Of a tree on nothing: all that is there is deleted.
BOOST_AUTO_TEST_CASE(an_empty_tree_deletes_everything) {
    if (!needs_root()) return;
    trees t;
    t.shell("mkdir -p lower/d/e; echo 1 > lower/d/e/f; echo 2 > lower/g; rm -rf upper; mkdir upper");
    const auto upper = open_dir(t.d / "upper");
    diff_directory(upper.get(), t.chain, t.out.get(), true);
    BOOST_TEST(shown(t.out.get()) == (texts{"-d", "-g"}), boost::test_tools::per_element());
}

BOOST_AUTO_TEST_SUITE_END()
