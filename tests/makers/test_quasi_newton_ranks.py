"""With DistributedDataParallel two ranks are one rank on the joined batch.

Tolerance: float64; sums over ranks and over one batch differ in the last bits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quasi_newton_ranks import CASES, MAKERS, make, run, trained


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("quasi-newton"))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_two_ranks_are_one_on_the_joined_batch(
    job: list[dict[str, Any]], kind: str, name: str
) -> None:
    alone = trained(kind, name, 0, 1)
    first, second = (rank[f"{kind}/{name}"] for rank in job)
    assert first.keys() == second.keys() == alone.keys()
    begun = dict(make(name).named_parameters())
    for key, wanted in alone.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], wanted, rtol=1e-7, atol=1e-9)
        assert key not in begun or not torch.equal(begun[key], wanted), key


@pytest.mark.parametrize("kind", MAKERS)
def test_each_rank_continues_from_its_state(job: list[dict[str, Any]], kind: str) -> None:
    for rank in job:
        resumed = rank[f"{kind}/mlp/resumed"]
        for key, wanted in rank[f"{kind}/mlp"].items():
            assert torch.equal(resumed[key], wanted), key
