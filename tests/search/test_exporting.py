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

from dssp import exporting
from dssp.exporting import ExportFailed, export_network
from dssp.genotype import AnyGenotype
from dssp_kernels import get_backend
from tests.search.trained import ARCH, EVERY_OPERATION, small_trained

ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))

# Without our packages, and told nothing but the files and where the images and the logits are.
STRANGER = """
import sys
sys.modules["dssp"] = sys.modules["dssp_kernels"] = None
import torch
images, logits = torch.load("batch.pt")
for program in sys.argv[1:]:
    if program.endswith(".pt2"):
        found = torch.export.load(program).module()(images)
    else:
        import onnxruntime
        found = torch.from_numpy(onnxruntime.InferenceSession(program).run(None, {"images": images.numpy()})[0])
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
"""


@cache
def exported(genotype: AnyGenotype, format: str) -> bytes:
    content, difference = export_network(small_trained(genotype), format)
    assert difference < 1e-5 and get_backend() == "auto"
    return content


@pytest.mark.parametrize(
    "genotype",
    [pytest.param(EVERY_OPERATION, id="darts"), pytest.param(ARCH, id="nasbench201", marks=pytest.mark.slow)],
)
def test_exported_files_run_without_this_package_on_any_batch(genotype: AnyGenotype, tmp_path: Path) -> None:
    images, network = torch.randn(7, 3, 9, 9), small_trained(genotype).network
    with torch.no_grad():
        torch.save((images, network(images)), tmp_path / "batch.pt")
    files = {"network.pt2": "torch", "network.onnx": "onnx"} if ONNX else {"network.pt2": "torch"}
    for file, format in files.items():
        (tmp_path / file).write_bytes(exported(genotype, format))
    done = subprocess.run([sys.executable, "-c", STRANGER, *files], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_program_holds_plain_operators_and_its_description() -> None:
    beside = {exporting.DESCRIPTION: ""}
    program = torch.export.load(io.BytesIO(exported(EVERY_OPERATION, "torch")), extra_files=beside)
    assert json.loads(beside[exporting.DESCRIPTION]) == small_trained().description()
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and not [name for name in targets if "dssp" in name or "copy_" in name]


@pytest.mark.skipif(not ONNX, reason='needs pip install "dssp[export]"')
def test_onnx_names_its_batch_and_holds_its_description() -> None:
    import onnx

    model = onnx.load_from_string(exported(EVERY_OPERATION, "onnx"))
    onnx.checker.check_model(model, full_check=True)
    (images,), (logits,) = model.graph.input, model.graph.output
    dimensions = [size.dim_param or size.dim_value for size in images.type.tensor_type.shape.dim]
    assert (images.name, dimensions, logits.name) == ("images", ["batch", 3, 9, 9], "logits")
    description = {entry.key: entry.value for entry in model.metadata_props}[exporting.DESCRIPTION]
    assert json.loads(description) == small_trained().description()
    assert {node.domain for node in model.graph.node} == {""}
    assert "ScatterND" not in {node.op_type for node in model.graph.node}


def test_file_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = small_trained(ARCH, seed=1).network
    program = exporting._program
    monkeypatch.setattr(exporting, "_program", lambda network, images: program(wrong, images))
    with pytest.raises(ExportFailed, match=r"the exported network differs by \d.\de[+-]\d\d, its largest logit is"):
        export_network(small_trained(ARCH), "torch")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_is_one_line_that_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportFailed, match=rf'onnx: .*{package}.* not installed; pip install "dssp\[export\]"'):
        export_network(small_trained(ARCH), "onnx")
