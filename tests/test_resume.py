"""A run killed at any moment resumes to bit-identical weights (CPU, same build and thread count)."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

STEPS = 9
CHILD = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import seqloom.train.loop as loop
from seqloom.train import TrainConfig, checkpoint, train
loop.export = lambda *args: None
out, slow, resume = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "resume"
sync = checkpoint._sync
def slowly(path):
    time.sleep(slow)
    sync(path)
checkpoint._sync = slowly
config = TrainConfig(resume=out) if resume else TrainConfig(
    data=str(out.parent / "text"), out=out, model="hybrid-tiny", set=("stack.dim=32", "stack.blocks.*.mlp=null", "stack.blocks.*.dropout=0.1"),
    vocab=300, context=16, batch=2, steps=%d, save_every=2, log_every=1)
train(config, progress=False)
""" % STEPS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("resume")
    (place / "text").mkdir()
    for i in range(6):
        (place / "text" / f"{i}.txt").write_text(f"document {i}: " + "the quick brown fox jumps over the lazy dog. " * 20)
    run(place / "whole", 0.0).wait()
    return place


def run(out, slow, mode="start"):
    return subprocess.Popen([sys.executable, "-c", CHILD, str(out), str(slow), mode], stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def weights(out):
    return (out / "checkpoints" / f"step-{STEPS}" / "model.safetensors").read_bytes()


def kill_when(child, ready, limit=90):
    end = time.monotonic() + limit
    while not ready():
        assert child.poll() is None and time.monotonic() < end, child.stderr.read().decode()
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()


def lines(out):
    path = out / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize("moment", ["after a save", "between saves", "while the first checkpoint is written", "while a later one is written"])
def test_killed_run_resumes_to_the_same_weights(folder, moment):
    out = folder / moment.replace(" ", "-")
    writing = "written" in moment
    child = run(out, 0.1 if writing else 0.0)
    drafts = lambda: list((out / "checkpoints").glob(".step-*"))  # noqa: E731
    done = lambda: list((out / "checkpoints").glob("step-*"))  # noqa: E731
    ready = {
        "after a save": lambda: lines(out) >= 4 and done(),
        "between saves": lambda: lines(out) >= 5 and done(),
        "while the first checkpoint is written": lambda: drafts() and not done(),
        "while a later one is written": lambda: drafts() and done(),
    }[moment]
    kill_when(child, ready)
    again = run(out, 0.0, "resume")  # without a complete checkpoint, from step 0
    assert again.wait() == 0, again.stderr.read().decode()
    assert weights(out) == weights(folder / "whole")


def test_resumed_log_goes_on(folder):
    steps = [json.loads(line)["step"] for line in (folder / "after-a-save" / "log.jsonl").read_text().splitlines()]
    assert steps[-1] == STEPS
