"""Options of the suite, and the way from times that were taken side by side to pytest-benchmark."""

import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import report
import torch
from measure import Refused, ceilings, default_device, describe
from rich.console import Console
from variants import ARCHS, Setting


@dataclass(frozen=True)
class Options:
    device: torch.device
    dtype: torch.dtype
    quick: bool
    compile: str
    archs: tuple[str, ...]
    batch: int | None
    size: int | None
    seconds: float

    def setting(self, name: str, inference: bool) -> Setting:
        """What is run of a network; batch and size as fit the machine unless they were given."""
        arch = ARCHS[name]
        size = arch.size
        if self.quick and not arch.small_inputs:
            size = 64
        if self.size is not None and not arch.small_inputs:
            size = self.size
        batch = self.batch or self._batch(name, size)
        return Setting(arch, name, batch, size, self.dtype, self.device, inference)

    def _batch(self, name: str, size: int) -> int:
        if self.quick:
            return 2
        if self.device.type == "cpu":
            return 32 if ARCHS[name].small_inputs else 4 if name == "densenet121" else 2
        # the plain modules' float32 step in a third of the memory; a power of two
        memory = torch.cuda.get_device_properties(self.device).total_memory / 3
        image = 1e6 * ARCHS[name].megabytes_per_image * (size / ARCHS[name].size) ** 2
        return 1 << min(8, max(0, int(memory / image).bit_length() - 1))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("memdense benchmarks")
    group.addoption("--quick", action="store_true", help="tiny: does everything run?")
    group.addoption("--arch", action="append", choices=ARCHS, help="only this; may be repeated")
    group.addoption("--batch", type=int, help="of every network; default: as fits the machine")
    group.addoption("--size", type=int, help="side of ImageNet networks' images; default: 224")
    group.addoption("--dtype", choices=("float32", "bfloat16", "float16"),
                    help="default: float32 on a CPU, bfloat16 (autocast) on a GPU")  # fmt: skip
    group.addoption("--device", type=torch.device, default=default_device())
    group.addoption("--compile", choices=("auto", "all", "none"), default="auto",
                    help="torch.compile, which takes minutes: of one network, all, none")  # fmt: skip
    group.addoption("--seconds", type=float, default=10.0, help="for the rounds of a network")


def options_of(config: pytest.Config) -> Options:
    get = config.getoption
    quick, device = get("--quick"), get("--device")
    dtype = get("--dtype") or ("bfloat16" if device.type == "cuda" else "float32")
    return Options(
        device, getattr(torch, dtype), quick, "none" if quick else get("--compile"),
        tuple(get("--arch") or ARCHS), get("--batch"), get("--size"),
        0.5 if quick else get("--seconds"),
    )  # fmt: skip


RECORDS = pytest.StashKey[list[dict[str, Any]]]()
LEFT_OUT = pytest.StashKey[dict[str, dict[str, str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS], config.stash[LEFT_OUT] = [], {}
    if config.getoption("benchmark_columns", None) is None:
        config.option.benchmark_columns = ["min", "median", "iqr", "rounds"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "arch" in metafunc.fixturenames:
        metafunc.parametrize("arch", options_of(metafunc.config).archs)


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
        median = statistics.median(record["times"])
        pytestconfig.stash[RECORDS].append(
            {"group": group, "seconds": median, **benchmark.extra_info}
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
    console = Console(width=130)
    for table in report.all_tables(results):
        console.print(report.as_rich(table))
