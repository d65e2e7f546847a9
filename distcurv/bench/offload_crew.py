"""The processes of `bench offload`: one rank alone, two ranks together, and a worker.

The rank alone trains on the first core, with and without the worker on the second; the two ranks
have a core each.  Both are compared with their own training without refreshes, so that what the
second rank takes from the first (cache, memory) is not taken for the price of refreshing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from distcurv.bench.clock import Cores, pinned
from distcurv.errors import StateError
from distcurv.launcher.supervisor import Supervisor

_END_PATIENCE_S = 10.0


class Players:
    """The ranks of one job: `ask` gives all of them the same order and waits for all answers."""

    def __init__(
        self,
        cores: Sequence[int | None],
        meeting: Path,
        complaints: Path,
        device: str = "cpu",
    ) -> None:
        self._complaints = complaints.open("w+", encoding="utf-8")
        self._processes = []
        for rank, core in enumerate(cores):
            request = {
                "rank": rank,
                "ranks": len(cores),
                "meeting": str(meeting),
                "device": device,
            }
            module = "distcurv.bench.offload_player"
            with pinned(core):  # what is started here stays on that core
                self._processes.append(
                    subprocess.Popen(
                        [
                            sys.executable,
                            "-m",
                            module,
                            json.dumps(request),
                        ],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=self._complaints,
                        text=True,
                    )
                )

    def ask(self, **order: Any) -> list[dict[str, Any]]:
        """The answers by rank.

        Raises:
            StateError: a rank could not obey, or has ended."""
        try:
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(json.dumps(order) + "\n")
                process.stdin.flush()
        except OSError as error:
            raise StateError(self._died()) from error
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise StateError(self._died())
            answers.append(json.loads(line))
        for answer in answers:
            if "error" in answer:
                raise StateError(answer["error"])
        return answers

    def _died(self) -> str:
        self._complaints.seek(0)
        lines = self._complaints.read().strip().splitlines() or ["it said nothing"]
        return f"a training process ended: {lines[-1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with suppress(OSError):  # it may have ended already
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(_END_PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
        self._complaints.close()


class Crew:
    """All processes, at work on one point after the other."""

    def __init__(self, solo: Players, pair: Players | None, endpoints: Sequence[str]) -> None:
        self.jobs = {"solo": solo} | ({} if pair is None else {"pair": pair})
        self.endpoints = endpoints

    def build(self, job: str, arms: Sequence[str], point: dict[str, str | int]) -> None:
        """Make the arms of a point in the processes of a job."""
        self.jobs[job].ask(do="build", point=point, arms=arms, endpoints=self.endpoints)

    def run(self, job: str, arm: str, steps: int) -> dict[str, Any]:
        """A turn of one arm; of two ranks the slower one counts, step by step."""
        answers = self.jobs[job].ask(do="run", arm=arm, steps=steps)
        return {
            "ms": [max(both) for both in zip(*(a["ms"] for a in answers), strict=True)],
            **{key: max(a[key] for a in answers) for key in answers[0] if key != "ms"},
        }

    def drop(self) -> None:
        """Give back the memory of the point."""
        for players in self.jobs.values():
            players.ask(do="drop")


@contextmanager
def make_crew(cores: Cores, *, pair: bool, device: str = "cpu") -> Iterator[Crew]:
    """Everything that a run needs, started; it ends with the body."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="distcurv-bench-")))
        with pinned(cores.worker):
            worker = stack.enter_context(
                Supervisor(
                    workers=1,
                    devices=(device,),
                    threads=1,
                    env={"OMP_NUM_THREADS": "1"},
                    report=lambda text: None,
                )
            )
        one = [cores.training]
        solo = stack.enter_context(Players(one, folder / "solo", folder / "solo.err", device))
        two = None
        if pair:
            both = [cores.training, cores.worker]
            two = stack.enter_context(Players(both, folder / "pair", folder / "pair.err", device))
        yield Crew(solo, two, worker.endpoints)
