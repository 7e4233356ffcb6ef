"""The command line: what a newcomer types works; bad input gets one sentence and its status, and nothing is left behind."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from seqloom._version import __version__
from seqloom.cli.main import VERBS, main

ROOT = Path(__file__).parents[1]
SENTENCE = "the quick brown fox jumps over the lazy dog, and number {} looks on. "
DOCUMENTS = [SENTENCE.format(i) * 6 for i in range(12)]
TINY = ["--model", "hybrid-tiny", "--set", "stack.dim=32", "stack.blocks.*.mlp=null", "--vocab", "300", "--context", "16",
        "--batch", "2"]


def train(data, out, *more, steps=3):
    return main(["train", "--data", str(data), "--out", str(out), *TINY, "--steps", str(steps), *more])


@pytest.fixture(scope="session")
def notes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notes")
    for i, text in enumerate(DOCUMENTS):
        (folder / f"{i:02}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def trained(notes, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "model"
    assert train(notes, out, "--held-out", "0.2") == 0
    return out


@pytest.fixture
def copy(trained, tmp_path):
    import shutil

    return Path(shutil.copytree(trained, tmp_path / "copy"))


def refused(capsys, argv, *words, status=2, notes=0):
    """Run, and expect one line on stderr (after `notes` lines of progress) with `words` in it, and the status."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == status
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1 + notes, printed.err
    assert lines[-1].startswith("seqloom: ") and "Traceback" not in printed.err
    for word in words:
        assert str(word) in lines[-1], lines[-1]
    assert "unexpected" not in lines[-1] or status != 2
    return lines[-1]


# What there is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("argv", "word"), [
    (["--version"], __version__), (["--help"], "usage: seqloom VERB"),
    (["list"], "gated_delta"), (["list", "mixers"], "softmax"),
    (["list", "models"], "hybrid-tiny"), (["list", "papers"], "deltanet"), (["list", "tasks"], "recall"),
    (["show", "softmax", "--dim", "32"], "equation"), (["show", "deltanet"], "claim"),
])
def test_what_there_is_is_printed(argv, word, capsys):
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert word in printed.out and not printed.err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"seqloom {verb}" in capsys.readouterr().out


def test_nothing_to_do_shows_the_usage(capsys):
    assert main([]) == 2 and "usage" in capsys.readouterr().out


