// Softmax in base 2 of one row of scores.
#pragma once

#include "vec.hpp"

namespace rx::cpu::RX_ISA {

// p <- 2^(scores - max), 0 from `count` up to the next multiple of W; returns 1 / sum(p). The true
// maximum, so logits of any size are right. `p` may be `scores`, which has room for that multiple.
template <bool kCoarse, class Out>
RX_INLINE float softmax2(const float* scores, Out* p, int count, float* maximum = nullptr) {
  const int whole = count / W * W;
  const VI in_tail = lane_numbers() < count - whole;
  V top = splat(-INFINITY);
  for (int i = 0; i < whole; i += W) top = at_least(top, load(scores + i));
  if (whole < count) top = at_least(top, in_tail ? load(scores + whole) : splat(-INFINITY));
  const float max = reduce_max(top);
  if (maximum) *maximum = max;
  V sum = {};
  for (int i = 0; i < whole; i += W) {
    const V e = exp2<kCoarse>(load(scores + i) - max);
    store(p + i, e);
    sum += e;
  }
  if (whole < count) {
    const V e = in_tail ? exp2<kCoarse>(load(scores + whole) - max) : V{};
    store(p + whole, e);
    sum += e;
  }
  return 1.f / reduce_add(sum);
}

}  // namespace rx::cpu::RX_ISA
