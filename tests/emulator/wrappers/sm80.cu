// sm80.cu - ldmatrix, mma.sync, cp.async, named barriers, bf16 conversion, global memory.
#include "wrappers.h"

namespace wrappers {

// A 16 x 16 tile of numbered elements in shared memory, 48-byte rows.
constexpr int kRow = 48;
RX_DEVICE void number_tile(unsigned char* tile) {
  for (int i = threadIdx.x; i < 256; i += blockDim.x)
    *reinterpret_cast<uint16_t*>(tile + i / 16 * kRow + i % 16 * 2) = uint16_t(i);
  __syncthreads();
}

__global__ void ldmatrix_kernel(uint32_t* out_g, int kind) {
  RX_DYN_SMEM(smem);
  number_tile(smem);
  const int lane = threadIdx.x;
  const uint32_t addr = rx::smem_u32(smem) + (lane & 15) * kRow + (lane >> 4) * 16;
  uint32_t r[4] = {0, 0, 0, 0};
  if (kind == 0) rx::ldmatrix_x4(r, addr);
  if (kind == 1) rx::ldmatrix_x4_trans(r, addr);
  if (kind == 2) {
    uint32_t two[2];
    rx::ldmatrix_x2(two, addr);
    r[0] = two[0], r[1] = two[1];
  }
  for (int i = 0; i < 4; i++) out_g[lane * 4 + i] = r[i];
}
template <int kKind>
int run_ldmatrix(uint32_t* out_g, void* stream) {
  return rx::launch({"ldmatrix", dim3(1), dim3(32), 16 * kRow}, stream, ldmatrix_kernel, out_g,
                    kKind);
}

// The shapes of mma, a bit each: they run one after the other on the same accumulators.
enum { kM16n8 = 1, kM16n16 = 2, kM32n8 = 4, kM32n16 = 8 };
__global__ void mma_kernel(uint32_t* out_g, int shapes) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4 * 2;
  auto a_at = [](int row, int k) { return float(small(row * 16 + k)); };
  auto b_at = [](int k, int column) { return float(small(1000 + k * 16 + column)); };
  uint32_t a[2][4], b[4];
  for (int i = 0; i < 4; i++) {
    const int row = g + i % 2 * 8, k = t + i / 2 * 8;
    a[0][i] = rx::pack_bf16(a_at(row, k), a_at(row, k + 1));
    a[1][i] = rx::pack_bf16(a_at(16 + row, k), a_at(16 + row, k + 1));
    const int column = g + i / 2 * 8, kb = t + i % 2 * 8;
    b[i] = rx::pack_bf16(b_at(kb, column), b_at(kb + 1, column));
  }
  float d[4][4];  // row tile 0 and its two column tiles, then row tile 1
  for (int tile = 0; tile < 4; tile++)
    for (int e = 0; e < 4; e++) d[tile][e] = float(100 * tile + lane + e);
  if (shapes & kM16n8) rx::mma_m16n8k16(d[0], a[0], b[0], b[1]);
  if (shapes & kM16n16) rx::mma_m16n16k16(d[0], d[1], a[0], b);
  if (shapes & kM32n8) rx::mma_m32n8k16(d[0], d[2], a[0], a[1], b[0], b[1]);
  if (shapes & kM32n16) rx::mma_m32n16k16(d[0], d[1], d[2], d[3], a[0], a[1], b);
  for (int i = 0; i < 16; i++) out_g[lane * 16 + i] = bits(d[i / 4][i % 4]);
}
template <int kShapes>
int run_mma(uint32_t* out_g, void* stream) {
  return rx::launch({"mma", dim3(1), dim3(32)}, stream, mma_kernel, out_g, kShapes);
}

// Words 0..63 of the output double as the source: the host side cannot pass arrays.
__global__ void fill_kernel(uint32_t* out_g) {
  out_g[threadIdx.x] = 0x01000100u * (threadIdx.x + 1);
}
template <int kBytes>
__global__ void cp_async_kernel(uint32_t* out_g) {
  RX_DYN_SMEM(smem);
  const int t = threadIdx.x;
  const int kept = t % 4 == 3 ? 0 : t % 4 == 2 ? kBytes / 2 : kBytes;  // the rest becomes zero
  rx::cp_async<kBytes>(rx::smem_u32(smem) + t * kBytes,
                       reinterpret_cast<const unsigned char*>(out_g) + t * kBytes, kept);
  rx::cp_async_commit();
  rx::cp_async_wait<0>();
  __syncthreads();
  const uint32_t* words = reinterpret_cast<const uint32_t*>(smem);
  for (int i = t; i < 16 * kBytes / 4; i += 16) out_g[64 + i] = words[i];
}
template <int kBytes>
int run_cp_async(uint32_t* out_g, void* stream) {
  if (int e = rx::launch({"fill", dim3(1), dim3(64)}, stream, fill_kernel, out_g)) return e;
  return rx::launch({"cp_async", dim3(1), dim3(16), 16 * kBytes}, stream, cp_async_kernel<kBytes>,
                    out_g);
}

