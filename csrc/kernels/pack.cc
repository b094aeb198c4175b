#include "kernels/pack.h"

#include <string>

#include "common/caches.h"
#include "common/error.h"
#include "kernels/copy.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/pack_kernels.h"

namespace pycomm::kernels {
namespace {

void run(const PackArgs& args, bool packs, Stats* stats, const Isa& isa) {
  const auto scale = static_cast<float>(args.scale);
  int64_t written = 0;
  for (const PackItem& item : args.items) {
    if (!isa.pack->find(item.dtype, args.dtype, false)) {
      throw TypeError(std::string("pack and unpack take floats of 8 to 32 bits, not ") + name(item.dtype) +
                      " and " + name(args.dtype));
    }
    written += item.count * static_cast<int64_t>(size_of(packs ? args.dtype : item.dtype));
  }
  const bool stream = written >= past_cache_bytes(1);
  Tally tally;
  for (const PackItem& item : args.items) {
    char* place = static_cast<char*>(args.bucket) + item.offset * static_cast<int64_t>(size_of(args.dtype));
    const void* src = packs ? item.tensor : place;
    void* dst = packs ? place : item.tensor;
    const DType from = packs ? item.dtype : args.dtype, to = packs ? args.dtype : item.dtype;
    const bool as_is = from == to && scale == 1;
    if (as_is && !stats) {
      copy_bytes(dst, src, static_cast<size_t>(item.count) * size_of(to), stream, isa);
      continue;
    }
    const CastFn cast = isa.pack->find(from, to, as_is);
    cast({src, dst, static_cast<size_t>(item.count), scale, stream && src != dst, stats ? &tally : nullptr});
  }
  if (stream) stream_fence();
  if (stats) *stats = isa.pack->finish(tally);
}

}  // namespace

void pack(const PackArgs& args, Stats* stats, const Isa& isa) { run(args, true, stats, isa); }
void unpack(const PackArgs& args, Stats* stats, const Isa& isa) { run(args, false, stats, isa); }

}  // namespace pycomm::kernels
