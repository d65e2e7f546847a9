"""Kinds of per-sample gradients with other targets, over a link, and through a checkpoint.

Oracle of ``exact``: the generalized Gauss-Newton matrix of each sample, from the Jacobian of its
logits in float64; of ``mc``: the empirical matrix of the targets that were drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from capture_harness import batch, cross_entropy
from oracles import relative_error
from test_sample_kinds import AT_ONCE, COLUMNS, case, gradients, kfac, run_step, solved
from torch import Tensor, nn
from train_rig import DEADLINE, Events

from distcurv.config import KfacConfig
from distcurv.curvature.apply import AffineGradient
from distcurv.train import provider
from distcurv.train.group import RankGroup
from distcurv.train.lanes import OwnerLinks
from distcurv.train.likelihoods import Categorical
from distcurv.train.placement import Load
from distcurv.train.preconditioner import Preconditioner
from distcurv.train.rewrite import Rewriter
from distcurv.wiring import InlineService

KINDS = (*COLUMNS, "kfe")


# -- targets of the model's own distribution ------------------------------------------------


def gauss_newton(model: nn.Module, x: Tensor) -> Tensor:
    """Of all parameters, each layer's as rows with the bias last; mean over the terms."""
    twin = copy.deepcopy(model).double()
    named = dict(twin.named_parameters())
    total, terms = None, 0
    for n in range(len(x)):
        logits = twin(x[n : n + 1].double()).flatten(0, -2)  # [T, C]
        terms += len(logits)
        rows = []
        for i in range(logits.numel()):
            grads = torch.autograd.grad(
                logits.flatten()[i], list(named.values()), retain_graph=True
            )
            by_name = dict(zip(named, grads, strict=True))
            layers = dict.fromkeys(name.rpartition(".")[0] for name in named)
            parts = []
            for layer in layers:
                matrix = by_name[f"{layer}.weight"].flatten(1)
                bias = by_name.get(f"{layer}.bias")
                parts.append(matrix if bias is None else torch.cat([matrix, bias[:, None]], 1))
            rows.append(torch.cat([part.flatten() for part in parts]))
        J = torch.stack(rows)
        p = logits.detach().softmax(-1)
        H = torch.block_diag(*(torch.diag(own) - torch.outer(own, own) for own in p))
        total = J.mT @ H @ J if total is None else total + J.mT @ H @ J
    assert total is not None
    return total / terms


@pytest.mark.parametrize("name", ["conv", "tokens", "shared"])
def test_exact_is_the_gauss_newton_matrix_of_all_layers_and_of_each(name: str) -> None:
    model, x, t = case(name, samples=5)
    wanted = gauss_newton(model, x)
    for kind in ("full", "layer_wise"):
        with kfac(model, kind, fisher_type="exact") as precond:
            model.zero_grad()
            logits = model(x)
            precond.sample(logits, "categorical")
            cross_entropy("mean")(logits, t).backward()
            precond.step()
            start = 0
            for install in precond._pipeline.installed:
                numbers = int((8 * install.tensors["F.packed"].numel() + 1) ** 0.5) // 2
                row, column = torch.triu_indices(numbers, numbers)
                part = wanted[start : start + numbers, start : start + numbers]
                assert relative_error(install.tensors["F.packed"], part[row, column]) < 1e-5
                start += numbers
        assert start == len(wanted)


