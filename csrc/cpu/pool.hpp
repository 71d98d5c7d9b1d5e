// Worker threads, the spin barrier of a team, and the clock behind the profiler.
#pragma once

#include <atomic>
#include <cstdint>

namespace rx::cpu {

// Spins: the threads of a team meet about every 50 us. Yields when a peer seems to be descheduled.
class Barrier {
 public:
  void wait(int size);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> epoch_{0};
};

enum class Phase { inject, qkv, attention, o, gate_up, down, token_mlp, barrier, count };
extern const char* const kPhaseNames[];

// Where the time of one thread goes; costs one branch when off.
struct Clock {
  bool on = false;
  int64_t last = 0;
  int64_t nanoseconds[(int)Phase::count] = {};
  void start();
  void lap(Phase phase) {
    if (__builtin_expect(on, 0)) lap_now(phase);
  }

 private:
  void lap_now(Phase phase);
};

struct Team {
  int tid, size;
  Barrier* barrier;
  Clock* clock;
  void sync() const;  // all threads of the team; nothing for a team of one
};

// Calls work(tid) once for every tid in [0, threads), all at once, tid 0 on the calling thread;
// returns when all are done. One caller at a time. Works in a forked child. The threads are
// OpenMP's where PyTorch has loaded it (RECURX_CPU_THREADS=own: ours).
using Work = void (*)(void* context, int tid);
void parallel(int threads, Work work, void* context);

}  // namespace rx::cpu
