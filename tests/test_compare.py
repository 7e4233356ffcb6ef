"""Arms at equal parameters, the map's runs and records, its page and figures."""

import itertools
import json
import math
import xml.etree.ElementTree as ElementTree

import pytest

from seqloom.cli.main import main
from seqloom.core import BadInput, Budget
from seqloom.mixers import MIXERS
from seqloom.study import atlas, map
from seqloom.study.arms import arm, causal_mixers, equalise, parameters_of
from seqloom.study.chart import Panel, Point, scatter
from seqloom.study.compare import compare_on_task, picture

SVG = "{http://www.w3.org/2000/svg}"


def test_all_causal_mixers_are_on_the_map():
    names = map.mixers_of_map()
    assert set(MIXERS) - set(names) == {"hydra", "lion"} and len(set(names)) == len(names)
    assert set(causal_mixers()) < set(names) and names[: len(map.FIRST)] == list(map.FIRST)


@pytest.mark.parametrize("kind", map.KINDS)
def test_arms_of_the_map_have_equal_parameters(kind):
    task = map.KINDS[kind].task
    counts = [parameters_of(task.wrap(stack)) for stack in map.arms_of(kind, map.mixers_of_map()).values()]
    assert max(counts) <= 1.02 * min(counts)
    (alone,) = map.arms_of(kind, ["softmax"]).values()  # the same size, whichever else is asked for
    assert parameters_of(task.wrap(alone)) == counts[0]


def test_a_setting_changes_what_is_there_and_adds_nothing():
    stacks = (arm(name, dim=32, layers=1, heads=2, settings={"conv": 1}) for name in ("mamba", "linear"))
    has, lacks = (stack.blocks[0].mixer for stack in stacks)
    assert has.conv == 1 and lacks.conv == 0 and lacks.heads == 2


def test_arms_that_cannot_be_equal_are_refused():
    stacks = {"softmax": arm("softmax", dim=8, layers=1), "delta": arm("delta", dim=64, layers=1)}
    assert len(equalise(stacks, vocab=4)) == 2
    with pytest.raises(BadInput, match="did you mean 'delta'"):
        arm("detla", dim=8, layers=1)


