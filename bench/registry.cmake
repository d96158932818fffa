add_executable(bench_registry registry_bench.cpp)
target_link_libraries(bench_registry PRIVATE cobuild::registry cobuild::http cobuild::oci cobuild::async cobuild::base cobuild_fake_registry cobuild_warnings)
