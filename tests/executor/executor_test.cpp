#include "executor/contract.hpp"
#include "support/support.hpp"

#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

import cobuild.base;
import cobuild.async;
import cobuild.process;
import cobuild.executor;

using namespace cobuild;

namespace {

test::make_runner runner_of(std::string binary) {
    return [binary](void* rt, void* programs, const std::string& work_dir) -> void* {
        try {
            return executor::open_oci_runner(*static_cast<async::runtime*>(rt), *static_cast<process::spawner*>(programs),
                                             {.binary = binary, .work_dir = work_dir, .owner = "contract-test"})
                .release();
        } catch (const error& e) {
            BOOST_TEST_MESSAGE(e.what());
            return nullptr;
        }
    };
}

[[maybe_unused]] const bool registered = [] {
    test::register_executor_contract("runc", runner_of("runc"));
    test::register_executor_contract("crun", runner_of("crun"));
    return true;
}();

}  // namespace
