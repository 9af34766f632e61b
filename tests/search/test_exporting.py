"""An exported network computes what the network does, for any batch, on a machine without this package."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from dssp.derived import exporting
from dssp.derived.exporting import ExportFailed, export_network
from dssp.genotype import AnyGenotype
from dssp_kernels import get_backend
from tests.search.trained import ARCH, EVERY_OPERATION, small_trained

ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not ONNX, reason='needs pip install "dssp[export]"')
GENOTYPES = pytest.mark.parametrize(
    "genotype",
    [pytest.param(EVERY_OPERATION, id="darts", marks=pytest.mark.slow), pytest.param(ARCH, id="nasbench201")],
)

STRANGER = """
import sys
sys.modules["dssp"] = sys.modules["dssp_kernels"] = None  # importing them fails
import torch
images, logits = torch.load("batch.pt")
found = torch.export.load("network.pt2").module()(images)
torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
"""


@cache
def exported(genotype: AnyGenotype, format: str) -> bytes:
    content, difference = export_network(small_trained(genotype), format)
    assert difference < 1e-4 and get_backend() == "auto"
    return content


def batch(genotype: AnyGenotype) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and what the network says of them."""
    images = torch.randn(7, 3, 9, 9)
    with torch.no_grad():
        return images, small_trained(genotype).network(images)


@pytest.mark.parametrize(
    "genotype",
    [pytest.param(EVERY_OPERATION, id="darts", marks=pytest.mark.slow), pytest.param(ARCH, id="nasbench201")],
)
def test_exported_program_runs_without_this_package_on_any_batch(genotype: AnyGenotype, tmp_path: Path) -> None:
    torch.save(batch(genotype), tmp_path / "batch.pt")
    (tmp_path / "network.pt2").write_bytes(exported(genotype, "torch"))
    done = subprocess.run([sys.executable, "-c", STRANGER], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_onnx
@GENOTYPES
def test_onnx_file_computes_the_network_on_any_batch(genotype: AnyGenotype) -> None:
    import onnxruntime

    images, logits = batch(genotype)
    (found,) = onnxruntime.InferenceSession(exported(genotype, "onnx")).run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), logits, rtol=1e-4, atol=1e-5)


def test_program_holds_plain_operators_and_its_description() -> None:
    beside = {exporting.DESCRIPTION: ""}
    program = torch.export.load(io.BytesIO(exported(EVERY_OPERATION, "torch")), extra_files=beside)
    assert json.loads(beside[exporting.DESCRIPTION]) == small_trained().description()
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and not [name for name in targets if "dssp" in name or "copy_" in name]


@needs_onnx
@GENOTYPES
def test_onnx_model_is_plain_names_its_batch_and_holds_its_description(genotype: AnyGenotype) -> None:
    import onnx

    model = onnx.load_from_string(exported(genotype, "onnx"))
    onnx.checker.check_model(model, full_check=True)
    (images,), (logits,) = model.graph.input, model.graph.output
    dimensions = [size.dim_param or size.dim_value for size in images.type.tensor_type.shape.dim]
    assert (images.name, dimensions, logits.name) == ("images", ["batch", 3, 9, 9], "logits")
    description = {entry.key: entry.value for entry in model.metadata_props}[exporting.DESCRIPTION]
    assert json.loads(description) == small_trained(genotype).description()
    assert {node.domain for node in model.graph.node} == {""}
    assert "ScatterND" not in {node.op_type for node in model.graph.node}


def test_file_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = small_trained(ARCH, seed=1).network
    program = exporting._program
    monkeypatch.setattr(exporting, "_program", lambda network, images: program(wrong, images))
    with pytest.raises(
        ExportFailed, match=r"the exported network's logits are \d.\de[+-]\d\d off, at most \d.\de-\d\d is"
    ):
        export_network(small_trained(ARCH), "torch")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_is_one_line_that_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportFailed, match=rf'onnx: .*{package}.* not installed; pip install "dssp\[export\]"'):
        export_network(small_trained(ARCH), "onnx")
