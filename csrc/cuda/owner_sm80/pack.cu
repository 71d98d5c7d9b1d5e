// pack.cu - the weights of a net as the tape that the owner kernel reads front to back.
//
// A fragment is 512 bytes: for lane l two column tiles n = l / 4 and n + 8, each with the pairs of
// k = 2 * (l % 4) and k + 8, the B operand of mma.m16n8k16. A step holds the fragments of all warps
// for 16 of k; which columns a warp has is the stage's. Columns and k beyond the matrix are zeros.
#include "../rx/launch.cuh"
#include "layout.cuh"

namespace owner_sm80::pack {

enum Stage : int { kTokens, kQkv, kOut, kGateUp, kDown };

// A stage's two weights at most: t_gate_up and t_down share a segment.
struct Job {
  const bf16 *first_g, *second_g;
  char* tape_g;
  int stage, words;  // of the segment, 32 bits each
  int warp_words, warps;
  int hidden, tokens, inner, token_inner, head_dim;
  int group;  // heads that share a K/V head
  // biases alone
  BiasTable table;
  int matrix;  // as RxPack counts
};

// Where two neighbouring values come from: row n, columns k and k + 1 of a [rows, columns] matrix.
struct Source {
  const bf16* matrix_g;
  int n, k, rows, columns;
};

// Position within a step: word -> warp, fragment, lane, register.
struct Place {
  int step, warp, fragment, lane, reg;
};
RX_DEVICE Place place_of(const Job& j, int word) {
  constexpr int kFragmentWords = kFragment / 4;
  const int in_step = word % (j.warp_words * j.warps), in_warp = in_step % j.warp_words;
  const int fragment = in_warp / kFragmentWords, rest = in_warp % kFragmentWords;
  // A fragment that is cut in half (768 bytes a warp) holds one column tile: two registers a lane.
  const int registers = fragment == 1 && j.warp_words == 192 ? 2 : 4;
  return {word / (j.warp_words * j.warps), in_step / j.warp_words, fragment, rest / registers,
          rest % registers};
}

RX_DEVICE Source token_source(const Job& j, const Place& at) {
  const int chunk = at.step / kTokenSteps, sub = at.step % kTokenSteps;
  const int n8 = (at.reg >> 1) * 8 + (at.lane >> 2), k = (at.reg & 1) * 8 + (at.lane & 3) * 2;
  if (sub < 2) {  // fragment 0 gate, 1 up, of tokens 16 * warp
    const int unit = chunk * kTokenChunk + sub * 16 + n8;
    const int n = unit < j.token_inner ? at.fragment * j.token_inner + unit : 2 * j.token_inner;
    return {j.first_g, n, at.warp * 16 + k, 2 * j.token_inner, j.tokens};
  }
  const int unit = chunk * kTokenChunk + at.fragment * 16 + k;  // down of tokens 16 * warp
  return {j.second_g, at.warp * 16 + n8, unit, j.tokens, j.token_inner};
}

RX_DEVICE Source qkv_source(const Job& j, const Place& at) {
  const int steps = j.hidden / 16, row = at.lane >> 2, tile = at.reg >> 1;
  const int half = j.head_dim / 16;  // column tiles between a rotated pair
  int part, block, unit, columns;
  if (j.head_dim == 128) {  // passes Q, K, V: tiles warp and warp + 8
    columns = 128, unit = at.step / (3 * steps), part = at.step / steps % 3;
    block = at.warp + tile * 8;
  } else {
    columns = 64, unit = at.step / steps;
    if (at.fragment == 0) {
      const int pair = at.warp & 3;
      part = at.warp >> 2, block = pair / half * 2 * half + pair % half + tile * half;
    } else {
      part = 2, block = at.warp;
    }
  }
  const int k = at.step % steps * 16 + (at.reg & 1) * 8 + (at.lane & 3) * 2;
  int n = unit * columns + block * 8 + row;
  if (part) {  // K or V of the head's group
    const int head = n / j.head_dim, width = j.hidden / j.group;
    n = j.hidden + (part - 1) * width + head / j.group * j.head_dim + n % j.head_dim;
  }
  return {j.first_g, n, k, j.hidden + 2 * (j.hidden / j.group), j.hidden};
}

RX_DEVICE Source gate_up_source(const Job& j, const Place& at) {
  const int steps = j.hidden / 16;
  const int unit =
      at.step / steps * kMiddleChunk + at.warp * 16 + (at.reg >> 1) * 8 + (at.lane >> 2);
  const int n = unit < j.inner ? at.fragment * j.inner + unit : 2 * j.inner;
  const int k = at.step % steps * 16 + (at.reg & 1) * 8 + (at.lane & 3) * 2;
  return {j.first_g, n, k, 2 * j.inner, j.hidden};
}

// O and down: [hidden, columns].
RX_DEVICE Source out_source(const Job& j, const Place& at, int columns, int steps) {
  const int warp_columns = j.warp_words * 4 / 32;
  const int n = (at.step / steps * kWarps + at.warp) * warp_columns + at.fragment * 16 +
                (at.reg >> 1) * 8 + (at.lane >> 2);
  const int k = at.step % steps * 16 + (at.reg & 1) * 8 + (at.lane & 3) * 2;
  return {j.first_g, n, k, j.hidden, columns};
}

RX_DEVICE Source source_of(const Job& j, const Place& at) {
  switch (j.stage) {
    case kTokens:
      return token_source(j, at);
    case kQkv:
      return qkv_source(j, at);
    case kGateUp:
      return gate_up_source(j, at);
    case kOut:
      return out_source(j, at, j.hidden, j.hidden / 16);
    default:
      return out_source(j, at, j.inner, rx::round_up(j.inner, kMiddleChunk) / 16);
  }
}

constexpr int kThreads = 256;

__global__ void kernel(const Job j) {
  const int word = int(blockIdx.x) * kThreads + int(threadIdx.x);
  if (word >= j.words) return;
  const Source s = source_of(j, place_of(j, word));
  auto value = [&](int k) {
    return uint32_t(s.n < s.rows && k < s.columns ? s.matrix_g[size_t(s.n) * s.columns + k] : 0);
  };
  reinterpret_cast<uint32_t*>(j.tape_g)[word] = value(s.k) | value(s.k + 1) << 16;
}

// One of a bias table's values a thread: that of the row which the weight in its place comes from.
__global__ void bias_kernel(const Job j) {
  const BiasTable t = j.table;
  const int value = int(blockIdx.x) * kThreads + int(threadIdx.x);
  if (value >= j.words) return;
  const int column = value & 7, tile = value / 8 % t.tiles, warp = value / 8 / t.tiles % t.warps;
  const int pass = value / 8 / t.tiles / t.warps;
  int step = pass * ((j.stage == kDown ? rx::round_up(j.inner, kMiddleChunk) : j.hidden) / 16);
  if (j.stage == kTokens) step = j.matrix ? kTokenSteps - 1 : pass / 2 * kTokenSteps + pass % 2;
  const Source s = source_of(j, {step, warp, tile / 2, column * 4, tile % 2 * 2});
  reinterpret_cast<uint32_t*>(j.tape_g)[value] = s.n < s.rows ? uint32_t(s.matrix_g[s.n]) << 16 : 0;
}

static int start(void (*run)(const Job), const Job& job, void* stream) {
  const rx::LaunchShape shape{"owner_sm80 pack", dim3(unsigned(ceil_div(job.words, kThreads))),
                              dim3(kThreads)};
  return rx::launch(shape, stream, run, job);
}

static int launch(const RxPack& p, void* stream) {
  char* tape_g = static_cast<char*>(p.tape);
  auto job_of = [&](const RxBlock& b, const void* first, const void* second, int stage) {
    Job job{};
    job.first_g = static_cast<const bf16*>(first), job.second_g = static_cast<const bf16*>(second);
    job.tape_g = tape_g, job.stage = stage;
    job.hidden = p.hidden, job.tokens = p.tokens;
    job.inner = b.inner, job.token_inner = b.token_inner;
    job.head_dim = b.heads ? p.hidden / b.heads : 0;
    job.group = b.kv_heads ? b.heads / b.kv_heads : 1;
    return job;
  };
  for (int i = 0; i < p.num_blocks; i++) {
    const RxBlock& b = p.blocks[i];
    const void* const* weights = p.weights + 4 * i;
    Segment segments[4];
    const int count = block_segments(b, p.hidden, p.tokens, 1, segments);
    for (int s = 0; s < count; s++) {
      // Weights in the order of RxPack: a stage is one of them, the token MLP the first two.
      const int k = b.token_mlp && s ? s + 1 : s;
      Job job = job_of(b, weights[k], weights[1], b.token_mlp && !s ? kTokens : kQkv + k);
      job.words = int(segment_bytes(segments[s]) / 4);
      job.warp_words = segments[s].warp_bytes / 4, job.warps = segments[s].warps;
      if (int e = start(kernel, job, stream)) return e;
      tape_g += segment_bytes(segments[s]);
    }
  }
  for (int i = 0; i < p.num_blocks; i++) {
    const RxBlock& b = p.blocks[i];
    BiasTable tables[4];
    bias_tables(b, p.hidden, p.tokens, tables);
    for (int k = 0; k < 4; k++) {
      const void* bias = p.biases[4 * i + k];
      Job job = job_of(b, bias, bias, b.token_mlp && k < 2 ? kTokens : kQkv + k);
      job.table = tables[k], job.matrix = k;
      job.warp_words = tables[k].tiles * 64;
      job.words = bias_values(tables[k]);
      if (!job.words) continue;
      if (int e = start(bias_kernel, job, stream)) return e;
      tape_g += job.words * 4;
    }
  }
  return 0;
}

}  // namespace owner_sm80::pack

extern "C" int64_t rx_owner_sm80_tape_bytes(const RxPack* p) {
  return owner_sm80::tape_bytes(p->blocks, p->num_blocks, p->hidden, p->tokens, true);
}

extern "C" int rx_owner_sm80_pack(const RxPack* p, void* stream) {
  return owner_sm80::pack::launch(*p, stream);
}
