// Random recursions, windows and solves by every engine that is linked in, blocks of later systems
// (random_variants.hpp) among them, for the sanitizers of addresses, of undefined behaviour and of
// threads. No Python, no torch.
//
//   random_check first count [engines] [reruns] [against]
//
// Cases number first and up, by all engines in turn whose name has that in it. All buffers have
// their exact size and lie apart. Every call must give the bits of the first one, which ran on one
// thread and on scratch of zeros: the others run on one to four threads, on scratch and kept values
// that are NaN before, so that what is read and was not written shows. With `against` given,
// results are also held against those of another engine that is linked in: plain code of the same
// type, or BFDOT for BFMMLA, whose bits are the same.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu/engines.hpp"
#include "cpu/machine.hpp"
#include "random_variants.hpp"
#include "sanitized.hpp"

int rx_planted = -1;  // sanitized.hpp

namespace rx::cpu {
// Null where not linked in. Tiles are emulated: sanitizers do not see what instructions load.
#define RX_WEAK extern const Engine __attribute__((weak))
RX_WEAK portable_f32, portable_bf16, portable_int8_f32, portable_int8_bf16;
RX_WEAK avx2_f32, avx2_bf16, avx2_vnni_int8_f32, avx2_vnni_int8_bf16;
RX_WEAK avx512_f32, avx512_bf16, vnni_int8_f32, vnni_int8_bf16, dot_bf16, dot_int8, amx_f32,
    amx_bf16, amx_int8;
RX_WEAK neon_f32, neon_bf16, bfdot_bf16, bfmmla_bf16;
}  // namespace rx::cpu

using namespace rx::cpu;

namespace {

const struct {
  const char* name;
  const Engine* engine;
} kEngines[] = {
#define RX_NAMED(engine) {#engine, &engine}
    RX_NAMED(portable_f32),
    RX_NAMED(portable_bf16),
    RX_NAMED(portable_int8_f32),
    RX_NAMED(portable_int8_bf16),
    RX_NAMED(avx2_f32),
    RX_NAMED(avx2_bf16),
    RX_NAMED(avx2_vnni_int8_f32),
    RX_NAMED(avx2_vnni_int8_bf16),
    RX_NAMED(avx512_f32),
    RX_NAMED(avx512_bf16),
    RX_NAMED(vnni_int8_f32),
    RX_NAMED(vnni_int8_bf16),
    RX_NAMED(dot_bf16),
    RX_NAMED(dot_int8),
    RX_NAMED(amx_f32),
    RX_NAMED(amx_bf16),
    RX_NAMED(amx_int8),
    RX_NAMED(neon_f32),
    RX_NAMED(neon_bf16),
    RX_NAMED(bfdot_bf16),
    RX_NAMED(bfmmla_bf16),
};

// The same numbers with every standard library.
struct Random {
  uint64_t state;
  uint64_t bits() {
    uint64_t z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
  }
  int from(int least, int most) { return least + (int)(bits() % (uint64_t)(most - least + 1)); }
  bool one_in(int n) { return from(1, n) == 1; }
  float value() { return (float)from(-1000, 1000) * 1.5e-3f; }
};

int reruns = 2;  // of each call; more of them are of small shapes, one in 256 on two threads

using Bytes = std::shared_ptr<char>;  // of malloc, so that the first byte beyond is seen
Bytes bytes(size_t count) {
  char* const p = (char*)std::malloc(count);
  std::memset(p, 0xff, count);  // NaN in every type
  return {p, std::free};
}

Bytes values(Random& r, size_t count, size_t size, float scale) {
  const Bytes all = bytes(count * size);
  for (size_t i = 0; i < count; ++i) {
    const float v = r.value() * scale;
    std::memcpy(all.get() + i * size, (const char*)&v + 4 - size, size);
  }
  return all;
}

struct Results {
  struct One {
    Bytes data;
    size_t count, size;  // bytes; of a number, or 0
    float value(size_t at) const {
      if (!size) return data.get()[at];
      float v = 0;
      std::memcpy((char*)&v + 4 - size, data.get() + at, size);
      return v;
    }
  };
  std::vector<One> all;
  void* add(size_t count, size_t size = 0) {
    all.push_back({bytes(count), count, size});
    return all.back().data.get();
  }
  bool operator==(const Results& other) const {
    for (size_t i = 0; i < all.size(); ++i)
      if (std::memcmp(all[i].data.get(), other.all[i].data.get(), all[i].count)) return false;
    return true;
  }
  // The largest distance of one result from that of `other`, relative to its norm.
  double distance(const Results& other) const {
    double worst = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      const One &one = all[i], &two = other.all[i];
      double error = 0, norm = 0;
      for (size_t at = 0; at < one.count; at += one.size ? one.size : 1) {
        const float a = one.value(at), b = two.value(at);
        error += (a - b) * (a - b), norm += b * b;
      }
      if (error > 0) worst = std::fmax(worst, std::sqrt(error / norm));
    }
    return worst;
  }
  bool finite() const {
    for (const One& one : all)
      for (size_t at = 0; one.size && at < one.count; at += one.size) {
        if (!std::isfinite(one.value(at))) return false;
      }
    return true;
  }
};

