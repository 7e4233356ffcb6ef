"""Tokenizers learnt from the training documents, in the `tokenizers` format that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from seqloom.core import BadInput

START = "<|start|>"  # stands before every document, and closes the one before
STARTS = (START, "<|begin_of_text|>", "<bos>", "<s>", "<|endoftext|>", "<|im_start|>", "[CLS]")


def learn(texts: Iterable[str], *, vocab: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab` entries: 256 bytes, START, and merges in the order of how often pairs occur.

    vocab 257 is one token a byte and the start token. Every text can be written in it, and read back exactly.
    Raises: BadInput if vocab is below 257.
    """
    if vocab < 257:
        raise BadInput(f"a byte-level vocabulary needs at least 257 entries (256 bytes and {START}), not {vocab}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[START], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def start(tokenizer: Tokenizer) -> int:
    """Id of the token that begins a document: START, or what other tokenizers have in its place.

    Raises: BadInput if there is none.
    """
    name = start_name(tokenizer)
    if name is None:
        raise BadInput(f"the tokenizer has no token that begins a document; one of {', '.join(STARTS)} is needed")
    return tokenizer.token_to_id(name)


def start_name(tokenizer: Tokenizer) -> str | None:
    return next((name for name in STARTS if tokenizer.token_to_id(name) is not None), None)


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and the file by which `AutoTokenizer.from_pretrained(folder)` finds it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    name = start_name(tokenizer)
    special = {} if name is None else {"bos_token": name, "eos_token": name, "pad_token": name}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", **special, "clean_up_tokenization_spaces": False, "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, or of a tokenizer.json. Raises: BadInput if there is none, or it is damaged."""
    path = folder if folder.is_file() else folder / "tokenizer.json"
    if not path.is_file():
        raise BadInput(f"{folder} has no tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise BadInput(f"{path} is not a tokenizer: {error}") from error
