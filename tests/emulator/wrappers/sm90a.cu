// sm90a.cu - wgmma in its widths and forms, and setmaxnreg.
#include "wrappers.h"

namespace wrappers {

// A [64, 64] and B [N, 64] (or [64, N] transposed) of small integers, in 128-byte swizzled tiles.
constexpr int kDepth = 64;
RX_DEVICE float a_at(int row, int k) { return float(small(row * kDepth + k)); }
RX_DEVICE float b_at(int k, int column) { return float(small(5000 + column * kDepth + k)); }

RX_DEVICE void put(unsigned char* tile, int row, int column, float v) {
  const uint32_t at = rx::swizzle_128b(row, column / 8) + column % 8 * 2;
  *reinterpret_cast<uint16_t*>(tile + at) = uint16_t(rx::pack_bf16(v, 0.f));
}

// The same in tiles of 32 or 16 columns with the 64-byte or the 32-byte swizzle.
template <int kColumns>
RX_DEVICE void put_narrow(unsigned char* tiles, int rows, int row, int column, float v) {
  constexpr int kBytes = kColumns * 2;
  const int chunk = column % kColumns / 8 ^ (kColumns == 32 ? row >> 1 & 3 : row >> 2 & 1);
  unsigned char* at =
      tiles + (column / kColumns * rows + row) * kBytes + chunk * 16 + column % 8 * 2;
  *reinterpret_cast<uint16_t*>(at) = uint16_t(rx::pack_bf16(v, 0.f));
}

// kHighB: kTransposedB with 32 columns in the upper half of the rows, the descriptor 64 bytes on.
enum Form { kShared, kRegisters, kTransposedB, kHighB, kTransposedA, kSwizzle64, kSwizzle32 };
template <int N, Form kForm>
__global__ void __launch_bounds__(128) wgmma_kernel(uint32_t* out_g) {
  RX_DYN_SMEM(smem);
  unsigned char *a_s = smem, *b_s = smem + 64 * 128;
  for (int i = threadIdx.x; i < 64 * kDepth; i += 128) {
    const int r = i / kDepth, k = i % kDepth;
    put(a_s, kForm == kTransposedA ? k : r, kForm == kTransposedA ? r : k, a_at(r, k));
  }
  for (int i = threadIdx.x; i < N * kDepth; i += 128) {
    const int column = i / kDepth, k = i % kDepth;
    if (kForm == kTransposedB)  // rows of k, 64 columns a tile
      put(b_s + column / 64 * kDepth * 128, k, column % 64, b_at(k, column));
    else if (kForm == kHighB)
      put(b_s, k, 32 + column, b_at(k, column));
    else if (kForm == kSwizzle64)
      put_narrow<32>(b_s, N, column, k, b_at(k, column));
    else if (kForm == kSwizzle32)
      put_narrow<16>(b_s, N, column, k, b_at(k, column));
    else
      put(b_s, column, k, b_at(k, column));
  }
  rx::fence_proxy_async();
  __syncthreads();

  const int t = threadIdx.x, row = t / 32 * 16 + t % 32 / 4;
  float d[N / 2];
  for (int i = 0; i < N / 2; i++) d[i] = float(i + t);  // scale_d 1: added to
  uint32_t a[kDepth / 16][4];
  for (int ks = 0; ks < kDepth / 16; ks++)
    for (int e = 0; e < 4; e++) {
      const int r = row + e % 2 * 8, k = ks * 16 + t % 4 * 2 + e / 2 * 8;
      a[ks][e] = rx::pack_bf16(a_at(r, k), a_at(r, k + 1));
    }
  rx::wgmma_fence();
#pragma unroll
  for (int ks = 0; ks < kDepth / 16; ks++) {
    const uint64_t a_desc = kForm == kTransposedA
                                ? rx::wgmma_desc_128b_mn(rx::smem_u32(a_s) + ks * 16 * 128, 8192)
                                : rx::wgmma_desc_128b(rx::smem_u32(a_s) + ks * 32);
    // K-major: 16 columns of k are 32 bytes. N-major: 16 rows of k, tiles of 64 columns apart.
    const uint64_t b_desc =
        kForm == kTransposedB
            ? rx::wgmma_desc_128b_mn(rx::smem_u32(b_s) + ks * 16 * 128, kDepth * 128)
        : kForm == kHighB ? rx::wgmma_desc_128b_mn(rx::smem_u32(b_s) + ks * 16 * 128 + 64, 8192)
        : kForm == kSwizzle64
            ? rx::wgmma_desc_64b(rx::smem_u32(b_s) + ks / 2 * N * 64 + ks % 2 * 32)
        : kForm == kSwizzle32 ? rx::wgmma_desc_32b(rx::smem_u32(b_s) + ks * N * 32)
                              : rx::wgmma_desc_128b(rx::smem_u32(b_s) + ks * 32);
    if constexpr (kForm == kRegisters)
      rx::wgmma<N>(d, a[ks], b_desc, 1);
    else
      rx::wgmma<N, kForm == kTransposedB || kForm == kHighB, kForm == kTransposedA>(d, a_desc,
                                                                                    b_desc, 1);
  }
  rx::wgmma_commit();
  rx::wgmma_wait<0>();
  for (int j = 0; j < N / 8; j++)
    for (int e = 0; e < 4; e++)
      out_g[(row + e / 2 * 8) * N + j * 8 + t % 4 * 2 + e % 2] = bits(d[j * 4 + e]);
}
template <int N, Form kForm>
int run_wgmma(uint32_t* out_g, void* stream) {
  const uint32_t smem = 64 * 128 + (N < 64 ? 64 : N) * 128;  // N-major tiles are 64 wide
  return rx::launch({"wgmma", dim3(1), dim3(128), smem}, stream, wgmma_kernel<N, kForm>, out_g);
}

// A product that starts from zero beside one that adds; registers change hands.
__global__ void __launch_bounds__(256, 1) setmaxnreg_kernel(uint32_t* out_g) {
  RX_DYN_SMEM(smem);
  for (int i = threadIdx.x; i < 64 * kDepth; i += 256)
    put(smem, i / kDepth, i % kDepth, a_at(i / kDepth, i % kDepth));
  rx::fence_proxy_async();
  __syncthreads();
  const int t = threadIdx.x % 128;
  if (threadIdx.x < 128) {
    rx::setmaxnreg_dec<40>();
  } else {
    rx::setmaxnreg_inc<200>();
    float d[32], e[32];
    for (int i = 0; i < 32; i++) d[i] = e[i] = 1000.f;
    const uint64_t tile = rx::wgmma_desc_128b(rx::smem_u32(smem));
    rx::wgmma_pin(d);
    rx::wgmma_pin(e);
    rx::wgmma_fence();
    rx::wgmma<64>(d, tile, tile, 0);
    rx::wgmma<64>(e, tile, tile, 1);
    rx::wgmma_commit();
    rx::wgmma_wait<0>();
    for (int i = 0; i < 32; i++)
      out_g[t * 64 + i] = bits(d[i]), out_g[t * 64 + 32 + i] = bits(e[i]);
  }
}
int run_setmaxnreg(uint32_t* out_g, void* stream) {
  return rx::launch({"wgmma_setmaxnreg", dim3(1), dim3(256), 64 * 128}, stream, setmaxnreg_kernel,
                    out_g);
}

constexpr Entry kTable[] = {
    {"wgmma_64", 64 * 64, run_wgmma<64, kShared>},
    {"wgmma_128", 64 * 128, run_wgmma<128, kShared>},
    {"wgmma_192", 64 * 192, run_wgmma<192, kShared>},
    {"wgmma_256", 64 * 256, run_wgmma<256, kShared>},
    {"wgmma_64_registers", 64 * 64, run_wgmma<64, kRegisters>},
    {"wgmma_128_registers", 64 * 128, run_wgmma<128, kRegisters>},
    {"wgmma_192_registers", 64 * 192, run_wgmma<192, kRegisters>},
    {"wgmma_256_registers", 64 * 256, run_wgmma<256, kRegisters>},
    {"wgmma_64_transposed", 64 * 64, run_wgmma<64, kTransposedB>},
    {"wgmma_128_transposed", 64 * 128, run_wgmma<128, kTransposedB>},
    {"wgmma_32", 64 * 32, run_wgmma<32, kShared>},
    {"wgmma_32_registers", 64 * 32, run_wgmma<32, kRegisters>},
    {"wgmma_32_transposed", 64 * 32, run_wgmma<32, kTransposedB>},
    {"wgmma_32_transposed_high", 64 * 32, run_wgmma<32, kHighB>},
    {"wgmma_128_transposed_a", 64 * 128, run_wgmma<128, kTransposedA>},
    {"wgmma_64_swizzle_64b", 64 * 64, run_wgmma<64, kSwizzle64>},
    {"wgmma_128_swizzle_64b", 64 * 128, run_wgmma<128, kSwizzle64>},
    {"wgmma_256_swizzle_64b", 64 * 256, run_wgmma<256, kSwizzle64>},
    {"wgmma_64_swizzle_32b", 64 * 64, run_wgmma<64, kSwizzle32>},
    {"wgmma_256_swizzle_32b", 64 * 256, run_wgmma<256, kSwizzle32>},
    {"wgmma_setmaxnreg", 128 * 64, run_setmaxnreg},
};

}  // namespace wrappers

RX_WRAPPER_TABLE(wrappers::kTable)
