"""The planner's ledger against measured bytes, its formulas against hand-computed numbers."""

import gc
import math
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from exactness import BACKENDS
from torch import Tensor, nn
from torch.nn import functional as F

import memdense
from memdense import _extension, memory
from memdense.__main__ import main
from memdense.ledger import Buffer, Ledger, Machine, Setting, read_network, replay
from memdense.plan import (
    all_reduce_bytes,
    bucket_sizes,
    build,
    parse_bandwidth,
    parse_bytes,
    scale,
    state_of,
)

MEMDENSE = [
    Setting("default"),
    Setting("keep", keep_bottlenecks=True),
    Setting("stem", recompute_stem=False),
    Setting("twice", double_backward=True),
]
OTHERS = [Setting("plain", kind="plain"), Setting("checkpoint", kind="checkpoint")]

NETWORKS = {
    "small": dict(growth_rate=12, block_config=(5, 4), num_init_features=24, small_inputs=True),
    "odd": dict(growth_rate=16, block_config=(3, 4, 5), num_init_features=32, in_channels=5),
    "no bottleneck": dict(
        growth_rate=12, block_config=(6, 6), num_init_features=16, bn_size=None, compression=1.0
    ),
    "dilated": dict(
        growth_rate=16, block_config=(3, 3, 3, 3), num_init_features=32, output_stride=8
    ),
    "dropout": dict(growth_rate=24, block_config=(4, 6), num_init_features=48, drop_rate=0.2),
    "one block": dict(growth_rate=16, block_config=(8,), num_init_features=32),
    # where weights and their gradients are most of it
    "heavy": dict(growth_rate=32, block_config=(4, 8), num_init_features=64, num_classes=1000),
}
# network, (height, width), batch
CASES = [
    ("small", (32, 32), 5),
    ("odd", (97, 65), 3),
    ("odd", (111, 83), 1),
    ("no bottleneck", (70, 70), 4),
    ("dilated", (129, 97), 3),
    ("dropout", (64, 64), 4),
    ("one block", (80, 80), 3),
    ("heavy", (64, 64), 1),
]


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Measuring collects garbage, which is quick where PyTorch's own objects are left out."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def network_of(name: str) -> dict:
    return {"num_classes": 10, **NETWORKS[name]}


class Autocast(nn.Module):
    """A model whose forward pass runs under autocast."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return self.model(x)


def loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.float(), target)


def checkpointed(network: dict) -> nn.Module:
    """torchvision's memory_efficient, with the first convolution that the network has."""
    torchvision = pytest.importorskip("torchvision")
    names = ("growth_rate", "block_config", "num_init_features", "drop_rate", "num_classes")
    arguments = {name: network[name] for name in names if name in network}
    model = torchvision.models.DenseNet(**arguments, memory_efficient=True)
    first, channels = network["num_init_features"], network.get("in_channels", 3)
    if network.get("small_inputs"):
        del model.features.norm0, model.features.relu0, model.features.pool0
        model.features.conv0 = nn.Conv2d(channels, first, 3, padding=1, bias=False)
    else:
        model.features.conv0 = nn.Conv2d(channels, first, 7, 2, 3, bias=False)
    return model


def model_for(network: dict, setting: Setting) -> nn.Module:
    if setting.kind == "checkpoint":
        return checkpointed(network)
    return memdense.DenseNet(
        **network,
        efficient=setting.kind == "memdense",
        keep_bottlenecks=setting.keep_bottlenecks,
        recompute_stem=setting.recompute_stem,
        double_backward=setting.double_backward,
    )


def measured(
    network: dict, size: tuple[int, int], batch: int, dtype: torch.dtype, setting: Setting, on: str
) -> memory.StepMemory:
    x = torch.randn(batch, network.get("in_channels", 3), *size)
    target = torch.randint(network["num_classes"], (batch,))
    with memdense.use_backend(on):
        model = Autocast(model_for(network, setting), dtype)
        return memory.training_step_memory(model, x, target, loss)


