// Products of int8 (W8A8) on the rest of another core: weights as `recurx.quantize` made them, an
// int8 code and a scale for each output channel; activations quantised row by row on the way in.
//
//   C[row, column] = (sum_k (q[row, k] + 128) c[k, column]  -  128 sum_k c[k, column])
//                    * scale[row] * scale[column]
//
// vpdpbusd multiplies unsigned bytes by signed ones, hence the 128; the second sum is made at
// packing, and is where the accumulators start. Sums are exact, in int32. States, norms, attention
// and all epilogues are those of the base core.
//
//   a panel: [quads of k][2 sides][W columns][4 bytes], then W-vectors of both sides: starts,
//   scales
#pragma once

#include "int8.hpp"
#include "micro_kernel.hpp"
#include "pairs.hpp"

namespace rx::cpu::RX_ISA {

// kStep: what the depth is padded to, with weights of zero.
template <class Base, int kStep = 4>
struct Int8Core : Base {
  using State = typename Base::State;
  using Act = typename Base::Act;
  static constexpr bool kVariants = false;

  struct Scratch : Base::Scratch {
    uint8_t* codes;  // of the rows of a product, [rows][row_bytes(K)], 128 added
    float* scales;   // [rows]
  };
  template <class Carver>
  static Scratch carve_scratch(Carver& carver, int rows, int depth) {
    Scratch own{};
    own.codes = carver.template take<uint8_t>(rows * row_bytes(depth));
    own.scales = carver.template take<float>(rows);
    return own;
  }

  static long row_bytes(int depth) { return round_up(depth, imax(kStep, kAlign)); }

  // ---- weights --------------------------------------------------------------------------------

  static constexpr int kQuadBytes = kPanel * 4;
  static constexpr int kStepQuads = 8;  // of the depth, between two prefetches
  static int quads(const Linear& l) { return round_up(l.in, kStep) / 4; }
  static long panel_bytes(const Linear& l) { return (long)(quads(l) + 2) * kQuadBytes; }
  static size_t linear_bytes(const Linear& l) { return (size_t)l.panels() * panel_bytes(l); }
  static const void* panel_at(const Linear& l, const void* weight, int panel) {
    return (const char*)weight + panel * panel_bytes(l);
  }

  static void pack(const Linear& l, const RawWeight& raw, void* out) {
    const int8_t* const codes = (const int8_t*)raw.data;
    for (int panel = 0; panel < l.panels(); ++panel) {
      int8_t* const dst = (int8_t*)out + panel * panel_bytes(l);
      int32_t* const starts = (int32_t*)(dst + (long)quads(l) * kQuadBytes);
      float* const scales = (float*)(starts + kPanel);
      for (int column = 0; column < kPanel; ++column) {
        const int row = l.source(panel, column / W, column % W);
        int32_t sum = 0;
        for (int k = 0; k < quads(l) * 4; ++k) {
          const int8_t code = row >= 0 && k < l.in ? codes[(long)row * l.in + k] : 0;
          dst[((long)k / 4 * kPanel + column) * 4 + k % 4] = code;
          sum += code;
        }
        starts[column] = (int32_t)(-128u * (uint32_t)sum);
        scales[column] = row >= 0 ? raw.scales[row] : 0.f;
      }
    }
  }

  // ---- activations ----------------------------------------------------------------------------

  // The code of the largest value of a row is 127. A row with an infinity or a NaN is all NaN.
  static void quantize_rows(const Scratch& own, Mat<Act> a, Range rows, int depth) {
    const int wide = round_up(depth, kAlign);  // zeros from `depth` on
    for (int row = rows.begin; row < rows.end; ++row) {
      uint8_t* const codes = own.codes + row * row_bytes(depth);
      // As integers, absolute values have their order, with NaN above all.
      VI top = {};
      for (int k = 0; k < wide; k += W) {
        const VI bits = (VI)load(a.at(row, k)) & 0x7fffffff;
        top = bits > top ? bits : top;
      }
      const float largest = lane_max(top);
      if (largest - largest != 0) {
        memset(codes, 128, wide);
        own.scales[row] = NAN;
        continue;
      }
      // Rounded in integers, to nearest: no compiler can fuse that with the product before it.
      const V to_codes = splat(largest > 1e-30f ? 127.f * 65536 / largest : 0.f);
      for (int k = 0; k < wide; k += W) {
        const VI fixed = __builtin_convertvector(load(a.at(row, k)) * to_codes, VI);
        store_codes(codes + k, (fixed + 32768) >> 16);
      }
      own.scales[row] = largest / 127;
    }
  }
  static float lane_max(VI v) {
    int32_t lanes[W], top = 0;
    memcpy(lanes, &v, sizeof v);
    for (int i = 0; i < W; ++i) top = imax(top, lanes[i]);
    float value;
    memcpy(&value, &top, sizeof value);
    return value;
  }

