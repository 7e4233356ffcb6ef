"""The law suite over the table of mixers, and hypothesis over lengths, cuts and segment patterns."""

from __future__ import annotations

import functools
import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from seqloom.core import BadInput
from seqloom.laws import LAWS, LawResult, apply, cases, keep, kept, observe, run_laws, summary, table, write_table
from seqloom.laws.cases import WIDTH, build, draw, info
from seqloom.laws.streaming import in_pieces

CASES = {case.name: case for case in cases()}

# Tracing takes seconds: a mixer's first example is traced in every run, the others in `make test-all`.
FIRST = {case.mixer: name for name, case in reversed(CASES.items())}.values()
PAIRS = [
    pytest.param(name, law, id=f"{name}-{law}", marks=[pytest.mark.slow] if law == "one_graph" and name not in FIRST else [])
    for name, case in CASES.items() for law in LAWS if LAWS[law].needs(case) is None
]


@pytest.mark.parametrize(("name", "law"), PAIRS)
def test_law(name, law):
    """The law holds; or the spec states why it cannot, and it is indeed broken there, so that no lack outlives its reason."""
    case = CASES[name]
    result = apply(LAWS[law], case)
    if result.verdict == "untested":
        pytest.skip(result.reason)
    if result.verdict == "lacks":
        assert len(result.reason) > 10, f"{name} lacks {law} without a reason: {result.reason!r}"
        assert apply(LAWS[law], case, despite_lack=True).verdict == "fail", f"{name} keeps {law}, which its spec says it lacks"
        return
    assert result.verdict == "pass", str(result)


@pytest.mark.parametrize("name", CASES)
def test_lacks_name_laws(name):
    unknown = set(CASES[name].spec.lacks) - set(LAWS)
    assert not unknown, f"{name} lacks {sorted(unknown)}, but the laws are {', '.join(LAWS)}"


# Random segment patterns, lengths and cuts --------------------------------------------------------------------------

@functools.cache
def layer_of(name):
    return build(CASES[name])


@some.composite
def settings_of_a_row(draw_value):
    """Ids of two rows of one random length, and where to cut them."""
    tokens = draw_value(some.integers(1, 70))
    row = some.lists(some.tuples(some.integers(0, 3), some.integers(1, 25)), min_size=1, max_size=8)
    rows = []
    for runs in (draw_value(row), draw_value(row)):
        ids = [value for value, size in runs for _ in range(size)]
        rows.append((ids * tokens)[:tokens])
    cuts = draw_value(some.sets(some.integers(1, max(tokens - 1, 1)), max_size=3)) if tokens > 1 else set()
    return torch.tensor(rows), tuple(sorted(cuts))


def one_by_one(layer, x, ids):
    """What segments mean, in plain Python: every sample alone, holds left out. Outputs, and the state of the last."""
    y, states = torch.zeros_like(x), []
    for b in range(x.shape[0]):
        real = [t for t in range(x.shape[1]) if ids[b, t] != 0]
        state = None
        for _, sample in itertools.groupby(enumerate(real), key=_run_number(ids[b])):
            at = [t for _, t in sample]
            alone, state, _ = layer(x[b : b + 1, at])
            y[b, at] = alone[0]
        states.append(state)
    return y, states


def _run_number(ids):
    """Key of a real token: how many changes of id there were among the real tokens up to it."""
    number, last, numbers = 0, None, {}
    for t, value in enumerate(ids.tolist()):
        if value != 0:
            number += last is not None and value != last
            last, numbers[t] = value, number
    return lambda pair: numbers[pair[1]]


