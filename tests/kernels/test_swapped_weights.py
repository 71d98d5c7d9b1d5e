"""Weak references on weights and inference mode spoil no tensor of the user's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import recurx
from tests.kernels.writes import CASES, ENGINES, Stack, answer, by_pointer, of_copies, same


@pytest.mark.parametrize("engine, mode", CASES)
def test_parameters_can_be_swapped_after_any_call(engine: str, mode: str) -> None:
    """Weak references on parameters forbid `.double()` under the flag for swapping."""
    with ENGINES[engine]() as backend:
        stack = Stack()
        answer(stack, backend, mode)
        stack.requires_grad_(True)
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            stack.double()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)
        assert all(weight.dtype == torch.float64 for weight in stack.parameters())
        assert same(answer(stack, backend, "eval"), of_copies(stack, backend, "eval"))


@pytest.mark.parametrize("engine", ENGINES)
def test_what_inference_mode_cached_serves_ordinary_calls(engine: str) -> None:
    with ENGINES[engine]() as backend:
        stack = Stack()
        first = answer(stack, backend, "inference")
        assert same(answer(stack, backend, "inference"), first)
        assert same(answer(stack, backend, "eval"), first)
        by_pointer(stack.linears()[3], torch.randn(64, 32))
        after = answer(stack, backend, "training")
        assert not same(after[:1], first[:1])
        assert same(answer(stack, backend, "eval"), of_copies(stack, backend, "inference"))


def test_quantised_weights_can_be_swapped() -> None:
    from recurx import fp8

    weight = nn.Parameter(torch.randn(8, 8))
    codes = fp8.quantize_weight(weight)
    weight.data.copy_(codes.dequantized())
    fp8.register(weight, codes)
    other = nn.Parameter(torch.randn(8, 8))
    torch.utils.swap_tensors(weight, other)
    assert not fp8.are_quantized([weight]) and fp8.are_quantized([other])


@pytest.mark.parametrize("backend", ["eager", "cpu", "auto"])
def test_a_patched_model_is_right_after_conversions_that_swap(native, backend: str) -> None:
    from tests import lookalike

    patched, plain = lookalike.build(), lookalike.build()
    recurx.patch(patched, backend=backend)

    def logits(model: nn.Module) -> Tensor:
        carry, batch = lookalike.inputs(model)
        inner = next(m for m in model.modules() if isinstance(m, lookalike.Inner))
        with torch.no_grad():
            return inner(carry, batch)[1]

    torch.testing.assert_close(logits(patched), logits(plain), rtol=1e-4, atol=1e-4)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for model in (patched, plain):
            model.double().to(torch.bfloat16).float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    torch.testing.assert_close(logits(patched), logits(plain), rtol=1e-4, atol=1e-4)
