// Solving: supervision steps, heads, halting and refilling, from a queue of rows.
//
// A slot is a place for one row in a thread's group: x and its states. After every step the heads
// say which rows end; the last slot moves into the place of one that did, and the queue fills the
// rest. Nothing is computed for a row that ended, and no thread waits for another.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "machine.hpp"
#include "noise.hpp"

namespace rx::cpu {
namespace {

struct Slot {
  int row, steps, unchanged;
};

struct Queue {
  Stop& stop;
  const Engine& engine;
  const Recursion& step;
  const Solving& how;
  int threads, room;  // rows that a thread has at once
  size_t value_bytes;
  std::atomic<int> next{0}, finished{0};
  std::vector<char*> memory;  // of each thread: its slots, then the engine's scratch
  std::vector<Clock> clocks;

  Queue(Machine& machine, Stop& s, const Engine& e, const Recursion& r, const Solving& h, int n)
      : stop(s), engine(e), step(r), how(h), threads(n), memory(n), clocks(n) {
    const int limit = std::max(1, e.group_rows / r.tokens);
    room = std::max(1, std::min(limit, (h.rows + n - 1) / n));
    value_bytes = e.state_bytes;
    std::vector<Scratch>& kept = machine.scratch;
    kept.resize(std::max<size_t>(kept.size(), n));
    for (int t = 0; t < n; ++t)
      memory[t] = (char*)kept[t].at_least(slots_bytes() + scratch_bytes());
    for (Clock& clock : clocks) clock.on = machine.profiling;
  }

  long values() const { return (long)step.tokens * step.hidden; }
  size_t row_bytes() const { return values() * value_bytes; }
  size_t noise_bytes() const { return how.sigma > 0 ? values() * sizeof(float) : 0; }
  size_t scratch_bytes() const { return engine.scratch_bytes(step, room, 1); }
  // All states of all slots, and the noise of one; D is a multiple of 32, so all of it is aligned.
  size_t slots_bytes() const { return step.num_states * room * row_bytes() + noise_bytes(); }

  void work(int tid) {
    Hand{*this, tid}.run();
    finished.fetch_add(1, std::memory_order_relaxed);
    if (tid == 0) look_until(finished, threads, stop);
  }

  // One thread and its slots.
  struct Hand {
    Queue& queue;
    const Team team;
    const Solving& how;
    Recursion step;
    std::vector<void*> states;
    std::vector<Slot> slots;
    std::vector<int64_t> answer;
    float* noise;
    void* scratch;

    Hand(Queue& q, int tid)
        : queue(q),
          team{0, 1, nullptr, &q.clocks[tid], &q.stop, tid == 0},
          how(q.how),
          step(q.step),
          answer(q.step.tokens - q.how.prefix) {
      for (int s = 0; s < step.num_states; ++s)
        states.push_back(q.memory[tid] + s * q.room * q.row_bytes());
      step.in = states.data();
      step.out = states.data();
      noise = (float*)(q.memory[tid] + step.num_states * q.room * q.row_bytes());
      scratch = q.memory[tid] + q.slots_bytes();
      q.clocks[tid].start();
    }

    char* at(int state, int slot) const { return (char*)states[state] + slot * queue.row_bytes(); }

    void run() {
      while (!queue.stop.raised()) {
        fill();
        if (slots.empty()) return;
        if (how.sigma > 0) disturb();
        step.batch = (int)slots.size();
        queue.engine.run_group(step, team, 0, step.batch, scratch);
        if (queue.stop.raised()) return;  // its states are of no use
        for (int i = (int)slots.size(); i-- > 0;)
          if (ends(i)) remove(i);
      }
    }

    void fill() {
      while ((int)slots.size() < queue.room) {
        const int row = queue.next++;
        if (row >= how.rows) return;
        const int slot = (int)slots.size();
        const size_t bytes = queue.row_bytes();
        slots.push_back({row, 0, 0});
        memcpy(at(0, slot), (const char*)how.x + row * bytes, bytes);
        for (int s = 1; s < step.num_states; ++s)
          memcpy(at(s, slot), (const char*)how.start[s] + (how.start_each ? row * bytes : 0),
                 bytes);
      }
    }

