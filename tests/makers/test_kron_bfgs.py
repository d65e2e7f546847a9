"""K-BFGS against its dense definition, and the contract of makers."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from kron_bfgs_reference import Reference, observe
from output_cases import CASES, make
from quasi_newton_models import (
    SETTINGS,
    make_batch,
    make_model,
    move,
    one_step,
    raw_gradient,
    train,
)
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils.checkpoint import checkpoint

from distcurv.errors import ConfigError, NumericsError, StateError
from distcurv.makers import KronBfgsGradientMaker, PreconditioningConfig

every_model = pytest.mark.parametrize("name", SETTINGS)
LAYERS = {"mlp": ["0", "3"], "conv": ["0", "3", "5"], "tokens": ["fc1", "fc2"]}


@pytest.fixture(autouse=True)
def _no_hooks_left_behind() -> Iterator[None]:
    yield
    assert not module_hooks._global_forward_hooks
    assert not module_hooks._global_forward_hooks_with_kwargs


def config(**settings: object) -> PreconditioningConfig:
    return PreconditioningConfig(**{"damping": 0.1, **settings})  # type: ignore[arg-type]


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


def whole(model: nn.Module, layer: str, grads: dict[str, Tensor]) -> Tensor:
    weight = grads[f"{layer}.weight"].flatten(1)
    if model.get_submodule(layer).bias is None:
        return weight
    return torch.cat([weight, grads[f"{layer}.bias"].unsqueeze(1)], 1)


def own_grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(
    name: str,
    gm: KronBfgsGradientMaker,
    model: nn.Module,
    references: dict[str, Reference],
    curvature: list[int],
    updates: list[int],
) -> None:
    """Eight steps, by the maker and by the definition."""
    assert gm.covered == LAYERS[name]
    for step in range(8):
        batch = make_batch(name, step)
        seen, raw = observe(model, batch), raw_gradient(model, batch)
        one_step(gm, model, batch)
        for layer, reference in references.items():
            reference.step(seen[layer], curvature=step in curvature, update=step in updates)
            for key in ("H_a", "H_g"):
                close(gm.state[f"{layer}.{key}"], reference.state[key])
            wanted = reference.state["H_g"] @ whole(model, layer, raw) @ reference.state["H_a"]
            close(whole(model, layer, own_grads(model)), wanted)
        for key, grad in own_grads(model).items():  # what is no layer of these is left alone
            if key.rsplit(".", 1)[0] not in LAYERS[name]:
                close(grad, raw[key])
        buffers = dict(model.named_buffers())
        move(model)
        # As the maker will see it: buffers of now, parameters of now, the old batch.
        for layer, after in observe(model, batch).items():
            references[layer].moved(after)
        assert all(torch.equal(b, buffers[key]) for key, b in model.named_buffers())


@pytest.mark.parametrize("minibatch", [False, True])
@pytest.mark.parametrize("decay", [None, 0.3])
@every_model
def test_the_dense_definition(name: str, decay: float | None, minibatch: bool) -> None:
    model = make_model(name)
    gm = KronBfgsGradientMaker(
        model, config(ema_decay=decay), minibatch_hessian_action=minibatch, mu1=0.25
    )
    references = {la: Reference(0.1, decay, minibatch, 0.25) for la in LAYERS[name]}
    compare(name, gm, model, references, [*range(8)], [*range(8)])
    for layer in LAYERS[name]:
        for key in ("H_a", "H_g"):
            values = torch.linalg.eigvalsh(gm.state[f"{layer}.{key}"])
            assert values[0] > 0
            assert values[-1] / values[0] > 1.01  # no multiple of the identity


@every_model
def test_intervals_are_counted_exactly(name: str) -> None:
    model = make_model(name)
    settings = {
        "preconditioner_upd_interval": 3,
        "preconditioner_warmup_steps": 1,
        "curvature_upd_interval": 2,
        "ema_decay": 0.3,
    }
    gm = KronBfgsGradientMaker(model, config(**settings))
    references = {layer: Reference(0.1, 0.3) for layer in LAYERS[name]}
    compare(name, gm, model, references, [0, 2, 4, 6], [0, 1, 4, 7])


def test_inverses_change_from_step_to_step() -> None:
    model = make_model("mlp")
    gm = KronBfgsGradientMaker(model, config(preconditioner_upd_interval=2))
    changed: dict[str, list[int]] = {"H_a": [], "H_g": [], "A": []}
    for step in range(7):
        before = gm.state_dict()
        train(gm, model, "mlp", range(step, step + 1))
        for key, steps in changed.items():
            if not torch.equal(gm.state[f"0.{key}"], before.get(f"0.{key}", torch.zeros(()))):
                steps.append(step)
    # The other half of an update is at the beginning of the step after.
    assert changed == {"H_a": [0, 2, 4, 6], "A": [0, 2, 4, 6], "H_g": [1, 3, 5]}


def test_secant_condition_of_the_input_side() -> None:
    model = make_model("tokens")
    gm = KronBfgsGradientMaker(model, config(ema_decay=0.2))
    reference = Reference(0.1, 0.2)
    for step in range(4):
        reference.step(observe(model, make_batch("tokens", step))["fc1"])
        one_step(gm, model, make_batch("tokens", step))
        s, y = reference.state["last_s"], reference.state["last_y"]
        torch.testing.assert_close(gm.state["fc1.H_a"] @ y, s, rtol=0, atol=1e-10)
        move(model)


def test_data_size_divides() -> None:
    model = make_model("conv")
    gm = KronBfgsGradientMaker(model, config(data_size=36))
    references = {layer: Reference(0.1, None, data_size=36) for layer in LAYERS["conv"]}
    compare("conv", gm, model, references, [*range(8)], [*range(8)])


@pytest.mark.parametrize("minibatch", [False, True])
@pytest.mark.parametrize("decay", [None, 0.3])
@every_model
def test_a_saved_state_continues_bit_for_bit(
    name: str, decay: float | None, minibatch: bool
) -> None:
    """Also right after an update, whose other half the batch is needed for."""
    settings = config(ema_decay=decay, preconditioner_upd_interval=2)
    model = make_model(name)
    gm = KronBfgsGradientMaker(model, settings, minibatch)
    for end in (4, 7):
        train(gm, model, name, range(gm.state["step"], end))
        saved, weights = gm.state_dict(), copy.deepcopy(model.state_dict())
        assert ("pair." in "".join(saved)) == (end == 7)
        assert all(isinstance(v, Tensor) for k, v in saved.items() if k != "step")
        again = make_model(name, seed=1)
        again.load_state_dict(weights)
        other = KronBfgsGradientMaker(again, settings, minibatch)
        other.load_state_dict(saved)
        assert other.state_dict().keys() == saved.keys()
        got = train(other, again, name, range(end, end + 4))
        on = copy.deepcopy(model)
        live = KronBfgsGradientMaker(on, settings, minibatch)
        live.load_state_dict(gm.state_dict())
        for a, b in zip(got, train(live, on, name, range(end, end + 4)), strict=True):
            assert torch.equal(a, b)
    wanted = train(gm, model, name, range(7, 11))
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_foreign_states_are_refused() -> None:
    gm = KronBfgsGradientMaker(make_model("mlp"), config())
    for foreign in (
        {"step": 3},
        KronBfgsGradientMaker(make_model("conv"), config()).state_dict(),
        {**gm.state_dict(), "0.more": torch.zeros(2)},
    ):
        with pytest.raises(StateError):
            gm.load_state_dict(foreign)


@pytest.mark.parametrize("decay", [None, 0.5])
def test_nothing_is_learnt_from_parameters_that_did_not_move(decay: float | None) -> None:
    """Dropout and batch statistics, in training mode: what runs again is the very same."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 3)
    )
    gm = KronBfgsGradientMaker(model, config(ema_decay=decay))
    x, t = make_batch("mlp", 0)
    for _ in range(4):
        random = torch.get_rng_state()
        one_step(gm, model, (x.float(), t))
        assert not torch.equal(torch.get_rng_state(), random)
        # What is run again draws nothing and leaves modes alone.
        random = torch.get_rng_state()
        model.eval()
        gm.state_dict()
        assert torch.equal(torch.get_rng_state(), random)
        assert not model[3].training
        model.train()
    for layer in ("0", "4"):
        h = gm.state[f"{layer}.H_g"]
        assert torch.equal(h, torch.eye(len(h)))
    move(model)
    one_step(gm, model, (x.float(), t))
    assert not torch.equal(gm.state["0.H_g"], torch.eye(8))


