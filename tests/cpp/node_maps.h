// How tests place ranks on nodes.
#pragma once

#include <vector>

// The ways in which n ranks lie on nodes: each on its own, two halves, a node of one, ranks dealt round.
inline std::vector<std::vector<int>> node_maps(int n) {
  std::vector<std::vector<int>> maps(4, std::vector<int>(n));
  for (int rank = 0; rank < n; ++rank) {
    maps[0][rank] = rank;
    maps[1][rank] = rank >= (n + 1) / 2;
    maps[2][rank] = rank == n - 1;
    maps[3][rank] = rank % 2;
  }
  return maps;
}
