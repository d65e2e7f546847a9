"""Progress: what the ranks write is what the driver shows."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from distcurv.demo import progress
from distcurv.demo.display import Display, final_table
from distcurv.demo.progress import ProgressReader, ProgressWriter, Snapshot
from distcurv.demo.report import summarise
from distcurv.demo.settings import DemoSettings
from distcurv.train.summary import bytes_text

BASE = Snapshot(method="distcurv", step=10, loss=4.0, step_ms=2.0, t=1.0)
RANK0 = dataclasses.replace(
    BASE, version=3, staleness=20, busy=0.5, bytes=1000, links_up=1, links_total=1
)
RANK1 = dataclasses.replace(BASE, step=12, loss=6.0, step_ms=4.0, t=1.5, version=3, staleness=22)


def test_reader_waits_for_every_rank_and_combines_their_newest_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "REPORT_PERIOD_S", 3600.0)
    paths = [tmp_path / f"{rank}.jsonl" for rank in range(2)]
    reader = ProgressReader(paths)
    assert reader.poll() is None
    first = ProgressWriter(paths[0])
    assert first.due()
    first.write(BASE)
    assert not first.due()
    first.write(RANK0)
    assert reader.poll() is None
    second = ProgressWriter(paths[1])
    second.write(RANK1)
    assert reader.poll() == Snapshot(
        method="distcurv",
        step=10,
        loss=5.0,
        step_ms=3.0,
        t=1.5,
        version=3,
        staleness=22,
        busy=0.5,  # of the one rank that has a link
        bytes=1000,
        links_up=1,
        links_total=1,
    )
    assert reader.poll() is None
    first.close()
    second.close()


def test_reader_leaves_half_a_line_for_later_and_two_trainings_apart(tmp_path: Path) -> None:
    paths = [tmp_path / f"{rank}.jsonl" for rank in range(2)]
    for path in paths:
        writer = ProgressWriter(path)
        writer.write(dataclasses.replace(BASE, method="baseline"))
        writer.close()
    reader = ProgressReader(paths)
    assert reader.poll() is not None
    writer = ProgressWriter(paths[0])
    writer.write(RANK0)
    writer.close()
    assert reader.poll() is None  # the other rank is still in the first training
    line = paths[0].read_bytes().splitlines(keepends=True)[-1]
    with paths[1].open("ab") as file:
        file.write(line[:20])
        file.flush()
        assert reader.poll() is None
        file.write(line[20:])
    snapshot = reader.poll()
    assert snapshot is not None
    assert (snapshot.method, snapshot.bytes) == ("distcurv", 2000)


def show(terminal: bool, width: int = 80) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width)
    with Display(console, DemoSettings(steps=200)) as display:
        display.show(dataclasses.replace(BASE, method="baseline", step=200))
        display.show(RANK0)
        later = dataclasses.replace(RANK0, step=200, loss=3.25, t=3.0, bytes=6_001_000)
        display.show(later)
    return out.getvalue()


def test_plain_lines_tell_everything() -> None:
    lines = show(terminal=False).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("baseline  step 200/200  loss 4")
    for part in ("step 200/200", "loss 3.25", "version 3", "staleness 20", "busy 50%", "3.0 MB/s"):
        assert part in lines[2]


def test_live_table_tells_everything_on_80_columns() -> None:
    text = show(terminal=True)
    for part in ("200/200", "3.25", "staleness", "version", "50%", "3.0 MB/s", "traffic"):
        assert part in text
    assert "…" not in text


def test_final_table_says_loudly_when_ranks_disagree() -> None:
    metrics = {
        "max_staleness": 1,
        "versions_from_workers": 1,
        "statistics_observed": 1,
        "statistics_sent": 1,
        "versions_installed": 0,
        "statistics_folded": 1,
        "statistics_dropped": 0,
        "statistics_pending": 0,
        "statistics_in_flight": 0,
        "bytes_to_workers": 1_500_000,
        "bytes_from_workers": 0,
        "refresh_failures": 0,
    }
    outcome = {
        "losses": [2.0],
        "step_ms": [1.0],
        "final_loss": 2.0,
        "install_log": [],
        "metrics": metrics,
    }
    made = [
        {
            "rank": rank,
            "pid": rank,
            "methods": {
                "baseline": {**outcome, "checksum": "same"},
                "distcurv": {**outcome, "final_loss": 1.5, "checksum": f"differs {rank}"},
            },
        }
        for rank in range(2)
    ]
    out = io.StringIO()
    Console(file=out, width=80).print(final_table(summarise(DemoSettings(steps=1), made, [])))
    rows = {line.split("│")[1].strip(): line for line in out.getvalue().splitlines() if "│" in line}
    assert "NO" in rows["replicas identical"]
    assert "yes" in rows["install logs identical"]
    assert "-25.0%" in rows["final loss (nats per image)"]
    assert "3.0 MB / 0 B" in rows["to / from workers"]


def test_bytes_are_told_in_decimal_units() -> None:
    assert [bytes_text(n) for n in (0, 999, 1000, 1_500_000, 2.5e9, 7e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.5 MB",
        "2.5 GB",
        "7000.0 GB",
    ]
