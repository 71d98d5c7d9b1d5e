// Runs a window on one team of threads, forward or backward.
#include <stdexcept>
#include <vector>

#include "dispatch.hpp"

namespace rx::cpu {

namespace {
struct Job {
  const Window& window;
  void (*run)(const Window&, const Team&, void*);
  void* scratch;
  int threads;
  Barrier barrier;
  std::vector<Clock> clocks;

  void work(int tid) {
    clocks[tid].start();
    run(window, {tid, threads, &barrier, &clocks[tid]}, scratch);
  }
};
}  // namespace

void run_window(const Engine& engine, const Window& window, bool backward, int threads) {
  const auto run = backward ? engine.window.backward : engine.window.forward;
  const size_t bytes = engine.window.scratch_bytes(window, threads, backward);
  with_machine(bytes, threads, [&](void* scratch, std::vector<Clock>& clocks) {
    Job job{window, run, scratch, threads, {}, clocks};
    parallel(threads, [](void* self, int tid) { ((Job*)self)->work(tid); }, &job);
    clocks = job.clocks;
  });
}

}  // namespace rx::cpu
