"""Two ranks train each off-the-shelf model with one true worker: the loss falls, and the replicas
stay the same to the bit."""

from __future__ import annotations

from typing import Any

import models_job
import pytest
from model_zoo import MAKERS

from distcurv.launcher.supervisor import Supervisor

Said = list[dict[str, Any]]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Said:
    """One job that goes through all models; the worker serves one after the other."""
    folder = tmp_path_factory.mktemp("models-job")
    with Supervisor(workers=1, threads=1, report=lambda text: None) as supervisor:
        (endpoint,) = supervisor.endpoints
        return models_job.run(folder, endpoint, list(MAKERS))


@pytest.fixture
def said(job: Said, name: str) -> Said:
    """Of one model, by rank."""
    for rank, results in enumerate(job):
        assert "raised" not in results[name], f"rank {rank}: {results[name]['raised']}"
    return [results[name] for results in job]


@pytest.mark.parametrize("name", list(MAKERS))
def test_the_loss_falls(said: Said) -> None:
    losses = said[0]["losses"]
    assert len(losses) == models_job.STEPS
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    assert last < 0.9 * first, losses


@pytest.mark.parametrize("name", list(MAKERS))
def test_replicas_are_bit_identical(said: Said) -> None:
    one, other = said
    assert one["before"] == other["before"] != one["after"]
    assert one["after"] == other["after"]
    assert one["log"] == other["log"]


@pytest.mark.parametrize("name", list(MAKERS))
def test_every_block_got_versions_from_the_worker(said: Said) -> None:
    """After the early phase, in which owners refresh in process."""
    early = models_job.SETTINGS["early_steps"]
    for one in said:
        from_worker = {block for step, block, *_ in one["log"] if step > early}
        assert from_worker == set(range(one["blocks"]))
        assert one["metrics"]["statistics_nonfinite"] == 0
    assert sum(one["metrics"]["versions_from_workers"] for one in said) >= said[0]["blocks"]
