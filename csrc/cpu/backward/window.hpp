// The window of a recursion: its calls forward (window_forward.hpp) and backward.
//
// Gradients of the states are summed in fp32 over a slice of samples, those of the weights over all
// slices.
#pragma once

#include "variant_backward.hpp"
#include "window_forward.hpp"

namespace rx::cpu::RX_ISA {

template <class Core>
struct WindowRun : WindowForward<Core> {
  using Forward = WindowForward<Core>;
  using Forward::beside, Forward::each_own, Forward::find, Forward::first, Forward::forward_block;
  using Forward::job, Forward::rec, Forward::rows, Forward::run_calls, Forward::samples;
  using Forward::save, Forward::scale_of, Forward::scales, Forward::slice, Forward::slices;
  using Forward::take_kept, Forward::team, Forward::ws;
  using typename Forward::State;

  void backward() {
    pack_weights();
    find_active();
    for (int i = 0; i < weights(); ++i) ws.fresh[i] = true;
    for (int i = 0; i < slices.count && !team.stopped(); ++i) {
      slice = slices.of(i);
      take_kept();
      if (job.save == Save::states) run_calls(false);
      through_calls();
    }
    for (int i = 0; i < weights(); ++i)
      if (job.d_weights[i] && ws.fresh[i]) clear_gradient(i);
  }

  int weights() const { return blocks_before(rec.num_nets) * slots_per_block; }
  int blocks_before(int net) const {
    int blocks = 0;
    for (int n = 0; n < net; ++n) blocks += rec.nets[n].num_blocks;
    return blocks;
  }
  const BlockShape& shape_of(int number) const {
    int n = 0;
    while (number >= rec.nets[n].num_blocks) number -= rec.nets[n++].num_blocks;
    return rec.nets[n].blocks[number].shape;
  }

  void clear_gradient(int at) const {
    const BlockShape& shape = shape_of(at / slots_per_block);
    const int slot = at % slots_per_block;
    const bool matrix = slot < matrices_per_block;
    const Linear l = linear_of(shape, matrix ? slot : 0);
    const int out = matrix ? l.out : size_of_vector(shape, slot - matrices_per_block).count();
    const Range own = share(out, team.tid, team.size);
    const size_t in = matrix ? l.in : 1;
    memset(job.d_weights[at] + own.begin * in, 0, (own.end - own.begin) * in * sizeof(float));
  }

  void pack_weights() const {
    for (int at = 0; at < weights() && !packs_at_use<Core>(); ++at) {
      const int which = at % slots_per_block;
      const BlockShape& shape = shape_of(at / slots_per_block);
      if (which >= matrices_per_block || !has_matrix(shape, which)) continue;
      const Product p = product_of(shape, which);
      char* to = ws.backward[at];
      for (int begin = 0; begin < p.depth(); begin += p.template slice_depth<Core>()) {
        const Linear l = p.template slice<Core>(begin);
        const Range panels = share(l.panels(), team.tid, team.size);
        for (int panel = panels.begin; panel < panels.end; ++panel)
          pack_panel<Core>(p, begin, job.weights[at], panel, to, panel);
        to += Core::linear_bytes(l);
      }
    }
    team.sync();
  }

  void through_calls() {
    for (int s = 0; s < rec.num_states; ++s) {
      ws.given[s] = s > 0 && job.d_out[s];
      if (ws.given[s]) read_gradient(s);
    }
    for (int n = 0; n < rec.num_nets; ++n) ws.filled[n] = 0;
    for (int call = rec.num_steps - 1; call >= 0 && !team.stopped(); --call) {
      const Step& step = rec.steps[call];
      if (!ws.active[call]) continue;
      find(call);
      take_gradient(step, call);
      const bool enters = step.d_scale || flows(step, call);
      through_call(call, enters);
      add_products(step.d_scale, ws.sum, ws.blocks[0].scaled, nullptr);
      for (int i = 0; enters && i < step.num_inject; ++i) add_to(step.inject[i], call);
      if (enters && scales(step))
        each_own([&](size_t at) { store(ws.sum + at, load(ws.sum + at) * scale_of(step, at)); });
      for (int i = 0; enters && i < step.num_state; ++i) add_to(step.state[i], call);
    }
    for (int s = 0; s < rec.num_states; ++s)
      if (job.d_in[s]) write_gradient(s);
    team.sync();
  }

  // Which calls a gradient reaches.
  void find_active() {
    for (int s = 0; s < rec.num_states; ++s) ws.given[s] = s > 0 && job.d_out[s];
    for (int call = rec.num_steps - 1; call >= 0; --call) {
      const Step& step = rec.steps[call];
      ws.active[call] = ws.given[step.write];
      if (!ws.active[call]) continue;
      ws.given[step.write] = keeps(step) && wanted(step.write, call);
      for (int i = 0; i < step.num_state; ++i)
        ws.given[step.state[i]] |= wanted(step.state[i], call);
      for (int i = 0; i < step.num_inject; ++i)
        ws.given[step.inject[i]] |= wanted(step.inject[i], call);
    }
  }

