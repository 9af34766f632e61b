"""Arguments the operators share: the checks of a mixture, and one dtype and memory layout for its entries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from dssp_kernels.backend import transforms_are_active

RELAXATIONS = ("softmax", "given")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def checked_mixture(
    outputs: Sequence[Tensor | None], alpha: Tensor, mask: Tensor | None, relaxation: str, active: Tensor | None
) -> tuple[Sequence[Tensor | None], Tensor, Tensor | None]:
    """Outputs of one dtype and (if not under torch.func) one dense layout; alpha, mask contiguous.

    mask has E elements or is None; of one edge it may have no dimension.
    """
    tensors = _check_outputs(outputs)
    _check_parameters(outputs, tensors[0], alpha, mask, relaxation, active)
    dtype = tensors[0].dtype
    if any([tensor.dtype is not dtype for tensor in tensors]):  # a list: half the time of a generator
        for tensor in tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
        outputs = [None if output is None else output.to(dtype) for output in outputs]
    if not transforms_are_active():  # vmap has no layouts
        outputs = _in_one_layout(outputs)
    alpha = alpha.contiguous()
    if mask is not None and (mask.numel() != _edges(alpha) or not mask.is_contiguous()):
        mask = mask.reshape(-1).expand(_edges(alpha)).contiguous()
    return outputs, alpha, mask


def empty_as(tensor: Tensor) -> Tensor:
    """An uninitialised tensor of the same shape, strides, dtype and device."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor itself if it has these strides, else a copy that does.

    Backward walks memory flat, but a gradient may come expanded or laid out otherwise by what follows, and a saved
    tensor laid out otherwise by the hooks it went through (save_on_cpu(pin_memory=True) keeps no layout).
    """
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


# ---- argument checks -----------------------------------------------------------------------------------------------


def _edges(alpha: Tensor) -> int:
    return alpha.shape[0] if alpha.dim() == 2 else 1


def _check_outputs(outputs: Sequence[Tensor | None]) -> list[Tensor]:
    """The entries that are tensors, all of one shape and device."""
    if not isinstance(outputs, (list, tuple)):
        raise TypeError(f"outputs: expected a list or tuple of tensors or None, got {type(outputs).__name__}")
    tensors: list[Tensor] = []
    for i, output in enumerate(outputs):
        if output is None:
            continue
        if not isinstance(output, Tensor):
            raise TypeError(f"outputs[{i}]: expected a tensor or None, got {type(output).__name__}")
        if output.dtype not in _DTYPES:
            raise TypeError(f"outputs[{i}]: expected float16, bfloat16, float32 or float64, got {output.dtype}")
        if output.layout is not torch.strided:
            raise TypeError(f"outputs[{i}]: expected a dense (strided) tensor, got layout {output.layout}")
        if not tensors:
            shape, device = output.shape, output.device
        elif output.shape != shape:
            raise ValueError(f"outputs[{i}]: expected the first tensor's shape {list(shape)}, got {list(output.shape)}")
        elif output.device != device:
            raise ValueError(f"outputs[{i}]: expected the first tensor's device {device}, got {output.device}")
        tensors.append(output)
    if not tensors:
        raise ValueError(f"outputs: expected at least one tensor, got {len(outputs)} entries without any")
    return tensors


def _check_parameters(
    outputs: Sequence[Tensor | None],
    first: Tensor,
    alpha: Tensor,
    mask: Tensor | None,
    relaxation: str,
    active: Tensor | None,
) -> None:
    if relaxation not in RELAXATIONS:
        raise ValueError(f"relaxation: expected one of {', '.join(RELAXATIONS)}, got {relaxation!r}")
    for name, value in (("alpha", alpha), ("mask", mask), ("active", active)):
        if value is None and name != "alpha":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.device != first.device:
            raise ValueError(f"{name}: expected the outputs' device {first.device}, got {value.device}")
        if name == "active":
            if value.dtype is not torch.bool:
                raise TypeError(f"active: expected a bool tensor, got {value.dtype}")
        elif value.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}")
    if alpha.dim() not in (1, 2) or alpha.numel() != len(outputs):
        raise ValueError(
            f"alpha: expected [K] or [E, K] with E*K = len(outputs) = {len(outputs)}, got shape {list(alpha.shape)}"
        )
    edges = _edges(alpha)
    if mask is not None and (mask.dim() > 1 or mask.numel() not in (1, edges)):
        raise ValueError(f"mask: expected shape [], [1] or [E] = [{edges}], got {list(mask.shape)}")
    if active is not None and active.shape != (edges,):
        raise ValueError(f"active: expected shape [E] = [{edges}], got {list(active.shape)}")


# ---- memory layout -------------------------------------------------------------------------------------------------


def _dense_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Dimensions longer than 1 from outermost to innermost in memory, or None if there are gaps or overlaps.

    Tensors of one shape and equal order hold equal elements at equal flat offsets.
    """
    order = sorted((d for d in range(tensor.dim()) if tensor.shape[d] != 1), key=tensor.stride, reverse=True)
    expected = 1
    for d in reversed(order):
        if tensor.stride(d) != expected:
            return None
        expected *= tensor.shape[d]
    return tuple(order)


def _is_usual_layout(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def _in_one_layout(outputs: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The same entries, all in the dense layout that most of them have; only the odd ones are copied."""
    tensors = [output for output in outputs if output is not None]
    strides = tensors[0].stride()
    if _is_usual_layout(tensors[0]) and all([tensor.stride() == strides for tensor in tensors]):
        return outputs
    if tensors[0].numel() == 0:
        return [None if output is None else output.contiguous() for output in outputs]
    orders = [None if output is None else _dense_order(output) for output in outputs]
    dense = Counter(order for order in orders if order is not None)
    if not dense:  # then the layouts that PyTorch itself would give copies of them
        dense = Counter(order for tensor in tensors if (order := _dense_order(torch.empty_like(tensor))) is not None)
    target = max(dense, key=lambda order: (dense[order], order))  # whatever the order of the entries
    return [
        output if output is None or order == target else _copy_in_order(output, target)
        for output, order in zip(outputs, orders, strict=True)
    ]


def _copy_in_order(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """A differentiable copy whose dimensions lie in memory in ``order`` (dimensions of length 1 first)."""
    permutation = [d for d in range(tensor.dim()) if d not in order] + list(order)
    inverse = sorted(range(len(permutation)), key=permutation.__getitem__)
    return tensor.permute(permutation).contiguous().permute(inverse)
