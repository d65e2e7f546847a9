"""LowRankSOAP against SOAP written out densely in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from soap_oracle import DenseSoap, spread_gradients
from torch import Tensor, nn

from distcurv.config import SoapConfig
from distcurv.errors import ConfigError, StateError
from distcurv.optim import LowRankSOAP

# Every step refreshes in process and installs in the same step: delay 0.
EARLY: dict[str, Any] = {
    "preconditioner_upd_interval": 1,
    "curvature_upd_interval": 1,
    "early_steps": 10_000,
}
# The same by the deterministic mode.
NO_DELAY: dict[str, Any] = {
    "preconditioner_upd_interval": 1,
    "curvature_upd_interval": 1,
    "early_steps": 0,
    "install_delay": 0,
}
STEPS = 20


def soap(params: Any, **settings: Any) -> LowRankSOAP:
    """Full rank and delay 0 unless said otherwise."""
    return LowRankSOAP(
        params,
        **({"lr": 0.02, "rank": 64, "factor_decay": 0.95, "workers": "inline"} | EARLY | settings),
    )


def feed(optimizer: LowRankSOAP, param: Tensor, grads: list[Tensor]) -> None:
    for grad in grads:
        param.grad = grad.to(param.dtype).clone().view(param.shape)
        optimizer.step()


def feed_both(
    optimizer: LowRankSOAP, param: Tensor, oracle: DenseSoap, grads: list[Tensor]
) -> None:
    """The optimizer and the oracle, step by step."""
    for grad in grads:
        oracle.step(grad)
        feed(optimizer, param, [grad])


def moved_error(param: Tensor, oracle: DenseSoap, start: Tensor) -> float:
    """Distance to the oracle relative to how far it moved."""
    got = param.detach().double().reshape(oracle.weight.shape)
    moved = (oracle.weight - start.double().reshape(oracle.weight.shape)).norm()
    assert moved > 0
    return ((got - oracle.weight).norm() / moved).item()


# -- the dense oracle ---------------------------------------------------------------------


@pytest.mark.parametrize("settings", [EARLY, NO_DELAY], ids=["early", "delay 0"])
@pytest.mark.parametrize("shape", [(5, 5), (8, 8)])
def test_full_rank_without_delay_is_soap(shape: tuple[int, int], settings: dict[str, Any]) -> None:
    param = nn.Parameter(torch.randn(shape))
    start = param.detach().clone()
    oracle = DenseSoap(start, lr=0.02, early=settings is EARLY)
    grads = spread_gradients(shape, STEPS, seed=1)
    with soap([param], **settings) as optimizer:
        feed_both(optimizer, param, oracle, grads)
        assert optimizer.metrics()["version"] == STEPS
    assert moved_error(param, oracle, start) < 2e-4


@pytest.mark.parametrize("shape", [(3, 6), (7, 4)])
def test_rectangles_too(shape: tuple[int, int]) -> None:
    param = nn.Parameter(torch.randn(shape))
    start = param.detach().clone()
    oracle = DenseSoap(start, lr=0.02)
    grads = spread_gradients(shape, STEPS, seed=2)
    with soap([param]) as optimizer:
        feed_both(optimizer, param, oracle, grads)
    assert moved_error(param, oracle, start) < 2e-4


def test_options_mean_what_they_mean_in_the_oracle() -> None:
    options: dict[str, Any] = {
        "lr": 0.05,
        "betas": (0.8, 0.9),
        "eps": 1e-3,
        "weight_decay": 0.1,
    }
    param = nn.Parameter(torch.randn(6, 6))
    start = param.detach().clone()
    oracle = DenseSoap(start, decay=0.7, **options)
    grads = spread_gradients((6, 6), STEPS, seed=3)
    with soap([param], factor_decay=0.7, **options) as optimizer:
        feed_both(optimizer, param, oracle, grads)
    assert moved_error(param, oracle, start) < 2e-4


def test_a_stale_basis_keeps_fresh_moments() -> None:
    """install_delay=3: the oracle uses the factors as they were three steps ago."""
    delay, interval = 3, 1
    param = nn.Parameter(torch.randn(5, 5))
    start = param.detach().clone()
    oracle = DenseSoap(start, lr=0.02, early=False)
    grads = spread_gradients((5, 5), STEPS, seed=4)
    settings = NO_DELAY | {"install_delay": delay, "preconditioner_upd_interval": interval}
    with soap([param], **settings) as optimizer:
        first = optimizer._open_pipeline().installed[0].tensors
        oracle.basis_A, oracle.basis_G = first["A.U"].double(), first["G.U"].double()
        for step, grad in enumerate(grads):
            if step >= delay:
                known = grads[step - delay].double()
                oracle.refresh(known.T @ known, known @ known.T)
            oracle.update(grad)
            feed(optimizer, param, [grad])
        assert [(r.step, r.folded_through) for r in optimizer.install_log] == [
            (step, step - delay) for step in range(delay, STEPS)
        ]
    assert moved_error(param, oracle, start) < 2e-4


def test_a_network_follows_the_oracle() -> None:
    """Gradients of a network have directions that are all but empty: eps keeps their rounding
    from being divided by its own root.  Errors feed back, hence the wider tolerance."""
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    twin = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double()
    twin.load_state_dict(model.state_dict())
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y = torch.randn(64, 5), torch.randn(64, 5)
    named = dict(twin.named_parameters())
    matrices = {n: DenseSoap(p, lr=0.01, eps=1e-3) for n, p in named.items() if p.dim() == 2}
    options: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.0}
    vectors = torch.optim.AdamW([p for p in twin.parameters() if p.dim() == 1], lr=0.01, **options)
    with soap(model, lr=0.01, eps=1e-3) as optimizer:
        for _ in range(STEPS):
            optimizer.zero_grad()
            ((model(x) - y) ** 2).mean().backward()
            optimizer.step()
            twin.zero_grad()
            ((twin(x.double()) - y.double()) ** 2).mean().backward()
            vectors.step()
            for name, param in twin.named_parameters():
                if name in matrices:
                    assert param.grad is not None
                    matrices[name].step(param.grad)
                    param.data.copy_(matrices[name].weight)
    for name, param in model.named_parameters():
        expected = named[name].detach()
        moved = (expected - start[name].double()).norm()
        assert (param.detach().double() - expected).norm() / moved < 5e-3, name


# -- vectors, convolutions, dtypes --------------------------------------------------------


def test_vectors_get_exactly_adamw() -> None:
    shapes = [(7,), (), (1, 5), (5, 1), (1, 1, 3)]
    mine = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    options: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}
    adamw = torch.optim.AdamW(theirs, fused=True, **options)
    with soap(mine, **options) as optimizer:
        assert optimizer.block_names == []
        for _ in range(STEPS):
            for a, b in zip(mine, theirs, strict=True):
                a.grad = torch.randn_like(a)
                b.grad = a.grad.clone()
            optimizer.step()
            adamw.step()
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)


def test_vectors_may_lie_anyhow_in_memory() -> None:
    """A fused AdamW goes through memory in step, whatever the strides."""
    narrow = torch.randn(1, 5).bfloat16()
    starts = [torch.randn(6, 2)[:, :1], torch.randn(9)[::2], torch.randn(5), torch.randn(0), narrow]
    mine = [nn.Parameter(start) for start in starts]
    assert not mine[0].is_contiguous() and not mine[1].is_contiguous()
    theirs = [nn.Parameter(start.clone()) for start in starts]
    options: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}
    adamw = torch.optim.AdamW(theirs, **options)
    with soap(mine, **options) as optimizer:
        for _ in range(STEPS):
            for a, b in zip(mine, theirs, strict=True):
                b.grad = torch.randn_like(b)
                a.grad = b.grad.clone()
            mine[2].grad = torch.stack([theirs[2].grad, torch.ones(5)], 1)[:, 0]
            optimizer.step()
            adamw.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_a_convolution_is_a_matrix_in_any_memory_layout(layout: str) -> None:
    grads = spread_gradients((4, 12), STEPS, seed=5)
    start = torch.randn(4, 12)
    plain = nn.Parameter(start.clone())
    with soap([plain], rank=3) as optimizer:
        feed(optimizer, plain, grads)

    weight = start.clone().view(4, 3, 2, 2)
    if layout == "channels_last":
        weight = weight.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        weight = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    conv = nn.Parameter(weight)
    assert conv.is_contiguous() == (layout == "contiguous")
    with soap([conv], rank=3) as optimizer:
        for grad in grads:
            conv.grad = torch.empty_like(conv).copy_(grad.view(4, 3, 2, 2))
            optimizer.step()
    moved = (plain.detach() - start).norm()
    assert (conv.detach().reshape(4, 12) - plain.detach()).norm() / moved < 1e-4


def test_a_gradient_in_another_layout_than_its_parameter() -> None:
    grads = spread_gradients((5, 4), STEPS, seed=6)
    results = []
    for transposed in (False, True):
        param = nn.Parameter(torch.zeros(5, 4))
        with soap([param]) as optimizer:
            for grad in grads:
                param.grad = grad.T.contiguous().T if transposed else grad.clone()
                optimizer.step()
        results.append(param.detach())
    assert torch.allclose(*results, rtol=1e-4, atol=1e-6)


def test_float64_parameters() -> None:
    param = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    start = param.detach().clone()
    oracle = DenseSoap(start, lr=0.02)
    grads = [g.double() for g in spread_gradients((6, 6), STEPS, seed=7)]
    with soap([param]) as optimizer:
        feed_both(optimizer, param, oracle, grads)
    assert param.dtype == torch.float64
    assert moved_error(param, oracle, start) < 2e-4


def test_bfloat16_parameters_keep_float32_moments() -> None:
    param = nn.Parameter(torch.randn(6, 6).bfloat16())
    start = param.detach().clone()
    oracle = DenseSoap(start, lr=0.02)
    grads = [g.bfloat16() for g in spread_gradients((6, 6), STEPS, seed=8)]
    with soap([param]) as optimizer:
        feed_both(optimizer, param, oracle, grads)
        kept = [v for v in optimizer.state[param].values() if isinstance(v, Tensor)]
        assert kept
        assert all(v.dtype == torch.float32 for v in kept)
    assert param.dtype == torch.bfloat16
    assert moved_error(param, oracle, start) < 0.1  # the parameter itself has 8 bits


# -- the interface of torch.optim ---------------------------------------------------------


def small_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 6), nn.LayerNorm(6)
    )


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, first: int = 0
) -> list[float]:
    """Losses of some steps on data that depends on the step's number alone."""
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        param = next(model.parameters())
        x = torch.randn(16, 1, 4, 4, generator=generator).to(param.dtype)
        y = torch.randn(16, 6, generator=generator).to(param.dtype)
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


