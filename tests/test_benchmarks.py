"""The benchmark suite: what it refuses to time, what it counts and fits, reports and compares."""

import copy
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchvision")
pytest.importorskip("rich")

import compare
import growth
import kernels
import primitives
import report
import variants
from measure import Ceilings, Clock, Refused, interleaved, refused, with_ratios

from memdense import ops
from memdense.backends import Reference
from memdense.buffers import Geometry

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
TINY = variants.Setting(variants.Arch(4, (2, 2), 8, 32), "tiny", 2, 32, torch.float32, CPU)


# ---- timing


class Steps(Clock):
    """A clock on which the i-th call takes i seconds; it keeps who was called."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.calls = 0

    def time(self, run) -> float:
        run()
        self.calls += 1
        return float(self.calls)


def test_variants_are_interleaved_in_random_orders() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleaved(runs, lambda *_: "", Steps(), 0.0, (20, 20))
    assert order[:6] == list("abcabc")  # the check, the warm-up
    rounds = ["".join(order[i : i + 3]) for i in range(6, len(order), 3)]
    assert len(rounds) == 20 and all(sorted(r) == list("abc") for r in rounds)
    assert len(set(rounds)) > 3
    for name in "abc":
        assert times[name] == [4 + 3 * i + r.index(name) for i, r in enumerate(rounds)]


def test_a_wrong_result_is_never_timed() -> None:
    calls = dict.fromkeys(("right", "wrong", "nan", "raises", "asserts"), 0)

    def run(name: str) -> float:
        calls[name] += 1
        if name == "raises":
            raise RuntimeError("out of memory\nand more")
        assert name != "asserts"
        return {"right": 1.0, "wrong": 1.1, "nan": math.nan}[name]

    def check(name: str, value: float) -> str:
        return "" if abs(value - 1) <= 0.01 else f"{value} is not 1"

    runs = {name: lambda name=name: run(name) for name in calls}
    found = interleaved(runs, check, Steps(), 0.0, (5, 5))
    assert found["wrong"] == Refused("1.1 is not 1")
    assert found["nan"] == Refused("nan is not 1")
    assert found["raises"] == Refused("RuntimeError: out of memory")
    assert found["asserts"].reason.startswith("AssertionError")
    assert len(found["right"]) == 5
    assert calls == {"right": 1 + 1 + 5, "wrong": 1, "nan": 1, "raises": 1, "asserts": 1}
    assert refused(ValueError()) == Refused("ValueError")


def test_ratios_are_taken_within_rounds() -> None:
    """The machine halves its speed: medians would say 1, each round says 2."""
    times = {"base": [1.0, 1.0, 2.0], "other": [2.0, 2.0, 4.0], "bad": Refused("no")}
    found = with_ratios(times, bytes=3)
    assert found["other"] == {"times": [2.0, 2.0, 4.0], "ratio": 2.0, "bytes": 3}
    assert found["base"]["ratio"] == 1.0
    assert found["bad"] == Refused("no")
    # medians would say 1.1
    drifting = with_ratios({"base": [1.0, 3.0, 8.0], "other": [2.0, 3.3, 10.0]})
    assert drifting["other"]["ratio"] == pytest.approx(1.25)


# ---- networks


def test_a_network_with_a_wrong_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module) -> nn.Module:
        model.features.denseblock1.denselayer2.conv1.weight.register_hook(lambda g: 1.5 * g)
        return model

    peers = {
        name: variants.VARIANTS[name]
        for name in ("torchvision", "checkpointed layers", "memdense", "memdense without extension")
    }
    peers["wrong"] = variants.Variant(variants.torchvision_model, wrong)
    monkeypatch.setattr(variants, "VARIANTS", peers)
    found = variants.measure(TINY, list(peers), 0.0)
    wrong_one = found.pop("wrong")
    assert isinstance(wrong_one, Refused) and "denselayer2.conv1" in wrong_one.reason
    for name, record in found.items():
        assert len(record["times"]) == 3 and min(record["times"]) > 0, name
        assert 0 < record["kept bytes"] < record["peak bytes"], name
    assert found["torchvision"]["ratio"] == 1
    assert found["memdense"]["peak bytes"] < found["torchvision"]["peak bytes"]
    assert found["checkpointed layers"]["kept bytes"] < found["torchvision"]["kept bytes"]


def test_a_network_that_raises_costs_only_its_own_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of Triton's compiler, say, which is none of Python's own kinds."""

    class Failure(Exception):
        pass

    def fail(*_: object) -> None:
        raise Failure("does not fit")

    def in_the_check(model: nn.Module) -> nn.Module:
        model.classifier.register_forward_hook(fail)
        return model

    def weigh(run, *rest) -> tuple[int, int]:
        return fail() if run.args == ("unweighed",) else (2, 1)

    plain = variants.VARIANTS["torchvision"]
    peers = {name: plain for name in ("torchvision", "unweighed", "other")}
    peers["built"] = variants.Variant(fail)
    peers["checked"] = variants.Variant(variants.torchvision_model, in_the_check)
    monkeypatch.setattr(variants, "VARIANTS", peers)
    monkeypatch.setattr(variants, "weigh", weigh)
    found = variants.measure(TINY, list(peers), 0.0)
    for name in ("unweighed", "built", "checked"):
        assert found.pop(name) == Refused("Failure: does not fit"), name
    assert found.keys() == {"torchvision", "other"}
    assert all(len(r["times"]) == 3 and r["peak bytes"] == 2 for r in found.values())


