"""A run killed at any moment resumes to bit-identical weights (CPU, same build and thread count)."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

STEPS = 9
CHILD = f"""
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import seqloom.train.loop as loop
from seqloom.data import corpus
from seqloom.train import TrainConfig, checkpoint, train
loop.export = lambda *args: None
out, slow, resume = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "resume"
def slowly(function):
    def later(*args):
        time.sleep(slow)
        return function(*args)
    return later
checkpoint._sync = slowly(checkpoint._sync)
corpus._Side.add = slowly(corpus._Side.add)
config = TrainConfig(resume=out) if resume else TrainConfig(
    data=str(out.parent / "text"), out=out, model="hybrid-tiny",
    set=("stack.dim=32", "stack.blocks.*.mlp=null", "stack.blocks.*.dropout=0.1"),
    vocab=300, context=16, batch=2, steps={STEPS}, save_every=2, log_every=1)
train(config, progress=False)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("resume")
    (place / "text").mkdir()
    for i in range(6):
        (place / "text" / f"{i}.txt").write_text(f"document {i}: " + "the quick brown fox jumps over the lazy dog. " * 20)
    assert run(place / "whole", 0.0).wait() == 0
    return place


def run(out, slow, mode="start"):
    words = [sys.executable, "-c", CHILD, str(out), str(slow), mode]
    return subprocess.Popen(words, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def weights(out):
    return (out / "checkpoints" / f"step-{STEPS}" / "model.safetensors").read_bytes()


def kill_when(child, ready, limit=90):
    end = time.monotonic() + limit
    while not ready():
        assert child.poll() is None and time.monotonic() < end, child.stderr.read().decode()
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()


def steps_logged(out):
    path = out / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def drafts(out):
    return list((out / "checkpoints").glob(".step-*"))


def done(out):
    return list((out / "checkpoints").glob("step-*"))


# what is slowed down by how much, and when to kill
MOMENTS = {
    "after a save": (0.0, lambda out: steps_logged(out) >= 4 and done(out)),
    "between saves": (0.0, lambda out: steps_logged(out) >= 5 and done(out)),
    "while the first checkpoint is written": (0.1, lambda out: drafts(out) and not done(out)),
    "while a later one is written": (0.1, lambda out: drafts(out) and len(done(out)) > 1),
    "before the first step": (0.0, lambda out: (out / "run.json").exists()),
}


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_resumes_to_the_same_weights(folder, moment):
    out = folder / moment.replace(" ", "-")
    slow, ready = MOMENTS[moment]
    kill_when(run(out, slow), lambda: ready(out))
    again = run(out, 0.0, "resume")  # without a complete checkpoint, from step 0
    assert again.wait() == 0, again.stderr.read().decode()
    assert weights(out) == weights(folder / "whole")
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))  # each once, though some were taken twice
    assert not drafts(out) and len(done(out)) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_while_the_data_are_read_starts_again(folder):
    out = folder / "reading"
    kill_when(run(out, 0.2), lambda: list((out / "data").glob(".*.draft")))
    assert not (out / "run.json").exists()
    again = run(out, 0.0)
    assert again.wait() == 0, again.stderr.read().decode()
    assert weights(out) == weights(folder / "whole")
    assert len(list((out / "data").iterdir())) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_again_and_again(folder):
    out, child = folder / "again", None
    for at in (3, 5, 8):
        child = run(out, 0.02, "start" if child is None else "resume")
        kill_when(child, lambda at=at: steps_logged(out) >= at)
    last = run(out, 0.0, "resume")
    assert last.wait() == 0, last.stderr.read().decode()
    assert weights(out) == weights(folder / "whole")
