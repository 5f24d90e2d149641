"""memdense.memory against scripts whose allocations are known to the byte."""

import gc
import os
import random
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import DenseNet

from memdense.memory import (
    PeakMemory,
    StepMemory,
    _follow,
    _warm_up_profiler,
    format_bytes,
    live_bytes,
    peak_memory,
    saved_bytes,
    training_step_memory,
)

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    # Each measurement collects garbage: spare it the objects of the libraries imported above.
    gc.freeze()
    yield
    gc.unfreeze()


def block(size, device="cpu"):
    return torch.empty(size, dtype=torch.uint8, device=device)


def figures(fn, *args, **kwargs):
    measured = peak_memory(fn, *args, **kwargs)
    return measured.peak, measured.retained


# Peaks on the CPU


def test_a_call_that_allocates_nothing():
    assert figures(lambda: None) == (0, 0)


def test_peak_is_a_maximum_over_time_not_a_sum():
    def script():
        a = block(1000)
        b = block(2000)
        del a
        c = block(500)
        return b, c

    assert figures(script) == (3000, 2500)


def test_memory_freed_inside_still_counts_for_the_peak():
    def script():
        block(7000)
        return block(1)

    assert figures(script) == (7000, 1)


def test_allocations_in_nested_calls():
    def inner():
        scratch = block(300)
        return block(20), scratch.numel()

    def outer():
        first, _ = inner()
        second, _ = inner()
        return first, second

    assert figures(outer) == (340, 40)


def test_operations_report_results_and_scratch_of_their_own():
    x = torch.randn(1000)
    assert figures(lambda: x.exp().sin()) == (8000, 4000)
    assert figures(x.exp_) == (0, 0)
    # The number becomes a tensor of 8 bytes, and that one of 4 to match.
    assert figures(lambda: x.add_(1)) == (12, 0)


def test_arguments_and_result_pass_through():
    measured = peak_memory(torch.mul, torch.ones(3), other=torch.full((3,), 2.0))
    assert measured.result.tolist() == [2, 2, 2]
    assert measured == PeakMemory(12, 12)


def test_long_random_script_matches_a_simple_model():
    rng = random.Random(0)
    sizes = [rng.randrange(1, 5000) for _ in range(60_000)]
    expected = {"now": 0, "peak": 0}

    def script():
        alive = []
        for size in sizes:
            alive.append(block(size))
            expected["now"] += size
            expected["peak"] = max(expected["peak"], expected["now"])
            # Slightly fewer frees than allocations, in random order.
            while alive and rng.random() < 0.49:
                expected["now"] -= alive.pop(rng.randrange(len(alive))).numel()
        return alive

    measured = peak_memory(script)
    assert (measured.peak, measured.retained) == (expected["peak"], expected["now"])
    assert len(measured.result) < 40_000, "the script was meant to free a lot"


def test_blocks_from_before_do_not_count_when_freed():
    earlier = [block(5000)]

    def script():
        earlier.clear()
        return block(800)

    assert figures(script) == (800, 800)


def test_blocks_of_an_earlier_window_do_not_count_when_freed():
    earlier = [peak_memory(block, 5000).result]

    def script():
        earlier.clear()
        return block(800)

    assert figures(script) == (800, 800)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], (0, 0)),
        ([(1, 10), (2, 20), (1, -10), (3, 5)], (30, 25)),
        ([(1, 10), (1, -10), (1, 4)], (10, 4)),
        # Block 1 is from before, so that its size counts for nothing and may be wrong.
        ([(1, -10), (2, 20)], (20, 20)),
        ([(2, 20), (1, -10), (2, -20)], (20, 0)),
        # Block 1 was freed by another thread before its address was used again.
        ([(1, 10), (1, 10)], (10, 10)),
        ([(1, 10), (2, 5), (1, 7), (1, -7)], (15, 5)),
    ],
)
def test_blocks_are_followed_by_address(events, expected):
    assert _follow(events) == expected


def test_other_python_threads_are_not_seen_as_documented():
    kept = []

    def script():
        thread = threading.Thread(target=lambda: kept.append(block(9000)))
        thread.start()
        thread.join()
        return block(10)

    assert figures(script) == (10, 10)


def test_operations_spread_over_threads():
    x = torch.randn(1 << 20)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert figures(lambda: x.exp().sin_()) == (x.nbytes, x.nbytes)
    finally:
        torch.set_num_threads(before)


def test_reference_cycles_do_not_count_as_retained():
    def script():
        cycle = [block(4000)]
        cycle.append(cycle)

    assert figures(script) == (4000, 0)


def test_backward_of_a_small_graph():
    x = torch.randn(1000, requires_grad=True)

    def step():
        x.exp().sum().backward()

    # x.exp() and its gradient meet in backward, with the loss and its own gradient of one.
    assert figures(step) == (8008, 4000), "x.grad is new"
    assert figures(step) == (8008, 0), "x.grad exists"


def test_an_error_inside_passes_through_and_leaves_the_profiler_off():
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 / 0)
    assert figures(block, 30) == (30, 30)


