"""Every kernel of a training step, compiled for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# bytes that a program may have; 8.6, 8.9 and 12.x take the tiles of 8.0, which has more
SHARED = {80: 99 << 10, 90: 227 << 10}
# in PTX for 9.0 in 16 bits (Triton 3.8); they are what an epilogue waits for
BARRIERS = {"forward_1x1": 16, "gradients_1x1": 19}


def aot(common: Path, *arguments: str) -> list[str]:
    """The lines of aot.py, in a process where Triton compiles what no other test has."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(common / "triton")}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("aot.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "dtype"),
    [
        ("densenet121", "bfloat16"),
        ("densenet121", "float32"),
        ("bc100_12", "float16"),
        ("stem", "float16"),
        ("candidates", "bfloat16"),
        ("candidates", "float16"),
        ("candidates", "float32"),
        ("candidates", "ieee"),
    ],
)
def test_compiles(net: str, dtype: str, common: Path) -> None:
    """Nothing spilled, shared memory within the limit, products on tensor cores, 16 bytes at a time
    where channels are multiples of 16, and few barriers.
    """
    kernels = [json.loads(line) for line in aot(common, net, dtype, *map(str, SHARED))]
    expected = set()
    if net in ("densenet121", "stem"):
        expected |= {"maxpool", "maxpool_gradient", "move_running"}
    if net != "stem":
        expected |= {"forward_1x1", "gradients_1x1", "merge_moments"}
    if net in ("densenet121", "bc100_12"):
        expected |= {"settle_rows", "pack_rows", "answer_rows"}
    if net == "candidates":
        expected |= {"forward_3x3", "input_gradient_3x3", "weight_gradient_3x3"}
    for arch in SHARED:
        assert expected <= {kernel["name"] for kernel in kernels if kernel["arch"] == arch}
    for kernel in kernels:
        arch = kernel["arch"]
        assert kernel["stack"] == 0, kernel
        assert kernel["shared"] <= SHARED[arch], kernel
        if kernel["product"]:
            cores = "" if dtype == "ieee" else "wgmma" if arch >= 90 else "mma"
            assert kernel["tensor_cores"] == cores, kernel
        if dtype == "ieee":
            assert not kernel["chained"], kernel
        # a channel's tiles and weights of any layout are read as they come
        merges = kernel["name"].startswith("merge")
        merges = merges or kernel["name"] in ("cast_weights", "move_running")
        if net == "densenet121" and not merges:
            assert kernel["wide"], kernel
        if (net, dtype, arch) == ("densenet121", "bfloat16", 90) and kernel["name"] in BARRIERS:
            assert 0 < kernel["barriers"] <= BARRIERS[kernel["name"]], kernel


def test_another_batch_compiles_little(common: Path) -> None:
    """As the last of an epoch: only products whose tiles end behind the last row, and what merges
    another number of tiles.
    """
    found = aot(common, "256", "100")
    assert 0 < len(found) < 8 and {*found} <= {"forward_1x1", "gradients_1x1", "merge_gradients"}
