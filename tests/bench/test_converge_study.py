"""The plan and the rows of `bench converge`, on invented losses and times."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from distcurv.bench.converge_request import Request
from distcurv.bench.converge_rows import Pace, crossing, pace_of, rows_of
from distcurv.bench.converge_search import STARTS, learning_rate
from distcurv.bench.converge_study import Study
from distcurv.bench.staleness_study import StalenessStudy

STUDY = Study(
    task="autoencoder-big",
    methods=("sgd", "muon", "soap", "lowrank-soap"),
    points=7,
    seeds=3,
    steps=100,
    stretch=2,
    target_of="muon",
    install_delay=None,
    equal=True,
    repetitions=2,
)
# Loss per step of a straight line from 10, at the best learning rate: muon ends at 5 on seed 0.
SLOPES: Mapping[str, float] = {"sgd": 0.02, "muon": 0.05, "soap": 0.08, "lowrank-soap": 0.04}
STEP_S: Mapping[str, float] = {"sgd": 0.01, "muon": 0.1, "soap": 0.2, "lowrank-soap": 0.02}


def invented(request: Request) -> dict[str, Any]:
    """A loss that is lowest at the method's second point above its start."""
    about = {"about": request.method, "counts": {}, "why": None}
    if request.timed:
        share = {"one": 1.0, "threads": 0.8, "ranks": 0.6}[request.hardware]
        share *= 1.0 if request.repetition else 1.2
        step_s = [share * STEP_S[request.method]] * request.steps
        return about | {"curve": [], "final": None, "diverged": None, "step_s": step_s}
    off = next(
        off for off in range(-20, 20)
        if learning_rate(STARTS[request.method] + 2 + off) == request.lr
    )  # fmt: skip
    if off > 1:
        return about | {"curve": [(0, 10.0)], "final": None, "diverged": 7, "step_s": []}
    slope = SLOPES[request.method] * (1 - 0.1 * abs(off)) * (1 - 0.01 * request.seed)
    curve = []
    for step in range(0, request.steps + 1, request.eval_every):
        curve.append((step, 10 - slope * step))
        if request.stop_at is not None and curve[-1][1] <= request.stop_at:
            break
    return about | {"curve": curve, "final": curve[-1][1], "diverged": None, "step_s": []}


def whole(study: Study) -> tuple[dict[Request, dict[str, Any]], list[Request]]:
    known: dict[Request, dict[str, Any]] = {}
    order: list[Request] = []
    while wanted := [r for r in dict.fromkeys(study.losses_wanted(known)) if r not in known]:
        known |= {request: invented(request) for request in wanted}
        order += wanted
    times = study.times_wanted(known)
    known |= {request: invented(request) for request in times}
    return known, times


def test_all_methods_try_as_many_settings_and_all_are_recorded() -> None:
    known, _ = whole(STUDY)
    rows = rows_of(STUDY, known)
    assert [row["method"] for row in rows] == list(STUDY.methods)
    for row in rows:
        assert len(row["tried"]) == 7
        assert row["best_lr"] == learning_rate(STARTS[row["method"]] + 2)
        assert row["best_is_inside"]
        assert any(each["diverged_at"] == 7 and each["final"] is None for each in row["tried"])
        assert len(row["finals"]) == 3 and row["min"] <= row["mean"] <= row["max"]
    muon = rows[1]
    # 10 - 100 · 0.05 · (1, 0.99, 0.98)
    assert muon["mean"] == pytest.approx(5.05)
    off = {side: muon["lr_off"][side] for side in ("lower", "higher")}
    assert off["lower"]["over_best"] == pytest.approx(5.5 / 5 - 1)
    assert off["higher"]["lr"] == learning_rate(STARTS["muon"] + 3)


def test_who_is_short_of_the_target_trains_on_and_stops_there() -> None:
    known, _ = whole(STUDY)
    longer = [request for request in known if request.stop_at is not None]
    assert {request.method for request in longer} == {"sgd", "lowrank-soap"}
    assert all(
        request.steps == 200 and request.stop_at == pytest.approx(5.05) for request in longer
    )
    rows = {row["method"]: row for row in rows_of(STUDY, known)}
    assert rows["sgd"]["seconds_to_target"]["one-core"] is None  # 6 after 200 steps
    # 4.95 of descent at 0.05 a step; seeds 1 and 2 are slower than the mean, and count as there.
    assert rows["muon"]["steps_to_target"] == pytest.approx([99, 100, 100])
    assert rows["lowrank-soap"]["steps_to_target"][0] == pytest.approx(4.95 / 0.04)


def test_seconds_are_of_the_faster_of_what_two_cores_offer() -> None:
    known, times = whole(STUDY)
    rows = {row["method"]: row for row in rows_of(STUDY, known)}
    assert len(times) == 2 * (3 + 3 + 3 + 1)
    assert {request.method for request in times[:10]} == set(STUDY.methods)
    assert [r.hardware for r in times[:10]] != [r.hardware for r in times[10:]]
    assert rows["muon"]["equal_hardware_is"] == "ranks"
    assert rows["lowrank-soap"]["equal_hardware_is"] == "one"
    muon, ours = (rows[name]["seconds_to_target"] for name in ("muon", "lowrank-soap"))
    # The median of two repetitions, one of them 1.2 times as long.
    assert muon["one-core"]["median"] == pytest.approx(100 * 0.11)
    assert muon["equal"]["median"] == pytest.approx(100 * 0.11 * 0.6)
    assert ours["equal"] == ours["one-core"]
    sooner = rows["lowrank-soap"]["sooner_than_target_method"]
    assert sooner["equal"] == pytest.approx(muon["equal"]["median"] / ours["equal"]["median"])


def test_without_times_there_are_no_seconds() -> None:
    known = {request: result for request, result in whole(STUDY)[0].items() if not request.timed}
    for row in rows_of(STUDY, known):
        assert row["pace"] == {} and row["seconds_to_target"]["equal"] is None


def test_a_target_method_that_diverges_gives_no_target() -> None:
    study = dataclasses.replace(STUDY, seeds=1, points=1)
    known = {study.request("muon", STARTS["muon"], 0): {"final": None}}
    assert study.target(known) is None
    assert study.target({}) is None


@pytest.mark.parametrize(
    ("target", "steps"), [(11.0, 0), (10.0, 0), (9.0, 10.0), (7.0, 25.0), (6.0, 30), (5.0, None)]
)
def test_crossing(target: float, steps: float | None) -> None:
    # Down from 10 to 8, up to 8 again, down to 6: the first time counts.
    assert crossing([(0, 10.0), (20, 8.0), (30, 6.0), (40, 9.0)], target) == steps


def test_pace_keeps_the_first_steps_apart() -> None:
    pace = pace_of([[1.0, 1.0, 0.1, 0.3], [3.0, 1.0, 0.4, 0.4], [1.0, 1.0, 0.0, 0.2]], 2)
    assert pace == Pace(2, 2.0, pytest.approx(0.2))
    assert pace.seconds(1) == 1.0
    assert pace.seconds(12) == pytest.approx(4.0)


def test_every_training_is_on_the_device_that_was_asked_for() -> None:
    study = dataclasses.replace(STUDY, device="cuda", equal=False)
    known, times = whole(study)
    assert {request.device for request in (*known, *times)} == {"cuda"}
    late = StalenessStudy("digits", (64,), ("with",), (0, 5), 1, 1, 20, 10, "cuda")
    assert {request.device for request in late.wanted({})} == {"cuda"}
