cobuild_fuzzer(config SOURCE config_fuzz.cpp CORPUS ${CMAKE_CURRENT_SOURCE_DIR}/corpus/config IMPORTS config base)
