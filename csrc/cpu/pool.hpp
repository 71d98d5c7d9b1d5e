// Worker threads, the spin barrier of a team, and the clock behind the profiler.
#pragma once

#include <atomic>
#include <cstdint>

namespace rx::cpu {

// Ends a recursion before its time. The calling thread looks every 50 ms whether its caller wants
// that; raised once, it stays so.
class Stop {
 public:
  explicit Stop(bool (*wanted)());
  void look();
  bool raised() const { return raised_.load(std::memory_order_relaxed); }

 private:
  bool (*wanted_)();
  int64_t next_;  // time of the next look
  std::atomic<bool> raised_{false};
};

// Spins: the threads of a team meet about every 50 us. Yields when a peer seems to be descheduled.
class Barrier {
 public:
  void wait(int size, const Stop& stop);
  // Whether `stop` was raised when the last thread came: the same for all until they meet again.
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }

 private:
  std::atomic<bool> stopped_{false};
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
  // The time since the lap before, without what was waited at barriers, was that of `phase`.
  void lap(Phase phase) {
    if (__builtin_expect(on, 0)) lap_now(phase);
  }
  void waited(int64_t time);

 private:
  void lap_now(Phase phase);
};

struct Team {
  int tid, size;
  Barrier* barrier;
  Clock* clock;
  Stop* stop;
  bool looks;            // whether this is the calling thread
  void sync() const;     // all threads of the team; nothing for a team of one
  bool stopped() const;  // whether to leave now: as of the last sync, so that all leave together
};

// Calls work(tid) once for every tid in [0, threads), all at once, tid 0 on the calling thread;
// returns when all are done. One caller at a time. Works in a forked child. The threads are
// OpenMP's where PyTorch has loaded it (RECURX_CPU_THREADS=own: ours).
using Work = void (*)(void* context, int tid);
void parallel(int threads, Work work, void* context);

}  // namespace rx::cpu
