add_executable(bench_archive archive.cpp)
target_link_libraries(bench_archive PRIVATE cobuild::archive cobuild::fs cobuild::base cobuild_warnings)
