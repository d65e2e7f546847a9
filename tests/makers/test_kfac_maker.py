"""KfacGradientMaker and the shapes that are Kronecker products against the dense definition.

Tolerance: factors are float32 sums, damping is 0.1: 1e-4, relative to the expected gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
import torch
from kfac_oracle import (
    Factors,
    doubled,
    factors,
    layers,
    matrix_of,
    norms,
    relative,
    solved,
    unit_squares,
    units_solved,
)
from maker_models import batch_of, loss_of, model_of, plain_gradients
from torch import Tensor, nn
from torch.nn import functional as F

from distcurv.errors import ConfigError
from distcurv.makers import PreconditioningConfig
from distcurv.makers.kfac import KfacGradientMaker
from distcurv.makers.natural_gradient import NaturalGradientMaker
from distcurv.train.likelihoods import Categorical

DAMPING = 0.1
EPS = 1e-4
MODELS = ("mlp", "conv", "tokens")


def config(**settings: Any) -> PreconditioningConfig:
    return PreconditioningConfig(**{"damping": DAMPING, **settings})


def step(gm: NaturalGradientMaker, model: nn.Module, name: str, at: int) -> dict[str, Tensor]:
    """One step of a maker on a batch; the gradients that it leaves."""
    x, t = batch_of(name, at)
    model.zero_grad()
    dummy = gm.setup_model_call(model, x)
    classes = dummy.flatten(0, -2) if name == "tokens" else dummy
    gm.setup_loss_call(F.cross_entropy, classes, t.flatten())
    gm.forward_and_backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def empirical(model: nn.Module, name: str, at: int) -> Factors:
    x, t = batch_of(name, at)
    x = x.double() if x.is_floating_point() else x
    return factors(doubled(model), x, lambda z: t.numel() * loss_of(z, t), t.numel())


def assert_solved(
    model: nn.Module,
    found: dict[str, Tensor],
    raw: dict[str, Tensor],
    expected: Factors,
    damping: float = DAMPING,
    scale: float = 1.0,
    times: float = 1.0,
    eps: float = EPS,
) -> None:
    for name, module in layers(model).items():
        direction = times * solved(*expected[name], matrix_of(module, raw, name), damping, scale)
        assert relative(matrix_of(module, found, name), direction) < eps, name
        assert relative(matrix_of(module, raw, name), direction) > 0.1, name


# -- the definition -----------------------------------------------------------------------

FORMS: dict[str, Callable[[nn.Module], NaturalGradientMaker]] = {
    "dense": lambda m: KfacGradientMaker(m, config(), "fisher_emp"),
    "eigen": lambda m: KfacGradientMaker(m, config(), "fisher_emp", eigen=True),
    "full-rank": lambda m: KfacGradientMaker(m, config(rank=100), "fisher_emp"),
    "natural-gradient": lambda m: NaturalGradientMaker(m, config(), "fisher_emp", "kron"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_the_damped_kronecker_inverse(form: str, name: str) -> None:
    model = model_of(name)
    with closing(FORMS[form](model)) as gm:
        found = step(gm, model, name, 0)
        raw, expected = plain_gradients(model, name, 0), empirical(model, name, 0)
        assert_solved(model, found, raw, expected)


def test_norms_get_a_matrix_for_each_unit() -> None:
    model = model_of("tokens")
    with closing(KfacGradientMaker(model, config(), "fisher_emp")) as gm:
        found = step(gm, model, "tokens", 0)
    raw = plain_gradients(model, "tokens", 0)
    x, t = batch_of("tokens", 0)
    squares = unit_squares(doubled(model), x, lambda z, n: t[n].numel() * loss_of(z, t[n : n + 1]))
    for name in norms(model):
        expected = units_solved(squares[name] / t.numel(), raw, name, DAMPING)
        got = torch.stack([found[f"{name}.weight"], found[f"{name}.bias"]], 1).double()
        assert relative(got, expected) < EPS


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_fisher_exact_enumerates_the_classes(name: str) -> None:
    model = model_of(name)
    with closing(KfacGradientMaker(model, config(), "fisher_exact")) as gm:
        found = step(gm, model, name, 0)
    x, _ = batch_of(name, 0)
    total: Factors = {}
    for label in range(3):
        targets = torch.full((len(x),), label)

        def weighted(z: Tensor, targets: Tensor = targets) -> Tensor:
            p = z.softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1).detach()
            return (p.sqrt() * F.cross_entropy(z, targets, reduction="none")).sum()

        for key, (A, G) in factors(doubled(model), x.double(), weighted, len(x)).items():
            total[key] = (A, G + total[key][1]) if key in total else (A, G)
    assert_solved(model, found, plain_gradients(model, name, 0), total)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_fisher_mc_draws_from_the_model_with_its_seed(name: str, samples: int) -> None:
    model = model_of(name)
    maker = KfacGradientMaker(model, config(), n_mc_samples=samples, seed=5)
    with closing(maker) as gm:
        first = step(gm, model, name, 0)
        again = step(gm, model, name, 0)
    assert all(torch.equal(first[key], again[key]) for key in first)
    x, _ = batch_of(name, 0)
    with torch.no_grad():
        logits = model(x)
    generator = torch.Generator().manual_seed(5)
    total: Factors = {}
    for _ in range(samples):
        drawn = Categorical().sample(logits, generator)
        x = x.double() if x.is_floating_point() else x
        for key, (A, G) in factors(
            doubled(model),
            x,
            lambda z, drawn=drawn: drawn.numel() * loss_of(z, drawn),
            drawn.numel(),
        ).items():
            so_far = total[key][1] if key in total else 0.0
            total[key] = (A, so_far + G / samples)
    assert_solved(model, first, plain_gradients(model, name, 0), total)


def test_draws_differ_between_steps_without_a_seed() -> None:
    model = model_of("mlp")
    with closing(KfacGradientMaker(model, config())) as gm:
        first, second = (step(gm, model, "mlp", 0) for _ in range(2))
    assert not torch.equal(first["0.weight"], second["0.weight"])


# -- averages, scales, sizes --------------------------------------------------------------


def test_ema_decay_is_the_weight_of_the_new_statistic() -> None:
    model, weight = model_of("conv"), 0.3
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with closing(KfacGradientMaker(model, config(ema_decay=weight), "fisher_emp")) as gm:
        for at in range(3):
            found = step(gm, model, "conv", at)
            for key, pair in empirical(model, "conv", at).items():
                kept.setdefault(key, []).append(pair)
    shares = [weight * (1 - weight) ** age for age in (2, 1, 0)]
    expected = {
        key: tuple(
            sum(s * pair[side] for s, pair in zip(shares, pairs, strict=True)) / sum(shares)
            for side in (0, 1)
        )
        for key, pairs in kept.items()
    }
    assert_solved(model, found, plain_gradients(model, "conv", 2), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("fisher_type", ["fisher_emp", "fisher_exact", "fisher_mc"])
def test_scale_and_grad_scale(fisher_type: str) -> None:
    """(s F + damping)^-1 (c g), here with another route to both numbers."""
    model = model_of("mlp")

    def found(damping: float, **scales: float) -> Tensor:
        maker = KfacGradientMaker(
            copy.deepcopy(model), config(damping=damping), fisher_type, seed=1, **scales
        )
        with closing(maker) as gm:
            return step(gm, gm.model, "mlp", 0)["0.weight"]

    plain = found(DAMPING / 4)
    assert torch.allclose(found(DAMPING, scale=4.0, grad_scale=2.0), plain / 2, rtol=1e-5)
    assert not torch.allclose(found(DAMPING, grad_scale=2.0), plain / 2, rtol=1e-2)


def test_scale_multiplies_the_fisher_of_the_definition() -> None:
    model = model_of("mlp")
    with closing(KfacGradientMaker(model, config(), "fisher_emp", scale=3.0, grad_scale=5.0)) as gm:
        found = step(gm, model, "mlp", 0)
    raw, expected = plain_gradients(model, "mlp", 0), empirical(model, "mlp", 0)
    assert_solved(model, found, raw, expected, scale=3.0, times=5.0)


def test_scale_meets_the_damping_of_single_blocks() -> None:
    model = model_of("mlp")
    settings = config(overrides=[("2", {"damping": 0.7})])
    with closing(KfacGradientMaker(model, settings, "fisher_emp", scale=3.0)) as gm:
        found = step(gm, model, "mlp", 0)
    raw, expected = plain_gradients(model, "mlp", 0), empirical(model, "mlp", 0)
    for name, damping in (("0", DAMPING), ("2", 0.7)):
        module = layers(model)[name]
        direction = solved(*expected[name], matrix_of(module, raw, name), damping, 3.0)
        assert relative(matrix_of(module, found, name), direction) < EPS


@pytest.mark.parametrize("fisher_type", ["fisher_emp", "fisher_mc", "fisher_exact"])
def test_data_size_divides_the_sums(fisher_type: str) -> None:
    """F of 8 samples divided by 2 is 4 times the mean."""
    model = model_of("mlp")
    found = []
    for size, scale in ((2, 1.0), (None, 4.0)):
        own = copy.deepcopy(model)
        maker = KfacGradientMaker(own, config(data_size=size), fisher_type, scale=scale, seed=2)
        with closing(maker) as gm:
            found.append(step(gm, own, "mlp", 0)["2.weight"])
    assert torch.allclose(*found, rtol=1e-5)


def test_kl_clip_bounds_the_scaled_update() -> None:
    model = model_of("mlp")
    settings = config(kl_clip=1e-3, lr=0.5)
    with closing(KfacGradientMaker(model, settings, "fisher_emp", grad_scale=10.0)) as gm:
        clipped = step(gm, model, "mlp", 0)
    with closing(KfacGradientMaker(copy.deepcopy(model), config(), "fisher_emp")) as gm:
        direction = step(gm, gm.model, "mlp", 0)
    raw = plain_gradients(model, "mlp", 0)
    inner = sum(float((direction[key] * raw[key]).sum()) for key in raw)
    factor = min(1.0, (1e-3 / (0.5**2 * 10.0**2 * inner)) ** 0.5)
    assert factor < 1
    for key in raw:
        assert torch.allclose(clipped[key], 10.0 * factor * direction[key], rtol=1e-4, atol=1e-7)


# -- shapes by module ---------------------------------------------------------------------


def test_low_rank_with_dense_first_and_last_layers() -> None:
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3))
    shapes = ["kron", (model[0], "kron_dense"), ("4", "kron_dense")]
    maker = NaturalGradientMaker(model, config(rank=2), "fisher_emp", shapes)
    with closing(maker) as gm:
        found = step(gm, model, "mlp", 0)
        text = gm.summary()
    raw, expected = plain_gradients(model, "mlp", 0), empirical(model, "mlp", 0)
    for name, near in (("0", True), ("2", False), ("4", True)):
        module = layers(model)[name]
        direction = solved(*expected[name], matrix_of(module, raw, name), DAMPING)
        assert (relative(matrix_of(module, found, name), direction) < EPS) is near
    kinds = [line.split()[3] for line in text.splitlines() if ".weight" in line]
    assert kinds == ["dense", "lowrank", "dense"]


@pytest.mark.parametrize("tails", [("none", "none"), ("isotropic", "diagonal")])
@pytest.mark.parametrize("fisher_type", ["fisher_emp", "fisher_mc", "fisher_exact"])
def test_low_rank_with_the_full_rank_is_dense(tails: tuple[str, str], fisher_type: str) -> None:
    model = model_of("conv")
    found = []
    for rank in (None, 100):
        own = copy.deepcopy(model)
        settings = config(rank=rank, tail_in=tails[0], tail_out=tails[1])
        with closing(KfacGradientMaker(own, settings, fisher_type, seed=3)) as gm:
            found.append(step(gm, own, "conv", 0)["3.weight"])
    assert relative(*found) < EPS


def test_what_is_ignored_or_has_no_shape_keeps_its_gradient() -> None:
    model = model_of("mlp")
    raw = plain_gradients(model, "mlp", 0)
    for maker in (
        KfacGradientMaker(model, config(ignore_modules=[model[2]]), "fisher_emp"),
        NaturalGradientMaker(model, config(), "fisher_emp", [("0", "kron")]),
    ):
        with closing(maker) as gm:
            found = step(gm, model, "mlp", 0)
        assert torch.equal(found["2.weight"], raw["2.weight"])
        assert not torch.allclose(found["0.weight"], raw["0.weight"], rtol=0.1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"fisher_type": "empirical"}, "fisher_type is 'empirical': use one of fisher_emp"),
        ({"loss_type": "nll"}, "loss_type is 'nll': use one of cross_entropy, mse"),
        ({"scale": 0}, "scale is 0: give a number > 0"),
        ({"grad_scale": 0}, "grad_scale is 0: give a number other than 0"),
        ({"var": 0.0}, "var is 0.0: give a number > 0"),
        ({"seed": -2}, "seed is -2: give an integer >= 0, or None"),
        ({"n_mc_samples": 0}, "n_mc_samples is 0: give an integer >= 1"),
        ({"fisher_shape": "circle"}, "the Fisher shape 'circle' is unknown: use one of"),
        ({"fisher_shape": ["kron", "diag"]}, "for all modules: give one"),
        ({"fisher_shape": [("0",)]}, r"fisher_shape has \('0',\): give a shape, or a pair"),
        ({"fisher_shape": [(7, "kron")]}, "fisher_shape has a rule for 7: give a module"),
        ({"fisher_shape": ["kron", ("0", "kron"), ("0", "kron")]}, "two rules for '0': give one"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], says: str) -> None:
    merged = {"fisher_shape": "kron", **arguments}
    with pytest.raises(ConfigError, match=says):
        NaturalGradientMaker(model_of("mlp"), config(), **merged)


def test_an_instance_that_no_rule_can_be_for_is_told() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(7, 6), nn.Tanh()), nn.Linear(6, 3), nn.Tanh())
    for instance, says in ((model[0], "has layers inside"), (nn.Linear(6, 3), "is not in the")):
        with pytest.raises(ConfigError, match=f"for a {type(instance).__name__} that {says}"):
            NaturalGradientMaker(model, config(), "fisher_emp", [(instance, "kron"), "diag"])
    # What has no parameters, or is ignored, may have a rule.
    ignored = config(ignore_modules=[model[1]])
    rules = [(model[2], "kron"), (model[1], "diag"), "kron"]
    NaturalGradientMaker(model, ignored, "fisher_emp", rules).close()


def test_forms_exclude_each_other_and_a_training_without_updates_is_refused() -> None:
    with pytest.raises(ConfigError, match="three forms of the factors: choose one"):
        KfacGradientMaker(model_of("mlp"), config(rank=2), swift=True)
    with pytest.raises(ConfigError, match="preconditioner_upd_ratio gives no update"):
        settings = config(num_total_steps=10, preconditioner_upd_ratio=0.0)
        KfacGradientMaker(model_of("mlp"), settings)
