"""Builds the C++ CPU kernels against the headers of the installed torch; the rest stands in pyproject.toml."""

from __future__ import annotations

import os
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, setup

TORCH_2_10 = "0x020A000000000000"  # the oldest LibTorch stable ABI we run on: one build serves it and every later torch

# For the baseline alone, but with packs of two vectors, as with AVX-512: so every machine tests what those do.
PACKS = "-DDSSP_VECTORS_IN_A_PACK=2"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
BUILDS = {  # DSSP_BUILD names one
    "release": ["-O3", "-g0"],
    "quick": ["-O1", "-g0", PACKS],  # for tests/mutations.py, which compiles many times
    "sanitize": ["-O1", "-g1", PACKS, "-fno-omit-frame-pointer", *SANITIZERS],
}


def installed_torch() -> Path | None:
    """Folder of the torch that is installed, also when pip builds in isolation and hides site-packages."""
    site_packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    spec = PathFinder.find_spec("torch") or PathFinder.find_spec("torch", site_packages)
    return Path(spec.origin).parent if spec and spec.origin else None


def cpu_kernels(torch: Path, build: str) -> Extension:
    compile_args = [*BUILDS[build], "-std=c++17", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
    compile_args += ["-Wall", "-Wno-psabi"]  # vectors are only passed to functions that are inlined
    return Extension(
        "dssp_kernels._cpu",
        sources=sorted(str(path) for path in Path("dssp_kernels").glob("*/cpu.cpp")),
        depends=sorted(str(path) for path in Path("dssp_kernels").glob("**/*.h")),
        include_dirs=[str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_2_10), ("Py_LIMITED_API", "0x030A0000")],
        extra_compile_args=compile_args,
        extra_link_args=[flag for flag in BUILDS[build] if flag.startswith("-fsanitize")],
        language="c++",
        py_limited_api=True,
        optional=True,  # without a compiler the install succeeds and dssp_kernels.backend says that the reference runs
    )


torch = installed_torch()
setup(
    ext_modules=[cpu_kernels(torch, os.environ.get("DSSP_BUILD", "release"))] if torch else [],
    setup_requires=[] if torch else ["torch>=2.10"],  # setuptools hands this to pip as a requirement of the build
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
