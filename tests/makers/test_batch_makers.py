"""SMW, Newton, CurveBall and SENG against their dense float64 definitions, and their contract."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from batch_makers import (
    DAMPING,
    DEFINITIONS,
    MODELS,
    N,
    classes,
    curve_ball,
    gauss_newton,
    gradient_of,
    loss_of,
    make,
    samples_of,
    setup,
    step_of,
)
from dense_derivatives import flat, hessian, jacobian, row, trained
from output_cases import CASES, Case, plain_loss
from output_cases import make as make_case
from torch import Tensor, nn

from distcurv.errors import ConfigError, NumericsError, StateError
from distcurv.makers.curve_ball import CurveBallGradientConfig, CurveBallGradientMaker
from distcurv.makers.newton import NewtonGradientConfig, NewtonGradientMaker
from distcurv.makers.preconditioned import PreconditionedGradientMaker
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.smw import SmwEmpNaturalGradientConfig, SmwEmpNaturalGradientMaker

TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def plain_gradient(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return row(loss_of(model(x), t), trained(model))


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_gradient_is_the_dense_definition(name: str, model_name: str) -> None:
    maker, definition = DEFINITIONS[name]
    model, x, t = make(model_name)
    wanted = definition(model, x, t)
    # The definition is far from the gradient, so leaving that alone would fail.
    plain = plain_gradient(model, x, t)
    assert (wanted - plain).norm() > 0.1 * plain.norm()
    gm = maker(model)
    for _ in range(1 if name == "curve ball" else 2):  # it remembers
        torch.testing.assert_close(step_of(gm, model, x, t), wanted, **TOLERANCE)
    assert torch.equal(gm.loss, loss_of(model(x), t))
    assert torch.equal(gm.model_output, model(x))


@pytest.mark.parametrize("name", DEFINITIONS)
def test_they_say_that_they_are_computed_on_the_ranks(name: str) -> None:
    gm = DEFINITIONS[name][0](make("mlp")[0])
    assert not gm.served
    assert "on the ranks, within the step" in gm.summary()
    assert type(gm).__name__ in gm.summary()


# Of the case whose loss does not only come from the logits.
_NOT_ONLY_LOGITS = "arithmetic"


@pytest.mark.parametrize("case_name", CASES)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_every_documented_output(name: str, case_name: str) -> None:
    case = CASES[case_name]
    model, x, t = make_case(case)
    wanted = defined(name, case, model, x, t)
    gm = DEFINITIONS[name][0](model)
    case.setup(gm, model, x, t)
    gm.forward_and_backward()
    torch.testing.assert_close(gradient_of(model), wanted, **TOLERANCE)


def defined(name: str, case: Case, model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """The definitions for any loss, where it is a mean or a sum over samples."""
    params = trained(model)

    def loss(n: slice = slice(None)) -> Tensor:
        return plain_loss(case, model, x[n], t[n])

    def rows(params: list[Any]) -> Tensor:
        return torch.stack([row(loss(slice(n, n + 1)), params) for n in range(N)])

    def natural(params: list[Any]) -> Tensor:
        R = rows(params)
        F_emp = R.T @ R / (N if case.mean else 1)
        g = row(loss(), params)
        return torch.linalg.solve(F_emp + DAMPING * torch.eye(len(g)), g)

    g = row(loss(), params)
    match name:
        case "smw":
            return natural(params)
        case "seng":
            return torch.cat([natural(params[:2]), natural(params[2:])])
        case "newton" | "newton absolute":
            H = hessian(loss(), params)
            if name == "newton absolute":
                values, vectors = torch.linalg.eigh(H)
                H = vectors @ torch.diag(values.abs()) @ vectors.T
            return torch.linalg.solve(H + DAMPING * torch.eye(len(g)), g)
        case _:
            H = loss_gauss_newton(case, model, x, t) + DAMPING * torch.eye(len(g))
            return g * (g @ g) / (g @ H @ g)


def loss_gauss_newton(case: Case, model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """JᵀH_L J at the logits, by finding how the case's loss depends on them."""
    z = model(x)
    leaf = z.detach().requires_grad_()
    of_logits = F.cross_entropy(leaf.flatten(0, -2), t.flatten()) if t.dtype == torch.long else None
    if of_logits is None:
        of_logits = F.mse_loss(leaf, t)
    elif not case.mean:
        of_logits = of_logits * N
    elif case is CASES[_NOT_ONLY_LOGITS]:
        of_logits = 2 * of_logits
    J = jacobian(z, trained(model))
    return J.T @ hessian(of_logits, [leaf]) @ J


