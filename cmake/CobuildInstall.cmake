include(CMakePackageConfigHelpers)

# The modules are installed where they are defined, see cobuild_module().
install(TARGETS cobuild_flags EXPORT cobuildTargets)
install(EXPORT cobuildTargets NAMESPACE cobuild:: DESTINATION ${COBUILD_PACKAGE_DIR}
  CXX_MODULES_DIRECTORY cxx-modules)
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/cobuildConfig.cmake.in ${CMAKE_BINARY_DIR}/cobuildConfig.cmake
  INSTALL_DESTINATION ${COBUILD_PACKAGE_DIR})
write_basic_package_version_file(${CMAKE_BINARY_DIR}/cobuildConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/cobuildConfig.cmake ${CMAKE_BINARY_DIR}/cobuildConfigVersion.cmake DESTINATION ${COBUILD_PACKAGE_DIR})
