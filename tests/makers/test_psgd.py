"""The PSGD makers: the dense definition, the fit of a known Hessian, and the contract of makers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from output_cases import CASES, make
from quasi_newton_models import (
    SETTINGS,
    make_batch,
    make_model,
    one_step,
    raw_gradient,
    set_up,
    train,
)
from torch import Tensor, nn

from distcurv.errors import ConfigError, StateError
from distcurv.makers import (
    KronPsgdGradientMaker,
    PreconditioningConfig,
    PsgdGradientMaker,
)

MAKERS = {"dense": PsgdGradientMaker, "kron": KronPsgdGradientMaker}
both = pytest.mark.parametrize("kind", MAKERS)
every_model = pytest.mark.parametrize("name", SETTINGS)


def config(**settings: object) -> PreconditioningConfig:
    return PreconditioningConfig(**{"damping": 0.1, **settings})  # type: ignore[arg-type]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def dense(q: Tensor) -> Tensor:
    return q.diag() if q.dim() == 1 else q


def factors(gm: PsgdGradientMaker) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in gm.state.items() if k not in ("step", "generator")}


@every_model
def test_dense_gradient_is_q_transposed_q_g(name: str) -> None:
    model = make_model(name)
    gm = PsgdGradientMaker(model, config(), precond_lr=0.1)
    for seed in range(3):
        batch = make_batch(name, seed)
        g = flat(list(raw_gradient(model, batch).values()))
        one_step(gm, model, batch)
        q = gm.state["Q"]
        got = flat([p.grad for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(got, q.mT @ q @ g, rtol=1e-10, atol=1e-12)
        assert (got - g).norm() > 0.05 * g.norm()


@every_model
def test_kron_gradient_is_that_of_the_dense_kronecker_products(name: str) -> None:
    """Every parameter has a part in it, also norms, embeddings and biases."""
    model = make_model(name)
    gm = KronPsgdGradientMaker(model, config(), precond_lr=0.1)
    for seed in range(3):
        batch = make_batch(name, seed)
        raw = raw_gradient(model, batch)
        one_step(gm, model, batch)
    seen = set()
    for block, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            left, right = dense(gm.state[f"{block}.left"]), dense(gm.state[f"{block}.right"])
            assert left.shape == (len(module.weight),) * 2
            p = torch.kron(left.mT @ left, right.mT @ right)
            g = raw[f"{block}.weight"].flatten(1)
            if module.bias is not None:
                g = torch.cat([g, raw[f"{block}.bias"].unsqueeze(1)], 1)
            wanted = (p @ g.flatten()).view(g.shape)
            if module.bias is not None:
                torch.testing.assert_close(module.bias.grad, wanted[:, -1], rtol=1e-10, atol=1e-12)
                wanted = wanted[:, :-1]
                seen.add(f"{block}.bias")
            got = module.weight.grad.flatten(1)
            seen.add(f"{block}.weight")
        elif isinstance(module, nn.Embedding):
            q = torch.kron(
                gm.state[f"{block}.weight.left"].diag(), gm.state[f"{block}.weight.right"]
            )
            got = module.weight.grad.flatten()
            wanted = q.mT @ q @ raw[f"{block}.weight"].flatten()
            seen.add(f"{block}.weight")
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            got = flat([module.weight.grad, module.bias.grad])
            q = flat([gm.state[f"{block}.{part}.diagonal"] for part in ("weight", "bias")])
            wanted = q**2 * flat([raw[f"{block}.weight"], raw[f"{block}.bias"]])
            seen |= {f"{block}.weight", f"{block}.bias"}
        else:
            continue
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    assert seen == set(raw)
    for key, parameter in model.named_parameters():
        assert (parameter.grad - raw[key]).norm() > 0.01 * raw[key].norm(), key


def quadratic() -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """(model, inputs, targets, Hessian) of a linear least squares problem."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Linear(3, 2, bias=False).double()
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64) @ torch.diag(
        torch.tensor([1.5, 1.0, 0.3]).double()
    )
    t = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    # F.mse_loss averages over N and over the two outputs.
    return model, x, t, torch.kron(torch.eye(2), x.mT @ x / 20)