LOW: dict[str, Any] = {"rank": 2, "preconditioner_upd_interval": 4, "early_steps": 8}


def test_a_model_and_its_parameters_give_equal_results() -> None:
    models = [small_model() for _ in range(4)]
    given = [
        models[0],
        models[1].named_parameters(),
        [{"params": list(models[2].named_parameters())}],
    ]
    for model, params in zip(models, given, strict=False):
        with soap(params, **LOW) as optimizer:
            train(model, optimizer, 15)
            assert optimizer.block_names == ["0.weight", "3.weight"]
    assert same(models[0], models[1])
    assert same(models[0], models[2])
    with soap(models[3].parameters(), **LOW) as optimizer:
        assert optimizer.block_names == ["param0", "param2"]


def test_nameless_parameters_work_alike_but_for_the_random_start() -> None:
    """Names only seed the first bases; at full rank these do not matter."""
    models = [small_model() for _ in range(2)]
    for model, params in zip(models, [models[0], models[1].parameters()], strict=True):
        with soap(params, eps=1e-3) as optimizer:
            train(model, optimizer, 10)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_param_groups_have_options_of_their_own() -> None:
    a, b, c = (nn.Parameter(torch.ones(4, 4)) for _ in range(3))
    groups = [{"params": [a], "lr": 0.0}, {"params": [b]}, {"params": [c], "weight_decay": 0.5}]
    with soap(groups, lr=0.1) as optimizer:
        for param in (a, b, c):
            param.grad = torch.zeros(4, 4)
        optimizer.step()
    assert torch.equal(a, torch.ones(4, 4))
    assert torch.equal(b, torch.ones(4, 4))
    assert torch.allclose(c, torch.full((4, 4), 1 - 0.1 * 0.5))


