"""Joins the event files of a run's processes into one, ordered by time.

The processes of one machine share the monotonic clock, so sorting by ``t`` is all it takes.  The
last line of a process that was killed may be torn: such lines are counted, not hidden.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Event = dict[str, Any]


@dataclass(frozen=True)
class Merged:
    """Events ordered by time, and where lines were that are no events."""

    events: list[Event]
    damaged: dict[str, int]  # file name -> lines that are no complete event


def merge_events(directory: str | os.PathLike[str]) -> Merged:
    """Reads every ``*.jsonl`` of ``directory`` (its top level) and orders the events by time.

    Events of the same nanosecond keep the order of their file; files go by name.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"merge_events got {folder}: there is no such directory")
    events: list[Event] = []
    damaged: dict[str, int] = {}
    for path in sorted(folder.glob("*.jsonl")):
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                event = _parse(line)
                if event is None:
                    damaged[path.name] = damaged.get(path.name, 0) + 1
                else:
                    events.append(event)
    events.sort(key=lambda event: event["t"])
    return Merged(events, damaged)


def write_events(events: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> int:
    """Writes one JSON object per line; returns the number of lines."""
    count = 0
    with Path(path).open("w", encoding="utf-8") as file:
        for event in events:
            file.write(json.dumps(event, separators=(",", ":"), allow_nan=False) + "\n")
            count += 1
    return count


def _parse(line: str) -> Event | None:
    """The event on this line; None where it is not a complete one."""
    try:
        event = json.loads(line)
    except json.JSONDecodeError:
        return None
    if not isinstance(event, dict):
        return None
    if type(event.get("t")) is not int:
        return None
    if not isinstance(event.get("who"), str) or not isinstance(event.get("kind"), str):
        return None
    return event
