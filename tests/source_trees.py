"""Copies of the project with a C++ extension of their own, so that the installed one stays as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("bench", "docs", "dssp", "dssp_kernels", "tests", "pyproject.toml", "setup.py", "README.md", "CONTRIBUTING.md")


def copy_of_project(to: Path, *, with_extension: bool = False) -> Path:
    """The sources and tests, in a folder that is made anew; ``with_extension``: the built C++ kernels too."""
    shutil.rmtree(to, ignore_errors=True)
    left_out = shutil.ignore_patterns("__pycache__", *([] if with_extension else ["*.so"]))
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, to / part, ignore=left_out)
        else:
            shutil.copy(source, to / part)
    return to


def build_extension(tree: Path, build: str, operators: Sequence[str] = ()) -> None:
    """Compile the C++ kernels of a tree as ``DSSP_BUILD`` names it (see setup.py), or only those of some operators.

    Raises RuntimeError with what the compiler said when there is no library in the end.
    """
    for source in tree.glob("dssp_kernels/*/cpu.cpp") if operators else ():
        if source.parent.name not in operators:
            source.unlink()
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tree,
        env=os.environ | {"DSSP_BUILD": build},
        capture_output=True,
        text=True,
    )
    if not list(tree.glob("dssp_kernels/_cpu*.so")):
        raise RuntimeError(f"setup.py build_ext in {tree}: expected a library, got\n{done.stdout}{done.stderr}")


def pytest_in(tree: Path, *arguments: str, show: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run tests of the tree with these additions to the environment; ``show`` passes on what they say."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree), **environment},
        capture_output=not show,
        text=True,
    )