def test_validation_between_steps_changes_nothing() -> None:
    def run(validate: bool) -> list[Tensor]:
        model = make_model("conv")
        gm = KronBfgsGradientMaker(model, config())
        for step in range(4):
            params = train(gm, model, "conv", range(step, step + 1))
            if validate:
                model.train()
                in_training = gm.state_dict()
                model.eval()
                model(make_batch("conv", 99)[0])
                saved = gm.state_dict()
                assert not any(module.training for module in model.modules())
                model.train()
                # What runs again runs as it did, whatever mode the model is in now.
                for key, value in in_training.items():
                    assert torch.equal(torch.as_tensor(saved[key]), torch.as_tensor(value)), key
        return params

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


def test_not_a_number_is_not_learnt() -> None:
    model = make_model("mlp")
    gm = KronBfgsGradientMaker(model, config(ema_decay=0.3))
    train(gm, model, "mlp", range(2))
    x, t = make_batch("mlp", 5)
    one_step(gm, model, (x * float("nan"), t))
    train(gm, model, "mlp", range(3, 5))
    for key, value in gm.state.items():
        assert torch.isfinite(torch.as_tensor(value)).all(), key


def test_nothing_finite_to_begin_with_is_an_error() -> None:
    model = make_model("mlp")
    gm = KronBfgsGradientMaker(model, config())
    x, t = make_batch("mlp", 5)
    with pytest.raises(NumericsError, match=r"'0'.*damping 0\.1"):
        one_step(gm, model, (x * float("nan"), t))


