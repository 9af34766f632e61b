"""Runs the tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: python -m tests.sanitize

The kernels are compiled with both into a copy of the project, build/sanitize, and the copy's tests run there: `--keep`
takes the library that is there already, further arguments go to pytest.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.source_trees import ROOT, build_extension, copy_of_project, pytest_in

LIBRARIES = ("libasan.so", "libubsan.so")
TESTS = (
    "test_mixed_sum.py",
    "test_batch_norm_mixed_sum.py",
    "test_depthwise_conv.py",
    "test_separable_conv.py",
    "test_pointwise_batch_norm.py",
    "test_pool_batch_norm.py",
    "test_parameter_free_sums.py",
    "test_separable_conv_group.py",
    "test_separable_conv_pairs.py",
    "test_properties.py",
    "test_memory_safety.py",
    "test_streamed_results.py",
)


def runtime_libraries() -> list[str]:
    """Where GCC keeps what its sanitizers need at run time; empty if it is not there."""
    found = []
    for name in LIBRARIES:
        try:
            done = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return []
        if not Path(done.stdout.strip()).is_absolute():  # a library that is not there is answered with its name
            return []
        found.append(done.stdout.strip())
    return found


def environment() -> dict[str, str]:
    """What a Python that loads such a library needs. Python frees little at its end, so leaks are not looked for."""
    return {
        "LD_PRELOAD": " ".join(runtime_libraries()),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTEST_ADDOPTS": "--capture=sys",  # what the sanitizers say goes past Python, and ends the process
        "DSSP_BACKEND": "cpu",
    }


def main() -> int:
    """The exit status of pytest, 1 without sanitizers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="the library that is there already")
    options, arguments = parser.parse_known_args()
    if not runtime_libraries():
        print(f"g++ with {' and '.join(LIBRARIES)}: expected both, found none", file=sys.stderr)
        return 1
    tree = ROOT / "build" / "sanitize"
    if not options.keep:
        build_extension(copy_of_project(tree), "sanitize")
    tests = [f"tests/kernels/{name}" for name in TESTS]
    return pytest_in(tree, *tests, *arguments, show=True, **environment()).returncode


if __name__ == "__main__":
    sys.exit(main())
