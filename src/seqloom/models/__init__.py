"""Layouts of blocks into models, and the table of every kind of spec that may be saved."""

from seqloom.core.spec import from_dict, pack, to_dict, unpack
from seqloom.mixers import MIXERS
from seqloom.models.backbone import Block, Stack
from seqloom.models.heads import HEADS
from seqloom.models.sequence import Output, SequenceModel
from seqloom.models.stems import STEMS
from seqloom.parts import MLPS
from seqloom.parts.positions import SCALINGS

KINDS = {**MIXERS, **MLPS, **SCALINGS, **STEMS, **HEADS, "block": Block, "stack": Stack, "sequence_model": SequenceModel}

__all__ = ["KINDS", "Block", "Output", "SequenceModel", "Stack", "from_dict", "pack", "to_dict", "unpack"]