def test_a_running_profiler_is_refused():
    running = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with running, pytest.raises(RuntimeError, match="profiler"):
        peak_memory(block, 1)


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="meta"):
        peak_memory(torch.empty, 3, device="meta")
    with pytest.raises(ValueError, match="meta"):
        peak_memory(torch.neg, torch.empty(3, device="meta"))
    with pytest.raises(ValueError, match="meta"):
        peak_memory(nn.Linear(2, 2, device="meta"), torch.empty(1, 2))
    with pytest.raises(ValueError, match="meta"):
        peak_memory(torch.mul, torch.empty(3), other=torch.empty(3, device="meta"))
    with torch.device("meta"), pytest.raises(ValueError, match="meta"):
        peak_memory(torch.empty, 3)


@pytest.mark.parametrize("level", [None, "3"])
def test_the_environment_stays(level, monkeypatch):
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    if level:
        monkeypatch.setenv("KINETO_LOG_LEVEL", level)
    _warm_up_profiler.__wrapped__()
    assert os.environ.get("KINETO_LOG_LEVEL") == level


# What is alive between forward and backward


def test_saved_and_live_bytes_of_a_small_graph():
    x = torch.randn(1000, requires_grad=True)
    assert saved_bytes(lambda: x.exp().sum()) == 4000
    assert live_bytes(lambda: x.exp().sum()) == 4004
    with torch.no_grad():
        assert saved_bytes(lambda: x.exp().sum()) == 0
        assert live_bytes(lambda: x.exp().sum()) == 4


def test_a_storage_counts_once_and_whole():
    x = torch.randn(1000, requires_grad=True)

    def script():
        y = x * 2
        return (y[:10] * y[500:510]).sum() + y.view(10, 100)[3].square().sum()

    assert saved_bytes(script) == 4000


def test_storages_that_are_not_shared_add_up():
    x = torch.randn(1000, requires_grad=True)
    assert saved_bytes(lambda: (x.exp(), x.exp())) == 8000


def test_excluded_tensors_and_modules():
    linear = nn.Linear(20, 30)
    x = torch.randn(5, 20)

    def script():
        return linear(x).exp() @ linear.weight  # a view of the weight is saved here and there

    assert saved_bytes(script) == 4 * (5 * 20 + 20 * 30 + 5 * 30)
    assert saved_bytes(script, exclude=linear) == 4 * (5 * 20 + 5 * 30)
    assert saved_bytes(script, exclude=x) == 4 * (20 * 30 + 5 * 30)
    assert saved_bytes(script, exclude=linear.weight.t()[:3]) == 4 * (5 * 20 + 5 * 30)
    assert saved_bytes(script, exclude=(linear, [x])) == 4 * 5 * 30


def test_buffers_of_an_excluded_module_do_not_count():
    norm = nn.BatchNorm1d(64).eval()
    x = torch.randn(8, 64, requires_grad=True)
    assert saved_bytes(norm, x, exclude=norm) == x.nbytes


def test_saved_tensors_of_a_dropped_graph_do_not_count():
    x = torch.randn(1000, requires_grad=True)

    def script():
        cycle = [x.exp().exp()]
        cycle.append(cycle)
        return x.exp()

    assert saved_bytes(script) == 4000


def test_hooks_do_not_disturb_backward():
    x = torch.randn(10, requires_grad=True)
    outputs = []
    saved_bytes(lambda: outputs.append(x.exp().sum()))
    outputs[0].backward()
    assert torch.equal(x.grad, x.exp())


class KeepOutsideHooks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.hidden = x.exp()
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.hidden


def test_only_live_bytes_sees_tensors_kept_outside_hooks():
    x = torch.randn(1000, requires_grad=True)
    assert saved_bytes(KeepOutsideHooks.apply, x) == 0
    assert live_bytes(KeepOutsideHooks.apply, x) == 4004


def test_checkpointed_tensors_do_not_count():
    x = torch.randn(1000, requires_grad=True)

    def script():
        return torch.utils.checkpoint.checkpoint(
            lambda t: t.exp().sin().exp(), x, use_reentrant=False, preserve_rng_state=False
        )

    assert saved_bytes(script, exclude=x) == 0
    assert live_bytes(script) == 4000


# Training steps


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 200), nn.Sigmoid(), nn.Linear(200, 10))


def test_training_step_of_a_small_model():
    model, x, target = small_model(), torch.randn(6, 100), torch.randint(0, 10, (6,))
    weight = model[0].weight.clone()
    step = training_step_memory(model, x, target)
    # Sigmoid's output, log-softmax's output and the weight of its mean are kept; the first
    # layer's output is not, as Sigmoid needs only its own.
    assert step.saved == 4 * 6 * 200 + 4 * 6 * 10 + 4
    assert step.live == step.saved + 4
    assert step.after == 0
    assert step.peak > step.live + weight.nbytes, "the first layer's new gradient"
    assert step.batch == 6
    assert torch.equal(model[0].weight, weight)
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.parameters())


