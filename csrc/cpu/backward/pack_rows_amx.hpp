// pack_rows.hpp for AMX: [step][side][pair of k][column][k of the pair], as AmxCore::pack writes.
#pragma once

#include "../gemm_amx.hpp"
#include "pack_rows.hpp"

namespace rx::cpu::RX_ISA {

template <>
struct RowPacker<AmxCore> {
  // The vector of pairs that holds row `k` of a side.
  static bf16* pairs(const Linear& l, void* weight, int panel, int side, int k) {
    bf16* const p = (bf16*)((char*)weight + panel * AmxCore::panel_bytes(l));
    return p + ((k / kTileDepth * 2 + side) * 16 + k % kTileDepth / 2) * 32;
  }
  template <class Source>
  static void run(const Linear& l, void* weight, int panel, int first, int count, Source x) {
    for (int side = 0; side < 2; ++side) {
      const int col = panel * kPanel + side * W;
      for (int r = 0; r < count;) {
        const int k = first + r;
        bf16* const p = pairs(l, weight, panel, side, k);
        VU both;
        if (k % 2 == 0 && r + 1 < count) {
          both = bf16_bits(x(r, col)) | bf16_bits(x(r + 1, col)) << 16;
          r += 2;
        } else {  // the other half of the pair came or comes with another stretch of rows
          memcpy(&both, p, sizeof both);
          const VU bits = bf16_bits(x(r, col));
          both = k % 2 ? (both & 0xffffu) | bits << 16 : (both & 0xffff0000u) | bits;
          r += 1;
        }
        memcpy(p, &both, sizeof both);
      }
    }
  }
  static void clear(const Linear& l, void* weight, int panel, int first, int count) {
    run(l, weight, panel, first, count, [](long, int) { return V{}; });
  }
  static void finish(const Linear& l, void* weight, int panel) {
    clear(l, weight, panel, l.in, AmxCore::steps(l) * kTileDepth - l.in);
  }
};

}  // namespace rx::cpu::RX_ISA