struct Case {
  Random r;
  const Engine& engine;
  size_t size = engine.state_bytes;  // of a value
  bool int8 = !engine.window.forward;
  int D, T, B;
  int grid[3] = {};  // rows, columns and axis, if attention keeps to the lines of one
  std::vector<Bytes> held;
  std::vector<std::vector<PackedBlock>> blocks;
  std::vector<PackedNet> nets;
  std::vector<RawWeight> weights;
  std::vector<size_t> weight_sizes;
  std::vector<std::vector<int>> lists;
  std::vector<Step> steps;
  std::vector<const void*> in;
  int states;
  const float *cos = nullptr, *sin = nullptr;
  const uint8_t *key_mask = nullptr, *no_mask = nullptr;  // [B, T]
  bool drops = false;
  std::string text;

  Case(uint64_t number, const char* name, const Engine& e) : r{number}, engine(e) {
    D = 32 * (r.one_in(16) ? r.from(17, 18) : r.from(1, 4));
    T = r.one_in(8) ? r.from(20, 40) : r.from(1, 18);
    B = r.from(1, 9);
    if (reruns > 2) D = 32, T = 1 + T % 6, B = 1 + B % 3;
    text = std::string(name) + " case " + std::to_string(number) + ": D=" + std::to_string(D) +
           " T=" + std::to_string(T) + " B=" + std::to_string(B);
    int heads = r.from(1, 4);
    while (D % (16 * heads) || D / heads > 128) heads = heads % 64 + 1;
    if (!int8 && r.one_in(5)) {
      grid[0] = r.from(1, T), grid[2] = r.from(0, 1);
      while (T % grid[0]) --grid[0];
      grid[1] = T / grid[0];
    }
    const int mixer = r.from(0, 4);  // attention, token MLPs, or both
    for (int net = r.from(1, 2); net > 0; --net) {
      blocks.emplace_back();
      for (int block = r.one_in(6) ? 3 : r.from(1, 2); block > 0; --block)
        add_block(mixer < 2 || (mixer == 4 && r.one_in(2)), heads);
      nets.push_back({blocks.back().data(), (int)blocks.back().size()});
      text += " |";
    }
    if (!r.one_in(4)) {
      const size_t count = (size_t)(grid[0] ? grid[grid[2]] : T) * (D / heads);
      cos = (const float*)hold(values(r, count, 4, 0.6f));
      sin = (const float*)hold(values(r, count, 4, 0.6f));
    }
    const Bytes mask = bytes(B * T), none = bytes(B * T);
    Random apart{number};
    for (int i = 0; i < B * T; ++i)
      mask.get()[i] = apart.one_in(3) ? i % 255 + 1 : 0, none.get()[i] = 0;
    key_mask = (const uint8_t*)hold(mask), no_mask = (const uint8_t*)hold(none);
    states = r.from(2, 4);
    for (int s = 0; s < states; ++s) in.push_back(hold(values(r, elements() * B, size, 1.f)));
    add_steps();
  }

  size_t elements() const { return (size_t)T * D; }
  const void* hold(Bytes b) {
    held.push_back(b);
    return b.get();
  }

