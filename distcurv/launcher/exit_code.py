"""One convention for exit codes: a process that a signal ended counts as 128 + the signal."""

from __future__ import annotations

import signal


def of_signal(signum: int) -> int:
    """The exit code that shells give to a process ended by this signal."""
    return 128 + signum


def of_returncode(returncode: int) -> int:
    """Of a ``Popen.returncode``, which is the negative number of the signal, if one ended it."""
    return of_signal(-returncode) if returncode < 0 else returncode


def in_words(returncode: int) -> str:
    """E.g. "ended by SIGKILL" or "ended with exit code 3"."""
    if returncode < 0:
        return f"ended by {signal.Signals(-returncode).name}"
    return f"ended with exit code {returncode}"
