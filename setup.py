"""Builds the C++ CPU kernels against the headers of the installed torch; the rest stands in pyproject.toml."""

from __future__ import annotations

import platform
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, setup

TORCH_2_10 = "0x020A000000000000"  # the oldest LibTorch stable ABI we run on: one build serves it and every later torch


def installed_torch() -> Path | None:
    """Folder of the torch that is installed, also when pip builds in isolation and hides site-packages."""
    site_packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    spec = PathFinder.find_spec("torch") or PathFinder.find_spec("torch", site_packages)
    return Path(spec.origin).parent if spec and spec.origin else None


def cpu_kernels(torch: Path) -> Extension:
    compile_args = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
    compile_args += ["-Wall", "-Wno-psabi"]  # vectors are only passed to functions that are inlined
    if platform.machine() == "x86_64" and platform.system() == "Linux":
        # Baseline, AVX2 and AVX-512 in one file, chosen at run time.
        compile_args.append("-DDSSP_INSTRUCTION_SET_CLONES")
    return Extension(
        "dssp_kernels._cpu",
        sources=sorted(str(path) for path in Path("dssp_kernels").glob("*/cpu.cpp")),
        include_dirs=[str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_2_10), ("Py_LIMITED_API", "0x030A0000")],
        extra_compile_args=compile_args,
        language="c++",
        py_limited_api=True,
        optional=True,  # without a compiler the install succeeds and dssp_kernels.backend says that the reference runs
    )


torch = installed_torch()
setup(
    ext_modules=[cpu_kernels(torch)] if torch else [],
    setup_requires=[] if torch else ["torch>=2.10"],  # setuptools hands this to pip as a requirement of the build
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