def test_a_run_of_the_map_is_recorded(tmp_path):
    rows = [map.run_job(map.Job("copy", "gru", lr, seed, steps=2)) for lr, seed in ((2e-3, 1000), (6e-3, 1000), (6e-3, 0))]
    assert all(row["scores"].keys() == {"score", "strings"} and row["seconds"] > 0 for row in rows)
    path = map.store(map.record("copy", rows), tmp_path)
    found = json.loads(path.read_text())["arms"]["gru"]
    assert found["parameters"] == rows[0]["parameters"] and found["constant_state"]
    assert found["state_bytes"] == {"32": 288, "512": 288, "8192": 288}  # two layers of 32 numbers, and where the row stands
    assert [run["seed"] for run in found["runs"]] == [0] and len(found["calibration"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["copy.json"]


def test_a_run_that_fails_does_not_end_the_others(monkeypatch):
    def fails(*given, **more):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(map, "fit", fails)
    row = map.run_job(map.Job("copy", "gru", 2e-3, 0, steps=1))
    assert "out of memory" in row["error"]
    assert map.best_rate([row]) is None


def test_the_best_rate_is_the_smaller_of_two_alike_and_never_a_failure():
    scores = {0.01: 0.5, 0.001: 0.5, 0.1: math.nan}
    assert map.best_rate([{"lr": lr, "scores": {"score": score}} for lr, score in scores.items()]) == 0.001


def records():
    """Made-up runs of two kinds of task."""
    found = {}
    for kind, score in (("recall", {"softmax": 1.0, "gru": 0.2}), ("lm", {"softmax": 0.6, "gru": 0.7})):
        rows = [
            {"kind": kind, "mixer": name, "lr": 2e-3, "seed": seed, "scores": {"score": value - seed / 1000}, "seconds": 3.0}
            for name, value in score.items() for seed in (1000, 0, 17)
        ]
        found[kind] = map.record(kind, rows, about={"commit": "abc"})
    return found


def test_the_page_is_made_of_the_records(tmp_path):
    for record in records().values():
        map.store(record, tmp_path / "records")
    assert main(["compare", "--map", str(tmp_path / "docs"), "--records", str(tmp_path / "records")]) == 0
    text = (tmp_path / "docs" / "map.md").read_text()
    assert "| softmax | 0.99 ± 0.01 | 3.27 ± 0.10 |" in text and "commit abc" in text  # 8 (1 - score) bits per byte
    assert text.index("| softmax | 0.99") < text.index("| gru | 0.19")
    for kind in ("recall", "lm"):
        assert f"map/{kind}.svg" in text
        drawing = ElementTree.parse(tmp_path / "docs" / "map" / f"{kind}.svg").getroot()
        labels = [each.text for each in drawing.iter(f"{SVG}text")]
        assert labels.count("softmax") == labels.count("gru") == 2  # once a panel
    assert atlas.write(records(), tmp_path / "again")[-1].read_text() == text


def test_no_records_and_other_words_are_refused(tmp_path, capsys):
    assert main(["compare", "--map", str(tmp_path), "--records", str(tmp_path)]) == 2
    assert "no records of the map" in capsys.readouterr().err
    (tmp_path / "copy.json").write_text("{")
    assert main(["compare", "--map", str(tmp_path), "--records", str(tmp_path)]) == 2
    assert "copy.json is not JSON" in capsys.readouterr().err
    assert main(["compare", "--map", str(tmp_path), "--task", "recall"]) == 2
    assert "leave out" in capsys.readouterr().err


def test_a_comparison_keeps_rates_times_and_states():
    budget = Budget(steps=2, batch=2)
    found = compare_on_task(["softmax", "gru"], "state-tracking", dim=16, layers=1, budget=budget, seeds=2, jobs=0)
    by_name = {row.mixer: row for row in found.rows}
    for row in found.rows:
        assert len(row.calibration) == 3 and f"{row.lr:g}" in row.calibration and row.seconds > 0
        assert row.lr == min((-score, float(lr)) for lr, score in row.calibration.items())[1]
        assert {run.seed for run in row.runs} == {0, 17} and {run.lr for run in row.runs} == {row.lr}
    assert by_name["softmax"].later_bytes > by_name["softmax"].state_bytes and by_name["gru"].later_bytes is None
    assert picture(found).count("<circle") == 2 * 2 * 3 + 1  # two panels of two means and four seeds, and one hollow


def test_charts_keep_points_in_place_and_labels_apart():
    points = [Point(f"mixer number {i}", 10.0 * 4**i, (i / 9,)) for i in range(10)] + [Point("near", 11.0, (0.01,))]
    panel = Panel(points, "x & y", "score", level=(0.5, "chance"))
    drawing = ElementTree.fromstring(scatter([panel], title='a "title" <here>'))
    dots = [each for each in drawing.iter(f"{SVG}circle") if each.get("r") == "4.5"]
    xs, ys = ([float(dot.get(key)) for dot in dots[:10]] for key in ("cx", "cy"))
    assert xs == sorted(xs) and ys == sorted(ys, reverse=True)
    assert all(math.isclose(b - a, xs[1] - xs[0], abs_tol=0.11) for a, b in itertools.pairwise(xs))  # a logarithmic axis
    labels = [each for each in drawing.iter(f"{SVG}text") if each.text in ("mixer number 0", "near")]
    places = [(float(each.get("x")), float(each.get("y"))) for each in labels]
    assert abs(places[0][1] - places[1][1]) >= 12 or abs(places[0][0] - places[1][0]) > 60


def test_charts_refuse_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="at least one"):
        scatter([], title="")
    with pytest.raises(ValueError, match="positive"):
        scatter([Panel([Point("a", 0.0, (1.0,))], "x", "y")], title="")
