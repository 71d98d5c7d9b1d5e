// The recursion of one group of samples: every step of the schedule, start to end, in one call.
//
// The states are the output tensors themselves, updated in place; a step reads them, forms
// sum(state) + (sum(inject)) with the roundings of the contract, runs the net and writes one.
// A thread owns the same rows in every such pass, so no barrier stands between two steps.
#pragma once

#include "backward/window.hpp"
#include "block.hpp"
#include "factors.hpp"
#include "optim.hpp"
#include "sample_product.hpp"
#include "variant_block.hpp"

namespace rx::cpu::RX_ISA {

template <class Core>
struct Group {
  using State = typename Core::State;
  using Act = typename Core::Act;

  const Recursion& rec;
  const Team& team;
  int first_sample;
  Workspace<Core> ws;
  Range own{};  // rows of this thread

  void run() {
    own = share(ws.rows, team.tid, team.size);
    for (int row = 0; row < ws.rows_pad; ++row) ws.position[row] = row % rec.tokens;
    for (int s = 1; s < rec.num_states; ++s)
      if (rec.in[s] != rec.out[s]) memcpy(state(s, own.begin), input(s, own.begin), size_of(own));
    for (int i = 0; i < rec.num_steps && !team.stopped(); ++i) {
      begin(rec.steps[i]);
      end(rec.steps[i], call(rec.nets[rec.steps[i].net], rec.steps[i].number));
    }
  }

  long offset(long row) const { return ((long)first_sample * rec.tokens + row) * rec.hidden; }
  size_t size_of(Range rows) const {
    return (size_t)(rows.end - rows.begin) * rec.hidden * sizeof(State);
  }
  const State* input(int s, long row) const { return (const State*)rec.in[s] + offset(row); }
  State* state(int s, long row) const { return (State*)rec.out[s] + offset(row); }
  const State* value(int s, long row) const { return s == 0 ? input(0, row) : state(s, row); }

  // Sum of the given states at (row, col), each addition rounded to the state's type.
  V sum(const int* states, int count, long row, int col) const {
    const State* type = nullptr;
    V total = load(value(states[0], row) + col);
    for (int i = 1; i < count; ++i)
      total = round_as(type, total + load(value(states[i], row) + col));
    return total;
  }

  // x <- scale * sum(state) + (sum(inject))
  void begin(const Step& step) {
    const State* type = nullptr;
    for (long row = own.begin; row < own.end; ++row) {
      State* kept = ws.inject + row * rec.hidden;
      for (int col = 0; col < rec.hidden; col += W) {
        V h = sum(step.state, step.num_state, row, col);
        if (step.scale_each) {
          h = round_as(type, h * load(step.scale_each + col));
        } else if (step.scale != 1.f) {
          h = round_as(type, h * step.scale);
        }
        if (step.num_inject) {
          const V extra = step.sum == Sum::kept ? load(kept + col)
                                                : sum(step.inject, step.num_inject, row, col);
          if (step.sum == Sum::formed) store(kept + col, extra);
          h = round_as(type, h + extra);
        }
        store(ws.x.at(row, col), h);
      }
    }
    for (int row = 0; row < ws.rows_pad; ++row) ws.scale_a[row] = 1.f;
    team.clock->lap(Phase::inject);
    team.sync();
  }

  // net(x), un-normalised with its scale; in ws.x or ws.z.
  typename Block<Core>::Hidden call(const PackedNet& net, int number) {
    typename Block<Core>::Hidden in{ws.x, ws.scale_a}, out{ws.z, ws.scale_a};
    for (int i = 0; i < net.num_blocks && !team.stopped(); ++i) {
      const PackedBlock& next = net.blocks[(i + 1) % net.num_blocks];
      if constexpr (Core::kVariants) {
        if (net.blocks[i].shape.variant.on) {
          scale_rows(in);
          const Beside beside{first_sample, number, i};
          VariantBlock<Core>{rec, team, ws, net.blocks[i], next, in.y, out.y, in.scale, beside}
              .run();
          continue;
        }
      }
      Block<Core>{rec, team, ws, net.blocks[i], next}.run(in, {ws.y, ws.scale_b}, out);
      const auto swap = in;
      in = out;
      out = swap;
    }
    return in;
  }

