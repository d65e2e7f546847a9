"""What the Trace Event Format (Google, 2016) asks of a JSON trace, as assertions."""

from __future__ import annotations

import json
from typing import Any

# Fields that a phase needs beside name, ph, ts, pid and tid.
NEEDED: dict[str, dict[str, type | tuple[type, ...]]] = {
    "X": {"dur": (int, float), "args": dict},
    "i": {"s": str},
    "C": {"args": dict},
    "M": {"args": dict},
    "s": {"id": int, "cat": str},
    "t": {"id": int, "cat": str},
    "f": {"id": int, "cat": str, "bp": str},
}


def check(trace: dict[str, Any]) -> None:
    """Assert that a trace is valid and that its slices and arrows fit together."""
    json.dumps(trace, allow_nan=False)
    assert trace["displayTimeUnit"] in ("ms", "ns")
    records = trace["traceEvents"]
    for record in records:
        assert record["ph"] in NEEDED, record
        assert isinstance(record["name"], str) and record["name"]
        assert isinstance(record["ts"], int | float) and record["ts"] >= 0, record
        assert type(record["pid"]) is int and type(record["tid"]) is int
        for field, kind in NEEDED[record["ph"]].items():
            assert isinstance(record[field], kind), (field, record)
        if record["ph"] == "X":
            assert record["dur"] >= 0
        if record["ph"] == "i":
            assert record["s"] in ("g", "p", "t")
        if record["ph"] == "C":
            assert all(isinstance(value, int | float) for value in record["args"].values())
    _check_tracks_have_names(records)
    _check_flows(records)


def _check_tracks_have_names(records: list[dict[str, Any]]) -> None:
    processes = {r["pid"] for r in records if r["name"] == "process_name"}
    threads = {(r["pid"], r["tid"]) for r in records if r["name"] == "thread_name"}
    for record in records:
        assert record["pid"] in processes
        if record["ph"] in "Xistf":
            assert (record["pid"], record["tid"]) in threads, record


def _check_flows(records: list[dict[str, Any]]) -> None:
    """Every arrow starts once, ends once, goes forward, and is bound to a slice at each point."""
    arrows: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        if record["ph"] in ("s", "t", "f"):
            arrows.setdefault(record["id"], []).append(record)
    slices = [r for r in records if r["ph"] == "X"]
    for points in arrows.values():
        phases = "".join(point["ph"] for point in points)
        assert phases in ("sf", "stf"), phases
        times = [point["ts"] for point in points]
        assert times == sorted(times), points
        for point in points:
            assert any(
                (s["pid"], s["tid"]) == (point["pid"], point["tid"])
                and s["ts"] <= point["ts"] <= s["ts"] + s["dur"]
                for s in slices
            ), point
