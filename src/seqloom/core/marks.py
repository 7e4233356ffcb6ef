"""Marks on parameters that the optimiser, autocast and sharding honour."""

from __future__ import annotations

import torch
from torch import nn

NAME = "seqloom_marks"


def mark(parameter: nn.Parameter, *, no_decay: bool = False, keep_float32: bool = False,
         lr_scale: float = 1.0) -> nn.Parameter:
    """no_decay: no weight decay. keep_float32: stays float32 in any cast. lr_scale: own rate, relative to the run's."""
    setattr(parameter, NAME, {"no_decay": no_decay, "keep_float32": keep_float32, "lr_scale": lr_scale})
    return parameter


def marks(parameter: nn.Parameter) -> dict:
    return getattr(parameter, NAME, {"no_decay": False, "keep_float32": False, "lr_scale": 1.0})


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`module.to(dtype)` for floating parameters and buffers, but parameters marked keep_float32 stay float32 or wider."""
    kept = {name: p.data for name, p in module.named_parameters() if marks(p)["keep_float32"]}
    module.to(dtype)
    for name, parameter in module.named_parameters():
        if name in kept:
            parameter.data = kept[name].to(torch.promote_types(dtype, torch.float32))
    return module
