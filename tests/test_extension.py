"""The C++ extension: its operation, its binary interface, and doing without it."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated import COMPILER, LANGUAGE
from torch.library import opcheck
from torch.utils import cpp_extension

from memdense import _extension, backends

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc" / "cpu").glob("*.cpp")]
LIBRARY = Path(_extension.__file__).with_name("_C.abi3.so")

built = pytest.mark.skipif(not _extension.available(), reason=_extension.reason())

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SHAPES = [(1, 1), (1, 37), (2, 64), (63, 65), (64, 64), (65, 7), (4099, 129), (9000, 12)]


def statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.memdense.channel_statistics(x)


def poisoned_slice(values: torch.Tensor) -> torch.Tensor:
    """The same values as a slice of a wider buffer that is NaN all around."""
    m, c = values.shape
    buffer = torch.full((m + 2, c + 11), torch.nan, dtype=values.dtype)
    buffer[1:-1, 5 : 5 + c] = values
    return buffer[1:-1, 5 : 5 + c]


def assert_exact(x: torch.Tensor) -> None:
    """mean within a rounding of |mean| + std, var within a few of itself; in float64, whose tiles
    are merged in its own precision, sixteen times that."""
    mean, var = statistics(x)
    exact = x.double().numpy().astype(np.longdouble)
    expected_mean = torch.from_numpy(exact.mean(0).astype(np.float64))
    expected_var = torch.from_numpy(exact.var(0).astype(np.float64))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    eps = torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)
    assert mean.dtype == var.dtype == dtype
    assert mean.shape == var.shape == x.shape[1:]
    mean_error = (mean.double() - expected_mean).abs()
    assert (mean_error <= eps * (expected_mean.abs() + expected_var.sqrt())).all()
    assert ((var.double() - expected_var).abs() <= 8 * eps * expected_var).all()


@pytest.mark.skipif(
    os.environ.get("MEMDENSE_BUILD") != "require", reason="MEMDENSE_BUILD=require is not set"
)
def test_required_extension_is_available():
    assert _extension.available(), _extension.reason()


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_match_float64(shape, dtype):
    torch.manual_seed(0)
    x = (torch.randn(shape) * torch.rand(shape[1]) * 3 + torch.randn(shape[1])).to(dtype)
    assert_exact(x)
    packed, sliced = statistics(x), statistics(poisoned_slice(x))
    assert torch.equal(packed[0], sliced[0])
    assert torch.equal(packed[1], sliced[1])


@built
def test_large_mean_does_not_cancel():
    torch.manual_seed(0)
    x = 1e4 + torch.randn(5000, 33)
    assert_exact(x)
    assert_exact(poisoned_slice(-x))
    # a first row far from the rest must not serve as the origin of the squares
    x = torch.randn(64, 33)
    x[0] = 3e3
    assert_exact(x)


@built
def test_constant_column_has_no_variance():
    mean, var = statistics(torch.full((1000, 5), 0.1))
    assert torch.equal(mean, torch.full((5,), 0.1))
    assert torch.equal(var, torch.zeros(5))
    mean, var = statistics(torch.full((1000, 5), 1e200, dtype=torch.float64))  # no square of it
    assert torch.equal(mean, torch.full((5,), 1e200, dtype=torch.float64))
    assert torch.equal(var, torch.zeros(5, dtype=torch.float64))


@built
def test_nan_stays_in_its_column():
    x = torch.randn(300, 70)
    x[17, 66] = torch.nan
    mean, var = statistics(x)
    assert mean.isnan().nonzero().tolist() == var.isnan().nonzero().tolist() == [[66]]


@built
def test_unusual_strides():
    row = torch.randn(1, 20)
    assert torch.equal(statistics(row.expand(50, 20))[0], row[0])  # row stride 0
    x = torch.randn(50, 20)
    assert torch.equal(statistics(x[:, 3::17][:, :1])[0], statistics(x[:, 3:4])[0])
    assert_exact(x[::3])
    assert_exact(torch.randn(20, 50).as_strided((19, 5), (3, 1)))  # rows overlap
    assert statistics(torch.empty(4, 0))[0].shape == (0,)


@built
def test_same_bits_for_any_number_of_threads():
    x = torch.randn(20011, 100, dtype=torch.float64)  # float32 results would hide the last bits
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.stack(statistics(x)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    x = torch.randn(70, 9).to(dtype)
    op = torch.ops.memdense.channel_statistics.default
    opcheck(op, (x,))
    opcheck(op, (poisoned_slice(x),))


@built
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(5), r"expected x of shape \[M, C\], got 1 dimension"),
        (torch.randn(2, 3, 4), r"expected x of shape \[M, C\], got 3 dimension"),
        (torch.randn(0, 3), r"expected at least one row, got shape \[0, 3\]"),
        (torch.randn(3, 4).t(), r"expected unit column stride, got strides \[1, 4\]"),
        (torch.ones(3, 4, dtype=torch.int64), "expected float32, float64 or bfloat16, got Long"),
        (torch.ones(3, 4).half(), "expected float32, float64 or bfloat16, got Half"),
    ],
)
def test_bad_input(x, message):
    with pytest.raises(RuntimeError, match=message):
        statistics(x)


@pytest.mark.skipif(sys.platform != "linux", reason="Clang builds it there")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_clang_takes_it(source):
    """As on a Mac, and warns of nothing: of vectors whose alignment it would assume, for one."""
    cindex = pytest.importorskip("clang.cindex")
    if not shutil.which(COMPILER):
        pytest.skip("no C++ compiler, whose headers it takes")
    directory = subprocess.run(
        [COMPILER, "-print-file-name=include"], capture_output=True, text=True, check=True
    ).stdout.strip()
    headers = [f"-isystem{path}" for path in (directory, *cpp_extension.include_paths())]
    flags = [*LANGUAGE, "-Wall", "-Wno-deprecated-declarations", *headers]
    unit = cindex.Index.create().parse(source, flags)
    found = [d for d in unit.diagnostics if d.severity >= cindex.Diagnostic.Warning]
    assert [str(d) for d in found] == []


@pytest.mark.parametrize("name", [LIBRARY.name, "_CUDA.abi3.so"])
def test_one_binary_for_every_python_and_torch(name):
    """Nothing is imported from C++ torch, CUDA or Python: only from torch's C interface."""
    library = LIBRARY.with_name(name)
    if not shutil.which("nm") or not library.exists():
        pytest.skip(f"nm is not installed, or {name} was not built")
    out = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-1].split("@")[0] for line in out.splitlines()]
    assert any(s.startswith("aoti_torch_") for s in symbols)
    assert [s for s in symbols if s.startswith(("cuda", "__cuda", "cu"))] == []
    if library == LIBRARY:  # which a torch without CUDA loads too
        assert [s for s in symbols if s.startswith("aoti_torch") and "stream" in s] == []
    unstable = ("at::", "c10::", "torch::", "caffe2::")
    names = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [n for n in names if any(space in n for space in unstable)] == []
    assert [s for s in symbols if s.lstrip("_").startswith("Py")] == []


