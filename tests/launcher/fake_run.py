"""``distcurv run`` with fake workers, so that the tests need not wait for torch in each worker."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from distcurv import cli
from distcurv.launcher import run_command
from distcurv.launcher.supervisor import Supervisor

if __name__ == "__main__":
    run_command.Supervisor = functools.partial(  # type: ignore[assignment,misc]
        Supervisor, command=(sys.executable, str(Path(__file__).with_name("fake_worker.py")))
    )
    sys.exit(cli.main(["run", *sys.argv[1:]]))
