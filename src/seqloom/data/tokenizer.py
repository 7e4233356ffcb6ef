"""Tokenizers learnt from the training documents, in the `tokenizers` format that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from seqloom.core import BadInput

START = "<|start|>"  # stands before every document, and ends a generated one


def learn(texts: Iterable[str], *, vocab: int) -> Tokenizer:
    """A byte-level BPE of `vocab` entries; vocab 257 is one token a byte and the start token."""
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


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and the file by which `AutoTokenizer.from_pretrained(folder)` finds it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": START, "eos_token": START, "pad_token": START,
        "clean_up_tokenization_spaces": False, "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def load(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BadInput(f"{folder} has no tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise BadInput(f"{path} is not a tokenizer: {error}") from error