def test_the_first_gradient_of_a_matrix_gives_no_direction() -> None:
    """It is diagonal in its own eigenbasis; beside the diagonal is only rounding."""
    matrix, vector = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    with soap([matrix, vector], weight_decay=0.1) as optimizer:
        matrix.grad, vector.grad = torch.randn(4, 4), torch.randn(4)
        optimizer.step()
        decayed = torch.ones(4, 4) * (1 - 0.02 * 0.1)
        assert torch.allclose(matrix, decayed)
        assert not torch.allclose(vector, decayed[0])
        optimizer.step()
        assert not torch.allclose(matrix, decayed, atol=0.01)


def test_learning_rate_schedules() -> None:
    param = nn.Parameter(torch.randn(5, 5))
    start = param.detach().clone()
    oracle = DenseSoap(start, lr=0.08)
    grads = spread_gradients((5, 5), STEPS, seed=9)
    with soap([param], lr=0.08) as optimizer:
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        for grad in grads:
            feed_both(optimizer, param, oracle, [grad])
            schedule.step()
            oracle.lr *= 0.8
    assert moved_error(param, oracle, start) < 2e-4


def test_a_tensor_learning_rate() -> None:
    results = []
    for lr in (0.02, torch.tensor(0.02)):
        param = nn.Parameter(torch.ones(5, 5))
        with soap([param], lr=lr) as optimizer:
            feed(optimizer, param, spread_gradients((5, 5), 5, seed=9))
        results.append(param.detach())
    assert torch.allclose(*results, atol=1e-7)


