"""The benchmark runner on a CPU: its suites end in rows, refuse what they must, and count what the definitions multiply."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
import torch

from seqloom.bench import flops, report, suites, tune
from seqloom.bench import kernels as K
from seqloom.bench.decode import FEWER, SOFTMAX, decode
from seqloom.bench.layers import BASE, layers
from seqloom.bench.timing import attempt
from seqloom.cli.main import main
from seqloom.core import BadInput
from seqloom.kernels.triton import tiles
from seqloom.kernels.triton.tiles import Tiles
from seqloom.mixers import MIXERS
from seqloom.models import Block, Stack
from seqloom.models.presets import mixer_for
from seqloom.models.sequence import language_model
from seqloom.parts import SwiGLU

# Suites -------------------------------------------------------------------------------------------------------------


def test_the_suites_keep_what_was_measured_before():
    parts = {part for each in suites.SUITES.values() for part in each}
    assert list(suites.SUITES) == ["kernels", "layers", "models", "decode", "scale"]
    assert parts >= {"training", "state-space", "lengths", "segments", "decoding", "kernels"}


def test_layers_stand_beside_sdpa_and_the_floor():
    rows = {row["name"]: row for row in layers(["linear", "gru"], rounds=1, dim=64, tokens=96)}
    assert list(rows) == [BASE, "linear", "gru"] and rows[BASE]["speedup"] == 1
    assert rows["linear"]["times_floor"] > 0 and rows["linear"]["setup_seconds"] > 0
    assert rows["gru"]["floor_seconds"] is None  # its operations are not counted


def test_decoding_stands_beside_softmax_with_as_many_and_with_fewer_key_heads():
    rows = decode(["gated_linear", "hydra"], rounds=1, contexts=(8, 24), steps=2, dim=256, depth=1)
    at = {(row["name"], row.get("context")): row for row in rows}
    ours = at["gated_linear", 24]
    assert ours["times_softmax"] > 0 and ours["times_fewer"] > 0 and ours["times_floor"] > 0
    assert ours["state_bytes"] == at["gated_linear", 8]["state_bytes"] and not ours["graph"]
    assert at[SOFTMAX, 24]["state_bytes"] > 3.5 * at[FEWER, 24]["state_bytes"]
    assert ("transformers Llama", 24) in at and not any(name == "hydra" for name, _ in at)  # hydra does not stream


def test_models_are_timed_beside_other_libraries_and_a_failure_is_a_row():
    makers = {"ours": lambda: suites.zoo.ours("linear", layers=1), "theirs": lambda: 1 / 0}
    failed, ours = suites._time_models(makers, (1, 16), 1, "ours")
    assert failed == {"name": "theirs", "failed": "failed: ZeroDivisionError: division by zero"}
    assert ours["speedup"] == 1 and ours["times_floor"] > 0


def test_the_command_writes_a_file_for_each_part(tmp_path, capsys):
    words = ["bench", "layers", "--part", "segments", "--mixers", "linear", "--rounds", "1", "--tokens", "64", "--dim", "64"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "segments_cpu.json").read_text())["rows"]
    assert row["name"] == "linear" and row["cost"] > 0 and "cost" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "said"), [
    (["training"], "seqloom bench models --part training"),
    (["layers", "--part", "lenghts"], "layers has no part 'lenghts'"),
    (["models", "--mixers", "mmaba"], "did you mean 'mamba'?"),
    (["decode", "--batch", "0"], "--batch must be at least 1"),
    pytest.param(["scale", "--part", "million", "--mixers", "linear"], "million is sized for a GPU",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
])
def test_what_bench_cannot_do_is_one_sentence(words, said, capsys):
    assert main(["bench", *words]) == 2 and said in capsys.readouterr().err


def test_a_mixer_that_fails_its_laws_is_not_timed(monkeypatch, capsys):
    from seqloom import laws
    from seqloom.laws.law import LawResult

    red = LawResult("linear", "", "forms_agree", "fail")
    assert red.failed
    monkeypatch.setattr(laws, "run_laws", lambda *args, **options: [red])
    monkeypatch.setattr(suites, "run", lambda part, mixers, **options: [{"name": name} for name in mixers])
    assert main(["bench", "layers", "--mixers", "linear"]) == 1
    seen = capsys.readouterr()
    assert "linear is not timed" in seen.err and "no rows" in seen.out


def test_a_kernel_that_fails_says_why(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(K, "ceilings", lambda: {"bytes": 1.0, "operations": 1.0})
    monkeypatch.setattr(K, "error", lambda kernel: (_ for _ in ()).throw(RuntimeError("no such backend\nat all")))
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    assert K.kernels(["linear"]) == [{"kernel": "linear", "failed": "failed: RuntimeError: no such backend"}]
    with pytest.raises(BadInput, match="did you mean 'linear'"):
        K.kernels(["linaer"])


def test_a_table_shows_columns_that_only_some_rows_have():
    rows = [{"name": "b", "failed": "failed: why"}, {"name": "a", "seconds": 1.5, "empty": None, "range": [1, 2]}]
    shown = report.table(rows)
    assert shown.splitlines()[0].split() == ["name", "seconds", "failed"] and "why" in shown
    assert attempt("x", lambda: {"name": "x"}) == {"name": "x"}


# Operations ---------------------------------------------------------------------------------------------------------


def test_operations_of_weights_are_those_that_a_counter_sees():
    from torch.utils.flop_counter import FlopCounterMode

    block = Block(mixer=mixer_for("hgrn", 64), mlp=SwiGLU())
    model = language_model(vocab=64, stack=Stack(dim=64, blocks=(block, block))).build()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 10, dtype=torch.int64))
    assert flops.of_model(model, 10) == (counter.get_total_flops() / 10, 0)


def test_operations_of_mixers_are_those_of_their_definitions():
    count = lambda spec, tokens=100: flops.of_layer(spec.build(context), tokens)  # noqa: E731
    from seqloom.core import BuildContext

    context = BuildContext(dim=64)
    assert count(MIXERS["softmax"](heads=2)) == 4 * 64 * 50.5
    assert count(MIXERS["softmax"](heads=2, window=10)) == 4 * 64 * (10 - 45 / 100)
    linear = MIXERS["gated_linear"](heads=2)
    state = 2 * linear.build(context).key * linear.build(context).value
    assert count(linear) == 4 * state and count(MIXERS["retention"](heads=2)) > 0
    assert count(MIXERS["delta"](heads=2)) == 6 * 2 * 32 * 32
    assert count(MIXERS["delta_product"](heads=2, steps=3)) == 3 * count(MIXERS["delta_product"](heads=2, steps=1))
    with pytest.raises(BadInput, match="operations of gru are not counted"):
        count(MIXERS["gru"]())


@pytest.mark.parametrize(("window", "causal"), [(None, True), (None, False), (4, True), (4, False), (30, True)])
def test_keys_seen_are_counted_from_the_pattern(window, causal):
    i, j = torch.arange(9)[:, None], torch.arange(9)[None]
    seen = (j <= i) | (not causal)
    if window is not None:
        seen &= ((i - j) < window) & ((j - i) < window)
    assert flops.keys_seen(9, causal, window) == pytest.approx(float(seen.sum()) / 9)


# Tiles --------------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    values: int
    warps: int


class Config(NamedTuple):
    walk: Tile
    apply: Tile


TABLE = {(64, 2): Config(Tile(64, 4), Tile(0, 8)), (128, 2): Config(Tile(32, 4), Tile(64, 4))}


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setenv("SEQLOOM_TILES", str(tmp_path / "own" / "tiles.json"))
    monkeypatch.setattr(tiles, "card", lambda: ("NVIDIA H100", "hopper"))
    tiles.user_tiles.cache_clear()
    tiles.say_once.cache_clear()
    yield tmp_path / "own" / "tiles.json"
    tiles.user_tiles.cache_clear()


def test_shipped_tiles_are_used_where_the_user_has_none(own):
    assert dict(Tiles("scan", hopper=TABLE)) == TABLE and len(Tiles("scan", hopper=TABLE)) == 2


def test_tuned_tiles_are_written_and_read_on_the_same_card_only(own, monkeypatch):
    table = Tiles("scan", hopper=TABLE)
    table[(64, 2)] = table[(64, 2)]._replace(walk=Tile(128, 8))
    assert tiles.write("NVIDIA H100", "scan", table) == own
    again = Tiles("scan", hopper=TABLE)
    assert again[(64, 2)] == Config(Tile(128, 8), Tile(0, 8)) and again[(128, 2)] == TABLE[(128, 2)]
    assert dict(Tiles("other", hopper=TABLE)) == TABLE
    monkeypatch.setattr(tiles, "card", lambda: ("NVIDIA A100", "ampere"))
    assert dict(Tiles("scan", hopper=TABLE)) == TABLE


def test_a_card_without_tiles_of_its_own_takes_the_nearest_and_says_so_once(own, monkeypatch, caplog):
    monkeypatch.setattr(tiles, "card", lambda: ("NVIDIA A100", "ampere"))
    for _ in range(2):
        assert dict(Tiles("scan", blackwell={}, hopper=TABLE)) == TABLE
    assert len(caplog.records) == 1 and "none for NVIDIA A100 (ampere)" in caplog.text
    assert tiles.nearest("amd", ("hopper",)) == "hopper" and tiles.nearest("turing", ("hopper", "ampere")) == "ampere"


def test_tiles_of_other_passes_are_left_and_said(own, caplog):
    own.parent.mkdir()
    own.write_text(json.dumps({"NVIDIA H100": {"scan": {"(64, 2)": {"walk": [1, 2]}}}}))
    assert dict(Tiles("scan", hopper=TABLE)) == TABLE and "other passes" in caplog.text


def test_a_damaged_file_of_tiles_is_refused(own):
    own.parent.mkdir()
    own.write_text("{")
    with pytest.raises(BadInput, match="bench --tune"):
        _ = Tiles("scan", hopper=TABLE)[(64, 2)]


def test_the_search_keeps_what_is_faster_and_right():
    table = {"k": Config(Tile(64, 4), Tile(0, 4))}

    def measure():
        walk, apply = table["k"]
        if walk.values == 128:
            raise RuntimeError("out of resources: shared memory")
        wrong = 1.0 if apply.warps == 2 else 0.0  # fast and wrong
        time = 10 - (walk.warps == 8) - 2 * (walk.values == 32) - 5 * (apply.warps == 2) + (walk.values == 16)
        return time, (torch.ones(4) + wrong,)

    said = []
    assert tune.search(table, "k", measure, float("inf"), said.append) == (10, 7)
    assert table["k"] == Config(Tile(32, 8), Tile(0, 4)) and any("RuntimeError" in line for line in said)


def test_tuning_needs_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert main(["bench", "--tune"]) == 2 and "there is none here" in capsys.readouterr().err
