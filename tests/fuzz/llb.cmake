cobuild_fuzzer(llb SOURCE llb.cpp IMPORTS llb base)