def test_networks_are_checked_without_tf32(
    monkeypatch: pytest.MonkeyPatch, float32_precision: Callable[[str], None]
) -> None:
    """And timed as they would run."""
    float32_precision("tf32")
    seen = []

    def watch(model: nn.Module) -> nn.Module:
        convolution = torch.backends.cudnn.conv
        model.register_forward_hook(lambda *_: seen.append(convolution.fp32_precision))
        return model

    plain = variants.VARIANTS["torchvision"]
    watched = variants.Variant(variants.torchvision_model, watch)
    monkeypatch.setattr(variants, "VARIANTS", {"torchvision": plain, "watched": watched})
    variants.measure(TINY, ["torchvision", "watched"], 0.0)
    assert seen[0] == "ieee" and {*seen[1:]} == {"tf32"}


def test_errors_are_judged_beside_the_plain_modules() -> None:
    names = "output", "all Conv2d.weight gradients", "gradient of conv0.weight"
    plain = dict(zip(names, (1e-7, 1e-3, 0.2), strict=True))
    assert variants.complaint(plain, plain) == ""
    for name, wrong, right in zip(names, (2e-4, 0.2, 0.9), (9e-5, 0.09, 0.7), strict=True):
        assert variants.complaint(plain | {name: right}, plain) == ""
        assert variants.complaint(plain | {name: wrong}, plain).startswith(name)
        assert variants.complaint(plain | {name: math.nan}, plain).startswith(name)


@pytest.mark.parametrize("wrong", [1.2, math.nan])
def test_a_wrong_output_is_refused_in_inference(monkeypatch, wrong: float) -> None:
    def scaled(model: nn.Module) -> nn.Module:
        model.classifier.register_forward_hook(lambda m, args, out: out * wrong)
        return model

    peers = {"torchvision": variants.VARIANTS["torchvision"]}
    peers["wrong"] = variants.Variant(variants.torchvision_model, scaled)
    monkeypatch.setattr(variants, "VARIANTS", peers)
    setting = variants.replace(TINY, inference=True)
    found = variants.measure(setting, list(peers), 0.0)
    assert isinstance(found["wrong"], Refused)
    assert found["torchvision"]["times"] and found["torchvision"]["kept bytes"] == 0


# ---- kernels


@pytest.mark.parametrize("case", primitives.cases(2, quick=True), ids=lambda case: case.primitive)
def test_every_primitive_agrees_with_pytorch_in_both_layouts(case: primitives.Case) -> None:
    """In float64, where agreement is agreement."""
    found = kernels.measure_case(case, torch.float64, CPU, Clock(CPU), 0.0)
    assert {type(record) for record in found.values()} == {dict}, found
    assert {"PyTorch, nchw", "PyTorch, channels last", "memdense, reference"} <= set(found)


def test_the_cases_are_all_primitives() -> None:
    ours = [name for name in vars(Reference) if not name.startswith("_")]
    bands = {"CPU_BAND_BYTES", "BAND_BYTES", "row_bands", "image_bands"}
    others = {"name", "dtypes", "call", "cast", "update_running"}
    assert set(primitives.PRIMITIVES) == set(ours) - bands - others
    for every in (False, True):
        found = {case.primitive for case in primitives.cases(1, every)}
        assert found == set(primitives.PRIMITIVES)