class Drawn(Categorical):
    """What is "drawn" are given targets."""

    def __init__(self, targets: Tensor) -> None:
        super().__init__()
        self.targets = targets

    def sample(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        return self.targets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tokens", "shared"])
def test_drawn_targets_are_read_as_the_datas_are(name: str, kind: str) -> None:
    model, x, t = case(name)
    found: list[list[Tensor]] = []
    for fisher_type in ("empirical", "mc"):
        with kfac(model, kind, fisher_type=fisher_type) as precond:
            for _ in range(2):  # kfe takes its second moments at the second
                model.zero_grad()
                logits = model(x)
                if fisher_type == "mc":
                    precond.sample(logits, Drawn(t), n_samples=3)
                else:
                    precond.count_terms(t.numel())
                cross_entropy("mean")(logits, t).backward()
                precond.step()
            found.append([install.flat.clone() for install in precond._pipeline.installed])
    for one, other in zip(*found, strict=True):
        assert relative_error(other, one) < 1e-4


# -- served ---------------------------------------------------------------------------------


@pytest.fixture
def memory_links(
    connect_with: Callable[[provider.Connector], None],
) -> Iterator[Callable[[bool], None]]:
    """Call it with whether a worker at the other end of a memory link serves."""
    services: list[InlineService] = []

    def choose(remote: bool) -> None:
        def connect(workers: provider.Workers, group: RankGroup, load: Load) -> OwnerLinks:
            cpu = torch.device("cpu")
            inline, worker = InlineService(cpu, Events()), InlineService(cpu, Events())
            services.extend((inline, worker))
            remotes = (("memory worker", worker.connect),) if remote else ()
            return OwnerLinks(inline.connect, remotes, lambda: None)

        connect_with(connect)

    yield choose
    for service in services:
        service.close()


def trained(kind: str, steps: int, **settings: Any) -> tuple[list[Tensor], int]:
    """Parameters and preconditioners after some steps, and how many versions workers made."""
    model, *_ = case("conv")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    config = KfacConfig(
        kind=kind,
        damping=0.1,
        preconditioner_upd_interval=4,
        install_delay=3,
        early_steps=0,
        wait_timeout=DEADLINE,
        **settings,
    )
    with Preconditioner(model, config, workers="inline") as precond:
        for step in range(steps):
            run_step(model, *batch(model, 8, step), precond)
            optimizer.step()
        flats = [install.flat.clone() for install in precond._pipeline.installed]
        assert min(install.version for install in precond._pipeline.installed) >= 3
        served = precond._pipeline.depot.counts.from_workers
    return [*(p.detach().clone() for p in model.parameters()), *flats], served


@pytest.mark.parametrize("kind", KINDS)
def test_served_over_a_link_it_is_the_run_in_process_bit_for_bit(
    kind: str, memory_links: Callable[[bool], None]
) -> None:
    memory_links(False)
    alone, none = trained(kind, 18)
    memory_links(True)
    served, some = trained(kind, 18)
    assert none == 0
    assert some > 0
    for one, other in zip(alone, served, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_on_bit_for_bit(kind: str) -> None:
    settings: dict[str, Any] = {**AT_ONCE, "early_steps": 1000, "kind": kind, "damping": 0.1}

    def go_on(steps: range, state: Any = None) -> tuple[list[Tensor], Any]:
        model, *_ = case("tokens")
        if state is not None:
            model.load_state_dict(state[0])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with Preconditioner(model, KfacConfig(**settings), workers="inline") as precond:
            if state is not None:
                precond.load_state_dict(state[1])
            for step in steps:
                run_step(model, *batch(model, 6, step), precond)
                optimizer.step()
            state = copy.deepcopy((model.state_dict(), precond.state_dict()))
            flats = [install.flat.clone() for install in precond._pipeline.installed]
        return [*(p.detach().clone() for p in model.parameters()), *flats], state

    whole, _ = go_on(range(5))
    _, state = go_on(range(3))
    resumed, _ = go_on(range(3, 5), state)
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one, other)


def test_blocks_of_one_shape_go_together_where_launches_cost() -> None:
    """As on a GPU: the columns of two layers, and two gradients in their eigenbases."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    x, t = torch.randn(6, 3), torch.arange(6) % 3
    for kind in (*COLUMNS[:3], "kfe"):
        with kfac(model, kind) as precond:
            run_step(model, x, t, precond)
            model.zero_grad()
            cross_entropy("mean")(model(x), t).backward()
            specs, installed = precond._pipeline.table.specs, precond._pipeline.installed
            results = []
            for grouped in (False, True):
                grads = {}
                for i, block in enumerate(precond._blocks):
                    grad = block.found.layer.gradient(block.found.module, block.bias)
                    assert grad is not None
                    bias = None if grad.bias_O is None else grad.bias_O.clone()
                    grads[i] = AffineGradient(grad.weight_OD.clone(), bias)
                rewriter = Rewriter(specs, precond.config, torch.device("cpu"), grouped)
                rewriter.rewrite(grads, installed, [0.01] * len(specs), None)
                results.append([grad.whole() for grad in grads.values()])
        for one, other in zip(*results, strict=True):
            assert relative_error(other, one) < 1e-5


def test_the_direction_of_one_sample_is_known() -> None:
    """(g gᵀ + damping I)⁻¹ g = g / (‖g‖² + damping), in float32 to 1e-7 of ‖g‖²/damping = 640."""
    model, x, t = case("conv", samples=1)
    with kfac(model, "full") as precond:
        before = run_step(model, x, t, precond)
    g = torch.cat([own.flatten() for own in before.values()])
    got = torch.cat([own.flatten() for own in gradients(model).values()])
    assert relative_error(got, g / (g.square().sum() + 1e-2)) < 2e-4
    assert relative_error(got, solved(torch.outer(g, g), g)) < 2e-4
