"""Keys of padding, which no token sees: against PyTorch's attention, and against shorter runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import recurx
from recurx import BlockSpec, InvalidArgument, Net, NetSpec, Schedule, Step, backends, reference
from recurx.operands import Beside
from recurx.specs import ATTENTION, NO_MIXER
from tests.variants import TOKENS, WIDTH, net_of, tables_of

TWICE = Schedule((Step("L", "z", ("z",), ("x",)),) * 2)
_PADDED = dict(kind=ATTENTION, hidden=WIDTH, inner=48, num_heads=4, key_padding=True)
SPECS = {
    "TRM's": BlockSpec(**_PADDED),
    "causal": BlockSpec(**_PADDED, mask="causal"),
    "grouped heads, gate": BlockSpec(**_PADDED, kv_heads=2, attn_gate=True, placement="pre"),
    "rows": BlockSpec(**_PADDED, axial=(3, 4, 1)),
    "columns": BlockSpec(**_PADDED, axial=(3, 4, 0)),
}
VISIBLE = (12, 7, 1)


def padded(*visible: int) -> Tensor:
    """[B, T], true from each sample's number of tokens on."""
    return torch.arange(TOKENS) >= torch.tensor(visible)[:, None]


def run(spec: BlockSpec, mask: Tensor, save: str = "all", dtype=torch.float64, **how):
    """Two blocks in two calls: the result, and the gradients of x and the weights."""
    net = net_of(spec, spec, dtype=dtype)
    x, z = torch.randn(2, len(mask), TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *net.weights)]
    out = recurx.recurse(
        TWICE, {"L": Net(net.spec, leaves[1:])}, leaves[0], {"z": z.to(dtype)}, key_mask=mask,
        cos_sin=tables_of(spec), save=save, **how,
    )["z"]  # fmt: skip
    grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    return out.detach(), grads


def test_pytorchs_attention() -> None:
    spec = SPECS["TRM's"]
    qkv, o, *_ = net_of(spec, dtype=torch.float64).weights
    h = torch.randn(3, TOKENS, WIDTH, dtype=torch.float64)
    mask = torch.rand(3, TOKENS) < 0.5
    mask[:, 3] = False
    q, k, v = (h @ qkv.T).view(3, TOKENS, 12, 8).transpose(1, 2).split(4, dim=1)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=~mask[:, None, None])
    want = mixed.transpose(1, 2).flatten(2) @ o.T
    w = {"qkv": qkv, "o": o}
    torch.testing.assert_close(reference.variant_attention(h, spec, w, None, mask), want)
    layer = torch.nn.MultiheadAttention(WIDTH, 4, bias=False, batch_first=True).double()
    with torch.no_grad():
        layer.in_proj_weight.copy_(qkv)
        layer.out_proj.weight.copy_(o)
    torch.testing.assert_close(layer(h, h, h, key_padding_mask=mask)[0], want)


@pytest.mark.parametrize("name", ["TRM's", "causal", "grouped heads, gate"])
def test_visible_tokens_are_those_of_a_shorter_run(name: str) -> None:
    spec = SPECS[name]
    padding, _ = run(spec, padded(*VISIBLE))
    plain = dataclasses.replace(spec, key_padding=False)
    net = net_of(plain, plain, dtype=torch.float64)
    x, z = torch.randn(2, 3, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    for sample, tokens in enumerate(VISIBLE):
        alone = slice(sample, sample + 1), slice(tokens)
        tables = tuple(table[:tokens] for table in tables_of(spec))
        short = recurx.recurse(TWICE, {"L": net}, x[alone], {"z": z[alone]}, cos_sin=tables)["z"]
        torch.testing.assert_close(padding[alone], short)


def test_lines_of_a_grid_have_their_own_keys() -> None:
    """A key that is masked moves nobody, whatever it holds; the others move their lines."""
    for name, line in (("rows", [4, 5, 6, 7]), ("columns", [1, 5, 9])):
        spec = SPECS[name]
        weights = net_of(spec).weights
        h = torch.randn(1, TOKENS, WIDTH)
        other = h + F.one_hot(torch.tensor(5), TOKENS)[:, None]
        for masked in (True, False):
            mask = (torch.arange(TOKENS) == 5)[None] & masked
            both = (
                reference.block(t, spec, weights, None, Beside(key_mask=mask)) for t in (h, other)
            )
            first, second = both
            moved = ((first - second).abs().amax((0, 2)) > 1e-6).nonzero().flatten().tolist()
            assert moved == ([5] if masked else line)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPECS)
