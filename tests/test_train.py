"""The training loop, its objectives, checkpoints and scores."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from seqloom.core import BadInput, FailedRun, Info, MissingExtra
from seqloom.core.marks import mark, marks
from seqloom.data import IGNORE, Tokens, prepare
from seqloom.mixers import MIXERS, SoftmaxAttention
from seqloom.models import Block, Stack
from seqloom.models.heads import PooledHead, TokenHead
from seqloom.models.presets import mixer_for, preset, resolve
from seqloom.models.sequence import SequenceModel, language_model
from seqloom.models.stems import TokenStem
from seqloom.objectives import Classification, MaskedToken, NextToken, linear_cross_entropy
from seqloom.parts import SwiGLU
from seqloom.train import TrainConfig, checkpoint, evaluate, train, without
from seqloom.train.optimiser import adamw, rate
from seqloom.train.report import rows

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "naïve", "cafés", "sell", "漢字"]
SMALL = dict(model="hybrid-tiny", set=("stack.dim=32",), vocab=300, context=16, batch=4, steps=6, save_every=2, log_every=1,
             held_out=0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place, draw = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for i in range(24):
        (place / f"{i:02}.txt").write_text(f"{i} " + " ".join(draw.choice(WORDS, draw.integers(10, 40))), "utf-8")
    return place


@pytest.fixture(scope="module")
def corpus(folder, tmp_path_factory):
    return prepare(str(folder), tmp_path_factory.mktemp("corpus"), vocab=300, share=0.2)


def config(folder, out, **changes):
    return TrainConfig(data=str(folder), out=out, **{**SMALL, **changes})


def fit(folder, out, corpus=None, **changes):
    return train(config(folder, out, **changes), corpus=corpus, progress=False)


def weights(out, step):
    stored = load_file(out / "checkpoints" / f"step-{step}" / "model.safetensors")
    return {name: value.clone() for name, value in stored.items()}  # the file is mapped, and may be changed by a test


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Objectives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunked_cross_entropy_is_cross_entropy(chunk):
    hidden = torch.randn(13, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (13,))
    targets[[0, 4, 12]] = IGNORE
    got = linear_cross_entropy(hidden, weight, targets, chunk)
    want = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(got, want)
    gradients = (torch.autograd.grad(3 * loss, (hidden, weight)) for loss in (got, want))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_not_asked_moves_nothing():
    hidden, weight = torch.randn(6, 4), torch.randn(5, 4)
    targets = torch.tensor([1, IGNORE, 2, IGNORE, 0, 4])
    results = []
    for value in (0.0, math.nan, math.inf):
        h, w = hidden.clone(), weight.clone().requires_grad_()
        h[targets == IGNORE] = value
        loss = linear_cross_entropy(h.requires_grad_(), w, targets, 2)
        loss.backward()
        results.append((loss.detach(), w.grad, h.grad[targets != IGNORE]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_cross_entropy_is_in_float32_under_autocast():
    hidden, weight, targets = torch.randn(40, 16), torch.randn(300, 16), torch.randint(300, (40,))
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, targets)
    exact = F.cross_entropy((hidden.bfloat16() @ weight.bfloat16().T).float(), targets, reduction="sum")
    assert got.dtype == torch.float32 and torch.isclose(got, exact, rtol=1e-5)


def plain_loss(model, ids, targets, segments):
    logits = model(ids, info=Info(segments=segments)).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def tiny(vocab=40, mixer=None, head=None, dim=16):
    block = Block(mixer=mixer or MIXERS["linear"](heads=2), mlp=SwiGLU(hidden=16))
    stack = Stack(dim=dim, blocks=(block,) * 2)
    return SequenceModel(stem=TokenStem(vocab=vocab), stack=stack, head=head or TokenHead(classes=vocab))


def test_losses_of_layers_are_added_and_parts_make_up_the_whole():
    model = tiny().build()
    objective = NextToken(model)
    model.stack.blocks[1].mixer.register_forward_hook(
        lambda layer, args, output: output._replace(aux={"balance_loss": output.y.square().mean(-1), "share": output.y}))
    ids = torch.randint(40, (4, 9))
    targets = ids.roll(-1, 1).clone()
    targets[0, 2:] = IGNORE
    logits = model(ids)
    extra = logits.aux["1.balance_loss"].mean()
    want = F.cross_entropy(logits.logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE) + extra
    torch.testing.assert_close(objective(ids, targets).total, want)
    count = (targets != IGNORE).sum()
    parts = [objective(ids[i : i + 2], targets[i : i + 2], count=count, share=0.5).total for i in (0, 2)]
    torch.testing.assert_close(sum(parts), want)


def test_masked_tokens():
    model = tiny(mixer=SoftmaxAttention(heads=2, direction="bidirectional")).build()
    objective = MaskedToken(model, mask=39)
    ids, segments = torch.randint(39, (20, 50)), torch.ones(20, 50, dtype=torch.int64)
    segments[:, 40:] = 0
    hidden, targets = objective.hide(ids, segments)
    chosen = targets != IGNORE
    assert torch.equal(targets[chosen], ids[chosen]) and torch.equal(hidden[~chosen], ids[~chosen]) and not chosen[:, 40:].any()
    assert 0.1 < chosen[:, :40].float().mean() < 0.2 and 0.7 < (hidden[chosen] == 39).float().mean() < 0.9
    torch.manual_seed(1)
    loss = objective(ids, segments)
    torch.manual_seed(1)
    hidden, targets = objective.hide(ids, segments)
    torch.testing.assert_close(loss.total, plain_loss(model, hidden, targets, segments))
    with pytest.raises(BadInput, match="sees both sides"):
        MaskedToken(tiny().build(), mask=1)


def test_classification():
    model = tiny(head=PooledHead(classes=3)).build()
    ids, labels, segments = torch.randint(40, (4, 7)), torch.tensor([0, 2, 1, IGNORE]), torch.ones(4, 7, dtype=torch.int64)
    segments[1, 4:] = 0
    loss = Classification(model)(ids, labels, segments)
    want = F.cross_entropy(model(ids, info=Info(segments=segments)).logits, labels, ignore_index=IGNORE)
    torch.testing.assert_close(loss.total, want)
    assert int(loss.count) == 3
    with pytest.raises(ValueError, match="labels of shape"):
        Classification(tiny().build())(ids, labels)
    with pytest.raises(BadInput, match="needs a token_head, not PooledHead"):
        NextToken(model)


# Optimiser --------------------------------------------------------------------------------------------------------


def test_groups_honour_marks():
    module = nn.Module()
    module.matrix, module.bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    module.marked = mark(nn.Parameter(torch.ones(2, 2)), no_decay=True, lr_scale=0.5)
    module.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    optimiser = adamw(module, lr=0.1, weight_decay=0.3, betas=(0.9, 0.95))
    found = {id(p): (group["base"], group["weight_decay"]) for group in optimiser.param_groups for p in group["params"]}
    assert found == {id(module.matrix): (0.1, 0.3), id(module.bias): (0.1, 0.0), id(module.marked): (0.05, 0.0)}
    model = preset("mamba-tiny", vocab=20, dim=32, layers=1).build()
    optimiser = adamw(model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    decayed = {id(p) for group in optimiser.param_groups if group["weight_decay"] for p in group["params"]}
    assert all((id(p) in decayed) == (p.ndim > 1 and not marks(p)["no_decay"]) for p in model.parameters())


def test_schedules():
    cosine = [rate(step, 100, schedule="cosine", warmup=0.1) for step in range(100)]
    assert cosine[0] == 0.1 and cosine[9] == cosine[10] == 1.0 and cosine[55] == pytest.approx(0.5) and cosine[-1] < 1e-3
    assert all(a >= b for a, b in pairwise(cosine[9:]))
    wsd = [rate(step, 100, schedule="wsd", warmup=0.1) for step in range(100)]
    assert wsd[50] == wsd[80] == 1.0 and wsd[90] == 0.5 and wsd[99] == pytest.approx(0.05)
    assert rate(99, 100, schedule="constant", warmup=0.1) == 1.0


# The loop ---------------------------------------------------------------------------------------------------------


def test_the_loop_is_a_bare_loop(folder, corpus, tmp_path):
    """Three steps of plain PyTorch, written out, give the same losses and weights."""
    result = fit(folder, tmp_path, corpus, steps=3)
    torch.manual_seed(0)
    model = resolve("hybrid-tiny", vocab=corpus.vocab, changes=("stack.dim=32",)).build()
    bare = [p for p in model.parameters() if p.ndim < 2 or marks(p)["no_decay"]]
    rest = [p for p in model.parameters() if not (p.ndim < 2 or marks(p)["no_decay"])]
    groups = [{"params": rest, "weight_decay": 0.1}, {"params": bare, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95))
    for step, (_, got) in enumerate(result.losses):
        loss = plain_loss(model, *corpus.batch(step, seed=0, batch=4, context=16))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * rate(step, 3, schedule="cosine", warmup=0.05)
        optimiser.step()
        optimiser.zero_grad()
        assert got == pytest.approx(loss.item(), abs=1e-5)
    trained = weights(tmp_path, 3)
    for name, value in model.named_parameters():
        torch.testing.assert_close(trained[f"model.{name}"], value.detach(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("mixer", [name for name in MIXERS if mixer_for(name, 128).causal])
def test_every_mixer_trains(mixer, folder, corpus, tmp_path):
    result = fit(folder, tmp_path, corpus, model=f"{mixer}-tiny", steps=2, save_every=0)
    assert len(result.losses) == 2 and math.isfinite(result.score.bits_per_byte)


@pytest.mark.parametrize("mixer", [name for name in MIXERS if not mixer_for(name, 128).causal])
def test_a_mixer_that_sees_ahead_is_no_language_model(mixer, folder, corpus, tmp_path):
    with pytest.raises(BadInput, match="causal"):
        fit(folder, tmp_path, corpus, model=f"{mixer}-tiny", steps=2, save_every=0)


def test_a_step_does_not_depend_on_how_it_is_cut(tmp_path):
    """Also where its parts ask for different numbers of tokens."""
    lines = [{"prompt": " ".join(WORDS[: i % 13]) + str(i), "completion": " ".join(WORDS[i % 7 : i % 11])} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(line) for line in lines if line["completion"]))
    whole, cut, recomputed = (fit(tmp_path / "rows.jsonl", tmp_path / str(i), **changes)
                              for i, changes in enumerate(({}, {"accumulate": 4}, {"checkpointing": True})))
    for other in (cut, recomputed):
        assert np.allclose([loss for _, loss in whole.losses], [loss for _, loss in other.losses], atol=1e-5)


def test_it_learns(folder, corpus, tmp_path):
    result = fit(folder, tmp_path, corpus, steps=40, lr=1e-2, save_every=0)
    assert result.losses[-1][1] < result.losses[0][1] - 1.5


def test_what_is_said_and_logged(folder, tmp_path):
    said = []
    train(config(folder, tmp_path, eval_every=3, log=("tensorboard",)), progress=False, say=said.append)
    assert any("documents" in line and "learning a vocabulary of 300" in line for line in said)
    (plan,) = [line for line in said if "parameters" in line]
    for word in ("6 steps of 4 x 16 tokens", "epochs", "about", "tokens/s", "memory about"):
        assert word in plan
    found = list(rows(tmp_path / "log.jsonl"))
    assert [row["step"] for row in found if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert {"grad_norm", "lr", "tokens_per_second"} <= found[0].keys()
    assert [row["step"] for row in found if "held_out_bits_per_byte" in row] == [3, 6]
    assert list((tmp_path / "tensorboard").iterdir())


def test_scoring_on_the_way_changes_nothing(folder, corpus, tmp_path):
    drop = ("stack.dim=32", "stack.blocks.*.dropout=0.2")
    fit(folder, tmp_path / "a", corpus, set=drop)
    fit(folder, tmp_path / "b", corpus, set=drop, eval_every=1, save_every=1, log_every=3)
    assert same(weights(tmp_path / "a", 6), weights(tmp_path / "b", 6))


def test_the_progress_bar_shows_the_forms(folder, corpus, tmp_path, capsys):
    train(config(folder, tmp_path), corpus=corpus)
    said = capsys.readouterr().err
    for word in ("training", "6/6", "loss", "tokens/s", "forms: ", "gated_delta chunked"):
        assert word in said


def test_minutes_set_the_steps(folder, corpus, tmp_path, monkeypatch):
    times = iter(range(1000))
    monkeypatch.setattr("seqloom.train.loop.time.perf_counter", lambda: float(next(times)))
    result = fit(folder, tmp_path, corpus, steps=None, minutes=0.1)  # every look at the clock is a second later
    assert result.losses[-1][0] == 6


def test_half_precision_trains_and_is_kept_on_resume(folder, corpus, tmp_path):
    fit(folder, tmp_path / "half", corpus, precision="bf16")
    fit(folder, tmp_path / "full", corpus)
    half, full = weights(tmp_path / "half", 6), weights(tmp_path / "full", 6)
    assert all(value.dtype == torch.float32 for value in half.values()) and not same(half, full)
    assert all(torch.allclose(half[name], full[name], atol=0.02) for name in full)
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step-6")
    train(TrainConfig(resume=tmp_path / "half"), progress=False)
    assert same(weights(tmp_path / "half", 6), half)


# What is saved ----------------------------------------------------------------------------------------------------


def test_the_folder_is_a_hugging_face_model_without_pickles(folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = fit(folder, tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = torch.tensor([tokenizer("the fox sells")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, result.model.eval()(ids).logits)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt")]
    stored = weights(tmp_path, 6)
    assert sum(name.endswith("stem.weight") or name.endswith("head.weight") for name in stored) == 1  # tied: stored once


def test_a_chat_model_is_saved_with_its_template(tmp_path):
    from transformers import AutoTokenizer

    pairs = [(a, b) for a in WORDS for b in WORDS[:4]]
    messages = [[{"role": "user", "content": f"{a} {b}"}, {"role": "assistant", "content": b}] for a, b in pairs]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in messages))
    fit(tmp_path / "chats.jsonl", tmp_path / "out", steps=1)
    auto = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert auto.apply_chat_template(messages[0], tokenize=False) == "<|start|>user:\nthe the\n\nassistant:\nthe<|start|>"


def test_only_the_last_checkpoints_are_kept(folder, corpus, tmp_path):
    fit(folder, tmp_path, corpus, steps=7)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-6", "step-7"]


def break_file(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [
    lambda place: break_file(place / "model.safetensors"), lambda place: (place / "optimiser.safetensors").write_bytes(b""),
    lambda place: (place / "manifest.json").unlink(), lambda place: (place / "manifest.json").write_text("{}"),
    lambda place: (place / "state.json").unlink(),
])
def test_a_damaged_checkpoint_is_passed_over(folder, corpus, tmp_path, damage):
    fit(folder, tmp_path, corpus)
    want = weights(tmp_path, 6)
    damage(tmp_path / "checkpoints" / "step-6")
    assert checkpoint.latest(tmp_path / "checkpoints").step == 4
    said = []
    train(TrainConfig(resume=tmp_path), progress=False, say=said.append)
    assert "at step 4 of 6" in said[0] and same(weights(tmp_path, 6), want)
    assert [row["step"] for row in rows(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a POSIX feature")
def test_a_full_disk_leaves_the_last_good_checkpoint(folder, corpus, tmp_path):
    import resource

    real, soft = checkpoint.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(folder_, step, *args, **options):
        if step == 4:  # from now on no file may grow beyond 50 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, soft[1]))
        return real(folder_, step, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        try:
            with pytest.raises(FailedRun, match=r"step 4 could not be saved in .*; the last good checkpoint is .*step-2"):
                fit(folder, tmp_path, corpus)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]
    train(TrainConfig(resume=tmp_path), progress=False)
    fit(folder, tmp_path / "whole", corpus)
    assert same(weights(tmp_path, 6), weights(tmp_path / "whole", 6))


@pytest.mark.parametrize("part", ["_sync", "_sha"])
def test_a_disk_that_fails_leaves_nothing_half_written(folder, corpus, tmp_path, monkeypatch, part):
    real, calls = getattr(checkpoint, part), []

    def fails(path):
        calls.append(path)
        if len(calls) > 7:
            raise OSError(28, "No space left on device")
        return real(path)

    monkeypatch.setattr(checkpoint, part, fails)
    with pytest.raises(FailedRun, match=r"could not be saved in .*: No space left on device"):
        fit(folder, tmp_path, corpus, save_every=1)
    monkeypatch.undo()
    left = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert left and all(name.startswith("step-") and checkpoint.complete(tmp_path / "checkpoints" / name) for name in left)


# Stopping and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_goes_on(folder, corpus, tmp_path, kind, monkeypatch):
    fit(folder, tmp_path / "whole", corpus)
    batch, seen, before = type(corpus).batch, [], signal.getsignal(signal.SIGINT)

    def interrupted(self, step, **options):
        seen.append(step)
        if seen.count(2) == 2:  # once in the plan, once in the run
            os.kill(os.getpid(), kind)
        return batch(self, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(corpus), "batch", interrupted)
        match = r"interrupted after step 3 of 6, which is saved; go on with: seqloom train --resume .*cut"
        with pytest.raises(FailedRun, match=match):
            fit(folder, tmp_path / "cut", corpus, save_every=0)
    assert signal.getsignal(signal.SIGINT) is before
    train(TrainConfig(resume=tmp_path / "cut"), progress=False)
    assert same(weights(tmp_path / "cut", 6), weights(tmp_path / "whole", 6))


def test_a_resumed_run_reads_the_tokens_it_began_with(folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    fit(data, tmp_path / "run")
    want = weights(tmp_path / "run", 6)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    (data / "00.txt").write_text("something else")
    train(TrainConfig(resume=tmp_path / "run"), progress=False)
    assert same(weights(tmp_path / "run", 6), want)
    shutil.rmtree(tmp_path / "run" / "data")
    with pytest.raises(BadInput, match=r"is not what the run in .* began with"):
        train(TrainConfig(resume=tmp_path / "run"), progress=False)


def test_resume_takes_its_settings_from_the_run(folder, corpus, tmp_path):
    fit(folder, tmp_path / "run", corpus)
    with pytest.raises(BadInput, match=r"--lr is 0.002 in the run to resume and cannot become 0.5; only eval_every"):
        train(TrainConfig(resume=tmp_path / "run", lr=0.5), progress=False)
    train(TrainConfig(resume=tmp_path / "run", lr=2e-3, log_every=3), progress=False)
    with pytest.raises(BadInput, match="holds no run to resume"):
        train(TrainConfig(resume=tmp_path / "absent"))
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(BadInput, match=r"run\.json is damaged"):
        train(TrainConfig(resume=tmp_path / "run"))


def test_a_run_of_a_newer_format_is_refused(folder, corpus, tmp_path):
    fit(folder, tmp_path, corpus, steps=1)
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(BadInput, match="newer than this seqloom reads"):
        train(TrainConfig(resume=tmp_path))


# What bad input gets ----------------------------------------------------------------------------------------------


def test_where_a_run_may_be(folder, corpus, tmp_path):
    fit(folder, tmp_path / "run", corpus, steps=1)
    with pytest.raises(BadInput, match=r"already holds a run; go on with --resume"):
        fit(folder, tmp_path / "run", corpus)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"--out .*file is a file"):
        fit(folder, tmp_path / "file", corpus)
    with pytest.raises(BadInput, match="cannot be written"):
        fit(folder, tmp_path / "file" / "inside", corpus)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(folder, corpus, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(BadInput, match="cannot be written: Permission denied"):
        fit(folder, tmp_path / "locked" / "run", corpus)


@pytest.mark.parametrize(("changes", "match"), [
    (dict(context=100_000), "longer than the training data"), (dict(batch=3, accumulate=2), "does not split into 2"),
    (dict(steps=3, minutes=1.0), "both given"), (dict(lr=0.0), "--lr must be above 0"), (dict(steps=0), "must be above 0"),
    (dict(held_out=1.0), "share of the bytes"), (dict(save_every=-1), "--save-every must not be below 0"),
    (dict(beta2=1.0), "--beta2 must be in"), (dict(model="hybird-tiny"), "did you mean 'hybrid-tiny'"),
    (dict(vocab=100), "at least 257"),
])
def test_settings_that_cannot_be(folder, tmp_path, changes, match):
    with pytest.raises(BadInput, match=match):
        fit(folder, tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "run.json").exists() and not list((tmp_path / "run").glob("data/.*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has it")
def test_a_precision_that_the_machine_lacks(folder, corpus, tmp_path):
    with pytest.raises(BadInput, match=r"--precision fp16 needs a GPU, .* bf16"):
        fit(folder, tmp_path, corpus, precision="fp16")


def test_models_that_cannot_be_trained(folder, corpus, tmp_path):
    both = language_model(vocab=300, stack=tiny(mixer=SoftmaxAttention(heads=2, direction="bidirectional")).stack)
    with pytest.raises(BadInput, match="needs a causal model"):
        train(config(folder, tmp_path / "a"), spec=both, corpus=corpus)
    with pytest.raises(BadInput, match="40 embeddings and the tokenizer 300 entries"):
        train(config(folder, tmp_path / "b"), spec=tiny(), corpus=corpus)


def test_an_absent_place_to_log_to(folder, corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(MissingExtra, match=r"--log trackio needs the package 'trackio'"):
        fit(folder, tmp_path, corpus, log=("trackio",))


# Numbers that are not finite --------------------------------------------------------------------------------------


def poison(monkeypatch, corpus, change, at=3):
    """Apply `change` to the model when the batch of step `at` is read for the second time (the first is the plan's)."""
    batch, seen = type(corpus).batch, []

    def read(self, step, **options):
        seen.append(step)
        if step == at and len(seen) > 3:
            change()
        return batch(self, step, **options)

    monkeypatch.setattr(type(corpus), "batch", read)


@pytest.mark.parametrize(("where", "said"), [
    ("stack.blocks.1.mixer", r"layer 1 \(gated_delta\)"), ("stack.blocks.2.mlp", r"layer 2 \(channel mixer\)"),
    ("stem", "the stem"),
])
def test_a_loss_that_is_not_finite_stops_the_run(folder, corpus, tmp_path, monkeypatch, where, said):
    from seqloom.train import loop

    models = []
    plan = loop._Run.plan
    monkeypatch.setattr(loop._Run, "plan", lambda self, say: models.append(self.model) or plan(self, say))

    def change():
        with torch.no_grad():
            next(models[0].get_submodule(where).parameters()).fill_(math.inf)

    poison(monkeypatch, corpus, change)
    match = (rf"not finite at step 4: loss nan, gradient norm nan, in the batch of windows 12 to 15, first in {said}; "
             "the last good checkpoint is step 2")
    with pytest.raises(FailedRun, match=match):
        fit(folder, tmp_path, corpus)
    assert checkpoint.latest(tmp_path / "checkpoints").step == 2


def test_a_gradient_that_is_not_finite_stops_the_run(folder, corpus, tmp_path, monkeypatch):
    from seqloom.train import loop

    plan = loop._Run.plan

    def with_hook(self, say):
        steps = plan(self, say)
        for layer in (0, 1):
            next(self.model.stack.blocks[layer].mlp.parameters()).register_hook(lambda gradient: gradient * math.nan)
        return steps

    monkeypatch.setattr(loop._Run, "plan", with_hook)
    match = r"not finite at step 1: loss 5\.\d+, gradient norm nan, .* first in the backward pass, at stack.blocks.1.mlp"
    with pytest.raises(FailedRun, match=match):
        fit(folder, tmp_path, corpus)


# Scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    dict(carry=True, context=7), dict(carry=True, context=7, rows=99), dict(carry=False, context=10_000),
    dict(carry=False, context=8, overlap=4),
])
def test_bits_per_byte_are_exact(corpus, options):
    """Against whole documents scored one by one, where no window cuts one."""
    model = language_model(vocab=300, stack=tiny(mixer=MIXERS["gated_delta"](heads=2)).stack).build().double().eval()
    nats = tokens = 0
    ids, starts = np.asarray(corpus.held.ids).astype(np.int64), [*np.asarray(corpus.held.starts), len(corpus.held)]
    for begin, end in pairwise(starts):
        document = torch.from_numpy(ids[begin:end])
        with torch.no_grad():
            logits = model(document[None]).logits[0]
        nats += float(F.cross_entropy(logits, torch.cat([document[1:], document.new_tensor([corpus.start])]), reduction="sum"))
        tokens += len(document)
    score = evaluate(model, corpus, **options)
    assert score.tokens == tokens
    if "overlap" not in options:
        assert score.loss == pytest.approx(nats / tokens, rel=1e-9)
        assert score.bits_per_byte == pytest.approx(nats / math.log(2) / len(corpus.text("held")), rel=1e-9)
    else:
        assert score.loss == pytest.approx(nats / tokens, rel=0.05)  # some context is missing


