# Parser, instructions and checks over whole files; expansion over words.
cobuild_fuzzer(dockerfile SOURCE dockerfile_fuzz.cpp IMPORTS dockerfile base)
cobuild_fuzzer(dockerfile_expand SOURCE dockerfile_expand_fuzz.cpp IMPORTS dockerfile base)
