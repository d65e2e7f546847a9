"""SoapGradientMaker: SGD on what it makes is SOAP, and is LowRankSOAP bit for bit.

Tolerance against the dense float64 oracle as in tests/optim: 2e-4 of how far the weight moved.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from maker_models import batch_of, loss_of, made_gradients, model_of, plain_gradients
from optim.soap_oracle import DenseSoap, spread_gradients
from output_cases import CASES, make, plain_loss
from torch import Tensor, nn

from distcurv.errors import ConfigError, StateError
from distcurv.launcher.supervisor import Supervisor
from distcurv.makers import PreconditioningConfig, SoapGradientMaker
from distcurv.optim import LowRankSOAP

STEPS = 12


def maker(model: nn.Module, options: dict[str, Any] | None = None, **config: Any) -> Any:
    return SoapGradientMaker(model, PreconditioningConfig(**config), **(options or {}))


def feed(gm: Any, model: Any, grad: Tensor) -> None:
    """Have the maker work on this gradient of a bias-free linear layer's weight."""
    model.zero_grad()
    gm.setup_loss_repr(
        gm.setup_model_call(lambda: (model.weight * grad.view(model.weight.shape)).sum())
    )
    gm.forward_and_backward()


EARLY = {"early_steps": 10_000}  # every basis is that of the eigenvectors


