"""Builds memdense/_C.abi3.so and, where nvcc is, memdense/_CUDA.abi3.so; all works without them.

MEMDENSE_BUILD=0 leaves them out, MEMDENSE_BUILD=require makes a failure fatal. One file serves
every Python >= 3.10 and torch >= 2.11: it uses torch's stable ABI and no Python at all. The CUDA
half is a library of its own, so that a wheel with it serves a torch without CUDA too.
"""

import os
import re
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

MODE = os.environ.get("MEMDENSE_BUILD", "auto")
# In errors, files are told as csrc has them.
SHORT_PATHS = f"-fmacro-prefix-map={Path(__file__).resolve().parent}/="
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # 2.11
ARCHITECTURES = "8.0;9.0+PTX"  # every GPU that the kernels are for, whichever is here


def without(what: str, instead: str, reason: object) -> None:
    """Say why a library is not built and how to get it, or stop if it was required."""
    if MODE == "require":
        sys.exit(f"memdense: MEMDENSE_BUILD=require, but the {what} could not be built: {reason}")
    print(
        f"memdense: installing without the {what}: {reason}\n"
        f"memdense: {instead} To build it, with torch and a compiler there:\n"
        "memdense:     python -m pip install --no-build-isolation --no-deps -e .",
        file=sys.stderr,
    )


def without_extension(reason: object) -> None:
    without("C++ extension", "PyTorch operations are used in its place.", reason)


def without_cuda(reason: object) -> None:
    without("CUDA kernels", "Triton's 3x3 and cuDNN's are used in their place.", reason)


def cuda_directories(nvcc: Path) -> list[str]:
    """Where nvcc would look for libraries: it may be a link, or a script."""
    lines = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    ).stderr
    return re.findall(r'"-L([^"]+)"', lines)


def architectures() -> str:
    """Of the numbers that were asked for, those that the kernels are for: containers ask for every
    GPU there is.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    return ";".join(a for a in asked if re.match(r"([89]|\d\d)\.", a)) or ARCHITECTURES


def cuda_extension(cpp_extension, torch):
    """The extension of csrc/cuda; None, with the reason said, where there is no nvcc."""
    if not torch.version.cuda:
        return None
    # Not torch.cuda.is_available(): building needs nvcc, not a GPU.
    nvcc = Path(cpp_extension.CUDA_HOME or "") / "bin" / "nvcc"
    if not nvcc.exists():
        print(
            f"memdense: building the CPU part only: torch has CUDA {torch.version.cuda}, but nvcc "
            "was not found (CUDA_HOME says where)",
            file=sys.stderr,
        )
        return None
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
    extension = cpp_extension.CppExtension(
        "memdense._CUDA",
        sorted(glob("csrc/cuda/*.cu")),
        extra_compile_args={
            "cxx": [],
            "nvcc": [
                "-O3",
                "-std=c++20",
                "-DUSE_CUDA",
                "-Xcompiler=-fvisibility=hidden",
                # nvcc takes a space for an end
                *([] if " " in SHORT_PATHS else [f"-Xcompiler={SHORT_PATHS}"]),
                *DEFINES,
            ],
        },
        py_limited_api=True,
    )
    # The static runtime, for any libcudart that torch brings.
    extension.libraries += ["torch_cuda", "cudart_static", "rt", "dl", "pthread"]
    extension.library_dirs += cuda_directories(nvcc)
    return extension


def extension_arguments() -> dict:
    """Arguments for setup() that build the extensions; none where it cannot or shall not be."""
    if MODE == "0":
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        without_extension(f"torch is missing at build time ({error})")
        return {}

    cpu = cpp_extension.CppExtension(
        "memdense._C",
        sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
        extra_compile_args=[
            "-O3",
            "-g0",
            "-std=c++20",
            "-fvisibility=hidden",
            SHORT_PATHS,
            *DEFINES,
        ],
        py_limited_api=True,
    )
    cuda = cuda_extension(cpp_extension, torch)
    extensions = [cpu] if cuda is None else [cpu, cuda]
    for extension in extensions:
        extension.optional = MODE != "require"

    class BuildExtension(cpp_extension.BuildExtension):
        """One extension after the other, so that the second's failure leaves the first."""

        def run(self) -> None:
            try:
                for extension in extensions:
                    self.extensions = [extension]
                    self.compiler = None
                    try:
                        super().run()
                    # No compiler: OSError here and CompileError there; torch: RuntimeError.
                    except Exception as error:
                        say = without_cuda if extension is cuda else without_extension
                        say(f"{type(error).__name__}: {error}")
            finally:
                self.extensions = extensions

    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension_arguments())