@pytest.mark.parametrize("wrong", [1.0, math.nan])
def test_a_wrong_kernel_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    class Wrong(Reference):
        def bn_relu(self, x: Tensor, read, relu: bool) -> Tensor:
            out = super().bn_relu(x, read, relu)
            out[-1, -1] += wrong
            return out

    monkeypatch.setattr(kernels, "backends", lambda _: {"wrong": Wrong(), "right": Reference()})
    case = next(c for c in primitives.cases(2, quick=True) if c.primitive == "bn_relu")
    found = kernels.measure_case(case, torch.float32, CPU, Clock(CPU), 0.0)
    assert isinstance(found["memdense, wrong"], Refused)
    assert isinstance(found["memdense, right"], dict)


@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_the_plain_convolution_is_checked_too(dilation: int) -> None:
    shape = 2, 16, 8, 11
    torch.use_deterministic_algorithms(False)
    found = kernels.measure_convolution(shape, dilation, torch.float64, CPU, Clock(CPU), 0.0)
    assert {type(record) for record in found.values()} == {dict}, found
    assert len(found) == 5
    assert not torch.are_deterministic_algorithms_enabled()
    x, out, weight = 2 * 16 * 121, 2 * 8 * 121, 8 * 16 * 9
    assert found["memdense"]["bytes"] == 8 * 2 * (x + out + weight)
    assert found["memdense"]["flop"] == 3 * 2 * 9 * 16 * 8 * 2 * 121


# M, C, B or k, bytes and FLOP as docs/roofline.md counts them, vectors apart
M, C, B, K, SMALL = 2 * 9 * 9, 48, 128, 32, 2 * 4 * 4
COUNTED = {
    "bn_relu_conv1x1": (M * C + B * C + M * B, 2 * M * B * C),
    "bn_relu_conv1x1_backward": (2 * M * B + 3 * M * C + 2 * B * C, 4 * M * B * C),
    "bn_relu_conv3x3": (M * B + M * K + 9 * B * K, 18 * M * B * K),
    "bn_relu_conv3x3_backward": (2 * M * B + M * K + 18 * B * K, 36 * M * B * K),
    "settle": (3 * M * K, 0),
    "pack": (2 * M * 8, 0),
    "bn_relu_pool_conv1x1": (M * 32 + SMALL * 16 + 16 * 32, 0.5 * M * 16 * 32),
    "bn_relu_pool_conv1x1_backward": (3 * M * 32 + SMALL * 16 + 2 * 16 * 32, M * 16 * 32),
    "bn_relu": (2 * 18 * 64, 0),
    "bn_relu_backward": (4 * 18 * 64, 0),
    "bn_relu_mean": (18 * 64 + 2 * 64, 0),
    "bn_relu_mean_backward": (3 * 18 * 64 + 2 * 64, 0),
    "statistics": (200 * 16, 0),
    "bn_relu_maxpool": (200 * 16 + 50 * 16 + 50 * 16 / 4, 0),
    "bn_relu_maxpool_sums": (200 * 16 + 50 * 16 + 50 * 16 / 4, 0),
    "bn_relu_maxpool_backward": (2 * 200 * 16 + 50 * 16 + 50 * 16 / 4, 0),
}


@pytest.mark.parametrize("case", primitives.cases(2, quick=True), ids=lambda case: case.primitive)
def test_bytes_and_flop_are_those_of_the_formulas(case: primitives.Case) -> None:
    arguments = case.arguments(primitives.Draw(CPU, torch.float32))
    result = getattr(Reference(), case.primitive)(**arguments)
    counted = primitives.cost(case.primitive, arguments, result)
    values, flop = COUNTED[case.primitive]
    # at most: four of each norm, what they sum, S1 and S2 in and out
    vectors = 16 * max(C, B)
    assert 0 <= counted.bytes / 4 - values <= vectors
    assert counted.flop == flop


def test_the_floor_is_the_larger_of_the_two() -> None:
    ceiling = Ceilings(bandwidth=100.0, arithmetic=1000.0)
    assert ceiling.floor(200, 1000) == 2.0
    assert ceiling.floor(200, 3000) == 3.0


