// pack.cu - the weights of a net as the tape that the cluster kernel reads (layout.cuh).
//
// One thread writes 16 bytes of the tape: it finds which product, tile, row and columns they belong
// to, and gathers them. Runs once when weights change.
#include "../rx/launch.cuh"
#include "layout.cuh"

namespace cluster_sm90a::pack {

constexpr int kThreads = 256;
constexpr int kChunks = kStage / 16;  // of a stage

struct Params {
  RxBlock block;
  int hidden, tokens, stages;
  const rx::bf16 *mixer_in_g, *mixer_out_g, *gate_up_g, *down_g;
  rx::bf16* tape_g;
};

// Eight elements of a row-major matrix; `row` < 0 is none.
struct Source {
  const rx::bf16* matrix_g;
  int row, column, columns;
};

// Chunk `position` of a row of four, unswizzled: its first column.
RX_DEVICE int column_of(int row, int position) { return (position ^ (row >> 1 & 3)) * 8; }

// gate and up (or K and V) of 64 rows each, stacked.
RX_DEVICE Source gate_up(const rx::bf16* w_g, int inner, int columns, int first, int row, int k) {
  const int middle = first + row % 64;
  return {w_g, middle < inner ? middle + row / 64 * inner : -1, k, columns};
}

RX_DEVICE Source first_keys(const Params& p, int pair, int stage, int chunk) {
  const int c = chunk / 512, row = chunk % 512 / 4, head = 2 * pair + c;
  return {p.mixer_in_g, (1 + row / 64) * p.hidden + head * kHeadDim + row % 64,
          stage * 32 + column_of(row, chunk % 4), p.hidden};
}
RX_DEVICE Source query(const Params& p, int pair, int stage, int chunk) {
  const int c = chunk / 512, tile = chunk % 512 / 256, row = chunk % 256 / 4;
  return {p.mixer_in_g, (2 * pair + c) * kHeadDim + row,
          stage * 64 + tile * 32 + column_of(row, chunk % 4), p.hidden};
}
RX_DEVICE Source first_middle(const Params& p, int round, int stage, int chunk) {
  const int c = chunk / 512, row = chunk % 512 / 4;
  return gate_up(p.gate_up_g, p.block.inner, p.hidden, round * kMiddle + c * 64, row,
                 stage * 32 + column_of(row, chunk % 4));
}
RX_DEVICE Source second(const Params& p, const rx::bf16* w_g, int depth, int round, int stage,
                        int chunk) {
  const int unit_chunks = int(Tape{p.hidden}.unit() / 16), c = chunk / 512;
  const int at = stage * 512 + chunk % 512, unit = at / unit_chunks, row = at % unit_chunks / 2;
  const int column = (at % 2 ^ (row >> 2 & 1)) * 8;
  return {w_g, row < p.hidden / 2 ? c * (p.hidden / 2) + row : -1,
          round * kMiddle + unit * 16 + column, depth};
}
RX_DEVICE Source token_mix(const Params& p, int stage, int chunk) {
  const int round = stage / 3, part = stage % 3, tile = chunk / 512, row = chunk % 512 / 4;
  const int k = tile * 32 + column_of(row, chunk % 4), first = round * kTokenMiddle;
  if (part < 2)
    return gate_up(p.mixer_in_g, p.block.token_inner, p.tokens, first, row, part * 64 + k);
  return {p.mixer_out_g, row < p.tokens ? row : -1, first + k, p.block.token_inner};
}

RX_DEVICE Source attention(const Params& p, int stage, int chunk) {
  const Tape tape{p.hidden};
  const int first = tape.first(), ask = tape.query(), out = tape.second();
  const int pairs = p.block.heads / 2;
  if (stage < first) return first_keys(p, 0, stage, chunk);
  if (stage < first + ask) return query(p, 0, stage - first, chunk);
  stage -= first + ask;
  const int pair = stage / (first + out + ask) + 1;
  stage %= first + out + ask;
  if (pair == pairs) return second(p, p.mixer_out_g, p.hidden, pair - 1, stage, chunk);
  if (stage < first) return first_keys(p, pair, stage, chunk);
  if (stage < first + out)
    return second(p, p.mixer_out_g, p.hidden, pair - 1, stage - first, chunk);
  return query(p, pair, stage - first - out, chunk);
}

RX_DEVICE Source swiglu(const Params& p, int stage, int chunk) {
  const Tape tape{p.hidden};
  const int first = tape.first(), out = tape.second(), rounds = tape.rounds(p.block);
  if (stage < first) return first_middle(p, 0, stage, chunk);
  stage -= first;
  const int round = stage / (first + out) + 1;
  stage %= first + out;
  if (round < rounds && stage < first) return first_middle(p, round, stage, chunk);
  return second(p, p.down_g, p.block.inner, round - 1, round < rounds ? stage - first : stage,
                chunk);
}

__global__ void kernel(const Params p) {
  const size_t i = size_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size_t(p.stages) * kChunks) return;
  const int stage = int(i / kChunks), chunk = int(i % kChunks);
  const int mixer = Tape{p.hidden}.mixer(p.block);
  const Source s = stage >= mixer      ? swiglu(p, stage - mixer, chunk)
                   : p.block.token_mlp ? token_mix(p, stage, chunk)
                                       : attention(p, stage, chunk);
  uint32_t words[4];
  for (int j = 0; j < 4; j++) {
    words[j] = 0;
    for (int e = 0; e < 2; e++) {
      const int column = s.column + 2 * j + e;
      if (s.row < 0 || column >= s.columns) continue;
      words[j] |= uint32_t(s.matrix_g[size_t(s.row) * s.columns + column]) << (16 * e);
    }
  }
  reinterpret_cast<uint4*>(p.tape_g)[i] = make_uint4(words[0], words[1], words[2], words[3]);
}

static int64_t tape_bytes(const RxPack& p) {
  int64_t stages = 0;
  for (int i = 0; i < p.num_blocks; i++) stages += Tape{p.hidden}.block(p.blocks[i]);
  return stages * kStage;
}

static int launch(const RxPack& pack, void* stream) {
  auto in = [](const void* x) { return static_cast<const rx::bf16*>(x); };
  auto* tape = static_cast<rx::bf16*>(pack.tape);
  for (int i = 0; i < pack.num_blocks; i++) {
    const void* const* w = pack.weights + 4 * i;
    const int stages = Tape{pack.hidden}.block(pack.blocks[i]);
    const Params p{pack.blocks[i], pack.hidden, pack.tokens, stages, in(w[0]),
                   in(w[1]),       in(w[2]),    in(w[3]),    tape};
    const rx::LaunchShape s{"cluster_sm90a pack", dim3(unsigned(stages * kChunks / kThreads)),
                            dim3(kThreads)};
    if (int e = rx::launch(s, stream, kernel, p)) return e;
    tape += size_t(stages) * kStage / 2;
  }
  return 0;
}

}  // namespace cluster_sm90a::pack

extern "C" int64_t rx_cluster_sm90a_tape_bytes(const RxPack* p) {
  return cluster_sm90a::pack::tape_bytes(*p);
}

extern "C" int rx_cluster_sm90a_pack(const RxPack* p, void* stream) {
  return cluster_sm90a::pack::launch(*p, stream);
}
