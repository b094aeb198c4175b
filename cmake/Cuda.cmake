# The CUDA kernels, csrc/kernels/cuda/*.cu, as the object library pycomm_cuda. They are built only with
# PYCOMM_CUDA=ON, since they take minutes to compile and a machine without a GPU does not need them.
set(PYCOMM_CUDA_ARCHITECTURES "" CACHE STRING "Compute capabilities, as 80,90 (empty: current ones)")
if(NOT PYCOMM_CUDA)
  return()
endif()

include(CheckLanguage)
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # set below, once the compiler's version is known
endif()
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(FATAL_ERROR "PYCOMM_CUDA=ON, but there is no CUDA compiler: put nvcc on the PATH, set CUDACXX, or leave "
                      "PYCOMM_CUDA off")
endif()

enable_language(CUDA)
find_package(CUDAToolkit)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4 OR NOT TARGET CUDA::cudart_static)
  message(FATAL_ERROR "PYCOMM_CUDA=ON, but CUDA 12.4 or newer with its static runtime is needed, and "
                      "${CMAKE_CUDA_COMPILER} is ${CMAKE_CUDA_COMPILER_VERSION}")
endif()

if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # older versions of CMake do not know that nvcc has it
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()

# Machine code for data-centre GPUs, and PTX of the last one for later GPUs.
if(PYCOMM_CUDA_ARCHITECTURES)
  string(REPLACE "," ";" cuda_architectures "${PYCOMM_CUDA_ARCHITECTURES}")
elseif(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
  set(cuda_architectures 80 90)
else()
  set(cuda_architectures 80 90 100)
endif()
list(GET cuda_architectures -1 last_architecture)
list(TRANSFORM cuda_architectures APPEND -real)
list(APPEND cuda_architectures ${last_architecture}-virtual)

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/kernels/cuda/*.cu)
add_library(pycomm_cuda OBJECT ${cuda_sources})
target_include_directories(pycomm_cuda PRIVATE csrc)
target_compile_definitions(pycomm_cuda PRIVATE PYCOMM_ISA=cuda)
set_target_properties(pycomm_cuda PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden
                      POSITION_INDEPENDENT_CODE ON CUDA_ARCHITECTURES "${cuda_architectures}")
# Without contraction, a * b + c has the same bits as on the CPU. --threads: in parallel.
target_compile_options(pycomm_cuda PRIVATE -fmad=false --expt-relaxed-constexpr --threads=2
                       -Xcompiler=-Wall,-Wextra,-ffp-contract=off)
if(PYCOMM_WERROR)
  target_compile_options(pycomm_cuda PRIVATE --Werror=all-warnings)
endif()
string(REPLACE ";" " " shown "${cuda_architectures}")
message(STATUS "pycomm: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${shown}")
