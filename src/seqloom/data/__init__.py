"""Readers and tokenizers: files, folders and hub ids become sequences of ids."""

from seqloom.data.corpus import IGNORE, Corpus, TextBatch, Tokens, prepare
from seqloom.data.documents import Document, documents, held_out

__all__ = ["IGNORE", "Corpus", "Document", "TextBatch", "Tokens", "documents", "held_out", "prepare"]
