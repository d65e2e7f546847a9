"""The rule of ``workers="auto"``: a worker where it saves enough and a core is free for it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from distcurv.config import KfacConfig
from distcurv.curvature.spec import BlockSpec, SideSpec
from distcurv.train.placement import (
    CALIBRATION,
    INLINE,
    WORKER,
    Calibration,
    Load,
    Rates,
    choose,
    exchanged_bytes,
    inline_seconds,
    refresh_operations,
    worker_seconds,
)
from distcurv.train.table import BlockTable

# A block costs 1 s in process and 0.5 s with a worker, whatever it is.
FLAT = Calibration(
    inline={"lowrank": Rates(1.0, 0.0, 0.0), "dense": Rates(1.0, 0.0, 0.0)},
    worker=Rates(0.5, 0.0, 0.0),
    least_gain=1.5,
    least_saving=0.1,
)


def low_rank(name: str, d: int, r: int) -> BlockSpec:
    return BlockSpec(name, "lowrank", (SideSpec(d, r), SideSpec(d, r)), 0.9)


def dense(name: str, d: int) -> BlockSpec:
    return BlockSpec(name, "dense", (SideSpec(d, d, "none", "dense"),) * 2, 0.9, 1e-3)


def load_of(specs: list[BlockSpec], interval: int = 10, owners: int = 1) -> Load:
    return Load(tuple(specs), tuple(i % owners for i in range(len(specs))), interval)


def blocks(count: int, d: int = 8, r: int = 2) -> list[BlockSpec]:
    return [low_rank(str(i), d, r) for i in range(count)]


def test_costs_are_linear_in_blocks_operations_and_bytes() -> None:
    spec, other = low_rank("a", 10, 2), dense("b", 4)
    # 37 d r² + 180 r³ on both sides; Cholesky factor and inverse on both sides.
    assert refresh_operations(spec) == 2 * (37 * 10 * 4 + 180 * 8)
    assert refresh_operations(other) == 2 * (2 * 4**3)
    # Per side Y, trace, count and U, lam, tail, trace, weight; and the steps.
    assert exchanged_bytes(spec) == 4 * (2 * (20 + 2) + 1 + 2 * (20 + 2 + 1 + 1 + 1))
    # Per side the triangle and count, then the triangle, trace, damping, weight; and the steps.
    assert exchanged_bytes(other) == 4 * (2 * (10 + 1) + 1 + 2 * (10 + 3))
    calibration = Calibration(
        inline={"lowrank": Rates(5.0, 2.0, 3.0), "dense": Rates(7.0, 11.0, 13.0)},
        worker=Rates(17.0, 0.0, 19.0),
        least_gain=1.0,
        least_saving=0.0,
    )
    expected = 5 + 2 * refresh_operations(spec) + 3 * exchanged_bytes(spec)
    expected += 7 + 11 * refresh_operations(other) + 13 * exchanged_bytes(other)
    assert inline_seconds([spec, other], calibration) == pytest.approx(expected)
    sent = 2 * 17 + 19 * (exchanged_bytes(spec) + exchanged_bytes(other))
    assert worker_seconds([spec, other], calibration) == pytest.approx(sent)


def test_a_factor_without_a_basis_costs_no_products() -> None:
    counts = SideSpec(1000, 0, "diagonal", "diagonal")
    sketched = SideSpec(10, 2)
    embedding = BlockSpec("e", "lowrank", (counts, sketched), 0.9)
    assert refresh_operations(embedding) == 37 * 10 * 4 + 180 * 8
    # diag and count, Y, trace and count, steps; then tail, trace, weight, and those of G.
    assert exchanged_bytes(embedding) == 4 * (1001 + 22 + 1 + 1002 + 25)
    norm = BlockSpec("n", "unitwise", (SideSpec(64, 0, "diagonal", "unit"),), 0.9)
    assert refresh_operations(norm) == 0
    assert exchanged_bytes(norm) == 4 * (3 * 64 + 2 + 3 * 64 + 1)
    # A kind that no calibration names is priced like dense, by blocks and bytes.
    only_dense = dataclasses.replace(FLAT, inline={"dense": Rates(1.0, 5.0, 2.0)})
    assert inline_seconds([norm], only_dense) == 1.0 + 2.0 * exchanged_bytes(norm)


def test_a_worker_must_save_enough_per_step() -> None:
    # Two blocks save 1 s a window: 0.1 s a step at T = 10, less at T = 11.
    assert choose(load_of(blocks(2), 10), [1], FLAT).place == WORKER
    assert choose(load_of(blocks(2), 11), [1], FLAT).place == INLINE
    assert choose(load_of(blocks(1), 10), [1], FLAT).place == INLINE


def test_a_worker_must_be_cheaper_by_a_factor() -> None:
    dear = dataclasses.replace(FLAT, worker=Rates(0.7, 0.0, 0.0), least_saving=0.0)
    assert choose(load_of(blocks(100)), [1], dear).place == INLINE
    fair = dataclasses.replace(dear, worker=Rates(0.66, 0.0, 0.0))
    assert choose(load_of(blocks(100)), [1], fair).place == WORKER


def test_owners_share_the_refreshes() -> None:
    """Four blocks on one owner save 2 s a window; on four owners each saves half a second."""
    assert choose(load_of(blocks(4), 10, owners=1), [1], FLAT).place == WORKER
    assert choose(load_of(blocks(4), 10, owners=4), [1], FLAT).place == INLINE
    # The slowest owner counts, not the average one.
    lopsided = Load(tuple(blocks(4)), (0, 1, 1, 1), 10)
    assert choose(lopsided, [1], FLAT).place == WORKER


@pytest.mark.parametrize("spare", [[0], [-3], [5, 0], [0, 5]])
def test_a_node_without_a_free_core_means_in_process(spare: list[int]) -> None:
    choice = choose(load_of(blocks(1000)), spare, FLAT)
    assert choice.place == INLINE and "core" in choice.reason


def test_without_blocks_there_is_nothing_to_offload() -> None:
    assert choose(load_of([]), [8]).place == INLINE


def test_an_accelerator_keeps_to_training_where_a_core_is_free() -> None:
    light = dataclasses.replace(load_of(blocks(1)), accelerated=True)
    assert choose(light, [1]).place == WORKER
    assert choose(light, [0]).place == INLINE


def test_the_reason_says_both_costs() -> None:
    reason = choose(load_of(blocks(3), 20), [1], FLAT).reason
    assert "3e+03 ms every 20 steps" in reason and "1.5e+03 ms" in reason


@pytest.mark.parametrize(
    "heavy",
    [
        pytest.param([low_rank(str(i), 1024, 16) for i in range(256)], id="many blocks"),
        pytest.param([low_rank("a", 4096, 256)], id="a large rank"),
        pytest.param([dense("a", 2048)], id="a dense kind"),
    ],
)
def test_what_the_calibration_must_say(heavy: list[BlockSpec]) -> None:
    """Whatever constants the benchmark finds: a minute of refreshing is offloaded, and a single
    tiny block every hundred steps is not worth a process."""
    assert choose(load_of(heavy, 10), [1]).place == WORKER
    assert choose(load_of([low_rank("a", 8, 2)], 100), [1]).place == INLINE
    assert CALIBRATION.least_gain > 1


def test_a_load_is_what_the_table_says() -> None:
    table = BlockTable.make(blocks(3), [0, 0], 8)
    config = KfacConfig(preconditioner_upd_interval=7)
    load = Load.of(table, config, torch.device("cuda"))
    assert load == Load(table.specs, table.owners, 7, True)
    assert set(load.owners) == {0, 1}
    assert not Load.of(table, config, torch.device("cpu")).accelerated
