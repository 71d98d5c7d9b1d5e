// What one call after the other uses: the machine's threads, their scratch and their clocks.
#pragma once

#include <cstdlib>
#include <mutex>
#include <vector>

#include "dispatch.hpp"

namespace rx::cpu {

struct Scratch {
  void* data = nullptr;
  size_t bytes = 0;
  void* at_least(size_t wanted) {
    if (wanted > bytes) {
      std::free(data);
      data = nullptr;
      data = allocate(wanted);
      bytes = wanted;
    }
    return data;
  }
};

// One call at a time has the machine; its scratch stays for the next one.
struct Machine {
  std::timed_mutex lock;
  std::vector<Scratch> scratch;
  Scratch window;  // of run_window.cpp
  bool profiling = false;
  int64_t phase_ns[(int)Phase::count] = {};
  Machine() = default;
  Machine(const Machine&) = delete;
  ~Machine() {
    for (Scratch& one : scratch) std::free(one.data);
    std::free(window.data);
  }
};

Machine& the_machine();
std::unique_lock<std::timed_mutex> locked(Machine& owner, Stop& stop);
void add_clocks(Machine& owner, const std::vector<Clock>& clocks);

// Whether this thread is inside a call, as it is while `wanted` runs.
class Running {
 public:
  Running();
  ~Running();
  static bool now();
};

// Calls `work(machine, stop, threads)` with the machine locked. False if the caller wants to stop,
// by `wanted`: then not all was done. A call inside `wanted` has a machine and one thread for
// itself.
template <class Work>
bool on_machine(bool (*wanted)(), int threads, Work work) {
  Stop stop(wanted);
  const auto run_on = [&](Machine& owner, int count) {
    const auto lock = locked(owner, stop);
    if (!lock) return false;
    work(owner, stop, count);
    return !stop.raised();
  };
  if (Running::now()) {
    Machine alone;
    return run_on(alone, 1);
  }
  const Running here;
  return run_on(the_machine(), threads);
}

// Thread 0 of a call that has done its part looks until the others have done theirs.
void look_until(const std::atomic<int>& finished, int threads, Stop& stop);

}  // namespace rx::cpu