@both
@pytest.mark.parametrize("damping", [1e-7, 0.5])
def test_fits_a_known_hessian(kind: str, damping: float) -> None:
    model, x, t, h = quadratic()
    gm = MAKERS[kind](model, config(damping=damping))
    gm.setup_loss_call(F.mse_loss, gm.setup_model_call(model, x), t)
    before = gm.criterion(20)
    for step in torch.logspace(-0.7, -2.7, 1200).tolist():
        gm.precond_lr = step
        gm.update_preconditioner()
    assert gm.criterion(20) < 0.95 * before
    if kind == "dense":
        q = gm.state["Q"]
    else:
        q = torch.kron(gm.state["Linear.left"], gm.state["Linear.right"])
    values, basis = torch.linalg.eigh(h)
    wanted = basis @ torch.diag((values**2 + damping**2).rsqrt()) @ basis.mT
    limit = 0.02 if damping < 0.1 else 0.12  # the random part of a damped pair stays
    assert (q.mT @ q - wanted).norm() <= limit * wanted.norm()
    if damping < 0.1:
        # A Newton step.
        model.zero_grad()
        gm.forward_and_backward()
        weight = model.weight.detach() - model.weight.grad
        solution = torch.linalg.lstsq(x, t).solution.mT
        assert (weight - solution).norm() < 0.1 * (model.weight - solution).norm()


@both
def test_damping_bounds_what_has_no_curvature(kind: str) -> None:
    """Without it P would grow for ever where H is zero."""
    model = nn.Linear(3, 2, bias=False).double()
    x = torch.zeros(4, 3, dtype=torch.float64)
    gm = MAKERS[kind](model, config(damping=0.5), precond_lr=0.1)
    gm.setup_loss_call(F.mse_loss, gm.setup_model_call(model, x), torch.ones(4, 2).double())
    for _ in range(300):
        gm.update_preconditioner()
    q = gm.state["Q"] if kind == "dense" else torch.kron(*list(factors(gm).values()))
    assert 1 < torch.linalg.eigvalsh(q.mT @ q)[-1] < 8  # towards 2


@both
@every_model
def test_the_criterion_decreases(kind: str, name: str) -> None:
    model = make_model(name)
    gm = MAKERS[kind](model, config(), precond_lr=0.1)
    set_up(gm, model, make_batch(name, 0))
    before = gm.criterion(10)
    state = {k: v.clone() for k, v in gm.state_dict().items() if isinstance(v, Tensor)}
    assert gm.criterion(10) == before  # the same random steps, and nothing is used up
    assert all(torch.equal(gm.state[k], v) for k, v in state.items())
    for _ in range(60):
        gm.update_preconditioner()
    assert gm.criterion(10) < 0.95 * before


@both
def test_updates_are_counted_exactly(kind: str) -> None:
    model = make_model("mlp")
    gm = MAKERS[kind](model, config(preconditioner_upd_interval=3, preconditioner_warmup_steps=2))
    changed = []
    for step in range(10):
        before, drawn = factors(gm), gm.state["generator"].clone()
        raw = raw_gradient(model, make_batch("mlp", step))
        one_step(gm, model, make_batch("mlp", step))
        if any(not torch.equal(v, before[k]) for k, v in factors(gm).items()):
            changed.append(step)
        assert torch.equal(gm.state["generator"], drawn) == (step not in changed)
        assert not torch.equal(model[0].weight.grad, raw["0.weight"])  # preconditioned all the same
    assert changed == [0, 1, 2, 5, 8]
    assert gm.state["step"] == 10


@both
@every_model
def test_a_saved_state_continues_bit_for_bit(kind: str, name: str) -> None:
    model = make_model(name)
    gm = MAKERS[kind](model, config(preconditioner_upd_interval=2))
    train(gm, model, name, range(5))
    saved, weights = gm.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    wanted = train(gm, model, name, range(5, 9))
    again = make_model(name, seed=1)
    again.load_state_dict(weights)
    other = MAKERS[kind](again, config(preconditioner_upd_interval=2))
    other.load_state_dict(saved)
    for got, want in zip(train(other, again, name, range(5, 9)), wanted, strict=True):
        assert torch.equal(got, want)
    for key, value in gm.state_dict().items():
        assert torch.equal(torch.as_tensor(other.state[key]), torch.as_tensor(value)), key


