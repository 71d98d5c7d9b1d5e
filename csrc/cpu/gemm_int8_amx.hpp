// Products of int8 (W8A8) with AMX: the panels and the rows of csrc/cpu/gemm_int8.hpp, the tiles
// and the order of csrc/cpu/gemm_amx.hpp. Sums are exact, so the bits are those of vpdpbusd.
#pragma once

#include "gemm_amx.hpp"
#include "gemm_int8.hpp"

namespace rx::cpu::RX_ISA {

struct Int8Tiles : OnePart {  // [16 quads of k][2 sides][16 columns][4]
  static constexpr long kLine = 128, kOtherSide = 64;
  static constexpr int kRowsAStep = 2;  // for there are half as many steps
  template <int kC, int kA, int kB>
  RX_INLINE void dot() {
    tile_dot_int8<kC, kA, kB>();
  }
};

struct AmxInt8Core : Int8Core<AmxCore, 64> {
  using Rows = Int8Core<AmxCore, 64>;

  template <class Carver>
  static Scratch carve_scratch(Carver& carver, int rows, int depth) {
    Scratch own = Rows::carve_scratch(carver, rows, depth);
    (AmxCore::Scratch&)own = AmxCore::carve_scratch(carver, rows, depth);
    return own;
  }

  // epilogue(panel) gives finish(row, v0, v1), called for every row of `rows`.
  template <class Epilogue>
  static __attribute__((noinline)) void gemm(const Scratch& own, Mat<bf16> a, Range rows,
                                             const Linear& l, const void* weight, Range panels,
                                             const void* next_weight, Epilogue epilogue) {
    if (rows.begin >= rows.end || panels.begin >= panels.end) return;
    quantize_rows(own, a, rows, l.in);
    const long lda = row_bytes(l.in), after = (long)quads(l) * kQuadBytes;
    const uint8_t* const codes = own.codes;
    const float* const row_scales = own.scales;
    const auto row_at = [=](int row, int step) __attribute__((always_inline)) {
      return (const char*)codes + row * lda + step * 64;
    };
    // Values of a tile are bits of int32 here.
    const auto scaled = [=](int panel) __attribute__((always_inline)) {
      const char* const starts = (const char*)panel_at(l, weight, panel) + after;
      const float* const scales = (const float*)(starts + kQuadBytes);
      auto finish = epilogue(panel);
      return [=](int row, V v0, V v1) __attribute__((always_inline)) {
        const VU sum0 = (VU)v0 + (VU)load_lanes(starts);
        const VU sum1 = (VU)v1 + (VU)load_lanes(starts + kQuadBytes / 2);
        const V by = splat(row_scales[row]);
        finish(row, __builtin_convertvector((VI)sum0, V) * by * load(scales),
               __builtin_convertvector((VI)sum1, V) * by * load(scales + W));
      };
    };
    AmxCore::multiply<Int8Tiles>(own, row_at, lda, rows, quads(l) / 16, weight, panel_bytes(l),
                                 panels, next_weight, scaled);
  }
};

}  // namespace rx::cpu::RX_ISA
