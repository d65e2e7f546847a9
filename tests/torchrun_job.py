"""Runs a program as the ranks of a torchrun job, for tests that compare ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from distcurv.launcher import tree

TESTS = Path(__file__).parent


def run_job(
    folder: Path, program: str, *arguments: str, ranks: int, deadline: float
) -> tuple[int | None, str]:
    """Run ``program FOLDER *ARGUMENTS`` on ``ranks`` ranks with one thread each.

    Whatever happens, every process of the job has ended afterwards.

    Returns:
        The exit code, None where the job was ended after ``deadline`` seconds, and the end of what
        it printed.
    """
    words = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), program, str(folder), *arguments),
    ]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    code: int | None = None
    with open(folder / "output.txt", "wb") as output:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(deadline)
        except subprocess.TimeoutExpired:
            pass  # told by the code
        finally:
            tree.kill(process.pid)
            process.wait()
    return code, (folder / "output.txt").read_text(errors="replace")[-6000:]
