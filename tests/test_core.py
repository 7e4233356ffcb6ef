"""The contract's own parts against plain Python: segments, scans, states, specs, forms, errors, claims."""

from __future__ import annotations

import dataclasses
import json
import threading
from typing import ClassVar, Literal, NamedTuple

import pytest
import torch
import torch._dynamo
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor, nn

from seqloom import core
from seqloom.core import (
    BadInput,
    BuildContext,
    Info,
    MissingExtra,
    Mixer,
    Segments,
    Spec,
    State,
    Track,
    marks,
    near,
    segments,
    spec,
)
from seqloom.core import state as st
from seqloom.core.context import split

# Segments ----------------------------------------------------------------------------------------------------------

some_rows = some.integers(1, 12).flatmap(
    lambda tokens: some.lists(some.lists(some.integers(0, 3), min_size=tokens, max_size=tokens), min_size=1, max_size=3)
)
some_track = some.tuples(some.integers(0, 3), some.integers(0, 50))


def resolved_by_loop(ids, segment, position):
    """DESIGN.md's sentence on segments, token by token."""
    real, run, positions, count = [], [], [], 0
    for value in ids:
        if value != 0:
            if segment not in (0, value):
                count, position = count + 1, 0
            segment = value
            positions.append(position)
            position += 1
        real.append(value != 0)
        run.append(count)
        if value == 0:
            positions.append(None)  # a hold's position is nobody's business
    return real, run, positions, segment, position


@given(rows=some_rows, starts=some.lists(some_track, min_size=3, max_size=3))
def test_resolve_equals_a_loop(rows, starts):
    starts = starts[: len(rows)]
    track = Track(torch.tensor([s for s, _ in starts]), torch.tensor([p for _, p in starts]))
    found, positions, new = segments.resolve(torch.tensor(rows), track)
    for b, (ids, (segment, position)) in enumerate(zip(rows, starts, strict=True)):
        real, run, places, last, following = resolved_by_loop(ids, segment, position)
        assert found.real[b].tolist() == real
        assert found.run[b].tolist() == run
        assert [p for p, r in zip(positions[b].tolist(), real, strict=True) if r] == [p for p in places if p is not None]
        assert (new.segment[b].item(), new.position[b].item()) == (last, following)


@given(rows=some_rows, cut=some.integers(0, 11))
def test_resolve_in_two_calls_equals_one(rows, cut):
    ids = torch.tensor(rows)
    cut = min(cut, ids.shape[1] - 1)
    whole, positions, end = segments.resolve(ids, Track.start(len(rows)))
    if cut == 0:
        return
    _, first, track = segments.resolve(ids[:, :cut], Track.start(len(rows)))
    later, second, last = segments.resolve(ids[:, cut:], track)
    real = ids != 0
    assert torch.equal(torch.cat([first, second], 1)[real], positions[real])
    assert torch.equal(last.segment, end.segment) and torch.equal(last.position, end.position)
    # runs of the second call count from its own beginning
    assert torch.equal(whole.run[:, cut:] - whole.run[:, cut - 1 : cut], later.run)


def test_resolve_takes_any_integer_ids():
    for dtype in (torch.int32, torch.uint8, torch.int64):
        found, _, track = segments.resolve(torch.tensor([[0, 2, 2, 5]], dtype=dtype), Track.start(1))
        assert found.run.tolist() == [[0, 0, 0, 1]] and track.segment.dtype == torch.int64


def test_advance_counts_on_and_gives_a_fresh_row_its_segment():
    positions, track = segments.advance(Track(torch.tensor([0, 7]), torch.tensor([0, 4])), 3)
    assert positions.tolist() == [[0, 1, 2], [4, 5, 6]]
    assert track.segment.tolist() == [1, 7] and track.position.tolist() == [3, 7]


def test_hold_is_a_selection():
    found = Segments(torch.tensor([[True, False]]), torch.zeros(1, 2, dtype=torch.int64))
    x = torch.tensor([[[1.0], [float("nan")]]], requires_grad=True)
    y = found.hold(x)
    y.sum().backward()
    assert y.tolist() == [[[1.0], [0.0]]] and x.grad.tolist() == [[[1.0], [0.0]]]
    assert found.hold(torch.ones(1, 2), -1.0).tolist() == [[1.0, -1.0]]