def runs(name: str, dtype: torch.dtype) -> list[tuple[Setting, str]]:
    """Settings and the backends to measure them on: the default on all that differ."""
    network = network_of(name)
    default, keep, stem, twice = MEMDENSE
    plain, checkpoint = OTHERS
    found = [(default, on) for on in BACKENDS]
    if dtype == torch.float32:
        if not network.get("small_inputs"):
            found.append((stem, BACKENDS[-1]))
        found.append((twice, BACKENDS[-1]))
    if network.get("bn_size", 4) is not None:
        found.append((keep, BACKENDS[0]))
    found.append((plain, "reference"))
    if name not in ("no bottleneck", "dilated"):
        found.append((checkpoint, "reference"))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "size", "batch"), CASES)
def test_ledger_agrees_with_measurement(
    name: str, size: tuple[int, int], batch: int, dtype: torch.dtype
) -> None:
    """Peak within 10 %, bytes between forward and backward within 0.2 % (in 16 bits, whose casts
    come and go, 2 %), for every setting.
    """
    network = network_of(name)
    shapes = read_network(build(**network), *size)
    wrong = []
    for setting, on in runs(name, dtype):
        machine = Machine("cpu", on, dtype, torch.get_num_threads())
        ledger = replay(shapes, batch, setting, machine)
        found = measured(network, size, batch, dtype, setting, on)
        least, most = 0.9 * ledger.peak, 1.1 * ledger.peak
        if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
            # oneDNN's convolutions of 16 bits take scratch of their own for AMX, whatever the batch
            most += torch.get_num_threads() << 20
        # where oneDNN has no 16 bits PyTorch's convolutions of them unfold images
        known = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if known and not least <= found.peak <= most:
            wrong.append(f"{setting.name} on {on}: peak {ledger.peak}, measured {found.peak}")
        if ledger.kept != pytest.approx(found.live, rel=0.002 if dtype == torch.float32 else 0.02):
            wrong.append(f"{setting.name} on {on}: kept {ledger.kept}, measured {found.live}")
        assert ledger.total == 0, f"{setting.name}: buffers are left behind: {ledger.live}"
        assert sum(ledger.at_peak.values()) == ledger.peak
    assert not wrong, "\n".join(wrong)


