# For bench/registry.py.
add_executable(bench_fetch fetch.cpp)
target_link_libraries(bench_fetch PRIVATE cobuild::registry cobuild::archive cobuild::http cobuild::oci cobuild::async cobuild::base cobuild_warnings)
add_executable(bench_relay relay.cpp)
target_include_directories(bench_relay PRIVATE ${PROJECT_SOURCE_DIR}/tests)
target_link_libraries(bench_relay PRIVATE cobuild_warnings)
