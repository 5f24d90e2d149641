"""Training step and inference of whole networks, and where a training step's time goes."""

import statistics
from collections import Counter
from functools import cache
from typing import Any

import pytest
from measure import Clock, ceilings
from options import options_of
from primitives import PRIMITIVES, Profile
from variants import Setting, inputs, left_out, measure, memdense_model, names, step


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "setting" in metafunc.fixturenames:
        options = options_of(metafunc.config)
        found = [
            (setting, variant)
            for name in options.archs
            for setting in (options.setting(name, False), options.setting(name, True))
            for variant in names(setting)
        ]
        what = {False: "training", True: "inference"}
        ids = [f"{setting.name}-{what[setting.inference]}-{variant}" for setting, variant in found]
        metafunc.parametrize(("setting", "variant"), found, ids=ids)


@cache
def measured(setting: Setting, compiled: tuple[str, ...], seconds: float) -> dict[str, Any]:
    chosen = [name for name in names(setting) if not left_out(name, setting, compiled)]
    # the README's first table is medians of more than three
    headline = setting.name == "densenet121" and not setting.inference
    return measure(setting, chosen, seconds, least=5 if headline else 3)


def test_step(options, give, leave_out, setting: Setting, variant: str) -> None:
    if why := left_out(variant, setting, options.compiled):
        leave_out(str(setting), variant, why)
    seconds = options.seconds / 2 if setting.inference else options.seconds
    records = measured(setting, options.compiled, seconds)
    about = {"kind": "inference" if setting.inference else "training", "arch": setting.name}
    size = {"batch": setting.batch, "size": setting.size}
    give(str(setting), variant, records[variant], **about, **size)


@cache
def profile(setting: Setting, quick: bool) -> dict[str, Any]:
    """Seconds of each primitive, and of the whole, in each of several steps; what they cost."""
    model, clock = memdense_model(setting.arch).to(setting.device), Clock(setting.device)
    x, target = inputs(setting)
    ceiling = ceilings(setting.device, setting.dtype, quick)
    with Profile(clock, count=True) as counting:
        step(model, x, target, setting)
    found: dict[str, Any] = {}
    for name, cost in counting.costs:
        record = found.setdefault(name, Counter(bytes=0, flop=0, floor=0, calls=0))
        record.update(bytes=cost.bytes, flop=cost.flop, floor=ceiling.floor(*cost), calls=1)
    found = {name: {"times": [], **facts} for name, facts in found.items()}
    whole = {"times": [], "floor": sum(record["floor"] for record in found.values())}
    for _ in range(2 if quick else 7):
        with Profile(clock) as profiled:
            whole["times"].append(clock.time(lambda: step(model, x, target, setting)))
        for name, seconds in profiled.seconds().items():
            found[name]["times"].append(seconds)
    return {**found, "step": whole}


@pytest.mark.parametrize("primitive", [*PRIMITIVES, "step"])
def test_profile(options, give, primitive: str) -> None:
    setting = options.setting("densenet121", inference=False)
    records = profile(setting, options.quick)
    if primitive not in records:
        pytest.skip("not in this network")
    record = records[primitive]
    whole = statistics.median(records["step"]["times"])
    share = statistics.median(record["times"]) / whole
    group = f"where the time goes: memdense, {setting}"
    give(group, primitive, record, kind="profile", share=share)