  void add_block(bool attention, int heads) {
    BlockShape s{};
    s.token_mlp = !attention;
    s.hidden = D;
    s.inner = r.from(1, r.one_in(12) ? 530 : 70);
    s.eps = 1e-5f;
    if (attention) s.heads = heads, s.head_dim = D / heads;
    if (!attention) s.tokens = T, s.token_inner = r.from(1, 70);
    if (!int8 && ((attention && grid[0]) || r.one_in(2))) {
      draw_variant(r, s, T, grid);
      text += said(s.variant);
      drops |= s.variant.dropout > 0.f || s.variant.drop_path > 0.f;
    }
    text += s.token_mlp ? " over " + std::to_string(s.token_inner)
                        : " heads " + std::to_string(s.heads);
    text += " F " + std::to_string(s.inner);
    const RawWeight* const first = add_weights(s);
    // Each packed weight goes to memory of its own.
    const size_t total = engine.packed_bytes(s);
    const std::unique_ptr<void, void (*)(void*)> packed(allocate(total), std::free);
    PackedBlock block;
    engine.pack(s, first, packed.get(), &block);
    const char* end = (const char*)packed.get() + total;
    for (int i = matrices_per_block; i-- > 0;) {
      const char* const begin = (const char*)block.weight[i];
      if (!begin) continue;
      const size_t count = end - begin;
      block.weight[i] = hold({(char*)std::aligned_alloc(64, count), std::free});
      std::memcpy((void*)block.weight[i], begin, count);
      end = begin;
    }
    for (int i = 0; i < vectors_per_block; ++i) {
      if (!first[matrices_per_block + i].data) continue;
      const std::vector<float> vector = pack_vector(s, i, first[matrices_per_block + i]);
      const Bytes own = bytes(vector.size() * sizeof(float));
      std::memcpy(own.get(), vector.data(), vector.size() * sizeof(float));
      block.vector[i] = (const float*)hold(own);
    }
    blocks.back().push_back(block);
  }

  // The weights of a block, at the end of the list, which is slots_per_block longer then.
  const RawWeight* add_weights(const BlockShape& s) {
    for (int slot = 0; slot < slots_per_block; ++slot) {
      const int vector = slot - matrices_per_block;
      const MatrixSize matrix = vector < 0 ? size_of_matrix(s, slot) : MatrixSize{};
      size_t count = (size_t)matrix.out * matrix.in;
      if (vector >= 0 && s.variant.on && may_have(s, vector) && (vector >= conv || r.one_in(2)))
        count = size_of_vector(s, vector).count();
      weight_sizes.push_back(count);
      weights.push_back({nullptr, size == 4 ? Dtype::f32 : Dtype::bf16});
      if (!count) continue;
      if (int8) {
        const Bytes codes = bytes(count);
        for (size_t i = 0; i < count; ++i) codes.get()[i] = (char)r.from(-127, 127);
        weights.back() = {hold(codes), Dtype::int8,
                          (const float*)hold(values(r, matrix.out, 4, 0.01f))};
      } else {
        const float scale = vector < 0 ? 1.f / std::sqrt((float)matrix.in) : 0.6f;
        weights.back().data = hold(values(r, count, size, scale));
      }
    }
    return &weights[weights.size() - slots_per_block];
  }

  const std::vector<int>& list(int least, int most) {
    lists.emplace_back();
    for (int n = r.from(least, most); n > 0; --n) lists.back().push_back(r.from(0, states - 1));
    return lists.back();
  }

  void add_steps() {
    const int count = r.from(1, 4);
    lists.reserve(2 * count);
    const std::vector<int>* kept = nullptr;
    for (int i = 0; i < count; ++i) {
      Step step{r.from(0, (int)nets.size() - 1), r.from(1, states - 1)};
      const std::vector<int>& state = list(1, 2);
      const bool again = kept && r.one_in(2), form = !kept || r.one_in(2);
      const std::vector<int>& inject = again ? *kept : list(0, 3);
      step.num_state = (int)state.size(), step.state = state.data();
      step.num_inject = (int)inject.size(), step.inject = inject.data();
      step.sum = again ? Sum::kept : form ? Sum::formed : Sum::own;
      if (step.sum == Sum::formed) kept = &inject;
      if (kept && std::count(kept->begin(), kept->end(), step.write)) kept = nullptr;
      if (r.one_in(4)) step.keep = 0.25f, step.share = 0.75f;
      if (r.one_in(4)) step.scale = 1.25f;
      if (r.one_in(4)) step.noise = 0.5f, step.number = i;
      steps.push_back(step);
      text += " " + std::to_string(step.net) + ">" + std::to_string(step.write);
    }
  }

