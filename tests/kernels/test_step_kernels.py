"""The kernels of the training step, in the interpreter or on a GPU; cases of tests/train."""

from __future__ import annotations

import math

import pytest
import torch

from recurx.errors import InvalidArgument, RecurxError
from tests.train import cases

# The interpreter computes with numpy, which tells of the overflows that the formula expects.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


# ---- stablemax ----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("name", cases.LOGITS)
def test_stablemax(triton_device, name, dtype):
    from recurx.kernels import stablemax_cross_entropy as kernel

    logits, labels = cases.logits_and_labels(name, dtype)
    outer = torch.linspace(-1, 2, labels.numel()).view(labels.shape)
    there = [t.to(triton_device) for t in (logits, labels, outer)]
    loss = kernel.stablemax_forward(*there[:2], -100)
    assert loss.dtype == torch.float32 and (loss[0, :2] == 0).all()
    cases.assert_stablemax(loss.cpu(), logits, labels)
    grad = kernel.stablemax_backward(there[2], *there[:2], -100)
    assert (grad[0, :2] == 0).all()
    cases.assert_stablemax_grad(grad.cpu(), logits, labels, outer)


def test_stablemax_reads_slices_and_any_label_type(triton_device):
    from recurx.kernels import stablemax_cross_entropy as kernel

    logits, labels = cases.logits_and_labels("usual")
    padded = torch.cat([torch.full((6, 2, 11), 1e9), logits], 1).to(triton_device)
    part, narrow = padded[:, 2:], labels.int().to(triton_device)
    assert not part.is_contiguous()
    cases.assert_stablemax(kernel.stablemax_forward(part, narrow, -100).cpu(), logits, labels)
    flat = kernel.stablemax_forward(part.reshape(-1, 11), narrow.view(-1), -100)
    assert torch.equal(flat.view(6, 7), kernel.stablemax_forward(part, narrow, -100))
    grad = kernel.stablemax_backward(torch.ones(6, 7, device=triton_device), part, narrow, -100)
    assert grad.is_contiguous()
    cases.assert_stablemax_grad(grad.cpu(), logits, labels, torch.ones(6, 7))
    assert kernel.stablemax_forward(part[:0], narrow[:0], -100).shape == (0, 7)


# ---- AdamATan2 ----------------------------------------------------------------------------------


def run_adam(device, weights, grads, *, lr=cases.ADAM["lr"]):
    from recurx.kernels.adam_atan2 import adam_atan2
    from recurx.kernels.multi_tensor import Tables

    def zeros(like):
        return torch.zeros(like.shape, device=device)

    weights = [w.to(device).clone() for w in weights]
    means, squares = [zeros(w) for w in weights], [zeros(w) for w in weights]
    steps = [torch.zeros((), device=device) for _ in weights]
    kept = [g.to(device).clone() for g in grads[0]]
    tables = Tables()
    for now in grads:
        for at, grad in zip(kept, now, strict=True):
            at.copy_(grad)
        torch._foreach_add_(steps, 1)
        adam_atan2(
            weights, kept, means, squares, steps, lr=lr, betas=cases.ADAM["betas"],
            weight_decay=cases.ADAM["weight_decay"], tables=tables,
        )  # fmt: skip
    return [w.cpu() for w in weights]


