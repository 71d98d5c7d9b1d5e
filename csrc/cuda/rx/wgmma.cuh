// wgmma.cuh - sm_90a: asynchronous products of a warpgroup (128 threads), and its register budget.
//
//   wgmma_fence(); wgmma<N>(...) ...; wgmma_commit(); ... wgmma_wait<groups left>();
//
// D[64, N] fp32 += A[64, 16] * B[16, N], bf16. Thread t holds rows 16*(t/32) + t%32/4 (and + 8) and
// columns 8*j + 2*(t%4) (and the next): d[4*j + 2*half + e]. Leave d alone from issue to wait.
#pragma once
#include "common.cuh"

namespace rx {

// A K-major operand with the 128-byte swizzle: rows of 64 bf16, the 16-byte chunks of row r
// exchanged by r % 8, groups of eight rows `group_stride` bytes apart, tile aligned to 1024 bytes.
// The next 16 columns begin 32 bytes on.
RX_DEVICE uint64_t wgmma_desc_128b(uint32_t addr, uint32_t group_stride = 1024) {
  return uint64_t((addr & 0x3ffff) >> 4) | 1ull << 16 | uint64_t(group_stride >> 4) << 32 |
         1ull << 62;
}
// An operand stored N-major (TransB): rows of k, each 64 columns of N wide with the same swizzle;
// tiles of 64 columns `tile_stride` bytes apart. The next 16 of k begin 16 rows (2048 bytes) on.
RX_DEVICE uint64_t wgmma_desc_128b_mn(uint32_t addr, uint32_t tile_stride) {
  return uint64_t((addr & 0x3ffff) >> 4) | uint64_t(tile_stride >> 4) << 16 |
         uint64_t(1024 >> 4) << 32 | 1ull << 62;
}
// A K-major operand with the 64-byte swizzle: rows of 32 bf16, the 16-byte chunks of row r
// exchanged by r / 2 % 4, tile aligned to 512 bytes. The next 16 columns begin 32 bytes on.
RX_DEVICE uint64_t wgmma_desc_64b(uint32_t addr) {
  return uint64_t((addr & 0x3ffff) >> 4) | 1ull << 16 | uint64_t(512 >> 4) << 32 | 2ull << 62;
}
// A K-major operand with the 32-byte swizzle: rows of 16 bf16, the two chunks of row r exchanged by
// r / 4 % 2, tile aligned to 256 bytes.
RX_DEVICE uint64_t wgmma_desc_32b(uint32_t addr) {
  return uint64_t((addr & 0x3ffff) >> 4) | 1ull << 16 | uint64_t(256 >> 4) << 32 | 3ull << 62;
}
// Byte offset of 16-byte chunk c (0..7) of row r in a tile with the 128-byte swizzle.
RX_DEVICE uint32_t swizzle_128b(int r, int c) { return uint32_t(r * 128 + ((c ^ (r & 7)) << 4)); }

RX_DEVICE void wgmma_fence() {
  RX_EITHER(emu::wgmma_fence(), asm volatile("wgmma.fence.sync.aligned;" :: : "memory"));
}
RX_DEVICE void wgmma_commit() {
  RX_EITHER(emu::wgmma_commit(), asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory"));
}
template <int GroupsLeft>
RX_DEVICE void wgmma_wait() {
  RX_EITHER(emu::wgmma_wait(GroupsLeft),
            asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GroupsLeft) : "memory"));
}

// Keeps the compiler from setting up accumulators or register operands later than here, and from
// reading accumulators earlier. Call it before wgmma_fence on arrays that hold constants, otherwise
// ptxas may find them written between products and serialise these; after wgmma_wait on what is
// read next; and on operands whose sources should not stay in registers until the product.
template <int R>
RX_DEVICE void wgmma_pin(float (&d)[R]) {
#ifdef RX_EMU
  (void)d;
#else
#pragma unroll
  for (int i = 0; i < R; i++) asm volatile("" : "+f"(d[i])::"memory");
#endif
}
template <int R>
RX_DEVICE void wgmma_pin(uint32_t (&a)[R][4]) {
#ifdef RX_EMU
  (void)a;
#else
#pragma unroll
  for (int i = 0; i < 4 * R; i++) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
#endif
}

// The warpgroup gives up, or takes, registers: multiples of 8; all warpgroups together 65536 / 128.
template <int Registers>
RX_DEVICE void setmaxnreg_dec() {
  RX_EITHER(emu::setmaxnreg(Registers, false),
            asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers)));
}
template <int Registers>
RX_DEVICE void setmaxnreg_inc() {
  RX_EITHER(emu::setmaxnreg(Registers, true),
            asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers)));
}

