"""How far the training ranks are: each appends lines to a file, the driver reads them all.

A file and not a collective, so that watching a run does not change it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPORT_PERIOD_S = 0.2


@dataclass(frozen=True)
class Snapshot:
    """One rank's (or, combined, the job's) state of affairs at a moment of one training.

    Attributes:
        method: ``baseline`` or ``distcurv``.
        step: steps done.
        loss: mean over the steps since the last report (over the ranks, when combined).
        step_ms: mean step time since the last report.
        t: seconds of the monotonic clock.
        version: newest installed version over all blocks, 0 before the first install.
        staleness: largest over the blocks, in steps.
        busy: the workers' busy share, 0..1.
        bytes: carried to and from the workers since the start.
        links_up, links_total: sessions with workers.
    """

    method: str
    step: int
    loss: float
    step_ms: float
    t: float
    version: int = 0
    staleness: int = 0
    busy: float = 0.0
    bytes: int = 0
    links_up: int = 0
    links_total: int = 0


class ProgressWriter:
    """A rank's side: appends a `Snapshot` at most every `REPORT_PERIOD_S` seconds."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._last = -REPORT_PERIOD_S

    def due(self) -> bool:
        """Whether the last report is long enough ago."""
        return time.monotonic() - self._last >= REPORT_PERIOD_S

    def write(self, snapshot: Snapshot) -> None:
        """Append one line."""
        self._last = time.monotonic()
        self._file.write(json.dumps(dataclasses.asdict(snapshot)) + "\n")

    def close(self) -> None:
        self._file.close()


class ProgressReader:
    """The driver's side: the newest line of each rank, combined.

    Args:
        paths: the ranks' files, which need not exist yet.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._offsets = [0] * len(self._paths)
        self._newest: list[Snapshot | None] = [None] * len(self._paths)

    def poll(self) -> Snapshot | None:
        """The job's state; None until every rank has reported, or if nothing is new."""
        changed = False
        for index, path in enumerate(self._paths):
            line = self._last_line(index, path)
            if line is not None:
                self._newest[index] = Snapshot(**line)
                changed = True
        known = [snapshot for snapshot in self._newest if snapshot is not None]
        if not changed or len(known) < len(self._paths):
            return None
        if len({snapshot.method for snapshot in known}) > 1:
            return None  # some ranks are already in the second training
        return combine(known)

    def _last_line(self, index: int, path: Path) -> dict[str, Any] | None:
        if not path.exists():
            return None
        with path.open("rb") as file:
            file.seek(self._offsets[index])
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offsets[index] += len(whole)
        if not whole:
            return None
        line: dict[str, Any] = json.loads(whole.splitlines()[-1])
        return line


def combine(snapshots: Sequence[Snapshot]) -> Snapshot:
    """The job's snapshot from one of each rank: counts add up, the slowest rank tells the step.

    Only owners have links, so the busy share is the mean over those."""
    linked = [snapshot for snapshot in snapshots if snapshot.links_total]
    return Snapshot(
        method=snapshots[0].method,
        step=min(snapshot.step for snapshot in snapshots),
        loss=sum(snapshot.loss for snapshot in snapshots) / len(snapshots),
        step_ms=sum(snapshot.step_ms for snapshot in snapshots) / len(snapshots),
        t=max(snapshot.t for snapshot in snapshots),
        version=max(snapshot.version for snapshot in snapshots),
        staleness=max(snapshot.staleness for snapshot in snapshots),
        busy=sum(snapshot.busy for snapshot in linked) / len(linked) if linked else 0.0,
        bytes=sum(snapshot.bytes for snapshot in snapshots),
        links_up=sum(snapshot.links_up for snapshot in snapshots),
        links_total=sum(snapshot.links_total for snapshot in snapshots),
    )