def test_pad_order_and_starts():
    found, *_ = segments.resolve(torch.tensor([[0, 1, 0, 2, 2]]), Track.start(1))
    assert found.starts().tolist() == [[False, False, False, True, False]]
    padded = found.pad(2)
    assert padded.real.tolist() == [[False, True, False, True, True, False, False]]
    assert padded.run.tolist() == [[0, 0, 0, 1, 1, 1, 1]] and found.pad(0) is found
    source, place = found.order()
    assert source.tolist() == [[1, 3, 4, 0, 2]]
    assert torch.equal(source.gather(1, place), torch.arange(5)[None])


# Scans -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 33, 257, 300])
def test_carry_equals_a_loop(n):
    a, b, h = torch.rand(2, n, 3, dtype=torch.float64), torch.randn(2, n, 3, dtype=torch.float64), torch.randn(2, 3).double()
    before, last = core.carry(a, b, h)
    want = []
    for i in range(n):
        want.append(h)
        h = a[:, i] * h + b[:, i]
    torch.testing.assert_close(before, torch.stack(want, 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [5, 40])
def test_carry_with_transitions_that_do_not_commute(n):
    a, b = torch.randn(2, n, 3, 3, dtype=torch.float64) / 2, torch.randn(2, n, 3, 4, dtype=torch.float64)
    h = torch.randn(2, 3, 4, dtype=torch.float64)
    before, last = core.carry(a, b, h, act=torch.matmul, compose=torch.matmul)
    for i in range(n):
        torch.testing.assert_close(before[:, i], h, rtol=1e-10, atol=1e-10)
        h = a[:, i] @ h + b[:, i]
    torch.testing.assert_close(last, h, rtol=1e-10, atol=1e-10)


def test_carry_has_gradients():
    a, b, h = torch.rand(1, 20, 1).double(), torch.randn(1, 20, 2).double(), torch.randn(1, 2).double()
    assert torch.autograd.gradcheck(core.carry, tuple(x.requires_grad_() for x in (a, b, h)))


def test_scan_resets_and_holds():
    def step(state, x):
        return state + x, 10 * state + x

    x = torch.arange(1.0, 7.0)[None, :, None]
    found, *_ = segments.resolve(torch.tensor([[1, 1, 0, 1, 2, 2]]), Track.start(1))
    y, state, _ = core.scan(step, x, state=torch.tensor([[100.0]]), segments=found)
    #                           0: 100|1    1: 101|2    hold     3: 103|4   reset 0|5  5|6
    assert y[0, :, 0].tolist() == [1001.0, 1012.0, 0.0, 1034.0, 5.0, 56.0]
    assert state.tolist() == [[11.0]]
    again = core.scan(step, x, state=torch.tensor([[100.0]]), segments=found, empty=torch.tensor([[1.0]]))
    assert again.y[0, 4, 0].item() == 15.0 and again.state.tolist() == [[12.0]]


# States ----------------------------------------------------------------------------------------------------------

class Inner(NamedTuple):
    wide: Tensor
    tail: Tensor | None


def a_state(batch=3):
    cells = Inner(torch.randn(batch, 2, 4), torch.randn(batch, 5).to(torch.bfloat16))
    return State(Track(torch.arange(batch), torch.arange(batch) * 10), cells)


def test_select_repeat_clone_detach():
    state = a_state()
    chosen = st.select(state, torch.tensor([2, 0]))
    assert chosen.track.position.tolist() == [20, 0] and torch.equal(chosen.cells.wide[0], state.cells.wide[2])
    doubled = st.repeat(state, 2)
    assert doubled.track.segment.tolist() == [0, 0, 1, 1, 2, 2] and torch.equal(doubled.cells.tail[3], state.cells.tail[1])
    copied = st.clone(state)
    copied.cells.wide.zero_()
    assert state.cells.wide.abs().sum() > 0
    state.cells.wide.requires_grad_()
    assert not st.detach(state).cells.wide.requires_grad
    assert isinstance(chosen, State) and isinstance(chosen.cells, Inner)


def test_missing_cells_pass_through_every_operation():
    state = State(Track.start(2), Inner(torch.randn(2, 3, 3), None))
    for changed in (st.select(state, torch.tensor([1])), st.repeat(state, 2), st.clone(state), st.detach(state), st.to(state)):
        assert changed.cells.tail is None
    assert st.count_bytes(state) == 2 * 9 * 4 + 2 * 2 * 8
    assert st.write_back(state, st.clone(state)).cells.tail is None


def test_state_saves_and_loads(tmp_path):
    state, path = a_state(), tmp_path / "state.safetensors"
    st.save(state, path)
    loaded = st.load(st.tree_map(torch.zeros_like, state), path)
    for got, want in zip(st.leaves(loaded), st.leaves(state), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)
    with pytest.raises(ValueError, match="does not hold this model's state"):
        st.load((state, state), path)


def test_state_of_a_mixer_without_a_cell_saves_and_loads(tmp_path):
    state = State(Track.start(2), Inner(torch.randn(2, 3, 3), None))
    st.save(state, tmp_path / "state.safetensors")
    loaded = st.load(st.tree_map(torch.zeros_like, state), tmp_path / "state.safetensors")
    assert torch.equal(loaded.cells.wide, state.cells.wide) and loaded.cells.tail is None


def test_state_with_shared_tensors_saves(tmp_path):
    shared = torch.randn(2, 3)
    state = (Inner(shared, shared), Inner(shared[:, :2], shared.T))
    st.save(state, tmp_path / "state.safetensors")
    loaded = st.load(st.tree_map(torch.zeros_like, state), tmp_path / "state.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(st.leaves(loaded), st.leaves(state), strict=True))


def test_write_back_keeps_addresses_and_refuses_another_shape():
    old, new = a_state(), a_state()
    addresses = [leaf.data_ptr() for leaf in st.leaves(old)]
    back = st.write_back(old, new)
    assert [leaf.data_ptr() for leaf in st.leaves(back)] == addresses
    assert all(torch.equal(a, b) for a, b in zip(st.leaves(back), st.leaves(new), strict=True))
    with pytest.raises(ValueError, match=r"init_state\(batch, capacity=...\)"):
        st.write_back(a_state(2), new)


def test_count_bytes():
    assert st.count_bytes(a_state(1)) == 2 * 4 * 4 + 5 * 2 + 2 * 8


# Specs -------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True, kw_only=True)
class Wheel(Spec):
    size: int
    rate: float = 1.0
    shape: Literal["round", "square"] = "round"
    name_of: str | None = None
    key: ClassVar[str] = "wheel"

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"Wheel: size {self.size} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cart:
    wheels: tuple[Wheel, ...]
    load: Wheel | None = None


TABLE = {"wheel": Wheel, "cart": Cart}
CART = Cart(wheels=(Wheel(size=1), Wheel(size=2, rate=0.5, shape="square")), load=Wheel(size=3, name_of="x"))


def test_spec_round_trips_through_plain_data():
    data = json.loads(json.dumps(core.to_dict(CART, TABLE)))
    assert core.from_dict(data, TABLE) == CART
    assert data["wheels"][0] == {"kind": "wheel", "size": 1, "rate": 1.0, "shape": "round", "name_of": None}, "every field"


def test_a_field_called_kind_is_refused_not_mixed_up():
    named = dataclasses.make_dataclass("Named", [("kind", str)], frozen=True)
    with pytest.raises(BadInput, match="kind"):
        core.to_dict(named("square"), {"named": named})


@pytest.mark.parametrize(("data", "said"), [
    ({"kind": "whel", "size": 1}, "the spec: no kind 'whel'; did you mean 'wheel'?"),
    ({"kind": "wheel", "sise": 1}, "sise: wheel has no setting 'sise'; did you mean 'size'?"),
    ({"kind": "wheel", "size": "big"}, "size: expected int, found 'big'"),
    ({"kind": "wheel", "size": True}, "size: expected int, found True"),
    ({"kind": "wheel", "size": 1.5}, "size: expected int, found 1.5"),
    ({"kind": "wheel", "rate": 1}, "the spec: wheel needs size"),
    ({"kind": "wheel", "size": 0}, "the spec: Wheel: size 0 must be at least 1"),
    ({"kind": "cart", "wheels": [{"kind": "wheel", "size": 1}, {"kind": "wheel", "rat": 1}]},
     "wheels[1].rat: wheel has no setting 'rat'; did you mean 'rate'?"),
    ({"kind": "cart", "wheels": [3]}, "wheels: expected "),
])
def test_spec_errors_say_where_what_and_what_would_work(data, said):
    with pytest.raises(BadInput) as error:
        core.from_dict(data, TABLE)
    assert str(error.value).startswith(said)


def test_a_wrong_choice_lists_the_choices():
    with pytest.raises(BadInput, match=r"shape: expected .*round.*square.*, found 'oval'"):
        core.from_dict({"kind": "wheel", "size": 1, "shape": "oval"}, TABLE)


def test_an_int_is_taken_for_a_float():
    assert core.from_dict({"kind": "wheel", "size": 1, "rate": 2}, TABLE).rate == 2.0
    assert isinstance(core.from_dict({"kind": "wheel", "size": 1, "rate": 2}, TABLE).rate, float)


def test_what_is_not_in_the_table_cannot_be_saved():
    with pytest.raises(BadInput, match="Wheel is not in the table"):
        core.to_dict(Wheel(size=1), {})
    with pytest.raises(BadInput, match="not set"):
        core.to_dict({"a": {1, 2}}, TABLE)


def test_yaml_errors_name_the_line():
    text = "kind: cart\nwheels:\n  - kind: wheel\n    size: 1\n  - kind: wheel\n    sise: 2\n"
    data, lines = core.load_yaml(text, "run.yaml")
    with pytest.raises(BadInput, match=r"wheels\[1\].sise \(line 6\): wheel has no setting 'sise'; did you mean 'size'"):
        core.from_dict(data, TABLE, lines=lines)
    with pytest.raises(BadInput, match=r"run.yaml, line 3: 'size' is given twice"):
        core.load_yaml("kind: wheel\nsize: 1\nsize: 2\n", "run.yaml")
    with pytest.raises(BadInput, match=r"run.yaml, line \d: not valid YAML"):
        core.load_yaml("kind: [wheel\nsize: 1\n", "run.yaml")
    assert core.load_yaml("", "run.yaml") == (None, {})


def test_yaml_never_builds_objects():
    with pytest.raises(BadInput, match="YAML"):
        core.load_yaml("a: !!python/object/apply:os.getcwd []", "run.yaml")


def test_format_upgrades_older_and_refuses_newer(monkeypatch):
    packed = spec.pack(CART, TABLE)
    assert packed["format"] == spec.FORMAT and spec.unpack(packed, TABLE) == CART
    with pytest.raises(BadInput, match=rf"old has format {spec.FORMAT + 1}, newer than this seqloom reads \({spec.FORMAT}\)"):
        spec.unpack({**packed, "format": spec.FORMAT + 1}, TABLE, "old")
    with pytest.raises(BadInput, match="holds no seqloom spec"):
        spec.unpack({"model_type": "llama"}, TABLE)

    def renamed(data):
        data["size"] = data.pop("width")
        return data

    monkeypatch.setattr(spec, "FORMAT", spec.FORMAT + 2)
    monkeypatch.setitem(spec.UPGRADES, spec.FORMAT - 2, renamed)
    monkeypatch.setitem(spec.UPGRADES, spec.FORMAT - 1, lambda data: {**data, "rate": 2.0})
    old = {"format": spec.FORMAT - 2, "spec": {"kind": "wheel", "width": 4}}
    assert spec.unpack(old, TABLE) == Wheel(size=4, rate=2.0)
    assert old["spec"] == {"kind": "wheel", "width": 4}, "an upgrade works on a copy"


# Forms and Info --------------------------------------------------------------------------------------------------

def named(name):
    return lambda x, **options: name


FORMS = {"recurrent": named("recurrent"), "chunked": named("chunked"), "fused": core.gpu_only(torch.bfloat16)(named("fused"))}


def ran(tokens=4, **options):
    return core.run(FORMS, torch.zeros(1, tokens, 2), name="toy", **options)


def test_automatic_form():
    assert ran() == "chunked" and ran(tokens=1) == "recurrent"
    assert ran(prefer=("parallel",)) == "recurrent", "the definition, where nothing preferred runs"
    assert core.runnable(FORMS, "cpu") == ["recurrent", "chunked"]
    assert core.runnable(FORMS, "cuda") == ["recurrent", "chunked", "fused"]


def test_use_form_by_name_and_nested():
    with core.use_form("recurrent"):
        assert ran() == "recurrent"
        with core.use_form(toy="chunked", other="recurrent"):
            assert ran() == "chunked"
        assert ran(layer_form="chunked") == "recurrent", "asking outside goes before the layer's own"
    assert ran(layer_form="recurrent") == "recurrent" and ran() == "chunked"


def test_use_form_ends_with_its_block_even_after_an_error():
    with pytest.raises(KeyError), core.use_form("recurrent"):
        raise KeyError
    assert ran() == "chunked"


def test_an_unknown_or_impossible_form_is_an_error():
    with core.use_form("chunkd"), pytest.raises(ValueError, match="toy has no form 'chunkd'; it has recurrent, chunked, fused"):
        ran()
    with core.use_form("fused"), pytest.raises(ValueError, match="does not run on cpu; here it has recurrent, chunked"):
        ran()


def test_forms_are_reported():
    with core.use_form("recurrent"):
        ran()
    ran()
    assert {"recurrent", "chunked"} <= set(core.form_report()["toy"])


def test_info_refuses_what_is_not_used():
    given_info = Info(segments=torch.ones(1, 2), dt=torch.ones(1, 2))
    given_info.check("Toy", frozenset({"segments", "dt"}))
    with pytest.raises(ValueError, match=r"Toy does not use info.dt; it uses segments"):
        given_info.check("Toy", frozenset({"segments"}))
    with pytest.raises(ValueError, match=r"it uses none"):
        given_info.check("Toy", frozenset())
    assert given_info.only(frozenset({"dt"})).given() == {"dt"}
    assert given_info.slice(0, 1).dt.shape == (1, 1)
    assert torch.utils._pytree.tree_map(lambda x: x + 1, given_info).dt.tolist() == [[2.0, 2.0]]


# The layer contract ------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum(Spec):
    """y_t = the sum of the inputs so far: the smallest mixer there is."""

    direction: str = "causal"
    key: ClassVar[str] = "sum"

    def build(self, ctx):
        return SumLayer(self)


class SumLayer(Mixer):
    def __init__(self, spec):
        super().__init__(spec)
        self.scale = nn.Parameter(torch.ones(()))

    def mix(self, x, cells, place, info, donate):
        start = self.empty(x.shape[0], None, x.dtype, x.device) if cells is None else cells
        return (lambda mixed: (mixed.y, mixed.state, {}))(core.scan(self.step, x, state=start, segments=place.segments))

    def step(self, state, x):
        return state + x, self.scale * (state + x)

    def empty(self, batch, capacity, dtype, device):
        return torch.zeros(batch, 2, dtype=dtype, device=device)


def test_the_base_keeps_track_and_holds():
    layer = Sum().build(BuildContext(dim=2))
    x = torch.ones(1, 4, 2)
    x[0, 1] = float("nan")
    y, state, aux = layer(x, info=Info(segments=torch.tensor([[1, 0, 1, 2]])))
    assert y[0, :, 0].tolist() == [1.0, 0.0, 2.0, 1.0] and aux == {}
    assert state.track.segment.tolist() == [2] and state.track.position.tolist() == [1]
    later, _, _ = layer(torch.ones(1, 1, 2), state=state)
    assert later.flatten().tolist() == [2.0, 2.0], "tokens without ids go on with the carried segment"


def test_the_base_refuses_what_it_cannot_do():
    layer, both = Sum().build(BuildContext(dim=2)), Sum(direction="bidirectional").build(BuildContext(dim=2))
    state = layer(torch.ones(1, 2, 2)).state
    with pytest.raises(ValueError, match="is not causal: it takes no state"):
        both(torch.ones(1, 2, 2), state=state)
    assert both(torch.ones(1, 2, 2)).state is None
    with pytest.raises(NotImplementedError, match="Sum has no cross-mixing"):
        layer.read_in(torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match=r"Sum does not use info.role"):
        layer(torch.ones(1, 2, 2), info=Info(role=torch.zeros(1, 2)))


def test_donate_writes_in_place_and_state_bytes_allocate_nothing():
    layer = Sum().build(BuildContext(dim=2))
    state = layer.init_state(2)
    with torch.no_grad():
        kept = layer(torch.ones(2, 3, 2), state=state).state
        assert state.cells.abs().sum() == 0 and kept.cells[0, 0] == 3
        donated = layer(torch.ones(2, 3, 2), state=state, donate=True).state
    assert donated.cells.data_ptr() == state.cells.data_ptr() and state.cells[0, 0] == 3
    assert layer.state_bytes(10, batch=2) == 2 * 2 * 4 + 2 * 2 * 8
    assert layer.state_bytes(10, dtype=torch.bfloat16) == 2 * 2 + 2 * 8


def test_shared_parameters_are_made_once():
    ctx = BuildContext(dim=4, depth=3)
    users = [nn.Module() for _ in range(3)]
    made = [ctx.at(i).shared("bounds", lambda: nn.Linear(2, 2), user) for i, user in enumerate(users)]
    assert made[0] is made[1] is made[2] and len(list(ctx.store.parameters())) == 2
    assert all(user.bounds is made[0] for user in users)  # outside of a stack each owns it: it is moved and trained with it
    inside, user = BuildContext(dim=4, depth=3, stack_owns=True), nn.Module()
    assert inside.shared("bounds", lambda: nn.Linear(2, 2), user) is inside.store["bounds"] and not list(user.parameters())
    assert ctx.at(2).layer == 2 and ctx.at(2).depth == 3


def test_split_names_a_width_that_works():
    assert split(12, 3, "X") == 4
    with pytest.raises(ValueError, match="X: dim 10 does not split over 4 heads; nearest is 8"):
        split(10, 4, "X")
    with pytest.raises(ValueError, match="nearest is 4"):
        split(2, 4, "X")


# Marks, errors, claims -----------------------------------------------------------------------------------------------

def test_cast_keeps_what_is_marked():
    module = nn.Module()
    module.kept = marks.mark(nn.Parameter(torch.tensor([1.0001])), keep_float32=True, no_decay=True)
    module.plain = nn.Parameter(torch.ones(2))
    module.count = nn.Buffer(torch.zeros(1, dtype=torch.int64))
    assert marks.cast(module, torch.bfloat16) is module
    assert module.kept.dtype == torch.float32 and module.kept.item() == pytest.approx(1.0001, abs=1e-7)
    assert module.plain.dtype == torch.bfloat16 and module.count.dtype == torch.int64
    assert marks.marks(module.kept) == {"no_decay": True, "keep_float32": True, "lr_scale": 1.0}
    assert marks.marks(module.plain)["no_decay"] is False
    assert marks.cast(module, torch.float64).kept.dtype == torch.float64


def test_near_names():
    assert near("sofmax", ["softmax", "mamba"]) == "did you mean 'softmax'?"
    assert near("zzz", ["softmax", "mamba"]) == "known: mamba, softmax"


def test_an_absent_extra_is_one_sentence():
    with pytest.raises(MissingExtra, match=r"drawing needs the package 'no_such_package', .* pip install 'seqloom\[data\]'"):
        core.require_extra("no_such_package.part", "data", "drawing")
    assert issubclass(MissingExtra, BadInput) and issubclass(MissingExtra, ImportError)
    assert core.require_extra("json", "data", "reading").__name__ == "json"


def test_requirements_hold_on_means():
    means = {"method": {"score": 0.9, "late": 0.2}, "baseline": {"score": 0.6, "late": 0.1}}
    assert core.beats("method", "baseline", by=0.3 - 1e-9).holds(means)
    assert not core.beats("method", "baseline", by=0.31).holds(means)
    assert core.above("method", 0.9).holds(means) and core.below("method", 0.2, on="late").holds(means)
    assert not core.below("method", 0.8).holds(means)
    assert str(core.beats("method", "baseline", by=0.2)) == "method >= baseline + 0.2 on score"
    assert str(core.below("method", 0.2, on="late")) == "method <= 0.2 on late"
    check = core.Check(text="", where="", measure=lambda: 1.0, limit=1.0)
    assert check.holds(1.0) and not check.holds(1.1) and not check.holds(float("nan"))


def test_use_form_does_not_reach_another_thread():
    found = []
    with core.use_form("recurrent"):
        thread = threading.Thread(target=lambda: found.append(ran()))
        thread.start()
        thread.join()
    assert found == ["chunked"]


@pytest.mark.skipif(hasattr(core.run, "__wrapped__"), reason="no compiler traces annotations that are checked at run time")
def test_a_compiled_graph_follows_the_form_in_force():
    forms = {"recurrent": lambda x: x + 1, "chunked": lambda x: x + 2}
    torch._dynamo.reset()
    call = torch.compile(lambda x: core.run(forms, x, name="toy"), backend="eager", fullgraph=True)
    x = torch.zeros(1, 4, 2)
    assert call(x)[0, 0, 0] == 2
    with core.use_form("recurrent"):
        assert call(x)[0, 0, 0] == 1
    with core.use_form(toy="recurrent"):
        assert call(x)[0, 0, 0] == 1
    assert call(x)[0, 0, 0] == 2
