"""Exit codes of a command: 0 done, 1 failed, 2 bad input, 3 not enough resources in the cluster, 130 interrupted."""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from calm_ray.core.errors import CalmRayError
from calm_ray.core.safety import redact

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

INTERRUPTED = 130


def run_command(command: Callable[[], None], *, resumable: bool = False, overwrites: bool = False) -> int:
    """Runs a command, prints a message if it fails, and returns its exit code.

    `resumable`: rerunning the command resumes it. `overwrites`: it was given --overwrite, and rerunning it like that
    would delete the earlier results.
    """
    interrupt_on_sigterm()
    sys.unraisablehook = _interrupt_again
    try:
        command()
    except CalmRayError as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        if overwrites and error.exit_code == CalmRayError.exit_code:
            print("To resume, omit --overwrite: it would delete the results so far.", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        same = "the same command without --overwrite" if overwrites else "the same command"
        print("interrupted" + (f"; rerun {same} to resume" if resumable else ""), file=sys.stderr)
        return INTERRUPTED
    except Exception:
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
        return 1
    return 0


def interrupt_on_sigterm() -> None:
    """Makes SIGTERM, which batch systems and `ray job stop` send, stop a command like Ctrl-C.

    Call again after starting Ray, which installs its own handler.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(signal_number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the cleanup
    raise KeyboardInterrupt


def _interrupt_again(unraisable: UnraisableHookArgs) -> None:
    """Python swallows what is raised in a destructor or a weak reference's callback, a Ctrl-C too: this repeats it."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        main = threading.main_thread().ident
        assert main is not None
        threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()  # not here: it would be swallowed too
    else:
        sys.__unraisablehook__(unraisable)