def test_a_closure_is_called_once_with_gradients_enabled() -> None:
    models = [small_model(), small_model()]
    x, y = torch.randn(8, 1, 4, 4), torch.randn(8, 6)

    def loss_of(model: nn.Module) -> Tensor:
        return ((model(x) - y) ** 2).mean()

    calls = []
    with soap(models[0], **LOW) as first, soap(models[1], **LOW) as second:

        def closure() -> float:
            calls.append(torch.is_grad_enabled())
            first.zero_grad()
            loss = loss_of(models[0])
            loss.backward()
            return loss.item()

        for step in range(6):
            returned = first.step(closure)
            second.zero_grad()
            loss = loss_of(models[1])
            loss.backward()
            assert second.step() is None
            assert returned == loss.item()
            assert len(calls) == step + 1
    assert all(calls)
    assert same(*models)


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    a, b, v = (nn.Parameter(torch.ones(*shape)) for shape in [(4, 4), (4, 4), (3,)])
    with soap([a, b, v], weight_decay=0.1) as optimizer:
        for grad in spread_gradients((4, 4), 5, seed=1):
            a.grad = grad
            optimizer.step()
        assert torch.equal(b, torch.ones(4, 4))
        assert torch.equal(v, torch.ones(3))
        assert b not in optimizer.state or not optimizer.state[b]
        feed(optimizer, b, spread_gradients((4, 4), 5, seed=2))
        assert not torch.equal(b, torch.ones(4, 4))
    assert not torch.equal(a, torch.ones(4, 4))


def test_frozen_parameters_are_no_blocks() -> None:
    model = small_model()
    model[0].requires_grad_(False)
    before = model[0].weight.detach().clone()
    with soap(model) as optimizer:
        assert optimizer.block_names == ["3.weight"]
        train(model, optimizer, 3)
    assert torch.equal(model[0].weight, before)


# -- activations --------------------------------------------------------------------------


def test_activations_equal_soap_on_factors_made_by_hand() -> None:
    linear = nn.Linear(5, 5, bias=False)
    start = linear.weight.detach().clone()
    oracle = DenseSoap(start, lr=0.02)
    scale = 1.6 ** -torch.arange(5)
    with soap(linear, source="activations") as optimizer:
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(32, 5, generator=generator) * scale
            y = torch.randn(32, 5, generator=generator) * scale.flip(0)
            optimizer.zero_grad()
            out = linear(x)
            out.retain_grad()
            ((out - y) ** 2).mean(0).sum().backward()
            per_sample = 2 * (out.detach() - y).double()  # d loss_n / d out_n
            factor_A = x.double().T @ x.double() / len(x)
            factor_G = per_sample.T @ per_sample / len(x)
            optimizer.step()
            assert linear.weight.grad is not None
            oracle.refresh(factor_A, factor_G)
            oracle.update(linear.weight.grad)
    assert moved_error(linear.weight, oracle, start) < 5e-4