// Two groups in flight: the older one must be there after wait_group 1.
__global__ void cp_async_groups_kernel(uint32_t* out_g) {
  RX_DYN_SMEM(smem);
  const int t = threadIdx.x;
  for (int g = 0; g < 2; g++) {
    rx::cp_async<4>(rx::smem_u32(smem) + (g * 32 + t) * 4, out_g + g * 32 + t);
    rx::cp_async_commit();
  }
  const uint32_t* words = reinterpret_cast<const uint32_t*>(smem);
  rx::cp_async_wait<1>();
  out_g[64 + t] = words[t];
  rx::cp_async_wait<0>();
  out_g[96 + t] = words[32 + t];
}
int run_cp_async_groups(uint32_t* out_g, void* stream) {
  if (int e = rx::launch({"fill", dim3(1), dim3(64)}, stream, fill_kernel, out_g)) return e;
  return rx::launch({"cp_async_groups", dim3(1), dim3(32), 256}, stream, cp_async_groups_kernel,
                    out_g);
}

// Warp 0 writes and arrives, warp 1 waits and reads; then the other way round.
__global__ void named_barrier_kernel(uint32_t* out_g) {
  RX_DYN_SMEM(smem);
  uint32_t* box = reinterpret_cast<uint32_t*>(smem);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (warp == 0) {
    box[lane] = 100 + lane;
    rx::bar_arrive(1, 64);
    rx::bar_sync(2, 64);
    out_g[lane] = box[32 + (lane ^ 1)];
  } else {
    rx::bar_sync(1, 64);
    const uint32_t v = box[31 - lane];
    box[32 + lane] = v * 2;
    rx::bar_arrive(2, 64);
    out_g[32 + lane] = v;
  }
}
int run_named_barrier(uint32_t* out_g, void* stream) {
  return rx::launch({"named_barrier", dim3(1), dim3(64), 256}, stream, named_barrier_kernel, out_g);
}

// Halfway cases round to even; denormals, infinities and the largest float are kept or overflow.
__global__ void bf16_kernel(uint32_t* out_g) {
  const uint32_t patterns[8] = {0x3f808000u, 0x3f818000u, 0x3f808001u, 0x7f7fffffu,
                                0x00008000u, 0x80018000u, 0x7f800000u, 0xbf80ffffu};
  union {
    uint32_t word;
    float value;
  } u = {patterns[threadIdx.x]};
  out_g[threadIdx.x * 3] = rx::pack_bf16(u.value, -1.5f);
  const float2 back = rx::unpack_bf16(0x3fc0c000u + threadIdx.x);
  out_g[threadIdx.x * 3 + 1] = bits(back.x);
  out_g[threadIdx.x * 3 + 2] = bits(back.y);
}
int run_bf16(uint32_t* out_g, void* stream) {
  return rx::launch({"bf16", dim3(1), dim3(8)}, stream, bf16_kernel, out_g);
}

// Scratch in global memory: written by one thread of the CTA, read by another.
__global__ void scratch_kernel(uint32_t* out_g) {
  const int t = threadIdx.x;
  out_g[t] = t * 3;
  __syncthreads();
  out_g[64 + t] = out_g[63 - t];
}
int run_scratch(uint32_t* out_g, void* stream) {
  return rx::launch({"scratch", dim3(1), dim3(64)}, stream, scratch_kernel, out_g);
}

// Four CTAs that run together: each reads what its neighbour wrote before the barrier.
constexpr int kGrid = 4;
__global__ void clear_kernel(uint32_t* flag_g) { *flag_g = 0; }
__global__ void grid_barrier_kernel(uint32_t* out_g, uint32_t* arrived_g) {
  const int t = threadIdx.x, b = blockIdx.x;
  out_g[b * 32 + t] = b * 100 + t;
  __syncthreads();
  if (t == 0) {
    rx::red_add_release(arrived_g, 1);
    while (rx::ld_acquire(arrived_g) < kGrid) {
    }
  }
  __syncthreads();
  out_g[(kGrid + b) * 32 + t] = out_g[(b + 1) % kGrid * 32 + 31 - t];
}
int run_grid_barrier(uint32_t* out_g, void* stream) {
  uint32_t* flag_g = out_g + 2 * kGrid * 32;
  if (int e = rx::launch({"clear", dim3(1), dim3(1)}, stream, clear_kernel, flag_g)) return e;
  rx::LaunchShape shape{"grid_barrier", dim3(kGrid), dim3(32)};
  shape.cooperative = true;
  return rx::launch(shape, stream, grid_barrier_kernel, out_g, flag_g);
}

constexpr Entry kTable[] = {
    {"ldmatrix_x4", 128, run_ldmatrix<0>},
    {"ldmatrix_x4_trans", 128, run_ldmatrix<1>},
    {"ldmatrix_x2", 128, run_ldmatrix<2>},
    {"mma_m16n8k16", 512, run_mma<kM16n8>},
    {"mma_m16n16k16", 512, run_mma<kM16n16>},
    {"mma_m32n8k16", 512, run_mma<kM32n8>},
    {"mma_m32n16k16", 512, run_mma<kM32n16>},
    {"mma_all_shapes", 512, run_mma<kM16n8 | kM16n16 | kM32n8 | kM32n16>},
    {"cp_async_4", 64 + 16, run_cp_async<4>},
    {"cp_async_8", 64 + 32, run_cp_async<8>},
    {"cp_async_16", 64 + 64, run_cp_async<16>},
    {"cp_async_groups", 128, run_cp_async_groups},
    {"named_barrier", 64, run_named_barrier},
    {"bf16", 24, run_bf16},
    {"scratch", 128, run_scratch},
    {"grid_barrier", 2 * kGrid * 32 + 1, run_grid_barrier},
};

}  // namespace wrappers

RX_WRAPPER_TABLE(wrappers::kTable)
