include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

get_property(modules GLOBAL PROPERTY COBUILD_MODULES)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/cobuild)
install(TARGETS cobuild_flags ${modules} EXPORT cobuildTargets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  FILE_SET cobuild_interfaces DESTINATION ${package_dir}/modules)
install(EXPORT cobuildTargets NAMESPACE cobuild:: DESTINATION ${package_dir}
  CXX_MODULES_DIRECTORY cxx-modules)
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/cobuildConfig.cmake.in ${CMAKE_BINARY_DIR}/cobuildConfig.cmake
  INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${CMAKE_BINARY_DIR}/cobuildConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/cobuildConfig.cmake ${CMAKE_BINARY_DIR}/cobuildConfigVersion.cmake DESTINATION ${package_dir})
