"""What the Kronecker makers share with the service: updates, states, workers, output forms."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from maker_models import batch_of, loss_of, made_gradients, model_of, plain_gradients
from output_cases import CASES, make, plain_loss
from test_kfac_maker import config, step
from torch import Tensor, nn
from torch.nn import functional as F

from distcurv.errors import ConfigError, StateError
from distcurv.launcher.supervisor import Supervisor
from distcurv.makers import PreconditioningConfig, get_update_schedule
from distcurv.makers.kfac import KfacGradientMaker
from distcurv.makers.natural_gradient import NaturalGradientMaker

STEPS = 24
FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "low-rank": {"rank": 2},
    "swift": {"swift": True},
}


def maker(model: nn.Module, form: str = "dense", **settings: Any) -> KfacGradientMaker:
    own = dict(FORMS[form])
    swift = own.pop("swift", False)
    fisher_type = settings.pop("fisher_type", "fisher_emp")
    return KfacGradientMaker(model, config(**own, **settings), fisher_type, swift=swift)


# -- updates ------------------------------------------------------------------------------

SCHEDULES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "every": ({}, list(range(STEPS))),
    "interval": ({"preconditioner_upd_interval": 5}, [0, 5, 10, 15, 20]),
    "warm-up": (
        {"preconditioner_upd_interval": 6, "preconditioner_warmup_steps": 3},
        [0, 1, 2, 3, 9, 15, 21],
    ),
    **{
        kind: (
            {
                "num_total_steps": STEPS,
                "preconditioner_upd_ratio": 0.3,
                "preconditioner_warmup_ratio": 0.1,
                "preconditioner_interval_type": kind,
            },
            [s for s, due in enumerate(get_update_schedule(STEPS, 0.3, 0.1, kind)) if due],
        )
        for kind in ("constant", "step", "linear")
    },
}


def watched(gm: NaturalGradientMaker) -> list[int]:
    """To be filled with the steps that the service's capture watches."""
    steps: list[int] = []
    if gm.preconditioner is not None:
        capture = gm.preconditioner.source.capture

        def arm(bases: Any, sink: Any, step: int, arm: Any = capture.arm) -> None:
            steps.append(step)
            arm(bases, sink, step)

        vars(capture)["arm"] = arm
    return steps


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("form", ["dense", "low-rank"])
def test_versions_are_installed_at_exactly_the_scheduled_steps(form: str, name: str) -> None:
    settings, expected = SCHEDULES[name]
    model = model_of("mlp")
    with closing(maker(model, form, **settings)) as gm:
        seen = watched(gm)
        for at in range(STEPS):
            step(gm, model, "mlp", at)
        log = gm.install_log
    for block in range(2):
        mine = [record for record in log if record[1] == block]
        assert [record[0] for record in mine] == expected
        assert [record[2] for record in mine] == list(range(1, len(expected) + 1))
        # The version of a step holds that step's statistic.
        assert [record[4] for record in mine] == expected
    assert seen == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ema", [None, 0.5])
def test_statistics_between_updates(form: str, ema: float | None) -> None:
    """With an average all that are due are taken, without one the newest before each update."""
    settings = {"preconditioner_upd_interval": 4, "curvature_upd_interval": 3, "ema_decay": ema}
    with closing(maker(model_of("mlp"), form, **settings)) as gm:
        due = [s for s in range(14) if gm.do_update_curvature(s)]
        taken = watched(gm)
        for at in range(14):
            step(gm, gm.model, "mlp", at)
    # Updates at 0, 4, 8, 12, statistics at 0, 3, 6, 9, 12.
    assert due == ([0, 3, 6, 12] if ema is None else [0, 3, 6, 9, 12])
    assert taken == ([] if form == "swift" else due)


def test_swift_updates_as_scheduled() -> None:
    """Between two updates the direction of one gradient stays what it is."""
    model = model_of("mlp")
    with closing(maker(model, "swift", preconditioner_upd_interval=3)) as gm:
        kept = []
        for at in range(7):
            step(gm, model, "mlp", at)
            kept.append(gm.state["swift"]["installed"]["0/A"])
    changes = [at for at in range(1, 7) if not torch.equal(kept[at], kept[at - 1])]
    assert changes == [3, 6]


