# Every third party, found once. Modules name the imported targets they need; see modules/*/CMakeLists.txt.
find_package(Threads REQUIRED)
find_package(OpenSSL 3 REQUIRED)
find_package(Boost 1.83 REQUIRED COMPONENTS headers json)
find_package(SQLite3 REQUIRED)
find_package(LibArchive REQUIRED)
find_package(range-v3 REQUIRED)
find_package(Microsoft.GSL REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(ZSTD REQUIRED IMPORTED_TARGET libzstd)
pkg_check_modules(DEFLATE REQUIRED IMPORTED_TARGET libdeflate)
pkg_check_modules(ISAL REQUIRED IMPORTED_TARGET libisal)
# For the daemon and its client alone; nothing that is installed needs it.
pkg_check_modules(GRPC REQUIRED IMPORTED_TARGET grpc++)

# What every translation unit shares: a difference in any of these makes module interfaces incompatible.
add_library(cobuild_flags INTERFACE)
add_library(cobuild::flags ALIAS cobuild_flags)
set_target_properties(cobuild_flags PROPERTIES EXPORT_NAME flags)
target_compile_features(cobuild_flags INTERFACE cxx_std_20)
target_link_libraries(cobuild_flags INTERFACE Threads::Threads Boost::headers)
target_compile_options(cobuild_flags INTERFACE -pthread)
target_compile_definitions(cobuild_flags INTERFACE
  BOOST_ASIO_NO_DEPRECATED BOOST_ASIO_DISABLE_BOOST_COROUTINE _FILE_OFFSET_BITS=64)
if(COBUILD_SANITIZE)
  target_compile_options(cobuild_flags INTERFACE -fsanitize=${COBUILD_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=undefined)
  target_link_options(cobuild_flags INTERFACE -fsanitize=${COBUILD_SANITIZE})
  if(COBUILD_COVERAGE)
    target_compile_options(cobuild_flags INTERFACE -fsanitize=fuzzer-no-link)
  endif()
  if(COBUILD_SANITIZE MATCHES thread)
    # Asio counts references with std::atomic and a fence, which the sanitizer does not understand; so with Boost's counter.
    target_compile_definitions(cobuild_flags INTERFACE BOOST_ASIO_DISABLE_STD_ATOMIC)
  endif()
endif()

# Warnings for our own code only, never handed on to users of the installed package.
add_library(cobuild_warnings INTERFACE)
target_compile_options(cobuild_warnings INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion
  -Wno-missing-field-initializers  # designated initialisers name what differs from the default
)