def test_kept_bytes_by_hand() -> None:
    """One block of 2 layers, k = 4, C_0 = 6, B = 8, on 2 images of 16 x 16: in float32, X with 14
    channels, statistics of X and of two bottlenecks, the pooled features and log-softmax.
    """
    model = build(
        None, growth_rate=4, block_config=(2,), num_init_features=6, bn_size=2, num_classes=3,
        small_inputs=True,
    )  # fmt: skip
    plain = memdense.plan(model, 16, 2, device="cpu", backend="reference")
    pixels = 2 * 16 * 16
    base = 4 * (pixels * 14 + 2 * (14 + 2 * 8) + 2 * 14 + 2 * 3)
    assert plain["memdense"].kept == base
    assert plain["memdense, keep_bottlenecks=True"].kept == base + 4 * pixels * 2 * 8
    # on a GPU rows are padded to 16 channels, and features and bottlenecks have 16 bits; so do the
    # image, the classifier's and the first convolution's weights, and the pooled features
    half = memdense.plan(model, 16, 2, "bf16")["memdense"]
    casts = pixels * 3 + 3 * 14 + 3 + 6 * 3 * 9
    assert half.kept == 2 * (pixels * 16 + casts + 2 * 14) + 4 * (2 * (14 + 2 * 8) + 2 * 3)
    # the last block's gradient is float32
    assert dict(half.buffers)["G, gradient of X"] == 4 * pixels * 16


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The most that was alive in each part, of what the test replays."""
    found: dict[str, int] = {}

    class Recorder(Ledger):
        def new(self, name: str, size: int) -> Buffer:
            buffer = super().new(name, size)
            found[self.where] = max(found.get(self.where, 0), self.total)
            return buffer

    monkeypatch.setattr("memdense.ledger.Ledger", Recorder)
    return found


@pytest.mark.parametrize("recompute", [True, False])
def test_peak_of_each_part_by_hand(recompute: bool, peaks: dict) -> None:
    """2 images of 32 x 32 in 16 bits on a GPU, k = 4, C_0 = 6, B = 8, blocks of 2 and 1 layers: 512
    pixels behind conv0, then 128, whose G rounds, and 32, whose G does not.
    """
    model = build(growth_rate=4, block_config=(2, 1), num_init_features=6, bn_size=2, num_classes=3)
    setting = Setting("", recompute_stem=recompute)
    replay(read_network(model, 32, 32), 2, setting, Machine("cuda", "triton", torch.bfloat16))

    images, conv0, out = 2 * 2 * 3 * 32 * 32, 2 * 512 * 6, 2 * 128 * 6
    weight = 6 * 3 * 49
    conv2, conv1 = 4 * 8 * 9, {c: 8 * c for c in (6, 7, 10)}
    weights = conv1[6] + conv1[10] + 2 * conv2 + 7 * 14, conv1[7] + conv2
    stem = images + 128 * 6 + (0 if recompute else conv0)  # winners, a byte each
    # rows of X and G have 16 values; of 14 and 11 channels, and bottlenecks, are statistics
    block1 = stem + 2 * 128 * 16 + 4 * 2 * (14 + 16)
    block2 = block1 + 2 * 32 * 16 + 4 * 2 * (11 + 8)
    y1, y2, pooled, linear = 2 * 128 * 8, 2 * 32 * 8, 2 * 2 * 11, 3 * 11
    handed1, handed2 = out, 2 * 32 * 7
    # a layer's dy, Y and dz, sums of its norms (G's, too, where it rounds) and gradients of weights
    layer1 = 2 * 128 * 4 + 2 * y1 + 4 * (4 * 6 + 16 + conv2)
    layer2 = 4 * (4 * 10 + 16 + conv2 + conv1[10])
    assert peaks == {
        "": images,
        "conv0, forward": 2 * images + 2 * weight + conv0,
        "denseblock1, forward": block1 + out + 2 * weights[0] + y1,
        "denseblock2, forward": block2 + handed2 + 2 * weights[1] + y2,
        # the gradients of log-softmax, of the means and, in 16 and 32 bits, of the weight
        "classifier": block2 + 4 * 2 * 3 + pooled + 6 * linear,
        "denseblock2, backward": block2 + pooled + 2 * weights[1] + 4 * 32 * 16
        + 2 * 32 * 4 + 2 * y2 + 4 * (2 * 7 + 16 + conv2),
        "denseblock1, backward": block1 + handed2 + 2 * weights[0] + 2 * 128 * 16
        + 4 * 7 * 14 + layer1 + layer2,
        # conv0's output, and its gradient in its place or beside it
        "conv0, backward": stem + handed1 + conv0 + images + 6 * weight,
    }  # fmt: skip


TRANSITION = dict(growth_rate=4, block_config=(1, 1), num_init_features=64)
NO_BOTTLENECK = dict(growth_rate=12, block_config=(3,), num_init_features=128, bn_size=None)
STEM = dict(growth_rate=4, block_config=(1,), num_init_features=32, small_inputs=False)
DROPOUT = dict(growth_rate=24, block_config=(2, 2), num_init_features=16, drop_rate=0.2)
LAST_NORM = dict(growth_rate=8, block_config=(2,), num_init_features=16)
CLASSIFIER = dict(growth_rate=4, block_config=(1,), num_init_features=8, num_classes=4000)
DEFAULT, KEEP, *_ = MEMDENSE


@pytest.mark.parametrize(
    ("network", "side", "batch", "setting", "on", "phase"),
    [
        (TRANSITION, 33, 2, DEFAULT, "reference", "backward"),
        (TRANSITION, 33, 2, DEFAULT, "reference", "forward"),
        (NO_BOTTLENECK, 40, 2, DEFAULT, "native", "backward"),
        (NO_BOTTLENECK, 40, 2, DEFAULT, "reference", "forward"),
        (STEM, 96, 2, DEFAULT, "reference", "forward"),
        (STEM, 96, 2, DEFAULT, "native", "backward"),
        (DROPOUT, 24, 4, KEEP, "native", "backward"),
        (CLASSIFIER, 4, 64, DEFAULT, "reference", "classifier"),
        (LAST_NORM, 96, 2, OTHERS[0], "reference", "backward"),
    ],
)
def test_peak_where_a_part_is_all(
    network: dict, side: int, batch: int, setting: Setting, on: str, phase: str, peaks: dict
) -> None:
    """Within 0.2 %, of networks in which it is reached there."""
    if on not in BACKENDS:
        pytest.skip("needs the extension")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("oneDNN's convolutions take other scratch")
    network = {"num_classes": 3, "small_inputs": True, **network}
    machine = Machine("cpu", on, torch.float32, torch.get_num_threads())
    replay(read_network(build(**network), side, side), batch, setting, machine)
    found = max(size for where, size in peaks.items() if where.endswith(phase))
    if phase == "forward":
        with memdense.use_backend(on):
            x = torch.randn(batch, 3, side, side)
            step = memory.peak_memory(model_for(network, setting), x)
    else:
        step = measured(network, (side, side), batch, torch.float32, setting, on)
    assert found == pytest.approx(step.peak, rel=0.002)


def test_masks_and_generators_are_the_devices() -> None:
    """Plain modules' dropout keeps a byte a value on a GPU, and the activation's bytes on a CPU;
    checkpoints keep generators' states in the host's memory.
    """
    model = build(**network_of("dropout"))
    args = dict(image=64, batch=4)
    gpu = memdense.plan(model, **args, backend="reference")
    cpu = memdense.plan(model, **args, device="cpu", backend="reference")
    masks = 4 * 24 * (4 * 16 * 16 + 6 * 8 * 8)
    for name, states in ((gpu.settings[-1].name, 0), (gpu.settings[-2].name, 10 * 5056)):
        assert cpu[name].kept - gpu[name].kept == 3 * masks + states


def test_peak_is_what_the_design_says() -> None:
    """DenseNet-121 at 224: X, G, Y and dz of the first block, 2.4 M values an image, and little
    beside them.
    """
    plan = memdense.plan("densenet121", 224, 256, "bf16")
    ledger = dict(plan["memdense"].buffers)
    pixels = 256 * 56 * 56
    assert ledger["X, features"] == ledger["G, gradient of X"] == 2 * pixels * 256
    assert ledger["Y, bottlenecks"] == ledger["dz, of bottlenecks"] == 2 * pixels * 128
    assert plan["memdense"].where == "denseblock1, backward"
    assert 1 < plan["memdense"].peak / (2 * pixels * 768) < 1.25


# ---- state


@pytest.mark.parametrize(
    ("arch", "parameters"),
    [
        ("densenet121", 7_978_856),
        ("densenet161", 28_681_000),
        ("densenet169", 14_149_480),
        ("densenet201", 20_013_928),
        ("bc100-12", 769_162),
    ],
)
def test_parameters_are_exact(arch: str, parameters: int) -> None:
    plan = memdense.plan(arch, batch=2, optimizer="adamw")
    assert plan.state.parameters == plan.state.gradients == 4 * parameters
    assert plan.state.optimizer == 8 * parameters
    assert f"{parameters:,} parameters" in str(plan)


@pytest.mark.parametrize("arch", ["l40-12", "b22-8", "c22-8", "bc22-8"])
def test_small_architectures_are_the_papers(arch: str) -> None:
    """Depth counts convolutions, with the transitions and the classifier."""
    model = build(arch)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert convolutions + 1 == int(re.search(r"\d+", arch)[0])
    assert (model.features.denseblock1.denselayer1.has_bottleneck) == ("b" in arch)
    half = model.features.transition1.conv.out_channels * 2
    whole = model.features.transition1.conv.in_channels
    assert half == whole if "c" in arch else half == 2 * whole
    assert model.features.conv0.out_channels == 16  # 2 * 8 with both, too


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, 0.1)),
        ("momentum", lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
    ],
)
def test_optimizer_state_is_exact(name: str, make) -> None:
    model = memdense.DenseNet(**network_of("small"))
    optimizer = make(model.parameters())
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    size = sum(t.nbytes for t in tensors if isinstance(t, Tensor))
    assert state_of(model, name, "cpu", False, False).optimizer == size


def test_optimizer_step_is_counted() -> None:
    """Its temporaries: one by one, as on the CPU, and of all parameters at once, as on a GPU."""
    model = memdense.DenseNet(**network_of("heavy"))
    model(torch.randn(1, 3, 64, 64)).sum().backward()
    for foreach, device in ((False, "cpu"), (True, "cuda")):
        adam = torch.optim.Adam(model.parameters(), foreach=foreach)
        decayed = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1, foreach=foreach)
        for optimizer, name in ((adam, "adam"), (decayed, "sgd")):
            optimizer.step()
            step = memory.peak_memory(optimizer.step, device="cpu").peak
            if name == "adam" or foreach:
                expected = state_of(model, name, device, False, False).optimizer_step
                assert expected == pytest.approx(step, rel=0.1), (name, device)


# ---- the largest batch


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("budget", ["60MB", "1GiB", 25 * 10**9])
def test_largest_batch_fits_and_one_more_does_not(budget: str | int, dtype: str) -> None:
    model = build(**network_of("odd"))
    args = dict(dtype=dtype, optimizer="adam", reserve="5MB")
    plan = memdense.plan(model, 96, 1, budget=budget, **args)
    room = parse_bytes(budget) - 5_000_000
    for setting in plan.settings:
        n = setting.largest_batch
        assert n > 0
        fits, more = (memdense.plan(model, 96, batch, **args)[setting.name] for batch in (n, n + 1))
        assert fits.total <= room < more.total
        assert fits.total == setting.largest_total
        images = 4 * n * 5 * 96 * 96
        assert fits.total == plan.state.total + images + max(fits.peak, plan.state.optimizer_step)
    batches = [setting.largest_batch for setting in plan.settings]
    assert batches == sorted(batches, reverse=True)


def test_largest_batch_fits_when_run() -> None:
    """The budget counts what is allocated when training: parameters, gradients, images and step."""
    network = network_of("odd")
    found = memdense.plan(build(**network), 64, 1, budget="20MB", device="cpu", backend="reference")
    n = found["memdense"].largest_batch
    step = measured(network, (64, 64), n, torch.float32, MEMDENSE[0], "reference")
    total = step.peak + found.state.total + 4 * n * 5 * 64 * 64
    assert total == pytest.approx(20e6, rel=0.05)


def test_budget_of_an_optimizer_that_takes_more_than_the_step() -> None:
    """All parameters' decayed gradients at once."""
    plan = memdense.plan("densenet201", 32, 2, optimizer="sgd")
    step = plan.state.optimizer_step
    assert step == plan.state.parameters > plan["memdense"].peak
    assert plan["memdense"].total == plan.state.total + plan.images + step


