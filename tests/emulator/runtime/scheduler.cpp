// scheduler.cpp - which thread runs next, and what to say when none can.
//
// A thread runs until it must wait. Its warp goes on with its other lanes as long as one is ready:
// warp collectives then cost a stack switch a lane and little else. The random policy leaves a warp
// now and then, and starves some warps or a whole CTA for a while, which brings out late arrivals.
#include "fiber.h"
#include "state.h"
#include "wgmma.h"

#include <cstdarg>
#include <map>

namespace emu {

__thread ThreadContext* cur;
__thread Gang* gang;

void die(const char* format, ...) {
  char text[2000];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  std::string message = text;
  if (cur) {
    char who[80];
    snprintf(who, sizeof who, "[cta %u (rank %u) thread %u] ", cur->bid.x, cur->cta_rank,
             cur->tid.x);
    message = who + message;
  }
  throw Error(message);
}

void make_ready(Thread* t) {
  Warp* w = t->home;
  w->ready |= 1u << t->lane;
  if (w->run_index >= 0) return;
  w->run_index = int(gang->runnable.size());
  gang->runnable.push_back(w);
}

void wake(std::vector<Thread*>& waiting) {
  for (Thread* t : waiting) make_ready(t);
  waiting.clear();
}

static void remove_runnable(Warp* w) {
  auto& list = gang->runnable;
  list[size_t(w->run_index)] = list.back();
  list[size_t(w->run_index)]->run_index = w->run_index;
  list.pop_back();
  w->run_index = -1;
}

static void starve_some_warps() {
  gang->until_starve = gang->random() % (40 * unsigned(gang->threads.size()));
  bool whole_cta = gang->random() % 2;
  unsigned victim = gang->random() % unsigned(gang->ctas.size());
  for (Cta& c : gang->ctas)
    for (Warp& w : c.warps) w.starved = whole_cta ? c.index == victim : gang->random() % 4 == 0;
}

static Warp* choose_warp() {
  auto& list = gang->runnable;
  if (list.empty()) return nullptr;
  if (!gang->config.random_order) return list[gang->round_robin++ % list.size()];
  if (gang->until_starve-- == 0) starve_some_warps();
  Warp* w = list[gang->random() % list.size()];
  for (int tries = 0; tries < 12 && w->starved; tries++) w = list[gang->random() % list.size()];
  w->first_lane = gang->random() % 32;
  return w;
}

static Thread* pick(bool leave_warp) {
  if (gang->config.async == Async::kRandom && !gang->in_flight.empty() && gang->random() % 64 == 0)
    run_one_async();
  Warp* w = gang->current;
  bool leave =
      leave_warp || !w || !w->ready || (gang->config.random_order && gang->random() % 256 == 0);
  if (leave) w = gang->current = choose_warp();
  if (!w) return nullptr;
  uint32_t from_first = w->ready >> w->first_lane << w->first_lane;
  unsigned lane = unsigned(__builtin_ctz(from_first ? from_first : w->ready));
  w->ready &= ~(1u << lane);
  if (!w->ready) remove_runnable(w);
  return w->lane[lane];
}

static void switch_to(Thread* to, void** save) {
  if (++gang->stats.switches > gang->config.max_switches)
    die("livelock: no end after %llu switches", (unsigned long long)gang->config.max_switches);
  cur = to;
  emu_switch_stack(save, to->sp);
}

// ---- waiting
std::string describe_wait(const Thread& t) {
  const Wait& w = t.wait;
  char s[160];
  switch (w.kind) {
    case Wait::kCollective:
      snprintf(s, sizeof s, "%s, other lanes of mask %08x", w.op, w.a);
      break;
    case Wait::kBarrier: {
      const NamedBarrier& b = t.cta->barriers[w.a];
      int full = b.expected < 0 ? int(t.cta->live) : b.expected;
      snprintf(s, sizeof s, "barrier %u, %d of %d threads arrived", w.a, b.arrived, full);
      break;
    }
    case Wait::kClusterBarrier:
      snprintf(s, sizeof s, "cluster barrier, %u of %u threads arrived", t.cta->cluster->arrived,
               t.cta->cluster->live);
      break;
    case Wait::kMbarrier: {
      const Mbarrier& m = mbarrier_at(shared_in(*t.cta->cluster, t.cta_rank, w.a));
      snprintf(s, sizeof s,
               "mbarrier at dynamic byte %ld parity %u: phase %u, %u of %u arrivals and %ld bytes "
               "missing",
               long(w.a & 0xffffff) - long(t.cta->dyn), w.b, m.phase, m.pending, m.expected,
               long(m.tx));
      break;
    }
    case Wait::kWgmma:
      snprintf(s, sizeof s, "wgmma, %u of 128 threads arrived",
               t.cta->warpgroups[t.tid.x / 128]->arrived);
      break;
    case Wait::kRegisters:
      snprintf(s, sizeof s, "setmaxnreg %u, %zu of 128 threads arrived", w.a,
               t.cta->registers[t.tid.x / 128].waiting.size());
      break;
    default:
      snprintf(s, sizeof s, "nothing (starting)");
  }
  return s;
}

[[noreturn]] static void report_deadlock() {
  std::string text;
  auto describe = [](const Thread& t) {
    return "cta " + std::to_string(t.cta->bid_x) + " ~ for " + describe_wait(t);
  };
  auto& all = gang->threads;
  for (size_t i = 0; i < all.size();) {  // one line for a run of threads that wait for the same
    if (all[i].done) {
      i++;
      continue;
    }
    std::string line = describe(all[i]);
    size_t j = i;
    while (j + 1 < all.size() && !all[j + 1].done && describe(all[j + 1]) == line) j++;
    std::string threads = "thread " + std::to_string(all[i].tid.x) + " waits";
    if (j > i)
      threads =
          "threads " + std::to_string(all[i].tid.x) + "-" + std::to_string(all[j].tid.x) + " wait";
    text += "\n  " + line.replace(line.find('~'), 1, threads);
    i = j + 1;
  }
  throw Error("deadlock: " + std::to_string(gang->live) + " threads wait and nothing is in flight" +
              text);
}

void block(const Wait& why) {
  Thread* me = self();
  me->wait = why;
  for (;;) {
    Thread* next = pick(false);
    if (next == me) break;
    if (next) {
      switch_to(next, &me->sp);
      break;
    }
    if (!run_one_async()) report_deadlock();
  }
  me->wait.kind = Wait::kNothing;
}

void yield() {
  Thread* me = self();
  if (gang->runnable.empty()) run_one_async();  // a thread that spins must see time pass
  make_ready(me);
  Thread* next = pick(true);
  if (next != me) switch_to(next, &me->sp);
}

// ---- the life of a fiber
static void thread_exit(Thread* t) {
  finish_copies(t);
  t->done = true;
  gang->live--;
  t->home->live &= ~(1u << t->lane);
  if (!t->home->live) finish_banks(*t->home);
  t->cta->live--;
  t->cta->cluster->live--;
  if (gang->race.on) {
    gang->race.release(t, t->cta->exit_clocks);
    if (!t->cta->live) {
      gang->race.exit_check(*t->cta);
      mbarrier_exit_check(*t->cta);
    }
  }
  warp_thread_exit(*t->home);
  barrier_thread_exit(t);
}

static void fail(const char* what) {
  if (gang->error.empty()) gang->error = what;
}

static void fiber_entry() {
  Thread* me = self();
  try {
    (*gang->body)();
    thread_exit(me);
    while (gang->live) {
      Thread* next = pick(false);
      if (next) switch_to(next, &me->sp);
      if (!run_one_async()) report_deadlock();
    }
  } catch (const std::exception& e) {
    fail(e.what());
  } catch (...) {
    fail("unknown C++ exception in a kernel");
  }
  void* unused;
  cur = nullptr;
  emu_switch_stack(&unused, gang->host_sp);
  __builtin_unreachable();
}

void start_fiber(Thread* t, uint8_t* stack_top) {
  t->sp = new_stack(stack_top, fiber_entry);
  make_ready(t);
}

void run_to_end(Gang& g) {
  Thread* first = pick(true);
  switch_to(first, &g.host_sp);
  cur = nullptr;
  if (g.error.empty() && !g.in_flight.empty())
    g.error =
        std::to_string(g.in_flight.size()) + " asynchronous copies were still in flight at the end";
}

}  // namespace emu