  // What a variant begins with: rows whose scale is 1.
  void scale_rows(typename Block<Core>::Hidden h) const {
    for (long row = own.begin; row < own.end; ++row)
      for (int col = 0; col < rec.hidden; col += W)
        store(h.y.at(row, col), load(h.y.at(row, col)) * h.scale[row]);
    for (int row = 0; row < ws.rows_pad; ++row) h.scale[row] = 1.f;
    team.sync();
  }

  // write <- h, in the state's type
  void end(const Step& step, typename Block<Core>::Hidden h) {
    if (!is_plain(step)) {
      end_with_factors(step, h);
      return;
    }
    for (long row = own.begin; row < own.end; ++row) {
      State* out = state(step.write, row);
      for (int col = 0; col < rec.hidden; col += W)
        store(out + col, load(h.y.at(row, col)) * h.scale[row]);
    }
    team.clock->lap(Phase::inject);
  }

  void end_with_factors(const Step& step, typename Block<Core>::Hidden h) {
    const State* type = nullptr;
    for (long row = own.begin; row < own.end; ++row) {
      State* out = state(step.write, row);
      for (int col = 0; col < rec.hidden; col += W) {
        const V y = round_as(type, load(h.y.at(row, col)) * h.scale[row]);
        store(out + col, damped(type, step, load(out + col), y, col));
      }
      if (step.noise != 0.f)
        add_call_noise(step, rec.seed, rec.first + first_sample + row / rec.tokens,
                       row % rec.tokens * rec.hidden, out, rec.hidden);
    }
    team.clock->lap(Phase::inject);
  }
};

template <class Core>
void run_group(const Recursion& rec, const Team& team, int first_sample, int samples,
               void* scratch) {
  Group<Core> group{rec, team, first_sample, {}};
  Workspace<Core>::carve(rec, samples, team.size, team.tid, (char*)scratch, group.ws);
  Core::enter(group.ws.gemm);
  group.run();
  Core::leave();
}

template <class Core>
size_t scratch_bytes(const Recursion& rec, int samples, int team_size) {
  Workspace<Core> ws;
  return Workspace<Core>::carve(rec, samples, team_size, -1, nullptr, ws);
}

template <class Core>
size_t packed_bytes(const BlockShape& shape) {
  size_t total = 0;
  for (int i = 0; i < matrices_per_block; ++i)
    if (has_matrix(shape, i)) total += (Core::linear_bytes(linear_of(shape, i)) + 63) / 64 * 64;
  return total;
}

template <class Core, void (*kPackLinear)(const Linear&, const RawWeight&, void*)>
void pack(const BlockShape& shape, const RawWeight* weights, void* out, PackedBlock* packed) {
  char* p = (char*)out;
  *packed = {shape};
  for (int i = 0; i < matrices_per_block; ++i) {
    if (!has_matrix(shape, i)) continue;
    const Linear l = linear_of(shape, i);
    kPackLinear(l, weights[i], p);
    packed->weight[i] = p;
    p += (Core::linear_bytes(l) + 63) / 64 * 64;
  }
}

template <class Core, void (*kPackLinear)(const Linear&, const RawWeight&, void*)>
constexpr Engine engine_with(WindowEngine window) {
  using State = typename Core::State;
  return {RX_GROUP_ROWS,
          sizeof(State),
          packed_bytes<Core>,
          pack<Core, kPackLinear>,
          scratch_bytes<Core>,
          run_group<Core>,
          head<State>,
          add_noise<State>,
          adam_atan2,
          sample_product<Core>,
          window};
}

template <class Core>
constexpr Engine engine_of() {
#if defined(RX_WITHOUT_WINDOW)  // tests that never train compile a part of the code
  return engine_with<Core, pack_linear<Core>>({});
#else
  return engine_with<Core, pack_linear<Core>>(window_of<Core>());
#endif
}

// For inference alone, by a core that packs weights in its own way.
template <class Core>
constexpr Engine engine_without_window() {
  return engine_with<Core, Core::pack>({});
}

}  // namespace rx::cpu::RX_ISA
