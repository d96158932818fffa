// How a coroutine failed, for tests that assert errors. Includes nothing; stands after the imports, of cobuild.base and
// cobuild.async among them.
#pragma once

namespace cobuild::test {

/// What `t` threw; errc::internal when it did not fail.
template<class T>
async::task<error> failure(async::task<T> t) {
    std::exception_ptr thrown;
    try {
        co_await std::move(t);
    } catch (...) {
        thrown = std::current_exception();
    }
    co_return thrown ? describe(thrown) : error{errc::internal, "no failure"};
}

/// Whether the sentence has this part; otherwise the sentence is shown.
inline bool says(const error& e, std::string_view part) {
    const bool found = std::string_view(e.what()).find(part) != std::string_view::npos;
    if (!found) BOOST_TEST_MESSAGE("the error says: " << e.what());
    return found;
}

}  // namespace cobuild::test