@pytest.mark.parametrize("name", CASES)
@given(row=settings_of_a_row())
def test_any_pattern_any_cut(name, row):
    case, layer, (ids, cuts) = CASES[name], layer_of(name), row
    x = draw(2, ids.shape[1], WIDTH, name="pattern")
    with torch.no_grad():
        with observe.form(case.definition):
            want, states = one_by_one(layer, x, ids)
        for form in (None, *case.forms("cpu")):
            with observe.form(form):
                if case.spec.streams:
                    y, state = in_pieces(layer, x, ids, cuts)
                    after = observe.follow(layer, state)
                    for b, alone in enumerate(states):
                        ended = observe.follow(layer, layer.init_state(1) if alone is None else alone)
                        assert observe.gap(after["after"][b : b + 1], ended["after"]) < 1e-10, (form, b, "state")
                else:
                    y = layer(x, info=info(ids)).y
                assert observe.gap(y, want) < 1e-10, form


# The runner and the table ----------------------------------------------------------------------------------------------

def test_runner_says_what_it_does_not_know():
    with pytest.raises(BadInput, match="did you mean 'linear'"):
        run_laws(["linaer"])
    with pytest.raises(BadInput, match="did you mean 'packing'"):
        run_laws(["linear"], laws=["paking"])
    with pytest.raises(BadInput, match="device 'nonsense' cannot be used here"):
        run_laws(["linear"], device="nonsense")


def test_runner_in_processes_gives_the_same_results_in_the_same_order():
    laws = ["state_bytes", "future"]
    here, there = run_laws(["linear"], laws=laws), run_laws(["linear"], jobs=2, laws=laws)
    strip = lambda results: [(r.case, r.law, r.verdict, r.value) for r in results]  # noqa: E731
    assert strip(here) == strip(there)
    assert any(result.verdict == "not applicable" and result.reason == "it is not causal" for result in here)


def test_table_shows_every_verdict(tmp_path):
    row = dict(mixer="linear", device="cpu", system="Linux")
    results = [
        LawResult(example="", law="packing", verdict="pass", value=1e-15, limit=1e-10, **row),
        LawResult(example="conv", law="packing", verdict="fail", value=0.3, limit=1e-10, reason="y: 0.3 <= 1e-10", **row),
        LawResult(example="", law="future", verdict="lacks", reason="a stated reason", **row),
        LawResult(example="", law="resume", verdict="not applicable", reason="it takes no state", **row),
    ]
    text = table(results, {"cpu": {("linear", "chunked"): 1.25}})
    assert "| `linear` | 1 of 2 **fails** | untested | untested | untested |" in text
    assert "| mixer | CPU | CUDA | Apple MPS | Windows |" in text
    assert re.search(r"\| packing \| \*\*no\*\* 0.3 \|", text)
    assert "- lacks, future, linear: a stated reason" in text
    assert "| resume | – |" in text and "| `linear` | 1.2 |" in text
    assert [result.failed for result in results] == [False, True, False, False]
    said = summary(results).splitlines()
    assert said[0].startswith("linear       1 laws hold; lacks future: a stated reason")
    assert said[1].startswith("linear-conv  0 laws hold, 1 FAIL") and said[2].endswith("FAILS packing: y: 0.3 <= 1e-10")
    assert said[3] == "1 of 3 hold, on 2 examples of 1 mixers; 1 do not apply"
    path = tmp_path / "docs" / "laws.md"
    write_table(results, path, measure=False)
    assert path.read_text(encoding="utf-8") == table(results)
    # a page made here shows what was kept of a device that is not here, and not what was kept of this one
    elsewhere = [LawResult("linear", "", "packing", "pass", 1e-5, 2e-4, device="cuda:0", system="Linux")]
    keep(elsewhere, tmp_path)
    keep([LawResult("linear", "", "packing", "fail", 1.0, 2e-4, device="cpu", system="Linux")], tmp_path)
    write_table(results, path, others=kept(tmp_path), measure=False)
    assert path.read_text(encoding="utf-8") == table([*results, *elsewhere])


def test_an_error_in_a_law_is_a_failure_not_a_skip(monkeypatch):
    case = CASES["linear"]
    monkeypatch.setattr(type(layer_of("linear")), "mix", lambda *a, **k: 1 / 0)
    result = apply(LAWS["packing"], case)
    assert result.verdict == "fail" and "ZeroDivisionError" in result.reason
