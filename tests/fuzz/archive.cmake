cobuild_fuzzer(tar SOURCE fuzz_tar.cpp IMPORTS archive fs base)
cobuild_fuzzer(ignore SOURCE fuzz_ignore.cpp IMPORTS fs base)
