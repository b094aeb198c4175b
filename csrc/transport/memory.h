// Anonymous shared memory: a sparse file without a name, its pages, and how many the machine can spare.
#pragma once

#include <cstdint>
#include <string>

#include "transport/fd.h"

namespace pycomm::transport {

int64_t page_size();
inline constexpr int64_t kHugePage = int64_t{2} << 20;
// What parts of an extent begin on, whatever the machine's page is.
inline constexpr int64_t kSmallPage = 4096;

constexpr int64_t round_up(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

// Extents start at, and take up in the file, multiples of this. From a huge page on it is the huge page, so
// that none is shared between extents; the file is sparse, so that its address space costs nothing.
inline int64_t extent_unit(int64_t bytes) { return bytes >= kHugePage ? kHugePage : page_size(); }

// A sparse memfd, close-on-exec, as long as the system allows, so that it never has to grow.
Fd create_memory();

// The memory that can be taken before somebody is killed: the least of MemAvailable and what the limits of
// this process's control groups leave, version 1 and 2, up to the root. Page cache that the kernel would give
// up counts as free. `root` is prepended to all paths (for tests).
struct Available {
  int64_t bytes;
  std::string where;  // what sets the bound, for the error
};
Available available_memory(const std::string& root = "");

// Throws OutOfMemoryError, naming what was asked and what is left, unless `bytes` and a margin are available.
void require_available(int64_t bytes);
// What is available with a margin left for the rest of the system; at most 0 if there is nothing.
int64_t spare_memory();
// Whether shared memory gets huge pages by advice alone. Then they come at page faults of an advised mapping
// only; in every other setting fallocate makes the right pages, and small ones 2.6 times as fast as faults.
bool huge_by_advice();
// Makes every page of the extent exist, zeroed, as huge pages where they are offered. Looks before each step
// and throws OutOfMemoryError with nothing kept.
void populate(int fd, int64_t offset, int64_t bytes, bool by_faults);
// One step of that, without a look: false if the system does not give all of it. By page faults where `data`
// says where it is mapped.
bool back_extent(int fd, char* data, int64_t offset, int64_t bytes);
// Maps an extent, shared and writable, not inherited by fork; with `prefault` its page tables are filled (for
// pages that exist).
char* map_extent(int fd, int64_t offset, int64_t bytes, bool prefault);
// Gives the pages back.
void punch(int fd, int64_t offset, int64_t bytes);

}  // namespace pycomm::transport
