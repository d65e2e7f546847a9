"""Replicas stay bit-identical whatever the links do, and a run can be replayed from its log."""

from __future__ import annotations

import pytest
from distributed_jobs import Results

DOORS = ["kfac", "soap"]


@pytest.mark.parametrize("door", DOORS)
def test_replicas_are_bit_identical_over_links_with_random_delays(
    shared_job: Results, door: str
) -> None:
    said = shared_job.of(f"delayed-{door}")
    assert len(said) == 2
    assert said[0]["checksum"] == said[1]["checksum"]
    assert said[0]["log"] == said[1]["log"]
    # Both ranks own blocks, and what the delayed links brought was installed.
    for one in said:
        assert one["metrics"]["versions_from_workers"] >= 10
        assert one["metrics"]["statistics_sent"] > 0


@pytest.mark.parametrize("door", DOORS)
def test_the_run_replayed_from_its_log_has_the_same_bits(shared_job: Results, door: str) -> None:
    for one in shared_job.of(f"delayed-{door}"):
        assert one["replayed_log"] == one["log"]
        assert one["replayed_checksum"] == one["checksum"]


@pytest.mark.parametrize("door", DOORS)
def test_what_was_folded_and_dropped_is_what_was_observed(shared_job: Results, door: str) -> None:
    for one in shared_job.of(f"delayed-{door}"):
        assert one["accounted"], one["metrics"]