def test_budget_of_one_value_per_channel() -> None:
    """Where two images are the least, and part of the budget is reserved."""
    args = dict(model="densenet121", image=32, batch=2, reserve="1MB")
    with pytest.raises(ValueError, match=r"1\.0 MB of it reserved.* batch of 2 needs") as error:
        memdense.plan(**args, budget="60MB")
    text, unit = re.search(r"needs ([\d.]+) (\w+) at the least", str(error.value)).groups()
    least = parse_bytes(text + unit)
    with pytest.raises(ValueError, match="holds no training step"):
        memdense.plan(**args, budget=least - 10**5)
    plan = memdense.plan(**args, budget=least + 10**5)
    assert {setting.largest_batch for setting in plan.settings} == {0, 2}
    largest = memdense.plan(**args, budget=plan.settings[-1].total - 1 + 10**6)
    assert largest.settings[-1].largest_batch == 0


# ---- many devices


def test_ring_all_reduce_by_hand() -> None:
    assert all_reduce_bytes(1, 1000) == 0
    assert all_reduce_bytes(2, 1000) == 1000
    assert all_reduce_bytes(8, 1000) == 1750


def test_scaling_by_hand() -> None:
    """100 images at 1000 a second: 100 ms, 60 of them backward. On 4 devices 2 * 3/4 of 60 MB at
    1 GB/s are 90 ms, of which 30 stay after backward; the last bucket alone takes 15.
    """
    args = dict(memory=7, batch=100, images_per_second=1000.0, backward_share=0.6)
    buckets = [20_000_000, 30_000_000, 10_000_000]
    shown = scale(4, buckets=buckets, bandwidth=1e9, overlap=True, **args)
    assert shown.all_reduce_seconds == pytest.approx(0.090)
    assert shown.exposed_seconds == pytest.approx(0.030)
    assert shown.images_per_second == pytest.approx(400 / 0.130)
    assert shown.efficiency == pytest.approx(100 / 130)
    fast = scale(4, buckets=buckets, bandwidth=3e9, overlap=True, **args)
    assert fast.exposed_seconds == pytest.approx(0.005)  # the last bucket: 15 MB at 3 GB/s
    bare = scale(4, buckets=buckets, bandwidth=1e9, overlap=False, **args)
    assert bare.exposed_seconds == pytest.approx(0.090)
    assert scale(1, buckets=buckets, bandwidth=1e9, overlap=False, **args).efficiency == 1