def test_a_token_that_sees_nobody_mixes_zeros_in(name: str, dtype: torch.dtype) -> None:
    """Not NaN, neither in what leaves nor in gradients, of any way to keep them."""
    mask = padded(12, 7, 0)  # of grids too: lines without a visible key
    want, wanted = run(SPECS[name], mask, dtype=dtype)
    assert want.isfinite().all()
    for save in ("all", "block", "states"):
        out, grads = run(SPECS[name], mask, save, dtype)
        assert torch.equal(out, want)
        for got, grad in zip(grads, wanted, strict=True):
            assert got.isfinite().all()
            assert (got - grad).norm() <= grad.norm() * (0.05 if dtype is torch.bfloat16 else 1e-4)
    spec = dataclasses.replace(SPECS["TRM's"], placement="pre")
    weights = net_of(spec, dtype=torch.float64).weights
    h = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    unseen = torch.ones(1, TOKENS, dtype=torch.bool)
    out = reference.block(h, spec, weights, None, Beside(key_mask=unseen))
    rest = BlockSpec(NO_MIXER, WIDTH, 48, placement="pre")
    torch.testing.assert_close(out, reference.block(h, rest, weights[2:], None))


def test_finite_differences() -> None:
    spec = SPECS["causal"]
    net, mask = net_of(spec, dtype=torch.float64), padded(12, 7, 0)
    z = torch.randn(3, TOKENS, WIDTH, dtype=torch.float64)

    def answer(x: Tensor, *weights: Tensor) -> Tensor:
        nets = {"L": Net(net.spec, weights)}
        return recurx.recurse(TWICE, nets, x, {"z": z}, key_mask=mask, save="states")["z"]

    leaves = [t.requires_grad_() for t in (torch.randn_like(z), *net.weights)]
    assert torch.autograd.gradcheck(answer, leaves, fast_mode=True)


def test_a_mask_the_wrong_way_round_bites(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.variant_attention
    monkeypatch.setattr(
        reference, "variant_attention",
        lambda h, spec, w, rope, mask: right(h, spec, w, rope, ~mask),
    )  # fmt: skip
    with pytest.raises(AssertionError):
        test_visible_tokens_are_those_of_a_shorter_run("TRM's")
    with pytest.raises(AssertionError):
        test_lines_of_a_grid_have_their_own_keys()


def test_who_runs_it_and_what_is_refused() -> None:
    net = net_of(SPECS["TRM's"])
    x, mask = torch.randn(3, TOKENS, WIDTH), padded(*VISIBLE)
    for wrong in (None, mask.float(), mask[:2], mask[:, 1:], [[True] * TOKENS] * 3):
        with pytest.raises(InvalidArgument, match="key_mask"):
            recurx.recurse(TWICE, {"L": net}, x, {"z": x}, key_mask=wrong)
    plain = net_of(BlockSpec(ATTENTION, WIDTH, 48, 4))
    with pytest.raises(InvalidArgument, match="key_padding"):
        recurx.recurse(TWICE, {"L": plain}, x, {"z": x}, key_mask=mask)
    with pytest.raises(InvalidArgument, match="key_padding"):
        BlockSpec(NO_MIXER, WIDTH, 48, key_padding=True)
    nets = (("L", NetSpec((SPECS["TRM's"],))),)
    problem = recurx.Problem(TWICE, nets, 3, TOKENS, WIDTH, torch.float32, "cpu")
    for name in backends.ORDER:
        said = backends.unknown_fields(backends.get(name), problem)
        assert (said is None) == (name in ("eager", "cpu", "triton"))
        assert said is None or "does not run key_padding=True" in said


def test_the_second_call_reads_its_own_mask() -> None:
    """It goes by what was checked at the first."""
    net = net_of(SPECS["TRM's"])
    x = torch.randn(3, TOKENS, WIDTH)
    for visible in (VISIBLE, (3, 12, 5)):
        mask = padded(*visible).t().contiguous().t()
        want = reference.run(TWICE, {"L": net}, x, {"z": x}, key_mask=mask)["z"]
        got = recurx.recurse(TWICE, {"L": net}, x, {"z": x}, key_mask=mask)["z"]
        torch.testing.assert_close(got, want)
