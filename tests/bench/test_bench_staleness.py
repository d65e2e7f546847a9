"""`bench staleness`: the delay is what differs, and the record holds every seed."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_runs import bench

from distcurv.bench.staleness_command import train


def test_a_tiny_run(tmp_path: Path) -> None:
    content = bench(
        tmp_path, "staleness", "--steps", "30", "--delays", "0,4", "--seeds", "2", "--rank", "4",
        "--interval", "4",
    )  # fmt: skip
    baseline, *ours = content["results"]
    assert baseline["method"] == "AdamW" and baseline["install_delay"] is None
    assert [row["install_delay"] for row in ours] == [0, 4]
    for row in content["results"]:
        assert len(row["final_losses"]) == 2
        assert row["min"] <= row["mean"] <= row["max"]
    assert ours[0]["final_losses"] != ours[1]["final_losses"]
    # Installed in the step that it is based on, used until the next one, T = 4 steps later.
    assert ours[1]["max_staleness"] > ours[0]["max_staleness"] >= 3
    # The first loss of 64 pixels at ln 2 each is 44; whatever trains at all is far below.
    assert all(row["max"] < 30 for row in content["results"])


def test_a_training_is_reproducible() -> None:
    runs = [train("autoencoder", 4, 1, 20, 4, 4, 1e-2) for _ in range(2)]
    assert runs[0] == runs[1]


def test_a_delay_beyond_what_a_service_holds_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from distcurv import cli

    arguments = ["staleness", "--delays", "500", "--interval", "4", "--steps", "1", "--seeds", "1"]
    assert cli.main(["bench", *arguments, "--out", str(tmp_path)]) == 2
    assert "install_delay" in capsys.readouterr().err.strip().splitlines()[-1]