// ---- the products
// wgmma<N>(d, a, b, scale_d): a is a descriptor or four registers, b a descriptor, scale_d 0 starts
// from zero. TransB 1: B is N-major in shared memory; TransA 1: A is M-major there.
#ifdef RX_EMU
template <int N, int TransB = 0, int TransA = 0>
inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int scale_d) {
  emu::wgmma({d, nullptr, a, b, N, scale_d, TransA, TransB, 0, 0});
}
template <int N, int TransB = 0>
inline void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int scale_d) {
  emu::wgmma({d, a, 0, b, N, scale_d, 0, TransB, 0, 0});
}
#else
// Operand lists: RX_TEN(4) is "%40, ... %49", RX_F8(16) is the accumulators d[16] to d[23].
#define RX_TEN(t)                                                                                  \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t \
  "9, "
#define RX_F8(i)                                                                              \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define RX_F32(i) RX_F8(i), RX_F8(i + 8), RX_F8(i + 16), RX_F8(i + 24)
#define RX_TEN_TO_SIXTY RX_TEN() RX_TEN(1) RX_TEN(2) RX_TEN(3) RX_TEN(4) RX_TEN(5)
#define RX_TEN_TO_NINETY RX_TEN_TO_SIXTY RX_TEN(6) RX_TEN(7) RX_TEN(8)

#define RX_OPERANDS_32 RX_TEN() "%10, %11, %12, %13, %14, %15"
#define RX_OPERANDS_64 RX_TEN() RX_TEN(1) RX_TEN(2) "%30, %31"
#define RX_OPERANDS_128 RX_TEN_TO_SIXTY "%60, %61, %62, %63"
#define RX_OPERANDS_192 RX_TEN_TO_NINETY "%90, %91, %92, %93, %94, %95"
#define RX_OPERANDS_256 \
  RX_TEN_TO_NINETY RX_TEN(9) RX_TEN(10) RX_TEN(11) "%120, %121, %122, %123, %124, %125, %126, " \
                                                   "%127"
#define RX_ACCUMULATORS_32 RX_F8(0), RX_F8(8)
#define RX_ACCUMULATORS_64 RX_F32(0)
#define RX_ACCUMULATORS_128 RX_F32(0), RX_F32(32)
#define RX_ACCUMULATORS_192 RX_F32(0), RX_F32(32), RX_F32(64)
#define RX_ACCUMULATORS_256 RX_F32(0), RX_F32(32), RX_F32(64), RX_F32(96)

// p0.. are the numbers of the operands after the accumulators.
#define RX_WGMMA(N, p0, p1, p2, p3, p4, p5, p6)                                                    \
  template <int TransB, int TransA>                                                                \
  RX_DEVICE void wgmma_ss_##N(float (&d)[N / 2], uint64_t a, uint64_t b, int scale_d) {            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p2                                          \
                 ", 0;\n"                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" RX_OPERANDS_##N      \
                 "}, %" #p0 ", %" #p1 ", p, 1, 1, %" #p3 ", %" #p4 ";\n}"                          \
                 : RX_ACCUMULATORS_##N                                                             \
                 : "l"(a), "l"(b), "r"(scale_d), "n"(TransA), "n"(TransB));                        \
  }                                                                                                \
  template <int TransB>                                                                            \
  RX_DEVICE void wgmma_rs_##N(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,               \
                              int scale_d) {                                                       \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p5                                          \
                 ", 0;\n"                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" RX_OPERANDS_##N      \
                 "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4 ", p, 1, 1, %" #p6 ";\n}"    \
                 : RX_ACCUMULATORS_##N                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d), "n"(TransB)); \
  }
RX_WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
RX_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
RX_WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
RX_WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
RX_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)

template <int N, int TransB = 0, int TransA = 0>
RX_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int scale_d) {
  static_assert(N == 32 || N == 64 || N == 128 || N == 192 || N == 256,
                "add the width to rx/wgmma.cuh");
  if constexpr (N == 32) wgmma_ss_32<TransB, TransA>(d, a, b, scale_d);
  if constexpr (N == 64) wgmma_ss_64<TransB, TransA>(d, a, b, scale_d);
  if constexpr (N == 128) wgmma_ss_128<TransB, TransA>(d, a, b, scale_d);
  if constexpr (N == 192) wgmma_ss_192<TransB, TransA>(d, a, b, scale_d);
  if constexpr (N == 256) wgmma_ss_256<TransB, TransA>(d, a, b, scale_d);
}
template <int N, int TransB = 0>
RX_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int scale_d) {
  static_assert(N == 32 || N == 64 || N == 128 || N == 192 || N == 256,
                "add the width to rx/wgmma.cuh");
  if constexpr (N == 32) wgmma_rs_32<TransB>(d, a, b, scale_d);
  if constexpr (N == 64) wgmma_rs_64<TransB>(d, a, b, scale_d);
  if constexpr (N == 128) wgmma_rs_128<TransB>(d, a, b, scale_d);
  if constexpr (N == 192) wgmma_rs_192<TransB>(d, a, b, scale_d);
  if constexpr (N == 256) wgmma_rs_256<TransB>(d, a, b, scale_d);
}
#endif

}  // namespace rx
