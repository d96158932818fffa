// The suite that every implementation of executor::runner passes. Include before any import.
#pragma once

#include <functional>
#include <string>

#include <boost/test/unit_test.hpp>

namespace cobuild::test {

/// Registers every case under "<name>/<case>". `make` returns a new runner (executor::runner*) for a runtime, a spawner and a
/// work directory, as void pointers, because a header cannot name what modules export; null skips the case.
using make_runner = std::function<void*(void* runtime, void* spawner, const std::string& work_dir)>;
void register_executor_contract(const std::string& name, make_runner make);

}  // namespace cobuild::test
