"""Forms: exactly equal ways to compute one mixer. Which one runs is chosen here and never saved.

A mixer's FORMS maps names to functions, the definition first. Order of choice: `with use_form(...)`, then
`layer.form`, then automatic. The choice depends only on device and length, so it is made while a graph is traced,
not inside it; each (mixer, form) is logged once a run and kept for the report.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch

log = logging.getLogger("seqloom.forms")
_asked: ContextVar[Mapping[str, str]] = ContextVar("seqloom_form", default=MappingProxyType({}))
_traced: dict[str, str] = {}  # the same for a tracer, which cannot read a ContextVar but guards a graph by a dictionary
_seen: dict[tuple[str, str], str] = {}

# Automatic choice, best first. A single token always takes the recurrence.
PREFERENCE = ("fused", "chunked", "parallel")


def gpu_only(*chosen_for: torch.dtype) -> Callable[[Callable], Callable]:
    """Mark a form written in Triton: it runs on CUDA devices where triton is installed, and with TRITON_INTERPRET=1 in the
    environment, slowly, on the CPU. It computes in float32 at most, so that float64 never chooses it by itself; with
    `chosen_for`, nor does any other dtype. Asked for by name it takes all."""

    def mark(function: Callable) -> Callable:
        installed = importlib.util.find_spec("triton") is not None
        interpreted = installed and os.environ.get("TRITON_INTERPRET") == "1"
        function.devices = ("cuda",) * installed + ("cpu",) * interpreted  # type: ignore[attr-defined]
        function.widest = torch.float32  # type: ignore[attr-defined]
        function.chosen_for = chosen_for  # type: ignore[attr-defined]
        return function

    return mark


def narrow(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a form of `gpu_only` reads streams of `dtype`."""
    return torch.float32 if dtype == torch.float64 else dtype


def is_exact(function: Callable, dtype: torch.dtype = torch.float64) -> bool:
    """Does this form compute in `dtype`, or in something narrower?"""
    return torch.promote_types(getattr(function, "widest", dtype), dtype) == getattr(function, "widest", dtype)


@contextlib.contextmanager
def use_form(form: str | None = None, /, **by_mixer: str) -> Iterator[None]:
    """Ask for a form inside the block: `use_form("chunked")` for all mixers, or `use_form(mamba="recurrent")`."""
    before = dict(_traced)
    wanted = {**_asked.get(), **by_mixer} if form is None else {**_asked.get(), "*": form, **by_mixer}
    token = _asked.set(wanted)
    _traced.clear()
    _traced.update(wanted)
    try:
        yield
    finally:
        _asked.reset(token)
        _traced.clear()
        _traced.update(before)


def runnable(forms: Mapping[str, Callable], device: torch.device | str) -> list[str]:
    """Names of the forms that run on this kind of device."""
    kind = torch.device(device).type
    return [name for name, function in forms.items() if kind in getattr(function, "devices", (kind,))]


def choose(forms: Mapping[str, Callable], *, name: str, tokens: int, device: torch.device, dtype: torch.dtype = torch.float32,
           layer_form: str | None = None, prefer: tuple[str, ...] = PREFERENCE) -> str:
    """The form to run: what was asked for, or the preferred one that this device can run and that computes in `dtype`."""
    asked = _traced if torch.compiler.is_compiling() else _asked.get()
    form = asked.get(name) or asked.get("*") or layer_form
    able = runnable(forms, device)
    if form is not None:
        if form not in forms:
            raise ValueError(f"{name} has no form {form!r}; it has {', '.join(forms)}")
        if form not in able:
            raise ValueError(f"form {form!r} of {name} does not run on {device.type}; here it has {', '.join(able)}")
        return form
    definition = next(iter(forms))
    if tokens == 1 and definition == "recurrent":
        return definition
    fits = lambda form: is_exact(form, dtype) and dtype in (getattr(form, "chosen_for", ()) or (dtype,))  # noqa: E731
    return next((form for form in prefer if form in able and fits(forms[form])), definition)


def run(forms: Mapping[str, Callable], *streams: torch.Tensor, name: str, layer_form: str | None = None,
        prefer: tuple[str, ...] = PREFERENCE, **options: Any) -> Any:
    """Compute `streams` by the chosen form of `forms`. `name` is the mixer's key in the table, for asking and logging."""
    device, tokens = streams[0].device, streams[0].shape[1]
    form = choose(forms, name=name, tokens=tokens, device=device, dtype=streams[0].dtype, layer_form=layer_form, prefer=prefer)
    if not torch.compiler.is_compiling():
        record(name, form, device)
    return forms[form](*streams, **options)


def run_part(forms: Mapping[str, Callable], x: torch.Tensor, *streams: torch.Tensor | None, name: str, **options: Any) -> Any:
    """As `run`, for a part of a mixer: a definition and a form `fused`, chosen whatever the length.

    A form that is asked of all and that the part does not have here, or not in this dtype, means its definition: on a GPU
    `use_form("fused")` asks it of parts too, `use_form("chunked")` computes them as they are defined, and
    `use_form(short_conv="parallel")` asks one part by name.
    """
    tracing = torch.compiler.is_compiling()
    asked = _traced if tracing else _asked.get()
    form = definition = next(iter(forms))
    if not asked and x.device.type not in forms["fused"].devices:  # type: ignore[attr-defined]
        return forms[definition](x, *streams, **options)  # nothing to choose: at a single token choosing would cost a tenth
    every = asked.get("*", definition)
    if name in asked or (every in runnable(forms, x.device) and is_exact(forms[every], x.dtype)):
        form = choose(forms, name=name, tokens=0, device=x.device, dtype=x.dtype, prefer=("fused",))
    if form != definition and not tracing:
        record(name, form, x.device)
    return forms[form](x, *streams, **options)


def record(name: str, form: str, device: torch.device) -> None:
    if (name, form) not in _seen:
        _seen[name, form] = device.type
        log.info("%s runs as %s on %s", name, form, device.type)


def form_report() -> dict[str, list[str]]:
    """Which forms have run in this process, by mixer."""
    report: dict[str, list[str]] = {}
    for name, form in _seen:
        report.setdefault(name, []).append(form)
    return report