    void disturb() {
      for (size_t i = 0; i < slots.size(); ++i) {
        const NoiseOf which{(uint32_t)how.numbers[slots[i].row], (uint32_t)slots[i].steps,
                            kStepNoise};
        normals(which, how.seed, 0, noise, queue.values());
        queue.engine.add_noise(at(how.output, (int)i), noise, how.sigma, queue.values());
      }
    }

    float head(const char* row, const void* weights, int which, float bias) const {
      const char* weight = (const char*)weights + which * step.hidden * queue.value_bytes;
      return queue.engine.head(row, weight, step.hidden, bias);
    }

    // Reads the heads after a step; whether the row is done, its results then written.
    bool ends(int i) {
      Slot& slot = slots[i];
      const char* z = at(how.output, i);
      const float q = head(z, how.q_head, 0, how.q_bias[0]);
      const float bar = how.against_continue ? head(z, how.q_head, 1, how.q_bias[1]) : 0.f;
      bool halts = how.by_q && q > bar + how.above;
      const bool last = slot.steps + 1 == how.max_steps;
      if (how.by_answer || how.trace) {
        const bool same = read_answer(slot, z) && slot.steps > 0;
        slot.unchanged = same ? slot.unchanged + 1 : 0;
        halts = halts || (how.by_answer && slot.unchanged >= how.patience);
      }
      ++slot.steps;
      if (!halts && !last) return false;
      how.steps[slot.row] = slot.steps;
      how.halted[slot.row] = halts;
      memcpy((char*)how.final + slot.row * queue.row_bytes(), z, queue.row_bytes());
      how.done->fetch_add(1, std::memory_order_relaxed);
      return true;
    }

    // The first of the largest logits of every token, NaN above all, as PyTorch's argmax; whether
    // all are what they were.
    bool read_answer(const Slot& slot, const char* z) {
      const int count = (int)answer.size();
      int64_t* kept = how.answers + (long)slot.row * count;
      for (int t = 0; t < count; ++t) {
        const char* row = z + (size_t)(how.prefix + t) * step.hidden * queue.value_bytes;
        float best = 0.f;
        int chosen = -1;
        for (int v = 0; v < how.vocab; ++v) {
          const float logit = head(row, how.lm_head, v, 0.f);
          if (chosen < 0 || logit > best || (logit != logit && best == best)) {
            best = logit;
            chosen = v;
          }
        }
        answer[t] = chosen;
      }
      const bool same = memcmp(kept, answer.data(), count * sizeof(int64_t)) == 0;
      memcpy(kept, answer.data(), count * sizeof(int64_t));
      if (how.trace)
        memcpy(how.trace + ((long)slot.steps * how.rows + slot.row) * count, answer.data(),
               count * sizeof(int64_t));
      return same;
    }

    void remove(int i) {
      const int last = (int)slots.size() - 1;
      if (i != last) {
        for (int s = 0; s < step.num_states; ++s) memcpy(at(s, i), at(s, last), queue.row_bytes());
        slots[i] = slots[last];
      }
      slots.pop_back();
    }
  };
};

}  // namespace

bool solve(const Engine& engine, const Recursion& step, const Solving& how, int threads,
           bool (*wanted)()) {
  Recursion one = step;
  one.batch = 1;
  check(engine, one, threads);
  if (how.rows < 0 || how.max_steps < 1 || how.vocab < 1 || how.prefix < 0 ||
      how.prefix >= step.tokens || how.output < 1 || how.output >= step.num_states)
    throw std::invalid_argument("recurx cpu engine: a solve of impossible sizes");
  if (how.rows == 0) return true;
  return on_machine(wanted, threads, [&](Machine& owner, Stop& stop, int count) {
    Queue queue(owner, stop, engine, one, how, count);
    parallel(count, [](void* self, int tid) { ((Queue*)self)->work(tid); }, &queue);
    add_clocks(owner, queue.clocks);
  });
}

}  // namespace rx::cpu