def test_training_step_with_an_optimizer():
    model, x = small_model(), torch.randn(6, 100)
    weight = model[0].weight.clone()
    optimizer = torch.optim.Adam(model.parameters(), foreach=True)
    with_step = training_step_memory(model, x, optimizer=optimizer)
    assert with_step.after == 0, "Adam's state belongs to the baseline"
    assert with_step.peak > training_step_memory(model, x).peak
    assert not torch.equal(model[0].weight, weight)


def test_training_step_takes_any_loss():
    model, x, target = small_model(), torch.randn(6, 100), torch.randn(6, 10)
    seen = []

    def loss(*given):
        seen.append(len(given))
        return given[0].sum()

    training_step_memory(model, x, loss=loss)
    training_step_memory(model, x, target, loss=loss)
    assert seen == [1, 1, 1, 2, 2, 2]


def test_without_a_target_the_loss_is_the_mean_square():
    step = training_step_memory(small_model(), torch.randn(6, 100))
    assert step.saved == 4 * 6 * 200 + 4 * 6 * 10, "the square needs the output"


def test_input_and_target_are_not_counted_as_saved():
    model, x, target = small_model(), torch.randn(6, 100), torch.randn(6, 10)
    plain = training_step_memory(model, x, target, loss=F.mse_loss)
    # mse_loss saves the network's output and the target.
    assert plain.saved == 4 * 6 * 200 + 4 * 6 * 10


def test_input_that_requires_a_gradient():
    model, x = small_model(), torch.randn(6, 100, requires_grad=True)
    assert training_step_memory(model, x).after == 0
    assert torch.count_nonzero(x.grad) == 0


def test_memory_kept_from_step_to_step_shows():
    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.history = small_model(), []

        def forward(self, x):
            y = self.inner(x)
            self.history.append(y.detach())
            return y

    assert training_step_memory(Leaky(), torch.randn(6, 100)).after == 4 * 6 * 10


@pytest.mark.parametrize("x", [torch.randn(0, 100), torch.tensor(1.0)])
def test_training_step_without_images(x):
    with pytest.raises(ValueError, match="at least one image"):
        training_step_memory(small_model(), x)


def test_checkpointed_densenet_takes_less_than_a_plain_one():
    x, target = torch.randn(2, 3, 64, 64), torch.randint(0, 10, (2,))
    plain, efficient = (
        training_step_memory(
            DenseNet(12, (4, 4), 24, num_classes=10, memory_efficient=flag), x, target
        )
        for flag in (False, True)
    )
    assert efficient.peak < 0.8 * plain.peak
    assert efficient.live < 0.8 * plain.live
    assert efficient.saved < 0.8 * plain.saved
    for step in (plain, efficient):
        assert step.saved <= step.live <= step.peak
        assert step.after == 0
    # Plain modules keep nothing that hooks do not see but the loss.
    assert plain.live - plain.saved == 4


# Printing


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1.0 kB"),
        (1000, "1.0 kB"),
        (4004, "4.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (125_000_000, "125.0 MB"),
        (-12_900_000, "-12.9 MB"),
        (139 * 2**30, "149.3 GB"),
        (3.2e15, "3200.0 TB"),
    ],
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text


def test_representations_name_their_units():
    assert repr(PeakMemory(4000, 17, result=object())) == "PeakMemory(peak=4.0 kB, retained=17 B)"
    step = StepMemory(500_000_000, 480_000_000, 470_000_000, 0, batch=4)
    assert repr(step) == (
        "StepMemory(peak=500.0 MB, live=480.0 MB, saved=470.0 MB, after=0 B, batch=4)"
    )
    assert step.per_image == StepMemory(125_000_000, 120_000_000, 117_500_000, 0, batch=1)


# CUDA: the caching allocator rounds blocks up to multiples of 512 bytes


@gpu
@needs_cuda
def test_cuda_script():
    def script(device):
        a = block(1024, device)
        b = block(2048, device)
        del a
        return b, block(500, device)

    assert figures(script, "cuda", device="cuda") == (3072, 2560)


@gpu
@needs_cuda
def test_cuda_device_is_taken_from_the_arguments():
    x = torch.randn(1024, device="cuda")
    assert figures(torch.neg, x) == (4096, 4096)
    assert figures(torch.neg, torch.randn(1024)) == (4096, 4096), "the CPU is measured too"


@gpu
@needs_cuda
def test_the_cpu_alone_is_measured():
    assert figures(lambda: (block(1024, "cuda"), block(30)), device="cpu") == (30, 30)


@gpu
@needs_cuda
def test_cuda_counts_frees_of_earlier_blocks():
    earlier = [block(5120, "cuda")]

    def script():
        earlier.clear()
        return block(1024, "cuda")

    assert figures(script, device="cuda") == (0, -4096)


@gpu
@needs_cuda
def test_cuda_training_step():
    model = small_model().cuda()
    step = training_step_memory(model, torch.randn(64, 100, device="cuda"))
    assert 4 * 64 * 200 <= step.saved <= step.live <= step.peak
    assert step.after == 0