@pytest.mark.parametrize(
    "dtype, grad_dtype",
    [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_adam_atan2(triton_device, dtype, grad_dtype):
    weights, grads = cases.weights_and_grads(3, dtype, grad_dtype)
    got = run_adam(triton_device, weights, grads)
    cases.assert_weights(got, cases.adam_atan2_fp64(weights, grads), 3)


def test_adam_atan2_reads_lr_on_the_device_and_repeats_bit_equal(triton_device):
    weights, grads = cases.weights_and_grads(2)
    plain = run_adam(triton_device, weights, grads)
    lr = torch.tensor(0.1, device=triton_device)
    again = run_adam(triton_device, weights, grads, lr=lr)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


def test_unaligned_weights_are_the_same_weights(triton_device):
    """Views into one buffer start anywhere; the table then promises no alignment."""
    weights, grads = cases.weights_and_grads(1)
    buffer = torch.zeros(2 * sum(w.numel() for w in weights) + 7, device=triton_device)
    views, at = [], 1
    for w in weights:
        views.append(buffer[at : at + w.numel()].view(w.shape))
        at += w.numel() + 1
    from recurx.kernels.adam_atan2 import adam_atan2
    from recurx.kernels.multi_tensor import Tables

    for view, w in zip(views, weights, strict=True):
        view.copy_(w)
    zeros = [[torch.zeros(w.shape, device=triton_device) for w in weights] for _ in range(2)]
    steps = [torch.ones((), device=triton_device) for _ in weights]
    there = [g.to(triton_device) for g in grads[0]]
    adam_atan2(views, there, *zeros, steps, **cases.ADAM, tables=Tables())
    want = run_adam(triton_device, weights, grads)
    assert all(torch.equal(v.cpu(), w) for v, w in zip(views, want, strict=True))
    untouched = torch.ones_like(buffer, dtype=torch.bool)
    at = 1
    for w in weights:
        untouched[at : at + w.numel()] = False
        at += w.numel() + 1
    assert (buffer[untouched] == 0).all()


def test_the_angle_and_the_bias_correction_are_exact_to_a_few_units(triton_device):
    """One step from weights 0 with lr 1 leaves the angle itself; means over twelve decades."""
    from recurx.kernels.adam_atan2 import adam_atan2
    from recurx.kernels.multi_tensor import Tables

    generator = torch.Generator().manual_seed(1)
    m = 10 ** (12 * torch.rand(5000, generator=generator) - 6)
    m *= torch.randn(5000, generator=generator).sign()
    v = 10 ** (12 * torch.rand(5000, generator=generator) - 6)
    m[:3], v[:3] = torch.tensor([0.0, 0.0, 1e-6]), torch.tensor([0.0, 1.0, 0.0])
    for step in (1, 7, 100, 2000, 1_000_000):
        w, grads = torch.zeros(5000, device=triton_device), torch.zeros(5000, device=triton_device)
        there = [t.clone().to(triton_device) for t in (m, v)]
        steps = torch.full((), float(step), device=triton_device)
        betas = (0.9, 0.999)
        adam_atan2(
            [w], [grads], [there[0]], [there[1]], [steps], lr=1.0, betas=betas,
            weight_decay=0.0, tables=Tables(),
        )  # fmt: skip
        mean = 0.9 * m.double() / (1 - 0.9**step)
        root = (0.999 * v.double() / (1 - 0.999**step)).sqrt()
        exact = -torch.atan2(mean, root)
        relative = (w.cpu().double() - exact).abs() / exact.abs().clamp_min(1e-300)
        assert relative[exact != 0].max() < 16 * cases.U, step
        assert (w.cpu()[exact == 0] == 0).all()
    assert exact[2] == pytest.approx(-math.pi / 2)


# ---- sign SGD, the average ----------------------------------------------------------------------


@pytest.mark.parametrize("duplicates, wide", [(True, False), (False, True)])
def test_sign_sgd(triton_device, duplicates, wide):
    from recurx.kernels.sign_sgd import sign_sgd

    table, grads, ids = cases.table_and_batch(duplicates)
    want = cases.official_sign_sgd(table, grads, ids, 0.125, 0.5)
    for lr in (0.125, torch.tensor(0.125, device=triton_device)):
        there = [t.clone().to(triton_device) for t in (table, grads, ids.long() if wide else ids)]
        sign_sgd(*there, lr=lr, weight_decay=0.5)
        assert torch.equal(there[0].cpu(), want)
    sign_sgd(there[0], there[1][:0], there[2][:0], lr=0.5, weight_decay=0.5)
    assert torch.equal(there[0].cpu(), want)


@pytest.mark.parametrize("share", [0.001, 0.25, 0.75, 1.0])
@BOTH
def test_average(triton_device, dtype, share):
    from recurx.kernels.ema import ema
    from recurx.kernels.multi_tensor import Tables

    averages, values = cases.weights_and_grads(1)
    values = [v.to(dtype) for v in values[0]]
    exact = [
        a.double() + share * (v.double() - a.double())
        for a, v in zip(averages, values, strict=True)
    ]
    for weight in (share, torch.tensor(share, device=triton_device)):
        there = [a.clone().to(triton_device) for a in averages]
        towards = [v.to(triton_device) for v in values]
        ema(there, towards, weight, tables=Tables())
        for got, want, value in zip(there, exact, values, strict=True):
            torch.testing.assert_close(got.cpu().double(), want, rtol=4 * cases.U, atol=4 * cases.U)
            assert share < 1 or torch.equal(got.cpu(), value.float())


# ---- ACT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_continue", [False, True])
def test_halting_gives_the_bits_of_plain_pytorch(triton_device, with_continue):
    from recurx.kernels.act_halt import act_halt

    exploration, steps, q_halt, q_continue = cases.halting()
    bar = q_continue if with_continue else None
    there = [None if t is None else t.to(triton_device) for t in (steps, q_halt, bar)]
    for count in (0, 1, 2**31 - 1, 2**31, 2**40 + 5):
        exploration.state[1] = count
        exploration.first_slot = count % 1000  # of a rank that shares the batch
        state = exploration.state.to(triton_device, copy=True)
        got = act_halt(*there, state, 5, round(0.4 * 2**24), exploration.first_slot)
        assert torch.equal(got.cpu(), exploration.halt(steps, q_halt, bar, 5, 0.4)), count


@pytest.mark.parametrize("slots", [1, 7, 300])
def test_the_queue_hands_out_rows_in_order(triton_device, slots):
    from recurx.kernels.queue_take import queue_take

    generator = torch.Generator().manual_seed(slots)
    cursor, expected = torch.tensor(1000, device=triton_device), 1000
    for _ in range(3):
        halted = torch.rand(slots, generator=generator) < 0.4
        index = queue_take(halted.to(triton_device), cursor, 613).cpu()
        want = (expected + torch.arange(int(halted.sum()))) % 613
        assert torch.equal(index[halted], want)
        assert ((index >= 0) & (index < 613)).all()
        expected += int(halted.sum())
        assert cursor.item() == expected


# ---- tables -------------------------------------------------------------------------------------


def test_a_table_is_made_again_only_when_an_address_changes(triton_device):
    from recurx.kernels.multi_tensor import CHUNK, Tables

    a, b = (torch.zeros(CHUNK + 8, device=triton_device) for _ in range(2))
    tables = Tables()
    table, aligned = tables.get("t", [[a]])
    assert tables.get("t", [[a]])[0] is table and aligned
    assert table.tolist() == [[a.data_ptr(), CHUNK], [a.data_ptr() + 4 * CHUNK, 8]]
    other, _ = tables.get("t", [[b]])
    assert other is not table and other[0, 0] == b.data_ptr()
    assert not tables.get("u", [[a[1:]]])[1]


def test_bad_arguments_are_named(triton_device):
    from recurx.kernels import ema, sign_sgd
    from recurx.kernels import stablemax_cross_entropy as stablemax
    from recurx.kernels.adam_atan2 import adam_atan2
    from recurx.kernels.multi_tensor import Tables

    flat, square = torch.zeros(4, device=triton_device), torch.zeros(4, 4, device=triton_device)
    one = torch.ones((), device=triton_device)
    ids = torch.zeros(4, dtype=torch.int32, device=triton_device)
    settings = {**cases.ADAM, "tables": Tables()}
    with pytest.raises(InvalidArgument, match="`grads`"):
        adam_atan2([square], [square.T.double()], [square], [square], [one], **settings)
    with pytest.raises(InvalidArgument, match="`means`"):
        adam_atan2([square], [square], [square.bfloat16()], [square], [one], **settings)
    with pytest.raises(InvalidArgument, match="`values`"):
        ema.ema([flat, flat], [flat, flat.bfloat16()], 0.5, tables=Tables())
    with pytest.raises(InvalidArgument, match="`ids`"):
        sign_sgd.sign_sgd(square, square, flat, lr=0.1, weight_decay=0.0)
    with pytest.raises(InvalidArgument, match="`grads`"):
        sign_sgd.sign_sgd(square, square[:, :2].contiguous(), ids, lr=0.1, weight_decay=0.0)
    with pytest.raises(InvalidArgument, match="`labels`"):
        stablemax.stablemax_forward(square, ids[:3], -100)
    with pytest.raises(InvalidArgument, match="`logits`"):
        stablemax.stablemax_forward(square.double(), ids, -100)


def test_a_capture_refuses_an_address_that_moved(monkeypatch):
    pytest.importorskip("triton")
    from recurx.kernels.multi_tensor import Tables

    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    moved = torch.zeros(4).as_subclass(OnGpu)
    with pytest.raises(RecurxError, match="moved since the warm-up"):
        Tables().get("t", [[moved]])
