"""Do both supernets compute the same? Loss and gradients of a training step, in float32 and in float64.

In float32 two correct implementations differ by more than rounding: about a millionth of the signs that ReLU looks at
(and of the maxima of max pooling) hang on the last bits, and each one that falls the other way switches a path of the
gradient. That moves gradients by about the square root of that share, 1e-3 of their norm, those of the smallest layers
by 1e-2: stock DARTS in channels_last is as far from stock DARTS in contiguous memory. So the bound on gradients is
checked in float64, where no sign hangs on rounding; in float32 both distances are shown, and ours is bounded loosely.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

from torch import nn

from bench.accuracy import relative_error
from bench.step_subjects import Batch, TrainingStep

LIMITS = {"loss_error": 1e-5, "gradient_error": 5e-2, "gradient_error_float64": 1e-9}
FUSED = "stock_fused_"  # before the names of its errors
IMAGES_FLOAT64, SIDE_FLOAT64 = 2, 16  # depthwise convolutions of torch are slow in float64


def agreement(steps: Mapping[str, TrainingStep], renamed: Callable[[str], str], batch: Batch) -> dict[str, float]:
    """Errors of ours, and of stock with fused mixed ops where there is one, after a step of each."""
    stock = steps["stock"]
    exact = in_float64(stock.model, batch)

    def errors(other: TrainingStep, renamed: Callable[[str], str]) -> dict[str, float]:
        """|loss - stock's| / |stock's|, and the largest |g - stock's g| / |stock's g|, also in float64."""
        return {
            "loss_error": abs(float(other.loss) - float(stock.loss)) / abs(float(stock.loss)),
            "gradient_error": gradient_error(stock.model, other.model, renamed),
            "gradient_error_float64": gradient_error(exact, in_float64(other.model, batch), renamed),
        }

    found = errors(steps["ours"], renamed)
    found["gradient_error_stock_channels_last"] = gradient_error(stock.model, steps["stock_channels_last"].model, str)
    if "stock_fused" in steps:
        found |= {f"{FUSED}{name}": error for name, error in errors(steps["stock_fused"], str).items()}
    return found


def gradient_error(stock: nn.Module, other: nn.Module, renamed: Callable[[str], str]) -> float:
    """The largest relative distance of a parameter's gradient from that of the stock; NaN if any is NaN."""
    others = dict(other.named_parameters())
    pairs = ((others[renamed(name)].grad, parameter.grad) for name, parameter in stock.named_parameters())
    errors = [relative_error([grad], [exact]) for grad, exact in pairs]  # type: ignore[list-item]  # steps leave none out
    return max(errors, key=lambda error: (math.isnan(error), error))


def in_float64(model: nn.Module, batch: Batch) -> nn.Module:
    """A copy in float64, after a step on a corner of the first images of the batch."""
    images, labels = (part[:IMAGES_FLOAT64] for part in batch)
    model = copy.deepcopy(model).double()
    TrainingStep(model, (images[:, :, :SIDE_FLOAT64, :SIDE_FLOAT64].double(), labels))()
    return model


def is_green(errors: Mapping[str, float]) -> bool:
    """True if every error is within its limit; NaN never is."""
    prefixes = ["", FUSED] if f"{FUSED}loss_error" in errors else [""]
    return all(errors[prefix + name] <= limit for prefix in prefixes for name, limit in LIMITS.items())