def test_as_a_module():
    run = subprocess.run([sys.executable, "-m", "seqloom", "tain"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and not run.stdout
    assert run.stderr == "seqloom: no verb 'tain'; did you mean 'train'?\n"


def test_the_ten_lines_of_the_readme():
    run = subprocess.run([sys.executable, ROOT / "examples" / "ten_lines.py"], capture_output=True, text=True, timeout=120,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr


def test_the_example_configuration_is_read():
    from seqloom.cli.options import parse
    from seqloom.train import TrainConfig

    config = parse(TrainConfig, ["--config", str(ROOT / "examples" / "run.yaml"), "--batch", "4"], verb="train")
    assert config.batch == 4 and config.lr == 2e-3 and config.set == ("stack.dim=192",) and config.out == Path("runs/example")


# Training on one's own files --------------------------------------------------------------------------------------


def write_txt(path):
    path.write_text("\n\n".join(DOCUMENTS * 4))


def write_jsonl(path):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))


def write_csv(path):
    path.write_text("id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(DOCUMENTS)))


def write_parquet(path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.table({"text": DOCUMENTS}), path)


@pytest.mark.parametrize("write", [write_txt, write_jsonl, write_csv, write_parquet])
def test_trains_on_a_file(write, tmp_path, capsys):
    path = tmp_path / f"data.{write.__name__.removeprefix('write_')}"
    write(path)
    assert train(path, tmp_path / "out", steps=1) == 0
    assert "saved in" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_trains_by_a_configuration_and_resumes(notes, tmp_path, capsys):
    settings = {"data": str(notes), "out": str(tmp_path / "out"), "set": ["stack.dim=32", "stack.blocks.*.mlp=null"],
                "vocab": 300, "context": 16, "batch": 2, "steps": 9, "save-every": 1, "held_out": 0.2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--steps", "3"]) == 0
    printed = capsys.readouterr()
    assert "held out:" in printed.out and "gated_delta chunked" in printed.out
    # what is shown while it trains is a few lines where nobody watches, not one for every step
    assert len(printed.err.strip().splitlines()) <= 5 and "\r" not in printed.err

    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    for gone in ("model.safetensors", "config.json"):
        (tmp_path / "out" / gone).unlink()
    for part in (tmp_path / "out" / "checkpoints" / "step-3").iterdir():
        part.unlink()
    assert main(["train", "--resume", str(tmp_path / "out")]) == 0
    assert "at step 2 of 3" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_trained_model_is_scored_and_continues_a_prompt(trained, notes, capsys):
    assert main(["evaluate", "--model", str(trained)]) == 0
    own = capsys.readouterr().out
    assert main(["evaluate", "--model", str(trained), "--data", str(notes / "03.txt"), "--context", "32"]) == 0
    other = capsys.readouterr().out
    assert "bits per byte" in own and "bits per byte" in other
    texts = []
    for _ in range(2):
        assert main(["generate", "--model", str(trained), "--prompt", "the quick", "--tokens", "5", "--seed", "3"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("the quick")


# Comparing --------------------------------------------------------------------------------------------------------


def compared(out):
    found = json.loads((out / "comparison.json").read_text())
    assert (out / "comparison.svg").read_text().startswith("<svg")
    counts = [row["parameters"] for row in found["rows"]]
    assert max(counts) <= 1.02 * min(counts)
    assert all(row["state_bytes"] > 0 and row["tokens_per_second"] > 0 for row in found["rows"])
    return found


def test_compares_on_text(notes, tmp_path, capsys, monkeypatch):
    from seqloom.study import compare

    monkeypatch.setattr(compare, "_executor", lambda jobs: compare._serial())  # a process for each run takes seconds to start
    argv = ["compare", "--mixers", "softmax,gated_linear", "--data", str(notes), "--out", str(tmp_path / "out"), "--steps", "2",
            "--seeds", "2", "--dim", "64", "--layers", "1", "--context", "16", "--batch", "2"]
    assert main(argv) == 0
    found = compared(tmp_path / "out")
    assert found["metric"] == "bits per byte" and {row["mixer"] for row in found["rows"]} == {"softmax", "gated_linear"}
    assert all(len(row["runs"]) == 2 for row in found["rows"])
    table = capsys.readouterr().out
    assert "gated_linear" in table and "state at 16" in table


def test_compares_on_a_task(tmp_path):
    argv = ["compare", "--mixers", "softmax,delta", "--task", "recall", "--out", str(tmp_path / "out"), "--steps", "2",
            "--seeds", "1", "--dim", "32", "--layers", "1", "--batch", "2", "--jobs", "0"]
    assert main(argv) == 0
    assert compared(tmp_path / "out")["metric"] == "accuracy"


@pytest.mark.slow
def test_compares_in_processes(notes, tmp_path):
    argv = ["compare", "--mixers", "softmax,delta", "--data", notes, "--out", tmp_path / "out", "--steps", "2", "--seeds", "1",
            "--dim", "32", "--layers", "1", "--context", "16", "--batch", "2"]
    run = subprocess.run([sys.executable, "-m", "seqloom", *argv], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert compared(tmp_path / "out")


# Bad input: data --------------------------------------------------------------------------------------------------


BAD_DATA = [
    ("missing.txt", None, ["missing.txt", "no file"]),
    ("empty.txt", b"", ["empty.txt is empty"]),
    ("blank.jsonl", b"\n\n", ["blank.jsonl", "no documents"]),
    ("wrong.csv", b"txet,other\nhello,1\n", ["'text'", "did you mean 'txet'?", "--column"]),
    ("wrong.jsonl", b'{"text": "a"}\n{"text": \n', ["wrong.jsonl, line 2", "not JSON"]),
    ("wrong.parquet", b"PAR1 but not really", ["wrong.parquet", "not a readable parquet file"]),
    ("bytes.txt", b"twelve bytes\xff and more", ["bytes.txt", "byte 12 is 0xff"]),
    ("short.txt", b"too short", ["context of 16 tokens is longer than the training data"]),
]


@pytest.mark.parametrize(("name", "content", "words"), BAD_DATA, ids=[name for name, *_ in BAD_DATA])
def test_bad_data(name, content, words, tmp_path, capsys):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    argv = ["train", "--data", tmp_path / name, "--out", tmp_path / "deep" / "out", *TINY, "--steps", 1]
    learnt = name == "short.txt"  # which is known only once there are tokens
    refused(capsys, argv, *words, notes=int(learnt))
    assert not (tmp_path / "deep" / "out" / "config.json").exists() and not (tmp_path / "deep" / "out" / "run.json").exists()
    assert learnt or not (tmp_path / "deep").exists()


def test_an_absent_extra_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    argv = ["train", "--data", tmp_path / "data.parquet", "--out", tmp_path / "out"]
    refused(capsys, argv, "'pyarrow'", "pip install 'seqloom[data]'")
    assert not (tmp_path / "out").exists()


# Bad input: settings ----------------------------------------------------------------------------------------------


def test_bench_times_mixers_and_writes_what_it_found(tmp_path, capsys):
    assert main(["bench", "layers", "--part", "segments", "--mixers", "linear", "--rounds", "1", "--out", str(tmp_path)]) == 0
    assert "cost" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "segments_cpu.json").read_text())["rows"]
    assert row["name"] == "linear" and row["cost"] > 0


def test_bench_of_kernels_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "kernels"]) == 2 and "there is none here" in capsys.readouterr().err


BAD_WORDS = [
    (["tain"], ["no verb 'tain'", "'train'"]),
    (["train", "--stepz", "3"], ["no option --stepz", "'--steps'"]),
    (["train", "--steps", "many"], ["--steps", "'many'"]),
    (["train", "--steps", "0"], ["--steps", "above 0"]),
    (["train", "--lr"], ["--lr"]),
    (["train", "stray"], ["not understood: stray"]),
    (["train", "--schedule", "cosin"], ["'cosin'", "cosine"]),
    (["train", "--steps", "3", "--minutes", "1"], ["give one"]),
    (["train", "--lr", "nan"], ["--lr must be above 0"]),
    (["train", "--config"], ["--config needs a YAML file"]),
    (["train", "--config", "nowhere.yaml"], ["no file nowhere.yaml"]),
    (["train", "--resume", "nowhere"], ["nowhere holds no run to resume"]),
    (["list", "modls"], ["modls", "models"]),
    (["show"], ["missing"]),
    (["show", "sofmax"], ["did you mean 'softmax'?"]),
    (["show", "softmax", "--dim", "0"], ["--dim must be at least 1"]),
    (["check", "deltanett"], ["did you mean 'deltanet'?"]),
    (["bench", "--mixers", "mmaba"], ["did you mean 'mamba'?"]),
    (["generate"], ["missing", "--model"]),
    (["generate", "--model", "nowhere"], ["nowhere is not there"]),
    (["evaluate", "--model", "nowhere"], ["nowhere is not there"]),
    (["compare"], ["missing", "--mixers"]),
    (["compare", "--mixers", "softmax", "--task", "recall"], ["two or more"]),
    (["compare", "--mixers", "softmax,delta"], ["--data", "--task"]),
    (["compare", "--mixers", "softmax,delta", "--task", "recal"], ["did you mean 'recall'?"]),
    (["compare", "--mixers", "softmax,detla", "--task", "recall"], ["did you mean 'delta'?"]),
    (["compare", "--mixers", "softmax,delta", "--task", "recall", "--steps", "0"], ["--steps must be at least 1"]),
]


@pytest.mark.parametrize(("argv", "words"), BAD_WORDS, ids=[" ".join(argv) for argv, _ in BAD_WORDS])
def test_bad_words(argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, argv, *words)
    assert len(line) < 250 and "TrainConfig" not in line and "helptext" not in line
    assert not list(tmp_path.iterdir())


BAD_YAML = [
    ("data: a.txt\nsetps: 3\n", ["line 2", "'setps'", "did you mean 'steps'?"]),
    ("data: a.txt\nsteps: many\n", ["line 2", "steps", "'many'"]),
    ("data: [a.txt\nsteps: 3\n", ["line 2", "not valid YAML"]),
    ("- data\n", ["option: value", "list"]),
]


@pytest.mark.parametrize(("text", "words"), BAD_YAML)
def test_bad_configurations(text, words, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    refused(capsys, ["train", "--config", tmp_path / "run.yaml", "--out", tmp_path / "out"], "run.yaml", *words)
    assert not (tmp_path / "out").exists()


BAD_MODELS = [
    (["--model", "sofmax-tiny"], ["did you mean 'softmax-tiny'?"]),
    (["--set", "stack.blocks.0.mixer.kind=sofmax"], ["did you mean 'softmax'?"]),
    (["--set", "stack.blocks.*.mixer.heads=5"], ["does not split over 5 heads"]),
    (["--set", "stack.dmi=32"], ["did you mean 'dim'?"]),
    (["--set", "stack.dim"], ["path=value"]),
    (["--model", "MODEL.yaml"], ["line 4", "did you mean 'heads'?"]),
    (["--context", "100000"], ["context of 100000 tokens is longer than the training data"]),
]


@pytest.mark.parametrize(("words", "said"), BAD_MODELS, ids=[" ".join(words) for words, _ in BAD_MODELS])
def test_bad_models(words, said, notes, tmp_path, capsys):
    (tmp_path / "MODEL.yaml").write_text("kind: stack\ndim: 32\nblocks:\n  - mixer: {kind: softmax, haeds: 2}\n")
    words = [tmp_path / word if word == "MODEL.yaml" else word for word in words]
    refused(capsys, ["train", "--data", notes, "--out", tmp_path / "out", "--vocab", 300, *words], *said,
            notes=int("--context" in words))  # a wrong model is refused before any data are read
    assert not (tmp_path / "out" / "run.json").exists() and not (tmp_path / "out" / "config.json").exists()


# Bad input: saved models ------------------------------------------------------------------------------------------


def test_a_model_of_a_newer_format(copy, capsys):
    config, run = json.loads((copy / "config.json").read_text()), json.loads((copy / "run.json").read_text())
    config["seqloom"]["format"] = run["format"] = 99
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "run.json").write_text(json.dumps(run))
    for verb in ("generate", "evaluate"):
        refused(capsys, [verb, "--model", copy], "config.json", "format 99", "upgrade")
    refused(capsys, ["train", "--resume", copy], "run.json", "format 99", "upgrade")


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_cut_weights(size, copy, capsys):
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(size)
    refused(capsys, ["generate", "--model", copy], "model.safetensors", "damaged")


def test_damaged_parts(copy, capsys):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused(capsys, ["generate", "--model", copy], "never loaded")
    (copy / "config.json").write_text("{")
    refused(capsys, ["evaluate", "--model", copy], "config.json", "not valid JSON")
    (copy / "run.json").write_text("{}")
    refused(capsys, ["train", "--resume", copy], "run.json", "damaged")


def test_a_cut_tokenizer(copy, capsys):
    (copy / "tokenizer.json").write_text("{")
    refused(capsys, ["generate", "--model", copy], "tokenizer")


@pytest.mark.parametrize(("words", "said"), [
    (["--tokens", "0"], "--tokens"), (["--temperature", "-1"], "temperature"), (["--top-p", "0"], "top_p"),
    (["--device", "nowhere"], "--device nowhere"),
])
def test_bad_settings_of_generation(words, said, trained, capsys):
    refused(capsys, ["generate", "--model", trained, *words], said)


# Folders, disks, numbers ------------------------------------------------------------------------------------------


def test_a_run_is_not_overwritten(trained, notes, capsys):
    before = (trained / "model.safetensors").read_bytes()
    refused(capsys, ["train", "--data", notes, "--out", trained, *TINY], "already holds a run", "--resume")
    assert (trained / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("inside", [False, True])
def test_a_file_where_a_folder_should_be(inside, notes, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    out = tmp_path / "file" / "out" if inside else tmp_path / "file"
    refused(capsys, ["train", "--data", notes, "--out", out, *TINY], out)
    refused(capsys, ["compare", "--mixers", "softmax,delta", "--data", notes, "--out", out], "file")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_may_not_be_written(notes, tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(capsys, ["train", "--data", notes, "--out", tmp_path / "locked" / "out", *TINY], "cannot be written")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder(code, notes, tmp_path, capsys, monkeypatch):
    write = Path.write_text

    def refuse(path, *words, **more):
        if tmp_path in path.parents:
            raise OSError(code, os.strerror(code), str(path))
        return write(path, *words, **more)

    monkeypatch.setattr(Path, "write_text", refuse)
    refused(capsys, ["train", "--data", notes, "--out", tmp_path / "out", *TINY], "cannot be written", os.strerror(code))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_tokens_are_written(notes, tmp_path, capsys, monkeypatch):
    from seqloom.data import corpus

    def full(*words):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(corpus._Side, "_append", full)
    argv = ["train", "--data", notes, "--out", tmp_path / "out", *TINY]
    refused(capsys, argv, "cannot be written", os.strerror(errno.ENOSPC), status=1, notes=1)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_the_model_is_written(notes, tmp_path, capsys, monkeypatch):
    from seqloom.hub import SeqloomPreTrainedModel

    def full(*words, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(SeqloomPreTrainedModel, "save_pretrained", full)
        capsys.readouterr()
        assert train(notes, out) == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "could not be written" in line and os.strerror(errno.ENOSPC) in line
    assert not list(out.glob("*.safetensors")) and not list(out.glob(".export*")) and not (out / "config.json").exists()
    assert main(["train", "--resume", str(out)]) == 0 and (out / "model.safetensors").is_file()


def test_a_full_disk_leaves_the_last_good_checkpoint(notes, tmp_path, capsys, monkeypatch):
    from seqloom.train import checkpoint

    whole, out = checkpoint.save_file, tmp_path / "out"

    def full(tensors, path):
        if "step-2" in str(path) and str(path).endswith(checkpoint.OPTIMISER):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        whole(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        capsys.readouterr()
        assert train(notes, out, "--save-every", "1") == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 2 could not be saved" in line and os.strerror(errno.ENOSPC) in line and "step-1" in line
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-1"]
    assert checkpoint.latest(out / "checkpoints").step == 1
    assert not (out / "config.json").exists() and not (out / "model.safetensors").exists()
    assert main(["train", "--resume", str(out)]) == 0
    assert "at step 1 of 3" in capsys.readouterr().err and (out / "model.safetensors").is_file()


def test_numbers_that_are_not_finite(notes, tmp_path, capsys):
    capsys.readouterr()
    assert train(notes, tmp_path / "out", "--lr", "1e30", "--warmup", "0", "--save-every", "1", steps=5) == 1
    printed = capsys.readouterr().err
    line = printed.strip().splitlines()[-1]
    assert line.startswith("seqloom: not finite at step ") and "windows " in line and "first in " in line
    assert "last good checkpoint is step " in line and "Traceback" not in printed
    assert not (tmp_path / "out" / "model.safetensors").exists()


# What goes wrong otherwise ----------------------------------------------------------------------------------------


def test_a_traceback_is_shown_when_asked_for(capsys):
    assert main(["show", "sofmax", "--traceback"]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed and printed.strip().splitlines()[-1].startswith("seqloom: nothing is called")


def test_our_own_mistakes_are_said_to_be_ours(capsys, monkeypatch):
    from seqloom.cli import show

    def fault(*words):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(show, "show_mixer", fault)
    refused(capsys, ["show", "softmax"], "unexpected ZeroDivisionError: division by zero", "--traceback", status=1)


def test_an_interrupt(capsys, monkeypatch):
    from seqloom.cli import show

    def stop(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr(show, "show_mixer", stop)
    assert main(["show", "softmax"]) == 130 and capsys.readouterr().err == "interrupted\n"
