"""Starts ranks with torchrun, collects what each of them says, and always ends every process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distcurv.launcher import tree

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RANK_MAIN = HERE / "distributed_ranks.py"


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(extra or {})}


def finish(
    words: Sequence[str], folder: Path, deadline: float, env: Mapping[str, str]
) -> int | None:
    """Run a command to its end and return its exit code, None when the deadline passed first.

    Then, and on any failure here, it and everything that it started is killed.  What it prints
    goes to ``folder/output.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "wb") as output:
        process = subprocess.Popen(
            list(words),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(env),
            start_new_session=True,
        )
        try:
            return process.wait(deadline)
        except subprocess.TimeoutExpired:
            return None
        finally:
            tree.kill(process.pid)
            process.wait()


def tail(folder: Path, size: int = 6000) -> str:
    return (folder / "output.txt").read_text(errors="replace")[-size:]


class Scenario(NamedTuple):
    """A function of distributed_ranks.py with its arguments, on the first ``ranks`` ranks."""

    key: str
    ranks: int
    function: str
    arguments: dict[str, Any]


class Results:
    """What the ranks said: ``of(key)`` is a list by rank."""

    def __init__(self, by_rank: list[dict[str, Any]], ranks: dict[str, int], folder: Path) -> None:
        self._by_rank = by_rank
        self._ranks = ranks
        self.folder = folder

    def of(self, key: str) -> list[dict[str, Any]]:
        """A scenario's results by rank; fails where a rank has none or raised."""
        found = self.raw(key)
        for rank, said in enumerate(found):
            assert "raised" not in said, f"rank {rank} in {key}: {said['trace']}"
        return found

    def raw(self, key: str) -> list[dict[str, Any]]:
        """The same, with ``raised`` and ``text`` of those that raised."""
        taking_part = self._by_rank[: self._ranks[key]]
        for rank, results in enumerate(taking_part):
            assert key in results, f"rank {rank} did not finish {key}\n" + tail(self.folder)
        return [results[key] for results in taking_part]

    def tensors(self, key: str, rank: int = 0) -> Any:
        """What the rank saved for a scenario."""
        return torch.load(self.folder / f"{key}.rank{rank}.pt", weights_only=True)


def run_ranks(
    scenarios: Sequence[Scenario],
    folder: Path,
    deadline: float = 600.0,
    env: Mapping[str, str] | None = None,
) -> Results:
    """Run scenarios one after the other in one torchrun job, as many processes as the largest
    needs; starting processes is what takes the time."""
    ranks = max(scenario.ranks for scenario in scenarios)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scenarios.json").write_text(json.dumps([*scenarios]))
    words = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), str(RANK_MAIN), str(folder), str(deadline)),
    ]
    finish(words, folder, deadline, environment(env))
    paths = [folder / f"rank{rank}.json" for rank in range(ranks)]
    by_rank = [json.loads(path.read_text()) if path.exists() else {} for path in paths]
    return Results(by_rank, {scenario.key: scenario.ranks for scenario in scenarios}, folder)


def until(condition: Callable[[], Any], what: str, deadline: float = 120.0) -> Any:
    """Wait for something true and return it; fails after ``deadline`` seconds."""
    end = time.monotonic() + deadline
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {deadline:g} s: {what}"
        time.sleep(0.01)
    return found


def send(pid: int, signum: signal.Signals) -> None:
    os.kill(pid, signum)
