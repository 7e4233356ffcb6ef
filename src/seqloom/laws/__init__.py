"""The laws every mixer must keep, over the whole table: library code, so that an installed copy can run them.

A law is a generator of measures for one case (an example of a mixer) on one device. It runs, or the spec's declared
properties say that it does not apply, or `Spec.lacks[name]` says why it cannot hold; nothing is skipped in silence.
"""

from seqloom.laws.cases import Case, build, cases
from seqloom.laws.law import Law, LawResult, Measure, Untested, apply
from seqloom.laws.runner import run_laws
from seqloom.laws.suite import LAWS
from seqloom.laws.table import form_times, keep, kept, summary, table, write_table

__all__ = ["LAWS", "Case", "Law", "LawResult", "Measure", "Untested", "apply", "build", "cases", "form_times", "keep", "kept",
           "run_laws", "summary", "table", "write_table"]