# -- states -------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher_type", ["fisher_emp", "fisher_mc"])
@pytest.mark.parametrize("ema", [None, 0.3])
@pytest.mark.parametrize("form", ["low-rank", "swift"])
def test_a_restored_maker_goes_on_bit_for_bit(
    form: str, ema: float | None, fisher_type: str
) -> None:
    settings: dict[str, Any] = {
        "ema_decay": ema,
        "preconditioner_upd_interval": 2,
        "fisher_type": fisher_type,
    }
    with closing(maker(model_of("conv"), form, **settings)) as gm:
        for at in range(3):
            step(gm, gm.model, "conv", at)
        buffer = io.BytesIO()
        torch.save(gm.state_dict(), buffer)
        expected = [step(gm, gm.model, "conv", at) for at in range(3, 7)]
    buffer.seek(0)
    with closing(maker(model_of("conv"), form, **settings)) as other:
        other.load_state_dict(torch.load(buffer, weights_only=True))
        for at, wanted in enumerate(expected, 3):
            found = step(other, other.model, "conv", at)
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_dense_maker_goes_on_from_the_inverse() -> None:
    """Of the kind dense the published inverse is the state, see `distcurv.curvature.kinds.dense`:
    without an average nothing of it is read, so bits are kept; with one four digits."""
    for ema, tolerance in ((None, 0.0), (0.3, 1e-4)):
        with closing(maker(model_of("conv"), ema_decay=ema)) as gm:
            for at in range(3):
                step(gm, gm.model, "conv", at)
            state = gm.state_dict()
            wanted = step(gm, gm.model, "conv", 3)
        with closing(maker(model_of("conv"), ema_decay=ema)) as other:
            other.load_state_dict(state)
            found = step(other, other.model, "conv", 3)
        for name, own in wanted.items():
            assert (found[name] - own).abs().max() <= tolerance * own.abs().max()


def test_the_state_of_another_maker_is_refused() -> None:
    with closing(maker(model_of("mlp"))) as gm, closing(maker(model_of("mlp"), "swift")) as swift:
        with pytest.raises(StateError, match="it is not of a KfacGradientMaker with the fisher"):
            swift.load_state_dict(gm.state_dict())
        with pytest.raises(StateError, match="it is not of a KfacGradientMaker with the fisher"):
            gm.load_state_dict(swift.state_dict())


# -- workers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker() -> Iterator[Supervisor]:
    with Supervisor(workers=1, report=lambda text: None) as supervisor:
        yield supervisor


