"""Workers and jobs that the distributed tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from distributed_jobs import Results, Scenario, run_ranks
from distributed_makers import SERVED_MAKERS
from distributed_tasks import DOORS, EQUAL_STEPS, SAVED_AT, SAVED_SETTINGS

from distcurv.launcher.supervisor import Supervisor


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Thread pools of many small runs would fight for the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def worker() -> Iterator[Supervisor]:
    """One true worker, for tests that do not kill it; jobs use it one after the other."""
    with Supervisor(workers=1, report=lambda text: None) as supervisor:
        yield supervisor


@pytest.fixture(scope="session")
def shared_job(worker: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """One job of four ranks that runs the scenarios of several test files."""
    scenarios = [
        Scenario(f"{door}-on-{n}", n, "equal_preconditioner", {"door": door, "steps": EQUAL_STEPS})
        for n in (4, 2, 1)
        for door in DOORS
    ]
    # Four ranks of one node: five cores leave one free, whatever the other ranks see.
    scenarios += [
        Scenario(f"decided-{cores[0]}", 4, "decided_alike", {"cores": cores})
        for cores in ([5, 1, 9, 2], [4, 64, 64, 64])
    ]
    scenarios += [Scenario("scheduled", 2, "scheduled", {"steps": 30})]
    scenarios += [
        Scenario(f"schedule-{setting}", 2, "other_schedule", {"setting": setting})
        for setting in ("damping", "preconditioner_upd_interval", "short", "statistics_at")
    ]
    scenarios += [
        Scenario(f"maker-{maker}-on-{n}", n, "served_maker", {"maker": maker})
        for maker in SERVED_MAKERS
        for n in (2, 1)
    ]
    group = {"maker": "shampoo", "group": True}
    scenarios += [Scenario("maker-shampoo-group", 2, "served_maker", group)]
    for door in ("kfac", "soap"):
        scenarios += [
            Scenario(f"table-{door}", 4, "other_table", {"door": door}),
            Scenario(f"config-{door}", 4, "other_config", {"door": door}),
            Scenario(f"workers-{door}", 4, "other_workers", {"door": door}),
            Scenario(f"endpoints-{door}", 4, "other_endpoints", {"door": door}),
            Scenario(
                f"delayed-{door}",
                2,
                "delayed_links",
                {"door": door, "endpoints": worker.endpoints, "versions": 10, "seed": 7},
            ),
            Scenario(
                f"saved-{door}",
                2,
                "checkpointed",
                {"door": door, "steps": SAVED_AT, "settings": SAVED_SETTINGS},
            ),
        ]
    return run_ranks(scenarios, tmp_path_factory.mktemp("shared-job"))