def test_buckets_are_distributed_data_parallels() -> None:
    import torch.distributed as dist

    if not dist.is_available():
        pytest.skip("torch.distributed is not built")
    assert bucket_sizes([10, 2 << 20, 3 << 20, 900 << 10, 200 << 10], 4) == [
        1100 << 10,
        5 << 20,
        10,
    ]
    parameters = list(reversed(list(build("densenet169").parameters())))
    theirs, _ = dist._compute_bucket_assignment_by_size(
        [torch.empty(p.shape) for p in parameters], [1 << 20, 25 << 20]
    )
    sizes = [sum(parameters[i].nbytes for i in bucket) for bucket in theirs]
    assert bucket_sizes([p.nbytes for p in reversed(parameters)], 25) == sizes


@pytest.mark.parametrize(("view", "copies"), [(False, 3), (True, 2)])
def test_memory_of_each_device(view: bool, copies: int) -> None:
    """Parameters, gradients and buckets; gradients that are views into the buckets count once."""
    plan = memdense.plan(
        "densenet121", 64, 4, devices=(1, 2, 8), images_per_second=100, bandwidth="100Gbit/s",
        gradient_as_bucket_view=view,
    )  # fmt: skip
    size = 4 * 7_978_856
    one, two, eight = plan.scaling
    assert plan.state.total - plan.state.buffers == copies * size
    assert two.memory == eight.memory == plan.settings[0].total
    assert two.memory - one.memory == (copies - 2) * size
    assert eight.all_reduce_bytes == 1.75 * size
    assert eight.all_reduce_seconds == pytest.approx(1.75 * size / 12.5e9)


