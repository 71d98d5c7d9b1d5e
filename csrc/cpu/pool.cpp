#include "pool.hpp"

#include <pthread.h>
#include <sched.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

// OpenMP's runtime, where the process has loaded one before us, as PyTorch does; else null.
#if defined(__linux__)
extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
__attribute__((weak)) int omp_in_parallel();
__attribute__((weak)) int omp_get_num_threads();
__attribute__((weak)) int omp_get_thread_num();
}
#endif

namespace rx::cpu {
namespace {

constexpr int kSpins = 4000;  // about 50 us; longer waits sleep or yield

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int64_t now() {
  const auto time = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

struct Worker {
  std::atomic<int> calls{0};  // raised by one to start it
  std::mutex mutex;
  std::condition_variable wake;
};

class Pool {
 public:
  void run(int threads, Work work, void* context) {
    work_ = work;
    context_ = context;
    pending_.store(threads - 1, std::memory_order_relaxed);
    for (int tid = 1; tid < threads; ++tid) start(tid);
    work(context, 0);
    for (int spin = 0; pending_.load(std::memory_order_acquire) > 0; ++spin) {
      if (spin < kSpins) {
        relax();
      } else {
        sched_yield();
      }
    }
  }

 private:
  void start(int tid) {
    if (tid > (int)workers_.size()) {
      workers_.push_back(std::make_unique<Worker>());
      // Detached, never joined: it sleeps until the process ends.
      std::thread(&Pool::serve, this, tid, workers_.back().get()).detach();
    }
    Worker& worker = *workers_[tid - 1];
    {
      std::lock_guard<std::mutex> lock(worker.mutex);
      worker.calls.fetch_add(1, std::memory_order_release);
    }
    worker.wake.notify_one();
  }

  void serve(int tid, Worker* worker) {
    for (int seen = 0;; ++seen) {
      const auto called = [&] { return worker->calls.load(std::memory_order_acquire) != seen; };
      for (int spin = 0; spin < kSpins && !called(); ++spin) relax();
      if (!called()) {
        std::unique_lock<std::mutex> lock(worker->mutex);
        // Not wait(): libstdc++ 12 gave it a new symbol, and a wheel would ask for manylinux_2_35.
        while (!worker->wake.wait_for(lock, std::chrono::hours(1), called)) continue;
      }
      work_(context_, tid);
      pending_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  std::vector<std::unique_ptr<Worker>> workers_;
  Work work_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<int> pending_{0};
};

// A fork copies none of the workers: the child gets a new pool. Never freed, because detached
// workers refer to it. OpenMP's threads are gone too, and it does not know.
Pool* pool = new Pool;
bool forked = false;
const int renewed_by_fork = pthread_atfork(nullptr, nullptr, [] {
  pool = new Pool;
  forked = true;
});

#if defined(__linux__)
struct Region {
  int threads;
  Work work;
  void* context;
  bool done;
};

void in_region(void* data) {
  Region& region = *(Region*)data;
  if (omp_get_num_threads() != region.threads) return;  // a limit: all of the team see it
  const int tid = omp_get_thread_num();
  region.work(region.context, tid);
  if (tid == 0) region.done = true;
}

bool own_threads() {
  const char* wanted = std::getenv("RECURX_CPU_THREADS");
  return wanted && std::strcmp(wanted, "own") == 0;
}

// On the threads that PyTorch's operators run on. After an operator they spin for milliseconds
// (3.4 on a Xeon), on the cores that threads of our own would need.
bool on_openmp(int threads, Work work, void* context) {
  static const bool wanted = GOMP_parallel && omp_in_parallel && omp_get_num_threads &&
                             omp_get_thread_num && !own_threads();
  if (!wanted || forked || omp_in_parallel()) return false;
  Region region{threads, work, context, false};
  GOMP_parallel(in_region, &region, threads, 0);
  return region.done;
}
#else
bool on_openmp(int, Work, void*) { return false; }
#endif

}  // namespace

void parallel(int threads, Work work, void* context) {
  if (threads == 1) return work(context, 0);
  if (!on_openmp(threads, work, context)) pool->run(threads, work, context);
}

void Barrier::wait(int size) {
  const int epoch = epoch_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    epoch_.store(epoch + 1, std::memory_order_release);
    return;
  }
  for (int spin = 0; epoch_.load(std::memory_order_acquire) == epoch; ++spin) {
    if (spin < kSpins) {
      relax();
    } else {
      sched_yield();
    }
  }
}

void Team::sync() const {
  if (size == 1) return;
  barrier->wait(size);
  clock->lap(Phase::barrier);
}

const char* const kPhaseNames[] = {"inject",  "qkv",  "attention", "o",
                                   "gate_up", "down", "token_mlp", "barrier"};

void Clock::start() {
  if (on) last = now();
}

void Clock::lap_now(Phase phase) {
  const int64_t time = now();
  nanoseconds[(int)phase] += time - last;
  last = time;
}

}  // namespace rx::cpu