# -- SMW ------------------------------------------------------------------------------------


def test_smw_divides_by_the_data_size() -> None:
    model, x, t = make("mlp")
    R = samples_of(model, x, t, trained(model))
    F_emp = R.T @ R / 20
    wanted = torch.linalg.solve(F_emp + DAMPING * torch.eye(len(F_emp)), R.mean(0))
    gm = SmwEmpNaturalGradientMaker(model, SmwEmpNaturalGradientConfig(20, DAMPING))
    torch.testing.assert_close(step_of(gm, model, x, t), wanted, **TOLERANCE)
    gm = SmwEmpNaturalGradientMaker(model, PreconditioningConfig(data_size=20, damping=DAMPING))
    torch.testing.assert_close(step_of(gm, model, x, t), wanted, **TOLERANCE)


def test_smw_is_accurate_in_float32_at_a_small_damping() -> None:
    # (g - R^T c)/lambda would lose all digits here.
    model, x, t = make("mlp")
    R = samples_of(model, x, t, trained(model))
    wanted = R.T @ torch.linalg.solve(R @ R.T / N + 1e-6 * torch.eye(N), torch.full((N,), 1 / N))
    model, x = model.float(), x.float()
    gm = SmwEmpNaturalGradientMaker(model, SmwEmpNaturalGradientConfig(damping=1e-6))
    got = step_of(gm, model, x, t).double()
    assert (got - wanted).norm() < 1e-3 * wanted.norm()


def test_smw_says_when_the_samples_are_not_finite() -> None:
    model, x, t = make("mlp")
    x[0] = torch.nan
    gm = SmwEmpNaturalGradientMaker(model, SmwEmpNaturalGradientConfig())
    setup(gm, model, x, t)
    with pytest.raises(NumericsError, match="6 samples"):
        gm.forward_and_backward()


# -- Newton ---------------------------------------------------------------------------------


def test_newton_finds_the_minimum_of_a_quadratic_in_one_step() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(8, 3)
    t = torch.randn(8, 2)
    gm = NewtonGradientMaker(model, NewtonGradientConfig(1e-12))
    gm.setup_loss_call(F.mse_loss, gm.setup_model_call(model, x), t)
    gm.forward_and_backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    best = torch.linalg.lstsq(torch.cat([x, torch.ones(8, 1)], 1), t).solution
    torch.testing.assert_close(torch.cat([model.weight.T, model.bias[None]]), best)


def test_the_absolute_hessian_leads_away_from_a_saddle() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, 0.5]]))
    signs = torch.tensor([[1.0, -1.0]])
    for absolute, down in ((False, False), (True, True)):
        model.zero_grad()
        gm = NewtonGradientMaker(model, NewtonGradientConfig(absolute=absolute))
        y = gm.setup_model_call(lambda: (model.weight.square() * signs).sum())
        gm.setup_loss_repr(y)
        gm.forward_and_backward()
        assert model.weight.grad is not None
        # Along the second coordinate the loss falls outwards.
        assert (model.weight.grad[0, 1] < 0) == down


