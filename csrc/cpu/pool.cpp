#include "pool.hpp"

#include <pthread.h>
#include <sched.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
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

constexpr int kSpins = 4000;           // about 50 us; longer waits sleep or yield
constexpr int64_t kLook = 50'000'000;  // ns; a look takes Python's lock

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins at first, then lets others have the core.
void pause(int spin) {
  if (spin < kSpins) {
    relax();
  } else {
    sched_yield();
  }
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
    while ((int)workers_.size() < threads - 1) hire();  // may throw: no work has begun
    work_ = work;
    context_ = context;
    pending_.store(threads - 1, std::memory_order_relaxed);
    for (int tid = 1; tid < threads; ++tid) start(*workers_[tid - 1]);
    work(context, 0);
    for (int spin = 0; pending_.load(std::memory_order_acquire) > 0; ++spin) pause(spin);
  }

 private:
  void hire() {
    auto worker = std::make_unique<Worker>();
    workers_.reserve(workers_.size() + 1);
    // Detached, never joined: it sleeps until the process ends.
    std::thread(&Pool::serve, this, (int)workers_.size() + 1, worker.get()).detach();
    workers_.push_back(std::move(worker));
  }

  void start(Worker& worker) {
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

// Whether this process was forked and has called no exec since: Linux keeps it as a flag.
bool born_by_fork() {
  bool forked = false;
#if defined(__linux__)
  constexpr unsigned kForkedNoExec = 0x40;  // PF_FORKNOEXEC
  if (std::FILE* file = std::fopen("/proc/self/stat", "r")) {
    char line[1024];
    line[std::fread(line, 1, sizeof(line) - 1, file)] = 0;
    std::fclose(file);
    unsigned flags = 0;  // the ninth field; the second, a name in brackets, may hold anything
    const char* name_end = std::strrchr(line, ')');
    if (name_end && std::sscanf(name_end + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) == 1)
      forked = flags & kForkedNoExec;
  }
#endif
  return forked;
}

// A fork copies none of the workers: the child gets a new pool. Never freed, because detached
// workers refer to it. OpenMP's threads are gone too, and it does not know; nor do we, where this
// module is first loaded in the child.
Pool* pool = new Pool;
bool forked = born_by_fork();
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

const bool asked_openmp =
    GOMP_parallel && omp_in_parallel && omp_get_num_threads && omp_get_thread_num && !own_threads();

// On the threads that PyTorch's operators run on. After an operator they spin for milliseconds
// (3.4 on a Xeon), on the cores that threads of our own would need.
bool on_openmp(int threads, Work work, void* context) {
  // No static is made on the way: a fork meanwhile would leave it half made in the child.
  if (forked || !asked_openmp || omp_in_parallel()) return false;
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

Stop::Stop(bool (*wanted)()) : wanted_(wanted), next_(now() + kLook) {}

void Stop::look() {
  if (!wanted_ || raised() || now() < next_) return;
  if (wanted_()) raised_.store(true, std::memory_order_relaxed);
  next_ = now() + kLook;
}

void Barrier::wait(int size, const Stop& stop) {
  const int epoch = epoch_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    stopped_.store(stop.raised(), std::memory_order_relaxed);
    epoch_.store(epoch + 1, std::memory_order_release);
    return;
  }
  for (int spin = 0; epoch_.load(std::memory_order_acquire) == epoch; ++spin) pause(spin);
}

void Team::sync() const {
  if (size == 1) return;
  const int64_t came = clock->on ? now() : 0;
  barrier->wait(size, *stop);
  if (clock->on) clock->waited(now() - came);
}

bool Team::stopped() const {
  if (looks) stop->look();
  return size == 1 ? stop->raised() : barrier->stopped();
}

const char* const kPhaseNames[] = {"inject",  "qkv",  "attention", "o",
                                   "gate_up", "down", "token_mlp", "barrier"};

void Clock::start() {
  if (on) last = now();
}

void Clock::waited(int64_t time) {
  nanoseconds[(int)Phase::barrier] += time;
  last += time;
}

void Clock::lap_now(Phase phase) {
  const int64_t time = now();
  nanoseconds[(int)phase] += time - last;
  last = time;
}

}  // namespace rx::cpu
