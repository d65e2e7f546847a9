"""Any number of ranks makes the preconditioner that one rank makes of the joined batch."""

from __future__ import annotations

from typing import Any

import pytest
from distributed_jobs import Results
from distributed_ranks import equal_preconditioner
from distributed_tasks import DOORS, EQUAL_STEPS
from torch import Tensor

# Sums over ranks and over one batch differ in the last bits of float32; 12 steps and the refreshes
# between them amplify that.  A wrong weight of the ranks shows at order 1.
TOLERANCE = 1e-4

WORLDS = (1, 2, 4)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same in this process, without torch.distributed: one rank, the joined batch."""
    saved: list[Any] = []
    results = [equal_preconditioner(saved.append, door, EQUAL_STEPS) for door in DOORS]
    return {
        door: {**tensors, **result}
        for door, tensors, result in zip(DOORS, saved, results, strict=True)
    }


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()


def factor(tensors: dict[str, Tensor], side: str) -> Tensor:
    """U diag(lam) Uᵀ, which does not know the signs of the eigenvectors."""
    U = tensors[f"{side}.U"]
    return (U * tensors[f"{side}.lam"]) @ U.mT


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("door", DOORS)
def test_ranks_make_what_one_rank_makes_of_the_joined_batch(
    shared_job: Results, alone: dict[str, Any], door: str, ranks: int
) -> None:
    key = f"{door}-on-{ranks}"
    said, wanted = shared_job.of(key), alone[door]
    assert len(said) == ranks
    # The log is in the order of the owners, of whom there are as many as ranks.
    assert sorted(said[0]["log"]) == sorted(wanted["log"])
    got = shared_job.tensors(key, rank=ranks - 1)
    for what in ("grads", "moved", "params"):
        for ours, theirs in zip(got[what], wanted[what], strict=True):
            assert error(ours, theirs) < TOLERANCE, what
    assert got["versions"].keys() == wanted["versions"].keys()
    for name, tensors in got["versions"].items():
        for key, value in tensors.items():
            side, _, field = key.partition(".")
            theirs = wanted["versions"][name]
            if field == "tail":
                continue  # a small difference of large numbers; it is in trace and lam
            if field == "U":
                assert error(factor(tensors, side), factor(theirs, side)) < TOLERANCE, (name, key)
            else:
                assert error(value, theirs[key]) < TOLERANCE, (name, key)


@pytest.mark.parametrize("ranks", [n for n in WORLDS if n > 1])
@pytest.mark.parametrize("door", DOORS)
def test_every_rank_installs_the_same_at_the_same_steps(
    shared_job: Results, door: str, ranks: int
) -> None:
    said = shared_job.of(f"{door}-on-{ranks}")
    assert said[0]["log"]
    assert all(one == said[0] for one in said)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("table", "block table differs"),
        ("config", "configuration differs"),
        ("workers", "whether workers are used differs"),
        ("endpoints", "whether workers are used differs"),
    ],
)
@pytest.mark.parametrize("door", ["kfac", "soap"])
def test_a_rank_that_was_built_otherwise_is_detected_on_all_ranks(
    shared_job: Results, what: str, words: str, door: str
) -> None:
    said = shared_job.raw(f"{what}-{door}")
    assert len(said) == 4
    for one in said:
        assert one.get("raised") == "MismatchError"
        assert words in one["text"]


@pytest.mark.parametrize(("first_sees", "starts"), [(5, True), (4, False)])
def test_all_ranks_decide_alike_where_refreshes_happen(
    shared_job: Results, first_sees: int, starts: bool
) -> None:
    said = shared_job.of(f"decided-{first_sees}")
    assert [one["starts"] for one in said] == [starts] * 4