def test_newton_averages_hessians_with_the_weight_of_the_new_one() -> None:
    model, x, t = make("mlp")
    gm = NewtonGradientMaker(model, NewtonGradientConfig(DAMPING, ema_decay=0.3))
    batches = [(x, t), (x.flip(0) * 2, t), (x + 1, t)]
    H = hessian(loss_of(model(x), t), trained(model))
    for inputs, targets in batches:
        got = step_of(gm, model, inputs, targets)
        H = 0.7 * H + 0.3 * hessian(loss_of(model(inputs), targets), trained(model))
        g = plain_gradient(model, inputs, targets)
        wanted = torch.linalg.solve(H + DAMPING * torch.eye(len(g)), g)
        torch.testing.assert_close(got, wanted, **TOLERANCE)


def test_newton_says_when_the_matrix_is_singular() -> None:
    model = nn.Linear(2, 1, bias=False)
    gm = NewtonGradientMaker(model, NewtonGradientConfig())
    y = gm.setup_model_call(model, torch.full((3, 2), torch.nan))
    gm.setup_loss_repr(y.square().mean())
    with pytest.raises(NumericsError, match="damping"):
        gm.forward_and_backward()


KINDS = ("curvature", "preconditioner")


@pytest.mark.parametrize("name", ["newton", "seng"])
def test_updates_are_counted_exactly(name: str) -> None:
    """Between updates the old curvature preconditions the new gradient."""
    settings = {"preconditioner_upd_interval": 4, "curvature_upd_interval": 2}
    model, x, t = make("mlp")
    gm = DEFINITIONS[name][0](model, **settings)
    updates = {kind: Mock(wraps=getattr(gm, f"update_{kind}")) for kind in KINDS}
    vars(gm).update({f"update_{kind}": update for kind, update in updates.items()})
    twin = DEFINITIONS[name][0](model)
    first = step_of(gm, model, x, t)
    torch.testing.assert_close(first, step_of(twin, model, x, t), **TOLERANCE)
    for step in range(1, 9):
        other = x * (1 + step)
        got = step_of(gm, model, other, t)
        fresh = step_of(DEFINITIONS[name][0](model), model, other, t)
        assert torch.allclose(got, fresh) == (step % 4 == 0)
    assert [updates[kind].call_count for kind in KINDS] == [5, 3]


@pytest.mark.parametrize("name", ["newton", "seng"])
def test_without_an_update_the_gradient_stays(name: str) -> None:
    model, x, t = make("mlp")
    gm = DEFINITIONS[name][0](model, num_total_steps=5, preconditioner_upd_ratio=0.0)
    torch.testing.assert_close(step_of(gm, model, x, t), plain_gradient(model, x, t))


# -- CurveBall ------------------------------------------------------------------------------


def test_curve_ball_with_its_own_coefficients_over_several_steps() -> None:
    model, x, t = make("mlp")
    gm = CurveBallGradientMaker(model, CurveBallGradientConfig(damping=DAMPING))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    z = None
    for _ in range(4):
        wanted = curve_ball(model, x, t, z)
        torch.testing.assert_close(step_of(gm, model, x, t), wanted, **TOLERANCE)
        z = -wanted
        optimizer.step()


def test_its_own_coefficients_minimise_the_model() -> None:
    model, x, t = make("mlp")
    gm = CurveBallGradientMaker(model, CurveBallGradientConfig(damping=DAMPING))
    z = -step_of(gm, model, x, t)
    improved = -step_of(gm, model, x, t)
    g, H = plain_gradient(model, x, t), gauss_newton(model, x, t)
    H += DAMPING * torch.eye(len(g))
    delta = H @ z + g

    def model_value(v: Tensor) -> Tensor:
        return g @ v + v @ H @ v / 2

    assert model_value(improved) < model_value(z) < 0
    for direction in (z, delta):
        for sign in (1, -1):
            assert model_value(improved + sign * 1e-3 * direction) > model_value(improved)


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
def test_curve_ball_with_given_coefficients(curvature: str) -> None:
    model, x, t = make("mlp")
    beta, rho = 0.2, 0.8
    config = PreconditioningConfig(damping=DAMPING)
    gm = CurveBallGradientMaker(model, config, beta, rho, curvature)
    z = torch.zeros(sum(p.numel() for p in trained(model)))
    for inputs in (x, x + 0.5, x * 2):
        g = plain_gradient(model, inputs, t)
        if curvature == "hessian":
            H = hessian(loss_of(model(inputs), t), trained(model))
        else:
            H = gauss_newton(model, inputs, t)
        z = rho * z - beta * ((H + DAMPING * torch.eye(len(g))) @ z + g)
        torch.testing.assert_close(step_of(gm, model, inputs, t), -z, **TOLERANCE)
    gm = CurveBallGradientMaker(
        model, CurveBallGradientConfig(momentum=beta, momentum_decay=rho), curvature=curvature
    )
    assert (gm.momentum, gm.momentum_decay) == (beta, rho)


