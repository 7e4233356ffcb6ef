"""Readers, tokenizers, corpora and baselines."""

import csv
import importlib
import json
import random
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqloom.core import BadInput, FailedRun, MissingExtra
from seqloom.data import IGNORE, baselines, corpus, documents, open_corpus, prepare, split
from seqloom.data import tokenizer as tok
from seqloom.data.chat import PLAIN, chat_parts, check_template

READER = importlib.import_module("seqloom.data.documents")  # the package's name for it is the function inside
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "naïve", "cafés", "漢字", "🙂", "def f(x):", "return x"]


def write_texts(folder, count=30, seed=0, size=40):
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        text = " ".join(draw.choice(WORDS) for _ in range(draw.randint(size // 2, size)))
        (folder / f"{i:03}.txt").write_text(f"{i} {text}", "utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    return prepare(str(folder), tmp_path_factory.mktemp("corpus"), vocab=320, share=0.3)


def read(source, **options):
    return list(documents(str(source), **options))


# Readers ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_its_text_files_and_not_what_is_hidden(tmp_path):
    for name in ("b.txt", "a/deep.py", "c.MD", ".hidden/x.txt", "__pycache__/y.py", "picture.png", "empty.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else name)
    found = read(tmp_path)
    assert [document.name for document in found] == ["a/deep.py", "b.txt", "c.MD"]
    assert all(document.ends and document.parts == ((document.name, True),) for document in found)


@pytest.mark.parametrize(
    "text", ["word " * 9000, "line\n" * 9000, ("a paragraph of it\n" * 20 + "\n") * 100, "漢字🙂" * 9000, "short"],
)
def test_a_text_alone_is_cut_into_documents_that_make_it_up(tmp_path, monkeypatch, text):
    monkeypatch.setattr(READER, "READ", 4099)  # characters of several bytes are cut apart between reads
    (tmp_path / "alone.txt").write_text(text, "utf-8")
    found = read(tmp_path / "alone.txt")
    assert "".join(document.text for document in found) == text
    assert [document.ends for document in found] == [False] * (len(found) - 1) + [True]
    assert all(8192 <= len(document.text) <= 2 * 8192 for document in found[:-1])
    if "\n\n" in text:
        assert all(document.text.endswith("\n\n") for document in found[:-1])


def test_large_files_of_a_folder_are_cut_too(tmp_path, monkeypatch):
    monkeypatch.setattr(READER, "LARGE", 1000)
    (tmp_path / "a.txt").write_text("word " * 9000)
    (tmp_path / "b.txt").write_text("small")
    assert len(read(tmp_path)) == 4


TRICKY = ["plain", 'with "quotes", commas', "two\nlines", "a \u2028 separator, a \x0c form feed", "ends in\r\nwindows", "漢字"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("column", [None, "body"])
def test_tables_give_their_column(tmp_path, kind, column):
    rows = [{"id": i, column or "text": text} for i, text in enumerate(TRICKY)]
    path = tmp_path / f"table.{kind}"
    if kind == "jsonl":
        path.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    elif kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    assert [document.text for document in read(path, column=column)] == TRICKY


def test_rows_without_text_are_passed_over_and_long_cells_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": null}\n{"text": 3}\n')
    assert [document.text for document in read(tmp_path / "a.jsonl")] == ["one", "3"]
    (tmp_path / "b.csv").write_text("text\n" + "x" * 300_000 + "\n")
    assert len(read(tmp_path / "b.csv")[0].text) == 300_000


def test_completions_and_chats_say_what_is_learnt(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "2+2=", "completion": "4"}\n{"prompt": "", "completion": "yes"}\n')
    assert [document.parts for document in read(tmp_path / "a.jsonl")] == [(("2+2=", False), ("4", True)), (("yes", True),)]
    turns = [("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "ciao")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": messages}))
    (document,) = read(tmp_path / "b.jsonl")
    assert document.parts == (
        ("system:\nbe kind\n\nuser:\nhi\n\nassistant:\n", False), ("hello", True), (None, True),
        ("user:\nbye\n\nassistant:\n", False), ("ciao", True), (None, True))
    own = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    parts = read(tmp_path / "b.jsonl", template=own)[0].parts
    assert parts[1] == ("hello</s>", True) and parts[0] == ("<system>be kind<user>hi<assistant>", False)
    assert check_template(own, "x") == own
    with pytest.raises(BadInput, match=r"marks nothing to learn"):
        check_template("{{ messages }}", "mine.jinja")


def test_hub_data_sets_by_the_datasets_library(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [document.text for document in read(f"hf:{tmp_path / 'set'}")] == ["one", "two"]
    with pytest.raises(BadInput, match="cannot be loaded"):
        read(f"hf:{tmp_path / 'absent'}")


def test_the_standard_library_without_its_tests():
    found = {}
    for document in documents("stdlib"):
        found[document.name] = document
        if len(found) == 40:
            break
    assert found and all(name.endswith(".py") and "test" not in name.split("/") for name in found)
    assert list(found) == sorted(found, key=lambda name: name.split("/"))


# What bad input gets ----------------------------------------------------------------------------------------------


def test_bad_files_are_named(tmp_path):
    def bad(match, source=tmp_path, **options):
        with pytest.raises(BadInput, match=match) as caught:
            read(source, **options)
        assert "\n" not in str(caught.value)

    bad("no file or folder .*absent", tmp_path / "absent")
    bad("holds no text")
    (tmp_path / "a.txt").write_text("")
    bad("all 1 text files of .* are empty")
    bad("a.txt is empty", tmp_path / "a.txt")
    (tmp_path / "b.txt").write_bytes("né".encode() * 700_000 + b"\xff tail")
    bad("b.txt is not UTF-8: byte 2100000 is 0xff", tmp_path / "b.txt")
    (tmp_path / "c.txt").write_bytes("né".encode()[:-1])
    bad(r"c.txt is not UTF-8: byte 1 is 0xc3 \(unexpected end of data\)", tmp_path / "c.txt")
    (tmp_path / "d.jsonl").write_text('{"text": "fine"}\n\n{"text": oops}\n')
    bad("d.jsonl, line 3: not JSON: Expecting value at column 10", tmp_path / "d.jsonl")
    (tmp_path / "e.jsonl").write_text("[1, 2]\n")
    bad("e.jsonl, line 1: expected an object with named values, found list", tmp_path / "e.jsonl")
    (tmp_path / "f.jsonl").write_text('{"txet": "one", "id": 1}\n')
    bad(r"f.jsonl, line 1: no column 'text'; did you mean 'txet'\? \(columns: txet, id\)", tmp_path / "f.jsonl")
    bad("no column 'zzz'; known: id, txet", tmp_path / "f.jsonl", column="zzz")
    (tmp_path / "g.jsonl").write_text('{"text": ["a"]}\n')
    bad("column 'text' holds a list, not text", tmp_path / "g.jsonl")
    (tmp_path / "h.csv").write_text("text,id\n")
    bad("h.csv has a header and no rows", tmp_path / "h.csv")
    (tmp_path / "i.csv").write_bytes(b"text\n\xe9t\xe9\n")
    bad("i.csv is not UTF-8: byte 5 is 0xe9", tmp_path / "i.csv")
    (tmp_path / "j.jsonl").write_text('{"messages": "hi"}\n')
    bad("'messages' must be a list of {role, content}", tmp_path / "j.jsonl")
    (tmp_path / "k.jsonl").write_text('{"messages": [{"role": "user"}]}\n')
    bad("every message needs 'role' and 'content'", tmp_path / "k.jsonl")
    (tmp_path / "k.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    bad("k.jsonl, line 1: the chat template cannot be applied", tmp_path / "k.jsonl", template="{% if %}")
    pytest.importorskip("pyarrow")
    (tmp_path / "l.parquet").write_bytes(b"PAR1 not really")
    bad("l.parquet is not a readable parquet file", tmp_path / "l.parquet")


def test_an_absent_extra_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingExtra, match=r"pip install 'seqloom\[data\]'"):
        read(tmp_path / "a.parquet")
    with pytest.raises(MissingExtra, match=r"reading hf:x needs the package 'datasets'"):
        read("hf:x")


def test_a_context_longer_than_the_data(made):
    with pytest.raises(BadInput, match=r"a context of 100000 tokens is longer than the training data \(\d+ tokens\)"):
        made.batch(0, seed=0, batch=1, context=100_000)


def test_the_tokenizer_is_refused_where_it_cannot_do(tmp_path):
    with pytest.raises(BadInput, match="at least 257"):
        tok.learn(["x"], vocab=256)
    with pytest.raises(BadInput, match=r"has no tokenizer.json"):
        tok.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="is not a tokenizer"):
        tok.load(tmp_path)


# The split --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.sampled_from([0.05, 0.3, 0.5]), st.integers(0, 99))
@settings(max_examples=60)
def test_split_goes_by_content_alone(sizes, share, seed):
    draw = np.random.default_rng(seed)
    digests = draw.integers(0, 2**64, len(sizes), np.uint64)
    digests, sizes = np.concatenate([digests, digests[:3]]), np.array([*sizes, *sizes[:3]])  # some documents twice
    held = split(digests, sizes, share)
    order = draw.permutation(len(sizes))
    assert (split(digests[order], sizes[order], share) == held[order]).all()
    assert set(digests[held]).isdisjoint(digests[~held])
    if len(set(digests)) > 1:
        assert 0 < held.sum() < len(held)
    if held.sum() > 2:
        assert sizes[held].sum() <= share * sizes.sum()
    assert not split(digests, sizes, 0.0).any()


def test_split_reaches_its_share():
    draw = np.random.default_rng(0)
    digests, sizes = draw.integers(0, 2**64, 3000, np.uint64), draw.integers(1, 5000, 3000)
    held = split(digests, sizes, 0.05)
    assert 0.049 < sizes[held].sum() / sizes.sum() <= 0.05
    grown = split(np.append(digests, np.uint64(5)), np.append(sizes, 100), 0.05)
    assert (grown[:-1] != held).sum() <= 1  # one more document moves next to nothing


# Tokens on disk ---------------------------------------------------------------------------------------------------


def test_tokens_are_the_text_and_the_split_is_by_document(folder, made):
    texts = {document.text for document in documents(str(folder))}
    held, train = made.text("held").decode(), made.text("train").decode()
    inside = {text for text in texts if text in held}
    assert sum(len(text) for text in inside) == len(held) and sum(len(text) for text in texts - inside) == len(train)
    assert made.held.size == len(held.encode()) and made.train.size == len(train.encode())
    assert isinstance(made.train.ids, np.memmap) and made.train.ids.dtype == np.uint16
    assert (np.asarray(made.train.ids)[made.train.starts] == made.start).all()
    again = np.load(made.folder / "train.ids.npy")
    assert (again == made.train.ids).all() and made.train.learnt is None


def test_auto_tokenizer_gives_the_same_ids(made):
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(made.folder)
    text = "the fox  sells 漢字🙂\n\tdef"
    assert auto(text)["input_ids"] == made.tokenizer.encode(text).ids and auto.decode(auto(text)["input_ids"]) == text
    assert auto.bos_token_id == auto.eos_token_id == made.start == tok.start(made.tokenizer)


def test_bytes_as_tokens(folder, tmp_path):
    found = prepare(str(folder), tmp_path, vocab=257)
    assert found.vocab == 257 and len(found.train) == found.train.size + found.train.documents


def test_what_looks_like_a_special_token_is_text(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(4):
        (tmp_path / "data" / f"{i}.txt").write_text(f"{i} a {tok.START} b {tok.START}")
    found = prepare(str(tmp_path / "data"), tmp_path / "out", vocab=300)
    assert (np.asarray(found.train.ids) == found.start).sum() == found.train.documents
    assert found.text("train").decode().count(tok.START) == 2 * found.train.documents


def test_an_own_tokenizer(folder, made, tmp_path):
    found = prepare(str(folder), tmp_path, share=0.3, tokenizer=tok.load(made.folder))
    assert (np.asarray(found.train.ids) == np.asarray(made.train.ids)).all()
    bare = tok.Tokenizer(tok.models.BPE())
    with pytest.raises(BadInput, match="no token that begins a document"):
        prepare(str(folder), tmp_path, tokenizer=bare)


def test_learning_a_tokenizer_is_repeatable(folder):
    texts = [document.text for document in documents(str(folder))]
    assert tok.learn(texts, vocab=400).to_str() == tok.learn(list(texts), vocab=400).to_str()


def test_found_again_until_its_files_change(tmp_path, monkeypatch):
    data = write_texts(tmp_path / "data", count=8)
    first = prepare(str(data), tmp_path / "out", vocab=300)
    learn = tok.learn
    monkeypatch.setattr(tok, "learn", lambda *args, **kwargs: pytest.fail("tokenised again"))
    assert prepare(str(data), tmp_path / "out", vocab=300).digest == first.digest
    monkeypatch.setattr(tok, "learn", learn)
    with (data / "000.txt").open("a") as file:
        file.write(" and more")
    changed = prepare(str(data), tmp_path / "out", vocab=300)
    assert changed.digest != first.digest and changed.folder != first.folder
    tokens = np.array(changed.train.ids)
    (changed.folder / "train.ids.npy").write_bytes(b"cut short")
    with pytest.raises(BadInput, match="no whole corpus"):
        open_corpus(changed.folder)
    again = prepare(str(data), tmp_path / "out", vocab=300)
    assert again.digest == changed.digest and (np.asarray(again.train.ids) == tokens).all()


def test_nothing_half_written(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus._Side, "add", full)
    with pytest.raises(FailedRun, match=r"cannot be written to .*: No space left on device"):
        prepare(str(folder), out, vocab=300)
    assert list(out.iterdir()) == []
    monkeypatch.undo()
    (out / "file").write_text("")
    with pytest.raises(FailedRun, match="cannot be written"):
        prepare(str(folder), out / "file", vocab=300)


def test_data_that_change_while_they_are_read(tmp_path, monkeypatch):
    data = write_texts(tmp_path / "data", count=6)
    learn = tok.learn

    def meanwhile(*args, **kwargs):
        (data / "003.txt").write_text("something else")
        return learn(*args, **kwargs)

    monkeypatch.setattr(tok, "learn", meanwhile)
    with pytest.raises(FailedRun, match="changed while it was read"):
        prepare(str(data), tmp_path / "out", vocab=300)
    assert list((tmp_path / "out").iterdir()) == []


# Batches ----------------------------------------------------------------------------------------------------------


def pieces_of(tokens):
    ids, edges = np.asarray(tokens.ids).tolist(), [*np.asarray(tokens.starts).tolist(), len(tokens)]
    return [ids[a:b] for a, b in pairwise(edges)]


def test_batches_are_a_pure_function_of_seed_and_step(made):
    settings_ = dict(seed=3, batch=4, context=16)
    again = open_corpus(made.folder)
    for step in (7, 0, 50, 7):  # 50 is in a later epoch
        for one, other in zip(made.batch(step, **settings_), again.batch(step, **settings_), strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
    assert not torch.equal(made.batch(0, **settings_).ids, made.batch(0, **{**settings_, "seed": 4}).ids)


@pytest.mark.parametrize("context", [8, 64])
def test_an_epoch_asks_every_window_once_and_documents_stay_whole(made, context):
    """Against an independent reading: rows are cut out of some order of the documents, each asked at most once."""
    documents_ = {tuple(piece): i for i, piece in enumerate(pieces_of(made.train))}
    seen = []
    for step in range(made.windows(context)):
        ids, targets, segments = made.batch(step, seed=0, batch=1, context=context)
        assert torch.equal(targets[0, :-1], ids[0, 1:])  # here everything is learnt, the ends of documents included
        starts = (ids[0] == made.start).nonzero().flatten().tolist()
        if segments is None:
            assert not [s for s in starts if s > 0]
        else:
            change = (segments[0].diff() != 0).nonzero().flatten() + 1
            assert change.tolist() == [s for s in starts if s > 0] and segments.min() == 1
        row = [*ids[0].tolist(), int(targets[0, -1])]
        for begin, end in pairwise(starts):  # documents that are wholly inside
            seen.append(documents_[tuple(row[begin:end])])
    assert len(seen) == len(set(seen)) and (context < 64 or len(seen) > 3)
    epoch = made.windows(context)
    first, second = ([made.batch(at + i, seed=0, batch=1, context=context).ids for i in range(3)] for at in (0, epoch))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_not_learnt_is_not_asked(tmp_path):
    rows = [{"prompt": f"question {i} ", "completion": f"answer {i}"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", vocab=257, share=0.0)
    assert found.train.size == sum(len(row["completion"]) for row in rows)
    asked = []
    for step in range(found.windows(32)):
        targets = found.batch(step, seed=0, batch=1, context=32).targets[0]
        asked += targets[targets != IGNORE].tolist()
    ends = asked.count(found.start)
    text = found.tokenizer.decode(asked, skip_special_tokens=True)
    assert "question" not in text and text.count("answer") >= 30 and 30 <= ends <= 40  # where an answer ends is learnt


def test_a_document_that_is_closed_already_has_no_second_end(tmp_path):
    rows = []
    for i in range(60):
        chat = [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}]
        rows.append({"messages": chat} if i % 3 else {"text": f"text {i} !"})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", vocab=257, share=0.0)
    closed, mark = 0, found.tokenizer.token_to_id("!")
    for step in range(3 * found.windows(24)):
        ids, targets, segments = found.batch(step, seed=0, batch=1, context=24)
        for last in [] if segments is None else (segments[0].diff() != 0).nonzero().flatten().tolist():
            if ids[0, last] == mark:
                assert targets[0, last] == found.start
                closed += 1
            else:  # the end token of the assistant's turn
                assert ids[0, last] == found.start and targets[0, last] == IGNORE
    assert closed > 10


def test_a_text_that_goes_on_has_no_end_to_learn(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"some words in line {i}\n" for i in range(2000)))
    found = prepare(str(tmp_path / "a.txt"), tmp_path / "out", vocab=257, share=0.2)
    assert found.train.documents > 2 and found.held.documents >= 1
    assert int(found.train.closes.sum()) + int(found.held.closes.sum()) == 1  # that of the last piece
    targets = torch.cat([found.batch(step, seed=0, batch=1, context=64).targets for step in range(found.windows(64))])
    assert int((targets == found.start).sum()) <= int(found.train.closes.sum())


def test_packing_that_continues_gives_no_segments(made):
    reset, going_on = (made.batch(1, seed=0, batch=8, context=64, reset=reset) for reset in (True, False))
    assert torch.equal(reset.ids, going_on.ids) and torch.equal(reset.targets, going_on.targets)
    assert reset.segments is not None and going_on.segments is None


@pytest.mark.parametrize(("how", "options"), [
    ("held_windows", dict(rows=3, context=16)), ("held_windows", dict(rows=5, context=16, overlap=7)),
    ("held_windows", dict(rows=2, context=10_000)), ("held_strips", dict(rows=3, context=16)),
    ("held_strips", dict(rows=99, context=50)),
])
def test_every_held_out_token_is_asked_once(made, how, options):
    want = sorted(token for piece in pieces_of(made.held) for token in [*piece[1:], made.start])
    got, carried = [], {}
    for batch in getattr(made, how)(**options):
        segments = batch.segments if batch.segments is not None else torch.ones_like(batch.ids)
        asked = batch.targets != IGNORE
        assert (segments[asked] > 0).all()
        inside = asked[:, :-1] & asked[:, 1:] & (batch.targets[:, :-1] != made.start)
        assert (batch.ids[:, 1:][inside] == batch.targets[:, :-1][inside]).all()
        got += batch.targets[asked].tolist()
        if how == "held_strips":  # rows go on where they left off
            for row in range(len(segments)):
                real = segments[row] > 0
                if real.any():
                    assert int(segments[row][real][0]) >= carried.get(row, 1)
                    carried[row] = int(segments[row][real][-1])
    assert sorted(got) == want
    with pytest.raises(BadInput, match="overlap"):
        list(made.held_windows(rows=1, context=8, overlap=8))


# Baselines --------------------------------------------------------------------------------------------------------


def test_unigram_is_the_cross_entropy():
    train, held = b"aaab", b"ab"
    want = -0.5 * (np.log2(4 / 260) + np.log2(2 / 260))
    assert abs(baselines.unigram(train, held) - want) < 1e-12


def test_trigram_is_a_distribution_and_an_honest_rival(made):
    train, held = made.text("train"), made.text("held")
    tables = baselines._tables(np.frombuffer(train, np.uint8))
    contexts = [np.frombuffer(b"th" + bytes([byte]), np.uint8) for byte in range(256)]  # all that may follow "th"
    assert np.allclose(sum(baselines._orders(tables, text)[0][-1] for text in contexts), 1)
    three, one = baselines.trigram(train, held), baselines.unigram(train, held)
    assert 0.5 < three < one - 1
    squeezed = baselines.compressors(held)
    assert set(squeezed) == {"gzip -9", "xz"} and all(0 < value < 9 for value in squeezed.values())


def test_the_plain_chat_template_is_what_transformers_renders(made):
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(made.folder)
    auto.chat_template = PLAIN
    turns = ["the fox ", "jumps over\n\nthe 漢字", " and\n", "naïve cafés", "while to", "def f(x):\n    return x"]
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]
    parts = chat_parts(messages, "row")
    ids = [[made.start] if text is None else made.tokenizer.encode(text).ids for text, _ in parts]
    assert auto.apply_chat_template(messages, return_dict=False) == [made.start, *chain(*ids)]
    prompt = auto.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)
    assert prompt == [made.start, *chain(*ids[:4])] and parts[4] == ("naïve cafés", True)
