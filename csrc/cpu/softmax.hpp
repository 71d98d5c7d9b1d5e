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

// What a query sees of `count` keys: all of them, as in TRM and HRM, ...
struct SeesAll {
  template <bool kCoarse, class Out>
  RX_INLINE float softmax(const float* scores, Out* p, int, int count, float* maximum = nullptr) {
    return softmax2<kCoarse>(scores, p, count, maximum);
  }
  RX_INLINE V kept(V weight, VI, VI) { return weight; }
};

// ... or those from [0, prefix) and, if causal, up to itself, that are less than `window` away:
// always an interval, which holds the query's own place; of these not the keys that are padding.
struct Sees {
  bool causal;
  int prefix, window;             // window 0: all
  const int32_t* keys = nullptr;  // -1 or 0 for each that is seen or not, and on; null: all are

  bool all() const { return !causal && !window && !keys; }

  // 0 for what is not seen; all zeros, and a maximum of 0, where that is everything.
  template <bool kCoarse, class Out>
  float softmax(const float* scores, Out* p, int query, int count, float* maximum = nullptr) const {
    query = imin(query, count - 1);  // rows of a last tile that nobody reads
    const int begin = window ? imax(0, query - window + 1) : 0;
    int end = causal ? imin(count, imax(prefix, query + 1)) : count;
    if (window) end = imin(end, query + window);
    const auto seen = [=](int i) __attribute__((always_inline)) {
      const VI key = lane_numbers() + i, in_reach = (key >= begin) & (key < end);
      return keys ? in_reach & load_keys(i) : in_reach;
    };
    V top = splat(-INFINITY), sum{};
    const int first = begin / W * W, last = round_up(end, W);
    for (int i = first; i < last; i += W)
      top = at_least(top, seen(i) ? load(scores + i) : splat(-INFINITY));
    const float max = reduce_max(top);
    if (maximum) *maximum = max;
    for (int i = 0; i < round_up(count, W); i += W) {
      V e{};
      if (i >= first && i < last) e = seen(i) ? exp2<kCoarse>(load(scores + i) - max) : V{};
      store(p + i, e);
      sum += e;
    }
    const float total = reduce_add(sum);
    if (!keys || total != 0.f) return 1.f / total;
    if (maximum) *maximum = 0.f;
    return 0.f;
  }

  // The weights of lanes whose query sees their key, 0 of the others. Keys are one, or neighbours.
  V kept(V weight, VI query, VI key) const {
    VI sees = query == query;
    if (causal) sees = (key <= query) | (key < prefix);
    if (window) sees &= (query - key < window) & (key - query < window);
    if (keys) sees &= key[0] == key[1] ? VI{} + keys[key[0]] : load_keys(key[0]);
    return sees ? weight : V{};
  }

 private:
  VI load_keys(int first) const {
    VI some;
    memcpy(&some, keys + first, sizeof some);
    return some;
  }
};

}  // namespace rx::cpu::RX_ISA
