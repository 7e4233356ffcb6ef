"""Laws on low precision: what is marked float32 stays so, and a fast form costs at most twice the error of the plain one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from seqloom.core import Mixer
from seqloom.core import state as st
from seqloom.core.marks import cast, marks
from seqloom.laws import observe
from seqloom.laws.cases import WIDTH, Case, build, draw, info, patterns
from seqloom.laws.law import Measure
from seqloom.laws.observe import intercepted

LOW = torch.bfloat16


def marked_dtypes(case: Case, device: str) -> Iterator[Measure]:
    """Marked parameters survive a cast to bfloat16 and autocast; states keep their dtypes; outputs stay near float64.

    Near is a relative error (root mean square) below 0.1 of a layer with parameters of unit scale.
    """
    exact, layer = build(case, device=device), build(case, dtype=torch.float32, device=device)
    plain = {name: marks(parameter) for name, parameter in layer.named_parameters()}
    marked = {name: layer.get_parameter(name).detach().clone() for name, found in plain.items() if found["keep_float32"]}
    x, ids = draw(5, 40, WIDTH, name="low", device=device), patterns(40, device)
    with torch.no_grad(), observe.form(case.definition):
        want = exact(x.to(LOW).double(), info=info(ids)).y
    kind = torch.device(device).type
    for name in case.forms(device):
        with torch.no_grad(), observe.form(name), torch.autocast(kind, LOW):
            yield from _runs(layer, f"autocast, {name}", x.float(), ids, want)
    cast(layer, LOW)
    wrong = [name for name, value in layer.named_parameters() if value.dtype != (torch.float32 if name in marked else LOW)]
    yield Measure(f"parameters of a wrong dtype after the cast ({', '.join(wrong) or 'none'})", len(wrong), 0)
    changed = [name for name, value in marked.items() if not torch.equal(layer.get_parameter(name), value)]
    yield Measure(f"marked values changed by the cast ({', '.join(changed) or 'none'})", len(changed), 0)
    lost = [name for name, parameter in layer.named_parameters() if marks(parameter) != plain[name]]
    yield Measure(f"marks lost in the cast ({', '.join(lost) or 'none'})", len(lost), 0)
    for name in case.forms(device):
        with torch.no_grad(), observe.form(name):
            yield from _runs(layer, f"bfloat16, {name}", x.to(LOW), ids, want)


def _runs(layer: Mixer, where: str, x: Tensor, ids: Tensor, want: Tensor) -> Iterator[Measure]:
    """The layer runs in two pieces with the dtypes of `init_state`, and near `want`."""
    if not layer.spec.streams:
        y = layer(x, info=info(ids)).y
    else:
        first, state, _ = layer(x[:, :20], info=info(ids[:, :20]))
        second, after, _ = layer(x[:, 20:], state=state, info=info(ids[:, 20:]))
        y = torch.cat([first, second], 1)
        # under autocast what is stored may be in either dtype; accumulators are float32 in both
        said = zip(*(st.leaves(layer.init_state(1, dtype=kind)) for kind in (x.dtype, LOW)), strict=True)
        allowed = [{leaf.dtype for leaf in pair} for pair in said]
        for what, found in (("first", state), ("second", after)):
            wrong = sum(leaf.dtype not in known for leaf, known in zip(st.leaves(found), allowed, strict=True))
            yield Measure(f"{where}, tensors of the {what} state with another dtype than init_state's", wrong, 0)
    yield Measure(f"{where}, output of another dtype", float(y.dtype not in (x.dtype, LOW)), 0)
    error = (y.double() - want).square().mean().sqrt() / want.square().mean().sqrt()
    yield Measure(f"{where}, error", float(error), 0.1)


def bf16_error(case: Case, device: str) -> Iterator[Measure]:
    """In bfloat16 a form errs at most twice as much as the definition with rounded inputs, float32 state, rounded output.

    Measured on the kernel's own streams, root mean square against the definition in float64; outputs and gradients.
    """
    low, ids = build(case, dtype=LOW, device=device), patterns(70, device)
    x = draw(5, 70, WIDTH, name="bf16", device=device)
    call = captured(low, x.to(LOW), ids)             # the dtype each stream has when the layer runs in bfloat16
    exact = captured(build(case, device=device), x, ids)  # and its values
    if call is None or exact is None:
        raise AssertionError("the layer does not compute through Mixer.run, so its kernel cannot be measured")
    forms = case.spec.forms
    rounded, options = _like(exact[0], call[0]), _like(exact[1], call[1])
    output = LOW if any(isinstance(stream, Tensor) and stream.dtype == LOW for stream in rounded) else torch.float32
    want = _kernel(forms[case.definition], *exact)
    plain = _kernel(forms[case.definition], st.tree_map(_wide, rounded), st.tree_map(_wide, options), output)
    for name in case.forms(device):
        got = _kernel(forms[name], rounded, options)
        yield Measure(f"{name}, output in another dtype than {output}", float(got["y"].dtype != output), 0)
        for key, value in want.items():
            if value is None or not value.abs().max():
                continue
            limit = 2 * _rms(plain[key], value) + 1e-6
            yield Measure(f"{name}, {key} (the definition errs {limit / 2:.2g})", _rms(got[key], value), limit)


def captured(layer: Mixer, x: Tensor, ids: Tensor) -> tuple[list, dict] | None:
    """Streams and options of the layer's kernel call, detached."""
    kept: list[tuple[list, dict]] = []

    def keep(original: Any, *streams: Any, **options: Any) -> Any:
        kept.append(([_free(stream) for stream in streams], {name: _free(value) for name, value in options.items()}))
        return original(*streams, **options)

    with torch.no_grad(), intercepted(layer, keep):
        layer(x, info=info(ids))
    return kept[0] if kept else None


def _free(value: Any) -> Any:
    return st.tree_map(lambda leaf: leaf.detach().clone(), value)


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32)) if value.is_floating_point() else value


def _like(values: Any, models: Any) -> Any:
    """Tensors of `values` (float64) in the dtypes that their counterparts in `models` have."""
    return pytree.tree_map(lambda a, b: a.to(b.dtype) if isinstance(a, Tensor) else a, values, models)


def _kernel(form: Any, streams: list, options: Mapping[str, Any],
            output: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """Output (rounded to `output` if given) and gradients with respect to the streams of one kernel call."""
    leaves = [x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in streams]
    y = form(*leaves, **options).y
    y = y if output is None else y.to(output)
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    weights = draw(*y.shape, name="bf16 weights", device=str(y.device)).to(LOW).to(y.dtype)
    gradients = torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True)
    named = {f"d stream {i}": g for i, g in enumerate(gradients)}
    if output is not None:
        # the fast form's gradients come rounded to its streams' dtype, so the plain ones are rounded alike
        named = {key: None if g is None else g.to(output).to(g.dtype) for key, g in named.items()}
    return {"y": y.detach(), **named}


def _rms(got: Tensor | None, want: Tensor) -> float:
    got = torch.zeros_like(want) if got is None else got.to(want.dtype)
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


__all__ = ["bf16_error", "captured", "marked_dtypes"]
