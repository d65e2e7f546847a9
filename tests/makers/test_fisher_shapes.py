"""Makers whose Fisher matrix is no product of two, and EKFAC, against dense float64 definitions.

F is the sum over samples of g gᵀ, g the gradient of a sample's summed loss, over the number of the
loss's terms. Tolerance: statistics and inverses are float32, damping is 0.1: 1e-4.
"""

from __future__ import annotations

import copy
from contextlib import closing
from typing import Any

import pytest
import torch
from kfac_oracle import doubled, relative
from maker_models import batch_of, model_of
from quasi_newton_models import move
from torch import Tensor, nn
from torch.nn import functional as F

from distcurv.errors import ConfigError
from distcurv.makers import (
    DiagNaturalGradientMaker,
    EkfacGradientMaker,
    EmpNaturalGradientMaker,
    FullNaturalGradientMaker,
    LayerWiseNaturalGradientMaker,
    NaturalGradientMaker,
    PreconditioningConfig,
    UnitWiseNaturalGradientMaker,
)

DAMPING, EMA, EPS = 0.1, 0.4, 1e-4
MAKERS: dict[str, Any] = {
    "full": FullNaturalGradientMaker,
    "layer_wise": LayerWiseNaturalGradientMaker,
    "unit_wise": UnitWiseNaturalGradientMaker,
    "diag": DiagNaturalGradientMaker,
}
MODELS = ("mlp", "conv", "tokens")
Named = dict[str, Tensor]


def config(**settings: Any) -> PreconditioningConfig:
    return PreconditioningConfig(**{"damping": DAMPING, **settings})


def sample_gradients(model: nn.Module, name: str, at: int) -> tuple[list[Named], int]:
    """Of each sample's summed loss, and the number of terms."""
    x, t = batch_of(name, at)
    twin, rows = doubled(model), []
    for n in range(len(x)):
        own = x[n : n + 1].double() if x.is_floating_point() else x[n : n + 1]
        twin.zero_grad()
        logits = twin(own)
        F.cross_entropy(logits.flatten(0, -2), t[n : n + 1].flatten(), reduction="sum").backward()
        rows.append({k: p.grad.clone() for k, p in twin.named_parameters() if p.grad is not None})
    return rows, t.numel()