@pytest.mark.parametrize("shape", [(5, 5), (8, 8)])
@pytest.mark.parametrize(
    ("options", "config", "decay"),
    [
        ({}, {}, 0.95),
        ({"betas": (0.8, 0.9), "eps": 1e-3}, {}, 0.9),
        ({"eps": 1e-3}, {"ema_decay": 0.3}, 0.7),
        ({}, EARLY, 0.95),
    ],
)
def test_full_rank_is_soap(
    shape: tuple[int, int], options: dict[str, Any], config: dict[str, Any], decay: float
) -> None:
    model = nn.Linear(shape[1], shape[0], bias=False)
    start = model.weight.detach().clone()
    oracle = DenseSoap(start, lr=0.02, decay=decay, early=config is EARLY, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    with closing(maker(model, options, **config)) as gm:
        for grad in spread_gradients(shape, STEPS, seed=1):
            oracle.step(grad)
            feed(gm, model, grad)
            optimizer.step()
    moved = (oracle.weight - start).norm()
    assert moved > 0.1
    assert (model.weight.detach() - oracle.weight).norm() < 2e-4 * moved


def test_rectangles_too() -> None:
    model = nn.Linear(6, 3, bias=False)
    start = model.weight.detach().clone()
    oracle = DenseSoap(start, lr=0.02)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    with closing(maker(model, **EARLY)) as gm:
        for grad in spread_gradients((3, 6), STEPS, seed=2):
            oracle.step(grad)
            feed(gm, model, grad)
            optimizer.step()
    moved = (oracle.weight - start).norm()
    assert (model.weight.detach() - oracle.weight).norm() < 2e-4 * moved


@pytest.mark.parametrize("name", ["mlp", "conv", "tokens"])
@pytest.mark.parametrize("config", [{}, {"rank": 2}, {"rank": 2, "ema_decay": 0.2}])
def test_sgd_on_it_is_lowrank_soap(name: str, config: dict[str, Any]) -> None:
    """The same numbers, from the same rule; vectors get Adam's direction."""
    model, other = model_of(name), model_of(name)
    soap = LowRankSOAP(
        other,
        lr=0.01,
        rank=config.get("rank", 1000),
        factor_decay=1 - config.get("ema_decay", 0.05),
        workers=0,
        preconditioner_upd_interval=1,
        early_steps=0,
        install_delay=0,
    )
    with soap, closing(maker(model, **config)) as gm:
        for step in range(STEPS):
            got = made_gradients(gm, name, step)
            before = [p.detach().clone() for p in other.parameters()]
            x, t = batch_of(name, step)
            other.zero_grad()
            loss_of(other(x), t).backward()
            plain = {n: p.grad.clone() for n, p in other.named_parameters() if p.grad is not None}
            soap.step()
            for (n, param), old in zip(other.named_parameters(), before, strict=True):
                torch.testing.assert_close((old - param) / 0.01, got[n], rtol=0, atol=1e-4)
                assert (got[n] - plain[n]).norm() > 0.01 * plain[n].norm()
            model.load_state_dict(other.state_dict())
        assert gm.install_log == soap.install_log


@pytest.mark.parametrize(
    ("config", "updates"),
    [
        ({"preconditioner_upd_interval": 4, "preconditioner_warmup_steps": 2}, [0, 1, 2, 6, 10]),
        ({"num_total_steps": 12, "preconditioner_upd_ratio": 0.25}, [0, 4, 8]),
        ({"preconditioner_upd_interval": 5, "curvature_upd_interval": 1}, [0, 5, 10]),
    ],
)
def test_updates_are_counted_exactly(config: dict[str, Any], updates: list[int]) -> None:
    with closing(maker(model_of("mlp"), **config)) as gm:
        for step in range(12):
            made_gradients(gm, "mlp", step)
        assert sorted({record.step for record in gm.install_log}) == updates
        assert {record[4] for record in gm.install_log} == set(updates)


@pytest.mark.parametrize("case", CASES)
def test_all_forms_of_output_work(case: str) -> None:
    """The second step, as the first has no direction: twice one gradient."""
    model, x, t = make(CASES[case])
    plain = plain_loss(CASES[case], model, x, t)
    with closing(maker(model)) as gm:
        for _ in range(2):
            model.zero_grad()
            CASES[case].setup(gm, model, x, t)
            _, loss = gm.forward_and_backward()
    assert torch.equal(loss, plain)
    # Adam's direction of a gradient that does not change is a rotation of signs: |P|^2 <= entries.
    weight = model.fc1.weight
    assert weight.grad is not None and 0.5 < weight.grad.norm() <= 1.01 * weight.numel() ** 0.5


@pytest.mark.parametrize(
    "config", [{}, {"rank": 2}, {"ema_decay": 0.2, "preconditioner_upd_interval": 3}]
)
def test_a_state_dict_goes_on_bit_for_bit(config: dict[str, Any]) -> None:
    model = model_of("conv")
    with closing(maker(model, **config)) as gm:
        for step in range(4):
            made_gradients(gm, "conv", step)
        torch.save(gm.state_dict(), buffer := io.BytesIO())
        wanted = [made_gradients(gm, "conv", step) for step in range(4, 9)]
    buffer.seek(0)
    with closing(maker(model_of("conv"), **config)) as gm:
        gm.load_state_dict(torch.load(buffer, weights_only=True))
        for step in range(4, 9):
            got = made_gradients(gm, "conv", step)
            assert all(torch.equal(got[n], wanted[step - 4][n]) for n in got)


def test_a_state_dict_goes_on_bit_for_bit_wherever_the_versions_lie_in_memory() -> None:
    """Sizes that put most blocks of a broadcast at odd places: how products round depends on it.
    A weight without a gradient, and so without moments, is in it too."""

    def make_model() -> nn.Module:
        torch.manual_seed(3)
        sizes = [(4, 12), (12, 4), (4, 8), (8, 4), (4, 3)]
        model = nn.Sequential(*(nn.Linear(*size) for size in sizes))
        model.register_parameter("unused", nn.Parameter(torch.ones(2, 2)))
        return model

    def steps(gm: Any, first: int, last: int) -> list[Tensor]:
        made = []
        for step in range(first, last):
            torch.manual_seed(step)
            gm.model.zero_grad()
            gm.setup_loss_repr(gm.setup_model_call(gm.model, torch.randn(6, 4)).square().sum())
            gm.forward_and_backward()
            made += [p.grad.clone() for p in gm.model.parameters() if p.grad is not None]
        return made

    with closing(maker(make_model())) as gm, closing(maker(make_model())) as resumed:
        steps(gm, 0, 4)
        resumed.load_state_dict(gm.state_dict())
        pairs = zip(steps(gm, 4, 8), steps(resumed, 4, 8), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_ignored_modules_keep_their_gradients() -> None:
    model = model_of("mlp")
    with closing(maker(model, ignore_modules=["0"])) as gm:
        for step in range(2):
            grads, got = plain_gradients(model, "mlp", step), made_gradients(gm, "mlp", step)
        assert "0.weight" not in gm.summary()
    for name, grad in grads.items():
        assert torch.equal(got[name], grad) == name.startswith("0.")


def test_summary_and_refusals() -> None:
    with closing(maker(model_of("conv"))) as gm:
        text = gm.summary()
        with pytest.raises(StateError, match="no 'soap'"):
            gm.load_state_dict({"step": 1})
    assert text.startswith("SoapGradientMaker: served, workers=0\n")
    assert "8 x 3" in text and "inline" in text
    for options, told in (({"betas": (0.9, 1.0)}, "betas"), ({"eps": -1.0}, "eps is -1")):
        with pytest.raises(ConfigError, match=told):
            maker(model_of("mlp"), options)
    with pytest.raises(ConfigError, match="kl_clip is 0"):
        maker(model_of("mlp"), kl_clip=0.1, lr=0.1)
    with pytest.raises(ConfigError, match="no parameter to precondition"):
        maker(model_of("mlp"), ignore_modules=[nn.Linear])


@pytest.fixture(scope="module")
def worker() -> Iterator[Supervisor]:
    with Supervisor(workers=1, report=lambda text: None) as supervisor:
        yield supervisor


@pytest.mark.parametrize("rank", [None, 2])
def test_a_worker_gives_the_same_bits(worker: Supervisor, rank: int | None) -> None:
    runs, logs = [], []
    for workers in ("inline", worker.endpoints):
        config = {"rank": rank, "install_delay": 2, "preconditioner_upd_interval": 2}
        config["link_timeout"] = 60  # whatever the machine is busy with
        with closing(maker(model_of("conv"), workers=workers, early_steps=0, **config)) as gm:
            runs.append([made_gradients(gm, "conv", step) for step in range(9)])
            logs.append(gm.install_log)
    assert logs[0] == logs[1] and len(logs[0]) > 0
    for one, other in zip(*runs, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
