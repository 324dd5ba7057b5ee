"""Products where weights and tokens may be of different types: weights that train are fp32, frozen ones are as stored.

A product is computed in the type of its weight; under autocast in autocast's type, as torch.nn.functional.linear does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def computing(*weights: Tensor) -> list[Tensor]:
    """The weights of one layer in the one type that it computes in: autocast's, else the widest of their own. fp64 stays."""
    wide = max((w.dtype for w in weights), key=lambda dtype: dtype.itemsize)
    device = weights[0].device.type
    if torch.is_autocast_enabled(device) and wide != torch.float64:
        wide = torch.get_autocast_dtype(device)
    return [w.to(wide) for w in weights]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in), plus bias (out,): (..., out) in the type of the weight, or autocast's."""
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