  // ---- products -------------------------------------------------------------------------------

  // acc[r] += (codes of row r) * panel
  template <int kM>
  RX_INLINE void accumulate_quads(const uint8_t* a, long lda, const char* b, int count,
                                  VI (&acc)[kM][2], Prefetcher& prefetch) {
    const auto quad = [&](int k) __attribute__((always_inline)) {
      const VI left = load_lanes(b + k * kQuadBytes);
      const VI right = load_lanes(b + k * kQuadBytes + kQuadBytes / 2);
#pragma GCC unroll 16
      for (int r = 0; r < kM; ++r) {
        const VI x = splat_quad(a + r * lda + 4 * k);
        acc[r][0] = dot_quad(acc[r][0], x, left);
        acc[r][1] = dot_quad(acc[r][1], x, right);
      }
    };
    for (; count >= kStepQuads; count -= kStepQuads) {
      prefetch.step();
#pragma GCC unroll 4
      for (int k = 0; k < kStepQuads; ++k) quad(k);
      a += 4 * kStepQuads;
      b += kStepQuads * kQuadBytes;
    }
    for (int k = 0; k < count; ++k) quad(k);
  }

  // epilogue(panel) gives finish(row, v0, v1), called for every row of `rows`.
  template <class Epilogue>
  static __attribute__((noinline)) void gemm(const Scratch& own, Mat<Act> a, Range rows,
                                             const Linear& l, const void* weight, Range panels,
                                             const void* next_weight, Epilogue epilogue) {
    if (rows.begin >= rows.end) return;
    quantize_rows(own, a, rows, l.in);
    const char* const w = (const char*)weight;
    const long panel_size = panel_bytes(l), lda = row_bytes(l.in);
    const int per_chunk = imax(1, (int)(RX_L2_CHUNK_BYTES / panel_size));
    const int lines =
        ceil_div(kStepQuads * kQuadBytes / 64, ceil_div(rows.end - rows.begin, kRows));
    for (int first = panels.begin; first < panels.end; first += per_chunk) {
      const int last = imin(panels.end, first + per_chunk);
      const bool more = last < panels.end;
      Prefetcher prefetch{more ? w + last * panel_size : (const char*)next_weight, lines};
      for_row_tiles(rows.begin, rows.end, [&](int row, auto m) __attribute__((always_inline)) {
        constexpr int kM = decltype(m)::value;
        for (int panel = first; panel < last; ++panel) {
          const char* const b = w + panel * panel_size;
          const char* const starts = b + (long)quads(l) * kQuadBytes;
          const float* const scales = (const float*)(starts + kQuadBytes);
          VI acc[kM][2];
#pragma GCC unroll 16
          for (int r = 0; r < kM; ++r) {
            acc[r][0] = load_lanes(starts);
            acc[r][1] = load_lanes(starts + kQuadBytes / 2);
          }
          accumulate_quads(own.codes + row * lda, lda, b, quads(l), acc, prefetch);
          auto finish = epilogue(panel);
          const V scale0 = load(scales), scale1 = load(scales + W);
#pragma GCC unroll 16
          for (int r = 0; r < kM; ++r) {
            const V by = splat(own.scales[row + r]);
            finish(row + r, __builtin_convertvector(acc[r][0], V) * by * scale0,
                   __builtin_convertvector(acc[r][1], V) * by * scale1);
          }
        }
      });
    }
  }
};

}  // namespace rx::cpu::RX_ISA
