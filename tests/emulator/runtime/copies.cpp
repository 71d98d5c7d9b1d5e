// copies.cpp - asynchronous copies: cp.async, bulk and tensor copies, st.async.
//
// The race checker sees a copy when it is issued, for that is when its source may first be read and
// its destination first be written. The bytes move at once, later, or when somebody waits, as the
// policy says; until then the destination holds 0xff (NaN in any float type).
#include "state.h"

namespace emu {

bool happens_now() {
  Async policy = gang->config.async;
  return policy == Async::kEager || (policy == Async::kRandom && gang->random() & 1);
}

void later(std::function<void()> work) {
  if (happens_now()) return work();
  gang->in_flight.push_back(std::move(work));
}

bool run_one_async() {
  auto& list = gang->in_flight;
  if (list.empty()) return false;
  size_t i = gang->config.async == Async::kRandom ? gang->random() % list.size() : 0;
  auto work = std::move(list[i]);
  list.erase(list.begin() + long(i));
  work();
  return true;
}

static void carry_out(Copy& c) {
  if (c.done) return;
  c.done = true;
  memcpy(c.dst, c.src, c.bytes);
  memset(c.dst + c.bytes, 0, c.zeros);
}

// ---- cp.async
void cp_async(uint32_t dst, const void* src, int bytes, int src_bytes) {
  Thread* me = self();
  if (bytes != 4 && bytes != 8 && bytes != 16)
    die("cp.async: %d bytes; 4, 8 or 16 are possible", bytes);
  if (src_bytes < 0 || src_bytes > bytes) die("cp.async: source size %d of %d", src_bytes, bytes);
  if (dst % uint32_t(bytes) || (src_bytes && uintptr_t(src) % unsigned(bytes)))
    die("cp.async: addresses must be aligned to %d bytes", bytes);
  RaceChecker& race = gang->race;
  Copy c{shared_ptr(dst), static_cast<const uint8_t*>(src), uint32_t(src_bytes),
         uint32_t(bytes - src_bytes), race.cp_async_event(me, "cp.async")};
  if (race.on) {
    race.touch(c.src, c.bytes, false, c.event, race.view(me));
    race.touch(c.dst, size_t(bytes), true, c.event, race.view(me));
  }
  gang->stats.async_bytes += uint64_t(bytes);
  if (happens_now()) return carry_out(c);
  memset(c.dst, 0xff, size_t(bytes));
  me->cp_async.add(c);
}

void cp_commit() {
  self()->cp_async.commit();
  self()->cp_commits++;
}

void cp_wait(int groups_left) {
  Thread* me = self();
  while (int(me->cp_async.committed()) > groups_left) me->cp_async.pop_group(carry_out);
  gang->race.cp_async_waited(me, me->cp_commits - me->cp_async.committed());
}

// A thread may end with cp.async in flight: the hardware completes them before the CTA goes.
void finish_copies(Thread* t) {
  auto& cp = t->cp_async;
  for (size_t i = cp.first; i < cp.ops.size(); i++) carry_out(cp.ops[i]);
  auto& stores = t->bulk_stores;
  if (stores.open()) die("the thread ends with bulk stores that it never committed");
  for (size_t i = stores.first; i < stores.ops.size(); i++)
    if (!stores.ops[i].done)
      die("the thread ends while bulk stores may still read its shared memory");
}

// ---- bulk and tensor loads
// Writes `bytes` at `dst` and completes them on `bar`, in the CTAs of the mask at the same offsets,
// or just at the addresses given (mask 0). Whoever knows that bytes came knows that `source`, the
// one read for all of them, is over.
template <class Fill>
static void load(const char* what, uint32_t dst, uint32_t bytes, uint32_t bar, uint32_t mask,
                 Event source, Fill fill) {
  Thread* me = self();
  Cluster& cluster = *me->cta->cluster;
  RaceChecker& race = gang->race;
  if (mask >> cluster.ctas.size())
    die("%s: multicast mask 0x%x names CTAs that do not exist", what, mask);
  auto to = [&](uint8_t* data, uint8_t* barrier) {
    Mbarrier& m = mbarrier_at(barrier);
    mbarrier_use(m, what, true);
    if (m.cta != me->cta && !race.init_fenced(m.init_thread, m.init_clock, me))
      die("%s completes on a barrier of cta %u whose initialisation has no fence.mbarrier_init",
          what, m.cta->bid_x);
    Event e = race.bulk_event(me, what);
    window_check(data, bytes, what);
    race.touch(data, bytes, true, e, race.view(me));
    memset(data, 0xff, bytes);
    later([=, &m] {
      fill(data);
      gang->race.completed(m.clocks, source);
      mbarrier_complete_tx(m, bytes, e);
    });
  };
  if (!mask) to(shared_ptr(dst), shared_ptr(bar));
  for (unsigned r = 0; r < cluster.ctas.size(); r++)
    if (mask >> r & 1)
      to(shared_in(cluster, r, dst & 0xffffff), shared_in(cluster, r, bar & 0xffffff));
  gang->stats.async_bytes += bytes;
}

static void check_bulk(const char* what, uint64_t a, uint64_t b, uint32_t bytes) {
  if (bytes % 16 || a % 16 || b % 16) die("%s: size and addresses must be multiples of 16", what);
}

void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar, uint32_t cta_mask) {
  check_bulk("cp.async.bulk", dst, uintptr_t(src), bytes);
  RaceChecker& race = gang->race;
  const Event e = race.bulk_event(self(), "cp.async.bulk");
  race.touch(src, bytes, false, e, race.view(self()));
  load("cp.async.bulk", dst, bytes, bar, cta_mask, e, [=](uint8_t* d) { memcpy(d, src, bytes); });
}

