"""`bench offload`: it trains what it says, leaves out what it cannot, and finds known constants."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_runs import bench, check_spread
from torch import nn

from distcurv import cli
from distcurv.bench import offload_rows
from distcurv.bench.offload_command import _KINDS
from distcurv.bench.offload_crew import Players
from distcurv.bench.offload_player import Player, make_arm
from distcurv.bench.offload_points import KINDS, Point, grid, needed_seconds, plan_point
from distcurv.errors import StateError
from distcurv.train.placement import CALIBRATION, exchanged_bytes, refresh_operations
from distcurv.train.preconditioner import Preconditioner

SMALL = Point("lowrank", 3, 8, 2, 4, 4)


def test_the_options_name_what_there_is() -> None:
    assert _KINDS == KINDS


@pytest.mark.parametrize("point", [SMALL, Point("dense", 2, 6, 0, 4, 4)], ids=str)
def test_a_points_blocks_are_those_of_the_preconditioner(point: Point) -> None:
    model = nn.Sequential(
        *(nn.Linear(point.width, point.width, bias=False) for _ in range(point.blocks))
    )
    with Preconditioner(model, point.config(), workers="inline") as precond:
        assert precond._pipeline.table.specs == point.specs()


def test_the_grid_has_no_rank_twice_for_dense_and_none_above_the_width() -> None:
    points = grid(("lowrank", "dense"), (2, 4), (8, 32), (4, 16), 5, 6)
    sizes = [(p.kind, p.width, p.blocks, p.rank) for p in points]
    assert len(set(sizes)) == len(sizes)
    assert {(w, r) for kind, w, _, r in sizes if kind == "lowrank"} == {(8, 4), (32, 4), (32, 16)}
    assert [s for s in sizes if s[0] == "dense"] == [
        ("dense", w, b, 0) for w in (8, 32) for b in (2, 4)
    ]
    assert all((p.rows, p.interval) == (5, 6) for p in points)


def test_what_does_not_fit_is_left_out_with_its_reason() -> None:
    gib, rate = 2.0**30, 1e11
    count, why = plan_point(SMALL, repetitions=5, seconds=60, memory=gib, rate=rate)
    assert (count, why) == (5, None)
    _, why = plan_point(SMALL, repetitions=5, seconds=60, memory=1e3, rate=rate)
    assert why is not None and why.startswith("memory")
    # Fewer repetitions before nothing at all, but not fewer than tell a spread.
    long = needed_seconds(SMALL, 9, rate)
    assert plan_point(SMALL, repetitions=9, seconds=long, memory=gib, rate=rate) == (9, None)
    some = needed_seconds(SMALL, 4, rate)
    assert plan_point(SMALL, repetitions=9, seconds=some, memory=gib, rate=rate) == (4, None)
    _, why = plan_point(SMALL, repetitions=9, seconds=0.1, memory=gib, rate=rate)
    assert why is not None and why.startswith("time")
    # More than a service takes.
    huge = Point("dense", 64, 4096, 0, 64, 10)
    _, why = plan_point(huge, repetitions=5, seconds=1e9, memory=1e15, rate=rate)
    assert why is not None and "a worker may need" in why


@pytest.mark.parametrize(("name", "refreshes"), [("inline", 5), ("none", 1)])
def test_an_arm_refreshes_each_interval_or_only_at_its_first_step(
    name: str, refreshes: int
) -> None:
    arm = make_arm(SMALL, name, [])
    for _ in range(SMALL.warm_up_steps + 2 * SMALL.turn_steps):
        assert torch.isfinite(arm.train_step())
    arm.settle()
    # One of the first step; then posted at steps 7, 11, 15 and polled at 8, 12, 16.
    steps = sorted({record.step for record in arm.precond.install_log})
    assert len(steps) + (name == "inline") == refreshes
    arm.precond.close()


def test_a_turn_begins_with_a_post_and_ends_with_its_install() -> None:
    player = Player()
    order = {"do": "build", "point": SMALL.fields(), "arms": ["inline"], "endpoints": []}
    player.obey(json.loads(json.dumps(order)))
    player.obey({"do": "run", "arm": "inline", "steps": SMALL.warm_up_steps})
    depot = player._arms["inline"].precond._pipeline.depot
    for _ in range(3):
        sent = depot.counts.sent
        turn = player.obey({"do": "run", "arm": "inline", "steps": SMALL.turn_steps})
        assert turn["installs"] == SMALL.blocks
        assert depot.counts.sent > sent
        assert len(turn["ms"]) == SMALL.turn_steps and turn["failures"] == 0
    player.obey({"do": "drop"})


def test_a_player_says_what_went_wrong_and_goes_on(tmp_path: Path) -> None:
    with Players([None], tmp_path / "meeting", tmp_path / "complaints") as players:
        bad = dataclasses.replace(SMALL, rank=-1).fields() | {"kind": "unknown"}
        with pytest.raises(StateError, match=r"ConfigError: KfacConfig\.kind is 'unknown'"):
            players.ask(do="build", point=bad, arms=["none"], endpoints=[])
        assert players.ask(do="build", point=SMALL.fields(), arms=["none"], endpoints=[]) == [{}]
        with pytest.raises(StateError, match="a training process ended"):
            players.ask(do="run", arm="none", steps="many")  # a fault of ours: the process dies
    assert "TypeError" in (tmp_path / "complaints").read_text()


def turn(mean: float) -> dict[str, Any]:
    return {"ms": [mean, mean], "cpu_ms": mean, "installs": 3, "staleness": 5, "failures": 0}


def test_costs_are_taken_within_a_repetition() -> None:
    turns = {
        ("solo", "none"): [turn(10.0), turn(20.0)],
        ("solo", "worker"): [turn(11.0), turn(21.0)],
        ("solo", "inline"): [turn(15.0), turn(25.0)],
        ("pair", "none"): [turn(12.0), turn(12.0)],
        ("pair", "sharded"): [turn(15.0), turn(15.0)],
    }
    row = offload_rows.row_of(SMALL, turns)
    assert row["arms"]["inline"]["window_ms"]["min"] == 5.0 * SMALL.interval
    assert row["arms"]["inline"]["window_ms"]["max"] == 5.0 * SMALL.interval
    assert row["arms"]["worker"]["over_none"]["max"] == pytest.approx(1.1)
    assert row["arms"]["sharded"]["over_none"]["median"] == pytest.approx(1.25)
    assert row["arms"]["worker"]["kept_up"] == 1.0
    assert row["gain"]["max"] == pytest.approx(15 / 11)
    assert row["measured"] == "worker"
    turns["solo", "inline"][1] = turn(20.5)
    assert offload_rows.row_of(SMALL, turns)["measured"] == "even"
    turns["solo", "inline"][0] = turn(10.5)
    assert offload_rows.row_of(SMALL, turns)["measured"] == "inline"


def test_the_fit_finds_the_constants_that_made_the_costs() -> None:
    inline, worker = (2e-3, 3e-11, 4e-9), (5e-4, 0.0, 1e-9)
    rows = []
    for point in grid(("lowrank",), (8, 64), (64, 512), (8, 32), 4, 10):
        (spec, *_), count = point.specs(), point.blocks
        terms = (1.0, refresh_operations(spec), exchanged_bytes(spec))

        def cost(
            rates: tuple[float, ...], terms: tuple[float, ...] = terms, count: int = count
        ) -> dict[str, dict[str, float]]:
            seconds = count * sum(rate * term for rate, term in zip(rates, terms, strict=True))
            ms = 1e3 * seconds
            return {"cpu_window_ms": {"median": ms, "min": 0.9 * ms, "max": 1.1 * ms}}

        rows.append(point.fields() | {"arms": {"inline": cost(inline), "worker": cost(worker)}})
    # A row that was disturbed, and shows it, must not spoil the others.
    lost = {"cpu_window_ms": {"median": -50.0, "min": -1e5, "max": 1e5}}
    rows.append(rows[-1] | {"arms": {"inline": lost, "worker": lost}})
    found = offload_rows.fit(rows)
    for rates, wanted in ((found["inline"]["lowrank"], inline), (found["worker"], worker)):
        got = [rates[key] for key in ("block", "operation", "byte")]
        assert got == pytest.approx(wanted, rel=1e-2)
        assert rates["median_relative_error"] < 1e-2


@pytest.mark.parametrize(
    ("sharded", "blocks"),
    [
        pytest.param("no-sharded", (2,), id="one rank"),
        pytest.param("sharded", (2, 3), id="two ranks", marks=pytest.mark.slow),
    ],
)
def test_a_tiny_run(sharded: str, blocks: tuple[int, ...], tmp_path: Path) -> None:
    content = bench(
        tmp_path, "offload", "--blocks", ",".join(map(str, blocks)), "--widths", "8,100000",
        "--ranks", "2", "--rows", "4", "--interval", "4", "--repetitions", "2", f"--{sharded}",
    )  # fmt: skip
    sizes = [(row["kind"], row["blocks"], row["width"]) for row in content["results"]]
    assert sizes == [(kind, count, 8) for kind in ("lowrank", "dense") for count in blocks]
    two_cores = content["settings"]["core_of_training"] != content["settings"]["core_of_worker"]
    assert content["settings"]["sharded"] == (sharded == "sharded" and two_cores)
    arms = {"worker", "inline"} | ({"sharded"} if content["settings"]["sharded"] else set())
    for row in content["results"]:
        assert set(row["arms"]) == arms and row["repetitions"] == 2
        check_spread(row["gain"])
        check_spread(row["cpu_gain"])
        for name, arm in row["arms"].items():
            check_spread(arm["over_none"])
            check_spread(arm["cpu_over_none"])
            assert arm["step_ms"]["n"] == 8
            if name != "worker":  # the service in process is waited for
                assert arm["kept_up"] == 1.0
        assert row["measured"] in ("worker", "inline", "even")
        assert row["auto"] in ("worker", "inline")
    left_out = [(p["width"], p["reason"].split(":")[0]) for p in content["left_out"]]
    assert set(left_out) == {(100000, "memory")} and len(left_out) == 2 * len(blocks)
    assert set(content["calibration"]["inline"]) == set(CALIBRATION.inline)
    assert content["calibration"]["worker"]["block"] >= 0


def test_a_run_in_which_nothing_fits_says_so_by_its_code(tmp_path: Path) -> None:
    code = cli.main(["bench", "offload", "--widths", "100000", "--out", str(tmp_path)])
    assert code == 1
    content = json.loads((tmp_path / "offload.json").read_text(encoding="utf-8"))
    assert content["results"] == [] and content["left_out"]


@pytest.mark.gpu
def test_a_tiny_run_on_a_gpu(tmp_path: Path) -> None:
    content = bench(
        tmp_path, "offload", "--blocks", "2", "--widths", "8", "--ranks", "2", "--rows", "4",
        "--interval", "4", "--repetitions", "2", "--device", "cuda",
    )  # fmt: skip
    assert content["machine"]["device"] == "cuda" and content["settings"]["sharded"] is False
    assert {row["kind"] for row in content["results"]} == {"lowrank", "dense"}
