"""The phase clock adds up, watches methods, and the plain products are those of the apply."""

from __future__ import annotations

import time

import pytest
import torch

from distcurv.bench.step_phases import PhaseClock, seconds
from distcurv.bench.step_rate import PlainProducts
from distcurv.curvature.spec import BlockSpec, SideSpec
from distcurv.errors import StateError


class Worker:
    def __init__(self) -> None:
        self.calls = 0

    def work(self, duration: float) -> float:
        self.calls += 1
        end = time.perf_counter() + duration
        while time.perf_counter() < end:
            pass
        return duration


def test_inner_phases_stop_the_outer_one() -> None:
    clock, worker = PhaseClock("cpu"), Worker()
    clock.watch(worker, "work", "capture")
    worker.work(0.0)  # outside a step: nothing is charged
    start = time.perf_counter()
    clock.start("forward_backward")
    assert worker.work(0.02) == 0.02
    clock.to("apply")
    spent = seconds(clock.stop())
    whole = time.perf_counter() - start
    assert worker.calls == 2
    assert list(spent) == ["forward_backward", "capture", "apply"]
    assert 0.02 <= spent["capture"] <= whole
    assert spent["forward_backward"] + spent["apply"] <= whole - 0.02


def test_a_phase_ends_with_an_error() -> None:
    class Broken:
        def work(self) -> None:
            raise RuntimeError("broken")

    clock, broken = PhaseClock("cpu"), Broken()
    clock.watch(broken, "work", "capture")
    clock.start("forward_backward")
    with pytest.raises(RuntimeError, match="broken"):
        broken.work()
    marks = clock.stop()
    assert [phase for phase, _ in marks] == ["forward_backward", "capture", "forward_backward", ""]


def test_watching_what_is_not_there_is_an_error() -> None:
    with pytest.raises(StateError, match=r"Worker\.rest.*step_hooks"):
        PhaseClock("cpu").watch(Worker(), "rest", "capture")


@pytest.mark.gpu
def test_on_cuda_a_phase_has_the_time_of_the_device() -> None:
    clock = PhaseClock("cuda")
    x = torch.randn(4096, 4096, device="cuda")
    clock.start("forward_backward")
    for _ in range(20):
        x @ x
    clock.to("apply")
    marks = clock.stop()
    torch.cuda.synchronize()
    spent = seconds(marks)
    assert spent["forward_backward"] > 20 * 1e-4 > spent["apply"]  # 137 GFLOP take 0.1 ms and more


def spec(kind: str, sides: tuple[tuple[int, int], ...]) -> BlockSpec:
    return BlockSpec("w", kind, tuple(SideSpec(dim, rank) for dim, rank in sides), 0.9)


def test_plain_products_have_the_flops_of_the_apply() -> None:
    # Di = 30 at rank 4, Do = 20 at rank 3: X U_A and back, U_Gᵀ X and back.
    low = PlainProducts([spec("lowrank", ((30, 4), (20, 3)))], "cpu")
    assert low.flops == 2 * 2 * 20 * 30 * (4 + 3)
    assert low.seconds() > 0
    dense = PlainProducts([spec("dense", ((30, 30), (20, 20)))], "cpu")
    assert dense.flops == 2 * 20 * 30 * (30 + 20)
    assert dense.seconds() > 0


def test_diagonals_and_blocks_of_one_side_have_no_products() -> None:
    one = BlockSpec("n", "unitwise", (SideSpec(64, 0, "diagonal", "unit"),), 0.9)
    assert PlainProducts([one], "cpu").flops == 0
    ids, features = SideSpec(30, 0, "diagonal", "diagonal"), SideSpec(20, 3)
    low = PlainProducts([BlockSpec("e", "lowrank", (ids, features), 0.9), one], "cpu")
    assert low.flops == 2 * 2 * 20 * 30 * 3
    dense = PlainProducts([BlockSpec("e", "dense", (ids, SideSpec(20, 20)), 0.9)], "cpu")
    assert dense.flops == 2 * 20 * 30 * 20
    assert dense.seconds() > 0