  Recursion recursion(void* const* out) const {
    return {B,
            T,
            D,
            states,
            in.data(),
            out,
            (int)steps.size(),
            steps.data(),
            (int)nets.size(),
            nets.data(),
            cos,
            sin,
            7,
            3,
            key_mask};
  }

  // `in_place`: as a carry is updated.
  Results run_calls(int threads, bool in_place) const {
    Results got;
    std::vector<void*> out{nullptr};
    std::vector<const void*> from = in;
    for (int s = 1; s < states; ++s) {
      out.push_back(got.add(elements() * B * size, size));
      if (!in_place) continue;
      std::memcpy(out[s], in[s], elements() * B * size);
      from[s] = out[s];
    }
    Recursion one = recursion(out.data());
    one.in = from.data();
    run(engine, one, threads);
    return got;
  }

  // `choices` says which gradients there are.
  Results run_training(Save save, Random choices, int threads, int threads_back) const {
    Results got;
    std::vector<void*> out{nullptr}, d_in;
    for (int s = 1; s < states; ++s) out.push_back(got.add(elements() * B * size, size));
    Window window{recursion(out.data()), save};
    const KeptSize each = engine.window.kept_size(window.rec, save);
    const Bytes kept = bytes(each.values * B * size), floats = bytes(each.floats * B * 4);
    window.kept = kept.get();
    window.kept_floats = (float*)floats.get();
    run_window(engine, window, false, threads);
    std::vector<Bytes> given;
    std::vector<const void*> d_out{nullptr};
    for (int s = 1; s < states; ++s) {
      given.push_back(values(choices, elements() * B, size, 1.f));
      d_out.push_back(choices.one_in(3) ? nullptr : given.back().get());
    }
    for (int s = 0; s < states; ++s)
      d_in.push_back(choices.one_in(3) ? nullptr : got.add(elements() * B * size, size));
    std::vector<float*> d_weights;
    for (size_t count : weight_sizes)
      d_weights.push_back(!count || choices.one_in(5) ? nullptr
                                                      : (float*)got.add(count * sizeof(float), 4));
    window.rec.out = nullptr;
    window.weights = weights.data();
    window.d_out = d_out.data();
    window.d_in = d_in.data();
    window.d_weights = d_weights.data();
    run_window(engine, window, true, threads_back);
    return got;
  }

  Results run_solve(Random choices, int threads) const {
    Results got;
    std::atomic<int> done{0};
    Solving how{};
    how.rows = B;
    how.max_steps = choices.from(1, 4);
    how.by_q = choices.one_in(2);
    how.against_continue = choices.one_in(2);
    how.by_answer = choices.one_in(2);
    how.patience = choices.from(1, 2);
    how.sigma = choices.one_in(2) ? 0.3f : 0.f;
    how.seed = choices.bits();
    how.start_each = choices.one_in(2);
    how.output = choices.from(1, states - 1);
    how.prefix = choices.from(0, T - 1);
    how.vocab = choices.from(1, 11);
    std::vector<int64_t> numbers;
    for (int row = 0; row < B; ++row) numbers.push_back(choices.from(0, 1000));
    how.numbers = numbers.data();
    how.x = in[0];
    std::vector<Bytes> starts;
    std::vector<const void*> start;
    for (int s = 0; s < states; ++s) {
      starts.push_back(values(choices, elements() * (how.start_each ? B : 1), size, 1.f));
      start.push_back(starts.back().get());
    }
    how.start = start.data();
    const Bytes lm_head = values(choices, (size_t)how.vocab * D, size, 1.f);
    const Bytes q_head = values(choices, (size_t)2 * D, size, 1.f);
    how.lm_head = lm_head.get();
    how.q_head = q_head.get();
    const size_t answers = (size_t)(T - how.prefix) * sizeof(int64_t);
    how.steps = (int64_t*)got.add(B * sizeof(int64_t));
    how.halted = (bool*)got.add(B);
    how.final = got.add(elements() * B * size, size);
    const bool trace = choices.one_in(2);
    if (trace || how.by_answer) how.answers = (int64_t*)got.add(B * answers);
    if (trace) how.trace = (int64_t*)got.add(how.max_steps * B * answers);
    how.done = &done;
    std::vector<Step> quiet = steps;  // noise of calls counts samples by their place
    for (Step& step : quiet) step.noise = 0.f;
    Recursion one = recursion(nullptr);
    one.steps = quiet.data();
    one.key_mask = no_mask;
    solve(engine, one, how, threads);
    return got;
  }
};

