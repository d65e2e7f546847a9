"""The training that every rank runs, in this process: one rank, refreshes inside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from distcurv.demo.progress import ProgressWriter
from distcurv.demo.settings import DemoSettings
from distcurv.demo.tasks import TASKS
from distcurv.demo.train import METHODS, Outcome, checksum, train


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Record:
    """Events, kept."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def __call__(self, kind: str, /, **fields: object) -> None:
        self.events.append({"kind": kind, **fields})

    def flush(self) -> None: ...

    def close(self) -> None: ...


def run(method: str, settings: DemoSettings, folder: Path) -> tuple[Outcome, Record]:
    record, progress = Record(), ProgressWriter(folder / f"{method}.jsonl")
    try:
        return train(method, settings, record, progress), record
    finally:
        progress.close()


@pytest.mark.parametrize("task", TASKS)
def test_both_methods_train_from_the_same_start(task: str, tmp_path: Path) -> None:
    settings = DemoSettings(task=task, steps=4, ranks=1, workers=0, rank=4)
    (baseline, steps), (ours, _) = (run(method, settings, tmp_path) for method in METHODS)
    problem = TASKS[task]
    model = problem.build(0)
    first = problem.loss(model, problem.batches(0, 0, 1, 0)).item()
    assert baseline.losses[0] == ours.losses[0] == pytest.approx(first, rel=1e-5)
    assert baseline.losses[1:] != ours.losses[1:]
    for outcome in (baseline, ours):
        assert len(outcome.losses) == len(outcome.step_ms) == 4
        assert outcome.losses[-1] < outcome.losses[0]
        assert min(outcome.step_ms) > 0
    assert (baseline.install_log, baseline.metrics) == ([], {})
    assert {entry[1] for entry in ours.install_log} == set(range(len(ours.block_names)))
    assert ours.metrics["versions_installed"] == len(ours.install_log)
    assert [event["step"] for event in steps.events] == [0, 1, 2, 3]
    assert all(event["t0"] < event["t1"] for event in steps.events)
    last = json.loads((tmp_path / "distcurv.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["method"]) == (4, "distcurv")


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path: Path) -> None:
    sums = []
    for seed in (0, 0, 1):
        settings = DemoSettings(steps=3, ranks=1, workers=0, rank=4, install_delay=1, seed=seed)
        sums.append(run("distcurv", settings, tmp_path)[0].checksum)
    assert sums[0] == sums[1] != sums[2]


def test_checksum_sees_one_bit() -> None:
    model = nn.Linear(3, 2)
    before = checksum(model)
    assert checksum(model) == before
    with torch.no_grad():
        model.bias[1] = torch.nextafter(model.bias[1], torch.tensor(1e9))
    assert checksum(model) != before