@built
@pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("nm"),
    reason="looks for functions for x86-64 with nm",
)
def test_every_instruction_set_is_inside():
    """And we choose, not the loader, whom ATEN_CPU_CAPABILITY does not reach."""
    out = subprocess.run(["nm", LIBRARY], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-2:] for line in out.splitlines()]
    for way in ("run_avx2", "run_avx512"):
        kernels = [name for _, name in symbols if way in name and "TakeTile" in name]
        assert len(kernels) == 3, (way, kernels)  # one a dtype
    assert not [name for kind, name in symbols if kind == "i"]


def load_copy(directory: Path):
    """memdense/_extension.py as it behaves in another directory."""
    copy = shutil.copy(_extension.__file__, directory)
    spec = importlib.util.spec_from_file_location("extension_copy", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_missing_and_broken_library_are_reported(tmp_path):
    missing = load_copy(tmp_path)
    assert not missing.available()
    assert "not built" in missing.reason()
    assert "pip install --no-build-isolation" in missing.reason()
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    broken = load_copy(tmp_path)
    assert not broken.available()
    assert "failed to load _C.abi3.so" in broken.reason()


def test_missing_and_broken_cuda_kernels_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(_extension, "__file__", str(tmp_path / "_extension.py"))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA" in _extension._load_cuda()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "_CUDA.abi3.so is missing" in _extension._load_cuda()
    assert "with nvcc there too" in _extension._load_cuda()
    (tmp_path / "_CUDA.abi3.so").write_bytes(b"not a library")
    assert "failed to load _CUDA.abi3.so" in _extension._load_cuda()


@pytest.mark.skipif(not _extension.cuda_available(), reason=_extension.cuda_reason())
def test_cuda_kernels_of_older_sources_are_not_used(monkeypatch):
    assert _extension._load_cuda() == ""
    monkeypatch.setattr(_extension, "CUDA_OPERATIONS", ("bn_relu_conv3x3", "pack"))
    assert "built from older sources and lacks pack" in _extension._load_cuda()


def test_kernels_that_a_device_cannot_run(monkeypatch):
    """An old device; what was compiled for others, or a driver that is older than the compiler."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(_extension, "_cuda_reason", "")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(_extension, "unfit", lambda: "no kernel image is available")
    for capability, said in (
        ((7, 5), "they need compute capability 8.0, this device has 7.5"),
        ((8, 6), "they cannot run on this device: no kernel image is available"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert _extension.cuda_unfit.__wrapped__(device) == said
    monkeypatch.setattr(_extension, "unfit", lambda: "")
    assert _extension.cuda_unfit.__wrapped__(device) == ""
    monkeypatch.setattr(_extension, "_cuda_reason", "not built")
    assert _extension.cuda_unfit.__wrapped__(device) == "not built"


@pytest.mark.skipif(not _extension.cuda_available(), reason=_extension.cuda_reason())
def test_cuda_says_whether_kernels_can_run():
    assert bool(_extension.unfit()) != torch.cuda.is_available()


@pytest.mark.parametrize("built", [False, True])
def test_an_extension_of_no_use_is_told_of(built, monkeypatch):
    """One that was not built is not."""
    reason = "_C.abi3.so was built from older sources"
    monkeypatch.setattr(_extension, "_reason", reason)
    monkeypatch.setattr(_extension, "built", lambda: built)
    backends._say_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert type(backends.backend_for(torch.device("cpu"))) is backends.Reference
    expected = [f"memdense runs PyTorch's operations on cpu: {reason}"]
    assert [str(w.message) for w in said] == built * expected


def test_tf32_is_what_torch_says(float32_precision):
    for precision in ("ieee", "tf32"):
        float32_precision(precision)
        assert _extension.tf32() == (precision == "tf32")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what an installation needs, in a directory with a space in its name."""
    copy = tmp_path_factory.mktemp("a clone")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("csrc", "memdense"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    return copy


def run_python(source: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"CC": "/nonexistent", "CXX": "/nonexistent", "MEMDENSE_BUILD": "auto"}
    command = [sys.executable, *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, cwd=source, env=env | environment, **streams)


def test_installs_without_a_compiler(source, tmp_path):
    done = run_python(
        source,
        *("-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--target", str(tmp_path), "."),
    )
    assert done.returncode == 0, done.stdout
    assert "installing without the C++ extension" in done.stdout
    assert "/nonexistent" in done.stdout
    assert "pip install --no-build-isolation" in done.stdout
    assert (tmp_path / "memdense" / "py.typed").exists()
    assert not (tmp_path / "memdense" / "_C.abi3.so").exists()


def test_required_build_fails_without_a_compiler(source):
    done = run_python(source, "setup.py", "build_ext", MEMDENSE_BUILD="require")
    assert done.returncode != 0
    assert "MEMDENSE_BUILD=require" in done.stdout
    assert "/nonexistent" in done.stdout


def test_builds_without_torch(source, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('hidden by the test')")
    done = run_python(source, "setup.py", "build_ext", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert "torch is missing at build time (hidden by the test)" in done.stdout


def test_build_can_be_skipped(source, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = run_python(source, "setup.py", "build_ext", MEMDENSE_BUILD="0", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert "extension" not in done.stdout


def test_operations_are_those_of_the_schema_file():
    schemas = (ROOT / "csrc" / "ops.cpp").read_text()
    defined = re.findall(r'm\.def\(\s*"(\w+)\(', schemas)
    assert sorted(defined) == sorted(_extension.OPERATIONS)


@built
def test_a_library_of_older_sources_is_not_used(monkeypatch):
    monkeypatch.setattr(_extension, "OPERATIONS", (*_extension.OPERATIONS, "of_tomorrow"))
    assert "built from older sources and lacks of_tomorrow" in _extension._load()


needs_cuda_torch = pytest.mark.skipif(not torch.version.cuda, reason="this torch has no CUDA")


@needs_cuda_torch
def test_without_nvcc_there_is_the_cpu_part(source, tmp_path):
    done = run_python(source, "setup.py", "build_ext", CUDA_HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert "building the CPU part only: torch has CUDA" in done.stdout
    assert "without the C++ extension" in done.stdout  # there is no compiler either
    assert "without the CUDA kernels" not in done.stdout


@needs_cuda_torch
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
@pytest.mark.parametrize("mode", ["auto", "require"])
def test_a_broken_nvcc_leaves_the_cpu_part(source, tmp_path, mode):
    """It is built first, and stays; a required build fails nevertheless."""
    shutil.copytree(source, tmp_path / "clone", ignore=shutil.ignore_patterns("cpu", "build"))
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho nvcc is broken\nexit 1\n")
    nvcc.chmod(0o755)
    done = run_python(
        tmp_path / "clone",
        *("setup.py", "build_ext", "--inplace"),
        **{"CC": "cc", "CXX": "c++", "CUDA_HOME": str(tmp_path), "MEMDENSE_BUILD": mode},
    )
    assert (tmp_path / "clone" / "memdense" / "_C.abi3.so").exists(), done.stdout
    if mode == "auto":
        assert done.returncode == 0, done.stdout
        assert "installing without the CUDA kernels" in done.stdout
    else:
        assert done.returncode != 0
        assert "the CUDA kernels could not be built" in done.stdout


# what setup.py has nvcc compile for where there is a GPU of capability 12.0
FLAGS = """
import runpy, setuptools, torch
from torch.utils import cpp_extension
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda *device: (12, 0)
setuptools.setup = lambda **options: None
runpy.run_path("setup.py")
print(*cpp_extension._get_cuda_arch_flags())
"""


@needs_cuda_torch
@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ("", ["compute_90", "sm_80", "sm_90"]),
        ("8.6", ["sm_86"]),
        ("7.5 8.0 9.0+PTX", ["compute_90", "sm_80", "sm_90"]),
        ("Turing;Ampere", ["compute_90", "sm_80", "sm_90"]),
    ],
    ids=["usual", "asked for", "older ones too", "by name"],
)
def test_cuda_kernels_are_for_every_device(source, tmp_path, asked, code):
    """Not just for those where they are built."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(shutil.which("true"))
    environment = {"CUDA_HOME": str(tmp_path), "TORCH_CUDA_ARCH_LIST": asked}
    done = run_python(source, "-c", FLAGS, **environment)
    assert sorted(re.findall(r",code=(\w+)", done.stdout)) == code, done.stdout
