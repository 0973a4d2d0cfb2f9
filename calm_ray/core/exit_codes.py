"""How a command ends: 0 done, 1 failed, 2 bad input, 3 the cluster cannot hold it, 130 interrupted."""

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


def exit_code_of(command: Callable[[], None], *, goes_on: bool = False, overwrites: bool = False) -> int:
    """Runs a command and says in one message why it did not end well.

    `goes_on`: given again it takes up what it had begun; but not if it `overwrites`, which would delete that.
    """
    end_on_sigterm()
    sys.unraisablehook = _interrupt_again
    try:
        command()
    except CalmRayError as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        if overwrites and error.exit_code == CalmRayError.exit_code:
            print("To go on, leave out --overwrite: it would delete what was done.", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        same = "the same command without --overwrite" if overwrites else "the same command"
        print("interrupted" + (f"; {same} goes on from here" if goes_on else ""), file=sys.stderr)
        return INTERRUPTED
    except Exception:
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
        return 1
    return 0


def end_on_sigterm() -> None:
    """SIGTERM is what batch systems and `ray job stop` send: it ends a command as Ctrl-C does.

    Called again whenever Ray has started, which puts its own handler in this place.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(signal_number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is being put away now is put away to its end
    raise KeyboardInterrupt


def _interrupt_again(unraisable: UnraisableHookArgs) -> None:
    """Python swallows what is raised in a destructor or a weak reference's callback, a Ctrl-C too: this repeats it."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        main = threading.main_thread().ident
        assert main is not None
        threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()  # not here: it would be swallowed too
    else:
        sys.__unraisablehook__(unraisable)
