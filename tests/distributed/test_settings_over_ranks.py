"""Settings that are functions of the step: the same on all ranks, or all ranks raise."""

from __future__ import annotations

import pytest
from distributed_jobs import Results


def test_ranks_with_one_schedule_stay_identical(shared_job: Results) -> None:
    said = shared_job.of("scheduled")
    assert said[0]["checksum"] == said[1]["checksum"]
    assert said[0]["log"] == said[1]["log"]
    # Early until step 4; cycles begin at 4, 6, 8, 10, 12, 17, 22, 27, the long ones install later.
    steps = sorted({record[0] for record in said[0]["log"]})
    assert steps == [0, 2, 6, 8, 10, 14, 19, 24, 29]


def test_every_rank_knows_who_serves_the_blocks_of_the_others(shared_job: Results) -> None:
    said = shared_job.of("scheduled")
    assert said[0]["served"] == said[1]["served"]
    assert {owner for owner, _ in said[0]["served"].values()} == {0, 1}
    assert {worker for _, worker in said[0]["served"].values()} == {"inline"}


@pytest.mark.parametrize(
    "setting", ["damping", "preconditioner_upd_interval", "short", "statistics_at"]
)
def test_a_function_that_differs_between_ranks_makes_all_of_them_raise(
    shared_job: Results, setting: str
) -> None:
    said = shared_job.of(f"schedule-{setting}")
    assert said[0]["at"] is not None
    assert said[0] == said[1]
    assert "must depend on the step alone" in said[0]["text"]
