"""Shared by all tests: uninitialised memory is NaN, and Hypothesis repeats itself."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    from hypothesis import settings
except ImportError:  # a GPU machine may lack it
    collect_ignore = ["test_exactness.py"]
else:
    settings.register_profile(
        "ci", max_examples=200, deadline=None, derandomize=True, print_blob=True
    )
    settings.register_profile("more", max_examples=2000, deadline=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what torch.empty and its kin return with NaN: an output nobody wrote cannot pass."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
