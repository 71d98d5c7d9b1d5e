// The two ends of a variant's sublayer in a window's backward, and its products.
//
// A sublayer goes back from the gradient `sum` of what left it: through its norms and scale to
// `narrow`, the gradient of f's result, and through the factor of h, in place; through f to that of
// what f read, which is added to `sum` itself where f read h (post), else to `d_n`, from which a
// norm leads to h.
#pragma once

#include "block_backward.hpp"
#include "variant_forward.hpp"

namespace rx::cpu::RX_ISA {

template <class Core>
struct SublayerBackward : VariantForward<Core> {
  using Forward = VariantForward<Core>;
  using State = typename Core::State;
  using Act = typename Core::Act;
  using Forward::D, Forward::T, Forward::v, Forward::own, Forward::ws, Forward::team;
  using Forward::rows, Forward::shape, Forward::vector;

  const BlockBackward<Core>& products;

  // Rows of a sublayer: of h, or of h turned over.
  template <class X>
  struct Sublayer {
    int number, rows, width, ld;
    const X* x;       // what enters it
    const State* y;   // the result of f
    float* sum;       // the gradient of what leaves it, in the end that of x
    float* d_n;       // of what f reads
    Mat<Act> normed;  // what f reads
    Mat<Act> narrow;  // the gradient of y
    long first = -1;  // if rows are columns of h: which the first is
  };

  SublayerBackward(const Forward& forward, const BlockBackward<Core>& products)
      : Forward(forward), products(products) {}

  // ---- norms and sums -------------------------------------------------------------------------

  VectorGradient gradient(int which) const {
    const int at = products.number * slots_per_block + matrices_per_block + which;
    const VectorGradient to{products.job.d_weights[at], ws.fresh[at]};
    ws.fresh[at] = false;
    return to;
  }

  template <class X, class Dy, class Put>
  void norm_back(const RowNorm& n, int count, X x, Dy d, Put put, int weight, bool biased) const {
    norm_backward(team, n, count, own.stats, own.other, x, d, put,
                  n.weight ? gradient(weight) : VectorGradient{},
                  biased && n.bias ? gradient(weight + 1) : VectorGradient{});
  }

  void through_norm(const Kept<State>& k) {
    const RowsOf<State> x{k.h, D, D};
    float* const sum = ws.sum;
    norm_back(
        norm_of(this->packed, v.norm, D, norm1), rows, x, RowsOf<float>{sum, D, D},
        [=](int row, int col, V d) { store(sum + (long)row * D + col, d); }, norm1, true);
    team.sync();
  }

  // narrow <- the gradient of y; sum <- that of x beside f; normed <- what f read.
  template <class X>
  void leave_back(const Sublayer<X>& one) {
    const int weight = one.number == 1 ? norm1 : norm2, ld = one.ld, width = one.width;
    const SublayerEnd end = this->end(one.number, width);
    const bool sandwich = v.placement == Placement::sandwich;
    const X* const x = one.x;
    const State* const y = one.y;
    float* const sum = one.sum;
    const Mat<Act> narrow = one.narrow;
    const float* const dropped = end.drops.matter() ? find_dropped(one, end.drops) : nullptr;
    const auto by = [=](int row, int col) {
      const V scale = end.scale.at(col);
      return dropped ? scale * load(dropped + (long)row * ld + col) : scale;
    };
    const auto entered = [=](int row, int col) { return load(x + (long)row * ld + col); };
    const auto result = [=](int row, int col) {
      return within(load(y + (long)row * ld + col), col, width);
    };
    const auto left = [=](int row, int col) { return load(sum + (long)row * ld + col); };
    this->enter(one.number, x, one.rows, width, ld, one.normed);
    if (v.placement == Placement::post) {
      norm_back(
          end.norm, one.rows,
          [=](int row, int col) {
            return fma(result(row, col), by(row, col), entered(row, col) * end.skip.at(col));
          },
          left, [=](int row, int col, V d) { store(sum + (long)row * ld + col, d); }, weight, true);
      team.sync();
    }
    const Range mine = share(one.rows, team.tid, team.size);
    if (end.skip.each) {
      factor_back(one, one.number == 1 ? skip1 : skip2, v.skip_each, v.skip_scale, entered);
      team.sync();  // the scale's gradient is summed in the same place
    }
    if (sandwich) {
      if (end.scale.each) normed_scale_back(one, end);
      norm_back(
          end.out_norm, one.rows, result,
          [=](int row, int col) { return left(row, col) * by(row, col); },
          [=](int row, int col, V d) { store(narrow.at(row, col), d); }, weight + 2, true);
    } else {
      if (end.scale.each)
        scale_back(one, [=](int row, int col) {
          return dropped ? result(row, col) * load(dropped + (long)row * ld + col)
                         : result(row, col);
        });
      for (int row = mine.begin; row < mine.end; ++row)
        for (int col = 0; col < ld; col += W)
          store(narrow.at(row, col), left(row, col) * by(row, col));
    }
    for (int row = mine.begin; end.skip.matters() && row < mine.end; ++row)
      for (int col = 0; col < ld; col += W)
        store(sum + (long)row * ld + col, left(row, col) * end.skip.at(col));
    float* const d_n = one.d_n;
    for (int row = mine.begin; v.pre_normed() && row < mine.end; ++row)
      for (int col = 0; col < ld; col += W) store(d_n + (long)row * ld + col, V{});
    team.sync();
  }

