"""One Preconditioner beside several optimizers, gradient clipping, and closures."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from capture_harness import TokenNet, batch, cross_entropy
from oracles import relative_error
from test_preconditioner import backward, covered, kfac, matrix_of
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from distcurv.errors import StateError
from distcurv.optim import LowRankSOAP


def hooks() -> tuple[int, int]:
    return (
        len(torch_optimizer._global_optimizer_pre_hooks),
        len(torch_optimizer._global_optimizer_post_hooks),
    )


def after_a_step(model: nn.Module, optimizers: list[torch.optim.Optimizer], **own: Any) -> Any:
    """Weights after two steps of training."""
    with kfac(model, **own) as precond:
        for seed in range(2):
            for optimizer in optimizers:
                optimizer.zero_grad()
            inputs, targets = batch(model, 12, seed)
            cross_entropy("mean")(model(inputs), targets).backward()
            precond.step()
            for optimizer in optimizers:
                optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_several_optimizers_and_param_groups_share_one_preconditioner() -> None:
    weights = TokenNet().state_dict()

    def made() -> TokenNet:
        model = TokenNet()
        model.load_state_dict(weights)
        return model

    one, groups, two = made(), made(), made()
    expected = after_a_step(one, [torch.optim.SGD(one.parameters(), lr=0.1)])
    grouped = [
        {"params": list(groups.head.parameters())},
        {"params": list(groups.first.parameters()), "lr": 0.2},
    ]
    with_groups = after_a_step(groups, [torch.optim.SGD(grouped, lr=0.1)])
    apart = after_a_step(
        two,
        [
            torch.optim.SGD(two.first.parameters(), lr=0.2),
            torch.optim.SGD(two.head.parameters(), lr=0.1),
        ],
    )
    assert all(torch.equal(a, b) for a, b in zip(with_groups, apart, strict=True))
    assert not torch.equal(apart[0], expected[0])  # another learning rate


# -- clipping -----------------------------------------------------------------------------


def direction(model: nn.Module, before: float | None, after: float | None) -> dict[str, Tensor]:
    with kfac(model) as precond:
        backward(model)
        if before is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), before)
            assert norm > before
        precond.step()
        if after is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), after)
            assert norm > after
    return {name: matrix_of(module) for name, module in covered(model).items()}


def test_clipping_before_scales_what_is_preconditioned_and_no_statistic() -> None:
    model = TokenNet()
    free = direction(model, None, None)
    backward(model)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])  # type: ignore[misc]
    clipped = direction(model, float(norm) / 4, None)
    for name, expected in free.items():
        assert relative_error(clipped[name], expected / 4) < 1e-5


def test_clipping_after_bounds_the_update() -> None:
    model = TokenNet()
    free = direction(model, None, None)
    norm = torch.stack([matrix.norm() for matrix in free.values()]).norm()
    clipped = direction(model, None, float(norm) / 5)
    total = torch.stack([matrix.norm() for matrix in clipped.values()]).norm()
    assert total == pytest.approx(float(norm) / 5, rel=1e-5)
    for name, expected in free.items():
        assert relative_error(clipped[name], expected / 5) < 1e-5


# -- closures -----------------------------------------------------------------------------


def closure_of(model: nn.Module, precond: Any, optimizer: torch.optim.Optimizer) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        inputs, targets = batch(model, 12)
        loss = cross_entropy("mean")(model(inputs), targets)
        loss.backward()
        precond.step()
        return loss

    return closure


def test_a_closure_that_is_evaluated_once_is_as_good_as_none() -> None:
    model = TokenNet()
    with kfac(model) as precond:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.step(closure_of(model, precond, optimizer))
        assert precond.metrics()["step"] == 3


@pytest.mark.parametrize("within", [True, False])
def test_lbfgs_is_refused_before_it_moves_anything(within: bool) -> None:
    model = TokenNet()
    before = [p.detach().clone() for p in model.parameters()]
    with kfac(model) as precond:
        optimizer = torch.optim.LBFGS(model.parameters())
        closure = closure_of(model, precond, optimizer)
        if not within:
            backward(model)
            precond.step()
            closure = cross_entropy  # is not called
        with pytest.raises(StateError, match=r"LBFGS evaluates its closure several times a step"):
            optimizer.step(closure)
    for a, b in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, b)
    optimizer.step(lambda: torch.zeros(()))  # after close() nobody watches


def test_lbfgs_for_other_parameters_is_none_of_our_business() -> None:
    model, other = TokenNet(), nn.Linear(2, 2)
    with kfac(model) as precond:
        backward(model)
        precond.step()
        optimizer = torch.optim.LBFGS(other.parameters(), max_iter=2)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = other(torch.ones(3, 2)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        backward(model)
        precond.step()


class Twice(torch.optim.Optimizer):
    """Evaluates its closure twice, as line searches do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
            return closure()


