"""A rank that leaves out one step() is detected on all ranks, in every mode, and nothing hangs.

The ranks train under DistributedDataParallel, so that a rank which waits for another inside step()
while the other waits for it in a backward would hang: the job's deadline finds that.
"""

from __future__ import annotations

from typing import Any

import pytest
from distributed_jobs import Results, Scenario, run_ranks

ASYNCHRONOUS = {"preconditioner_upd_interval": 6, "early_steps": 0}
# Name: settings, the step that rank 1 leaves out.  In a cycle of 6: poll, announce, install and
# close, post, and two steps without an exchange.
MODES: dict[str, tuple[dict[str, Any], int]] = {
    "poll": (ASYNCHRONOUS, 12),
    "announce": (ASYNCHRONOUS, 13),
    "install": (ASYNCHRONOUS, 14),
    "post": (ASYNCHRONOUS, 15),
    "between": (ASYNCHRONOUS, 16),
    "early": ({"preconditioner_upd_interval": 10, "early_steps": 20}, 8),
    "deterministic": ({"preconditioner_upd_interval": 5, "early_steps": 0, "install_delay": 3}, 13),
    "short": ({"preconditioner_upd_interval": 2, "early_steps": 0}, 9),
}
STEPS = 30


def doors_of(mode: str) -> tuple[str, ...]:
    """One door reduces statistics over ranks, the other does not."""
    return ("kfac", "soap") if mode in ("poll", "early") else ("kfac",)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Results:
    scenarios = [
        Scenario(
            f"{mode}-{door}",
            2,
            "skipped_step",
            {"door": door, "at": at, "steps": STEPS, "settings": settings},
        )
        for mode, (settings, at) in MODES.items()
        for door in doors_of(mode)
    ]
    return run_ranks(scenarios, tmp_path_factory.mktemp("skipped"))


@pytest.mark.parametrize(("mode", "door"), [(m, d) for m in MODES for d in doors_of(m)])
def test_a_skipped_step_is_detected_on_all_ranks(job: Results, mode: str, door: str) -> None:
    said = job.raw(f"{mode}-{door}")
    assert [one.get("raised") for one in said] == ["MismatchError", "MismatchError"], said
    assert all("skipped a step()" in one["text"] for one in said)
