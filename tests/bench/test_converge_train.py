"""Single trainings of `bench converge`: the same for all methods, kept, and run in processes."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from distcurv.bench import converge_request
from distcurv.bench.converge_methods import SERVED
from distcurv.bench.converge_peers import MAKERS, PEERS
from distcurv.bench.converge_pool import Known, Pool
from distcurv.bench.converge_request import Cache, Request
from distcurv.bench.converge_search import STARTS, learning_rate
from distcurv.bench.converge_tasks import TASKS, half_squared_error, next_character
from distcurv.bench.converge_train import train
from distcurv.errors import LaunchError

DIGITS = Request("digits", "sgd", 0.02, 0, 20, 256, 10)


@pytest.mark.parametrize("method", sorted(MAKERS))
def test_every_method_trains(method: str) -> None:
    if method in PEERS:
        for module in ("pytorch_optimizer", "asdl"):
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"{module} is not installed: pip install 'distcurv[bench]'")
    delay = 10 if method in SERVED else None
    lr = learning_rate(STARTS[method])
    request = dataclasses.replace(DIGITS, method=method, lr=lr, steps=40, install_delay=delay)
    result = train(request)
    assert [step for step, _ in result["curve"]] == [0, 10, 20, 30, 40]
    assert result["final"] == result["curve"][-1][1] < 0.9 * result["curve"][0][1]
    assert result["diverged"] is None and result["step_s"] == []
    assert ("max_staleness" in result["counts"]) == (method in SERVED)
    assert train(request) == result


def test_all_methods_see_the_same_start_and_batches() -> None:
    frozen = [train(dataclasses.replace(DIGITS, method=m, lr=1e-30)) for m in ("sgd", "adamw")]
    assert frozen[0]["curve"] == frozen[1]["curve"]
    assert train(dataclasses.replace(DIGITS, seed=1))["curve"][0] != frozen[0]["curve"][0]


def test_a_divergence_is_a_result() -> None:
    result = train(dataclasses.replace(DIGITS, lr=100.0))
    assert result["final"] is None and 0 < result["diverged"] < 20
    assert "finite" in result["why"]
    assert all(math.isfinite(loss) for _, loss in result["curve"])


def test_a_training_ends_at_its_target() -> None:
    result = train(dataclasses.replace(DIGITS, steps=200, stop_at=3.0))
    assert len(result["curve"]) < 21
    assert result["curve"][-1][1] <= 3.0 < result["curve"][-2][1]


def test_times_are_of_every_step_and_nothing_is_evaluated() -> None:
    result = train(dataclasses.replace(DIGITS, eval_every=0, steps=5))
    assert len(result["step_s"]) == 5 and min(result["step_s"]) > 0
    assert result["curve"] == []


@pytest.mark.parametrize("name", sorted(TASKS))
def test_tasks_are_as_named_and_always_the_same(name: str) -> None:
    task = TASKS[name]
    samples = task.rows // task.rows_per_sample
    first, second = task.batch(3, 1, samples), task.batch(3, 1, samples)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(first[0]) == samples
    assert not torch.equal(task.batch(4, 1, samples)[0], first[0])
    assert not torch.equal(task.batch(3, 2, samples)[0], first[0])
    model = task.build(1)
    names = {key for key, _ in model.named_parameters()}
    assert task.not_hidden <= names
    with torch.no_grad():
        output = model(first[0])
    mean, total = (task.loss(output, first[1], reduction=kind) for kind in ("mean", "sum"))
    assert float(total) == pytest.approx(task.rows * float(mean), rel=1e-5)


def test_losses_are_what_they_are_called() -> None:
    output, targets = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert float(half_squared_error(output, targets)) == pytest.approx((0.5 + 2.0 + 2.0) / 2)
    logits = torch.zeros(2, 3, 5)
    assert float(next_character(logits, torch.zeros(2, 3).long())) == pytest.approx(math.log(5))


def test_large_digits_are_shifted_digits() -> None:
    images, targets = TASKS["autoencoder-big"].batch(0, 0, 64)
    assert images is targets and images.shape == (64, 784)
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    assert len(TASKS["autoencoder-big"].evaluation()[0]) == 1024


def test_results_are_kept_for_what_they_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "kept")
    ours = dataclasses.replace(DIGITS, method="lowrank-soap", install_delay=0)
    for request in (DIGITS, ours):
        assert cache.get(request) is None
        cache.put(request, {"final": 1.0})
        assert cache.get(request) == {"final": 1.0}
        assert cache.get(dataclasses.replace(request, lr=0.03)) is None
    # The service's code has changed: of all methods, only distcurv's train otherwise.
    monkeypatch.setattr(converge_request, "_CODE", ("errors.py",))
    assert cache.get(DIGITS) == {"final": 1.0}
    assert cache.get(ours) is None
    monkeypatch.setattr(converge_request, "_SETTINGS", ("errors.py",))
    assert cache.get(DIGITS) is None


def test_requests_travel_as_json() -> None:
    request = dataclasses.replace(DIGITS, stop_at=0.1, hardware="ranks", repetition=2)
    assert Request.from_json(request.to_json()) == request


def always(*requests: Request) -> Any:
    def plan(known: Known) -> tuple[Request, ...]:
        return requests

    return plan


def test_an_interrupted_pool_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [dataclasses.replace(DIGITS, seed=seed) for seed in range(4)]
    ran: list[int] = []

    def run(pool: Pool, request: Request) -> dict[str, Any]:
        if request.seed == 2 and len(ran) == 2:
            ran.append(-1)
            raise KeyboardInterrupt
        ran.append(request.seed)
        return {"final": float(request.seed)}

    monkeypatch.setattr(Pool, "_run", run)
    pool = Pool(Cache(tmp_path), 1, lambda request: None)
    with pytest.raises(KeyboardInterrupt):
        pool.complete(always(*requests))
    known = Pool(Cache(tmp_path), 1, lambda request: None).complete(always(*requests))
    assert ran == [0, 1, -1, 2, 3]
    assert [known[request]["final"] for request in requests] == [0, 1, 2, 3]


@pytest.mark.parametrize("hardware", ["threads", "ranks"])
def test_a_training_in_processes(tmp_path: Path, hardware: str) -> None:
    request = dataclasses.replace(DIGITS, method="muon", eval_every=0, steps=3, hardware=hardware)
    known = Pool(Cache(tmp_path), 1, lambda request: None).complete(always(request))
    assert len(known[request]["step_s"]) == 3


def test_a_training_with_a_worker_process(tmp_path: Path) -> None:
    pool = Pool(Cache(tmp_path), 2, lambda request: None)
    for steps in (80, 400, 2000):  # more where the worker is slower
        request = dataclasses.replace(DIGITS, method="lowrank-soap", lr=3e-3, steps=steps)
        result = pool.complete(always(request))[request]
        if result["counts"]["versions_from_workers"]:
            break
    assert result["counts"]["versions_from_workers"] > 0
    assert result["counts"]["statistics_dropped"] == 0
    assert result["final"] < 2.0


def test_a_training_that_fails_says_why(tmp_path: Path) -> None:
    request = dataclasses.replace(DIGITS, task="nothing")
    with pytest.raises(LaunchError, match="'nothing'"):
        Pool(Cache(tmp_path), 1, lambda request: None).complete(always(request))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["adamw", "lowrank-soap"])
def test_a_training_on_a_gpu_is_that_on_the_cpu(method: str) -> None:
    delay = 10 if method in SERVED else None
    request = dataclasses.replace(DIGITS, method=method, lr=2e-3, install_delay=delay)
    here, there = train(request), train(dataclasses.replace(request, device="cuda"))
    for (_, loss), (_, other) in zip(here["curve"], there["curve"], strict=True):
        assert other == pytest.approx(loss, rel=1e-2)


@pytest.mark.gpu
def test_times_of_steps_on_a_gpu() -> None:
    result = train(dataclasses.replace(DIGITS, steps=3, eval_every=0, device="cuda"))
    assert len(result["step_s"]) == 3 and min(result["step_s"]) > 0
