"""Peak memory and time of a training step against depth, batch and resolution."""

from functools import cache
from typing import Any

import pytest
from growth import GROWN, Point, fixed_bytes, points
from options import options_of
from variants import measure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = options_of(metafunc.config)
    found = points(options.device, options.dtype, options.quick)
    ids = [f"{p.axis}-{p.setting.name}-{p.value}" for p in found]
    metafunc.parametrize("point", found, ids=ids)
    metafunc.parametrize("variant", GROWN)


@cache
def measured(point: Point, seconds: float) -> dict[str, Any]:
    return measure(point.setting, GROWN, seconds, least=2)


def test_growth(options, give, point: Point, variant: str) -> None:
    axis, value, setting = point
    about = {"kind": "growth", "axis": axis, "value": value}
    about |= {"batch": setting.batch, "size": setting.size}
    # depth is a family of networks, the others one network each
    about |= {"arch": "DenseNet-BC, growth rate 12" if axis == "depth" else setting.name}
    about |= {"fixed bytes": fixed_bytes(setting.arch)}
    record = measured(point, options.seconds / 10)[variant]
    give(f"growth with {axis}: {setting}", variant, record, **about)
