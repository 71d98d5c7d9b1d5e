import pytest
import torch


@pytest.fixture(autouse=True)
def threads():
    """The command sets the number of threads; later tests get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
