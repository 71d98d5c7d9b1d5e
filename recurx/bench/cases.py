"""What is measured: named cases, their models and data, and the suites that bundle them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurx.errors import bad_argument

if TYPE_CHECKING:
    from torch import Tensor

    from recurx.models import RecursiveModel
    from recurx.models.config import ModelConfig

MODES = {
    "step": "inference: one supervision step, embedding and heads included",
    "train": "training: forward, loss, backward, optimiser and weight average of one step",
    "solve": "a trained net solves B puzzles: to its halting, or 16 steps where the way is fixed",
}
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
SOLVE_STEPS = 16  # what official evaluation always runs
# q at which a puzzle ends, as logit of being right: 20 to 1. Of the shipped net's answers 99 % are
# right after 16 steps, 90 % at this halt (10 steps), but 64 % at even odds (2 steps), as trained.
HALT_ABOVE = 3.0
NETS = Path(__file__).parent / "nets"


@dataclass(frozen=True)
class Case:
    """One model under test.

    Args:
        title: for tables.
        make: (configuration fields) -> its configuration.
        task, net: of a case that can solve: its puzzles, and the shipped net; None trains a few
            steps in the run, for tests.
    """

    title: str
    make: Callable[..., Any]
    task: str = ""
    net: Path | None = None


def _trm(builder: str, *arguments: Any, **fixed: Any) -> Callable[..., Any]:
    def make(**fields: Any) -> Any:
        from recurx.models import TRMConfig

        return getattr(TRMConfig, builder)(*arguments, **{**fixed, **fields})

    return make


def _hrm(**fields: Any) -> Any:
    from recurx.models import HRMConfig

    return HRMConfig.sudoku(**fields)


def _training(task: str) -> Any:
    from recurx.train import preset

    # At the published 0.1 few samples go deep, and late steps unlearn.
    return preset("tiny-mlp", task, model={"halt_exploration_prob": 0.3})


def _solver(title: str, task: str, net: Path | None = None) -> Case:
    def make(**fields: Any) -> Any:
        from recurx import tasks

        return _training(task).model_config(tasks.get(task)).replace(**fields)

    return Case(title, make, task, None if net is None else net.with_suffix(".safetensors"))


def train_net(task: str, steps: int, path: Path) -> None:
    """Train the net of a case that solves, and write it. The shipped ones were made by this.

    Ours are shipped because two machines, or two commits, train two nets, whose steps to the halt
    differ: their times to solve could not be compared.
    """
    from recurx.checkpoint import save_checkpoint
    from recurx.train import Trainer

    trainer = Trainer(_training(task))
    for _ in range(steps):
        trainer.train_step()
    save_checkpoint(path, trainer.averaged(), {"task": task, "steps": steps})


CASES: dict[str, Case] = {
    "trm-att": Case("TRM-att Sudoku, T=97, D=512, 21 calls", _trm("sudoku_att")),
    "trm-mlp": Case("TRM-mlp Sudoku, T=97, D=512, 21 calls", _trm("sudoku_mlp")),
    "arc": Case("TRM-att ARC and Maze, T=916, D=512, 15 calls", _trm("arc")),
    "hrm": Case("HRM Sudoku, T=82, D=512, two nets, 6 calls", _hrm),
    "small-64": Case("small net, T=17, D=64, 21 calls", _trm("tiny", 11, 17)),
    "small-256": Case(
        "small net, T=33, D=256, 21 calls",
        _trm("tiny", 11, 33, hidden_size=256, num_heads=4, inner_multiple=64),
    ),
    # Blocks and steps of later systems on TRM-att's sizes (docs/variants.md).
    "eqr": Case("EqR: TRM-att with damping 0.95", _trm("sudoku_att", damping=0.95)),
    "urm": Case("URM's block: SwiGLU with a convolution", _trm("sudoku_att", block="conv:2")),
    "sotaku": Case(
        "Sotaku's block: pre-LayerNorm, biases, ReLU",
        _trm(
            "sudoku_att",
            block="norm:layer,norm_weight:true,norm_bias:true,placement:pre,"
            "biases:qkv+o+gate_up+down,activation:relu,gated:false",
        ),
    ),
    "sic": Case(
        "SIC's block: norms inside of attention and MLP",
        _trm("sudoku_att", block="attn_norm:rms,inner_norm:rms,inner_norm_of:product"),
    ),
    "hrm-text": Case(
        "HRM-Text's block: pre-norm, gated attention, prefix mask",
        _trm("sudoku_att", block="placement:pre,attn_gate:true,mask:prefix,prefix:16"),
    ),
    "drops": Case(
        "TRM-att with dropout and stochastic depth, in training",
        _trm("sudoku_att", block="dropout:0.1,drop_path:0.1"),
    ),
    "sudoku-6x6": _solver(
        "6x6 Sudoku, 12 clues, shipped net, D=64", "sudoku-6x6:clues=12", NETS / "sudoku-6x6"
    ),
    # Seconds, not evidence: what the suite's own tests run.
    "toy": Case(
        "toy net, T=6, D=32, 4 calls",
        _trm("tiny", 5, 6, hidden_size=32, num_heads=2, inner_multiple=32, H_cycles=2, L_cycles=1),
    ),
    "toy-solve": _solver("4x4 Sudoku, hardly trained", "sudoku-4x4"),
}


def case(name: str) -> Case:
    """The case called `name`.

    Raises:
        InvalidArgument: unknown; the known ones are listed.
    """
    if name not in CASES:
        raise bad_argument("bench", "case", f"one of {', '.join(CASES)}", repr(name))
    return CASES[name]


def build(name: str, dtype: str, backend: str, batch: int) -> RecursiveModel:
    """The model of a case with one seed's weights: the same values in every dtype of `DTYPES`.

    Zero embeddings and a zero q head would not exercise their products; zero data runs faster on
    matrix units than real data.
    """
    import torch

    torch.manual_seed(0)
    config = case(name).make(forward_dtype=DTYPES[dtype], batch_size=batch)
    model = _model(config, backend)
    with torch.no_grad():
        if config.puzzle_emb_ndim:
            model.puzzle_emb.weights.normal_()
        model.inner.q_head.weight.normal_(std=0.02)
        for buffer, start in model.inner.named_buffers():
            if buffer.endswith("_init"):
                generator = torch.Generator().manual_seed(len(buffer))
                start.copy_(torch.randn(start.shape, generator=generator))
    return model


def build_exact(name: str, batch: int) -> RecursiveModel:
    """The same values in fp64, on eager: what rounds next to nothing."""
    # Drawn in fp64, start states would take more of the random numbers.
    model = _model(case(name).make(forward_dtype="float64", batch_size=batch), "eager")
    model.load_state_dict(build(name, "fp32", "eager", batch).state_dict())
    return model


def _model(config: ModelConfig, backend: str) -> RecursiveModel:
    from recurx.models import build_model

    return build_model(config, backend).eval()


def sample(model: RecursiveModel, batch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Seeded tokens and labels, and a seeded carry, on the CPU; the same values in every dtype."""
    import torch

    generator = torch.Generator().manual_seed(1)
    config, shape = model.config, (batch, model.config.seq_len)

    def tokens() -> Tensor:
        drawn = torch.randint(1, config.vocab_size, shape, generator=generator)
        return drawn.to(torch.int32)

    states = (batch, config.tokens, config.hidden_size)
    carry = {name: torch.randn(states, generator=generator) for name in model.inner.schedule.states}
    data = {"inputs": tokens(), "labels": tokens()}
    data["puzzle_identifiers"] = torch.zeros(batch, dtype=torch.int32)
    return data, {name: state.to(config.dtype) for name, state in carry.items()}
