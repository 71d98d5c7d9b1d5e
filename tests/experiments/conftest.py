import pytest
import torch

import recurx
from recurx.models import TRM, TRMConfig


@pytest.fixture(autouse=True)
def threads():
    """The command sets the number of threads; later tests get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def untrained_6x6(tmp_path_factory) -> str:
    """The file of a net for 6x6 Sudokus that knows nothing, and answers at once."""
    torch.manual_seed(0)
    config = TRMConfig.tiny(8, 36, hidden_size=16, num_heads=2, H_cycles=1, L_cycles=1)
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    recurx.save_checkpoint(path, TRM(config), {"task": "sudoku-6x6"})
    return str(path)