def test_curve_ball_converges_where_gradient_descent_crawls() -> None:
    torch.manual_seed(0)
    scales = torch.tensor([1.0, 30.0, 0.1])
    x = torch.randn(40, 3) * scales
    t = x @ torch.tensor([[1.0], [0.1], [9.0]])
    model = nn.Linear(3, 1)
    gm = CurveBallGradientMaker(model, CurveBallGradientConfig(damping=1e-8))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(60):
        optimizer.zero_grad()
        gm.setup_loss_call(F.mse_loss, gm.setup_model_call(model, x), t)
        gm.forward_and_backward()
        optimizer.step()
    assert F.mse_loss(model(x), t) < 1e-3


def test_curve_ball_needs_the_tensor_of_which_the_loss_is_made() -> None:
    case = CASES["sequence"]
    model, x, t = make_case(case)
    gm = CurveBallGradientMaker(model, CurveBallGradientConfig())
    y = gm.setup_model_call(model, x, t)
    gm.setup_loss_repr(y[1])
    for logits in (y[1], y[0] * 1, y[0].size(), y[0].detach()):
        gm.setup_logits_repr(logits)
        with pytest.raises(ConfigError, match="setup_logits_repr"):
            gm.forward_and_backward()
    gm.setup_logits_repr(y[0])
    gm.forward_and_backward()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"momentum": 0.9}, "momentum_decay"),
        ({"momentum_decay": 0.9}, "momentum"),
        ({"curvature": "newton"}, "curvature"),
        ({"curvature": "hessian"}, "momentum"),
    ],
)
def test_curve_ball_refuses(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CurveBallGradientMaker(nn.Linear(1, 1), CurveBallGradientConfig(), **arguments)


# -- the contract ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_saved_run_goes_on_bit_for_bit(name: str) -> None:
    maker = DEFINITIONS[name][0]
    settings = {"preconditioner_upd_interval": 3} if name in ("newton", "seng") else {}
    model, x, t = make("mlp")

    def steps(gm: PreconditionedGradientMaker, first: int, last: int) -> Tensor:
        optimizer = torch.optim.SGD(gm.model.parameters(), lr=0.02)
        for step in range(first, last):
            step_of(gm, gm.model, x * (1 + 0.1 * step), t)
            optimizer.step()
        return flat(trained(gm.model)).detach().clone()

    gm = maker(model, **settings)
    steps(gm, 0, 4)
    resumed_model, saved = copy.deepcopy(model), gm.state_dict()
    wanted = steps(gm, 4, 8)
    resumed = maker(resumed_model, **settings)
    resumed.load_state_dict(saved)
    assert resumed.state["step"] == 4
    assert torch.equal(steps(resumed, 4, 8), wanted)
    assert gm.state["step"] == 8


@pytest.mark.parametrize("name", DEFINITIONS)
def test_foreign_states_are_refused(name: str) -> None:
    maker = DEFINITIONS[name][0]
    states = {}
    for model_name in ("mlp", "conv"):
        model, x, t = make(model_name)
        gm = maker(model)
        step_of(gm, model, x, t)
        states[model_name] = gm.state_dict()
    gm = maker(make("mlp")[0])
    for foreign in (
        {**states["mlp"], "more": torch.zeros(2)},
        {key: value for key, value in states["mlp"].items() if key != "step"},
        *([states["conv"]] if len(states["conv"]) > 1 else []),
    ):
        with pytest.raises(StateError, match="state_dict"):
            gm.load_state_dict(foreign)
    gm.load_state_dict(states["mlp"])


@pytest.mark.parametrize("name", [name for name in DEFINITIONS if name != "seng"])
def test_parameters_without_dimensions(name: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(4, 3)
            self.scale = nn.Parameter(torch.tensor(0.7))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inside(x) * self.scale
            return out

    maker, definition = DEFINITIONS[name]
    model, x, t = Scaled(), torch.randn(N, 4), classes()
    wanted = definition(model, x, t)
    torch.testing.assert_close(step_of(maker(model), model, x, t), wanted, **TOLERANCE)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_batch_without_samples_has_no_gradient(name: str) -> None:
    model, x, t = make("mlp")
    gm = DEFINITIONS[name][0](model)
    gm.setup_loss_call(F.cross_entropy, gm.setup_model_call(model, x[:0]), t[:0], reduction="sum")
    gm.forward_and_backward()
    assert not gradient_of(model).any()


@pytest.mark.parametrize("ignored", ["name", "class", "instance"])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_ignored_modules_keep_their_gradients(name: str, ignored: str) -> None:
    class Last(nn.Linear):
        pass

    model, x, t = make("mlp")
    model[2] = Last(5, 3)
    plain = plain_gradient(model, x, t)
    chosen = {"name": "2", "class": Last, "instance": model[2]}[ignored]
    gm = DEFINITIONS[name][0](model, ignore_modules=[chosen])
    got = step_of(gm, model, x, t)
    first = sum(p.numel() for p in model[0].parameters())
    torch.testing.assert_close(got[first:], plain[first:], **TOLERANCE)
    model[2].requires_grad_(False)
    wanted = DEFINITIONS[name][1](model, x, t)
    torch.testing.assert_close(got[:first], wanted, **TOLERANCE)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_frozen_parameters_stay_out(name: str) -> None:
    model, x, t = make("mlp")
    model[0].bias.requires_grad_(False)
    got = step_of(DEFINITIONS[name][0](model), model, x, t)
    torch.testing.assert_close(got, DEFINITIONS[name][1](model, x, t), **TOLERANCE)
    assert model[0].bias.grad is None


@pytest.mark.parametrize("name", ["newton", "newton absolute", "curve ball", "seng"])
def test_batch_norm_in_training_keeps_its_running_statistics(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    x, t = torch.randn(N, 4), classes()
    twin = copy.deepcopy(model)
    twin(x)
    step_of(DEFINITIONS[name][0](model), model, x, t)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["smw", "curve ball"])
@pytest.mark.parametrize(
    "settings",
    [
        {"preconditioner_upd_interval": 2},
        {"curvature_upd_interval": 2},
        {"num_total_steps": 10, "preconditioner_upd_ratio": 0.5},
        {"ema_decay": 0.5},
    ],
    ids=str,
)
def test_settings_without_a_meaning_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=[*settings][-1]):
        DEFINITIONS[name][0](make("mlp")[0], **settings)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_model_without_anything_to_precondition_is_refused(name: str) -> None:
    model, _, _ = make("mlp")
    with pytest.raises(ConfigError, match="ignore_modules"):
        DEFINITIONS[name][0](model, ignore_modules=[nn.Linear])
    with pytest.raises(ConfigError, match="trained"):
        DEFINITIONS[name][0](model.requires_grad_(False))


def test_the_makers_ask_for_their_config() -> None:
    with pytest.raises(ConfigError, match="PreconditioningConfig"):
        NewtonGradientMaker(nn.Linear(1, 1), {"damping": 1})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="absolute"):
        NewtonGradientConfig(absolute=1)  # type: ignore[arg-type]
