"""Two ranks of DistributedDataParallel make what one rank makes of the joined batch.

Tolerance: sums over ranks are float32, damping is 0.1: 1e-5 of the largest entry.
"""

from __future__ import annotations

from typing import Any

import kfac_job
import pytest
import torch
from batch_makers_job import run
from kfac_job import MAKERS, take_steps
from maker_models import model_of


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("kfac-makers"), kfac_job.__file__)


@pytest.mark.parametrize("key", [key for key in MAKERS if key != "draws"])
def test_two_ranks_are_one_on_the_joined_batch(job: list[dict[str, Any]], key: str) -> None:
    name, maker = MAKERS[key]
    model = model_of(name)
    expected = take_steps(maker(model), model, name, slice(None))
    for said in job:
        assert (said[key] - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("key", MAKERS)
def test_replicas_stay_identical(job: list[dict[str, Any]], key: str) -> None:
    """With targets that each rank draws for itself, too."""
    assert torch.equal(job[0][key], job[1][key])
