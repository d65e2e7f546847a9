"""ShampooGradientMaker against Shampoo written out densely in float64, for every option.

Tolerance: statistics and roots are float32, damping 1e-2: 1e-5 of each gradient's largest entry.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from maker_models import batch_of, loss_of, made_gradients, model_of, plain_gradients
from output_cases import CASES, make, plain_loss
from shampoo_oracle import DenseShampoo
from torch import Tensor, nn

from distcurv.errors import ConfigError, StateError
from distcurv.launcher.supervisor import Supervisor
from distcurv.makers import PreconditioningConfig, ShampooGradientMaker, get_update_schedule

DAMPING = 1e-2
STEPS = 6


def maker(model: nn.Module, options: dict[str, Any] | None = None, **config: Any) -> Any:
    return ShampooGradientMaker(
        model, PreconditioningConfig(**({"damping": DAMPING} | config)), **(options or {})
    )


def views(shape: tuple[int, ...], options: dict[str, Any]) -> list[tuple[Any, tuple[int, ...]]]:
    """(what to index with, shape) of each tile of a tensor, which is seen as a matrix if asked."""
    size = options.get("block_size", -1)
    if size == -1:
        return [((...,), shape)]
    cuts: list[tuple[slice, ...]] = [()]
    for d in shape:
        cuts = [(*cut, slice(i, i + size)) for cut in cuts for i in range(0, d, size)]
    return [(cut, tuple(torch.empty(shape)[cut].shape)) for cut in cuts]


class Oracle:
    """All parameters of a model."""

    def __init__(
        self, model: nn.Module, options: dict[str, Any], weight: float | None, relative: bool
    ) -> None:
        self.options = options
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.tiles: dict[str, list[tuple[Any, DenseShampoo]]] = {}
        self.squares: dict[str, Tensor] = {}
        self.grafts = 0
        for name, param in model.named_parameters():
            shape = tuple(param.shape)
            if options.get("matricise") and len(shape) > 2:
                shape = (shape[0], param.numel() // shape[0])
            self.shapes[name] = shape
            vector = len(shape) == 1
            cut = [((...,), shape)] if vector else views(shape, options)
            exponent = None if vector else options.get("exponent")
            self.tiles[name] = [
                (
                    index,
                    DenseShampoo(own, DAMPING, weight=weight, exponent=exponent, relative=relative),
                )
                for index, own in cut
            ]

    def take(self, grads: dict[str, Tensor], update: bool = True) -> None:
        for name, grad in grads.items():
            for index, tile in self.tiles[name]:
                tile.take(grad.view(self.shapes[name])[index])
        if update:
            self.update()

    def update(self) -> None:
        for tiles in self.tiles.values():
            for _, tile in tiles:
                tile.update()

    def directions(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        self.grafts += 1
        for name, grad in grads.items():
            seen = grad.view(self.shapes[name]).double()
            direction = torch.zeros_like(seen)
            for index, tile in self.tiles[name]:
                direction[index] = tile.direction(seen[index])
            if len(seen.shape) == 1 and self.options.get("vectors") == "gradient":
                made[name] = seen
                continue
            length = self.length(name, seen)
            if length is not None:
                direction = direction * length / direction.norm()
            made[name] = direction.view(grad.shape)
        return made

    def length(self, name: str, grad: Tensor) -> Tensor | None:
        kind = self.options.get("grafting", "none")
        if kind == "none":
            return None
        if kind == "sgd":
            return grad.norm()
        old = self.squares.get(name, torch.zeros_like(grad))
        if kind == "adagrad":
            self.squares[name] = s = old + grad**2
        else:
            self.squares[name] = s = 0.999 * old + 0.001 * grad**2
            s = s / (1 - 0.999**self.grafts)
        return (grad / (s + DAMPING).sqrt()).norm()


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert set(got) == set(wanted)
    for name, want in wanted.items():
        error = (got[name].double() - want).abs().max() / want.abs().max()
        assert error < tolerance, (name, error.item())


@pytest.mark.parametrize("name", ["mlp", "conv", "tokens"])
@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({}, {}),
        ({}, {"ema_decay": 0.3}),
        ({"accumulate": "sum"}, {"ema_decay": 0.3}),
        ({"accumulate": "ema"}, {}),
        ({"block_size": 3}, {}),
        ({"block_size": 4, "matricise": True}, {"ema_decay": 0.2}),
        ({"exponent": -0.5}, {"damping_form": "relative"}),
        ({"grafting": "sgd"}, {}),
        ({"grafting": "adagrad", "block_size": 4}, {"ema_decay": 0.3}),
        ({"grafting": "rmsprop"}, {}),
        ({"vectors": "gradient"}, {}),
        ({}, {"rank": 1000}),
        ({"matricise": True}, {"rank": 1000, "ema_decay": 0.3, "encoding": "dense"}),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) or "-",
)
def test_every_option_is_its_definition(
    name: str, options: dict[str, Any], config: dict[str, Any]
) -> None:
    model = model_of(name)
    summed = options.get("accumulate", "ema" if "ema_decay" in config else "sum") == "sum"
    weight = None if summed else config.get("ema_decay", 1.0)
    oracle = Oracle(model, options, weight, config.get("damping_form") == "relative")
    with closing(maker(model, options, **config)) as gm:
        for step in range(STEPS):
            grads = plain_gradients(model, name, step)
            oracle.take(grads)
            wanted = oracle.directions(grads)
            got = made_gradients(gm, name, step)
            assert_close(got, wanted, 1e-3 if "rank" in config else 1e-5)
            for key, grad in grads.items():
                if grad.dim() > 1:
                    assert (got[key] - grad).norm() > 0.01 * grad.norm()


def test_a_low_rank_is_the_root_of_what_it_keeps() -> None:
    """Gradients of rank 2 with rank 3: nothing is lost, and the rest has damping alone."""
    model = nn.Linear(9, 8, bias=False)
    left, right = torch.randn(8, 2), torch.randn(2, 9)
    oracle = DenseShampoo((8, 9), DAMPING)
    config = {"rank": 3, "encoding": "dense"}
    with closing(maker(model, **config)) as gm:
        for step in range(STEPS):
            grad = left @ torch.diag(torch.tensor([1.0 + step, 1.0])) @ right
            oracle.take(grad)
            oracle.update()
            model.zero_grad()
            gm.setup_loss_repr(gm.setup_model_call(lambda: (model.weight * grad).sum()))  # noqa: B023
            gm.forward_and_backward()
            assert model.weight.grad is not None
            assert_close({"w": model.weight.grad}, {"w": oracle.direction(grad)}, 1e-3)


@pytest.mark.parametrize(
    ("config", "updates", "statistics"),
    [
        ({"preconditioner_upd_interval": 3}, [0, 3, 6, 9, 12], None),
        (
            {"preconditioner_upd_interval": 4, "preconditioner_warmup_steps": 3},
            [0, 1, 2, 3, 7, 11],
            None,
        ),
        (
            {"preconditioner_upd_interval": 4, "curvature_upd_interval": 1},
            [0, 4, 8, 12],
            list(range(14)),
        ),
        (
            {"preconditioner_upd_interval": 5, "curvature_upd_interval": 2},
            [0, 5, 10],
            [0, 2, 4, 6, 8, 10, 12],
        ),
        (
            {"num_total_steps": 14, "preconditioner_upd_ratio": 0.5},
            [i for i, due in enumerate(get_update_schedule(14, 0.5)) if due],
            None,
        ),
        (
            {
                "num_total_steps": 10,
                "preconditioner_upd_ratio": 0.5,
                "preconditioner_warmup_ratio": 0.2,
                "preconditioner_interval_type": "linear",
                "curvature_upd_interval": 1,
            },
            [i for i, due in enumerate(get_update_schedule(10, 0.5, 0.2, "linear")) if due],
            list(range(14)),
        ),
    ],
)
def test_updates_are_counted_exactly(
    config: dict[str, Any], updates: list[int], statistics: list[int] | None
) -> None:
    model = model_of("mlp")
    oracle = Oracle(model, {}, None, relative=False)
    with closing(maker(model, **config)) as gm:
        for step in range(14):
            grads = plain_gradients(model, "mlp", step)
            matrices = {n: g for n, g in grads.items() if g.dim() == 2}
            if step in (statistics if statistics is not None else updates):
                oracle.take(matrices, update=False)
            if step in updates:
                oracle.update()
            got = made_gradients(gm, "mlp", step)
            wanted = oracle.directions(matrices)
            assert_close({n: got[n] for n in matrices}, wanted, 1e-5)
        log = gm.install_log
        assert sorted({record.step for record in log}) == updates
        assert {record[4] for record in log} == set(updates)
        assert len(log) == 2 * len(updates)


@pytest.mark.parametrize("case", CASES)
def test_all_forms_of_output_work(case: str) -> None:
    model, x, t = make(CASES[case])
    plain = plain_loss(CASES[case], model, x, t)
    named = dict(model.named_parameters())
    grads = dict(zip(named, torch.autograd.grad(plain, list(named.values())), strict=True))
    oracle = Oracle(model, {}, None, relative=False)
    oracle.take(grads)
    with closing(maker(model)) as gm:
        CASES[case].setup(gm, model, x, t)
        _, loss = gm.forward_and_backward()
    assert torch.equal(loss, plain)
    got = {name: p.grad for name, p in named.items() if p.grad is not None}
    assert_close(got, oracle.directions(grads), 1e-5)


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"grafting": "adagrad", "block_size": 4}, {}),
        ({}, {"ema_decay": 0.2, "preconditioner_upd_interval": 3}),
        ({}, {"rank": 2}),
    ],
)
def test_a_state_dict_goes_on_bit_for_bit(options: dict[str, Any], config: dict[str, Any]) -> None:
    model = model_of("conv")
    with closing(maker(model, options, **config)) as gm:
        for step in range(4):
            made_gradients(gm, "conv", step)
        state = gm.state_dict()
        wanted = [made_gradients(gm, "conv", step) for step in range(4, 9)]
    torch.save(state, buffer := io.BytesIO())
    buffer.seek(0)
    with closing(maker(model_of("conv"), options, **config)) as gm:
        gm.load_state_dict(torch.load(buffer, weights_only=True))
        for step in range(4, 9):
            got = made_gradients(gm, "conv", step)
            assert all(torch.equal(got[n], wanted[step - 4][n]) for n in got)


def test_states_of_others_are_refused() -> None:
    with closing(maker(model_of("mlp"))) as gm:
        with pytest.raises(StateError, match="no squares"):
            gm.load_state_dict({"step": 3})
        with closing(maker(model_of("mlp"), {"block_size": 3})) as other:
            state = other.state_dict()
        with pytest.raises(StateError, match="other blocks"):
            gm.load_state_dict(state)


def test_ignored_modules_keep_their_gradients() -> None:
    model = model_of("mlp")
    grads = plain_gradients(model, "mlp", 0)
    with closing(maker(model, ignore_modules=["0"])) as gm:
        got = made_gradients(gm, "mlp", 0)
        assert "0.weight" not in gm.summary()
    for name, grad in grads.items():
        assert torch.equal(got[name], grad) == name.startswith("0.")


def test_a_gradient_that_is_not_finite_is_not_taken_in() -> None:
    model = model_of("mlp")
    x, t = batch_of("mlp", 1)
    with closing(maker(model)) as gm, closing(maker(model)) as other:
        made_gradients(gm, "mlp", 0)
        gm.setup_loss_call(lambda y: loss_of(y, t) * float("inf"), gm.setup_model_call(model, x))
        gm.forward_and_backward()
        made_gradients(other, "mlp", 0)
        got, wanted = (made_gradients(each, "mlp", 2) for each in (gm, other))
    for name, grad in wanted.items():
        assert torch.equal(got[name], grad)


def test_summary_says_what_is_served_and_where() -> None:
    with closing(maker(model_of("conv"), {"block_size": 16})) as gm:
        text = gm.summary()
    assert text.startswith("ShampooGradientMaker: served, workers=0\n")
    for told in ("shampoo", "3 x 2 x 2 x 2", "3.weight[0:3,16:27]", "inline", "AdaGrad"):
        assert told in text


@pytest.mark.parametrize(
    ("options", "config", "told"),
    [
        ({"block_size": 0}, {}, "block_size is 0"),
        ({"exponent": 0.5}, {}, r"exponent is 0\.5"),
        ({"accumulate": "mean"}, {}, "accumulate is 'mean'"),
        ({"grafting": "adam"}, {}, "grafting is 'adam'"),
        ({"vectors": "sgd"}, {}, "vectors is 'sgd'"),
        ({}, {"num_total_steps": 5, "preconditioner_upd_ratio": 0.0}, "upd_ratio gives no update"),
        (
            {},
            {
                "preconditioner_upd_interval": 4,
                "preconditioner_warmup_steps": 2,
                "install_delay": 3,
            },
            "install_delay is 3: an interval is a function",
        ),
        ({}, {"ignore_modules": [nn.Linear]}, "no parameter to precondition"),
        ({}, {"graft": True}, "graft is True: ShampooGradientMaker has none"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    options: dict[str, Any], config: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        maker(model_of("mlp"), options, **config)


def test_a_block_that_is_too_large_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"roots would take \d+ bytes.*give block_size"):
        maker(nn.Linear(20_000, 2))


# -- a true worker ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker() -> Iterator[Supervisor]:
    with Supervisor(workers=1, report=lambda text: None) as supervisor:
        yield supervisor


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize(
    "how", [{}, {"rank": 2}, {"rank": 2, "encoding": "sketch", "wire_dtype": "float16"}]
)
def test_a_worker_gives_the_same_bits(worker: Supervisor, delay: int, how: dict[str, Any]) -> None:
    def run(workers: Any, read: Callable[[Any], Any]) -> list[dict[str, Tensor]]:
        config = {**how, "install_delay": delay, "preconditioner_upd_interval": 2}
        config["link_timeout"] = 60  # whatever the machine is busy with
        with closing(maker(model_of("conv"), workers=workers, early_steps=0, **config)) as gm:
            made = [made_gradients(gm, "conv", step) for step in range(9)]
            read(gm)
        return made

    logs: list[Any] = []
    inline = run("inline", lambda gm: logs.append(gm.install_log))
    remote = run(worker.endpoints, lambda gm: logs.append((gm.install_log, gm.summary())))
    assert logs[1][0] == logs[0] and len(logs[0]) > 0
    assert worker.endpoints[0] in logs[1][1]
    for one, other in zip(inline, remote, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_a_delay_nothing_waits_for_a_worker(worker: Supervisor) -> None:
    """Gradients stay as they are until the first install, which comes when it comes."""
    model = model_of("mlp")
    settings = {"workers": worker.endpoints, "preconditioner_upd_interval": 2}
    with closing(maker(model, **settings)) as gm:
        end = time.monotonic() + 120
        for step in itertools.count():  # noqa: B007 - read below
            got = made_gradients(gm, "mlp", 0)
            if gm.install_log:
                break
            assert time.monotonic() < end, "no version of the worker came"
            assert torch.equal(got["0.weight"], plain_gradients(model, "mlp", 0)["0.weight"])
        assert step > 0
        assert not torch.equal(got["0.weight"], plain_gradients(model, "mlp", 0)["0.weight"])
