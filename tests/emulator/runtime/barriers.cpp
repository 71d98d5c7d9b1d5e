// barriers.cpp - named barriers of a CTA, the cluster barrier, fences and atomics.
#include "state.h"

namespace emu {

// ---- bar.sync, bar.arrive
static void complete(NamedBarrier& b) {
  for (Thread* t : b.waiting) gang->race.acquire(t, b.clocks);
  b.clocks.v.clear(), b.clocks.reads.clear();
  b.arrived = b.expected = 0;
  wake(b.waiting);
}

static void arrive(int id, int threads, bool wait) {
  Thread* me = self();
  if (id < 0 || id > 15) die("barrier id %d: a CTA has 0..15", id);
  if (threads > 0 && threads % 32) die("barrier %d: count %d is no multiple of 32", id, threads);
  NamedBarrier& b = me->cta->barriers[size_t(id)];
  if (b.arrived && b.expected != threads)
    die("barrier %d is used with counts %d and %d at once", id, b.expected, threads);
  b.expected = threads;
  b.arrived++;
  gang->race.release(me, b.clocks);
  int full = threads < 0 ? int(me->cta->live) : threads;
  if (wait) b.waiting.push_back(me);
  if (b.arrived == full) complete(b);  // this also makes me ready
  if (wait) block({Wait::kBarrier, "bar.sync", uint32_t(id)});
}

void bar_sync(int id, int threads) {
  aligned("bar.sync", __builtin_return_address(0));
  arrive(id, threads, true);
}
void bar_arrive(int id, int threads) {
  aligned("bar.arrive", __builtin_return_address(0));
  arrive(id, threads, false);
}

// ---- barrier.cluster
static void complete_if_full(Cluster& c) {
  if (!c.arrived || c.arrived != c.live) return;
  c.arrived = 0;
  c.phase++;
  c.done_clocks = std::move(c.clocks);
  c.clocks = {};
  wake(c.waiting);
}

static void arrive_at_cluster(bool relaxed) {
  Thread* me = self();
  Cluster& c = *me->cta->cluster;
  if (me->cluster_arrived) die("cluster barrier: second arrive without a wait");
  me->cluster_arrived = true;
  me->cluster_phase = c.phase;
  if (relaxed)
    gang->race.release_relaxed(me, c.clocks, Scope::kCluster);
  else
    gang->race.release(me, c.clocks);
  c.arrived++;
  complete_if_full(c);
}

void cluster_arrive() {
  aligned("barrier.cluster.arrive", __builtin_return_address(0));
  arrive_at_cluster(false);
}
void cluster_arrive_relaxed() {
  aligned("barrier.cluster.arrive.relaxed", __builtin_return_address(0));
  arrive_at_cluster(true);
}

void cluster_wait() {
  aligned("barrier.cluster.wait", __builtin_return_address(0));
  Thread* me = self();
  Cluster& c = *me->cta->cluster;
  if (!me->cluster_arrived) die("cluster barrier: wait without an arrive");
  me->cluster_arrived = false;
  if (c.phase == me->cluster_phase) {
    c.waiting.push_back(me);
    block({Wait::kClusterBarrier, "barrier.cluster.wait"});
  }
  gang->race.acquire(me, c.done_clocks);
}

// A thread that has left counts as arrived wherever "all threads" are expected.
void barrier_thread_exit(Thread* t) {
  for (NamedBarrier& b : t->cta->barriers)
    if (b.arrived && b.expected < 0 && b.arrived == int(t->cta->live)) complete(b);
  complete_if_full(*t->cta->cluster);
}

// ---- fences and atomics
void fence(Scope scope) { gang->race.memory_fence(self(), scope); }
void proxy_fence() { gang->race.proxy_fence(self()); }

// One synchronisation variable per address, as far as the race checker is concerned.
void atomic_order(const void* p, size_t n, Order order, Scope scope) {
  Thread* me = self();
  if (uintptr_t(p) % n) die("atomic of %zu bytes at a misaligned address", n);
  yield();  // whoever spins on p lets the others run
  if (gang->race.on) gang->race.access_variable(me, gang->sync_variables[p], order, scope);
}

// Here and not in a header, for kernels are instrumented and the sanitizer would take over.
uint32_t atomic_add(uint32_t* p, uint32_t n, Order order, Scope scope) {
  atomic_order(p, 4, order, scope);
  return __atomic_fetch_add(p, n, __ATOMIC_SEQ_CST);
}
uint32_t atomic_load(const uint32_t* p, Order order, Scope scope) {
  atomic_order(p, 4, order, scope);
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}

}  // namespace emu
