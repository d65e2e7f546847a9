"""The block table: shares of work, owners, and a digest that tells any difference."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from train_rig import block_spec

from distcurv.curvature.spec import BlockSpec, SideSpec
from distcurv.errors import ConfigError
from distcurv.train.table import BlockTable, longest_processing_time, owner_ranks, refresh_cost

COSTS = st.lists(st.integers(1, 20).map(float), min_size=1, max_size=6)


def loads(costs: list[float], chosen: tuple[int, ...] | list[int], bins: int) -> list[float]:
    return [sum(c for c, b in zip(costs, chosen, strict=True) if b == i) for i in range(bins)]


def test_longest_first_to_the_least_loaded_bin() -> None:
    assert longest_processing_time([3.0, 5.0, 4.0, 3.0, 3.0], 2) == [1, 0, 1, 0, 1]


def test_ties_go_by_index() -> None:
    assert longest_processing_time([1.0] * 5, 3) == [0, 1, 2, 0, 1]


@given(COSTS, st.integers(1, 3))
def test_the_largest_load_is_within_graham_of_the_best(costs: list[float], bins: int) -> None:
    got = max(loads(costs, longest_processing_time(costs, bins), bins))
    best = min(
        max(loads(costs, choice, bins))
        for choice in itertools.product(range(bins), repeat=len(costs))
    )
    assert got <= (4 / 3 - 1 / (3 * bins)) * best + 1e-9  # Graham 1969


def test_cost_is_linear_in_width_for_low_rank_and_cubic_for_dense() -> None:
    low = block_spec(dims=(100, 10), rank=4)
    assert refresh_cost(low) == 100 * 16 + 10 * 16
    sides = tuple(SideSpec(d, d, "none", "dense") for d in (10, 5))
    assert refresh_cost(BlockSpec("w", "dense", sides, 0.9)) == 1000 + 125


def test_cost_is_the_dimension_where_there_is_no_basis() -> None:
    counts = SideSpec(1000, 0, "diagonal", "diagonal")
    dense = SideSpec(10, 10, "none", "dense")
    assert refresh_cost(BlockSpec("w", "lowrank", (counts, SideSpec(10, 4)), 0.9)) == 1000 + 160
    assert refresh_cost(BlockSpec("w", "dense", (counts, dense), 0.9)) == 1000 + 1000
    assert refresh_cost(BlockSpec("w", "diagonal", (counts,), 0.9)) == 1000
    unit = SideSpec(64, 0, "diagonal", "unit")
    assert refresh_cost(BlockSpec("w", "unitwise", (unit,), 0.9)) == 64


@pytest.mark.parametrize(
    ("nodes", "max_owners", "owners"),
    [
        ([0, 0, 1, 1], 2, [0, 2]),
        ([0, 0, 1, 1], 3, [0, 1, 2]),
        ([0, 0, 1, 1], 8, [0, 1, 2, 3]),
        ([7, 7, 7, 9], 2, [0, 3]),
        ([5], 8, [0]),
    ],
)
def test_owners_are_chosen_one_per_node_first(
    nodes: list[int], max_owners: int, owners: list[int]
) -> None:
    assert owner_ranks(nodes, max_owners) == owners


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 12))
def test_no_node_has_two_owners_while_another_has_none(nodes: list[int], max_owners: int) -> None:
    owners = owner_ranks(nodes, max_owners)
    assert len(owners) == len(set(owners)) == min(max_owners, len(nodes))
    per_node = {node: sum(nodes[rank] == node for rank in owners) for node in set(nodes)}
    for node, count in per_node.items():
        possible = nodes.count(node)
        assert count >= min(possible, max(per_node.values()) - 1)


def table(*specs: BlockSpec, nodes: tuple[int, ...] = (0,), max_owners: int = 8) -> BlockTable:
    return BlockTable.make(specs, nodes, max_owners)


def changed_specs() -> list[BlockSpec]:
    base = block_spec()
    side = base.sides[0]
    sides = [
        dataclasses.replace(side, dim=7),
        dataclasses.replace(side, rank=3),
        dataclasses.replace(side, tail="diagonal"),
        dataclasses.replace(side, encoding="dense"),
    ]
    others = [dataclasses.replace(base, sides=(s, base.sides[1])) for s in sides]
    others += [dataclasses.replace(base, sides=base.sides[::-1])]
    others += [dataclasses.replace(base, sides=base.sides[:1])]
    dense = tuple(SideSpec(s.dim, s.dim, "none", "dense") for s in base.sides)
    others += [
        dataclasses.replace(base, name="other"),
        dataclasses.replace(base, decay=0.8),
        dataclasses.replace(base, damping=1.0),
        dataclasses.replace(base, relative_damping=True),
        dataclasses.replace(base, max_itr=2),
        dataclasses.replace(base, tolerance=0.1),
        dataclasses.replace(base, wire_dtype="float16"),
        BlockSpec(base.name, "shampoo", dense, base.decay),
        BlockSpec(base.name, "shampoo", dense, base.decay, power=0.5),
        *(
            BlockSpec(base.name, "unit_rows", (dataclasses.replace(dense[0], units=n),), base.decay)
            for n in (1, 2)
        ),
    ]
    return [*others, BlockSpec(base.name, "dense", dense, base.decay)]


def test_the_digest_changes_with_every_field() -> None:
    tables = [table(spec) for spec in [block_spec(), *changed_specs()]]
    assert len({t.digest for t in tables}) == len(tables)
    assert len({t.digest_number for t in tables}) == len(tables)


def test_every_field_of_a_spec_is_in_the_test_above() -> None:
    """A new field needs a line in `changed_specs`."""
    assert {f.name for f in dataclasses.fields(BlockSpec)} == {
        *("name", "kind", "sides", "decay", "damping", "relative_damping", "power"),
        *("max_itr", "tolerance", "wire_dtype"),
    }
    assert {f.name for f in dataclasses.fields(SideSpec)} == {
        *("dim", "rank", "tail", "encoding", "units")
    }


def test_the_digest_changes_with_order_and_owners() -> None:
    a, b = block_spec("a"), block_spec("b")
    assert table(a, b).digest != table(b, a).digest
    assert table(a, b, nodes=(0, 0)).digest != table(a, b, nodes=(0, 0), max_owners=1).digest
    assert table(a, b).digest == table(block_spec("a"), block_spec("b")).digest


def test_the_digest_number_fits_a_control_vector() -> None:
    for spec in changed_specs():
        assert 0 <= table(spec).digest_number < 2**62


def test_blocks_are_shared_over_the_owners() -> None:
    wide, thin = block_spec("wide", (50, 40)), [block_spec(f"thin{i}", (10, 8)) for i in range(4)]
    made = table(wide, *thin, nodes=(0, 0))
    assert made.owners[0] == 0
    assert made.owned_by(1) == [1, 2, 3, 4]
    assert sorted(made.owned_by(0) + made.owned_by(1)) == list(range(len(made)))


def test_layouts_are_those_of_the_kind() -> None:
    made = table(block_spec(dims=(6, 4), rank=2))
    assert made.statistic_layouts[0].size == (6 * 2 + 2) + (4 * 2 + 2) + 1
    assert made.published_layouts[0].size == (6 * 2 + 2 + 1 + 2) + (4 * 2 + 2 + 1 + 2)


def test_equal_names_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"not unique: w; rename"):
        table(block_spec("w"), block_spec("w"), block_spec("v"))


def test_an_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"block w has kind 'magic': known are lowrank, dense"):
        table(dataclasses.replace(block_spec(), kind="magic"))


def test_a_table_may_be_empty() -> None:
    assert len(table()) == 0
    assert math.prod(table().owners) == 1
