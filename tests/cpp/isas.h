// The instruction sets that this machine can run.
#pragma once

#include <string>
#include <vector>

#include "kernels/isa.h"

inline std::vector<std::string> isa_names() {
  size_t count = 0;
  const char* const* names = pycomm::kernels::available_isas(&count);
  return {names, names + count};
}

inline std::vector<const pycomm::kernels::Isa*> isas() {
  std::vector<const pycomm::kernels::Isa*> all;
  for (const std::string& name : isa_names()) all.push_back(pycomm::kernels::find_isa(name));
  return all;
}
