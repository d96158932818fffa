add_executable(bench_frontend frontend.cpp)
target_link_libraries(bench_frontend PRIVATE cobuild::frontend cobuild::gateway cobuild::dockerfile cobuild::llb cobuild::oci cobuild::fs cobuild::async cobuild::base
                                             cobuild_warnings)
