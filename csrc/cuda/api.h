/* api.h - the GPU kernels as plain C, so that bindings need no CUDA header and nvcc sees no Python.
 *
 * An entry that launches something returns 0 or a cudaError_t (kRxEmulatorError when the emulator
 * reports a fault); rx_cuda_last_error() says what happened. Pointers are device pointers; `stream`
 * is a cudaStream_t as an integer-sized handle. Shapes and alignment are checked by the caller (see
 * each struct).
 */
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { kRxEmulatorError = 100001, kRxInvalidShape = 100002 };

const char* rx_cuda_last_error(void);     /* of this thread; "" after a success */
const char* rx_cuda_error_name(int code); /* "cudaErrorNoDevice", ... */
/* Devices that can run a kernel of this library; 0 and a reason in last_error without a driver. */
int rx_cuda_device_count(int* count, int* driver_version, int* runtime_version);

/* ---- the recursion: all net calls of a schedule in one launch -------------------------------
 *
 * One call:  state[write] <- keep * state[write] + damping * net(input) + noise
 *            input = scale * sum(state) + (sum(inject))
 * Each sum goes left to right, every partial sum and product is rounded to bf16
 * (recurx/reference.py: call_input, written). States and x are bf16 [batch, tokens, hidden],
 * contiguous and 16-byte aligned. */
enum { kRxMaxStates = 8, kRxMaxReads = 8, kRxMaxNets = 2, kRxMaxBlocks = 8 };

enum { kRxSumOwn, kRxSumFormed, kRxSumKept };

/* recurx/program.py decides sum and stays, a kernel may make use of them. */
typedef struct {
  int32_t net, write, num_state, num_inject;
  int32_t sum;   /* over inject: of this call alone; formed and kept for others; kept earlier */
  int32_t stays; /* 1: the next call overwrites state[write] and reads it as its first operand
                    alone, so nobody needs a copy in global memory */
  int32_t state[kRxMaxReads], inject[kRxMaxReads]; /* indices of states; num_states means x */
  float scale, keep, damping; /* 1, 0 and 1 where a call has none of these factors */
  float noise;                /* its standard deviation; 0: none */
  int32_t number;             /* of the call in its schedule: which noise is drawn */
} RxCall;

enum { kRxSilu, kRxGelu, kRxGeluTanh, kRxRelu, kRxRelu2, kRxSigmoid, kRxActivations };

typedef struct {
  int32_t token_mlp; /* 1: token-MLP block, 0: attention block */
  int32_t inner;     /* F of the SwiGLU over hidden */
  int32_t heads;     /* attention: heads * head_dim = hidden; else 0 */
  int32_t token_inner;
  float eps;
  /* Fields of variants, which owner_sm80 alone reads; recurx/plan/cuda.py refuses them for the
     others. */
  float residual_scale; /* of what a half of the block adds to h; 1 in TRM and HRM */
  int32_t activation;   /* of the MLPs: kRxSilu in TRM and HRM */
  int32_t kv_heads;     /* attention: they divide heads; 0: as many */
  int32_t biases;       /* bit k: matrix k of the block has a bias, as RxPack counts them */
} RxBlock;

typedef struct {
  int32_t num_blocks;
  RxBlock blocks[kRxMaxBlocks];
  const void* tape; /* packed weights, device, 128-byte aligned */
} RxNet;

/* What the in-kernel timeline writes, where it is compiled in (RX_TIMELINE): one record a phase. */
typedef struct {
  int32_t call, block, phase, sample; /* sample: the first one that the owner works on */
  uint64_t start_ns, end_ns;          /* end_ns 0: the record was not written */
} RxEvent;