// Swizzled addresses: the 16-byte chunk number within the row is exchanged with bits of the row.
uint32_t swizzled(uint32_t addr, Swizzle s) {
  switch (s) {
    case Swizzle::k128:
      return addr ^ (addr >> 7 & 7) << 4;
    case Swizzle::k64:
      return addr ^ (addr >> 7 & 3) << 4;
    case Swizzle::k32:
      return addr ^ (addr >> 7 & 1) << 4;
    default:
      return addr;
  }
}

// Eight or so elements (16 bytes) at a time where the whole chunk is inside the tensor.
static void fill_box(uint8_t* window, uint32_t at, const TensorMap& m, int x, int y, int z) {
  uint32_t row_bytes = m.box[0] * m.elem_bytes;
  int64_t per_chunk = 16 / m.elem_bytes;
  for (uint32_t k = 0; k < m.box[2]; k++)
    for (uint32_t j = 0; j < m.box[1]; j++)
      for (uint32_t i = 0; i < m.box[0]; i += uint32_t(per_chunk)) {
        uint8_t* out =
            window + swizzled(at + (k * m.box[1] + j) * row_bytes + i * m.elem_bytes, m.swizzle);
        int64_t X = x + int64_t(i), Y = y + int64_t(j), Z = z + int64_t(k);
        bool row_inside = Y >= 0 && Z >= 0 && Y < int64_t(m.dim[1]) && Z < int64_t(m.dim[2]);
        const uint8_t* row = m.base + Y * int64_t(m.stride[1]) + Z * int64_t(m.stride[2]);
        for (int64_t e = 0; e < per_chunk; e++) {
          bool inside = row_inside && X + e >= 0 && X + e < int64_t(m.dim[0]);
          if (inside && e == 0 && X + per_chunk <= int64_t(m.dim[0])) {
            memcpy(out, row + X * m.elem_bytes, 16);
            break;
          }
          if (inside)
            memcpy(out + e * m.elem_bytes, row + (X + e) * m.elem_bytes, m.elem_bytes);
          else
            memset(out + e * m.elem_bytes, 0, m.elem_bytes);
        }
      }
}

// The race checker's view of the part of the box that is inside the tensor.
static Event check_source(const TensorMap& m, int x, int y, int z) {
  RaceChecker& race = gang->race;
  Event e = race.bulk_event(self(), "cp.async.bulk.tensor");
  auto range = [&](int d, int first) {
    int64_t last = std::min(int64_t(m.dim[d]), first + int64_t(m.box[d]));
    return std::pair<int64_t, int64_t>(std::max(first, 0), last);
  };
  auto [x0, x1] = range(0, x);
  auto [y0, y1] = range(1, y);
  auto [z0, z1] = range(2, z);
  if (!race.on || !watching() || x0 >= x1) return e;
  for (int64_t k = z0; k < z1; k++)
    for (int64_t j = y0; j < y1; j++) {
      const uint8_t* row = m.base + k * int64_t(m.stride[2]) + j * int64_t(m.stride[1]);
      race.touch(row + x0 * m.elem_bytes, size_t(x1 - x0) * m.elem_bytes, false, e,
                 race.view(self()));
    }
  return e;
}

