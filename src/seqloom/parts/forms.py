"""How the parts of a mixer choose their form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from seqloom.core import forms as core


def run_part(forms: Mapping[str, Callable], x: Tensor, *streams: Tensor | None, name: str, **options: Any) -> Any:
    """As `core.run`, for a part with a definition and a form `fused`.

    A form that is asked of all mixers and that the part has not means its definition: `use_form("fused")` asks it of parts too,
    `use_form("chunked")` computes them as they are defined, and `use_form(short_conv="parallel")` asks one part by name.
    """
    tracing = torch.compiler.is_compiling()
    asked = core._traced if tracing else core._asked.get()
    form = definition = next(iter(forms))
    if not asked and x.device.type not in forms["fused"].devices:
        return forms[definition](x, *streams, **options)  # nothing to choose: at a single token choosing would cost a tenth
    if name in asked or asked.get("*", definition) in forms:
        form = core.choose(forms, name=name, tokens=0, device=x.device, dtype=x.dtype, prefer=("fused",))
    if form != definition and not tracing:
        core.record(name, form, x.device)
    return forms[form](x, *streams, **options)
