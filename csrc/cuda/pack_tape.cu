// pack_tape.cu - W [n, k] row-major to the tape [k / 64][n][64] that bulk copies read front to
// back.
//
// The eight 16-byte chunks of a tile's row r are exchanged by r % 8, the 128-byte swizzle of wgmma,
// so that a plain copy of a tile is ready for use.
#include "rx.cuh"
#include "rx/launch.cuh"

namespace pack_tape {

constexpr int kThreads = 256;

__global__ void kernel(const rx::bf16* w_g, rx::bf16* tape_g, int n, int k) {
  const size_t i = size_t(blockIdx.x) * kThreads + threadIdx.x;  // a chunk of the tape
  if (i >= size_t(n) * k / 8) return;
  const int position = int(i % 8), r = int(i / 8 % n), tile = int(i / 8 / n);
  const int chunk = position ^ (r & 7);
  reinterpret_cast<uint4*>(tape_g)[i] =
      *reinterpret_cast<const uint4*>(w_g + size_t(r) * k + tile * 64 + chunk * 8);
}

}  // namespace pack_tape

extern "C" int rx_pack_tape_sm90a(const void* w, void* tape, int n, int k, void* stream) {
  const size_t chunks = size_t(n) * k / 8;
  rx::LaunchShape s{"pack_tape",
                    dim3(unsigned((chunks + pack_tape::kThreads - 1) / pack_tape::kThreads)),
                    dim3(pack_tape::kThreads)};
  return rx::launch(s, stream, pack_tape::kernel, static_cast<const rx::bf16*>(w),
                    static_cast<rx::bf16*>(tape), n, k);
}