  // [rows, ld] of what a sublayer's result is multiplied by; `enter` meets before it is read.
  template <class X>
  const float* find_dropped(const Sublayer<X>& one, const Drops& drops) const {
    const Range mine = share(one.rows, team.tid, team.size);
    for (int row = mine.begin; row < mine.end; ++row) {
      float* const to = own.dropped + (long)row * one.ld;
      for (int col = 0; col < one.ld; col += W) store(to + col, splat(1.f));
      one.first < 0 ? drops.of_row(row, to) : drops.of_column(one.first + row, to);
    }
    return own.dropped;
  }

  // The gradient of a learned factor: of z(row, col), what it multiplies, times what left.
  template <class X, class Z>
  void factor_back(const Sublayer<X>& one, int which, bool each, float constant, Z z) const {
    const VectorGradient to = gradient(which);
    if (!to.data) return;
    const float* const sum = one.sum;
    const long ld = one.ld;
    const VectorGradient columns = each ? to : VectorGradient{own.products, true};
    sum_columns(team, one.rows, one.width, columns, constant,
                [=](int row, int col) { return load(sum + row * ld + col) * z(row, col); });
    team.sync();
    if (each || team.tid > 0) return;
    float total = 0.f;
    for (int col = 0; col < one.width; ++col) total += own.products[col];
    *to.data = to.fresh ? total : *to.data + total;
  }
  template <class X, class Z>
  void scale_back(const Sublayer<X>& one, Z z) const {
    factor_back(one, one.number == 1 ? scale1 : scale2, v.scale_each, v.residual_scale, z);
  }

  // The same where a norm stands before the scale: its rows are formed once more.
  template <class X>
  void normed_scale_back(const Sublayer<X>& one, const SublayerEnd& end) {
    const Range mine = share(one.rows, team.tid, team.size);
    const int ld = one.ld;
    float* const z = one.d_n;  // not in use yet
    for (int row = mine.begin; row < mine.end; ++row) {
      for (int col = 0; col < ld; col += W)
        store(own.row + col, within(load(one.y + (long)row * ld + col), col, one.width));
      end.out_norm.apply(own.row);
      if (end.drops.matter())
        one.first < 0 ? end.drops.of_row(row, own.row)
                      : end.drops.of_column(one.first + row, own.row);
      for (int col = 0; col < ld; col += W) store(z + (long)row * ld + col, load(own.row + col));
    }
    team.sync();
    scale_back(one, RowsOf<float>{z, ld, ld});
    team.sync();
  }

  // sum += the gradient that f's input had, through its norm.
  template <class X>
  void enter_back(const Sublayer<X>& one) {
    team.sync();
    if (!v.pre_normed()) return;
    const int weight = one.number == 1 ? norm1 : norm2;
    float* const sum = one.sum;
    const long ld = one.ld;
    norm_back(
        end_of(this->packed, one.number, one.width).norm, one.rows, RowsOf<X>{one.x, ld, one.ld},
        RowsOf<float>{one.d_n, ld, one.ld},
        [=](int row, int col, V d) {
          float* const p = sum + row * ld + col;
          store(p, load(p) + d);
        },
        weight, true);
    team.sync();
  }
  template <class X>
  float* read_by(const Sublayer<X>& one) const {
    return v.pre_normed() ? one.d_n : one.sum;
  }

  // ---- products -------------------------------------------------------------------------------

  // The gradients of a weight and its bias; `count` not 0: rows of a token MLP.
  void weight_back(BlockWeight which, Mat<Act> dy, Mat<Act> x, int count = 0) const {
    products.sum_rows(which, dy, RowsOfMat<Act>{x}, count);
    if (!vector[which]) return;
    const VectorGradient to = gradient(which);
    const Product p = product_of(shape, which);
    for (int half = 0; half < (p.gate_up ? 2 : 1); ++half) {
      const VectorGradient part{to.data ? to.data + half * p.half() : nullptr, to.fresh};
      sum_columns(team, count ? count : rows, p.half(), part, 1.f,
                  [=](int row, int col) { return load(dy.at(row, half * p.padded_half() + col)); });
    }
    team.sync();
  }
  // to [count, ld] <- dy W
  void multiply_back(Mat<Act> dy, int count, BlockWeight which, float* to, int ld) const {
    products.multiply(dy, count, which, [&](const Linear& l, int end) {
      return keep_product(l, to, ld, (const float*)nullptr, end);
    });
  }
  template <class X>
  void add_back(Mat<Act> dy, BlockWeight which, const Sublayer<X>& one) const {
    products.multiply(dy, one.rows, which, products.onto(read_by(one), one.ld));
  }
};

}  // namespace rx::cpu::RX_ISA