def test_layers_that_cannot_be_watched_use_their_gradient() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.watched = nn.Linear(4, 4)
            self.raw = nn.Parameter(torch.eye(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.watched(x) @ self.raw

    model = Odd()
    with soap(model, source="activations") as optimizer:
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
        names = optimizer.block_names
        installed = {r.block for r in optimizer.install_log}
        assert sorted(names) == ["raw", "watched.weight"]
        assert installed == {0, 1}


def test_activations_need_the_model() -> None:
    with pytest.raises(ConfigError, match="needs the model to watch: pass the model"):
        soap(nn.Linear(3, 3).parameters(), source="activations")


# -- state --------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["gradient", "activations"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("via_file", [False, True])
def test_a_resumed_run_continues_bit_for_bit(
    tmp_path: Any, source: str, dtype: torch.dtype, via_file: bool
) -> None:
    """Saved at the end of a window, refreshes in process: nothing waits that could be lost."""
    settings = {
        "rank": 2,
        "preconditioner_upd_interval": 4,
        "early_steps": 4,
        "install_delay": 0,
        "weight_decay": 0.01,
        "source": source,
    }
    whole, half = small_model().to(dtype), small_model().to(dtype)
    with soap(whole, **settings) as optimizer:
        train(whole, optimizer, 20)
        expected = optimizer.install_log
    with soap(half, **settings) as optimizer:
        train(half, optimizer, 9)  # windows end at steps 4, 8, 12, ...
        state: Any = {"model": half.state_dict(), "optimizer": optimizer.state_dict()}
        if via_file:
            torch.save(state, tmp_path / "checkpoint.pt")
            state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed = small_model().to(dtype)
    resumed.load_state_dict(state["model"])
    with soap(resumed, **settings) as optimizer:
        optimizer.load_state_dict(state["optimizer"])
        for block in optimizer._matrices:
            moments = [v for v in optimizer.state[block.param].values() if isinstance(v, Tensor)]
            assert all(v.dtype == torch.float32 for v in moments)
        train(resumed, optimizer, 11, first=9)
        assert optimizer.install_log == expected
    assert same(whole, resumed)


def test_loading_does_not_tie_two_optimizers_together() -> None:
    first, second = small_model(), small_model()
    with soap(first, **LOW) as a, soap(second, **LOW) as b:
        train(first, a, 5)
        b.load_state_dict(a.state_dict())
        kept = {k: v.clone() for k, v in a.state[first[3].weight].items() if isinstance(v, Tensor)}
        train(second, b, 5, first=5)
        for key, value in kept.items():
            assert torch.equal(a.state[first[3].weight][key], value), key


def test_foreign_states_are_refused() -> None:
    model = small_model()
    with soap(model, **LOW) as optimizer:
        adam = torch.optim.AdamW(model.parameters())
        with pytest.raises(StateError, match="no 'curvature' entry: it is not of a LowRankSOAP"):
            optimizer.load_state_dict(adam.state_dict())
        with (
            soap(nn.Linear(3, 3)) as other,
            pytest.raises(StateError, match="of other blocks"),
        ):
            optimizer.load_state_dict(other.state_dict())
        with (
            soap(small_model(), **(LOW | {"rank": 3})) as other,
            pytest.raises(StateError, match="use the kind, rank and tails that it was saved with"),
        ):
            optimizer.load_state_dict(other.state_dict())


# -- what is refused ----------------------------------------------------------------------


def test_sparse_gradients_are_refused_by_name() -> None:
    embedding = nn.Embedding(6, 4, sparse=True)
    with soap(embedding, **LOW) as optimizer:
        embedding(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(ConfigError, match="weight has a sparse gradient: use sparse=False"):
            optimizer.step()


def test_sparse_gradients_are_refused_where_no_statistic_is_due() -> None:
    embedding = nn.Embedding(6, 4, sparse=True)
    settings = LOW | {"curvature_upd_interval": 4, "early_steps": 0}
    with soap(embedding, **settings) as optimizer:
        embedding.weight.grad = torch.ones(6, 4)
        optimizer.step()
        embedding.weight.grad = None
        embedding(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(ConfigError, match="weight has a sparse gradient: use sparse=False"):
            optimizer.step()


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match="param0 is complex: optimize its real view"):
        soap([nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))])


@pytest.mark.parametrize("source", ["gradient", "activations"])
def test_parameters_without_numbers_are_refused(source: str) -> None:
    with pytest.raises(ConfigError, match="parameter weight is lazy: run the model once before"):
        soap(nn.LazyLinear(3), source=source)
    with pytest.raises(ConfigError, match="on the device meta: give them memory"):
        soap(nn.Linear(3, 3, device="meta"), source=source)


def test_param_groups_cannot_come_later() -> None:
    with (
        soap(nn.Linear(3, 3)) as optimizer,
        pytest.raises(StateError, match="cannot take a param group later"),
    ):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})


