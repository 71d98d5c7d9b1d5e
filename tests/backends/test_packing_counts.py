"""What packing weights anew at every call costs on a GPU: one or two launches, whatever the net."""

from __future__ import annotations

import pytest
import torch

from recurx.backends import cuda_abi, cuda_grid
from recurx.backends.cuda import Cuda
from recurx.backends.weight_cache import frozen_weights
from recurx.nets import ATTENTION, KINDS, TOKEN_MLP
from recurx.packed import PackedNets
from recurx.plan import DEVICES
from tests.backends.test_second_call import Launches, StubLibrary
from tests.factories import make_net

NETS = [
    make_net(kind, blocks=blocks, tokens=tokens, hidden=96, inner=40, token_inner=24, heads=3)
    for kind in KINDS
    for blocks, tokens in ((1, 13), (3, 33))
]


@pytest.mark.parametrize("net", NETS, ids=str)
def test_the_grid_kernels_tape_is_gathered_as_it_would_be_packed(net) -> None:
    fill = cuda_grid.packer(net.spec, torch.device("cpu"))
    for scale in (1, -3):
        net.weights = [weight * scale for weight in net.weights]
        with Launches() as launched:
            tape = fill(net.weights)
        assert launched.names == ["_foreach_copy_", "index_select"]
        assert torch.equal(tape, cuda_grid.pack(net.spec, net.weights))


def test_tritons_weights_are_rounded_by_one() -> None:
    nets = {"L": make_net(ATTENTION), "H": make_net(TOKEN_MLP)}
    specs = tuple((name, net.spec) for name, net in nets.items())
    packed = PackedNets(specs, torch.bfloat16, torch.device("cpu"))
    with Launches() as launched:
        packed.fill([weight for net in nets.values() for weight in net.weights])
    assert launched.names == ["_foreach_copy_"]


@pytest.mark.parametrize("kind", ["owner", "cluster", "grid"])
def test_a_tape_is_filled_at_every_call_that_has_not_frozen_it(kind: str, monkeypatch) -> None:
    library, net, packs = StubLibrary(kind), make_net(hidden=128), []
    cuda, call = Cuda(library, DEVICES["h100"]), cuda_abi.Library.call
    monkeypatch.setattr(
        cuda_abi.Library, "call", lambda self, name, *a: packs.append(name) or call(self, name, *a)
    )

    def tape() -> torch.Tensor:
        return cuda._tape(kind, net.spec, net.weights, 13, None, False)

    first = tape()
    with Launches() as launched:
        assert tape() is first
    launched.names += packs[1:]
    fills = {"grid": ["_foreach_copy_", "index_select"]}
    assert launched.names == fills.get(
        kind, ["_foreach_copy_", f"rx_{cuda_abi.FAMILIES[kind]}_pack"]
    )
    with frozen_weights():
        tape()
        with Launches() as launched:
            assert tape() is first
        assert not launched.names and len(packs) in (0, 3)
