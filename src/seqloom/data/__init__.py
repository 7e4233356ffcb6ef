"""Readers and tokenizers: files, folders and hub ids become sequences of ids."""

from seqloom.data.corpus import IGNORE, Corpus, TextBatch, Tokens, open_corpus, prepare
from seqloom.data.documents import Document, documents, split

__all__ = ["IGNORE", "Corpus", "Document", "TextBatch", "Tokens", "documents", "open_corpus", "prepare", "split"]
