"""Merging: by time, stable, and torn lines are counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distcurv.observe.events import EventWriter
from distcurv.observe.merge import merge_events, write_events


def line(t: int, who: str, **fields: object) -> str:
    return json.dumps({"t": t, "who": who, "kind": "x", **fields}) + "\n"


def test_files_are_joined_by_time_and_ties_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "rank0.jsonl").write_text(
        line(5, "rank0") + line(1, "rank0") + line(5, "rank0", n=2)
    )
    (tmp_path / "worker0.jsonl").write_text(line(5, "worker0") + line(3, "worker0"))
    (tmp_path / "notes.txt").write_text("no events")
    merged = merge_events(tmp_path)
    found = [(event["t"], event["who"], event.get("n")) for event in merged.events]
    assert found == [
        (1, "rank0", None),
        (3, "worker0", None),
        (5, "rank0", None),
        (5, "rank0", 2),
        (5, "worker0", None),
    ]
    assert merged.damaged == {}


def test_torn_and_foreign_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    foreign = '[1]\n{"t": 1.5, "who": "a", "kind": "x"}\n{"t": true, "who": "a", "kind": "x"}\n'
    (tmp_path / "a.jsonl").write_text(line(1, "a") + '{"t": 2, "who": "a", "ki')
    (tmp_path / "b.jsonl").write_bytes(foreign.encode() + b"\xff\xfe\n" + line(9, "b").encode())
    merged = merge_events(tmp_path)
    assert [event["t"] for event in merged.events] == [1, 9]
    assert merged.damaged == {"a.jsonl": 1, "b.jsonl": 4}


def test_what_writers_wrote_comes_out_whole(tmp_path: Path) -> None:
    folder = tmp_path / "events"
    with EventWriter(folder, "rank0") as first, EventWriter(folder, "worker0") as second:
        first("a", n=1)
        second("b", n=2)
        first("c", n=3)
    merged = merge_events(folder)
    assert [(event["kind"], event["n"]) for event in merged.events] == [
        ("a", 1),
        ("b", 2),
        ("c", 3),
    ]
    assert write_events(merged.events, tmp_path / "events.jsonl") == 3
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(text) for text in lines] == merged.events


def test_missing_directory_is_an_error_and_an_empty_one_is_not(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such directory"):
        merge_events(tmp_path / "nowhere")
    assert merge_events(tmp_path).events == []
