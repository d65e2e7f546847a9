"""Preconditioner against the dense Kronecker inverse in float64."""

from __future__ import annotations

import copy
import gc
import logging
import math
import threading
from typing import Any

import pytest
import torch
from capture_harness import ConvNet, TokenNet, batch, cross_entropy, oracle_factors
from oracles import kronecker_solve, low_rank_matrix, relative_error
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from train_rig import wait_until

from distcurv.config import KfacConfig
from distcurv.errors import CaptureError, ConfigError, StateError
from distcurv.train.preconditioner import Preconditioner

# The first step refreshes in process and installs: its own batch is the whole factor.
AT_ONCE: dict[str, Any] = {"preconditioner_upd_interval": 1, "curvature_upd_interval": 1}


def kfac(model: nn.Module, **settings: Any) -> Preconditioner:
    defaults: dict[str, Any] = {**AT_ONCE, "early_steps": 1000, "rank": 1000, "damping": 0.1}
    return Preconditioner(model, KfacConfig(**(defaults | settings)), workers="inline")


def covered(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def matrix_of(module: Any) -> Tensor:
    """The gradient [Do, Di] with the bias as the last column, float64, a copy."""
    grad = module.weight.grad.flatten(1)
    if module.bias is not None:
        grad = torch.cat([grad, module.bias.grad.unsqueeze(1)], 1)
    return grad.double()


def backward(model: nn.Module, samples: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    inputs, targets = batch(model, samples, seed)
    model.zero_grad()
    cross_entropy("mean")(model(inputs), targets).backward()
    return inputs, targets


def factors(model: nn.Module, samples: int = 12, seed: int = 0) -> dict[tuple[str, str], Tensor]:
    """Mean factors of a batch, sample by sample, in float64."""
    twin = copy.deepcopy(model).double()
    inputs, targets = batch(twin, samples, seed)
    return oracle_factors(twin, covered(twin), inputs, targets, cross_entropy("mean"))


def pi_split(A: Tensor, G: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Martens and Grosse 2015, section 6.3: what is added to each side's diagonal."""
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
    return damping**0.5 * pi, damping**0.5 / pi


def solved(grad: Tensor, A: Tensor, G: Tensor, damping: float, form: str = "absolute") -> Tensor:
    """(A + .. I)⁻¹ ⊗ (G + .. I)⁻¹ on vec(grad)."""
    if form == "relative":
        add_A = damping**0.5 * A.trace() / len(A)
        add_G = damping**0.5 * G.trace() / len(G)
    else:
        add_A, add_G = pi_split(A, G, damping)
    eye_A = torch.eye(len(A), dtype=torch.float64)
    eye_G = torch.eye(len(G), dtype=torch.float64)
    return kronecker_solve(A + add_A * eye_A, G + add_G * eye_G, grad)


# -- the oracle ---------------------------------------------------------------------------


@pytest.mark.parametrize("net", [ConvNet, TokenNet])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["absolute", "relative"])
@pytest.mark.parametrize("kind", ["dense", "lowrank"])
def test_a_step_is_the_kronecker_inverse_of_the_batch(
    net: type[nn.Module], bias: bool, form: str, kind: str
) -> None:
    """The low-rank kind has the full basis here, so its factors are exact too."""
    model = net(bias)
    expected_factors = factors(model)
    with kfac(model, kind=kind, damping_form=form) as precond:
        backward(model)
        before = {name: matrix_of(module) for name, module in covered(model).items()}
        precond.step()
    for name, module in covered(model).items():
        A, G = expected_factors[name, "A"], expected_factors[name, "G"]
        expected = solved(before[name], A, G, 0.1, form)
        assert relative_error(matrix_of(module), expected) < 1e-4, name


@pytest.mark.parametrize(("tail_in", "tail_out"), [("isotropic", "diagonal"), ("none", "none")])
@pytest.mark.parametrize("net", [ConvNet, TokenNet])
def test_a_low_rank_step_is_the_inverse_of_what_is_installed(
    net: type[nn.Module], tail_in: str, tail_out: str
) -> None:
    model = net()
    with kfac(model, rank=2, tail_in=tail_in, tail_out=tail_out) as precond:
        for seed in range(4):
            backward(model, seed=seed)
            before = {name: matrix_of(module) for name, module in covered(model).items()}
            precond.step()
        installed = precond._pipeline.installed
        for block, name in enumerate(precond.block_names):
            tensors = installed[block].tensors
            A, G = (
                low_rank_matrix(tensors[f"{s}.U"], tensors[f"{s}.lam"], tensors.get(f"{s}.tail"))
                for s in "AG"
            )
            traces = [tensors[f"{s}.trace"].double() for s in "AG"]
            pi = ((traces[0] / len(A)) / (traces[1] / len(G))).sqrt()
            eye_A = torch.eye(len(A), dtype=torch.float64)
            eye_G = torch.eye(len(G), dtype=torch.float64)
            expected = kronecker_solve(
                A + 0.1**0.5 * pi * eye_A, G + 0.1**0.5 / pi * eye_G, before[name]
            )
            assert relative_error(matrix_of(covered(model)[name]), expected) < 1e-4, name


@pytest.mark.parametrize("kind", ["dense", "lowrank"])
def test_factors_are_averaged_over_steps(kind: str) -> None:
    model, decay = TokenNet(), 0.7
    averaged: dict[tuple[str, str], Tensor] = {}
    with kfac(model, kind=kind, factor_decay=decay, early_steps=0, install_delay=0) as precond:
        for step in range(4):
            for key, factor in factors(model, seed=step).items():
                averaged[key] = decay * averaged.get(key, 0.0) + (1 - decay) * factor
            backward(model, seed=step)
            before = {name: matrix_of(module) for name, module in covered(model).items()}
            precond.step()
    weight = 1 - decay**4
    for name, module in covered(model).items():
        A, G = averaged[name, "A"] / weight, averaged[name, "G"] / weight
        assert relative_error(matrix_of(module), solved(before[name], A, G, 0.1)) < 1e-4, name


def test_accumulated_micro_batches_equal_one_batch() -> None:
    models = [TokenNet() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    inputs, targets = batch(models[0], 12)
    loss = cross_entropy("mean")
    with kfac(models[0]) as whole, kfac(models[1], accumulation=3) as parts:
        loss(models[0](inputs), targets).backward()
        whole.step()
        for x, y in zip(inputs.split(4), targets.split(4), strict=True):
            (loss(models[1](x), y) / 3).backward()
        parts.step()
    for a, b in zip(covered(models[0]).values(), covered(models[1]).values(), strict=True):
        assert relative_error(matrix_of(b), matrix_of(a)) < 1e-4


# -- rules of the update ------------------------------------------------------------------


def stepped(model: nn.Module, lr: float | None = None, **settings: Any) -> dict[str, Tensor]:
    """Gradients after one step."""
    with kfac(model, **settings) as precond:
        backward(model)
        precond.step(lr)
    return {name: matrix_of(module) for name, module in covered(model).items()}


@pytest.mark.parametrize("clip", [1e-6, 1e6])
def test_kl_clip_scales_all_blocks_by_one_number(clip: float) -> None:
    model = TokenNet()
    lr = 0.3
    free = stepped(model)
    backward(model)
    before = {name: matrix_of(module) for name, module in covered(model).items()}
    total = sum((before[n] * free[n]).sum() for n in free) * lr**2
    scale = min(1.0, math.sqrt(clip / total))
    assert (scale < 1) == (clip == 1e-6)
    by_config = stepped(model, kl_clip=clip, lr=lr)
    by_step = stepped(model, lr, kl_clip=clip)
    for name, direction in free.items():
        assert relative_error(by_config[name], direction * scale) < 1e-5
        assert relative_error(by_step[name], direction * scale) < 1e-5


def test_kl_clip_needs_a_learning_rate() -> None:
    with pytest.raises(ConfigError, match=r"kl_clip needs a learning rate: set KfacConfig.lr"):
        stepped(TokenNet(), kl_clip=1e-3)


def test_grafting_keeps_the_norm_of_each_gradient() -> None:
    model = TokenNet()
    free = stepped(model)
    grafted = stepped(model, graft=True)
    backward(model)
    for name, module in covered(model).items():
        expected = free[name] * matrix_of(module).norm() / free[name].norm()
        assert relative_error(grafted[name], expected) < 1e-5


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_damping_is_read_at_every_step(damping: float) -> None:
    model = TokenNet()
    expected_factors = factors(model)
    with kfac(model, early_steps=1, preconditioner_upd_interval=50) as precond:
        backward(model)
        precond.step()  # with 0.1
        precond.damping = damping
        backward(model)
        before = {name: matrix_of(module) for name, module in covered(model).items()}
        precond.step()
        assert precond.metrics()["version"] == 1
    for name, module in covered(model).items():
        A, G = expected_factors[name, "A"], expected_factors[name, "G"]
        assert relative_error(matrix_of(module), solved(before[name], A, G, damping)) < 2e-4


# -- what is left alone -------------------------------------------------------------------


def test_gradients_are_untouched_before_the_first_install() -> None:
    model = TokenNet()
    with kfac(model, early_steps=0, preconditioner_upd_interval=4) as precond:
        for step in range(30):
            backward(model, seed=step)
            before = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
            precond.step()
            same = [
                torch.equal(p.grad, g)  # type: ignore[arg-type]
                for p, g in zip(model.parameters(), before, strict=True)
            ]
            if precond.metrics()["version"] == 0:
                assert all(same)
            else:
                assert not any(same)
                break
        assert step >= 4


def test_frozen_layers_are_no_blocks_and_stay_without_gradient() -> None:
    model = TokenNet()
    model.first.requires_grad_(False)
    with kfac(model) as precond:
        assert precond.block_names == ["head"]
        backward(model)
        precond.step()
        assert model.first.weight.grad is None
        assert precond.metrics()["version"] == 1


def test_a_layer_without_gradient_in_a_step_is_skipped() -> None:
    model = TokenNet()
    with kfac(model) as precond:
        backward(model)
        precond.step()
        backward(model)
        model.first.weight.grad = model.first.bias.grad = None
        precond.step()
        assert model.first.weight.grad is None


@pytest.mark.parametrize("kind", ["lowrank", "dense"])
def test_a_branch_that_comes_into_use_late_is_left_alone_until_its_first_statistic(
    kind: str,
) -> None:
    """Its versions are of no statistic: the inverse of the damping alone would be 1000 times."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.late = nn.Linear(4, 2), nn.Linear(4, 2)
            self.norm, self.gain = nn.LayerNorm(4), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor, late: bool) -> Tensor:
            return self.always(x) + (self.late(self.norm(x) * self.gain) if late else 0)

    torch.manual_seed(0)
    model = Branches()
    settings = {"preconditioner_upd_interval": 4, "curvature_upd_interval": 4, "early_steps": 6}
    config = KfacConfig(kind=kind, damping=1e-3, rank=4, **settings)
    with Preconditioner(model, config, workers="inline") as precond:
        for step in range(22):
            model.zero_grad()
            model(torch.randn(6, 4), late=step == 21).square().mean().backward()
            before = {name: p.grad.clone() for name, p in model.named_parameters() if step == 21}  # type: ignore[union-attr]
            precond.step()
        assert precond.metrics()["version"] > 1
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert torch.allclose(p.grad, before[name], rtol=1e-5) == (not name.startswith("always"))


def test_what_is_left_out_is_named_once_and_left_to_the_optimizer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 4))
    caplog.set_level(logging.INFO, "distcurv.train")
    out: dict[str, Any] = {"ignore_modules": ("0",), "overrides": [("1", {"precondition": False})]}
    with kfac(model, **out) as precond:
        for _ in range(3):
            model.zero_grad()
            model(torch.randn(5, 2, 6, 6)).square().mean().backward()
            left = [p.grad.clone() for p in (*model[0].parameters(), *model[1].parameters())]  # type: ignore[union-attr]
            precond.step()
        assert precond.block_names == ["3"]
        now = [p.grad for p in (*model[0].parameters(), *model[1].parameters())]
        for a, b in zip(left, now, strict=True):
            assert b is not None
            assert torch.equal(a, b)
    lines = [r.getMessage() for r in caplog.records if "left to the base" in r.getMessage()]
    assert len(lines) == 1
    assert "0 (ignored by ignore_modules)" in lines[0]
    assert "1 (left out by KfacConfig.overrides)" in lines[0]


def test_ignored_modules_are_left_alone() -> None:
    with kfac(TokenNet(), ignore_modules=("head",)) as precond:
        assert precond.block_names == ["first"]


def test_a_model_with_nothing_to_precondition_is_refused_with_reasons() -> None:
    with pytest.raises(
        ConfigError, match=r"no layer that can be preconditioned; left out: 0 \(ignored"
    ):
        kfac(nn.Sequential(nn.BatchNorm1d(3)), ignore_modules=(nn.BatchNorm1d,))


# -- mc -----------------------------------------------------------------------------------


class Certain:
    """A likelihood whose draws are known: the targets that it was made with."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    def sample(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        return self.targets

    def nll(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy("sum")(logits, targets)


def test_mc_uses_the_gradients_of_sampled_targets() -> None:
    model = ConvNet()
    inputs, targets = batch(model, 12)
    drawn = (targets + 1) % 4
    twin = copy.deepcopy(model).double()
    expected_factors = oracle_factors(
        twin, covered(twin), inputs.double(), drawn, cross_entropy("mean")
    )
    with kfac(model, fisher_type="mc") as precond:
        logits = model(inputs)
        precond.sample(logits, Certain(drawn))
        cross_entropy("mean")(logits, targets).backward()
        before = {name: matrix_of(module) for name, module in covered(model).items()}
        precond.step()
    for name, module in covered(model).items():
        A, G = expected_factors[name, "A"], expected_factors[name, "G"]
        assert relative_error(matrix_of(module), solved(before[name], A, G, 0.1)) < 1e-4, name


def test_mc_without_a_sample_is_an_error_that_says_what_to_call() -> None:
    model = ConvNet()
    with kfac(model, fisher_type="mc") as precond:
        backward(model)
        with pytest.raises(CaptureError, match=r"Call sample\(logits, likelihood\) between"):
            precond.step()


def test_sampling_is_for_mc() -> None:
    model = ConvNet()
    with kfac(model) as precond, pytest.raises(CaptureError, match="this is 'empirical'"):
        precond.sample(model(batch(model, 4)[0]), "categorical")


# -- staleness, state, ending -------------------------------------------------------------


@pytest.mark.parametrize(("policy", "touched"), [("keep", True), ("fallback", False)])
def test_past_the_staleness_bound_the_policy_acts(policy: str, touched: bool) -> None:
    model = TokenNet()
    settings = {"preconditioner_upd_interval": 50, "early_steps": 1, "max_staleness": 2}
    with kfac(model, staleness_policy=policy, **settings) as precond:
        changed = []
        for _ in range(5):
            backward(model)
            before = matrix_of(model.head)
            precond.step()
            changed.append(not torch.equal(matrix_of(model.head), before))
        assert precond.metrics()["max_staleness"] == 4
    assert changed[:3] == [True, True, True]  # the staleness of step 2 is 2: at the bound
    assert changed[3:] == [touched, touched]


def test_a_resumed_run_goes_on_from_the_installed_versions() -> None:
    settings: dict[str, Any] = {
        "early_steps": 0,
        "install_delay": 0,
        "rank": 2,
        "preconditioner_upd_interval": 3,
    }
    model, twin = TokenNet(), TokenNet()
    twin.load_state_dict(model.state_dict())

    def go(precond: Preconditioner, net: nn.Module, first: int, steps: int) -> list[Tensor]:
        grads = []
        for seed in range(first, first + steps):
            backward(net, seed=seed)
            precond.step()
            grads.append(net.head.weight.grad.clone())
        return grads

    with kfac(model, **settings) as first:
        go(first, model, 0, 7)  # windows end at 0, 3, 6
        state = first.state_dict()
        expected = go(first, model, 7, 6)
        log = first.install_log
    with kfac(twin, **settings) as second:
        second.load_state_dict(state)
        got = go(second, twin, 7, 6)
        assert second.install_log == log
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_a_step_after_close_is_an_error() -> None:
    model = TokenNet()
    precond = kfac(model)
    precond.close()
    precond.close()
    backward(model)
    with pytest.raises(StateError, match="after close"):
        precond.step()


def test_the_context_manager_leaves_no_hooks_and_no_threads() -> None:
    model = TokenNet()
    hooks = dict(torch_module._global_forward_hooks)
    threads = set(threading.enumerate())
    with kfac(model) as precond:
        for seed in range(2):
            backward(model, seed=seed)
            precond.step()
        assert len(torch_module._global_forward_hooks) == len(hooks) + 1
        assert set(threading.enumerate()) - threads
    assert dict(torch_module._global_forward_hooks) == hooks
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    wait_until(lambda: not set(threading.enumerate()) - threads, "the threads to end")


def test_no_hook_is_attached_where_no_statistic_is_due() -> None:
    model = TokenNet()
    hooks = len(torch_module._global_forward_hooks)
    settings = {"preconditioner_upd_interval": 4, "curvature_upd_interval": 4, "early_steps": 0}
    with kfac(model, **settings) as precond:
        armed = []
        for seed in range(9):
            armed.append(len(torch_module._global_forward_hooks) - hooks)
            backward(model, seed=seed)
            precond.step()
        assert armed == [1, 0, 0, 0, 1, 0, 0, 0, 1]


def test_an_error_inside_the_context_still_ends_everything() -> None:
    threads = set(threading.enumerate())
    hooks = len(torch_module._global_forward_hooks)
    model = TokenNet()
    with pytest.raises(ZeroDivisionError), kfac(model) as precond:
        backward(model)
        precond.step()
        raise ZeroDivisionError
    wait_until(lambda: not set(threading.enumerate()) - threads, "the threads to end")
    assert len(torch_module._global_forward_hooks) == hooks


def test_a_forgotten_preconditioner_ends_its_threads_and_hooks() -> None:
    model = TokenNet()
    threads = set(threading.enumerate())
    hooks = len(torch_module._global_forward_hooks)
    precond = kfac(model)
    backward(model)
    precond.step()
    del precond
    gc.collect()
    wait_until(lambda: not set(threading.enumerate()) - threads, "the threads to end")
    assert len(torch_module._global_forward_hooks) == hooks


def test_layers_on_several_devices_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ConfigError, match=r"are on \['cpu', 'meta'\]: put them on one device"):
        kfac(model)


def test_accounting_at_the_end() -> None:
    model = TokenNet()
    with kfac(model, early_steps=2, preconditioner_upd_interval=4) as precond:
        for seed in range(15):
            backward(model, seed=seed)
            precond.step()
    numbers = precond.metrics()
    assert numbers["statistics_observed"] == 2 * 15
    assert numbers["statistics_observed"] == (
        numbers["statistics_folded"] + numbers["statistics_dropped"]
    )
