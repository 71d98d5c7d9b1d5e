// The window of a recursion: its calls forward, keeping what their backward reads, and backward.
//
// Both go slice by slice of the samples, all threads on one slice as one team. Gradients of the
// states are summed in fp32 over a slice, those of the weights over all slices.
#pragma once

#include "variant_backward.hpp"

namespace rx::cpu::RX_ISA {

template <class Core>
struct WindowRun {
  using State = typename Core::State;

  const Window& job;
  const Team& team;
  const Recursion& rec = job.rec;
  WindowSpace<Core> ws{};
  const Slices slices{rec};
  Range slice{};  // samples
  State* kept = nullptr;
  float* kept_floats = nullptr;
  Save save = Save::all;

  int samples() const { return slice.end - slice.begin; }
  int rows() const { return samples() * rec.tokens; }
  size_t first() const { return (size_t)slice.begin * rec.tokens * rec.hidden; }
  Range own() const { return share(rows(), team.tid, team.size); }
  size_t values_of(Range r) const { return (size_t)(r.end - r.begin) * rec.hidden; }
  const State* input(int s) const { return (const State*)rec.in[s] + first(); }

  void forward() {
    for (int i = 0; i < slices.count && !team.stopped(); ++i) {
      slice = slices.of(i);
      take_kept();
      run_calls(true);
    }
  }

  // Save::states keeps in scratch, for one slice at a time, what Save::block does.
  void take_kept() {
    const bool scratch = job.save == Save::states;
    save = scratch ? Save::block : job.save;
    const KeptSize size = kept_size<State>(rec, save);
    const size_t sample = scratch ? 0 : slice.begin;
    kept = (scratch ? ws.window : (State*)job.kept) + size.values * sample;
    kept_floats = (scratch ? ws.window_floats : job.kept_floats) + size.floats * sample;
  }

  // The places of a call's blocks; what is not kept lies in scratch, one block at a time.
  void find(int call) {
    team.sync();  // with the call before
    const PackedNet& net = rec.nets[rec.steps[call].net];
    if (team.tid == 0) kept_of_call(rec, save, samples(), kept, kept_floats, call, ws.blocks);
    if (team.tid == 0 && save != Save::all) {
      for (int i = 0; i < net.num_blocks; ++i) {
        KeptCarver<State> again{ws.again, ws.again_floats};
        again.rest(ws.blocks[i], net.blocks[i].shape, samples(), rec.tokens);
      }
    }
    team.sync();
  }

  // All calls, keeping what `save` says. The last value of a state goes to rec.out if `leave`.
  void run_calls(bool leave) {
    const State** const now = ws.now;
    for (int s = 0; s < rec.num_states; ++s) now[s] = input(s);
    for (int call = 0; call < rec.num_steps && !team.stopped(); ++call) {
      const Step& step = rec.steps[call];
      const PackedNet& net = rec.nets[step.net];
      find(call);
      form_input(step, now, ws.blocks[0].h);
      team.sync();
      for (int i = 0; i < net.num_blocks; ++i) forward_block(call, i, ws.sum);
      write(step, ws.blocks[net.num_blocks - 1].out);
    }
    if (!leave) return;
    for (int s = 1; s < rec.num_states; ++s) {
      const size_t at = (size_t)own().begin * rec.hidden;
      memcpy((State*)rec.out[s] + first() + at, now[s] + at, values_of(own()) * sizeof(State));
    }
    team.sync();
  }

  // What a call's result makes of the state that it is written to.
  void write(const Step& step, const State* out) {
    const State*& now = ws.now[step.write];
    const State* const before = now;
    now = out;
    if (is_plain(step)) return;
    State* const to = ws.values + (size_t)step.write * slices.largest() * rec.tokens * rec.hidden;
    each_own(
        [&](size_t at) { store(to + at, damped(out, step, load(before + at), load(out + at))); });
    for (long row = own().begin; step.noise != 0.f && row < own().end; ++row)
      add_call_noise(step, rec.seed, rec.first + slice.begin + row / rec.tokens,
                     row % rec.tokens * rec.hidden, to + row * rec.hidden, rec.hidden);
    now = to;
  }

  Beside beside(int call, int block) const { return {slice.begin, rec.steps[call].number, block}; }

  void forward_block(int call, int i, float* sum, bool again = false) {
    const PackedBlock& packed = rec.nets[rec.steps[call].net].blocks[i];
    const Kept<State>& k = ws.blocks[i];
    if (packed.shape.variant.on) {
      VariantForward<Core>{rec, team, ws, packed, samples(), beside(call, i)}.forward(k, again);
    } else {
      WindowBlock<Core>{rec, team, ws, packed, samples(), sum}.forward(k, again);
    }
  }

  V sum(const int* slots, int count, const State* const* now, size_t at) const {
    const State* type = nullptr;
    V total = load(now[slots[0]] + at);
    for (int i = 1; i < count; ++i) total = round_as(type, total + load(now[slots[i]] + at));
    return total;
  }

  // h <- scale * sum(state) + (sum(inject))
  void form_input(const Step& step, const State* const* now, State* h) const {
    const State* type = nullptr;
    const size_t begin = (size_t)own().begin * rec.hidden, end = (size_t)own().end * rec.hidden;
    for (size_t at = begin; at < end; at += W) {
      V total = sum(step.state, step.num_state, now, at);
      if (step.scale != 1.f) total = round_as(type, total * step.scale);
      if (step.num_inject)
        total = round_as(type, total + sum(step.inject, step.num_inject, now, at));
      store(h + at, total);
    }
    team.clock->lap(Phase::inject);
  }

  // ---- backward -------------------------------------------------------------------------------

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
      take_gradient(step, call);
      const bool enters = flows(step, call);
      through_call(call, enters);
      if (!enters) continue;
      for (int i = 0; i < step.num_state; ++i) add_to(step.state[i], call, step.scale);
      for (int i = 0; i < step.num_inject; ++i) add_to(step.inject[i], call, 1.f);
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
      ws.given[step.write] = step.keep != 0.f && wanted(step.write, call);
      for (int i = 0; i < step.num_state; ++i)
        ws.given[step.state[i]] |= wanted(step.state[i], call);
      for (int i = 0; i < step.num_inject; ++i)
        ws.given[step.inject[i]] |= wanted(step.inject[i], call);
    }
  }

  // sum <- share of the gradient of what a step wrote; what was there before gets the rest.
  void take_gradient(const Step& step, int call) {
    float* const d = ws.d_values[step.write];
    each_own([&](size_t at) { store(ws.sum + at, load(d + at) * step.share); });
    ws.given[step.write] = step.keep != 0.f && wanted(step.write, call);
    if (ws.given[step.write]) each_own([&](size_t at) { store(d + at, load(d + at) * step.keep); });
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
    find(call);
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
  void add_to(int slot, int call, float by) {
    if (!wanted(slot, call)) return;
    float* const total = ws.d_values[slot];
    const bool fresh = !ws.given[slot];
    each_own([&](size_t at) {
      const V more = load(ws.sum + at) * by;
      store(total + at, fresh ? more : load(total + at) + more);
    });
    ws.given[slot] = true;
  }
  template <class Work>
  void each_own(Work work) const {
    const size_t begin = (size_t)own().begin * rec.hidden, end = (size_t)own().end * rec.hidden;
    for (size_t at = begin; at < end; at += W) work(at);
  }
};

template <class Core, bool kBackward>
void run_window(const Window& job, const Team& team, void* scratch) {
  const NoDenormals here;
  WindowRun<Core> run{job, team};
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
