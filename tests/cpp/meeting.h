// What comes before a call on told buffers.
#pragma once

#include "runtime/executor.h"
#include "schedule/lower/lower.h"

// A rank's part of a call from which each rank knows that all have come: as good as telling addresses.
inline pycomm::runtime::Prepared meeting(int ranks, int rank, const pycomm::schedule::Geometry& geometry) {
  const pycomm::schedule::Call call{
      .world = {.collective = pycomm::schedule::Collective::barrier, .size = ranks}, .counts = {0}};
  return {pycomm::schedule::make_plan("dissemination", call, geometry, rank), rank};
}
