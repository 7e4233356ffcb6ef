"""seqloom: every sequence mixer as an interchangeable, exactly checked part.

`import seqloom` is light; parts are imported when first used. If transformers is already loaded, the models are
registered with its Auto classes; otherwise `import seqloom.hub` does that.
"""

from __future__ import annotations

import importlib
import sys

from seqloom._version import __version__

_HOMES = {
    "MIXERS": "seqloom.mixers", "Info": "seqloom.core", "Stack": "seqloom.models", "Block": "seqloom.models",
    "SequenceModel": "seqloom.models", "use_form": "seqloom.core", "form_report": "seqloom.core",
    "language_model": "seqloom.models.sequence",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    mixers = importlib.import_module("seqloom.mixers")
    if name in mixers.__all__:
        return getattr(mixers, name)
    raise AttributeError(f"module 'seqloom' has no attribute {name!r}")


if "transformers" in sys.modules:
    importlib.import_module("seqloom.hub")
