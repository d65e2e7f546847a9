"""The event writer: every line whole, in its file, and nothing of it on the caller's time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from distcurv.errors import ConfigError
from distcurv.observe.events import DIRECTORY_VARIABLE, EventWriter, from_environment, no_events


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_line_holds_kind_fields_who_and_monotonic_time(tmp_path: Path) -> None:
    before = time.monotonic_ns()
    with EventWriter(tmp_path / "new" / "folder", "rank0") as emit:
        emit("install", step=3, blocks=["a", "b"], versions=[1, 2])
    after = time.monotonic_ns()
    (event,) = read(tmp_path / "new" / "folder" / "rank0.jsonl")
    assert before <= event.pop("t") <= after
    assert event == {
        "who": "rank0",
        "kind": "install",
        "step": 3,
        "blocks": ["a", "b"],
        "versions": [1, 2],
    }


def test_non_finite_numbers_become_null_everywhere(tmp_path: Path) -> None:
    with EventWriter(tmp_path, "w") as emit:
        emit("refresh", innovation=[float("nan"), 0.5], deep={"x": float("inf")}, fine=1.0)
    (event,) = read(tmp_path / "w.jsonl")
    assert (event["innovation"], event["deep"], event["fine"]) == ([None, 0.5], {"x": None}, 1.0)


def test_field_that_is_no_json_value_is_refused_where_it_is_written(tmp_path: Path) -> None:
    with EventWriter(tmp_path, "w") as emit:
        with pytest.raises(TypeError):
            emit("step", loss=object())
        emit("step", loss=1.0)
    assert len(read(tmp_path / "w.jsonl")) == 1


def test_threads_and_two_writers_of_one_name_lose_and_tear_nothing(tmp_path: Path) -> None:
    writers = [EventWriter(tmp_path, "rank0", period=0.001) for _ in range(2)]
    count, threads_each = 500, 4

    def work(emit: EventWriter, thread: int) -> None:
        for number in range(count):
            emit("x", thread=thread, number=number, padding="p" * (number % 300))

    threads = [
        threading.Thread(target=work, args=(emit, 10 * w + k))
        for w, emit in enumerate(writers)
        for k in range(threads_each)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for emit in writers:
        emit.close()
    seen: dict[int, list[int]] = {}
    for event in read(tmp_path / "rank0.jsonl"):
        seen.setdefault(event["thread"], []).append(event["number"])
    assert seen == {10 * w + k: list(range(count)) for w in range(2) for k in range(threads_each)}


def test_flush_and_close_write_at_once_and_later_events_are_not_kept(tmp_path: Path) -> None:
    emit = EventWriter(tmp_path, "w", period=3600.0)
    try:
        emit("a")
        assert (tmp_path / "w.jsonl").read_text() == ""
        emit.flush()
        assert [event["kind"] for event in read(tmp_path / "w.jsonl")] == ["a"]
        emit("b")
    finally:
        emit.close()
    emit.close()
    emit("c")
    emit.flush()
    assert [event["kind"] for event in read(tmp_path / "w.jsonl")] == ["a", "b"]


def test_memory_is_bounded_and_the_loss_is_written_down(tmp_path: Path) -> None:
    with EventWriter(tmp_path, "w", period=3600.0, capacity=10) as emit:
        for number in range(25):
            emit("x", number=number)
    events = read(tmp_path / "w.jsonl")
    assert [event["number"] for event in events[:-1]] == list(range(10))
    assert events[-1]["kind"] == "warning"
    assert events[-1]["text"].startswith("15 events were lost")


def test_full_disk_is_said_once_and_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    with EventWriter(tmp_path, "w", period=3600.0) as emit:
        monkeypatch.setattr("distcurv.observe.events.os.write", full)
        for _ in range(3):
            emit("x")
            emit.flush()
        monkeypatch.undo()
    warnings = [record for record in caplog.records if record.name == "distcurv.events"]
    assert len(warnings) == 1
    assert "No space left" in warnings[0].getMessage()


def test_partial_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with EventWriter(tmp_path, "w", period=3600.0) as emit:
        monkeypatch.setattr(
            "distcurv.observe.events.os.write", lambda file, data: write(file, data[:7])
        )
        emit("x", text="long enough for several writes")
        emit.flush()
        monkeypatch.undo()
    assert read(tmp_path / "w.jsonl")[0]["text"] == "long enough for several writes"


@pytest.mark.parametrize("who", ["", "../rank0", "a/b", ".hidden"])
def test_name_that_is_no_file_name_is_refused(tmp_path: Path, who: str) -> None:
    with pytest.raises(ConfigError, match="who"):
        EventWriter(tmp_path, who)


def test_directory_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        EventWriter(tmp_path / "file", "w")


def test_environment_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    assert from_environment("rank1") is no_events
    no_events("anything", x=object())
    no_events.flush()
    no_events.close()
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    emit = from_environment("rank1")
    emit("step", step=1)
    emit.close()
    assert read(tmp_path / "rank1.jsonl")[0]["step"] == 1


def test_process_that_forgets_to_close_still_writes_and_ends(tmp_path: Path) -> None:
    script = (
        "import sys; from distcurv.observe.events import EventWriter; "
        "EventWriter(sys.argv[1], 'w', period=3600.0)('last')"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=120)
    assert [event["kind"] for event in read(tmp_path / "w.jsonl")] == ["last"]
