// warp.cuh - sm_80: matrix loads, mma.sync, cp.async, flags.
#pragma once
#include "common.cuh"

namespace rx {

// ---- ldmatrix: 8x8 matrices of 16-bit elements; lanes 8i..8i+7 give the row addresses of matrix i
RX_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr) {
  RX_EITHER(
      emu::ldmatrix(addr, r, 4, false),
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]),
                   "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(addr) : "memory"));
}
RX_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t addr) {
  RX_EITHER(
      emu::ldmatrix(addr, r, 4, true),
      asm volatile(
          "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]),
          "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(addr) : "memory"));
}
RX_DEVICE void stmatrix_x4_trans(uint32_t addr, const uint32_t (&r)[4]) {  // sm_90
  RX_EITHER(
      emu::stmatrix(addr, r, 4, true),
      asm volatile(
          "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr),
          "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"));
}

// ---- mma.sync: d[16, n] += a[16, 16] * b[16, n], fp32 accumulation
// Lane l holds rows l/4 and l/4 + 8; of d columns 2*(l%4) and the next, of every eight.
RX_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef RX_EMU
  const uint32_t b[2] = {b0, b1};
  emu::mma_m16n8k16_bf16(d, a, b, d);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Over the four lanes that hold a row of these sums.
RX_DEVICE float sum_of_row(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}
RX_DEVICE float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}

// Two column tiles, with b as one ldmatrix_x4 loads it.
RX_DEVICE void mma_m16n16k16(float (&d0)[4], float (&d1)[4], const uint32_t (&a)[4],
                             const uint32_t (&b)[4]) {
#ifdef RX_EMU
  emu::mma_m16n16k16_bf16(d0, d1, a, b);
#else
  mma_m16n8k16(d0, a, b[0], b[1]);
  mma_m16n8k16(d1, a, b[2], b[3]);
#endif
}

// Two row tiles.
RX_DEVICE void mma_m32n8k16(float (&d0)[4], float (&d1)[4], const uint32_t (&a0)[4],
                            const uint32_t (&a1)[4], uint32_t b0, uint32_t b1) {
#ifdef RX_EMU
  const uint32_t b[2] = {b0, b1};
  emu::mma_m32n8k16_bf16(d0, d1, a0, a1, b);
#else
  mma_m16n8k16(d0, a0, b0, b1);
  mma_m16n8k16(d1, a1, b0, b1);
#endif
}

// Two row tiles by two column tiles, with b as one ldmatrix_x4 loads it.
RX_DEVICE void mma_m32n16k16(float (&d00)[4], float (&d01)[4], float (&d10)[4], float (&d11)[4],
                             const uint32_t (&a0)[4], const uint32_t (&a1)[4],
                             const uint32_t (&b)[4]) {
#ifdef RX_EMU
  emu::mma_m32n16k16_bf16(d00, d01, d10, d11, a0, a1, b);  // one rendezvous instead of four
#else
  mma_m16n8k16(d00, a0, b[0], b[1]);
  mma_m16n8k16(d01, a0, b[2], b[3]);
  mma_m16n8k16(d10, a1, b[0], b[1]);
  mma_m16n8k16(d11, a1, b[2], b[3]);
#endif
}

// ---- cp.async: global to shared; bytes beyond src_bytes become zero
template <int Bytes>
RX_DEVICE void cp_async(uint32_t dst, const void* src, int src_bytes = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async moves 4, 8 or 16 bytes");
#ifdef RX_EMU
  emu::cp_async(dst, src, Bytes, src_bytes);
#else
  if constexpr (Bytes == 16)  // past L1: tiles are read once a CTA
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src),
                 "r"(src_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(dst), "l"(src), "n"(Bytes),
                 "r"(src_bytes)
                 : "memory");
#endif
}
RX_DEVICE void cp_async_commit() {
  RX_EITHER(emu::cp_commit(), asm volatile("cp.async.commit_group;" :: : "memory"));
}
template <int GroupsLeft>
RX_DEVICE void cp_async_wait() {
  RX_EITHER(emu::cp_wait(GroupsLeft),
            asm volatile("cp.async.wait_group %0;" ::"n"(GroupsLeft) : "memory"));
}

// ---- flags in global memory: what a CTA wrote before the release is seen after the acquire
RX_DEVICE void red_add_release(uint32_t* flag_g, uint32_t n) {
#ifdef RX_EMU
  emu::atomic_add(flag_g, n, emu::Order::kRelease);
#else
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(flag_g), "r"(n) : "memory");
#endif
}
RX_DEVICE uint32_t ld_acquire(const uint32_t* flag_g) {
#ifdef RX_EMU
  return emu::atomic_load(flag_g, emu::Order::kAcquire);
#else
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(flag_g) : "memory");
  return v;
#endif
}

}  // namespace rx
