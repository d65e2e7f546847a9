"""Windows and backlog: sums, counts, buckets, and two bases at most."""

from __future__ import annotations

import pytest
import torch
from train_rig import Events, filled_depot, make_table

from distcurv.errors import ShapeError
from distcurv.train.backlog import Backlog, Span
from distcurv.train.depot import Depot, InFlight
from distcurv.train.table import BlockTable
from distcurv.train.window import Window

CPU = torch.device("cpu")


def whole(table: BlockTable, block: int, value: float) -> dict[str, torch.Tensor]:
    """A statistic of a block with every number equal to ``value``."""
    shapes = table.statistic_layouts[block].shapes
    return {name: torch.full(shape, value) for name, shape in shapes.items()}


# -- the window ---------------------------------------------------------------------------


def test_statistics_add_up_in_their_place() -> None:
    table = make_table(2)
    window = Window(table, [0], CPU)
    window.add(0, whole(table, 0, 1.0))
    window.add(1, whole(table, 1, 2.0))
    window.add(0, whole(table, 0, 4.0))
    bucket = window.close(0).buckets[0]
    size = table.statistic_layouts[0].size
    assert torch.equal(bucket[:size], torch.full((size,), 5.0))
    assert torch.equal(bucket[size:], torch.full((size,), 2.0))


def test_a_part_of_a_statistic_leaves_the_rest() -> None:
    table = make_table(1)
    window = Window(table, [0], CPU)
    window.add(0, {"steps": torch.ones(())})
    views = table.statistic_layouts[0].views(window.close(0).buckets[0])
    assert views.pop("steps") == 1
    assert all(not view.any() for view in views.values())


def test_each_owner_has_a_bucket_of_its_own_and_silent_blocks_are_zeros() -> None:
    table = make_table(3, nodes=(0, 0))
    window = Window(table, [0, 1], CPU)
    window.add(1, whole(table, 1, 1.0))
    buckets = window.close(7).buckets
    assert sorted(buckets) == [0, 1]
    for owner, bucket in buckets.items():
        size = sum(table.statistic_layouts[b].size for b in table.owned_by(owner))
        assert bucket.shape == (size,)
        assert bool(bucket.any()) == (1 in table.owned_by(owner))


def test_where_gradients_are_replicated_only_the_owner_contributes() -> None:
    table = make_table(2, nodes=(0, 0))
    window = Window(table, [1], CPU)
    mine = table.owned_by(1)
    assert [window.contributes(b) for b in range(2)] == [b in mine for b in range(2)]


def test_closing_counts_and_begins_anew() -> None:
    table = make_table(1)
    window = Window(table, [0], CPU)
    window.add(0, whole(table, 0, 1.0))
    window.count_capture()
    window.count_capture()
    first = window.close(4)
    assert (first.since, first.through, first.captures, window.captures) == (0, 4, 2, 0)
    second = window.close(9)
    assert (second.since, second.through, second.captures) == (5, 9, 0)
    assert first.buckets[0].all()
    assert not second.buckets[0].any()


def test_restarting_gives_up_what_is_open() -> None:
    table = make_table(1)
    window = Window(table, [0], CPU)
    window.add(0, whole(table, 0, 1.0))
    window.count_capture()
    assert window.restart(30) == 1
    closed = window.close(33)
    assert (closed.since, closed.captures) == (30, 0)
    assert not closed.buckets[0].any()


def test_an_unknown_field_is_refused_with_the_layout() -> None:
    window = Window(make_table(1), [0], CPU)
    with pytest.raises(ShapeError, match=r"block w0 has unknown fields \['A.magic'\].*'A.Y'"):
        window.add(0, {"A.magic": torch.ones(())})


# -- the backlog --------------------------------------------------------------------------


class Rig:
    """A backlog of all blocks of a table, and the windows that come into it."""

    def __init__(self, blocks: int = 2) -> None:
        self.events = Events()
        self.table = make_table(blocks)
        self.depot: Depot = filled_depot(self.table, self.events)
        self.blocks = list(range(blocks))
        self.backlog = Backlog(self.table, self.blocks, self.depot)
        self.size = self.table.statistic_layouts[0].size
        self.since = 0

    def window(self, value: float, basis: int | list[int], captures: int = 1) -> torch.Tensor:
        bucket = torch.full((self.size * len(self.blocks),), value)
        versions = [basis] * len(self.blocks) if isinstance(basis, int) else basis
        self.backlog.add(Span(self.since, self.since + 4, captures), bucket, versions)
        self.since += 5
        return bucket

    def fly(self, block: int) -> None:
        self.depot.depart([block], InFlight(b"s", 0, 0, 4, 1))