@pytest.mark.parametrize(("cap", "share"), [(25, 0.5), (25, 1.0), (4, 1.0)])
def test_what_backward_hides(cap: float, share: float) -> None:
    """All but the last bucket, as long as it takes."""
    args = dict(devices=(2,), images_per_second=100, bandwidth="1GB/s", bucket_cap_mb=cap)
    (two,) = memdense.plan("densenet121", 64, 4, backward_share=share, **args).scaling
    last = bucket_sizes([p.nbytes for p in build("densenet121").parameters()], cap)[-1]
    late = 4 * 7_978_856 - 0.04 * share * 1e9
    assert two.exposed_seconds == pytest.approx(max(last, late) / 1e9)


# ---- what people write, and what they read


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 << 30),
        ("24GB", 24 * 10**9),
        ("1.5 mib", 3 << 19),
        ("80 gb", 80 * 10**9),
        ("12345", 12345),
        (12345, 12345),
        ("7B", 7),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "24G", "-3GB", "0", "24GiB/s", "24 apples"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 24GiB"):
        parse_bytes(text)


def test_bandwidths() -> None:
    assert parse_bandwidth("300GB/s") == 300e9
    assert parse_bandwidth("1GiB/s") == 1 << 30
    assert parse_bandwidth("400Gbit/s") == 50e9
    assert parse_bandwidth(1e9) == 1e9
    for text in ("300GB", "fast", "0GB/s"):
        with pytest.raises(ValueError, match="expected a bandwidth"):
            parse_bandwidth(text)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (dict(model="densenet122"), "known are densenet121, densenet161.*bc100-12"),
        (dict(model="bc101-12"), "4 more than a multiple of 6"),
        (dict(model="densenet121", image=16), "denseblock3: it takes 29 x 29 at the least"),
        (dict(model="densenet121", image=32, batch=1), "a batch of at least 2"),
        (dict(model="densenet121", dtype="int8"), "fp32, bf16, fp16"),
        (dict(model="densenet121", optimizer="lion"), "none, sgd, momentum, adam, adamw"),
        (dict(model="densenet121", backend="native"), "triton, reference"),
        (dict(model="densenet121", batch=0), "batch must be positive"),
        (
            dict(model="densenet121", devices=(2,), bandwidth="1GB/s", images_per_second=math.inf),
            "images_per_second must be positive and finite, got inf",
        ),
        (
            dict(model="densenet121", devices=(2,), bandwidth="1GB/s", images_per_second=math.nan),
            "images_per_second must be positive and finite, got nan",
        ),
        (dict(model="densenet121", batch=2.5), "batch must be a whole number, got 2.5"),
        (dict(model="densenet121", devices=4), "devices must be whole numbers, got 4"),
        (dict(model="densenet121", devices=[2.5]), r"devices must be whole numbers, got \[2.5\]"),
        (
            dict(model="densenet121", bucket_cap_mb="25"),
            "bucket_cap_mb must be positive and finite",
        ),
        (dict(model="densenet121", image="224"), r"a side or \(height, width\), got '224'"),
        (dict(model="densenet121", image=(3, 224, 224)), r"a side or \(height, width\), got"),
        (dict(model="densenet121", backward_share=1.5), "backward_share must be at most 1"),
        (dict(model="densenet121", devices=(2,), bandwidth="1GB/s"), "go together"),
        (
            dict(model="densenet121", images_per_second=9.0, bandwidth="1GB/s"),
            "images_per_second needs devices",
        ),
    ],
)
def test_errors_say_what_could_be(args: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memdense.plan(**args)


def test_the_cpu_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is of what would run."""
    monkeypatch.setattr(_extension, "_reason", "not built: somewhere")
    settings = dict(image=32, batch=2, device="cpu")
    plan = memdense.plan("bc100-12", **settings)
    assert plan == memdense.plan("bc100-12", **settings, backend="reference")
    with pytest.raises(ValueError, match="native is not available: not built: somewhere"):
        memdense.plan("bc100-12", **settings, backend="native")


def test_smallest_budget_is_named_and_is_the_smallest() -> None:
    with pytest.raises(ValueError, match=r"state takes 64\.2 MB.* needs .* at the least") as error:
        memdense.plan("densenet121", 64, budget="50MB")
    text, unit = re.search(r"needs ([\d.]+) (\w+) at the least", str(error.value)).groups()
    least = parse_bytes(text + unit)  # printed to 0.1 MB
    plan = memdense.plan("densenet121", 64, budget=least + 10**5)
    assert max(setting.largest_batch for setting in plan.settings) == 1
    with pytest.raises(ValueError, match="holds no training step"):
        memdense.plan("densenet121", 64, budget=least - 10**5)


def test_models_that_cannot_be_planned() -> None:
    with pytest.raises(TypeError, match=r"memdense\.DenseNet or an architecture"):
        memdense.plan(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="training mode"):
        memdense.plan(build("bc22-8").eval())
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(ValueError, match=rf"expected float32 parameters, got {dtype}"):
            memdense.plan(build("bc22-8").to(dtype))
    model = build("bc22-8")
    model.features.denseblock2.denselayer1.norm1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"of the model: .*norm1 carries a forward hook"):
        memdense.plan(model)
    for name, module, message in (
        ("classifier", nn.Identity(), "classifier is an Identity"),
        ("features", nn.Sequential(), "features is a Sequential"),
        ("features.norm5", nn.Identity(), "features does not end with a norm"),
        ("features.conv0", nn.Sequential(), "conv0 is a Sequential, not a convolution"),
    ):
        model = build("bc22-8")
        where, _, child = name.rpartition(".")
        setattr(model.get_submodule(where), child, module)
        with pytest.raises(ValueError, match=message):
            memdense.plan(model)
    deep = memdense.DenseNet(4, (1,) * 12, 8)
    with pytest.raises(ValueError, match=r"nothing is left of 224 x 224 pixels behind \w+$"):
        memdense.plan(deep)


COMMAND = "plan --arch densenet121 --image 64 --batch 8 --dtype bf16 --budget 2GiB"


def cells(text: str, first: str) -> list[str]:
    """The columns behind a row's first."""
    line = next(line for line in text.splitlines() if line.startswith(first))
    return re.split(r"\s{2,}", line.removeprefix(first).strip())


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(COMMAND.split()) == 0
    text = capsys.readouterr().out
    plan = memdense.plan("densenet121", 64, 8, "bf16", "2GiB")
    assert text == f"{plan}\n"
    for setting in plan.settings:
        sizes = (setting.kept, setting.peak, setting.total)
        expected = [*map(memory.format_bytes, sizes), f"{setting.largest_batch:,}"]
        assert cells(text, setting.name.ljust(35))[:4] == expected
    # aligned: all columns end where their heading ends
    table = [line for line in text.splitlines() if line.startswith(("setting", "memdense,"))]
    assert len({line.rindex("  ") for line in table} | {len(line) for line in table}) <= 3
    assert "not counted: the CUDA context" in text and "on the CPU only" in text


def test_command_line_for_many_devices(capsys: pytest.CaptureFixture[str]) -> None:
    more = "--devices 1,4 --images-per-second 1000 --bandwidth 10GB/s --no-overlap"
    assert main(f"{COMMAND} {more} --optimizer momentum".split()) == 0
    text = capsys.readouterr().out
    exposed = 1.5 * 4 * 7_978_856 / 10e9
    rate = f"{4 * 8 / (8 / 1000 + exposed):,.0f}"
    assert re.search(rf"\n4 +{rate} +{0.008 / (0.008 + exposed):.1%} ", text)
    assert re.search(r"\n1 +1,000 +100\.0% +8\.0 ms +0\.0 ms +0\.0 ms", text)
    assert "at 10GB/s" in text and "when backward has ended" in text


def test_defaults_are_the_networks() -> None:
    """Images of 32 where it is for small ones; double_backward where it is on."""
    assert "32 x 32" in memdense.plan("bc22-8", batch=2).title
    assert "224 x 224" in memdense.plan("densenet121", batch=2).title
    model = build("bc22-8")
    assert "memdense, double_backward=True" not in str(memdense.plan(model))
    model.features.double_backward = True
    plan = memdense.plan(model)
    assert plan["memdense, double_backward=True"].kept > plan["memdense"].kept


def test_command_line_builds_other_networks(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "plan --growth-rate 8 --block-config 2,2 --num-init-features 8 --bn-size none "
        "--compression 1 --num-classes 5 --in-channels 1 --image 40x24 --batch 4 --device cpu"
    )
    assert main(arguments.split()) == 0
    text = capsys.readouterr().out
    model = memdense.DenseNet(
        8, (2, 2), 8, None, num_classes=5, in_channels=1, compression=1.0, small_inputs=False
    )
    parameters = sum(p.numel() for p in model.parameters())
    assert f"{parameters:,} parameters: a training step of 4 images, 40 x 24" in text
    assert "keep_bottlenecks" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan --arch resnet50", "known are densenet121"),
        ("plan", "say which network"),
        ("plan --arch densenet121 --budget 10MB", "holds no training step"),
        ("plan --arch densenet121 --image 5", "at the least"),
    ],
)
def test_command_line_errors(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out
    assert captured.err.count("\n") == 1


def test_without_a_command_it_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "usage: python -m memdense" in capsys.readouterr().out


def test_rich_shows_the_same_figures() -> None:
    console = pytest.importorskip("rich.console")
    plan = memdense.plan(
        "bc22-8", 32, 8, budget="1GB", devices=(1, 2), images_per_second=10, bandwidth="1GB/s"
    )
    with open("/dev/null", "w") as nowhere:
        shown = console.Console(width=200, record=True, file=nowhere)
        shown.print(plan)
    rich, plain = shown.export_text(), str(plan)
    words = {word for word in re.findall(r"[\w.,%]+", plain) if re.search(r"\d", word)}
    assert words and all(word in rich for word in words)


def test_as_a_program() -> None:
    command = [sys.executable, "-m", "memdense", *COMMAND.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == f"{memdense.plan('densenet121', 64, 8, 'bf16', '2GiB')}\n"