  V share_of(const Step& step, size_t at) const {
    return step.share_each ? load(step.share_each + at % rec.hidden) : splat(step.share);
  }

  // Whether a step leaves something of what was there before.
  static bool keeps(const Step& step) { return step.share_each || step.keep != 0.f; }

  // sum <- share of the gradient of what a step wrote; what was there before gets the rest.
  void take_gradient(const Step& step, int call) {
    float* const d = ws.d_values[step.write];
    const Kept<State>* const k = ws.blocks;
    add_products(step.d_share, d, k[rec.nets[step.net].num_blocks - 1].out, k->before);
    each_own([&](size_t at) { store(ws.sum + at, load(d + at) * share_of(step, at)); });
    ws.given[step.write] = keeps(step) && wanted(step.write, call);
    if (!ws.given[step.write]) return;
    each_own([&](size_t at) {
      const V keep = step.share_each ? 1.f - share_of(step, at) : splat(step.keep);
      store(d + at, load(d + at) * keep);
    });
  }

  // The gradient of a learned factor: that of the product times what it multiplies, x less `less`.
  void add_products(float* to, const float* d, const State* x, const State* less) const {
    if (!to) return;
    team.sync();
    const long ld = rec.hidden;
    sum_columns(team, rows(), rec.hidden, {to, false}, 1.f, [=](int row, int col) {
      const long at = row * ld + col;
      return load(d + at) * (less ? load(x + at) - load(less + at) : load(x + at));
    });
    team.sync();
  }

  // Whether anything has use for the gradient of a value as call `call` read it.
  bool wanted(int slot, int call) const {
    if (job.d_in[slot]) return true;
    for (int k = 0; k < call; ++k)
      if (rec.steps[k].write == slot) return true;
    return false;
  }
  bool flows(const Step& step, int call) const {
    for (int i = 0; i < step.num_state; ++i)
      if (wanted(step.state[i], call)) return true;
    for (int i = 0; i < step.num_inject; ++i)
      if (wanted(step.inject[i], call)) return true;
    return false;
  }

  void through_call(int call, bool enters) {
    const int net_number = rec.steps[call].net;
    const PackedNet& net = rec.nets[net_number];
    const Range place = gather(net_number, call);
    const int before = blocks_before(net_number);
    for (int i = net.num_blocks - 1; i >= 0; --i) {
      if (save != Save::all) forward_block(call, i, ws.d_mixed, true);
      BlockBackward<Core> back{job, team, ws, net.blocks[i].shape, samples(), before + i, place};
      if (net.blocks[i].shape.variant.on) {
        VariantBackward<Core>{{rec, team, ws, net.blocks[i], samples(), beside(call, i)}, back}.run(
            ws.blocks[i], enters || i > 0);
      } else {
        back.run(ws.blocks[i], enters || i > 0);
      }
    }
    team.sync();
  }

  // Where the rows of this call lie among those that are summed with them.
  Range gather(int net, int call) {
    const int most = gathered(job, net, slices.largest() * rec.tokens);
    int left = 0;  // calls of this net that still come, this one counted
    for (int k = 0; k <= call; ++k) left += ws.active[k] && rec.steps[k].net == net;
    int& filled = ws.filled[net];
    if (filled == 0) ws.group[net] = imin(most, left);
    const Range place{filled * rows(), ws.group[net] * rows()};
    filled = (filled + 1) % ws.group[net];
    return place;
  }

  void read_gradient(int s) const {
    const State* const from = (const State*)job.d_out[s] + first();
    float* const to = ws.d_values[s];
    each_own([&](size_t at) { store(to + at, load(from + at)); });
  }
  void write_gradient(int s) const {
    State* const to = (State*)job.d_in[s] + first();
    each_own([&](size_t at) { store(to + at, ws.given[s] ? load(ws.d_values[s] + at) : V{}); });
  }
  void add_to(int slot, int call) {
    if (!wanted(slot, call)) return;
    float* const total = ws.d_values[slot];
    const bool fresh = !ws.given[slot];
    each_own([&](size_t at) {
      const V more = load(ws.sum + at);
      store(total + at, fresh ? more : load(total + at) + more);
    });
    ws.given[slot] = true;
  }
};

template <class Core, bool kBackward>
void run_window(const Window& job, const Team& team, void* scratch) {
  const NoDenormals here;
  WindowRun<Core> run{{job, team}};
  WindowSpace<Core>::carve(job, team.size, team.tid, kBackward, (char*)scratch, run.ws);
  team.sync();
  Core::enter(run.ws.gemm);
  if (kBackward) {
    run.backward();
  } else {
    run.forward();
  }
  Core::leave();
}

template <class Core>
size_t window_scratch(const Window& job, int threads, bool backward) {
  WindowSpace<Core> space;
  return WindowSpace<Core>::carve(job, threads, -1, backward, nullptr, space);
}

template <class Core>
constexpr WindowEngine window_of() {
  return {kept_size<typename Core::State>, window_scratch<Core>, run_window<Core, false>,
          run_window<Core, true>};
}

}  // namespace rx::cpu::RX_ISA
