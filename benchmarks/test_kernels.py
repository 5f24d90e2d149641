"""Each primitive against PyTorch's separate operations and its floor; the dilated convolution."""

from functools import cache
from typing import Any

import pytest
from kernels import DILATIONS, convolutions, measure_case, measure_convolution
from measure import Clock, Refused, ceilings
from options import Options, options_of
from primitives import LAYOUTS, OWN, Case, backends, cases, chooses_cudnn

SECONDS = 1.0
PEERS = [f"PyTorch, {layout}" for layout in LAYOUTS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = options_of(metafunc.config)
    if "case" in metafunc.fixturenames:
        cuda = options.device.type == "cuda"
        batch = options.batch or (1 if options.quick else 64 if cuda else 4)
        found = cases(batch, quick=options.quick)
        metafunc.parametrize("case", found, ids=[f"{c.primitive}: {c.shape}" for c in found])
        ours = [f"memdense, {backend}" for backend in backends(options.device)]
        metafunc.parametrize("variant", PEERS + ours)
    elif "shape" in metafunc.fixturenames:
        shapes = convolutions(options.device, options.quick)
        metafunc.parametrize("shape", shapes, ids=str)
        metafunc.parametrize("dilation", DILATIONS)
        variants = PEERS + [f"{peer}, deterministic" for peer in PEERS] + ["memdense"]
        if chooses_cudnn(options.device, options.dtype):
            variants.append(OWN)
        metafunc.parametrize("variant", variants)


@cache
def clock(options: Options) -> Clock:
    return Clock(options.device, cold=not options.quick)


@cache
def measured(case: Case, options: Options) -> dict[str, Any]:
    seconds = 0.0 if options.quick else SECONDS
    records = measure_case(case, options.dtype, options.device, clock(options), seconds)
    return with_floor(records, options)


@cache
def measured_convolution(
    shape: tuple[int, int, int, int], dilation: int, options: Options
) -> dict[str, Any]:
    common = options.dtype, options.device, clock(options), 0.0 if options.quick else SECONDS
    return with_floor(measure_convolution(shape, dilation, *common), options)


def with_floor(records: dict[str, Any], options: Options) -> dict[str, Any]:
    ceiling = ceilings(options.device, options.dtype, options.quick)
    for record in records.values():
        if not isinstance(record, Refused):
            record["floor"] = ceiling.floor(record["bytes"], record["flop"])
    return records


def name(options: Options) -> str:
    return str(options.dtype).removeprefix("torch.")


def test_primitive(options, give, case: Case, variant: str) -> None:
    about = {"kind": "kernel", "primitive": case.primitive, "shape": case.shape}
    record = measured(case, options)[variant]
    give(f"{case.primitive}: {case.shape}, {name(options)}", variant, record, **about)


def test_dilated_convolution(options, give, shape, dilation: int, variant: str) -> None:
    n, c, k, side = shape
    label = f"{n} x {side}x{side}, {c} -> {k}"
    record = measured_convolution(shape, dilation, options)[variant]
    about = {"kind": "convolution", "shape": label, "dilation": dilation}
    group = f"convolution, forward + backward: {label}, dilation {dilation}, {name(options)}"
    give(group, variant, record, **about)
