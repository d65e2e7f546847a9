"""What a method keeps alive is found, counted once and told by place; in a process of its own."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from distcurv.bench.step_held import ELSEWHERE, held
from distcurv.bench.step_memory import above, memory_of
from distcurv.errors import LaunchError

REQUEST = {
    "model": "autoencoder", "device": "cpu", "worker": "inline", "rank": 8, "interval": 4,
    "capture_interval": 2,
}  # fmt: skip


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Keeper:
    """Keeps tensors in all the ways that are looked into."""

    def __init__(self) -> None:
        self._state = {"moment": torch.ones(1000), 3: torch.ones(2000)}
        self._queue = deque([Pair(torch.ones(3000), torch.ones(4000))])
        self._view = self._state["moment"][:10]
        self._call = partial(print, torch.ones(5000))
        self._self = self


def test_tensors_are_found_counted_once_and_named() -> None:
    keeper = Keeper()
    excluded, loose = torch.ones(7000), torch.ones(6000)
    lazy = nn.LazyLinear(3)  # has parameters, but no storage yet
    before = held([], [excluded, loose], "cpu").total - 4 * 15_000
    found = held([keeper], [excluded], "cpu")
    places = {place: nbytes for place, nbytes in found.by_place.items() if nbytes >= 4000}
    # The shortest way to the first moment is the view of it.
    assert places["view"] == 4 * 1000
    assert places["state"] == 4 * 2000
    assert places["queue.first"] == 4 * 3000
    assert places["queue.second"] == 4 * 4000
    assert places["call"] == 4 * 5000
    assert places[ELSEWHERE] >= loose.nbytes
    assert found.total - before == 4 * (15_000 + 6000)
    assert isinstance(lazy.weight, nn.UninitializedParameter)


def test_what_is_not_on_the_device_is_said_to_be_on_the_host() -> None:
    keeper = Keeper()
    assert "state (host)" in held([keeper], [], "cuda").by_place


def test_numbers_are_those_above_the_baseline() -> None:
    base = {"peak_bytes": 100, "held_bytes": 40, "held_bytes_by_place": {"m": 40}, "sides": 5}
    more = {"peak_bytes": 170, "held_bytes": 80, "held_bytes_by_place": {"m": 60, "v": 20}}
    found = above(more | {"sides": 5}, base)
    assert (found["peak_bytes_above"], found["held_bytes_above"]) == (70, 40)
    assert found["numbers_per_side"] == 40 / 4 / 5
    assert found["numbers_per_side_by_place"] == {"m": 3.0, "v": 1.0}


def test_methods_hold_what_they_must() -> None:
    adamw, soap = (memory_of({"method": name, **REQUEST}) for name in ("adamw", "lowrank-soap"))
    momentum = 4 * 2_837_314  # a float32 for each parameter of the autoencoder, as SGD holds
    assert adamw["held_bytes"] == pytest.approx(2 * momentum, rel=0.01)
    assert adamw["peak_bytes"] > 4 * momentum  # weights and gradients as well
    # Parts and their moments, 2 r for both sides, and the installed basis, r: at least.
    rank = 8
    assert soap["held_bytes"] - momentum > 4 * soap["sides"] * 3 * rank * 0.9
    assert soap["held_bytes"] >= soap["held_bytes_mean"]
    assert sum(soap["held_bytes_by_place"].values()) == soap["held_bytes"]


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(LaunchError, match=r"lion.*KeyError"):
        memory_of({"method": "lion", **REQUEST})
