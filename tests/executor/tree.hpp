// A root to run steps on: busybox as the lower layer, overlay mounts over it. Include before any import.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace cobuild::test {

/// /bin with busybox and its usual names, /etc with users, /tmp, /home/joe.
void busybox_tree(const std::filesystem::path& base);
/// A detached overlay of dir/base with dir/upper<n> as its writable layer; the caller owns the descriptor.
int overlay_root(const std::filesystem::path& dir, int n);
/// Processes of this machine whose command line holds the word.
std::vector<int> pids_with(const std::string& word);

}  // namespace cobuild::test
