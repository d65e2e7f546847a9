"""Turns events into a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

One process per rank and worker, with steps and refreshes as slices, messages and installs as
instants, staleness as a counter.  Arrows lead from the step in which a statistic was sent to
the refresh that folded it and on to the step that installed the outcome: the path of a version.
Pure: events in, a JSON-able dict out.

Format: "Trace Event Format" (Google, 2016), JSON object form; times in microseconds.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Event = Mapping[str, Any]
Record = dict[str, Any]

STEPS_TRACK = 1
REFRESH_TRACK = 2
_COMPLETE = {"step": STEPS_TRACK, "refresh": REFRESH_TRACK}
_INSTANTS = {
    "statistic_sent": STEPS_TRACK,
    "published_received": STEPS_TRACK,
    "install": STEPS_TRACK,
    "dropped": STEPS_TRACK,
    "warning": STEPS_TRACK,
    "link": STEPS_TRACK,
    "statistic_received": REFRESH_TRACK,
    "publish": REFRESH_TRACK,
    "session": REFRESH_TRACK,
}
_OURS = ("t", "who", "kind", "t0", "t1")


def chrome_trace(events: Iterable[Event]) -> dict[str, Any]:
    """The Chrome trace of a run.

    Args:
        events: as `distcurv.observe.merge.merge_events` yields them; ``t``, ``t0`` and ``t1``
            in nanoseconds of one clock.  Kinds that have no picture are left out.

    Returns:
        ``{"traceEvents": [...], "displayTimeUnit": "ms"}``; times count from the first event.
    """
    ordered = sorted(events, key=lambda event: event.get("t0", event["t"]))
    origin = ordered[0].get("t0", ordered[0]["t"]) if ordered else 0
    whos = sorted({event["who"] for event in ordered}, key=_who_order)
    pids = {who: number for number, who in enumerate(whos, start=1)}
    records = _names(ordered, pids)
    for event in ordered:
        record = _picture(event, pids[event["who"]], origin)
        if record is not None:
            records.append(record)
    records += _staleness(ordered, pids, origin)
    records += _Paths(ordered, pids, origin).records()
    return {"traceEvents": records, "displayTimeUnit": "ms"}


def _who_order(who: str) -> tuple[int, int, str]:
    """Ranks first, then workers, each by number."""
    digits = who.lstrip("abcdefghijklmnopqrstuvwxyz-_")
    number = int(digits) if digits.isdecimal() else 0
    return (0 if who.startswith("rank") else 1, number, who)


def _names(events: Sequence[Event], pids: Mapping[str, int]) -> list[Record]:
    """Metadata records: what processes and tracks are called, and their order."""
    records: list[Record] = []
    for who, pid in pids.items():
        records.append(_metadata("process_name", pid, 0, {"name": who}))
        records.append(_metadata("process_sort_index", pid, 0, {"sort_index": pid}))
    used = {(event["who"], track) for event in events if (track := _track(event)) is not None}
    for who, track in sorted(used):
        name = f"{who} {'steps' if track == STEPS_TRACK else 'refreshes'}"
        records.append(_metadata("thread_name", pids[who], track, {"name": name}))
    return records


def _track(event: Event) -> int | None:
    """The track of an event's slice or instant; None for kinds that have neither."""
    kind = event["kind"]
    if kind in _INSTANTS and not event["who"].startswith("rank"):
        return REFRESH_TRACK  # a worker has no steps
    return _COMPLETE.get(kind, _INSTANTS.get(kind))


def _metadata(name: str, pid: int, tid: int, args: Record) -> Record:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "ts": 0, "args": args}


def _picture(event: Event, pid: int, origin: int) -> Record | None:
    """A slice or an instant for one event; counters for a heartbeat; None for other kinds."""
    kind = event["kind"]
    args = {key: value for key, value in event.items() if key not in _OURS}
    if kind in _COMPLETE and "t0" in event and "t1" in event:
        return {
            "ph": "X",
            "name": _title(event),
            "cat": kind,
            "pid": pid,
            "tid": _track(event),
            "ts": _us(event["t0"], origin),
            "dur": max(0, event["t1"] - event["t0"]) / 1000,
            "args": args,
        }
    if kind in _INSTANTS:
        return {
            "ph": "i",
            "s": "t",
            "name": _title(event),
            "cat": kind,
            "pid": pid,
            "tid": _track(event),
            "ts": _us(event["t"], origin),
            "args": args,
        }
    if kind == "heartbeat":
        counts = {key: value for key, value in args.items() if isinstance(value, int | float)}
        return _counter("heartbeat", pid, _us(event["t"], origin), counts) if counts else None
    return None


def _title(event: Event) -> str:
    kind = str(event["kind"])
    if kind == "step" and "step" in event:
        return f"step {event['step']}"
    if kind in ("refresh", "install", "publish", "published_received") and event.get("versions"):
        versions = event["versions"]
        low, high = min(versions), max(versions)
        return f"{kind} v{low}" if low == high else f"{kind} v{low}-v{high}"
    if kind.startswith("statistic_") and "seq" in event:
        return f"{kind} {event['seq']}"
    return kind


