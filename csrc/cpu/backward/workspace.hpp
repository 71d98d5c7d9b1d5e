// Scratch of a window: what one block of one slice needs at a time.
#pragma once

#include "../factors.hpp"
#include "../workspace.hpp"
#include "kept.hpp"
#include "pair_heads.hpp"
#include "variant_space.hpp"
#include "weight_rows.hpp"
#include "weight_sums.hpp"

namespace rx::cpu::RX_ISA {

// Rows that small slices gather before they are summed into dW: three calls of 97. A fourth costs
// 7 MB of a published net in fp32, for which a training step must not need more than PyTorch's.
constexpr int kSumRows = 300;

// Calls whose rows are gathered before they are summed into the gradient of net `n`.
RX_INLINE int gathered(const Window& job, int n, int rows) {
  int calls = 0;
  for (int k = 0; k < job.rec.num_steps; ++k) calls += job.rec.steps[k].net == n;
  return imax(1, imin(calls, kSumRows / imax(1, rows)));
}

template <class Core>
struct WindowSpace {
  using State = typename Core::State;
  using Act = typename Core::Act;

  // of the team
  Kept<State>* blocks;    // of the call that is run
  float* sum;             // [rows, D]: before a norm; the gradient of h in the backward
  Mat<Act> narrow;        // [rows, D], an operand: h, mixed, mid, or a gradient of those
  Mat<Act> middle, wide;  // silu(gate) * up; gradients of gate and up, or of q, k, v
  State* again;           // what of a block's kept values is computed again
  float* again_floats;
  State* window;  // save="states": what "block" keeps
  float* window_floats;
  Mat<Act> token_rows, token_h, token_middle, token_wide;  // the same, turned over
  float* token_sum;
  VariantSpace<Core> variant;
  // of the team, for the backward
  float* d_mixed;         // [rows, D], or as wide as the heads
  float** d_values;       // [x and states]: [rows, D]
  State* values;          // [x and states][rows, D], of steps that damp or add noise; or null
  char** backward;        // [all blocks x slots]: packed weights that dy is multiplied by
  WeightSum<Core>* sums;  // [all blocks x slots]
  // of a thread
  typename Core::Scratch gemm;
  typename HeadOf<Core>::type::Scratch head;
  char* panels;          // of a weight that dy is multiplied by, if they are packed at use
  bool* fresh;           // [all blocks x slots]: whether nothing was added to the gradient yet
  int *filled, *group;   // [nets]: calls gathered in its sums so far, and in the end
  bool *active, *given;  // [calls]: whether a gradient reaches it; [states]: whether it has one
  const State** now;     // [states]: where their values are

  static size_t carve(const Window& job, int team_size, int tid, bool back, char* base,
                      WindowSpace& w) {
    const WindowSizes z(job.rec);
    Carver c{base};
    const int rows = z.rows + Core::kSpareRows;
    auto matrix = [&](int rows, int cols) {
      return make_mat(c.take<Act>(mat_size(rows, cols)), rows, cols);
    };
    w.blocks = c.take<Kept<State>>(z.blocks);
    w.sum = c.take<float>((size_t)z.rows * z.hidden);
    w.narrow = matrix(rows, z.hidden);
    w.middle = matrix(rows, z.inner);
    if (job.save != Save::all) {
      KeptCarver<State> most{nullptr, nullptr};
      for (int n = 0; n < job.rec.num_nets; ++n)
        for (int i = 0; i < job.rec.nets[n].num_blocks; ++i) {
          Kept<State> k;
          KeptCarver<State> one{nullptr, nullptr};
          one.rest(k, job.rec.nets[n].blocks[i].shape, z.samples, job.rec.tokens);
          if (one.used.values > most.used.values) most.used.values = one.used.values;
          if (one.used.floats > most.used.floats) most.used.floats = one.used.floats;
        }
      w.again = c.take<State>(most.used.values);
      w.again_floats = c.take<float>(most.used.floats);
    }
    if (job.save == Save::states) {
      const KeptSize size = kept_size<State>(job.rec, Save::block);
      w.window = c.take<State>(size.values * z.samples);
      w.window_floats = c.take<float>(size.floats * z.samples);
    }
    if (z.token_mlp) {
      const int columns = token_samples(z) * z.hidden, wide = round_up(job.rec.tokens, kAlign);
      w.token_rows = matrix(columns + Core::kSpareRows, wide);
      w.token_middle = matrix(columns + Core::kSpareRows, z.token_inner);
      w.token_sum = c.take<float>((size_t)columns * wide);
      if (back || z.variants) w.token_h = matrix(columns + Core::kSpareRows, wide);
      if (back) {
        w.token_wide = matrix(columns + Core::kSpareRows, 2 * z.token_inner);
      }
    }
    w.values = nullptr;
    for (int i = 0; i < job.rec.num_steps; ++i)
      if (!is_plain(job.rec.steps[i]) && !w.values)
        w.values = c.take<State>((size_t)job.rec.num_states * z.rows * z.hidden);
    if (back) carve_backward(job, z, c, w, tid == 0);
    if (z.variants) w.variant.carve_shared(job.rec, z, c, back);
    for (int t = 0; t < team_size; ++t) {
      WindowSpace skipped;
      WindowSpace& own = t == tid ? w : skipped;
      own.gemm = Core::carve_scratch(c, 0, deepest(z, job.rec.tokens));
      own.fresh = c.take<bool>(z.all_blocks * slots_per_block);
      own.filled = c.take<int>(job.rec.num_nets);
      own.group = c.take<int>(job.rec.num_nets);
      own.active = c.take<bool>(job.rec.num_steps);
      own.given = c.take<bool>(job.rec.num_states);
      own.now = c.take<const State*>(job.rec.num_states);
      if (back && packs_at_use<Core>()) own.panels = c.take<char>(most_panels(job.rec));
      if (z.variants) own.variant.carve_own(job.rec, z, c);
      if (z.heads) own.head = HeadOf<Core>::type::Scratch::carve(c, job.rec.tokens, z.head_dim);
    }
    return c.used;
  }