// What results are held against, within a relative distance.
struct Other {
  const Case* engine = nullptr;
  double limit = 0;
};

void forget_scratch() {
  Machine& machine = the_machine();
  for (Scratch& one : machine.scratch) {
    std::free(one.data);
    one = {};
  }
  std::free(machine.window.data);
  machine.window = {};
}

void spoil_scratch() {
  Machine& machine = the_machine();
  for (Scratch& one : machine.scratch)
    if (one.data) std::memset(one.at_least(0), 0xff, one.bytes);
  if (machine.window.data) std::memset(machine.window.at_least(0), 0xff, machine.window.bytes);
}

// Whether `work(case, threads)` has the same bits every time, and those or nearly those of `other`.
template <class Work>
bool repeats(Random& choices, const char* what, const Case& c, const Other& other, Work work) {
  forget_scratch();
  const Results first = work(c, 1);
  if (!first.finite()) {
    std::printf("not finite, or not written: %s\n", what);
    return false;
  }
  for (int i = 0; i < reruns; ++i) {
    const int threads = reruns > 2 ? 1 + (i % 256 == 255) : choices.from(1 + i, 4);
    spoil_scratch();
    if (work(c, threads) == first) continue;
    std::printf("other bits: %s on %d threads\n", what, threads);
    return false;
  }
  if (!other.engine) return true;
  const double distance = first.distance(work(*other.engine, 1));
  std::printf("%s: %s %.1e\n", c.text.c_str(), what, distance);
  return distance <= other.limit;
}

bool holds(const Case& c, const Other& other) {
  Random choices = c.r;
  bool ok = repeats(choices, "run", c, other, [&](const Case& one, int threads) {
    return one.run_calls(threads, threads > 1 && threads % 2 == c.B % 2);
  });
  const Random fixed{choices.bits()};
  if (!c.drops)  // by a sample's place in the batch too
    ok &= repeats(choices, "solve", c, other,
                  [&](const Case& one, int threads) { return one.run_solve(fixed, threads); });
  if (c.int8) return ok;
  const Save save = (Save)choices.from(0, 2);
  const int back = choices.from(0, 3);
  return ok & repeats(choices, "window", c, other, [&](const Case& one, int threads) {
           const int threads_back = threads == 1 ? 1 : (threads + back) % 4 + 1;
           return one.run_training(save, fixed, threads, threads_back);
         });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  if (const char* bug = std::getenv("RX_PLANTED_BUG")) rx_planted = std::atoi(bug);
  const char* const wanted = argc > 3 ? argv[3] : "";
  if (argc > 4) reruns = std::max(2, std::atoi(argv[4]));
  std::vector<size_t> linked;
  for (size_t i = 0; i < sizeof kEngines / sizeof *kEngines; ++i)
    if (kEngines[i].engine && std::strstr(kEngines[i].name, wanted)) linked.push_back(i);
  if (linked.empty()) return 2;
  const long first = std::atol(argv[1]), count = std::atol(argv[2]);
  for (long number = first; number < first + count; ++number) {
    const auto& chosen = kEngines[linked[number % linked.size()]];
    const Case one(number, chosen.name, *chosen.engine);
    std::fprintf(stderr, "%s\n", one.text.c_str());  // the last one is that of a report
    Other other;
    std::unique_ptr<Case> same;
    if (argc > 5) {
      const bool dot = chosen.engine == &bfmmla_bf16;
      const Engine& plain = one.size == 4 ? portable_f32 : portable_bf16;
      same.reset(new Case(number, "", dot ? bfdot_bf16 : plain));
      other = {same.get(), dot ? 0 : one.size == 4 ? 1e-5 : 0.5};
    }
    if (holds(one, other)) continue;
    std::printf("failed: %s\n", one.text.c_str());
    return 1;
  }
  std::printf("ok\n");
}