@pytest.mark.parametrize("form", ["dense", "low-rank"])
def test_a_worker_gives_the_same_bits(worker: Supervisor, form: str) -> None:
    def run(workers: Any, delay: int | None) -> tuple[list[dict[str, Tensor]], list[Any], str]:
        settings = {"workers": workers, "install_delay": delay, "ema_decay": 0.3}
        settings["link_timeout"] = 60.0  # whatever the machine is busy with
        own = maker(model_of("conv"), form, preconditioner_upd_interval=2, **settings)
        with closing(own) as gm:
            made = [step(gm, gm.model, "conv", at) for at in range(6)]
            return made, gm.install_log, gm.summary()

    inline, log, _ = run(0, None)
    remote, other_log, text = run(worker.endpoints, 0)
    assert log == other_log and len(log) == 6
    assert worker.endpoints[0] in text
    for one, other in zip(inline, remote, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_a_delay_a_step_does_not_wait_for_its_worker() -> None:
    """Nobody listens there: training goes on with the plain gradient."""
    own = maker(model_of("mlp"), workers=["tcp://127.0.0.1:9"])
    with closing(own) as gm:
        found = step(gm, gm.model, "mlp", 0)
    raw = plain_gradients(model_of("mlp"), "mlp", 0)
    assert all(torch.equal(found[name], raw[name]) for name in raw)


# -- the interface ------------------------------------------------------------------------


@pytest.mark.parametrize("fisher_type", ["fisher_emp", "fisher_mc"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_all_forms_of_output(name: str, form: str, fisher_type: str) -> None:
    case = CASES[name]
    model, x, t = make(case)
    plain = copy.deepcopy(model)
    loss = plain_loss(case, plain, x, t)
    loss.backward()
    own = dict(FORMS[form])
    loss_type = "mse" if name == "tensor-mse" else "cross_entropy"
    swift = own.pop("swift", False)
    gm = KfacGradientMaker(model, config(**own), fisher_type, loss_type, swift=swift)
    with closing(gm):
        case.setup(gm, model, x, t)
        output, found = gm.forward_and_backward()
    assert torch.equal(found, loss)
    assert output is gm.model_output
    for parameter, raw in zip(model.parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None and raw.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert (parameter.grad - raw.grad).norm() > 0.05 * raw.grad.norm()


def test_summary_says_what_is_computed_where() -> None:
    with closing(maker(model_of("tokens"), "low-rank")) as gm:
        text = gm.summary()
        assert text.startswith("KfacGradientMaker: served, workers=0")
        assert "lowrank" in text and "unitwise" in text
    own = NaturalGradientMaker(model_of("tokens"), config(), "fisher_emp", "swift_kron")
    with closing(own) as gm:
        assert "head (Linear): swift_kron, on the ranks, within the step" in gm.summary()
        assert gm.block_names == ["embed", "norm"]


def test_a_loss_of_which_nothing_is_known_is_of_samples() -> None:
    """F.nll_loss: empirical statistics are those of F.cross_entropy, which says its terms."""
    found = []
    for known in (True, False):
        model = model_of("mlp")
        with closing(maker(model)) as gm:
            x, t = batch_of("mlp", 0)
            dummy = gm.setup_model_call(model, x)
            if known:
                gm.setup_loss_call(F.cross_entropy, dummy, t)
            else:
                gm.setup_loss_call(F.nll_loss, F.log_softmax(dummy, -1), t)
            gm.forward_and_backward()
        found.append(model[0].weight.grad)  # type: ignore[index,union-attr]
    assert torch.allclose(*found, rtol=1e-5)


def test_data_size_without_logits_needs_them_named() -> None:
    model = model_of("mlp")
    x, t = batch_of("mlp", 0)

    def call() -> dict[str, Tensor]:
        return {"score": loss_of(model(x), t)}

    with closing(maker(model, data_size=8)) as gm:
        gm.setup_loss_repr(gm.setup_model_call(call)["score"])
        with pytest.raises(ConfigError, match="say with setup_logits_repr where they are"):
            gm.forward_and_backward()


def test_made_gradients_of_a_partial_config() -> None:
    """PreconditioningConfig's own defaults: damping 1e-7, an update at each step."""
    model = model_of("mlp")
    with closing(KfacGradientMaker(model, PreconditioningConfig(damping=1e-2))) as gm:
        found = made_gradients(gm, "mlp", 0)
    assert all(torch.isfinite(grad).all() for grad in found.values())


@pytest.mark.parametrize("ema", [None, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_an_update_without_a_new_statistic_changes_nothing(form: str, ema: float | None) -> None:
    settings = {"preconditioner_upd_interval": 2, "curvature_upd_interval": 4, "ema_decay": ema}
    with closing(maker(model_of("conv"), form, **settings)) as gm:
        found = [step(gm, gm.model, "conv", 4 if at == 4 else 0) for at in range(7)]
        log = gm.install_log
    if form != "swift":
        assert sorted({record[0] for record in log}) == [0, 4]
    for at in (1, 2, 3):
        assert all(torch.equal(found[at][name], found[0][name]) for name in found[0])
    assert all(torch.equal(found[5][name], found[6][name]) for name in found[0])
    assert not torch.equal(found[5]["0.weight"], found[0]["0.weight"])