def test_windows_against_one_basis_add_up() -> None:
    rig = Rig()
    rig.window(1.0, basis=3, captures=2)
    rig.window(10.0, basis=3, captures=3)
    groups = rig.backlog.sendable(rig.blocks)
    assert groups == {Span(0, 9, 5): [0, 1]}
    basis, payload = rig.backlog.first([0, 1])
    assert basis == [3, 3]
    assert torch.equal(payload, torch.full((2 * rig.size,), 11.0))
    assert rig.backlog.steps() == 10


def test_bases_are_never_mixed_and_the_oldest_goes_first() -> None:
    rig = Rig()
    rig.window(1.0, basis=3)
    rig.window(2.0, basis=4)
    assert rig.backlog.first([0])[0] == [3]
    assert rig.backlog.oldest_basis(0, 5) == 3
    rig.backlog.sent([0])
    basis, payload = rig.backlog.first([0])
    assert (basis, payload[0].item()) == ([4], 2.0)
    rig.backlog.sent([0])
    assert rig.backlog.oldest_basis(0, 5) == 5
    assert rig.backlog.sendable([0]) == {}


def test_blocks_with_different_histories_are_sent_apart() -> None:
    rig = Rig()
    rig.window(1.0, basis=[0, 0])
    rig.backlog.sent([0])
    rig.window(2.0, basis=[0, 0])
    assert rig.backlog.sendable([0, 1]) == {Span(5, 9, 1): [0], Span(0, 9, 2): [1]}


def test_a_block_in_flight_is_not_sendable() -> None:
    rig = Rig()
    rig.window(1.0, basis=0)
    rig.fly(1)
    assert rig.backlog.sendable([0, 1]) == {Span(0, 4, 1): [0]}


def test_a_third_basis_drops_the_oldest_and_says_so() -> None:
    rig = Rig()
    rig.window(1.0, basis=[0, 0], captures=2)
    rig.window(2.0, basis=[1, 0], captures=2)
    rig.window(3.0, basis=[2, 1], captures=2)
    assert rig.depot.counts.dropped == 2
    (event,) = rig.events.of("dropped")
    assert (event["blocks"], event["steps"]) == ([0], 2)
    assert rig.backlog.first([0])[0] == [1]
    assert rig.backlog.first([1])[1][0].item() == 3.0  # 1 + 2 against basis 0
    assert rig.backlog.steps() == 4 + 6


def test_memory_is_bounded_over_many_windows_and_nothing_is_lost_silently() -> None:
    rig = Rig()
    for i in range(50):
        rig.window(1.0, basis=i // 3)
        rig.backlog.compact()
    assert rig.backlog.steps() + rig.depot.counts.dropped == 50 * 2
    assert rig.backlog.steps() <= 2 * 2 * 3


def test_a_window_without_statistics_adds_nothing() -> None:
    rig = Rig()
    rig.window(0.0, basis=0, captures=0)
    assert rig.backlog.sendable(rig.blocks) == {}


def test_compact_lets_go_of_the_window_bucket() -> None:
    rig = Rig()
    bucket = rig.window(1.0, basis=0)
    shared = bucket.untyped_storage().data_ptr()
    rig.backlog.sent([0])
    rig.backlog.compact()
    (left,) = rig.backlog._queues[1]
    assert left.flat.untyped_storage().data_ptr() != shared
    assert left.flat.untyped_storage().nbytes() == 4 * rig.size
    assert torch.equal(left.flat, torch.ones(rig.size))


def test_discarding_counts_everything() -> None:
    rig = Rig()
    rig.window(1.0, basis=0, captures=2)
    rig.window(1.0, basis=1, captures=3)
    rig.backlog.discard([0], "closed")
    assert rig.depot.counts.dropped == 5
    assert rig.events.of("dropped") == [{"blocks": [0], "steps": 5, "reason": "closed"}]
    assert rig.backlog.steps() == 5