typedef struct {
  int32_t batch, tokens, hidden, num_states, num_nets, num_calls;
  const RxCall* calls; /* device memory: the calls to run, in order */
  RxNet nets[kRxMaxNets];
  const void* x;
  const float *cos, *sin; /* [tokens, head_dim] fp32, 16-byte aligned, or both null */
  const void* states_in[kRxMaxStates];
  void* states_out[kRxMaxStates]; /* every state is written, also one that no call writes;
                                     no output may alias an input or another output */
  void* scratch;                  /* device, 128-byte aligned; see ..._scratch_bytes() */
  int64_t scratch_bytes;
  RxEvent* timeline; /* [owners][timeline_events], zeroed; null: none is written */
  int64_t timeline_events;
  const uint64_t* seed; /* [2] of the noise of calls, device memory: the seed, and the number of
                           the first sample; null: no call has any */
} RxRecursion;

/* The weights of one net to pack: bf16, [out, in] contiguous, four a block in the order of
 * recurx/nets.py (qkv, o, gate_up, down; t_gate_up, t_down, gate_up, down). */
typedef struct {
  int32_t hidden, tokens, num_blocks;
  RxBlock blocks[kRxMaxBlocks];
  const void* weights[4 * kRxMaxBlocks];
  const void* biases[4 * kRxMaxBlocks]; /* bf16 [out] of each weight; null: it has none */
  void* tape;
} RxPack;

/* ---- three families of kernel, a folder each: owner_sm80, grid_sm80, cluster_sm90a ------------
 *
 * A family's plan says how its launch is cut; its tape is the weights of a net in its own order:
 *
 *   rx_FAMILY_run(recursion, plan, stream)      every call of the recursion in one launch
 *   rx_FAMILY_scratch_bytes(recursion, plan)    what the recursion's scratch must hold; 0: none
 *   rx_FAMILY_tape_bytes(pack)                  size of a tape
 *   rx_FAMILY_pack(pack, stream)                writes it
 *
 * grid_sm80 has no pack: recurx/backends/cuda_grid.py writes that tape (grid_sm80/pack.cu). */

/* owner_sm80: one CTA owns `samples` samples and runs every call on them (sm_80 and later).
 * hidden 64, 128, 256, 384 or 512; head_dim 32, 64 or 128; samples * ceil(tokens / 16) <= tiles. */
typedef struct {
  int32_t owners;     /* CTAs; each takes the next group of samples until none is left */
  int32_t samples;    /* samples a group, stacked in rows */
  int32_t tiles;      /* row tiles of 16 that the kernel is compiled for */
  int32_t in_scratch; /* 1: h in the owner's scratch, where shared memory is too small for it */
} RxOwnerPlan;

int rx_owner_sm80_run(const RxRecursion* r, const RxOwnerPlan* plan, void* stream);
int64_t rx_owner_sm80_scratch_bytes(const RxRecursion* r, const RxOwnerPlan* plan);
int64_t rx_owner_sm80_tape_bytes(const RxPack* pack);
int rx_owner_sm80_pack(const RxPack* pack, void* stream);
/* Shared memory of a CTA: recurx/plan/cuda_owner.py reckons the same. */
int64_t rx_owner_sm80_shared_bytes(const RxRecursion* r, const RxOwnerPlan* plan);

/* For rx_FAMILY_solve: supervision steps, heads and halting inside the owner or the cluster kernel
 * (solve.cuh). The recursion's batch is the number of slots: owners * samples of an owner plan, a
 * multiple of a cluster's samples; its states_in are its states_out, slot buffers that
 * are zero at first, and its x is slot_x.
 * Entry e of the queue is rollout e % rollouts of puzzle e / rollouts. Head weights are bf16 and
 * contiguous; all pointers are device memory. */
