"""One training process of `bench offload`: builds arms, runs turns of them, answers with times.

Run as ``python -m distcurv.bench.offload_player JSON``.  Orders come as lines of JSON on stdin,
each is answered by one line on stdout; the end of stdin ends the process.  Two players that meet
in a file are the two ranks of a job.  A process of its own can be pinned, may die of a point that
is too large, and gives back all of its memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distcurv.bench.clock import now
from distcurv.bench.offload_points import Point
from distcurv.errors import DistcurvError, StateError
from distcurv.launcher import lifeline
from distcurv.train import metrics
from distcurv.train.preconditioner import Preconditioner

_LR = 1e-6  # a step's time must not depend on how training goes
_PATIENCE_S = 600.0


@dataclass
class Arm:
    """A model under training, with its preconditioner."""

    train_step: Callable[[], torch.Tensor]
    precond: Preconditioner

    def settle(self) -> None:
        """Wait until nothing is under way, so that this arm disturbs no other.

        Raises:
            StateError: what was sent is not answered."""
        _await(lambda: not self._counts()["statistics_in_flight"], "a refresh was not finished")

    def connect(self) -> None:
        """Wait for its worker, if it has one.

        Raises:
            StateError: the worker does not answer."""
        _await(lambda: self._counts()["links_up"] == self._counts()["links_total"], "no worker")

    def _counts(self) -> dict[str, float | int]:
        return metrics.collect(self.precond._pipeline)


def make_arm(point: Point, name: str, endpoints: Sequence[str], device: str = "cpu") -> Arm:
    """One arm: ``none`` refreshes once at its first step, ``worker`` at ``endpoints``, the others
    in process."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(point.width, point.width, bias=False) for _ in range(point.blocks))
    )
    for layer in model:
        assert isinstance(layer, nn.Linear)
        nn.init.normal_(layer.weight, std=point.width**-0.5)  # keeps the size of what passes
    model.to(device)
    inputs = torch.randn(point.rows, point.width).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=_LR)
    precond = Preconditioner(
        model,
        point.config(refreshing=name != "none"),
        workers=list(endpoints) if name == "worker" else "inline",
    )

    def train_step() -> torch.Tensor:
        loss = model(inputs).square().mean()
        loss.backward()
        precond.step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Arm(train_step, precond)


class Player:
    """Keeps the arms of one point and obeys orders."""

    def __init__(self, device: str = "cpu") -> None:
        self._arms: dict[str, Arm] = {}
        self._device = device

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """``build`` a point's arms, ``run`` a turn of one, or ``drop`` them."""
        if order["do"] == "build":
            self._drop()
            point = Point(**order["point"])
            for name in order["arms"]:
                self._arms[name] = make_arm(point, name, order["endpoints"], self._device)
                self._arms[name].connect()
            return {}
        if order["do"] == "run":
            return self._run(self._arms[order["arm"]], order["steps"])
        self._drop()
        return {}

    def _run(self, arm: Arm, steps: int) -> dict[str, Any]:
        before = arm._counts()["versions_installed"]
        each_ms: list[float] = []
        loss = torch.zeros(())
        processor = time.process_time()
        for _ in range(steps):
            start = now(self._device)
            loss = arm.train_step()
            each_ms.append(1e3 * (now(self._device) - start))
        cpu_ms = 1e3 * (time.process_time() - processor) / steps
        counts = arm._counts()
        arm.settle()
        if not bool(torch.isfinite(loss)):
            raise StateError("the loss is not finite: its times mean nothing")
        return {
            "ms": each_ms,
            "cpu_ms": cpu_ms,
            "installs": counts["versions_installed"] - before,
            "staleness": counts["max_staleness"],
            "failures": counts["refresh_failures"],
        }

    def _drop(self) -> None:
        for arm in self._arms.values():
            arm.precond.close()
        self._arms.clear()


def _await(done: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not done():
        if time.monotonic() > deadline:
            raise StateError(f"{otherwise} within {_PATIENCE_S:g} s")
        time.sleep(0.002)


def main(text: str) -> int:
    """Obey until stdin ends."""
    lifeline.die_with_parent()
    request = json.loads(text)
    torch.set_num_threads(1)
    if request["ranks"] > 1:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{request['meeting']}",
            rank=request["rank"],
            world_size=request["ranks"],
        )
    player = Player(request["device"])
    for line in sys.stdin:
        try:
            answer = player.obey(json.loads(line))
        except (DistcurvError, MemoryError, RuntimeError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    if request["ranks"] > 1:
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