 private:
  // At least the depth of any product: with a weight, or a sum over rows.
  static int deepest(const WindowSizes& z, int tokens) {
    const int wide = imax(imax(z.inner, z.token_inner), imax(z.mixed, z.hidden));
    const int rows = imax(imax(z.rows, tokens), imax(kSumRows, token_samples(z) * z.hidden));
    return imax(wide, rows);
  }

  static size_t most_panels(const Recursion& rec) {
    size_t most = 0;
    for (int n = 0; n < rec.num_nets; ++n)
      for (int i = 0; i < rec.nets[n].num_blocks; ++i)
        for (int which = 0; which < matrices_per_block; ++which) {
          if (!has_matrix(rec.nets[n].blocks[i].shape, which)) continue;
          const Linear l = product_of(rec.nets[n].blocks[i].shape, which).template slice<Core>(0);
          const int count = imin(l.panels(), panels_at_once<Core>(l));
          const size_t bytes = Core::linear_bytes(l) / l.panels() * count;
          if (bytes > most) most = bytes;
        }
    return most;
  }

  static void carve_backward(const Window& job, const WindowSizes& z, Carver& c, WindowSpace& w,
                             bool fill) {
    const Recursion& rec = job.rec;
    const int wide = imax(2 * z.inner, round_up(3 * z.mixed, kAlign));
    w.wide = make_mat(c.take<Act>(mat_size(z.rows + Core::kSpareRows, wide)),
                      z.rows + Core::kSpareRows, wide);
    w.d_mixed = c.take<float>((size_t)z.rows * z.mixed);
    w.d_values = c.take<float*>(rec.num_states);
    for (int s = 0; s < rec.num_states; ++s) {
      float* const p = c.take<float>((size_t)z.rows * z.hidden);
      if (fill) w.d_values[s] = p;
    }
    w.backward = c.take<char*>(z.all_blocks * slots_per_block);
    w.sums = c.take<WeightSum<Core>>(z.all_blocks * slots_per_block);
    Act* shared_a = nullptr;
    char* shared_x = nullptr;
    for (int pass = 0; pass < 2; ++pass) {  // first the largest of those that share
      size_t most_a = 0, most_x = 0;
      for (int n = 0, at = 0; n < rec.num_nets; ++n)
        for (int i = 0; i < rec.nets[n].num_blocks; ++i)
          for (int which = 0; which < slots_per_block; ++which, ++at) {
            const BlockShape& s = rec.nets[n].blocks[i].shape;
            if (which >= matrices_per_block || !has_matrix(s, which)) continue;
            const Product p = product_of(s, which);
            if (pass == 1 && !packs_at_use<Core>()) {
              char* const packed = c.take<char>(Core::linear_bytes(over_rows(p.depth(), p.in)));
              if (fill) w.backward[at] = packed;
            }
            const bool turned = s.token_mlp && which <= mixer_out;
            const int gather = turned ? 1 : gathered(job, n, z.rows);
            const int depth = turned ? token_samples(z) * z.hidden : gather * z.rows;
            const size_t a = WeightSum<Core>::a_size(p.padded_out(), depth);
            const size_t x = Core::linear_bytes(over_rows(depth, p.in));
            if (gather == 1) {
              if (a > most_a) most_a = a;
              if (x > most_x) most_x = x;
            }
            if (pass == 0) continue;
            WeightSum<Core> sum{shared_a, shared_x, 0};
            if (gather > 1) sum = {c.take<Act>(a), c.take<char>(x), 0};
            if (fill) w.sums[at] = sum;
          }
      if (pass == 0) {
        shared_a = c.take<Act>(most_a);
        shared_x = c.take<char>(most_x);
      }
    }
  }
};

}  // namespace rx::cpu::RX_ISA
