"""Compiled models run eagerly while a capture is armed.

Compiled code runs no hook of a module inside it, and to trace through the hooks would compile the
model a second time.  So while anything is armed `torch.compile`'s stance is ``force_eager``: what
is compiled stays, and the next step without statistics runs it again as it is.  The stance belongs
to the process: other compiled functions that run meanwhile run eagerly as well.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

from torch._compile import _disable_dynamo
from torch.compiler import set_stance

# Said of every global hook of modules; ours looks modules up by identity and never meets a wrapper.
_HARMLESS = "Using `torch.compile(module)` when there are global hooks"

# Decorates what breaks out of a function that the user compiles, instead of being traced through.
# (`torch.compiler.disable` does the same and imports the compiler, a second's work, at once.)
uncompiled = _disable_dynamo

_lock = threading.RLock()  # finalizers of forgotten captures may run amid a call in this thread
_holds = 0
_forced: Any = None  # what `set_stance` returned; its ``prev`` is what was there before


def hold_eager() -> Callable[[], None]:
    """Make compiled code run eagerly until the returned function is called.

    Holds may overlap, in any order.  The stance that was there before the first is there again
    after the last, unless the user has set another in between: then that stands.

    Raises `RuntimeError` (torch's) inside a compiled region.
    """
    global _holds, _forced
    with _lock:
        if _holds == 0:
            _forced = set_stance("force_eager")
            _expect_hooks()
        _holds += 1
    released = False

    def release() -> None:
        nonlocal released
        with _lock:
            if not released:
                released = True
                _release()

    return release


def _release() -> None:
    global _holds
    _holds -= 1
    if _holds == 0:
        probe = set_stance("default")  # the only way to learn the stance is to set one
        (_forced if probe.prev is _forced.stance else probe).__exit__(None, None, None)
        # A ``with set_stance(...)`` of the user that began under our stance puts it back where it
        # ends: then it must say what was there before.
        vars(_forced.stance).update(vars(_forced.prev))


def _expect_hooks() -> None:
    """Let torch not warn of our global hook at every compiled module."""
    pattern = re.escape(_HARMLESS)
    known = ("ignore", re.compile(pattern, re.IGNORECASE), UserWarning, None, 0)
    # In front: the user's filters may have changed.
    if list(warnings.filters[:1]) != [known]:
        warnings.filterwarnings("ignore", pattern, UserWarning)