def step(gm: NaturalGradientMaker, model: nn.Module, name: str, at: int) -> tuple[Named, Named]:
    """One step: the gradients of the loss and what the maker makes of them."""
    x, t = batch_of(name, at)
    twin = copy.deepcopy(model)
    twin.zero_grad()
    F.cross_entropy(twin(x).flatten(0, -2), t.flatten()).backward()
    raw = {n: p.grad.double() for n, p in twin.named_parameters() if p.grad is not None}
    model.zero_grad()
    y = gm.setup_model_call(model, x)
    gm.setup_loss_call(F.cross_entropy, y.flatten(0, -2), t.flatten())
    gm.forward_and_backward()
    return raw, {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def groups(model: nn.Module, shape: str) -> list[list[tuple[str, Any]]]:
    """Which numbers share a matrix: (name of the parameter, index)."""
    layers: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        layers.setdefault(name.rpartition(".")[0], []).append(name)
        assert parameter.requires_grad
    if shape == "full":
        return [[(name, ...) for names in layers.values() for name in names]]
    if shape == "layer_wise":
        return [[(name, ...) for name in names] for names in layers.values()]
    params = dict(model.named_parameters())
    if shape == "diag":
        indices = {name: torch.ones_like(p).nonzero().tolist() for name, p in params.items()}
        return [[(name, tuple(i))] for name, own in indices.items() for i in own]
    made = []
    for layer, names in layers.items():
        module = model.get_submodule(layer)
        columns = isinstance(module, nn.Embedding)  # its outputs are dimension 1
        units = params[names[0]].shape[1 if columns else 0]
        made += [[(n, (slice(None), i) if columns else (i,)) for n in names] for i in range(units)]
    return made


def taken(grads: Named, group: list[tuple[str, Any]]) -> Tensor:
    parts = []
    for name, index in group:
        own = grads[name] if index is ... else grads[name][tuple(index)]
        parts.append(own.reshape(-1))
    return torch.cat(parts)


def assert_direction(
    model: nn.Module, shape: str, arrived: list[tuple[list[Named], int]], raw: Named, got: Named
) -> None:
    """Every group of numbers solved by itself; ``arrived`` from the oldest step on."""
    weights = [(1 - EMA) ** (len(arrived) - 1 - i) for i in range(len(arrived))]
    for group in groups(model, shape):
        fisher: Any = 0.0
        for weight, (rows, terms) in zip(weights, arrived, strict=True):
            v = torch.stack([taken(row, group) for row in rows])
            fisher = fisher + weight / sum(weights) * (v.mT @ v) / terms
        g = taken(raw, group)
        wanted = torch.linalg.solve(fisher + DAMPING * torch.eye(len(g)).double(), g)
        if not g.any():
            assert not taken(got, group).any()
            continue
        assert relative(taken(got, group), wanted) < EPS, (shape, group[0])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", MAKERS)
def test_the_direction_is_that_of_the_definition(shape: str, name: str) -> None:
    model = model_of(name)
    with closing(MAKERS[shape](model, config(ema_decay=EMA), "fisher_emp")) as gm:
        arrived = []
        for at in range(2):
            arrived.append(sample_gradients(model, name, at))
            raw, got = step(gm, model, name, at)
            assert_direction(model, shape, arrived, raw, got)
    everything = [torch.cat([g.flatten() for g in grads.values()]) for grads in (raw, got)]
    assert relative(everything[0], everything[1]) > 0.1, "not the raw gradient"


def weighed(model: nn.Module, name: str, loss_type: str) -> tuple[list[Named], int]:
    """Vectors whose squares add up to the exact Fisher matrix: of each sample and class the
    gradient of its loss times the root of its probability; of each output its own gradient over
    the standard deviation (2)."""
    x, _ = batch_of(name, 0)
    twin, rows = doubled(model), []
    logits = twin(x.double())
    for n, c in torch.ones_like(logits).nonzero().tolist():
        if loss_type == "mse":
            made = logits[n, c] / 2.0
        else:
            p = logits[n].softmax(-1)[c].detach()
            made = -p.sqrt() * logits[n].log_softmax(-1)[c]
        named = dict(twin.named_parameters())
        grads = torch.autograd.grad(made, list(named.values()), retain_graph=True)
        rows.append(dict(zip(named, grads, strict=True)))
    return rows, len(x) * (logits.shape[1] if loss_type == "mse" else 1)


@pytest.mark.parametrize("loss_type", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", ["mlp", "conv"])
@pytest.mark.parametrize("shape", MAKERS)
def test_fisher_exact_is_that_of_the_model_s_distribution(
    shape: str, name: str, loss_type: str
) -> None:
    """Of a squared error each output is a term."""
    model = model_of(name)
    options = {"loss_type": loss_type, "var": 4.0}
    with closing(MAKERS[shape](model, config(), "fisher_exact", **options)) as gm:
        x, t = batch_of(name, 0)
        goal: Any = (F.cross_entropy, t) if loss_type != "mse" else (F.mse_loss, torch.ones(8, 3))
        raw = torch.autograd.grad(goal[0](model(x), goal[1]), list(model.parameters()))
        gm.setup_loss_call(goal[0], gm.setup_model_call(model, x), goal[1])
        gm.forward_and_backward()
    named = dict(model.named_parameters())
    got = {key: p.grad.double() for key, p in named.items() if p.grad is not None}
    plain = {key: g.double() for key, g in zip(named, raw, strict=True)}
    assert_direction(model, shape, [weighed(model, name, loss_type)], plain, got)


@pytest.mark.parametrize("shape", MAKERS)
def test_fisher_mc_is_its_expectation(shape: str) -> None:
    """Over many draws; 500 leave some percent."""
    model = model_of("mlp")
    found = []
    for fisher_type, draws in (("fisher_exact", 1), ("fisher_mc", 500)):
        own = copy.deepcopy(model)
        maker = MAKERS[shape](own, config(), fisher_type, n_mc_samples=draws, seed=1)
        with closing(maker) as gm:
            _, got = step(gm, own, "mlp", 0)
        found.append(torch.cat([grad.flatten() for grad in got.values()]))
    assert relative(found[1], found[0]) < 0.08


def test_without_an_average_the_newest_batch_counts_alone() -> None:
    model = model_of("mlp")
    with closing(LayerWiseNaturalGradientMaker(model, config(), "fisher_emp")) as gm:
        for at in range(3):
            raw, got = step(gm, model, "mlp", at)
        assert_direction(model, "layer_wise", [sample_gradients(model, "mlp", 2)], raw, got)


def test_emp_is_the_data_s_and_shapes_are_chosen_module_by_module() -> None:
    model = model_of("conv")
    with closing(EmpNaturalGradientMaker(model, config())) as gm:
        arrived = [sample_gradients(model, "conv", 0)]
        assert_direction(model, "full", arrived, *step(gm, model, "conv", 0))
    rules = [(nn.Conv2d, "unit_wise"), "layer_wise"]
    with closing(NaturalGradientMaker(model, config(), "fisher_emp", rules)) as gm:  # type: ignore[arg-type]
        assert gm.preconditioner is not None
        blocks = [row.block for row in gm.preconditioner.summary().rows]
        kinds = {block.name: block.kind for block in blocks if block is not None}
        modules = dict(model.named_modules())
        for block, kind in kinds.items():
            wanted = "unit_rows" if isinstance(modules[block], nn.Conv2d) else "layer_wise"
            assert kind == wanted


def test_a_model_that_is_too_large_for_one_matrix_is_told_the_bytes() -> None:
    with pytest.raises(ConfigError, match=r"'full'.*\d+ bytes"):
        FullNaturalGradientMaker(nn.Linear(300, 60), config())


# -- EKFAC --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("mlp", "conv"))
def test_ekfac_divides_by_the_second_moments_in_its_eigenbasis(name: str) -> None:
    """With other samples and parameters at each step.  ASDL's returns the raw gradient."""
    model = model_of(name)
    with closing(EkfacGradientMaker(model, config(), fisher_type="fisher_emp")) as gm:
        for at in range(4):
            rows, terms = sample_gradients(model, name, at)
            raw, got = step(gm, model, name, at)
            move(model, 0.3)
        assert gm.preconditioner is not None
        pipeline = gm.preconditioner._pipeline
        installed = dict(zip(gm.preconditioner.block_names, pipeline.installed, strict=True))
    seen = 0
    for layer, install in installed.items():
        if "A.U" not in install.tensors or "S.mean" not in install.tensors:
            continue
        seen += 1
        U_A, U_G = (install.tensors[f"{side}.basis"].double() for side in ("A", "G"))
        for U in (U_A, U_G):
            assert torch.allclose(U.mT @ U, torch.eye(len(U)).double(), atol=1e-5)

        def matrix(grads: Named, layer: str = layer) -> Tensor:
            weight = grads[f"{layer}.weight"].flatten(1)
            bias = grads.get(f"{layer}.bias")
            return weight if bias is None else torch.cat([weight, bias[:, None]], 1)

        S = sum((U_G.mT @ matrix(row) @ U_A).square() for row in rows) / terms
        wanted = U_G @ ((U_G.mT @ matrix(raw) @ U_A) / (S + DAMPING)) @ U_A.mT
        assert relative(matrix(got), wanted) < EPS, layer
        assert relative(matrix(got), matrix(raw)) > 0.1, "not the raw gradient"
        assert relative(matrix(got), matrix(raw) / DAMPING) > 0.01, "nor only damping"
    assert seen >= 2
