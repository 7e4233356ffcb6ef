"""Cost models from rows that are known, and advice from costs and scores that are known."""

import json

import pytest

from seqloom.bench import costs as bench
from seqloom.cli.main import main
from seqloom.core import BadInput
from seqloom.study import advise as study
from seqloom.study import costs
from seqloom.study.advise import Measured, Question, advise, memory_of

GIB = 2**30

# Cost models -------------------------------------------------------------------------------------------------------


def row(what="train", **facts):
    return {"mixer": "softmax", "what": what, "batch": 1, "tokens": 256, "dim": 64, **facts}


def test_coefficients_are_found_again():
    truth = [1e-3, 0.0, 2e-8, 3e-10, 4e-11]
    shapes = [row(batch=b, tokens=t, dim=d) for b in (1, 4) for t in (128, 1024, 8192) for d in (64, 256)]
    rows = [{**one, "seconds": costs.predict(truth, "train", one, True)} for one in shapes]
    found = costs.least_squares([costs.features("train", one, True) for one in rows], [one["seconds"] for one in rows])
    for one in shapes:
        assert costs.predict(found, "train", one, True) == pytest.approx(costs.predict(truth, "train", one, True), rel=1e-3)


def test_coefficients_are_never_negative():
    found = costs.least_squares([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]], [3.0, 2.0, 1.0])  # a line that falls
    assert min(found) >= 0
    with pytest.raises(ValueError, match="at least one"):
        costs.least_squares([], [])


def test_rows_of_whole_models_join_at_one_scale():
    shapes = [row(tokens=t, dim=d) for t in (128, 512, 2048) for d in (64, 96, 128)]
    truth = [0.0, 0.0, 1e-7, 1e-9, 0.0]
    rows = [{**one, "seconds": costs.predict(truth, "train", one, True), "peak_bytes": 100 * one["tokens"] * one["dim"]}
            for one in shapes]
    other = [{**one, "seconds": 0.5 * costs.predict(truth, "train", one, True)}
             for one in (row(dim=256), row(tokens=4096, dim=256))]
    found = costs.fit_device([*rows, {"mixer": "softmax", "what": "train", "error": "out of memory"}], {"two threads": other})
    assert found["scales"]["two threads"] == pytest.approx(0.5, rel=0.05)
    assert found["ranges"]["tokens"] == [128, 4096] and found["ranges"]["dim"] == [64, 256] and found["rows"] == 11
    wide = row(tokens=4096, dim=256)
    assert costs.predict(found["mixers"]["softmax"]["train"], "train", wide, True) == pytest.approx(
        costs.predict(truth, "train", wide, True), rel=0.02)
    assert found["mixers"]["softmax"]["grows"] and found["mixers"]["softmax"]["error"]["bytes"] < 1e-6


def test_a_block_is_measured_with_its_errors():
    found = bench.costs(["gru", "softmax"], rounds=1, shapes=[bench.Shape(1, 16, 32)], contexts=[(32, 8)])
    assert [(one["mixer"], one["what"]) for one in found] == [(m, w) for m in ("gru", "softmax") for w in ("train", "decode")]
    assert all(one["seconds"] > 0 for one in found) and found[0]["peak_bytes"] > 4 * found[0]["parameters"]
    (wrong,) = bench.costs(["softmax"], rounds=1, shapes=[bench.Shape(1, 4, 1)], contexts=[])
    assert "RoPE" in wrong["error"] and wrong["dim"] == 1
    assert bench.costs(["gru"], deadline=-1.0) == []


# Advice ------------------------------------------------------------------------------------------------------------

SCORES = {
    "recall": {"softmax": 1.0, "gated_delta+softmax": 0.99, "gated_delta": 0.97, "gru": 0.2},
    "state-tracking": {"softmax": 0.3, "gated_delta+softmax": 0.4, "gated_delta": 0.4, "gru": 1.0},
    "lm": {"softmax": 0.68, "gated_delta+softmax": 0.69, "gated_delta": 0.69, "gru": 0.6},
}
MODELS = {
    "softmax": {"grows": True, "train": [0, 0, 5e-8, 8e-10, 7e-11], "bytes": [100, 0, 10], "decode": [1e-4, 0, 0, 5e-10]},
    "gated_delta": {"grows": False, "train": [0, 0, 1.1e-7, 8e-10], "bytes": [180, 0, 10], "decode": [2e-4, 0, 0]},
    "gru": {"grows": False, "train": [0, 3e-5, 2e-8, 8e-10], "bytes": [100, 0, 10], "decode": [2e-4, 0, 0]},
}


@pytest.fixture
def measured():
    facts = {"length": 24, "chance": 0.05, "dim": 32, "layers": 2, "steps": 700, "commit": "", "date": "", "asks": ""}
    kinds = {
        kind: {**facts, "metric": "bits per byte" if kind == "lm" else "share of answers that are right", "arms": {
            name: {"score": score, "state_bytes": 4000, "constant_state": "softmax" not in name}
            for name, score in scores.items()}}
        for kind, scores in SCORES.items()
    }
    ranges = {"tokens": [128, 4096], "dim": [64, 256], "batch": [1, 4]}
    return Measured({"cpu": {"machine": "a machine", "ranges": ranges, "mixers": MODELS}}, kinds)


