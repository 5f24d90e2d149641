"""Builds memdense/_C.abi3.so, when that can be done; the package works without it.

MEMDENSE_BUILD=0 leaves it out, MEMDENSE_BUILD=require makes a failure fatal. One file serves
every Python >= 3.10 and torch >= 2.11: it uses torch's stable ABI and no Python at all.
"""

import os
import sys
from glob import glob

from setuptools import setup

MODE = os.environ.get("MEMDENSE_BUILD", "auto")
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # 2.11


def without_extension(reason: object) -> None:
    """Say why there is no extension and how to get one, or stop if it was required."""
    if MODE == "require":
        sys.exit(f"memdense: MEMDENSE_BUILD=require, but the extension was not built: {reason}")
    print(
        f"memdense: installing without the C++ extension: {reason}\n"
        "memdense: PyTorch operations are used in its place. To build it, with torch and a C++ "
        "compiler there:\n"
        "memdense:     python -m pip install --no-build-isolation --no-deps -e .",
        file=sys.stderr,
    )


def extension_arguments() -> dict:
    """Arguments for setup() that build the extension; none where it cannot or shall not be."""
    if MODE == "0":
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        without_extension(f"torch is missing at build time ({error})")
        return {}

    sources = glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")
    compile_args = {"cxx": ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", *DEFINES]}
    make_extension = cpp_extension.CppExtension
    # Not torch.cuda.is_available(): building needs nvcc, not a GPU.
    if torch.version.cuda and cpp_extension.CUDA_HOME and glob("csrc/cuda/*.cu"):
        sources += glob("csrc/cuda/*.cu")
        compile_args["cxx"] += ["-DUSE_CUDA"]
        compile_args["nvcc"] = ["-O3", "-std=c++20", "-DUSE_CUDA", *DEFINES]
        make_extension = cpp_extension.CUDAExtension

    class BuildExtension(cpp_extension.BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            # A missing compiler raises OSError here and CompileError there, torch RuntimeError.
            except Exception as error:
                without_extension(f"{type(error).__name__}: {error}")

    extension = make_extension(
        "memdense._C", sorted(sources), extra_compile_args=compile_args, py_limited_api=True
    )
    extension.optional = MODE != "require"
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension_arguments())
