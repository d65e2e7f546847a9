"""torchrun in a process that tells the script's own exit code and never outlives its launcher.

Run as ``python -m distcurv.launcher.torchrun LIFELINE_FD [torchrun options] script ARGS``.  Plain
torchrun returns 1 whatever the script returned; this returns the exit code of the rank that failed
first, or 128 + the number of the signal that ended it or torchrun.
"""

from __future__ import annotations

import os
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from distcurv.launcher import lifeline, tree
from distcurv.launcher.exit_code import of_returncode, of_signal

_ORPHAN_GRACE_S = 2.0


def main(argv: list[str]) -> int:
    """Run torchrun with ``argv[1:]``; ``argv[0]`` is the file descriptor of the lifeline."""
    tree.adopt_orphans()
    lifeline.hold(int(argv[0]), _end_everything)
    try:
        run.main(argv[1:])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        print(str(error), file=sys.stderr)
        return of_returncode(failure.exitcode)
    except SignalException as error:
        return of_signal(error.sigval)
    return 0


def _end_everything() -> None:
    tree.end_descendants(os.getpid(), grace=_ORPHAN_GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