def test_a_profile_sees_every_primitive_of_a_step() -> None:
    chosen = ops.backend_for
    model = variants.memdense_model(TINY.arch)
    with primitives.Profile(Clock(CPU), count=True) as profile:
        variants.step(model, *variants.inputs(TINY), TINY)
    assert ops.backend_for is chosen
    calls = [name for name, _ in profile.costs]
    layers = sum(TINY.arch.blocks)
    assert calls.count("bn_relu_conv3x3") == calls.count("bn_relu_conv3x3_backward") == layers
    assert calls.count("bn_relu_conv1x1") == 2 * layers  # and once more in backward
    assert calls.count("settle") == layers + len(TINY.arch.blocks)
    assert sum(profile.seconds().values()) > 0
    # the first layer's bottleneck: 8 channels at 32 x 32 to 16
    first = next(cost for name, cost in profile.costs if name == "bn_relu_conv1x1")
    assert first.flop == 2 * 2 * 32 * 32 * 8 * 16


def test_a_slice_of_a_wider_buffer_counts_as_the_slice() -> None:
    case = primitives.settle(Geometry(1, 3, 3), 4, 100)
    arguments = case.arguments(primitives.Draw(CPU, torch.float32))
    assert arguments["g"].stride() == (100, 1)
    counted = primitives.cost("settle", arguments, torch.empty(9, 4))
    assert counted.bytes == 4 * (3 * 9 * 4 + 3 * 4)


# ---- fits


def test_a_line_and_a_power_are_found() -> None:
    fit = growth.fit_line([1, 2, 4, 8], [5 + 3 * x for x in (1, 2, 4, 8)])
    assert fit == pytest.approx((3, 5, 1))
    fit = growth.fit_power([40, 64, 100, 262], [3 * x**1.7 for x in (40, 64, 100, 262)])
    assert fit.slope == pytest.approx(1.7) and fit.r2 == pytest.approx(1)
    noisy = growth.fit_line([1, 2, 3, 4], [1, 3, 2, 4])
    assert noisy == pytest.approx((0.8, 0.5, 0.64))
    with pytest.raises(ValueError, match="two points"):
        growth.fit_line([2, 2], [1, 3])


def test_the_largest_batch_is_the_last_that_fits() -> None:
    line = growth.Fit(slope=10.0, intercept=7.0, r2=1.0)
    for budget in range(60, 200):
        batch = growth.largest_batch(line, image=2.0, fixed=50.0, budget=budget)
        assert 50 + 7 + 12 * batch <= budget < 50 + 7 + 12 * (batch + 1)
    assert growth.largest_batch(line, 2.0, 50.0, budget=10) == 0


def test_fixed_bytes_are_three_times_the_parameters_and_the_buffers() -> None:
    arch = variants.ARCHS["densenet121"]
    model = variants.memdense_model(arch)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert growth.fixed_bytes(arch) == 12 * 7_978_856 + buffers


# ---- report and comparison


def record(group: str, variant: str, times: list[float], **about: object) -> dict:
    return {
        "group": group,
        "name": f"{group}: {variant}",
        "stats": {"data": times},
        "extra_info": {"variant": variant, **about},
    }


