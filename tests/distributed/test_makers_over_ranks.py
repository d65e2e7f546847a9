"""Served makers on two ranks: the same bits on both; what one rank makes of the joined batch."""

from __future__ import annotations

import pytest
from distributed_jobs import Results
from distributed_makers import SERVED_MAKERS

# Sums of float32 in another order.
TOLERANCE = 1e-4


@pytest.mark.parametrize("maker", SERVED_MAKERS)
def test_two_ranks_make_what_one_makes_of_the_joined_batch(shared_job: Results, maker: str) -> None:
    two = shared_job.of(f"maker-{maker}-on-2")
    assert two[0]["checksum"] == two[1]["checksum"]
    assert two[0]["summary"] == two[1]["summary"]
    wanted = shared_job.tensors(f"maker-{maker}-on-1")
    got = shared_job.tensors(f"maker-{maker}-on-2", rank=1)
    assert len(got) == len(wanted) > 0
    for one, other in zip(wanted, got, strict=True):
        assert (one - other).norm() <= TOLERANCE * one.norm()


def test_a_sync_group_does_what_distributed_data_parallel_does(shared_job: Results) -> None:
    said = shared_job.of("maker-shampoo-group")
    assert said[0]["checksum"] == said[1]["checksum"]
    wanted = shared_job.tensors("maker-shampoo-on-1")
    got = shared_job.tensors("maker-shampoo-group")
    for one, other in zip(wanted, got, strict=True):
        assert (one - other).norm() <= TOLERANCE * one.norm()
