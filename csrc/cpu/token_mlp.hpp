// The token-mixing half of a token-MLP block: h' = h^T;  h' = rms(h' + swiglu_T(h'));  h = h'^T.
//
// A row of these products is a column of h, so each thread takes its own columns of h through the
// whole stage, kTokenRows at a time: transpose in, two products, norm, transpose out.
#pragma once

#include "epilogues.hpp"
#include "workspace.hpp"

namespace rx::cpu::RX_ISA {

template <class Core>
struct TokenMlp {
  using Act = typename Core::Act;

  Workspace<Core>& ws;
  const PackedBlock& packed;
  int tokens, hidden;

  static constexpr int kSlabRows = kTokenRows + Core::kSpareRows;

  // out <- the new h, normalised, for the columns [columns) of all samples (sample-major).
  void run(Mat<Act> h, const float* scale, Range columns, Mat<Act> out) {
    const Linear in = linear_of(packed.shape, mixer_in), back = linear_of(packed.shape, mixer_out);
    for (int first = columns.begin; first < columns.end;) {
      const int sample = first / hidden, d = first % hidden;
      const int count = imin(imin(kTokenRows, hidden - d), columns.end - first);
      const long row0 = (long)sample * tokens;
      transpose_in(h, scale, row0, d, count);
      Core::gemm(ws.gemm, ws.token_in, {0, count}, in, packed.weight[mixer_in], {0, in.panels()},
                 packed.weight[mixer_out], gated<Core>(ws.token_middle, nullptr));
      Core::gemm(ws.gemm, ws.token_middle, {0, count}, back, packed.weight[mixer_out],
                 {0, back.panels()}, packed.weight[gate_up],
                 residual<Core>(ws.token_in, nullptr, ws.token_out, ws.token_sums, kSlabRows));
      sum_to_scale(ws.token_sums, kSlabRows, count, tokens, packed.shape.eps, ws.token_scale);
      transpose_out(ws.token_out, ws.token_scale, out, row0, d, count);
      first += count;
    }
  }

  // token_in[i, t] <- h[t, d + i]; zeros from T to the padded width.
  void transpose_in(Mat<Act> h, const float* scale, long row0, int d, int count) {
    for (int t = 0; t < round_up(tokens, kAlign); t += W) {
      for (int i = 0; i < count; i += W) {
        V block[W];
        for (int j = 0; j < W; ++j) {
          const long row = row0 + t + j;
          block[j] = t + j < tokens ? load(h.at(row, d + i)) * scale[row] : V{};
        }
        transpose(block);
        for (int j = 0; j < W; ++j) store(ws.token_in.at(i + j, t), block[j]);
      }
    }
  }

  // out[t, d + i] <- from[i, t] * scale[i]
  void transpose_out(Mat<Act> from, const float* scale, Mat<Act> out, long row0, int d, int count) {
    for (int i = 0; i < count; i += W) {
      for (int t = 0; t < tokens; t += W) {
        V block[W];
        for (int j = 0; j < W; ++j) block[j] = load(from.at(i + j, t)) * scale[i + j];
        transpose(block);
        for (int j = 0; j < imin(W, tokens - t); ++j) store(out.at(row0 + t + j, d + i), block[j]);
      }
    }
  }
};

}  // namespace rx::cpu::RX_ISA