def made_results(scale: float = 1.0, device: str = "A Device") -> dict:
    """A run as the suite writes it, small and made up; ``scale`` slows memdense's step."""
    benchmarks = []
    for arch, mb in (("densenet121", 100), ("densenet169", 150)):
        group = f"{arch} training step, 224 x 224, float32, batch 4"
        about = {"kind": "training", "arch": arch, "batch": 4, "size": 224}
        for name, time, share in (("torchvision", 2.0, 1), ("memdense", 1.0 * scale, 10)):
            facts = {
                "ratio": time / 2,
                "peak bytes": 4e6 * mb / share,
                "kept bytes": 2e6 * mb / share,
            }
            benchmarks.append(record(group, name, [time, time * 1.1, time], **about, **facts))
    for name, time in (("PyTorch, nchw", 4e-3), ("PyTorch, channels last", 3e-3),
                       ("memdense, native", 2e-3), ("memdense, reference", 6e-3)):  # fmt: skip
        about = {"kind": "kernel", "primitive": "settle", "shape": "4 x 56x56, 32"}
        facts = {"bytes": 1e6, "flop": 0, "floor": 1e-3, "ratio": time / 4e-3}
        benchmarks.append(record("settle: 4 x 56x56, 32", name, [time] * 3, **about, **facts))
    for name, time in (("PyTorch, nchw", 4e-3), ("PyTorch, nchw, deterministic", 8e-3),
                       ("memdense", 2e-3)):  # fmt: skip
        about = {"kind": "convolution", "shape": "4 x 28x28, 128 -> 32", "dilation": 2}
        benchmarks.append(record("convolution", name, [time] * 3, **about, floor=1e-3))
    for axis, values, arch in (("depth", (40, 64, 100), "DenseNet-BC, growth rate 12"),
                               ("batch", (4, 6, 8), "densenet121")):  # fmt: skip
        for x in values:
            power = 2 if axis == "depth" else 1
            about = {"kind": "growth", "axis": axis, "value": x, "arch": arch, "size": 224}
            about |= {"batch": x if axis == "batch" else 4, "fixed bytes": 0}
            facts = {"peak bytes": (1 << 20) * x**power, "kept bytes": 1, "ratio": 1.0}
            group = f"growth with {axis}: {x}"
            benchmarks.append(record(group, "memdense", [1e-3 * x] * 2, **about, **facts))
    where = "where the time goes: memdense"
    facts = {"calls": 58, "bytes": 2e9, "flop": 3e9, "floor": 0.2, "share": 0.5}
    benchmarks.append(record(where, "bn_relu_conv1x1", [0.4] * 2, kind="profile", **facts))
    benchmarks.append(record(where, "step", [0.8] * 2, kind="profile", floor=0.2, share=1.0))
    left_out = {"densenet121 training step, 224 x 224, float32, batch 4": {"torch.compile": "slow"}}
    return {
        "machine_info": {"device": device, "threads": 2, "torch": "2.14", "commit": "abc"},
        "benchmarks": benchmarks,
        "memdense": {
            "ceilings": {"bandwidth": 1e10, "arithmetic": 3e11},
            "left out": left_out,
            "command": "python -m pytest benchmarks --benchmark-only",
        },
    }


def row_of(tables: list[report.Table], start: str) -> list[str]:
    """The row that begins so, without marks of bold and code."""
    rows = [[cell.strip("*`") for cell in row] for table in tables for row in table.rows]
    return next(row for row in rows if row[0].startswith(start))


def test_tables_say_what_the_results_hold() -> None:
    results = report.parse(made_results())
    (training, _) = report.steps(results, "training")
    ours = row_of([training], "memdense")
    assert ours == ["memdense", "0.50×", "1.00 s", "4.0", "10.0 MB", "5.0 MB", "1/10.0"]
    assert training.title.endswith("batch 4, 3 rounds")
    assert "torch.compile not measured: slow" in training.note
    assert row_of(report.summary(results), "densenet169")[2:] == [
        "0.50×", "150.0 MB", "15.0 MB", "3",
    ]  # fmt: skip
    kernel = row_of(report.kernels(results), "settle")
    assert kernel[1:] == ["4.00 ms", "3.00 ms", "6.00 ms", "2.00 ms", "1.50×", "1.00 ms", "50%",
                          "33%"]  # fmt: skip
    assert row_of(report.convolutions(results), "4 x")[1:] == ["4.00 ms", "8.00 ms", "2.00 ms",
                                                             "2.00×", "4.00×"]  # fmt: skip
    data = made_results()
    own = copy.deepcopy(next(b for b in data["benchmarks"] if b["group"] == "convolution"))
    own["extra_info"]["variant"] = "memdense, its own kernels"
    data["benchmarks"].append(own)
    assert row_of(report.convolutions(report.parse(data)), "4 x")[-1] == "4.00 ms"
    depth = row_of(report.growth(results), "depth")
    assert depth[1:5] == ["40 to 100", "memdense", "2.00 (1.000)", "1.00 (1.000)"]
    # 1 MiB and an image of 3 * 4 * 224^2 bytes each
    batches = row_of(report.capacity(results), "densenet121")
    assert batches[4] == f"{(16 << 30) // ((1 << 20) + 12 * 224**2):,}"
    profile = report.profile(results)
    figures = ["58", "400 ms", "50%", "3.0", "2.00", "200 ms", "50%"]
    assert row_of(profile, "bn_relu_conv1x1")[1:] == figures
    assert row_of(profile, "the rest")[2:4] == ["400 ms", "50%"]