def ask(measured, **facts):
    return advise(Question(**{"length": 512, "task": "recall", "memory": 8 * GIB, **facts}), measured)


def test_short_rows_and_recall_within_memory_take_plain_softmax(measured):
    for facts in (dict(task="recall"), dict(task="lm", length=128), dict(task="recall", length=2048)):
        found = ask(measured, **facts)
        assert found.pick == "softmax" and found.reasons and found.runner_up
    assert any("extrapolated" in line for line in ask(measured).cautions)  # scores are of shorter rows


def test_long_text_takes_a_constant_state(measured):
    found = ask(measured, task="lm", length=16384)
    assert found.pick == "gated_delta" and found.runner_up in ("gated_delta+softmax", "softmax")
    assert any("plain softmax attention would take" in line for line in found.reasons)
    assert any(line.startswith("at ") and "plain softmax attention" in line for line in found.otherwise)  # when shorter
    assert any(line.startswith("extrapolated: costs") and "16,384" in line for line in found.cautions)


def test_where_attention_does_not_fit_the_hybrid_or_the_state_is_taken(measured):
    whole = ask(measured, to="generate", length=4096, memory=8 * GIB)
    need = {one.mixer: one.bytes for one in whole.candidates}
    assert whole.pick == "softmax" and need["softmax"] > need["gated_delta+softmax"] > need["gated_delta"]
    between = ask(measured, to="generate", length=4096, memory=need["softmax"] - 1)
    assert between.pick == "gated_delta+softmax" and any("plain softmax attention would take" in r for r in between.reasons)
    # a constant state is not trusted with more tokens than its bytes were seen to hold, unless nothing else fits
    least = ask(measured, to="generate", length=4096, memory=need["gated_delta+softmax"] - 1)
    assert least.pick == "gated_delta" and any("is known to hold" in line for line in least.cautions)
    assert any("of memory the pick is" in line for line in least.otherwise)


def test_state_tracking_takes_what_tracks_states(measured):
    found = ask(measured, task="state-tracking")
    assert found.pick == "gru" and any("no other that fits" in line for line in found.reasons)


def test_state_bytes_are_counted_and_memory_grows_with_everything(measured):
    base = {one.mixer: one for one in ask(measured).candidates}
    for facts in (dict(batch=4), dict(layers=8), dict(dim=512), dict(length=1024)):
        for one in ask(measured, **facts).candidates:
            assert one.bytes > base[one.mixer].bytes
    assert {one.mixer: one for one in ask(measured, length=1024).candidates}["gru"].state_bytes == base["gru"].state_bytes


def test_a_card_that_was_not_measured_is_answered_by_its_like_and_says_so(measured):
    h200 = {**measured.costs["cpu"], "machine": "NVIDIA H200"}
    found = ask(measured._replace(costs={**measured.costs, "h200": h200}), device="h100")
    assert found.question.device == "h200" and "those of NVIDIA H200: an H100" in found.cautions[0]


def test_what_cannot_be_answered_is_refused(measured):
    for facts, words in (
        (dict(task="recal"), "did you mean 'recall'"),
        (dict(device="b200"), "no costs were measured on 'b200'; it is one of|no costs were measured on 'b200'"),
        (dict(memory=1000), "nothing fits 1000 B.*the smallest is .*give that, or a shorter length"),
        (dict(length=0), "length must be at least 1"),
    ):
        with pytest.raises(BadInput, match=words):
            ask(measured, **facts)


@pytest.mark.parametrize(("text", "count"), [("8GB", 8 * 10**9), ("512 MiB", 512 * 2**20), ("1.5e9", 1_500_000_000),
                                             ("2k", 2000), ("7b", 7)])
def test_memories_are_read(text, count):
    assert memory_of(text) == count


@pytest.mark.parametrize("text", ["", "much", "0", "-3GB", "8 XB", "1..2GB", "1e999"])
def test_other_memories_are_refused(text):
    with pytest.raises(BadInput, match="8GB"):
        memory_of(text)


def test_the_command_answers(measured, capsys, monkeypatch):
    monkeypatch.setattr(study, "shipped", lambda: measured)
    assert main(["advise", "--length", "512", "--task", "recall", "--memory", "8GB", "--all"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("take plain softmax attention") and "because" in text and "runner-up" in text and "unless" in text
    for argv, words in (([], "missing: --length, --task, --memory"), (["--length", "0"], "missing"),
                        (["--length", "0", "--task", "lm", "--memory", "1GB"], "--length must be at least 1"),
                        (["--length", "9", "--task", "lm", "--memory", "lots"], "8GB")):
        assert main(["advise", *argv]) == 2
        assert words in capsys.readouterr().err


def test_what_is_shipped_is_what_the_benchmarks_give(tmp_path, pytestconfig):
    benchmarks = pytestconfig.rootpath / "benchmarks"
    if not (benchmarks / "map").exists():
        pytest.skip("the map has not been run")
    for path in study.refresh(benchmarks, tmp_path):
        shipped = json.loads((study.Path(study.__file__).parent / "data" / path.name).read_text())
        again = json.loads(path.read_text())
        assert shipped.keys() == again.keys()
        if path.name == "map.json":
            assert shipped == again
        else:
            for device, facts in again.items():
                assert facts["rows"] == shipped[device]["rows"] and facts["mixers"].keys() == shipped[device]["mixers"].keys()
