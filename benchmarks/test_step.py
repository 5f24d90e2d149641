"""Training step of every variant, one at a time: `pytest benchmarks --benchmark-only`.

For ratios measured side by side, run benchmarks/step.py.
"""

import pytest
import torch
from variants import VARIANTS, backend, build, check_same_loss, describe, images, step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, SIZE = (64, 224) if DEVICE.type == "cuda" else (2, 128)


@pytest.fixture(scope="module")
def models() -> dict:
    models = build("densenet121", DEVICE)
    check_same_loss(models, SIZE, DEVICE)
    return models


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.benchmark(group=f"densenet121 training step, {BATCH} x {SIZE} x {SIZE}, float32")
def test_training_step(benchmark, models: dict, name: str) -> None:
    model, (x, target) = models[name], images(name, BATCH, SIZE, DEVICE)

    def run() -> None:
        with backend(name):
            step(model, x, target)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info |= describe(DEVICE)
    benchmark.pedantic(run, rounds=5, warmup_rounds=2)
