"""Two ranks of DistributedDataParallel make what one rank makes of the joined batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from batch_makers import DAMPING, DEFINITIONS, MODELS, make, samples_of, step_of
from batch_makers_job import RANKS, UNEVEN, run, settings, sketched, sometimes, steps
from dense_derivatives import row, trained
from torch import Tensor, nn

TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("batch-makers"))


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def joined(model_name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The ranks' samples one after the other, as the ranks have them."""
    model, x, t = make(model_name)
    order = torch.cat([torch.arange(rank, len(x), RANKS) for rank in range(RANKS)])
    return model, x[order], t[order]


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_training_on_two_ranks_is_training_on_the_joined_batch(
    job: list[dict[str, Any]], name: str, model_name: str
) -> None:
    model, x, t = joined(model_name)
    wanted = steps(DEFINITIONS[name][0](model, **settings(name)), model, x, t)
    for said in job:
        torch.testing.assert_close(said[f"{name} {model_name}"], wanted, **TOLERANCE)


def test_replicas_stay_bit_identical(job: list[dict[str, Any]]) -> None:
    first, second = job
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_ranks_draw_the_same_coordinates(job: list[dict[str, Any]]) -> None:
    model, x, t = joined("conv")
    torch.testing.assert_close(job[0]["sketched"], steps(sketched(model), model, x, t), **TOLERANCE)


@pytest.mark.parametrize("name", ["smw", "seng"])
def test_ranks_with_different_numbers_of_samples_are_averaged(
    job: list[dict[str, Any]], name: str
) -> None:
    model, x, t = make("conv")
    groups = [trained(model)]
    if name == "seng":
        groups = [[*layer.parameters()] for layer in model if [*layer.parameters()]]
    wanted = []
    for params in groups:
        ranks = [
            samples_of(model, *part, params)
            for part in zip(x.split(UNEVEN), t.split(UNEVEN), strict=True)
        ]
        F_emp = sum((R.T @ R / len(R) for R in ranks), torch.zeros(())) / RANKS
        g = sum((R.mean(0) for R in ranks), torch.zeros(())) / RANKS
        wanted.append(torch.linalg.solve(F_emp + DAMPING * torch.eye(len(g)), g))
    torch.testing.assert_close(job[0][f"{name} uneven"], torch.cat(wanted), **TOLERANCE)


def test_layers_may_have_other_positions_on_a_rank_or_no_part(job: list[dict[str, Any]]) -> None:
    model, batches = sometimes()
    wanted = []
    for layer in model.children():
        ranks = [samples_of(model, *batch, [*layer.parameters()]) for batch in batches]
        F_emp = sum((R.T @ R / len(R) for R in ranks), torch.zeros(())) / RANKS
        g = sum((R.mean(0) for R in ranks), torch.zeros(())) / RANKS
        wanted.append(torch.linalg.solve(F_emp + DAMPING * torch.eye(len(g)), g))
    torch.testing.assert_close(job[0]["seng lengths"], torch.cat(wanted), **TOLERANCE)


@pytest.mark.parametrize("way", ["bare", "method", "function"])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_wrapper_may_come_in_any_way(job: list[dict[str, Any]], name: str, way: str) -> None:
    model, x, t = joined("mlp")
    wanted = step_of(DEFINITIONS[name][0](model), model, x, t)
    torch.testing.assert_close(job[0][f"{name} {way}"], wanted, **TOLERANCE)


def test_the_plain_gradient_is_averaged(job: list[dict[str, Any]]) -> None:
    model, x, _ = joined("mlp")
    wanted = row(model(x).square().mean(), trained(model))
    torch.testing.assert_close(job[0]["plain"], wanted, **TOLERANCE)