def test_scoring_leaves_the_model_as_it_was(corpus):
    model = tiny(vocab=300).build()
    model.stack.blocks[0].eval()
    evaluate(model, corpus, context=16)
    assert model.training and not model.stack.blocks[0].training and model.stack.blocks[1].training
    nothing = Tokens(np.zeros(0, int), None, np.zeros(0, int), np.zeros(0, bool), 0)
    with pytest.raises(BadInput, match="nothing is held out"):
        evaluate(model, replace(corpus, held=nothing))


def test_a_mixer_kind_is_left_out(corpus):
    model = preset("hybrid-tiny", vocab=300, dim=32).build().eval()
    ids = torch.randint(300, (2, 9))
    whole = model(ids).logits
    with without(model, "gated_delta"):
        ablated = model(ids).logits
        x = model.stem(ids)
        for block in model.stack.blocks:
            if block.mixer.spec.name() != "gated_delta":
                x = x + block.mixer(block.mixer_norm(x)).y
            x = x + block.mlp(block.mlp_norm(x))
        torch.testing.assert_close(ablated, model.head(model.stack.norm(x)))
        assert evaluate(model, corpus, context=16).bits_per_byte > 0
    assert torch.equal(model(ids).logits, whole) and not torch.allclose(ablated, whole)
    with pytest.raises(BadInput, match="no mixer 'mamba'; it has gated_delta, softmax"), without(model, "mamba"):
        pass


