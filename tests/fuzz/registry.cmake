foreach(what reference challenge manifest http_head)
  cobuild_fuzzer(${what} SOURCE ${CMAKE_CURRENT_LIST_DIR}/${what}_fuzz.cpp CORPUS ${CMAKE_CURRENT_LIST_DIR}/corpus/${what} IMPORTS registry http oci json async base)
endforeach()
