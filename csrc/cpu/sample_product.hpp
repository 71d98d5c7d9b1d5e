// One small product on a core's own inner loop, by which dispatch.cpp compares two cores.
#pragma once

#include "workspace.hpp"

namespace rx::cpu::RX_ISA {

constexpr int kSampleRows = 28, kSampleDepth = 512;

// All operands are zero, as `scratch` was when it was allocated (kSampleBytes).
template <class Core>
void sample_product(void* scratch, int columns) {
  using Act = typename Core::Act;
  const Linear l{Columns::plain, kSampleDepth, columns, {}};
  Carver c{(char*)scratch};
  const int rows = kSampleRows + Core::kSpareRows;
  const Mat<Act> a = make_mat(c.take<Act>(mat_size(rows, kSampleDepth)), rows, kSampleDepth);
  const Mat<Act> out = make_mat(c.take<Act>(mat_size(rows, columns)), rows, columns);
  const typename Core::Scratch own = Core::carve_scratch(c, rows, kSampleDepth);
  const void* const weight = c.take<char>(Core::linear_bytes(l));
  Core::enter(own);
  Core::gemm(own, a, {0, kSampleRows}, l, weight, {0, l.panels()}, weight, [=](int panel) {
    Act* const p = out.at(0, panel * kPanel);
    return [=](int row, V v0, V v1) __attribute__((always_inline)) {
      store(p + row * columns, v0);
      store(p + row * columns + W, v1);
    };
  });
  Core::leave();
}

}  // namespace rx::cpu::RX_ISA
