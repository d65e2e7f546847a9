"""One rank in a process of its own, whose memory or whose end a test looks at.

Usage: python distributed_lonely.py SCENARIO RESULT_FILE ENDPOINT DEADLINE_IN_SECONDS
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from distributed_links import HangingLink, wrapped_links
from distributed_tasks import Run, observed_all_accounted

Result = dict[str, Any]

# An answer is due within a heartbeat's reach of the steps, so that a link's hang is in their way.
SETTINGS: Result = {
    "preconditioner_upd_interval": 5,
    "curvature_upd_interval": 1,
    "early_steps": 0,
    "link_timeout": 2.5,
    "heartbeat": 0.3,
}


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def unread(endpoint: str, link_timeout: float) -> Result:
    """1,000 steps with statistics of half a megabyte each that no worker reads."""
    settings = {**SETTINGS, "link_timeout": link_timeout, "preconditioner_upd_interval": 2}
    dims = (256, 256, 256)
    with Run("soap-activations", [endpoint], dims=dims, **{**settings, "rank": 128}) as run:
        pipeline = run.door._pipeline
        assert pipeline is not None
        # What is refreshed in process instead would be another matter.
        pipeline.lanes._fallback = False
        statistic = sum(layout.size * 4 for layout in pipeline.table.statistic_layouts)
        run.steps(200)
        before = resident_bytes()
        run.steps(800)
        after = resident_bytes()
        metrics = run.metrics()
    return {
        "before": before,
        "after": after,
        "statistic": statistic,
        "metrics": metrics,
        "accounted": observed_all_accounted(run.metrics()),
        "at_the_end": run.metrics(),
    }


def hanging(endpoint: str, where: str, after: int, close: bool) -> Result:
    """200 steps with a link that hangs for ever, then the end of the process."""
    links: list[HangingLink] = []

    def wrap(link: Any, rank: int) -> Any:
        links.append(HangingLink(link, where, after))
        return links[-1]

    with wrapped_links(wrap):
        run = Run("kfac", [endpoint], **SETTINGS)
        end = time.monotonic() + 120
        while not any(link.hangs.is_set() for link in links):
            run.steps(1)
            assert time.monotonic() < end, "the link does not hang"
        start = run.step_count
        run.steps(200)
        if close:
            run.close()
    left = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    return {"steps": run.step_count - start, "threads": left, "metrics": run.metrics()}


SCENARIOS: dict[str, Callable[[str], Result]] = {
    "deaf": lambda endpoint: unread(endpoint, link_timeout=1000.0),
    "lost": lambda endpoint: unread(endpoint, link_timeout=0.5),
    "hang-send": lambda endpoint: hanging(endpoint, "send", 0, close=True),
    "hang-statistics": lambda endpoint: hanging(endpoint, "send", 4, close=True),
    "hang-receive": lambda endpoint: hanging(endpoint, "receive", 3, close=True),
    "hang-not-closed": lambda endpoint: hanging(endpoint, "receive", 3, close=False),
}


if __name__ == "__main__":
    faulthandler.dump_traceback_later(float(sys.argv[4]), exit=True)
    torch.set_num_threads(1)
    result = SCENARIOS[sys.argv[1]](sys.argv[3])
    Path(sys.argv[2]).write_text(json.dumps(result))