def test_nothing_to_optimize_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        soap([])
    with pytest.raises(ValueError, match="empty parameter list"):
        soap(nn.ReLU())


def test_a_model_of_vectors_alone_works() -> None:
    norm = nn.LayerNorm(5)
    with soap(norm, **LOW) as optimizer:
        for _ in range(12):
            optimizer.zero_grad()
            norm(torch.randn(4, 5)).square().sum().backward()
            optimizer.step()
        assert optimizer.metrics()["blocks"] == 0
        optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("betas", (1.0, 0.9)),
        ("betas", (0.9, -0.1)),
        ("betas", (0.9,)),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
    ],
)
@pytest.mark.parametrize("in_group", [False, True])
def test_bad_options_are_named(option: str, value: Any, in_group: bool) -> None:
    param = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ConfigError, match=f"{option} is "):
        if in_group:
            soap([{"params": [param], option: value}])
        else:
            soap([param], **{option: value})


def test_settings_reach_the_config_and_are_checked_there() -> None:
    with soap(nn.Linear(3, 3), factor_decay=0.5) as optimizer:
        assert isinstance(optimizer.config, SoapConfig)
        assert optimizer.config.factor_decay == 0.5
    with pytest.raises(ConfigError, match=r"SoapConfig.rank is 0"):
        soap(nn.Linear(3, 3), rank=0)
    with pytest.raises(TypeError, match="dampng"):
        soap(nn.Linear(3, 3), dampng=1.0)


def test_a_step_after_close_is_an_error() -> None:
    linear = nn.Linear(3, 3)
    optimizer = soap(linear)
    optimizer.close()
    optimizer.close()
    linear.weight.grad = torch.ones(3, 3)
    with pytest.raises(StateError, match="after close"):
        optimizer.step()


def test_a_non_finite_gradient_spoils_no_basis() -> None:
    param = nn.Parameter(torch.randn(5, 5))
    with soap([param], lr=0.0) as optimizer:
        grads = spread_gradients((5, 5), 5, seed=1)
        grads[2] = torch.full((5, 5), float("nan"))
        feed(optimizer, param, grads)
        installed = optimizer._open_pipeline().installed[0]
        assert installed.flat.isfinite().all()
        assert optimizer.metrics()["statistics_folded"] == 5


def test_torchs_default_dtype_does_not_matter() -> None:
    before = torch.get_default_dtype()
    params = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(5))]
    grads = [torch.randn(6, 4), torch.randn(5)]
    torch.set_default_dtype(torch.float64)
    try:
        with soap(params, rank=2, early_steps=4, preconditioner_upd_interval=2) as optimizer:
            for _ in range(8):
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad.clone()
                optimizer.step()
            assert optimizer.metrics()["version"] == 3
            state = optimizer.state[params[0]]
            assert {v.dtype for v in state.values() if torch.is_tensor(v)} == {torch.float32}
    finally:
        torch.set_default_dtype(before)
    assert all(param.isfinite().all() for param in params)
