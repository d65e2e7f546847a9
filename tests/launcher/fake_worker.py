"""Takes the options of ``distcurv worker`` and keeps its promises to the launcher, without torch.

Only ``lifeline.py`` of the package is loaded, by its path: a test then waits for no imports.
Environment: FAKE_FAIL makes it end at once, FAKE_MUTE never ready, FAKE_STUBBORN deaf to SIGTERM.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import ModuleType

LIFELINE = Path(__file__).parents[2] / "distcurv" / "launcher" / "lifeline.py"


def load_lifeline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lifeline", LIFELINE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("--bind", "--ready-file", "--device", "--name", "--threads"):
        parser.add_argument(name)
    parser.add_argument("--lifeline-fd", type=int)
    args = parser.parse_args()
    if "FAKE_FAIL" in os.environ:
        print("this worker cannot start", file=sys.stderr)
        return 7
    lifeline = load_lifeline()
    lifeline.die_with_parent()
    lifeline.hold(args.lifeline_fd, lambda: os._exit(1))
    if "FAKE_STUBBORN" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    host, port = args.bind.removeprefix("tcp://").split(":")
    with socket.create_server((host, int(port))) as server:
        if "FAKE_MUTE" not in os.environ:
            print(f"{args.name} on {args.device} with {args.threads} threads", flush=True)
            ready = Path(args.ready_file)
            partial = ready.with_suffix(".partial")
            partial.write_text(f"tcp://{host}:{server.getsockname()[1]}\n")
            partial.rename(ready)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    sys.exit(main())