def test_any_optimizer_that_evaluates_again_is_refused() -> None:
    model = TokenNet()
    with kfac(model) as precond:
        optimizer = Twice(model.parameters())
        with pytest.raises(StateError, match=r"twice within one step\(\) of Twice: it evaluates"):
            optimizer.step(closure_of(model, precond, optimizer))
        # Another optimizer is served all the same.
        good = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            good.step(closure_of(model, precond, good))


@pytest.mark.parametrize("kind", ["lowrank", "dense"])
def test_a_second_step_without_a_backward_is_refused(kind: str) -> None:
    model = TokenNet()
    with kfac(model, kind=kind) as precond:
        backward(model)
        precond.step()
        rewritten = matrix_of(model.head)
        with pytest.raises(StateError, match=r"twice without a backward\(\) in between"):
            precond.step()
        assert torch.equal(matrix_of(model.head), rewritten)
        assert precond.metrics()["step"] == 1
        backward(model)
        precond.step()


def test_before_the_first_install_too() -> None:
    model = TokenNet()
    with kfac(model, early_steps=0, preconditioner_upd_interval=5) as precond:
        backward(model)
        precond.step()
        assert precond.metrics()["version"] == 0
        with pytest.raises(StateError, match=r"twice without a backward\(\)"):
            precond.step()


@pytest.mark.parametrize("to_none", [True, False])
def test_all_ways_to_make_gradients_anew_are_taken(to_none: bool) -> None:
    model = TokenNet()
    with kfac(model) as precond:
        for seed in range(4):
            model.zero_grad(set_to_none=to_none)
            inputs, targets = batch(model, 12, seed)
            cross_entropy("mean")(model(inputs), targets).backward()
            precond.step()
        for seed in range(2):  # added to what is there
            inputs, targets = batch(model, 12, seed)
            cross_entropy("mean")(model(inputs), targets).backward()
            precond.step()
        model.zero_grad()
        precond.step()  # nothing was trained of what is covered
        precond.step()
        for value in (1.0, 2.0):  # put there by hand
            for p in model.parameters():
                p.grad = torch.full_like(p, value)
            precond.step()
        for p in model.parameters():
            assert p.grad is not None
            p.grad.mul_(2)
        precond.step()


def test_a_branch_that_is_not_used_does_not_count() -> None:
    model = TokenNet()
    with kfac(model) as precond:
        backward(model)
        precond.step()
        for _ in range(2):  # without zero_grad: the gradients of `first` stay as they are
            model.head(torch.randn(3, 4, 5)).square().mean().backward()
            precond.step()


def test_no_gradient_is_kept_alive() -> None:
    model = TokenNet()
    with kfac(model) as precond:
        backward(model)
        precond.step()
        grads = [weakref.ref(p.grad) for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        gc.collect()
        assert all(ref() is None for ref in grads)


def test_the_hooks_go_with_the_preconditioner() -> None:
    before = hooks()
    precond = kfac(TokenNet())
    assert hooks() == (before[0] + 1, before[1] + 1)
    precond.close()
    precond.close()
    assert hooks() == before
    forgotten = kfac(TokenNet())
    del forgotten
    gc.collect()
    assert hooks() == before


def test_lowrank_soap_evaluates_a_closure_once() -> None:
    model = nn.Linear(6, 4)
    with LowRankSOAP(model, lr=0.01, rank=2, workers="inline") as optimizer:
        calls = []

        def closure() -> Tensor:
            assert torch.is_grad_enabled()
            calls.append(1)
            optimizer.zero_grad()
            loss = model(torch.ones(3, 6)).square().mean()
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(4)]  # type: ignore[arg-type, union-attr]
        assert len(calls) == 4
        assert losses[-1] < losses[0]
