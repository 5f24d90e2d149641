"""Shared by all tests: uninitialised memory is NaN, and Hypothesis repeats itself."""

import fcntl
import gc
import os
import shutil
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# before Triton is imported: without a device its kernels run in the interpreter
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# deterministic cuBLAS wants a workspace of a fixed size
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

try:
    from hypothesis import settings
except ImportError:  # a GPU machine may lack it
    collect_ignore = ["test_exactness.py"]
else:
    settings.register_profile(
        "ci", max_examples=200, deadline=None, derandomize=True, print_blob=True
    )
    settings.register_profile("more", max_examples=2000, deadline=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What was imported lives on: no garbage collection need walk it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what torch.empty and its kin return with NaN: an output nobody wrote cannot pass."""
    before = torch.are_deterministic_algorithms_enabled()
    # on CUDA some of PyTorch's own operations, which tests compare with, know no other way
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def float32_precision():
    """``float32_precision("ieee")`` or "tf32": how PyTorch's convolutions on CUDA multiply float32,
    for the rest of a test. monkeypatch would delete the attribute, which no __dict__ holds.
    """
    convolution = torch.backends.cudnn.conv
    before = convolution.fp32_precision

    def choose(precision: str) -> None:
        convolution.fp32_precision = precision

    yield choose
    choose(before)


@pytest.fixture(scope="session")
def common(tmp_path_factory):
    """A directory of all workers."""
    directory = tmp_path_factory.getbasetemp()
    return directory.parent if os.environ.get("PYTEST_XDIST_WORKER") else directory


def build_emulation(directory: Path, name: str):
    """Once for all tests."""
    import emulated

    if not shutil.which(emulated.COMPILER):
        pytest.skip(f"no C++ compiler: {emulated.COMPILER}")
    directory = directory / "emulation"
    directory.mkdir(exist_ok=True)
    with open(directory / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = emulated.build(directory, name)
    return emulated.Emulation(library)


@pytest.fixture(scope="session")
def built(common):
    return build_emulation(common, "emulated")


@pytest.fixture
def emulation(built):
    built.configure()
    yield built
    built.configure()


@pytest.fixture(scope="session")
def raced(common):
    """The emulation that watches for races."""
    return build_emulation(common, "raced")


@pytest.fixture
def quick_interpreter(monkeypatch):
    """Triton's interpreter with the same bits, several times faster. On a GPU, nothing."""
    if torch.cuda.is_available():
        yield None
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    tl = interpreter.tl
    known = cache(interpreter._get_np_dtype)

    def numpy(dtype):
        scalar = dtype.scalar
        return known(tl.uint64 if scalar.is_ptr() else scalar)

    @cache
    def shape_of(shape):
        return tl.core.tuple([tl.constexpr(n) for n in shape]), tl.constexpr(prod(shape))

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_of(type.shape if type.is_block() else ())

    @cache
    def block_of(shape):
        return tl.core.tuple(shape), prod(shape), str(shape)

    def block(self, element, shape):
        sizes = tuple([n if type(n) is int else n.value for n in shape])
        self.element_ty = element
        self.shape, self.numel, name = block_of(sizes)
        self.name = f"<{name}, {element}>"

    # checks for overflow took a quarter of the time
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
    monkeypatch.setattr(interpreter, "_get_np_dtype", numpy)
    monkeypatch.setattr(tl.tensor, "__init__", tensor)
    monkeypatch.setattr(tl.block_type, "__init__", block)
    # to patch triton.language anew at every call of a function takes longer than all the rest
    patch, patched, kept = interpreter._patch_lang, {}, SimpleNamespace(restore=lambda: None)

    def patch_once(function):
        if function.__module__ not in patched:
            patched[function.__module__] = patch(function)
        return kept

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    yield interpreter
    for scope in reversed(patched.values()):
        scope.restore()


@pytest.fixture
def interpreter(quick_interpreter, monkeypatch):
    """The same, rounding as a GPU does: float32 to the nearest bfloat16, where it truncates, and
    sums as a tree, where it adds one after another.
    """
    if quick_interpreter is None:
        return
    tl = quick_interpreter.tl
    original = quick_interpreter._convert_float

    def convert(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return original(values, source, target, mode)
        wide = torch.from_numpy(values.reshape(-1).view("float32").copy())
        return wide.bfloat16().view(torch.uint16).numpy().reshape(values.shape)

    def tree(operation, x):
        axis, values = operation.axis, x.handle.data
        values = values.reshape(-1) if axis is None else values.swapaxes(0, axis)
        while len(values) > 1:
            values = values[: len(values) // 2] + values[len(values) // 2 :]
        values = values[0] if axis is None else values.swapaxes(0, axis).squeeze(axis)
        return operation.to_tensor(values, x.dtype)

    monkeypatch.setattr(quick_interpreter, "_convert_float", convert)
    monkeypatch.setattr(quick_interpreter.ReduceOps, "sum", tree)
