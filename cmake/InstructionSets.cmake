# Each csrc/kernels/cpu/*_isa.cc is compiled once for each instruction set. PYCOMM_ISA names the set and the
# namespace; the set to use is chosen at run time.
set(baseline_flags "")
set(avx2_flags -mavx2 -mfma -mf16c)
set(avx512_flags ${avx2_flags} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
set(neon_flags "")

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(instruction_sets baseline avx2 avx512)
  # For processors from before 2013: loops are vectorised but not unrolled, which compiles in half the time.
  list(APPEND baseline_flags "$<$<AND:$<CXX_COMPILER_ID:GNU>,$<CONFIG:Release>>:-O2;-fvect-cost-model=dynamic>")
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(instruction_sets neon)  # every such processor has it
else()
  set(instruction_sets baseline)
endif()

set(isa_warnings $<$<CXX_COMPILER_ID:Clang>:-Wno-pass-failed>)  # clang may leave a loop scalar

# gcc warns of values that its own AVX-512 intrinsics leave undefined on purpose.
list(APPEND isa_warnings "$<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized;-Wno-uninitialized>")

file(GLOB isa_sources CONFIGURE_DEPENDS csrc/kernels/cpu/*_isa.cc)
# Vectorised floor() sets fewer floating-point exception flags, which nothing reads. Values are the same.
set_source_files_properties(csrc/kernels/cpu/codec_isa.cc PROPERTIES COMPILE_OPTIONS -fno-trapping-math)
foreach(isa ${instruction_sets})
  add_library(pycomm_${isa} OBJECT ${isa_sources})
  target_include_directories(pycomm_${isa} PRIVATE csrc)
  target_compile_definitions(pycomm_${isa} PRIVATE PYCOMM_ISA=${isa})
  target_compile_options(pycomm_${isa} PRIVATE ${${isa}_flags} ${isa_warnings})
  target_link_libraries(pycomm_${isa} PRIVATE pycomm_settings)
  target_sources(pycomm_core PRIVATE $<TARGET_OBJECTS:pycomm_${isa}>)
endforeach()
