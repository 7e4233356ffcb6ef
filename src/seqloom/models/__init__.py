"""Layouts of blocks into models, and the table of every kind of spec that may be saved."""

from seqloom.core.spec import from_dict, pack, to_dict, unpack
from seqloom.mixers import MIXERS
from seqloom.models.backbone import Block, Stack
from seqloom.models.heads import HEADS
from seqloom.models.hierarchy import Hierarchy
from seqloom.models.mimetic import INITS, MimeticInit, mimetic_init_
from seqloom.models.sequence import Output, SequenceModel
from seqloom.models.stems import STEMS
from seqloom.parts import MLPS
from seqloom.parts.positions import SCALINGS

KINDS = {**MIXERS, **MLPS, **SCALINGS, **STEMS, **HEADS, **INITS, "block": Block, "stack": Stack, "hierarchy": Hierarchy,
         "sequence_model": SequenceModel}

__all__ = ["KINDS", "Block", "Hierarchy", "MimeticInit", "Output", "SequenceModel", "Stack", "from_dict", "mimetic_init_",
           "pack", "to_dict", "unpack"]
