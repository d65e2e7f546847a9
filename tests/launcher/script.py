"""The training script of these tests: says who and where it is, then does as its arguments say.

``exit N``: rank 0 ends with code N, the others wait.  ``hang``: waits to be ended; a
grandchild waits too.  ``deaf``: as hang, and ignores every polite signal.  Anything else: ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    folder, rank, words = Path(os.environ["TEST_FOLDER"]), os.environ["RANK"], sys.argv[1:]
    pids = [os.getpid(), os.getppid()]
    verb = words[0] if words else ""
    if verb == "deaf":
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
    if verb in ("hang", "deaf"):
        sleeper = subprocess.Popen(["sleep", "3600"], start_new_session=True)
        pids.append(sleeper.pid)
    told = {"argv": words, "pids": pids, "endpoints": os.environ.get("DISTCURV_ENDPOINTS")}
    partial = folder / f"rank{rank}.partial"
    partial.write_text(json.dumps(told))
    partial.rename(folder / f"rank{rank}.json")
    if verb == "exit" and rank == "0":
        # Once a rank has failed, torchrun ends the others: they must have told before.
        others = [folder / f"rank{other}.json" for other in range(int(os.environ["WORLD_SIZE"]))]
        deadline = time.monotonic() + 120
        while not all(path.exists() for path in others) and time.monotonic() < deadline:
            time.sleep(0.02)
        return int(words[1])
    if verb in ("exit", "hang", "deaf"):
        time.sleep(3600)
    return 0


if __name__ == "__main__":
    sys.exit(main())