def test_report_writes_a_page_and_fills_in_marked_sections(tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "results.json").write_text(json.dumps(made_results()))
    page = tmp_path / "README.md"
    page.write_text(
        "before\n<!-- begin cpu/headline -->\nold\nfigures\n<!-- end cpu/headline -->\nbetween\n"
        "<!-- begin cpu/plot step -->\n<!-- end cpu/plot step -->\n"
        "<!-- begin gpu/headline -->\nanother's\n<!-- end gpu/headline -->\nafter\n"
    )
    out = tmp_path / "docs" / "cpu"
    given = [str(tmp_path / "results.json"), "--out", str(out), "--into", str(page)]
    monkeypatch.setattr(sys, "argv", ["report.py", *given])
    report.main()
    for name in ("step", "depth", "floors"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    text = (out / "results.md").read_text()
    for part in ("| **memdense** | **0.50×** |", "](floors.png)", "## Largest batch", "A Device"):
        assert part in text
    filled = page.read_text()
    assert "old" not in filled and "| **memdense** | **0.50×** |" in filled
    assert "![Time against peak memory of a training step](docs/cpu/step.png)" in filled
    assert "<!-- begin gpu/headline -->\nanother's\n<!-- end gpu/headline -->" in filled
    assert filled.startswith("before\n<!-- begin cpu/headline -->\n") and filled.endswith("after\n")
    report.main()
    assert page.read_text() == filled


def test_a_marker_without_results_is_an_error() -> None:
    text = "<!-- begin cpu/kernels -->\n<!-- end cpu/kernels -->\n"
    with pytest.raises(KeyError, match="kernels"):
        report.fill_in(text, "cpu", {"headline": "x"})


def run_compare(monkeypatch, tmp_path: Path, new: dict, *flags: str) -> int:
    for name, data in (("old", made_results()), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    paths = [str(tmp_path / f"{name}.json") for name in ("old", "new")]
    monkeypatch.setattr(sys, "argv", ["compare.py", *paths, *flags])
    return compare.main()


@pytest.mark.parametrize(("scale", "status"), [(1.0, 0), (1.04, 0), (1.06, 1), (0.5, 0)])
def test_a_regression_beyond_five_per_cent_is_marked(
    tmp_path, monkeypatch, capsys, scale: float, status: int
) -> None:
    assert run_compare(monkeypatch, tmp_path, made_results(scale)) == status
    printed = capsys.readouterr().out
    assert printed.count("REGRESSION") == (2 if scale == 1.06 else 0)
    assert printed.count("better") == (2 if scale == 0.5 else 0)
    if status:
        assert "+6.0 %" in printed


def test_more_memory_is_a_regression_too(tmp_path, monkeypatch, capsys) -> None:
    worse = made_results()
    worse["benchmarks"][1]["extra_info"]["peak bytes"] *= 1.2
    assert run_compare(monkeypatch, tmp_path, worse) == 1
    assert "peak" in capsys.readouterr().out
    assert run_compare(monkeypatch, tmp_path, worse, "--limit", "25") == 0


def test_different_devices_are_not_compared_unless_asked(tmp_path, monkeypatch, capsys) -> None:
    other = made_results(2.0, device="Another Device")
    assert run_compare(monkeypatch, tmp_path, other) == 2
    assert "Another Device" in capsys.readouterr().err
    assert run_compare(monkeypatch, tmp_path, other, "--across-devices") == 1
    del other["benchmarks"][:]
    assert run_compare(monkeypatch, tmp_path, other, "--across-devices") == 2


# ---- end to end


def test_the_suite_runs_and_gives_pytest_benchmark_its_interleaved_times(tmp_path) -> None:
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "results.json"
    wanted = "(primitive and settle) or (test_step and bc100-12 and training)"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--quick", "-q",
               "-k", wanted, f"--benchmark-json={path}"]  # fmt: skip
    # a worker of xdist would be told not to measure
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(path.read_text())
    assert data["machine_info"]["torch"] == torch.__version__
    assert data["memdense"]["ceilings"]["bandwidth"] > 0
    assert "--quick" in data["memdense"]["command"]
    step = {b["extra_info"]["variant"] for b in data["benchmarks"] if "step" in b["group"]}
    assert {"torchvision", "memdense"} <= step
    by = {b["extra_info"]["variant"]: b for b in data["benchmarks"] if "settle" in b["group"]}
    assert {"PyTorch, nchw", "PyTorch, channels last", "memdense, reference"} <= set(by)
    base = by["PyTorch, nchw"]["stats"]["data"]
    for b in by.values():
        assert len(b["stats"]["data"]) == len(base) >= 3
        ratios = sorted(x / y for x, y in zip(b["stats"]["data"], base, strict=True))
        assert b["extra_info"]["ratio"] == pytest.approx(ratios[len(ratios) // 2], rel=1e-6)
        assert 0 < b["extra_info"]["floor"] < 1
    assert "Primitives" in done.stdout and "bc100-12 training step" in done.stdout


def test_the_hosts_part_is_measured_without_a_gpu_too() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "benchmarks/host.py", "--rounds", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("│") for line in done.stdout.splitlines() if "742" in line]
    times = {row[1].strip(): float(row[3]) for row in rows}
    assert times.keys() == {"replayed", "launch by launch"} and min(times.values()) > 1


def test_a_timelines_kernels_meet_their_layers() -> None:
    """Kernels that take twice their layer's floor, in the order of a step, are at half of it."""
    import timeline
    from variants import ARCHS, Setting

    device = torch.device("cuda")
    setting = Setting(ARCHS["densenet121"], "densenet121", 8, 224, torch.bfloat16, device)
    bandwidth, layers = 3e12, timeline.layers(setting)
    assert [(y.block, y.m, y.c) for y in (layers[0], layers[6], layers[-1])] == [
        (1, 8 * 56 * 56, 64), (2, 8 * 28 * 28, 128), (4, 8 * 7 * 7, 992),
    ]  # fmt: skip
    kernels = []
    spelled = {
        "1x1 forward": "forward_1x1", "1x1 recompute": "forward_1x1",
        "norm behind it": "normalise_rows", "1x1 gradients": "gradients_1x1",
        "3x3 forward": "void convolve<BFloat16Kind, 32, (memdense::conv3x3::Mode)1>(Convolution)",
        "3x3 input gradient": "input_gradient_3x3",
        "3x3 weight gradient": "void memdense::conv3x3::weight_gradient<BFloat16Kind, 32>(W)",
    }  # fmt: skip
    for family in timeline.families(len(layers)):
        for layer in reversed(layers) if family.backwards else layers:
            size, flop = family.cost(layer)
            time = 2e6 * max(size / bandwidth, flop / family.rate)
            kernels.append(timeline.Kernel(spelled[family.what], 0.0, time, None))
    rows = list(timeline.shares(kernels, setting, bandwidth))
    assert len(rows) == 4 * len(spelled) and {row[-1] for row in rows} == {"50%"}


def test_a_step_launches_every_family_of_a_timeline_once_a_layer() -> None:
    """Others would be missing from the table."""
    pytest.importorskip("triton")
    import aot
    import timeline

    from memdense.backends.triton.launch import recorded

    with recorded(dry=True) as launches, torch.no_grad():
        aot.densenet121(torch.bfloat16)
    names = [launch.plan.name for launch in launches]
    layers = sum(variants.ARCHS["densenet121"].blocks)
    for family in timeline.families(layers):
        found = [name for name in names if re.search(family.pattern, name)][family.part]
        assert len(found) == layers, family.what


def test_a_trace_is_of_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies count too; where the profiler may not see the GPU, it says so."""
    import timeline

    class Profiler:
        def __init__(self, activities: list) -> None:
            pass

        def __enter__(self) -> "Profiler":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def export_chrome_trace(self, path: str) -> None:
            Path(path).write_text(json.dumps({"traceEvents": events}))

    done: list[int] = []
    events = [
        {"ph": "M", "name": "process_name"},
        {"cat": "cpu_op", "name": "a", "ts": 0, "dur": 9},
    ]
    monkeypatch.setattr(timeline, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append(-1))
    with pytest.raises(SystemExit, match="no kernels"):
        timeline.trace(lambda: done.append(1))
    assert done == [1] * timeline.STEPS + [-1]
    for step in reversed(range(timeline.STEPS)):
        kernel = {"cat": "kernel", "name": f"k{step}", "ts": 10 * step, "dur": 2}
        events.append(kernel | {"args": {"grid": [4, 1, 1]}})
        events.append({"cat": "gpu_memcpy", "name": "c", "ts": 10 * step + 3, "dur": 1, "args": {}})
    found = timeline.trace(lambda: None)
    last = 10.0 * (timeline.STEPS - 1)
    assert found == [("k2", last, 2, [4, 1, 1]), ("c", last + 3, 1, None)]
    assert timeline.as_rows(found)["kernels"] == [[1, 0.0, 2, [4, 1, 1]], [0, 3.0, 1, None]]
