# How everything is compiled: C++20, position-independent, hidden symbols, optimised, warned about.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()

# If ccache is installed, nothing is compiled twice.
find_program(CCACHE ccache)
mark_as_advanced(CCACHE)
foreach(language CXX CUDA)
  if(CCACHE AND NOT CMAKE_${language}_COMPILER_LAUNCHER)
    set(CMAKE_${language}_COMPILER_LAUNCHER ${CCACHE})
  endif()
endforeach()

add_library(pycomm_settings INTERFACE)
# Without contraction, a * b + c has the same bits on every machine and with every instruction set.
target_compile_options(pycomm_settings INTERFACE -Wall -Wextra -ffp-contract=off)
# A switch that misses a case shows where a new dtype, codec or collective has to go; pip hides warnings.
target_compile_options(pycomm_settings INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror=switch>)
# Designated initialisers may omit members that have defaults.
target_compile_options(pycomm_settings INTERFACE -Wno-missing-field-initializers)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  target_compile_options(pycomm_settings INTERFACE -Wno-restrict)  # gcc 12 warns at any "text" + std::string
endif()
if(PYCOMM_WERROR)
  target_compile_options(pycomm_settings INTERFACE -Werror)
endif()

if(PYCOMM_SANITIZE STREQUAL "thread")
  set(sanitizers -fsanitize=thread)
elseif(PYCOMM_SANITIZE STREQUAL "address")
  set(sanitizers -fsanitize=address,undefined -fno-sanitize-recover=undefined)
elseif(PYCOMM_SANITIZE)
  message(FATAL_ERROR "PYCOMM_SANITIZE=${PYCOMM_SANITIZE} is unknown: use thread, address, or leave it empty")
endif()
if(PYCOMM_SANITIZE)
  # -O1 keeps the checks and halves the time to compile.
  target_compile_options(pycomm_settings INTERFACE ${sanitizers} -fno-omit-frame-pointer -g1 -O1
                         $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)  # their checks mislead gcc's analysis
  target_link_options(pycomm_settings INTERFACE ${sanitizers})
endif()
