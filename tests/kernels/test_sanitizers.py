"""The C++ kernels run clean under AddressSanitizer and UndefinedBehaviorSanitizer, which notice what is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sanitize import TESTS, environment, runtime_libraries
from tests.source_trees import build_extension, copy_of_project, pytest_in

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not runtime_libraries(), reason="there is no g++ with libasan and libubsan"),
]


def test_kernels_run_clean(tmp_path: Path) -> None:
    tree = copy_of_project(tmp_path / "tree")
    build_extension(tree, "sanitize")
    done = pytest_in(tree, "-x", *(f"tests/kernels/{name}" for name in TESTS), **environment())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "file, text, planted, said",
    [
        pytest.param(
            "mixed_sum/cpu.cpp",
            "store_first(out + i, a, rest);",
            "store_first(out + i + 1, a, rest);",
            "AddressSanitizer: heap-buffer-overflow",
            id="a store that is off by one",
        ),
        pytest.param(
            "mixed_sum/cpu.cpp",
            "a += coefficients[k] * load_first(inputs[k] + i, rest);",
            "a += coefficients[k] * L::load(inputs[k] + i);",
            "AddressSanitizer: heap-buffer-overflow",
            id="a whole vector is read where there is less",
        ),
        pytest.param(
            "cpu_mixture.h",
            "for (int64_t i = 0; i < entries; ++i) coefficients[i] =",
            "for (int64_t i = 0, one = 1; i < entries; ++i) coefficients[i] = (one << (62 + i)) * 0 +",
            "runtime error: ",
            id="a shift out of range",
        ),
    ],
)
def test_planted_fault_is_noticed(tmp_path: Path, file: str, text: str, planted: str, said: str) -> None:
    tree = copy_of_project(tmp_path / "tree")
    source = tree / "dssp_kernels" / file
    assert source.read_text().count(text) == 1
    source.write_text(source.read_text().replace(text, planted))
    build_extension(tree, "sanitize", ["mixed_sum"])
    tests = "tests/kernels/test_memory_safety.py::test_nothing_is_read_or_written_beside_the_arguments"
    done = pytest_in(tree, "-x", tests, "-k", "mixed_sum and not norm", **environment())
    assert done.returncode != 0 and said in done.stderr, done.stdout + done.stderr
