"""`seqloom VERB ...`: one clear sentence for bad input, and an exit status that says what happened.

Status 0: done. 1: the run failed. 2: bad input. 130: interrupted.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
import traceback

from seqloom._version import __version__
from seqloom.core.errors import BadInput, FailedRun, near

VERBS = {
    "demo": "train a small hybrid on the standard library's source and compare it with honest baselines",
    "train": "train a model on your files",
    "compare": "compare mixers at equal parameters, data and steps",
    "generate": "continue a prompt with a trained model",
    "evaluate": "bits per byte of a trained model on your files",
    "list": "the mixers, models, papers and tasks there are",
    "show": "one mixer: equation, source, forms, parameters, state, cost",
    "check": "run the laws, or a paper's checks and claims",
    "bench": "measure speed beside what you would use instead",
    "advise": "which mixer for a length, a task and a memory",
}


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    show = "--traceback" in argv
    argv = [word for word in argv if word != "--traceback"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    verb, rest = argv[0], argv[1:]
    try:
        if verb not in VERBS:
            raise BadInput(f"no verb {verb!r}; {near(verb, VERBS)}")
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        return importlib.import_module(f"seqloom.cli.{verb}").main(rest) or 0
    except BadInput as error:
        return _say(error, 2, show)
    except FailedRun as error:
        return _say(error, 1, show)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush does not fail too
        return 0
    except OSError as error:
        return _say(_plain(error), 2 if error.errno in _YOURS else 1, show, error)
    except Exception as error:
        # our own mistake, not the user's: say so, and how to see it
        return _say(f"unexpected {type(error).__name__}: {error} (--traceback shows where)", 1, show, error)


_YOURS = (errno.ENOENT, errno.EACCES, errno.EEXIST, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR)


def _plain(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"


def _say(what: object, status: int, show: bool, error: BaseException | None = None) -> int:
    if show:
        traceback.print_exception(error or (what if isinstance(what, BaseException) else None))
    print(f"seqloom: {' '.join(str(what).split())}", file=sys.stderr)
    return status


def usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return (
        f"seqloom {__version__}: sequence models from exactly checked parts\n\nusage: seqloom VERB [options]\n\n{verbs}\n\n"
        "`seqloom VERB --help` lists a verb's options; --traceback shows where an error came from."
    )
