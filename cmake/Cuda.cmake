# Says whether CUDA kernels can be built. A machine without CUDA configures as well; only PYCOMM_CUDA=ON insists.
if(NOT PYCOMM_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "PYCOMM_CUDA=${PYCOMM_CUDA} is unknown: use AUTO, ON or OFF")
endif()

if(PYCOMM_CUDA STREQUAL "OFF")
  message(STATUS "pycomm: CUDA is switched off (PYCOMM_CUDA=OFF)")
else()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    message(STATUS "pycomm: CUDA compiler ${CMAKE_CUDA_COMPILER}; this version has no CUDA kernels")
  elseif(PYCOMM_CUDA STREQUAL "ON")
    message(FATAL_ERROR "PYCOMM_CUDA=ON, but there is no CUDA compiler: put nvcc on the PATH, set CUDACXX, or use "
                        "PYCOMM_CUDA=AUTO")
  else()
    message(STATUS "pycomm: no CUDA compiler, building for the CPU alone")
  endif()
endif()
