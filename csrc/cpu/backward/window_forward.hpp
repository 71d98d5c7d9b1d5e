// The calls of a window forward, keeping what their backward (window.hpp) reads: slice by slice of
// the samples, all threads on one slice as one team.
#pragma once

#include "block_forward.hpp"
#include "variant_forward.hpp"

namespace rx::cpu::RX_ISA {

template <class Core>
struct WindowForward {
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
      form_input(step, now, ws.blocks[0].h, ws.blocks[0].scaled);
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
    each_own([&](size_t at) {
      const V entered = load(before + at);
      if (step.share_each) store(ws.blocks[0].before + at, entered);
      store(to + at, damped(out, step, entered, load(out + at), at % rec.hidden));
    });
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

  static bool scales(const Step& step) { return step.scale_each || step.scale != 1.f; }
  // At a value of rows of D.
  V scale_of(const Step& step, size_t at) const {
    return step.scale_each ? load(step.scale_each + at % rec.hidden) : splat(step.scale);
  }

  // h <- scale * sum(state) + (sum(inject)); `scaled` keeps the first sum of a learned scale
  void form_input(const Step& step, const State* const* now, State* h, State* scaled) const {
    const State* type = nullptr;
    const size_t begin = (size_t)own().begin * rec.hidden, end = (size_t)own().end * rec.hidden;
    for (size_t at = begin; at < end; at += W) {
      V total = sum(step.state, step.num_state, now, at);
      if (step.scale_each) store(scaled + at, total);
      if (scales(step)) total = round_as(type, total * scale_of(step, at));
      if (step.num_inject)
        total = round_as(type, total + sum(step.inject, step.num_inject, now, at));
      store(h + at, total);
    }
    team.clock->lap(Phase::inject);
  }

  template <class Work>
  void each_own(Work work) const {
    const size_t begin = (size_t)own().begin * rec.hidden, end = (size_t)own().end * rec.hidden;
    for (size_t at = begin; at < end; at += W) work(at);
  }
};

}  // namespace rx::cpu::RX_ISA
