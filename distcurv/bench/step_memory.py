"""The memory of one method, measured where nothing else is: in a process of its own.

Run as ``python -m distcurv.bench.step_memory JSON``; prints the peak in bytes as its last line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from distcurv.errors import LaunchError


def peak_of(request: dict[str, Any]) -> int:
    """Peak bytes of a process that trains with one method; ``request`` as `main` reads it.

    Raises:
        LaunchError: the process failed; its last line says why.
    """
    command = [sys.executable, "-m", "distcurv.bench.step_memory", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise LaunchError(f"measuring the memory of {request['method']} failed: {last}")
    return int(done.stdout.strip().splitlines()[-1])


def main(text: str) -> int:
    """Warm up one method and print the process's peak."""
    from distcurv.bench.clock import choose_cores, one_thread, peak_memory, pinned
    from distcurv.bench.step_crew import make_crew
    from distcurv.bench.step_run import run_steps, warm_up_steps

    request = json.loads(text)
    cores = choose_cores()
    with (
        one_thread(),
        pinned(cores.training),
        make_crew(
            [request["method"]],
            request["model"],
            request["device"],
            request["worker"],
            cores,
            rank=request["rank"],
            interval=request["interval"],
            capture_interval=request["capture_interval"],
        ) as (member,),
    ):
        run_steps(member, warm_up_steps(request["interval"]), timed=False)
        member.settle()
        print(peak_memory(request["device"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
