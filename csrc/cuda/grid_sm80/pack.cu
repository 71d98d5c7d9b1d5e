// pack.cu - how long the tape of a net is; layout.cuh says what lies where in it.
//
// No kernel packs it: `pack` of recurx/backends/cuda_grid.py does, in PyTorch, on the weights'
// device. The tape is a permutation of what goes in, which PyTorch does well, and with FP8 that is
// the codes and scales which recurx/fp8.py keeps for a weight.
#include "layout.cuh"

extern "C" int64_t rx_grid_sm80_tape_bytes(const RxPack* p, int fp8) {
  int64_t bytes = 0;
  for (int b = 0; b < p->num_blocks; b++)
    for (int slot = 0; slot < grid_sm80::kSlots; slot++)
      bytes += grid_sm80::weight_of(p->hidden, p->tokens, p->blocks[b], slot, fp8).bytes();
  return bytes;
}
