include(GNUInstallDirs)
set(COBUILD_PACKAGE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/cobuild)

# cobuild_module(NAME SOURCES a.cpp... [INTERFACES part.ixx...] [IMPORTS lower...] [USES imported-target...] [NOT_INSTALLED])
#
# One static library per module: modules/NAME.ixx is its contract, the sources beside its CMakeLists.txt are the bodies.
# IMPORTS are the modules it may import and nothing else; USES are third parties, visible to its own .cpp only.
# NOT_INSTALLED: for our own programs, no part of the installed package.
function(cobuild_module name)
  cmake_parse_arguments(ARG "NOT_INSTALLED" "" "SOURCES;INTERFACES;INTERNAL;IMPORTS;USES" ${ARGN})
  add_library(cobuild_${name} STATIC)
  add_library(cobuild::${name} ALIAS cobuild_${name})
  target_sources(cobuild_${name}
    PUBLIC FILE_SET cobuild_interfaces TYPE CXX_MODULES BASE_DIRS ${PROJECT_SOURCE_DIR}/modules
      FILES ${PROJECT_SOURCE_DIR}/modules/${name}.ixx ${ARG_INTERFACES}
    PRIVATE ${ARG_SOURCES})
  if(ARG_INTERNAL)
    target_sources(cobuild_${name} PRIVATE FILE_SET cobuild_internal TYPE CXX_MODULES
      BASE_DIRS ${CMAKE_CURRENT_SOURCE_DIR} FILES ${ARG_INTERNAL})
  endif()
  list(TRANSFORM ARG_IMPORTS PREPEND cobuild::)
  target_link_libraries(cobuild_${name} PUBLIC cobuild::flags ${ARG_IMPORTS} PRIVATE ${ARG_USES} $<BUILD_INTERFACE:cobuild_warnings>)
  set_target_properties(cobuild_${name} PROPERTIES EXPORT_NAME ${name})
  if(ARG_NOT_INSTALLED)
    return()
  endif()
  # Here and not all together in CobuildInstall.cmake: CMake looks in a target's own directory for where its interfaces are
  # installed, and would otherwise write the paths of this source tree into the package.
  install(TARGETS cobuild_${name} EXPORT cobuildTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
    FILE_SET cobuild_interfaces DESTINATION ${COBUILD_PACKAGE_DIR}/modules)
endfunction()

# cobuild_test(NAME SOURCES a.cpp... [LABEL unit|contract|scenario] [IMPORTS module...] [USES imported-target...] [ROOT])
#
# One Boost.Test program per module or suite. NAME becomes the CTest name.
function(cobuild_test name)
  cmake_parse_arguments(ARG "" "LABEL;TIMEOUT" "SOURCES;IMPORTS;USES" ${ARGN})
  if(NOT ARG_LABEL)
    set(ARG_LABEL unit)
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  add_executable(test_${name} ${ARG_SOURCES})
  list(TRANSFORM ARG_IMPORTS PREPEND cobuild::)
  target_link_libraries(test_${name} PRIVATE ${ARG_IMPORTS} ${ARG_USES} cobuild_test_support cobuild_warnings)
  add_test(NAME ${name} COMMAND test_${name} --log_level=test_suite --report_level=short --catch_system_errors=no)
  set_tests_properties(${name} PROPERTIES LABELS ${ARG_LABEL} TIMEOUT ${ARG_TIMEOUT}
    ENVIRONMENT "TSAN_OPTIONS=suppressions=${PROJECT_SOURCE_DIR}/tests/support/tsan.supp:die_after_fork=0;COBUILD_SOURCE_DIR=${PROJECT_SOURCE_DIR};COBUILD_BIN_DIR=${CMAKE_RUNTIME_OUTPUT_DIRECTORY}")
endfunction()

# cobuild_fuzzer(NAME SOURCE file.cpp [CORPUS dir] [IMPORTS module...])
#
# Under the presets `asan` and `fuzz` a libFuzzer program, run as a test over its corpus and then for 15 s (`fuzz`, which also
# measures what of the modules was reached: COBUILD_FUZZ_SECONDS).
function(cobuild_fuzzer name)
  cmake_parse_arguments(ARG "" "SOURCE;CORPUS" "IMPORTS" ${ARGN})
  if(NOT COBUILD_FUZZERS)
    return()
  endif()
  add_executable(fuzz_${name} ${ARG_SOURCE})
  list(TRANSFORM ARG_IMPORTS PREPEND cobuild::)
  target_link_libraries(fuzz_${name} PRIVATE ${ARG_IMPORTS} cobuild_warnings)
  target_compile_options(fuzz_${name} PRIVATE -fsanitize=fuzzer)
  target_link_options(fuzz_${name} PRIVATE -fsanitize=fuzzer)
  set(seconds 15)
  if(DEFINED ENV{COBUILD_FUZZ_SECONDS})
    set(seconds $ENV{COBUILD_FUZZ_SECONDS})
  endif()
  set(work ${CMAKE_CURRENT_BINARY_DIR}/corpus_${name})
  file(MAKE_DIRECTORY ${work})
  add_test(NAME fuzz_${name} COMMAND fuzz_${name} ${work} ${ARG_CORPUS} -max_total_time=${seconds} -timeout=10 -rss_limit_mb=2048
    -max_len=65536 -print_final_stats=1)
  set_tests_properties(fuzz_${name} PROPERTIES LABELS fuzz TIMEOUT 7200)
endfunction()
