// banks.cpp - bank conflicts of plain loads and stores to shared memory.
//
// Lanes run one after the other here, so an instruction of a warp is put together again: the k-th
// access of each lane at one place in the code belongs to the k-th instruction there. A lane that
// skips an iteration shifts its own accesses, so loops with diverging lanes are counted roughly.
#include "state.h"

namespace emu {

// Extra passes over the 32 banks of four bytes: 8-byte accesses go by half warps, 16-byte ones by
// quarters, and lanes that want the same word share a pass.
static unsigned extra_passes(const BankInstruction& i) {
  unsigned at_once = i.bytes <= 4 ? 32 : i.bytes == 8 ? 16 : 8, extra = 0;
  for (unsigned first = 0; first < 32; first += at_once) {
    std::array<std::vector<uint32_t>, 32> words;  // distinct ones, by bank
    size_t passes = 1;
    for (unsigned l = first; l < first + at_once; l++) {
      if (!(i.lanes >> l & 1)) continue;
      for (uint32_t word = i.offset[l] / 4; word <= (i.offset[l] + i.bytes - 1) / 4; word++) {
        auto& bank = words[word % 32];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        passes = std::max(passes, bank.size());
      }
    }
    extra += unsigned(passes - 1);
  }
  return extra;
}

static void count(const BankInstruction& i) {
  if (!i.lanes) return;
  gang->stats.plain_shared++;
  gang->stats.plain_conflicts += extra_passes(i);
}

void count_banks(uint32_t offset, size_t bytes, uint64_t where) {
  Thread* me = self();
  BankSite& site = me->home->bank_sites[where];
  size_t k = site.executed[me->lane]++ - site.counted;
  if (k >= site.open.size()) site.open.resize(k + 1);
  BankInstruction& i = site.open[k];
  i.lanes |= 1u << me->lane;
  i.offset[me->lane] = offset;
  i.bytes = unsigned(bytes);
  for (; !site.open.empty() && site.open.front().lanes == ~0u; site.counted++) {
    count(site.open.front());
    site.open.pop_front();
  }
}

// What only some lanes executed is counted when the warp is done.
void finish_banks(Warp& w) {
  for (auto& [where, site] : w.bank_sites)
    for (const BankInstruction& i : site.open) count(i);
  w.bank_sites.clear();
}

}  // namespace emu
