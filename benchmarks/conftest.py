"""Options of the suite, and the way from times that were taken side by side to pytest-benchmark."""

import shlex
from collections.abc import Callable
from typing import Any

import pytest
import report
import torch
from measure import Refused, ceilings, default_device, describe
from options import Options, options_of
from rich.console import Console
from variants import ARCHS


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("memdense benchmarks")
    group.addoption("--quick", action="store_true", help="tiny: does everything run?")
    group.addoption("--arch", action="append", choices=ARCHS, help="only this; may be repeated")
    group.addoption("--batch", type=int, help="of every network; default: as fits the machine")
    group.addoption("--size", type=int, help="side of ImageNet networks' images; default: 224")
    group.addoption("--dtype", choices=("float32", "bfloat16", "float16"),
                    help="default: float32 on a CPU, bfloat16 (autocast) on a GPU")  # fmt: skip
    group.addoption("--device", type=torch.device, default=default_device())
    group.addoption("--compile", action="append", choices=(*ARCHS, "none"),
                    help="torch.compile this network too, which takes minutes; may be repeated; "
                    "default: densenet121 on a GPU, none on a CPU")  # fmt: skip
    group.addoption("--seconds", type=float, default=10.0, help="for the rounds of a network")


RECORDS = pytest.StashKey[list[dict[str, Any]]]()
LEFT_OUT = pytest.StashKey[dict[str, dict[str, str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS], config.stash[LEFT_OUT] = [], {}
    if config.getoption("benchmark_columns", None) is None:
        config.option.benchmark_columns = ["min", "median", "iqr", "rounds"]


@pytest.fixture(scope="session")
def options(pytestconfig: pytest.Config) -> Options:
    found = options_of(pytestconfig)
    if found.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes do not change: let every variant profit
    return found


_now = 0.0


def measured_clock() -> float:
    """A clock that only measured times move: pytest-benchmark would time variants one after
    another; ours were taken side by side before, and it is given those.
    """
    return _now


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=measured_clock))


@pytest.fixture
def give(benchmark: Any, pytestconfig: pytest.Config) -> Callable[..., None]:
    """``give(group, variant, record, **about)``: one variant's measured times and facts."""

    def give(group: str, variant: str, record: dict[str, Any] | Refused, **about: Any) -> None:
        if isinstance(record, Refused):
            pytest.fail(f"{group}: {variant} is not timed. {record.reason}", pytrace=False)
        times = iter(record["times"])

        def advance() -> None:
            global _now
            _now += next(times)

        facts = {key: value for key, value in record.items() if key != "times"}
        benchmark.group = group
        benchmark.extra_info |= {"variant": variant, **about, **facts}
        benchmark.pedantic(advance, rounds=len(record["times"]))
        pytestconfig.stash[RECORDS].append(
            report.record_of(group, record["times"], benchmark.extra_info)
        )

    return give


@pytest.fixture
def leave_out(pytestconfig: pytest.Config) -> Callable[[str, str, str], None]:
    """``leave_out(group, variant, why)``: skip, and have the table say so."""

    def leave_out(group: str, variant: str, why: str) -> None:
        pytestconfig.stash[LEFT_OUT].setdefault(group, {})[variant] = why
        pytest.skip(why)

    return leave_out


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return describe(config.getoption("--device"))


def about_run(config: pytest.Config) -> dict[str, Any]:
    options = options_of(config)
    ceiling = ceilings(options.device, options.dtype, options.quick)
    return {
        "ceilings": ceiling._asdict(),
        "left out": config.stash[LEFT_OUT],
        "command": "python -m pytest " + shlex.join(map(str, config.invocation_params.args)),
    }


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["memdense"] = about_run(config)


def pytest_terminal_summary(config: pytest.Config) -> None:
    if not config.stash[RECORDS]:
        return
    results = report.Results(
        describe(config.getoption("--device")), config.stash[RECORDS], **{
            key.replace(" ", "_"): value for key, value in about_run(config).items()
        },
    )  # fmt: skip
    console = Console(width=150)
    for table in report.all_tables(results):
        console.print(report.as_rich(table))
