// Runs a window on one team of threads, forward or backward.
#include "engines.hpp"
#include "machine.hpp"

namespace rx::cpu {

namespace {
struct Job {
  const Window& window;
  void (*run)(const Window&, const Team&, void*);
  void* scratch;
  int threads;
  Stop& stop;
  Barrier barrier;
  std::vector<Clock> clocks;
  std::atomic<int> finished{0};

  void work(int tid) {
    clocks[tid].start();
    run(window, {tid, threads, &barrier, &clocks[tid], &stop, tid == 0}, scratch);
    finished.fetch_add(1, std::memory_order_relaxed);
    if (tid == 0) look_until(finished, threads, stop);
  }
};
}  // namespace

KeptSize kept_of_block(const BlockShape& shape, int tokens, Save save) {
  const PackedBlock block{shape};
  const PackedNet net{&block, 1};
  Step step{};
  const Recursion rec{1,     tokens, shape.hidden, 0,       nullptr, nullptr, 1,
                      &step, 1,      &net,         nullptr, nullptr};
  KeptSize size = portable_f32.window.kept_size(rec, save);
  if (save != Save::states) size.values -= (size_t)tokens * shape.hidden;
  return size;
}

bool run_window(const Engine& engine, const Window& window, bool backward, int threads,
                bool (*wanted)()) {
  check(engine, window.rec, threads);
  const auto run = backward ? engine.window.backward : engine.window.forward;
  return on_machine(wanted, threads, [&](Machine& owner, Stop& stop, int count) {
    const size_t bytes = engine.window.scratch_bytes(window, count, backward);
    Job job{window, run, owner.window.at_least(bytes), count, stop, {}, std::vector<Clock>(count)};
    for (Clock& clock : job.clocks) clock.on = owner.profiling;
    parallel(count, [](void* self, int tid) { ((Job*)self)->work(tid); }, &job);
    add_clocks(owner, job.clocks);
  });
}

}  // namespace rx::cpu