@pytest.mark.parametrize("name", CASES)
def test_every_form_of_output(name: str) -> None:
    case = CASES[name]
    model, x, t = make(case)
    gm = KronBfgsGradientMaker(model, config())
    for _ in range(3):
        model.zero_grad()
        case.setup(gm, model, x, t)
        _, loss = gm.forward_and_backward()
        close(loss, case.loss(model(x, t) if case.inside else model(x), t))
        move(model, 0.1)
    for layer in ("fc1", "fc2"):
        h = gm.state[f"{layer}.H_g"]
        assert not torch.equal(h, torch.eye(len(h)))
        assert torch.linalg.eigvalsh(h)[0] > 0


def test_the_hook_is_gone_after_an_error() -> None:
    model = make_model("mlp")
    gm = KronBfgsGradientMaker(model, config())
    one_step(gm, model, make_batch("mlp", 0))
    gm.setup_loss_call(F.cross_entropy, gm.setup_model_call(model, torch.ones(2, 99)), None)
    with pytest.raises(RuntimeError):
        gm.forward_and_backward()
    assert not module_hooks._global_forward_hooks
    train(gm, model, "mlp", range(1, 4))


class Checkpointed(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.inner = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.inner, x, use_reentrant=False) if self.recompute else self.inner(x)
        out: Tensor = self.last(torch.tanh(x))
        return out


def test_checkpointed_layers_count_once() -> None:
    states = []
    for recompute in (True, False):
        torch.manual_seed(0)
        model = Checkpointed(recompute).double()
        gm = KronBfgsGradientMaker(model, config())
        train(gm, model, "mlp", range(3))
        states.append(gm.state_dict())
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        close(torch.as_tensor(value), torch.as_tensor(states[1][key]))


class Sometimes(nn.Module):
    """One layer runs twice, one only where it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(5, 5)
        self.rare = nn.Linear(5, 5)
        self.last = nn.Linear(5, 3)
        self.use = False

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        out: Tensor = self.last(self.rare(x) if self.use else x)
        return out


def test_layers_that_run_twice_or_not_at_all() -> None:
    torch.manual_seed(0)
    model = Sometimes().double()
    gm = KronBfgsGradientMaker(model, config())
    train(gm, model, "mlp", range(2))
    assert "rare.H_a" not in gm.state
    assert torch.equal(gm.state["rare.H_g"], torch.eye(5, dtype=torch.float64))
    model.use = True
    train(gm, model, "mlp", range(2, 4))
    kept = {key: value for key, value in gm.state_dict().items() if key.startswith("rare.")}
    model.use = False
    train(gm, model, "mlp", range(4, 6))
    assert torch.equal(gm.state["rare.H_a"], kept["rare.H_a"])
    # Both runs of `twice` are rows of the same samples.
    x, _ = make_batch("mlp", 105)
    before = Sometimes().double()
    before.load_state_dict(model.state_dict())
    one_step(gm, model, make_batch("mlp", 105))
    inner = torch.tanh(before.twice(x))
    rows = torch.cat([x, inner])
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1).detach()
    close(gm.state["twice.A"], rows.mT @ rows / len(x))


def test_what_is_left_out() -> None:
    model = make_model("tokens")
    gm = KronBfgsGradientMaker(model, config(ignore_modules=["fc1"]))
    assert gm.covered == ["fc2"]
    batch = make_batch("tokens", 0)
    raw = raw_gradient(model, batch)
    one_step(gm, model, batch)
    close(model.fc1.weight.grad, raw["fc1.weight"])
    with pytest.raises(ConfigError, match="no Linear"):
        KronBfgsGradientMaker(nn.LayerNorm(3), config())
    with pytest.raises(ConfigError, match="mu1"):
        KronBfgsGradientMaker(model, config(), mu1=1.0)


def test_the_summary_says_where() -> None:
    text = str(KronBfgsGradientMaker(make_model("mlp"), config()).summary())
    assert "on the ranks, within the step" in text


@pytest.mark.parametrize("how", ["autocast", "parameters"])
def test_half_precision(how: str) -> None:
    """The inverses are float32 and stay near those of a run in float32."""
    states = []
    for half in (False, True):
        model = make_model("mlp").float()
        x, t = make_batch("mlp", 0)
        x = x.float()
        if half and how == "parameters":
            model, x = model.bfloat16(), x.bfloat16()
        gm = KronBfgsGradientMaker(model, config())
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=half and how == "autocast"):
                one_step(gm, model, (x, t))
            move(model, 0.5)
        assert model[0].weight.grad.dtype == model[0].weight.dtype
        states.append(gm.state)
    for key in ("0.H_a", "3.H_g"):
        assert states[1][key].dtype == torch.float32
        assert (states[1][key] - states[0][key]).norm() < 0.3 * states[0][key].norm()