def _counter(name: str, pid: int, ts: float, args: Record) -> Record:
    return {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": ts, "args": args}


def _us(nanoseconds: int, origin: int) -> float:
    return (nanoseconds - origin) / 1000


def _staleness(events: Sequence[Event], pids: Mapping[str, int], origin: int) -> list[Record]:
    """Per rank: largest ``step - based_on`` over the blocks installed so far, at each step."""
    records: list[Record] = []
    based_on: dict[str, dict[Any, int]] = {who: {} for who in pids}
    for event in sorted(events, key=lambda event: event["t"]):
        who = event["who"]
        if event["kind"] == "install":
            based_on[who].update(zip(event["blocks"], event["based_on"], strict=True))
        elif event["kind"] != "step" or "t1" not in event:
            continue
        if based_on[who] and "step" in event:
            stale = event["step"] - min(based_on[who].values())
            ts = _us(event.get("t1", event["t"]), origin)
            records.append(_counter("staleness", pids[who], ts, {"steps": stale}))
    return records


class _Paths:
    """Arrows statistic_sent -> refresh -> install.

    A statistic is known by its owner and seq; a version by its block and number.
    An arrow's end belongs to the slice around its time, so it is drawn inside the step slice
    that encloses (or is nearest to) the event.  A process without slices gets no arrow.
    """

    def __init__(self, events: Sequence[Event], pids: Mapping[str, int], origin: int) -> None:
        self._pids, self._origin = pids, origin
        self._refreshes = [e for e in events if e["kind"] == "refresh" and "t0" in e]
        self._steps: dict[str, list[Event]] = {who: [] for who in pids}
        self._sent: dict[tuple[str, int], list[Event]] = {}  # (rank, seq): one per link
        for event in events:
            if event["kind"] == "step" and "t0" in event:
                self._steps[event["who"]].append(event)
            elif event["kind"] == "statistic_sent":
                self._sent.setdefault((event["who"], event["seq"]), []).append(event)
        received = [e for e in events if e["kind"] == "statistic_received" and "owner" in e]
        self._owners = {
            (event["who"], block, event["seq"]): f"rank{event['owner']}"
            for event in received
            for block in event["blocks"]
        }
        self._installed: dict[tuple[str, Any, int], Event] = {}  # (rank, block, version)
        for event in events:
            if event["kind"] == "install":
                for block, version in zip(event["blocks"], event["versions"], strict=True):
                    key = (event["who"], block, version)
                    self._installed.setdefault(key, event)

    def records(self) -> list[Record]:
        """Flow records: for every arrow one start, and one end."""
        out: list[Record] = []
        number = 0
        for refresh in self._refreshes:
            sent = self._origin_of(refresh)
            # The sender writes its event when the message is gone; the worker may be quicker.
            left = min(sent["t"], refresh["t0"]) if sent else 0
            start = self._inside_step(sent["who"], left) if sent else None
            if sent is None or start is None:
                continue
            number += 1
            middle = (refresh["t0"] + refresh["t1"]) // 2
            out.append(self._flow("s", number, sent["who"], STEPS_TRACK, start))
            install = self._outcome_of(refresh, sent["who"])
            end = self._inside_step(install["who"], install["t"]) if install else None
            if install is None or end is None:
                out.append(self._flow("f", number, refresh["who"], REFRESH_TRACK, middle))
            else:
                out.append(self._flow("t", number, refresh["who"], REFRESH_TRACK, middle))
                out.append(self._flow("f", number, install["who"], STEPS_TRACK, end))
        return out

    def _origin_of(self, refresh: Event) -> Event | None:
        """The statistic_sent event whose statistics this refresh folded."""
        if "seq" not in refresh or not refresh["blocks"]:
            return None
        key = (refresh["who"], refresh["blocks"][0], refresh["seq"])
        owner = f"rank{refresh['owner']}" if "owner" in refresh else self._owners.get(key)
        if owner is None:
            return None
        wanted = set(refresh["blocks"])
        for sent in self._sent.get((owner, refresh["seq"]), []):
            if wanted.intersection(sent["blocks"]):
                return sent
        return None

    def _outcome_of(self, refresh: Event, owner: str) -> Event | None:
        """The owner's first install of a version that this refresh made."""
        found = [
            self._installed[owner, block, version]
            for block, version in zip(refresh["blocks"], refresh["versions"], strict=True)
            if (owner, block, version) in self._installed
        ]
        return min(found, key=lambda event: int(event["t"]), default=None)

    def _inside_step(self, who: str, t: int) -> int | None:
        """A time inside a step of ``who``: ``t``, or the nearest end of a step to it."""
        steps = self._steps.get(who, [])
        if not steps:
            return None
        after = bisect.bisect_right(steps, t, key=lambda step: int(step["t0"]))
        near = steps[max(0, after - 1) : after + 1]
        inside = [min(max(t, step["t0"]), step["t1"]) for step in near]
        return int(min(inside, key=lambda time: abs(time - t)))

    def _flow(self, ph: str, number: int, who: str, track: int, t: int) -> Record:
        record = {
            "ph": ph,
            "id": number,
            "name": "version",
            "cat": "path",
            "pid": self._pids[who],
            "tid": track,
            "ts": _us(t, self._origin),
        }
        return {**record, "bp": "e"} if ph == "f" else record