@both
def test_foreign_states_are_refused(kind: str) -> None:
    gm = MAKERS[kind](make_model("mlp"), config())
    for foreign in (
        {"step": 3},
        MAKERS[kind](make_model("conv"), config()).state_dict(),
        {**gm.state_dict(), "more": torch.zeros(2)},
        {k: v for k, v in gm.state_dict().items() if k != "generator"},
    ):
        with pytest.raises(StateError):
            gm.load_state_dict(foreign)


@both
def test_the_seed_rules_the_random_steps(kind: str) -> None:
    def states(seed: int, noise: int) -> dict[str, Tensor]:
        torch.manual_seed(noise)  # torch's own generator is not used
        model = make_model("mlp")
        gm = MAKERS[kind](model, config(seed=seed))
        train(gm, model, "mlp", range(2))
        return factors(gm)

    first, same, other = states(1, 1), states(1, 2), states(2, 1)
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


@both
@every_model
def test_ignored_modules_keep_their_gradient(kind: str, name: str) -> None:
    model = make_model(name)
    kept = {"mlp": "0.", "conv": "0.", "tokens": "fc1."}[name]
    gm = MAKERS[kind](model, config(ignore_modules=[kept[:-1]]), precond_lr=0.1)
    batch = make_batch(name, 0)
    raw = raw_gradient(model, batch)
    one_step(gm, model, batch)
    for key, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, raw[key], rtol=1e-9) == key.startswith(kept), key


@both
@pytest.mark.parametrize("name", CASES)
def test_every_form_of_output(kind: str, name: str) -> None:
    case = CASES[name]
    model, x, t = make(case)
    gm = MAKERS[kind](model, config(), precond_lr=0.1)
    for _ in range(2):
        model.zero_grad()
        case.setup(gm, model, x, t)
        gm.forward_and_backward()
    gradients = torch.autograd.grad(
        case.loss(model(x, t) if case.inside else model(x), t), list(model.parameters())
    )
    for parameter, raw in zip(model.parameters(), gradients, strict=True):
        assert torch.isfinite(parameter.grad).all()
        assert not torch.allclose(parameter.grad, raw, rtol=1e-3)
        assert (parameter.grad * raw).sum() > 0


def test_running_statistics_see_each_batch_once() -> None:
    model, plain = make_model("conv"), make_model("conv")
    gm = KronPsgdGradientMaker(model, config())
    one_step(gm, model, make_batch("conv", 0))
    plain(make_batch("conv", 0)[0])
    for got, want in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(got, want)


@both
def test_a_parameter_without_gradient_stays_without(kind: str) -> None:
    model = make_model("mlp")
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    gm = MAKERS[kind](model, config())
    one_step(gm, model, make_batch("mlp", 0))
    assert model.unused.grad is None


def test_large_sides_have_a_diagonal() -> None:
    model = nn.Sequential(nn.Linear(9, 4))
    gm = KronPsgdGradientMaker(model, config(), max_dim=6)
    assert gm.state["0.left"].shape == (4, 4)
    assert gm.state["0.right"].shape == (10,)


def test_half_precision_parameters() -> None:
    model = make_model("mlp").bfloat16()
    gm = KronPsgdGradientMaker(model, config(), precond_lr=0.1)
    x, t = make_batch("mlp", 0)
    one_step(gm, model, (x.bfloat16(), t))
    assert gm.state["0.left"].dtype == torch.float32
    assert model[0].weight.grad.dtype == torch.bfloat16


@both
@pytest.mark.parametrize(
    "settings", [{"precond_lr": 0.0}, {"precond_lr": 1.0}, {"init_scale": 0.0}]
)
def test_bad_settings_are_refused(kind: str, settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        MAKERS[kind](make_model("mlp"), config(), **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ignore_modules"):
        MAKERS[kind](make_model("mlp"), config(ignore_modules=[nn.Module]))


@both
def test_the_summary_says_where(kind: str) -> None:
    text = str(MAKERS[kind](make_model("mlp"), config()).summary())
    assert "on the ranks, within the step" in text