void tensor_load(uint32_t dst, const TensorMap* map, int x, int y, int z, uint32_t bar,
                 uint32_t cta_mask) {
  TensorMap m = *map;
  uint32_t span = uint32_t(m.swizzle), row = m.box[0] * m.elem_bytes;
  uint32_t align = span ? span * 8 : 128;
  if ((dst & 0xffffff) % align)
    die("tensor copy: destination 0x%x must be aligned to %u for its swizzle", dst, align);
  if (span && row > span)
    die("tensor copy: a box row of %u bytes exceeds the swizzle span %u", row, span);
  if (row % 16) die("tensor copy: a box row of %u bytes is no multiple of 16", row);
  const Event source = check_source(m, x, y, z);
  uint32_t at = dst & 0xffffff;
  load("cp.async.bulk.tensor", dst, row * m.box[1] * m.box[2], bar, cta_mask, source,
       [=](uint8_t* d) { fill_box(d - at, at, m, x, y, z); });
}

// ---- copies within the cluster, and stores
void bulk_to_cluster(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar) {
  const char* what = "cp.async.bulk to shared::cluster";
  check_bulk(what, dst, src, bytes);
  RaceChecker& race = gang->race;
  uint8_t *to = shared_ptr(dst), *from = shared_ptr(src);
  Mbarrier& m = mbarrier_at(shared_ptr(bar));
  mbarrier_use(m, what, true);
  window_check(to, bytes, what);
  window_check(from, bytes, what);
  Event e = race.bulk_event(self(), what);
  race.touch(from, bytes, false, e, race.view(self()));
  race.touch(to, bytes, true, e, race.view(self()));
  memset(to, 0xff, bytes);
  later([=, &m] {
    memcpy(to, from, bytes);
    mbarrier_complete_tx(m, bytes, e);
  });
}

void st_async(uint32_t dst, const void* value, uint32_t bytes, uint32_t bar) {
  RaceChecker& race = gang->race;
  uint8_t* to = shared_ptr(dst);
  Mbarrier& m = mbarrier_at(shared_ptr(bar));
  mbarrier_use(m, "st.async", true);
  if (bytes > 16 || dst % bytes) die("st.async: %u bytes at 0x%x", bytes, dst);
  Event e = race.bulk_event(self(), "st.async");
  race.touch(to, bytes, true, e, race.view(self()));
  std::array<uint8_t, 16> copy{};
  memcpy(copy.data(), value, bytes);
  later([=, &m] {
    memcpy(to, copy.data(), bytes);
    mbarrier_complete_tx(m, bytes, e);
  });
}

void bulk_store(void* dst, uint32_t src, uint32_t bytes) {
  const char* what = "cp.async.bulk to global memory";
  check_bulk(what, uintptr_t(dst), src, bytes);
  RaceChecker& race = gang->race;
  Copy c{static_cast<uint8_t*>(dst), shared_ptr(src), bytes, 0, race.bulk_event(self(), what)};
  c.write_event = race.bulk_event(self(), what);
  window_check(c.src, bytes, what);
  race.touch(c.src, bytes, false, c.event, race.view(self()));
  race.touch(c.dst, bytes, true, c.write_event, race.view(self()));
  if (happens_now()) carry_out(c);
  self()->bulk_stores.add(c);
}

void bulk_commit() { self()->bulk_stores.commit(); }

// After a read-only wait the sources may be written again; nothing is known of the destinations.
void bulk_wait(int groups_left, bool read_only) {
  auto& stores = self()->bulk_stores;
  while (int(stores.committed()) > groups_left)
    stores.pop_group([&](Copy& c) {
      carry_out(c);
      gang->race.completed(self(), c.event);
      if (!read_only) gang->race.completed(self(), c.write_event);
    });
}

}  // namespace emu