# Several processes ------------------------------------------------------------------------------------------------

WORKER = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType
import seqloom.train.loop as loop
from seqloom.train import TrainConfig, train

def sharded(mixed_precision):  # accelerate has no setting for FSDP2 on CPUs
    accelerator = Accelerator(mixed_precision=mixed_precision)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
                                            cpu_ram_efficient_loading=False)
    AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    return accelerator

if sys.argv[3] == "fsdp2":
    loop.Accelerator = sharded
loop.export = lambda *args: None
config = TrainConfig(data=sys.argv[1], out=Path(sys.argv[2]), model="hybrid-tiny", set=("stack.dim=32",), vocab=300, context=16,
                     batch=4, steps=6, save_every=2, log_every=1, held_out=0.2, accumulate=2)
if (config.out / "run.json").exists():
    config = TrainConfig(resume=config.out)
result = train(config, progress=False)
assert loop.Accelerator is Accelerator or result.model.stem.weight.shape == (300, 32)
assert torch.distributed.get_world_size() == 2
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo processes are started by a POSIX launcher")
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(folder, tmp_path, how):
    (tmp_path / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tmp_path / "worker.py"]

    def two():
        subprocess.run([*launch, folder, tmp_path / "two", how], check=True, capture_output=True, timeout=240,
                       env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})
        return weights(tmp_path / "two", 6)

    fit(folder, tmp_path / "one")
    one, first = weights(tmp_path / "one", 6), two()
    assert one.keys() == first.keys() and all(torch.allclose(one[name], first[name], atol=5e-5) for name in one)
    losses = [[row["loss"] for row in rows(tmp_path / name / "log.jsonl")] for name in ("one", "two")]
    assert np.allclose(*losses, atol=1e-5)
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-6")
    assert same(two(), first)  # resumed by two
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-6")
    train(TrainConfig(resume=tmp_path / "two"), progress=False)
    alone = weights(tmp_path / "two", 6)  # and by one
    assert all(torch.allclose(alone[name], first[name], atol=5e-5) for name in first)
