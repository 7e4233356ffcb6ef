"""The contract every part of seqloom stands on: states, segments, forms, specs, papers and claims.

Nothing here knows a particular mixer, model or task. Everything above imports downwards only (STYLE.md, the tree).
"""

from seqloom.core.context import BuildContext
from seqloom.core.errors import BadInput, FailedRun, MissingExtra, near, require_extra
from seqloom.core.forms import form_report, gpu_only, is_exact, narrow, run, run_part, runnable, use_form
from seqloom.core.info import Info
from seqloom.core.memory import keep_pages
from seqloom.core.mixer import Mixer, Placement
from seqloom.core.paper import Beats, Budget, Check, Claim, Paper, Verdict, above, beats, below
from seqloom.core.scan import carry, scan
from seqloom.core.segments import Segments, Track
from seqloom.core.spec import Spec, from_dict, load_yaml, to_dict
from seqloom.core.state import Memory, Mixed, State

__all__ = [
    "BadInput",
    "Beats",
    "Budget",
    "BuildContext",
    "Check",
    "Claim",
    "FailedRun",
    "Info",
    "Memory",
    "MissingExtra",
    "Mixed",
    "Mixer",
    "Paper",
    "Placement",
    "Segments",
    "Spec",
    "State",
    "Track",
    "Verdict",
    "above",
    "beats",
    "below",
    "carry",
    "form_report",
    "from_dict",
    "gpu_only",
    "is_exact",
    "keep_pages",
    "load_yaml",
    "narrow",
    "near",
    "require_extra",
    "run",
    "run_part",
    "runnable",
    "scan",
    "to_dict",
    "use_form",
]
