"""A derived network as a file that other programs run: what torch.export saves, or ONNX."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dssp.derived.trained import TrainedNetwork
from dssp_kernels import get_backend, set_backend

# How far a logit of the file may be from the network's: the sums are the same, their order is the runtime's.
TOLERANCE = 1e-5  # as a share of the largest logit
ROUNDING = 4.0  # or so many times as far as the network itself is from its float64 self, if that is more
BATCHES = (2, 5)  # images in the batch that is traced, and in the one on which the file is checked
DESCRIPTION = "network.json"  # what the file holds beside the network: TrainedNetwork.description()


class ExportFailed(Exception):
    """A network that cannot be exported; one line that says why."""


def export_network(trained: TrainedNetwork, format: str) -> tuple[bytes, float]:
    """The content of the file, and the largest difference of a logit between file and network on random images.

    format    "torch": torch.export's archive (.pt2); "onnx": an ONNX model, input `images`, output `logits`.

    Either takes float32 [B, C, H, W] for any B, normalised, and holds plain convolutions only, so that it runs without
    this package. Raises ExportFailed if what ONNX needs is not installed, or the file computes something else.
    """
    if format == "onnx":
        _require("onnx", "onnxscript", "onnxruntime")
    traced, tried = (torch.randn(batch, *trained.image_shape) for batch in BATCHES)
    program = _program(trained.network, traced)
    content = _saved(program, trained) if format == "torch" else _onnx(program, trained)
    found = _run_saved(content, tried) if format == "torch" else _run_onnx(content, tried)
    with torch.no_grad():
        expected = trained.network(tried)
        exact = copy.deepcopy(trained.network).double()(tried.double())
    difference, rounding = (float((logits - expected).abs().max()) for logits in (found, exact))
    allowed = max(TOLERANCE * float(expected.abs().max()), ROUNDING * rounding)
    if not difference <= allowed:
        raise ExportFailed(f"the exported network's logits are {difference:.1e} off, at most {allowed:.1e} is rounding")
    return content, difference


def _program(network: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """The network in torch's own operators, for any number of images."""
    with _plain_operators(), torch.no_grad():
        return torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


@contextmanager
def _plain_operators() -> Iterator[None]:
    """Operators of dssp_kernels run as the torch functions they stand for."""
    before = get_backend()
    set_backend("reference")
    try:
        yield
    finally:
        set_backend(before)


# ---- torch -----------------------------------------------------------------------------------------------------------


def _saved(program: torch.export.ExportedProgram, trained: TrainedNetwork) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={DESCRIPTION: json.dumps(trained.description())})
    return file.getvalue()


def _run_saved(content: bytes, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.export.load(io.BytesIO(content)).module()(images)


# ---- ONNX ------------------------------------------------------------------------------------------------------------


def _onnx(program: torch.export.ExportedProgram, trained: TrainedNetwork) -> bytes:
    exported = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),  # names the dimension
        verbose=False,
    )
    assert exported is not None
    exported.model.metadata_props[DESCRIPTION] = json.dumps(trained.description())
    return exported.model_proto.SerializeToString()


def _run_onnx(content: bytes, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    return torch.from_numpy(logits)


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportFailed(f'onnx: {", ".join(missing)} not installed; pip install "dssp[export]"')
