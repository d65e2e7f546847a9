"""`bench capture`: the same steps with and without capture, and a whole record."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench_runs import bench
from torch import nn
from torch.nn.modules import module as torch_module

from distcurv.bench import capture_turns, step_models
from distcurv.bench.capture_turns import VARIANTS, measure
from distcurv.bench.step_models import MODELS, Problem


def tiny_problem() -> Problem:
    """A model that takes no time, in place of a real one."""
    inputs = torch.rand(8, 12)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 12))
    return Problem(
        model, inputs, inputs, lambda out: out, nn.functional.binary_cross_entropy_with_logits
    )


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_models, "MODELS", {**MODELS, "autoencoder": tiny_problem})


@pytest.mark.usefixtures("tiny")
def test_a_variant_is_watched_while_it_runs_or_never(monkeypatch: pytest.MonkeyPatch) -> None:
    watched: dict[str, set[int]] = {}
    take_turns = capture_turns._take_turns

    def looking(steppers, *rest):  # type: ignore[no-untyped-def]
        def look(name: str, hooks: int) -> None:
            watched.setdefault(name, set()).add(hooks)

        def watching(name: str):  # type: ignore[no-untyped-def]
            def step() -> None:
                inner = capture_turns._backward
                monkeypatch.setattr(
                    capture_turns,
                    "_backward",
                    lambda problem: (
                        look(name, len(torch_module._global_forward_hooks)),
                        inner(problem),
                    ),
                )
                steppers[name]()
                monkeypatch.setattr(capture_turns, "_backward", inner)

            return step

        return take_turns({name: watching(name) for name in steppers}, *rest)

    monkeypatch.setattr(capture_turns, "_take_turns", looking)
    rows = measure("autoencoder", "cpu", 4, 2, 2)
    assert [row["variant"] for row in rows] == list(VARIANTS)
    assert watched == {"base": {0}, "none": {0}, "disarmed": {0}, "armed": {1}}
    assert not torch_module._global_forward_hooks


@pytest.mark.usefixtures("tiny")
def test_a_run_leaves_a_whole_record(tmp_path: Path) -> None:
    options = ["--models", "autoencoder", "--rank", "4", "--repetitions", "3", "--steps", "2"]
    content = bench(tmp_path, "capture", *options)
    assert [row["variant"] for row in content["results"]] == list(VARIANTS)
    for row in content["results"]:
        for key in ("ms", "ratio"):
            found = row[key]
            assert 0 < found["lower"] <= found["median"] <= found["upper"]
            assert found["n"] == 3
