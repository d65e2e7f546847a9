"""Free cores by node, from what each rank may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distcurv.train import cores
from distcurv.train.cores import Cores, from_vector, own_cores, spare_cores, to_vector


def of(*numbers: int, limit: int = 1000) -> Cores:
    return Cores(frozenset(numbers), limit)


@pytest.mark.parametrize("some", [of(0), of(3, 64, 1023), of(*range(1024)), of(1, limit=0)])
def test_vectors_hold_what_they_were_made_of(some: Cores) -> None:
    assert from_vector(to_vector(some)) == some


@pytest.mark.parametrize(
    ("nodes", "ranks", "spare"),
    [
        ([0], [of(0)], [0]),
        ([0], [of(0, 1)], [1]),
        # Ranks that may go anywhere share what there is.
        ([0, 0], [of(0, 1, 2)] * 2, [1]),
        ([0, 0, 0], [of(0, 1)] * 3, [-1]),
        # Pinned to a core each: the worker would be pinned to the first rank's.
        ([0, 0], [of(0), of(1)], [0]),
        # Pinned to halves: the first rank's half has one core for it and one for the worker.
        ([0, 0], [of(0, 1), of(2, 3)], [1]),
        # Nodes are told apart, in order of their first rank, though core numbers repeat.
        ([7, 3, 7], [of(0, 1, 2), of(0, 1, 2, 3), of(0, 1, 2)], [1, 3]),
        # A container's limit counts before its cores do.
        ([0], [of(*range(64), limit=1)], [0]),
        ([0, 0], [of(*range(64), limit=4)] * 2, [2]),
    ],
)
def test_spare_cores(nodes: list[int], ranks: list[Cores], spare: list[int]) -> None:
    assert spare_cores(nodes, ranks) == spare


@pytest.mark.parametrize(("text", "limit"), [("max 100000", None), ("250000 100000", 2)])
def test_the_containers_limit_is_read(
    text: str, limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "cpu.max"
    there.write_text(text + "\n")
    monkeypatch.setattr(cores, "_CGROUP_LIMIT", there)
    mine = own_cores()
    assert mine.limit == (limit if limit is not None else cores._NO_LIMIT)
    if hasattr(os, "sched_getaffinity"):
        assert mine.numbers == os.sched_getaffinity(0)
    monkeypatch.setattr(cores, "_CGROUP_LIMIT", tmp_path / "none")
    assert own_cores().limit == cores._NO_LIMIT
