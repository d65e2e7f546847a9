"""The contract of gradient makers, for every maker that is exported: one without a row fails.

Tolerance of the oracles: float32 statistics and a damping of 0.05, 1e-4 relative; 0.05 for what a
random fit promises.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from every_maker import ROWS
from maker_models import batch_of, loss_of, made_gradients, model_of, plain_gradients
from output_cases import CASES, make, plain_loss
from quasi_newton_models import move
from torch import Tensor

from distcurv import makers
from distcurv.errors import ConfigError
from distcurv.launcher.supervisor import Supervisor
from distcurv.makers import GradientMaker, PreconditionedGradientMaker, get_update_schedule

EXPORTED = {
    value
    for value in map(makers.__dict__.__getitem__, makers.__all__)
    if inspect.isclass(value) and issubclass(value, GradientMaker)
} - {GradientMaker, PreconditionedGradientMaker}
STEPS = 9

rows = pytest.mark.parametrize("name", ROWS)
served = pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.served])
averaging = [name for name, row in ROWS.items() if row.ema == "average"]


def run(gm: Any, steps: range) -> list[dict[str, Tensor]]:
    """What a maker leaves at each step; the parameters move along it."""
    found = []
    for step in steps:
        found.append(made_gradients(gm, "mlp", step))
        move(gm.model)
    return found


def test_every_exported_maker_has_a_row() -> None:
    assert {row.maker for row in ROWS.values()} == EXPORTED
    assert len(EXPORTED) >= 17


@rows
def test_the_gradient_is_that_of_the_dense_definition(name: str) -> None:
    row = ROWS[name]
    found, wanted = row.oracle(row.make)
    assert found.keys() == wanted.keys()
    tolerance = 0.05 if row.ema == "unread" else 1e-4
    for key, want in wanted.items():
        got = found[key].double()
        assert (got - want).norm() < tolerance * want.norm(), key


@rows
def test_every_parameter_s_gradient_is_another_one(name: str) -> None:
    with closing(ROWS[name].make(model_of("mlp"))) as gm:
        for step in range(3):
            raw = plain_gradients(gm.model, "mlp", step)
            found = made_gradients(gm, "mlp", step)
            move(gm.model)
    for key, grad in raw.items():
        assert torch.isfinite(found[key]).all(), key
        assert (found[key] - grad).norm() > 0.01 * grad.norm(), key
        # Nor that times a number.
        cosine = (found[key] * grad).sum() / (found[key].norm() * grad.norm())
        assert cosine < 0.9999, key


STATES = [(n, e) for n, row in ROWS.items() for e in (None, 0.3) if e is None or n in averaging]


@pytest.mark.parametrize(("name", "ema"), STATES)
def test_a_restored_maker_goes_on_bit_for_bit(name: str, ema: float | None) -> None:
    row = ROWS[name]
    settings: dict[str, Any] = {} if row.every_step else {"preconditioner_upd_interval": 2}
    if ema is not None:
        settings["ema_decay"] = ema
    with closing(row.make(model_of("mlp"), **settings)) as gm:
        run(gm, range(4))
        buffer = io.BytesIO()
        torch.save([gm.state_dict(), gm.model.state_dict()], buffer)
        wanted = run(gm, range(4, 8))
    buffer.seek(0)
    state, parameters = torch.load(buffer, weights_only=True)
    model = model_of("mlp", seed=1)
    model.load_state_dict(parameters)
    with closing(row.make(model, **settings)) as other:
        other.load_state_dict(state)
        assert other.state["step"] == 4
        found = run(other, range(4, 8))
    for one, want in zip(found, wanted, strict=True):
        for key, grad in want.items():
            if row.resumed and ema is not None:
                assert (one[key] - grad).norm() < row.resumed * grad.norm(), key
            else:
                assert torch.equal(one[key], grad), key


def _due(*arguments: Any) -> list[int]:
    return [step for step, due in enumerate(get_update_schedule(*arguments)) if due]


# By name: settings, updates of the preconditioner, of the curvature.
TIMES: dict[str, tuple[dict[str, Any], list[int], list[int]]] = {
    "intervals": (
        {"preconditioner_upd_interval": 4, "curvature_upd_interval": 2},
        [0, 4, 8],
        [0, 2, 4, 6, 8],
    ),
    "warm-up": (
        {
            "preconditioner_upd_interval": 4,
            "preconditioner_warmup_steps": 2,
            "curvature_upd_interval": 1,
        },
        [0, 1, 2, 6],
        list(range(STEPS)),
    ),
    "ratios": (
        {
            "num_total_steps": STEPS,
            "preconditioner_upd_ratio": 0.5,
            "preconditioner_interval_type": "linear",
            "curvature_upd_ratio": 0.7,
        },
        _due(STEPS, 0.5, 0.0, "linear"),
        _due(STEPS, 0.7),
    ),
}
KINDS = ("preconditioner", "curvature")


@pytest.mark.parametrize("times", TIMES)
@rows
def test_updates_are_counted_exactly(name: str, times: str) -> None:
    row, (settings, *due) = ROWS[name], TIMES[times]
    if row.every_step:
        with pytest.raises(ConfigError, match="works at every step"):
            row.make(model_of("mlp"), **settings)
        return
    if row.ema == "average":
        settings = {**settings, "ema_decay": 0.5}  # else statistics that nobody reads are left out
    with closing(row.make(model_of("mlp"), **settings)) as gm:
        calls = {kind: Mock(wraps=getattr(gm, f"update_{kind}")) for kind in KINDS}
        vars(gm).update({f"update_{kind}": call for kind, call in calls.items()})
        seen: list[list[int]] = [[], []]
        observed = []
        for step in range(STEPS):
            before = [calls[kind].call_count for kind in KINDS]
            run(gm, range(step, step + 1))
            for steps, kind, count in zip(seen, KINDS, before, strict=True):
                steps += [step] * (calls[kind].call_count - count)
            observed.append(gm.metrics().get("statistics_observed", 0))
        assert seen == due
        if row.served:
            assert sorted({record[0] for record in gm.install_log}) == due[0]
            # Each version holds what was taken up to its step.
            assert all(record[4] == record[0] for record in gm.install_log)
            # They are counted when they are handed over, at an update.
            blocks = gm.metrics()["blocks"]
            for step in due[0]:
                assert observed[step] == blocks * sum(s <= step for s in due[1])


@rows
def test_an_average_and_none(name: str) -> None:
    row = ROWS[name]
    if row.ema == "refused":
        with pytest.raises(ConfigError, match="ema_decay"):
            row.make(model_of("mlp"), ema_decay=0.3)
        return
    found = []
    for ema in (None, 0.3):
        with closing(row.make(model_of("mlp"), ema_decay=ema)) as gm:
            for step in range(3):
                last = made_gradients(gm, "mlp", step)
            found.append(last)
    plain, average = found
    same = [torch.equal(plain[key], average[key]) for key in plain]
    if row.ema == "unread":
        assert all(same)
        return
    assert not any(
        (plain[key] - average[key]).norm() < 1e-3 * plain[key].norm()
        for key in plain
        if key.endswith("weight")
    )


@rows
def test_the_summary_says_where(name: str) -> None:
    row = ROWS[name]
    with closing(row.make(model_of("mlp"))) as gm:
        text = gm.summary()
        assert gm.served is row.served
    if row.served:
        assert text.startswith(f"{row.maker.__name__}: served, workers=0")
        assert "inline" in text
    else:
        assert text.startswith(f"{row.maker.__name__}: computed on the ranks, within the step")


@pytest.mark.parametrize("case_name", CASES)
@rows
def test_every_form_of_output(name: str, case_name: str) -> None:
    row, case = ROWS[name], CASES[case_name]
    model, x, t = make(case)
    with closing(row.make(model)) as gm:
        for _ in range(2):  # SOAP's first gradient only makes its basis
            model.zero_grad()
            case.setup(gm, model, x, t)
            loss = plain_loss(case, model, x, t)
            output, got = gm.forward_and_backward()
            assert torch.equal(got, loss)
            assert output is gm.model_output
    named = dict(model.named_parameters())
    raw = torch.autograd.grad(loss, list(named.values()))
    for (key, parameter), plain in zip(named.items(), raw, strict=True):
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all(), key
        assert (parameter.grad - plain).norm() > 0.01 * plain.norm(), key


def _derivatives(gm: Any, x: Tensor, t: Tensor) -> None:
    gm.setup_loss_call(loss_of, gm.setup_model_call(gm.model, x), t)
    gm.loss_grad()
    gm.loss_hvp(accumulate_grad=False)
    gm.per_example_loss_grads()
    gm.logit_jvp()


def _another_loss(gm: Any, x: Tensor, t: Tensor) -> None:
    loss_of(gm.model(x), t).backward()


def _evaluation(gm: Any, x: Tensor, t: Tensor) -> None:
    gm.model(x)


def _error(gm: Any, x: Tensor, t: Tensor) -> None:
    gm.setup_loss_call(lambda y: y.no_such, gm.setup_model_call(gm.model, x))
    with pytest.raises(AttributeError):
        gm.forward_and_backward()


@pytest.mark.parametrize("meanwhile", [_derivatives, _another_loss, _evaluation, _error])
@rows
def test_what_runs_between_two_steps_is_no_part_of_them(name: str, meanwhile: Any) -> None:
    row, found = ROWS[name], []
    for disturbed in (False, True):
        with closing(row.make(model_of("mlp"))) as gm:
            for step in range(3):
                if disturbed:
                    meanwhile(gm, *batch_of("mlp", 90 + step))
                last = made_gradients(gm, "mlp", step)
                move(gm.model)
        found.append(last)
    for key, grad in found[0].items():
        assert torch.equal(found[1][key], grad), key


@rows
def test_micro_batches_make_one_step(name: str) -> None:
    """Two halves, the loss of each divided by two, are the whole."""
    row = ROWS[name]
    if not row.served:
        with pytest.raises(ConfigError, match="accumulation is 2"):
            row.make(model_of("mlp"), accumulation=2)
        return
    # SOAP in full: where an eigenvalue is about zero, rounding chooses its direction.
    settings = {"rank": 2} if name == "soap" else {}
    found = []
    for parts in (1, 2):
        with closing(row.make(model_of("mlp"), accumulation=parts, **settings)) as gm:
            for step in range(3):
                x, t = batch_of("mlp", step)
                gm.model.zero_grad()
                for part in zip(x.chunk(parts), t.chunk(parts), strict=True):
                    y = gm.setup_model_call(gm.model, part[0])
                    gm.setup_loss_repr(loss_of(y, part[1]) / parts)
                    assert gm.state["step"] == step
                    gm.forward_and_backward()
            found.append({n: p.grad.clone() for n, p in gm.model.named_parameters()})
    for key, grad in found[0].items():
        assert (found[1][key] - grad).norm() < 1e-4 * grad.norm(), key


def test_a_restored_state_begins_its_step() -> None:
    with closing(ROWS["kfac"].make(model_of("mlp"), accumulation=2)) as gm:
        saved = gm.state_dict()
        raw = plain_gradients(gm.model, "mlp", 0)
        assert torch.equal(made_gradients(gm, "mlp", 0)["0.weight"], raw["0.weight"])
        gm.load_state_dict(saved)
        assert torch.equal(made_gradients(gm, "mlp", 0)["0.weight"], raw["0.weight"])
        assert gm.state["step"] == 0
        assert not torch.equal(made_gradients(gm, "mlp", 0)["0.weight"], raw["0.weight"])


@rows
def test_two_ranks_are_compared_with_one(name: str) -> None:
    """The jobs of the neighbouring rank tests do it: here that they do it with every maker."""
    row = ROWS[name]
    gm = row.ranks(model_of("mlp"))
    with closing(gm):
        assert isinstance(gm, row.maker)
        assert gm.served is row.served


@pytest.fixture(scope="module")
def worker() -> Iterator[Supervisor]:
    with Supervisor(workers=1, report=lambda text: None) as supervisor:
        yield supervisor


@served
def test_a_worker_gives_the_same_bits(worker: Supervisor, name: str) -> None:
    found, logs = [], []
    for workers in ("inline", worker.endpoints):
        settings = {"workers": workers, "install_delay": 2, "preconditioner_upd_interval": 2}
        settings["link_timeout"] = 60.0  # whatever the machine is busy with
        row = ROWS[name]
        with closing(row.make(model_of("mlp"), early_steps=0, ema_decay=0.3, **settings)) as gm:
            found.append(run(gm, range(7)))
            logs.append(gm.install_log)
            text = gm.summary()
    assert logs[0] == logs[1] and logs[0]
    assert worker.endpoints[0] in text
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
