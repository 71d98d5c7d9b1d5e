"""Bugs planted in the owner kernel (owner_sm80/), all in one build as those of bugs_cluster.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from recurx import Schedule, Step, reference
from recurx.errors import CudaError
from recurx.nets import ATTENTION, TOKEN_MLP
from tests.factories import make_inputs, make_net, rope, rounded, wide
from tests.kernels.compare import assert_as_exact

from . import asleep
from .build import source_lines
from .owner import EmulatedCuda, emulate

RACE = r"race: (read|write) after (read|write)|uninitialised shared memory"
WRONG = r"relative error"

ONE_CALL = Schedule((Step("L", "z_L", ("z_L",), ("z_H", "x")),))
HRM = Schedule.hrm(1, 1)
KEPT = Schedule(
    (
        Step("L", "a", ("a",), ("b", "x")),
        Step("L", "b", ("b",), ("b", "x")),
        Step("L", "a", ("a",), ("b", "x")),
    )
)
TWICE = Schedule((Step("L", "a", ("a",), ("x",)), Step("L", "a", ("a",), ("a",))))


@dataclass(frozen=True)
class OwnerBug:
    """What is reported matches `found`, under every seed."""

    name: str
    file: str
    old: str
    new: str
    found: str
    kind: str = ATTENTION
    schedule: Schedule = ONE_CALL
    tokens: int = 17
    hidden: int = 64
    heads: int = 2
    blocks: int = 1

    def outcome(self, cuda: EmulatedCuda, seed: int) -> str:
        """'right', or what was found."""
        cuda.emulated.configure(seed=seed)
        size = dict(tokens=self.tokens, hidden=self.hidden, heads=self.heads)
        nets = {
            name: make_net(self.kind, **size, blocks=self.blocks, seed=number)
            for number, name in enumerate(self.schedule.nets)
        }
        x, carry = make_inputs(
            self.schedule, batch=2, tokens=self.tokens, hidden=self.hidden, dtype=torch.bfloat16
        )
        exact_nets = {n: rounded(net, torch.bfloat16, torch.float64) for n, net in nets.items()}
        tables = rope(**size)
        exact = reference.run(self.schedule, exact_nets, x.double(), wide(carry), tables)
        plain = reference.run(self.schedule, nets, x, carry, tables)
        try:
            got = cuda(self.schedule, nets, x, carry, tables)
        except CudaError as error:
            return source_lines(str(error))
        try:
            for name in self.schedule.states:
                # A few calls are not yet chaotic, but small samples scatter.
                ratio = 1.25 if len(self.schedule) == 1 else 2
                assert_as_exact(got[name], plain[name], exact[name], ratio)
        except AssertionError as error:
            return str(error)
        return "right"


RING, ATTEND, STATES = "owner_sm80/ring.cuh", "owner_sm80/attention.cuh", "owner_sm80/states.cuh"
TOKENS, TOP = "owner_sm80/token_mlp.cuh", "owner_sm80/kernel.cuh"
OPERAND = "    __syncthreads();  // the operand is complete"

BUGS = [
    # ---- synchronisation
    OwnerBug(
        "wait leaves one group too many in flight",
        RING,
        "    rx::cp_async_wait<kStages - 2>();\n    __syncwarp",
        "    if (BUG)\n      rx::cp_async_wait<kStages - 1>();\n    else\n"
        "      rx::cp_async_wait<kStages - 2>();\n    __syncwarp",
        RACE,
    ),
    OwnerBug(
        "no __syncwarp where the split over lanes changes",  # from V's half fragments to O's whole
        RING,
        "    __syncwarp();",
        "    if (!BUG) __syncwarp();",
        RACE,
        hidden=256,
        heads=4,
    ),
    OwnerBug(
        "copy into the slot that is read",
        RING,
        "fetch(now == 0 ? kStages - 1 : now - 1);",
        "fetch(BUG ? now : now == 0 ? kStages - 1 : now - 1);",
        RACE,
    ),
    OwnerBug(
        "shared weights without a barrier",
        RING,
        "    __syncthreads();  // the step is there",
        "    if (!BUG) __syncthreads();  // the step is there",
        RACE,
        TOKEN_MLP,
    ),
    OwnerBug(
        "no barrier when the shared weights end",
        RING,
        "release_shared() { __syncthreads(); }",
        "release_shared() {\n    if (!BUG) __syncthreads();\n  }",
        RACE,
        TOKEN_MLP,
    ),
    OwnerBug(
        "K and V are overwritten while they are read",
        ATTEND,
        "    __syncthreads();\n    const Part part",
        "    if (!BUG) __syncthreads();\n    const Part part",
        RACE,
        hidden=128,
    ),
    OwnerBug(
        "attention does not wait for K and V",
        ATTEND,
        "  __syncthreads();\n}\n\n// Scores",
        "  if (!BUG) __syncthreads();\n}\n\n// Scores",
        RACE,
    ),
    OwnerBug(
        "a product does not wait for its operand",
        TOP,
        OPERAND,
        OPERAND.replace("__", "if (!BUG) __", 1),
        RACE,
    ),
    OwnerBug(
        "scales are formed before all sums are there",
        "owner_sm80/residual.cuh",
        "  __syncthreads();\n  const int row",
        "  if (!BUG) __syncthreads();\n  const int row",
        RACE,
    ),
    OwnerBug(
        "scales are reset while they are read",
        STATES,
        "RX_DEVICE void reset_scales(Owner<P>& o) {\n  __syncthreads();",
        "RX_DEVICE void reset_scales(Owner<P>& o) {\n  if (!BUG) __syncthreads();",
        RACE,
        schedule=TWICE,
    ),
    OwnerBug(
        "padding rows that are not stored are stored",
        "owner_sm80/owner.cuh",
        "(p.at.row_blocks & 1));",
        "(p.at.row_blocks & 1) && !BUG);",
        RACE,
    ),
    # ---- arithmetic and data
    OwnerBug(
        "gate and up swapped",
        "owner_sm80/mlp.cuh",
        "*gate = &acc[i][j][half * 2], *up = &acc[i][j + 2][half * 2];",
        "*gate = &acc[i][j + (BUG ? 2 : 0)][half * 2], *up = &acc[i][j + (BUG ? 0 : 2)][half * 2];",
        WRONG,
    ),
    OwnerBug(
        "rope dropped",
        ATTEND,
        "if (r.cos && token < r.tokens) {",
        "if (!BUG && r.cos && token < r.tokens) {",
        WRONG,
    ),
    OwnerBug(
        "mask off by one",
        ATTEND,
        "(e & 1) >= o.p.r.tokens)",
        "(e & 1) >= o.p.r.tokens + BUG)",
        WRONG,
        tokens=5,
    ),
    OwnerBug(
        "padding rows are not zero",
        STATES,
        "uint4 x = make_uint4(0, 0, 0, 0);",
        "uint4 x = make_uint4(BUG ? 0x7fc07fc0u : 0, 0, 0, 0);",
        WRONG,
    ),
    OwnerBug(
        "norm over a column too many",
        "owner_sm80/residual.cuh",
        "(1.f / P::kHidden)",
        "(1.f / (P::kHidden + BUG))",
        WRONG,
    ),
    OwnerBug(
        "token norm counts padding",
        TOKENS,
        "/ float(o.p.r.tokens)",
        "/ float(BUG ? o.p.at.sample_tiles * 16 : o.p.r.tokens)",
        WRONG,
        TOKEN_MLP,
    ),
    OwnerBug(
        "row scales forgotten before tokens are mixed",
        TOKENS,
        "  if constexpr (!P::kInScratch) apply_scales(o);",
        "  if constexpr (!P::kInScratch)\n    if (!BUG) apply_scales(o);",
        WRONG,
        TOKEN_MLP,
        blocks=2,
    ),
    OwnerBug(
        "wrong ring step",
        RING,
        "from_g += s.warp_bytes * s.warps;",
        "from_g += BUG ? 4096 : s.warp_bytes * s.warps;",
        WRONG,
    ),
    OwnerBug(
        "weights of the first net for all calls",
        RING,
        "const int net = p.r.calls[k].net;",
        "const int net = p.r.calls[BUG ? 0 : k].net;",
        WRONG,
        schedule=HRM,
    ),
    OwnerBug(
        "stale sum: taken as kept by a call that forms its own",
        STATES,
        "was_kept = call.sum == kRxSumKept,",
        "was_kept = BUG ? k > 0 : call.sum == kRxSumKept,",
        WRONG,
        schedule=KEPT,
    ),
    OwnerBug(
        "a state that is read again is not stored",
        TOP,
        "if (r.calls[k].stays) continue;",
        "if (BUG ? k + 1 < r.num_calls && r.calls[k + 1].write == r.calls[k].write\n"
        "            : r.calls[k].stays)\n      continue;",
        WRONG,
        schedule=TWICE,
    ),
    OwnerBug(
        "the resident state loses its scale",
        STATES,
        "        x = rx::scale_rounded(load_vector(o, row, at, column), o.scales()[row]);",
        "        x = rx::scale_rounded(load_vector(o, row, at, column),\n"
        "                              BUG ? 1.f : o.scales()[row]);",
        WRONG,
        schedule=TWICE,
    ),
]


def plant_all(folder: Path) -> EmulatedCuda:
    """Builds a copy of the sources with every bug asleep, for each width that shows one."""
    asleep.plant(folder, BUGS, "owner_sm80")
    plans = tuple((hidden, 2) for hidden in sorted({bug.hidden for bug in BUGS}))
    return emulate(plans, folder=folder, flags=("-O1", "-g0"))


def wake(cuda: EmulatedCuda, bug: OwnerBug | None) -> None:
    asleep.wake(cuda.emulated.library, BUGS, bug)