typedef struct {
  int32_t entries, rollouts; /* entries = puzzles * rollouts; 0: nothing is solved */
  int32_t max_steps;
  int32_t halt;   /* 0: never; 1: q_halt > halt_above; 2: q_halt > q_continue + halt_above */
  int32_t output; /* index of the state that the heads read */
  int32_t prefix; /* tokens before the answer */
  int32_t vocab;
  float halt_above, sigma;
  uint64_t seed;
  const void* x;                         /* [puzzles, tokens, hidden] bf16 */
  const void* start[kRxMaxStates];       /* [tokens, hidden] bf16: each state of a fresh sample */
  void* slot_x;                          /* [slots, tokens, hidden] bf16 */
  const void *lm_head, *q_head, *q_bias; /* [vocab, hidden], [2, hidden], [2]: q_halt, q_continue */
  uint32_t* next;                        /* 0 at first: the first entry that nobody took */
  int32_t *predictions, *steps, *halted; /* [entries, tokens - prefix], [entries], [entries] */
  float* q;                              /* [entries]: q_halt at the last step */
  void* logits;                          /* [entries, tokens - prefix, vocab] bf16, or null */
  int32_t* trace; /* [max_steps, entries, tokens - prefix], or null; what an entry did not reach is
                     not written */
} RxSolve;

int rx_owner_sm80_solve(const RxRecursion* r, const RxOwnerPlan* plan, const RxSolve* solve,
                        void* stream);

/* grid_sm80: every call is spread over all CTAs of a cooperative launch (sm_80 and later), for a
 * few samples. tokens <= 128; hidden a multiple of 32 up to 512; head_dim a multiple of 16 up to
 * 128. Arrays: mixer in (qkv, or gate_up over tokens), mixer out, gate_up, down. */
typedef struct {
  int32_t ctas;          /* all run at once: at most one for each multiprocessor */
  int32_t row_groups[4]; /* row tiles are dealt to so many groups of CTAs, each with all of the
                            weight in its shared memory */
  int32_t k_splits[4];   /* warps that share the depth of a row tile: 1, 2, 4 or 8 */
  int32_t shared_bytes;  /* of a CTA; weights that do not fit are read from L2 in each call */
  int32_t fp8;           /* 1: tapes hold e4m3 with a scale for each output channel */
  int32_t cluster;       /* CTAs that get their rows at once: 1, or on Hopper 2, 4 or 8 */
} RxGridPlan;

int rx_grid_sm80_run(const RxRecursion* r, const RxGridPlan* plan, void* stream);
int64_t rx_grid_sm80_scratch_bytes(const RxRecursion* r, const RxGridPlan* plan);
int64_t rx_grid_sm80_tape_bytes(const RxPack* pack, int fp8);
/* Shared memory of a CTA before its first weight: recurx/plan/cuda_grid.py reckons the same. */
int64_t rx_grid_sm80_fixed_shared_bytes(const RxRecursion* r, const RxGridPlan* plan);

/* cluster_sm90a: two CTAs a sample, or two samples of up to 64 tokens where no block mixes them;
 * weights are multicast to a cluster (Hopper alone).
 * hidden 128, 256, 384 or 512; heads 64 wide; 1 to 128 tokens. A tape is 16-byte aligned. */
typedef struct {
  int32_t cluster; /* CTAs that share a tape: 2, 4 or 8 */
} RxClusterPlan;

int rx_cluster_sm90a_run(const RxRecursion* r, const RxClusterPlan* plan, void* stream);
int rx_cluster_sm90a_solve(const RxRecursion* r, const RxClusterPlan* plan, const RxSolve* solve,
                           void* stream);
int64_t rx_cluster_sm90a_scratch_bytes(const RxRecursion* r, const RxClusterPlan* plan);
int64_t rx_cluster_sm90a_tape_bytes(const RxPack* pack);
int rx_cluster_sm90a_pack(const RxPack* pack, void* stream);
/* Clusters of so many CTAs that the current device runs at once; 0 where nobody knows. */
int rx_cluster_sm90a_places(int32_t hidden, int32_t cluster, int32_t* count);

/* ---- the build ------------------------------------------------------------------------------
 *
 * For callers that mirror the structs, sizeof of: RxCall, RxBlock, RxNet, RxEvent, RxRecursion,
 * RxPack, RxSolve, RxOwnerPlan, RxGridPlan, RxClusterPlan. */
enum { kRxStructs = 10 };
void rx_struct_sizes(int32_t sizes[kRxStructs]);
int rx_timeline_compiled(void); /* 1: kernels write RxRecursion.timeline */

#ifdef __cplusplus
}
#endif
