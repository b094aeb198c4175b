# csrc/kernels/cpu/*_isa.cc is one source compiled once per instruction set: PYCOMM_ISA names the set (and the
# namespace), and the kernels choose among them at run time.
set(baseline_flags "")
set(avx2_flags -mavx2 -mfma -mf16c)
set(avx512_flags ${avx2_flags} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
set(neon_flags "")

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(instruction_sets baseline avx2 avx512)
  # Processors from before 2013: vectors as well, but loops that are not unrolled compile in half the time.
  list(APPEND baseline_flags "$<$<AND:$<CXX_COMPILER_ID:GNU>,$<CONFIG:Release>>:-O2;-fvect-cost-model=dynamic>")
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(instruction_sets neon)  # every one of them has it
else()
  set(instruction_sets baseline)
endif()

set(isa_warnings $<$<CXX_COMPILER_ID:Clang>:-Wno-pass-failed>)  # a loop that clang leaves scalar is no defect

# gcc warns of what its own AVX-512 intrinsics leave undefined on purpose.
list(APPEND isa_warnings "$<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized;-Wno-uninitialized>")

file(GLOB isa_sources CONFIGURE_DEPENDS csrc/kernels/cpu/*_isa.cc)
# Nobody looks at the floating-point exception flags, and floor() in vectors sets fewer of them. Values are the same.
set_source_files_properties(csrc/kernels/cpu/codec_isa.cc PROPERTIES COMPILE_OPTIONS -fno-trapping-math)
foreach(isa ${instruction_sets})
  add_library(pycomm_${isa} OBJECT ${isa_sources})
  target_include_directories(pycomm_${isa} PRIVATE csrc)
  target_compile_definitions(pycomm_${isa} PRIVATE PYCOMM_ISA=${isa})
  target_compile_options(pycomm_${isa} PRIVATE ${${isa}_flags} ${isa_warnings})
  target_link_libraries(pycomm_${isa} PRIVATE pycomm_settings)
  target_sources(pycomm_core PRIVATE $<TARGET_OBJECTS:pycomm_${isa}>)
endforeach()
