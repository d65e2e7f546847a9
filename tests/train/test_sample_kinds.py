"""Kinds made of per-sample gradients, from capture to direction.

Oracle: per-sample gradients by autograd in float64, one sample at a time, the dense Fisher matrix
of them and `torch.linalg.solve`. The preconditioner works in float32: 2e-5 relative, at a damping
of about a hundredth of the largest eigenvalue.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture_harness import ConvNet, TokenNet, batch, cross_entropy
from oracles import averaged, generator, relative_error
from torch import Tensor, nn

from distcurv.config import KfacConfig
from distcurv.errors import CaptureError, ConfigError
from distcurv.train import sample_statistics
from distcurv.train.preconditioner import Preconditioner

Loss = Callable[[Tensor, Tensor], Tensor]
AT_ONCE: dict[str, Any] = {"preconditioner_upd_interval": 1, "curvature_upd_interval": 1}
DAMPING, DECAY = 1e-2, 0.8
TOLERANCE = 2e-5
COLUMNS = ("layer_wise", "unit_rows", "diagonal", "full")


class Transposed(nn.Module):
    """Images [N, 2, 4, 4] to logits [N, 4], by grouped convolutions, one of them transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 4, 2, stride=2, groups=2)
        self.down = nn.Conv2d(4, 4, 3, stride=3, groups=2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(x).tanh()).tanh().flatten(1))


class Shared(nn.Module):
    """Tokens [N, T, 4] through one Linear twice."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.mix(x).tanh()).tanh())


class Words(nn.Module):
    """Ids [N, T] to logits [N, T, 7]: an embedding with a padding id, a norm, a head of its own or
    a tied one."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3, padding_idx=0)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(ids)).tanh())


def case(name: str, samples: int = 9, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    if name in ("conv", "conv without bias"):
        model: nn.Module = ConvNet(bias=name == "conv")
        return model, *batch(model, samples, seed)
    if name in ("tokens", "tokens without bias"):
        model = TokenNet(bias=name == "tokens")
        return model, *batch(model, samples, seed)
    draw = generator(seed)
    if name == "transposed":
        x = torch.randn(samples, 2, 4, 4, generator=draw)
        return Transposed(), x, torch.randint(4, (samples,), generator=draw)
    if name == "shared":
        x = torch.randn(samples, 3, 4, generator=draw)
        return Shared(), x, torch.randint(4, (samples, 3), generator=draw)
    ids = torch.randint(7, (samples, 4), generator=draw)
    return Words(name == "tied"), ids, torch.randint(7, (samples, 4), generator=draw)


LAYERS = ["conv", "conv without bias", "tokens", "tokens without bias", "transposed", "shared"]
CASES = [*LAYERS, "words", "tied"]


def matrix_of(module: nn.Module, grads: dict[str, Tensor], prefix: str) -> Tensor:
    """[Do, Di] with the bias as the last column, as blocks see it."""
    weight = grads[f"{prefix}weight"]
    if isinstance(module, nn.ConvTranspose2d):
        groups = module.groups
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
    elif isinstance(module, nn.Embedding) and "head" not in prefix:
        weight = weight.mT
    elif isinstance(module, nn.LayerNorm):
        weight = weight.unsqueeze(1)
    weight = weight.flatten(1)
    bias = grads.get(f"{prefix}bias")
    return weight if bias is None else torch.cat([weight, bias.unsqueeze(1)], 1)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """By the name of the block."""
    modules = {n: m for n, m in model.named_modules() if list(m.parameters(recurse=False))}
    if isinstance(model, Words) and model.head.weight is model.embed.weight:
        del modules["embed"]
    return modules


def sample_matrices(
    model: nn.Module, x: Tensor, t: Tensor, loss: Loss, scale: float = 1.0
) -> dict[str, Tensor]:
    """Per-sample gradients [N, Do, Di] of each layer, float64, times a scale."""
    twin = copy.deepcopy(model).double()
    rows: dict[str, list[Tensor]] = {name: [] for name in layers_of(twin)}
    for n in range(len(x)):
        own = x[n : n + 1] if x.dtype == torch.int64 else x[n : n + 1].double()
        twin.zero_grad()
        loss(twin(own), t[n : n + 1]).backward()
        grads = {k: p.grad for k, p in twin.named_parameters(remove_duplicate=False)}
        for name, module in layers_of(twin).items():
            rows[name].append(scale * matrix_of(module, grads, f"{name}."))
    return {name: torch.stack(own) for name, own in rows.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {k: p.grad.double() for k, p in model.named_parameters(remove_duplicate=False)}
    return {n: matrix_of(m, grads, f"{n}.").clone() for n, m in layers_of(model).items()}


def solved(fisher: Tensor, grad: Tensor, damping: float = DAMPING) -> Tensor:
    eye = torch.eye(len(fisher), dtype=torch.float64)
    return torch.linalg.solve(fisher + damping * eye, grad.flatten()).view_as(grad)


def fisher_of(samples: Tensor) -> Tensor:
    rows = samples.flatten(1)
    return rows.mT @ rows / len(rows)


def wanted_column(kind: str, fisher: Tensor, grad: Tensor) -> Tensor:
    """(F + damping I)⁻¹ g of one layer, F cut to what the kind keeps of it."""
    if kind == "diagonal":
        fisher = torch.diag(fisher.diagonal())
    elif kind == "unit_rows":
        unit = torch.arange(grad.numel()) // grad.shape[1]
        fisher = torch.where(unit[:, None] == unit, fisher, 0.0)
    return solved(fisher, grad)


def kfac(model: nn.Module, kind: str, **settings: Any) -> Preconditioner:
    defaults: dict[str, Any] = {
        **AT_ONCE,
        "early_steps": 1000,
        "kind": kind,
        "damping": DAMPING,
        "factor_decay": DECAY,
        "loss_reduction": "mean",
    }
    return Preconditioner(model, KfacConfig(**(defaults | settings)), workers="inline")


def run_step(model: nn.Module, x: Tensor, t: Tensor, precond: Preconditioner) -> dict[str, Tensor]:
    """One step of a mean loss; returns the gradient as it was before it was preconditioned."""
    model.zero_grad()
    cross_entropy("mean")(model(x), t).backward()
    before = gradients(model)
    precond.step()
    return before


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", COLUMNS)
def test_the_direction_is_that_of_the_dense_fisher_matrix(name: str, kind: str) -> None:
    model, x, t = case(name)
    terms = t[0].numel()
    # The mean over all terms counts N of them unless told; per-sample losses are sums over tokens
    # divided by their number in a sample.
    samples = sample_matrices(model, x, t, cross_entropy("sum"), 1.0 / terms)
    with kfac(model, kind) as precond:
        before = run_step(model, x, t, precond)
        names = precond.block_names
    after = gradients(model)
    if kind == "full":
        assert names == ["full"]
        joined = torch.cat([own.flatten(1) for own in samples.values()], 1)
        grad = torch.cat([own.flatten() for own in before.values()])
        wanted = solved(fisher_of(joined), grad)
        got = torch.cat([own.flatten() for own in after.values()])
        assert relative_error(got, wanted) < TOLERANCE
        assert relative_error(got, grad) > 0.1
        return
    for block, grad in before.items():
        wanted = wanted_column(kind, fisher_of(samples[block]), grad)
        assert relative_error(after[block], wanted) < TOLERANCE, block
        assert relative_error(after[block], grad) > 0.1, block


def test_averages_over_steps_forget_as_they_should() -> None:
    for kind in COLUMNS[:3]:
        model, *_ = case("tokens")
        arrived: dict[str, list[tuple[int, Tensor]]] = {}
        with kfac(model, kind) as precond:
            for seed in range(3):
                x, t = batch(model, 6, seed)
                samples = sample_matrices(model, x, t, cross_entropy("sum"), 1.0 / t[0].numel())
                for block, own in samples.items():
                    arrived.setdefault(block, []).append((1, fisher_of(own)))
                before = run_step(model, x, t, precond)
        after = gradients(model)
        for block, grad in before.items():
            wanted = wanted_column(kind, averaged(DECAY, arrived[block]), grad)
            assert relative_error(after[block], wanted) < TOLERANCE


@pytest.mark.parametrize("name", [*LAYERS, "tied"])
def test_ekfac_uses_the_second_moments_of_projected_gradients(name: str) -> None:
    model, x, t = case(name)
    samples = sample_matrices(model, x, t, cross_entropy("sum"), 1.0 / t[0].numel())
    with kfac(model, "kfe") as precond:
        run_step(model, x, t, precond)
        blocks = dict(zip(precond.block_names, precond._pipeline.installed, strict=True))
        for block, install in blocks.items():
            if block == "norm":
                continue
            S = install.tensors["S.mean"]
            products = torch.outer(install.tensors["G.lam"], install.tensors["A.lam"])
            assert torch.allclose(S, products), "K-FAC's until second moments have been seen"
        bases = {block: dict(install.tensors) for block, install in blocks.items()}
        before = run_step(model, x, t, precond)
    after = gradients(model)
    for block, grad in before.items():
        if block == "norm":
            continue
        U_A, U_G = (bases[block][f"{side}.U"].double() for side in ("A", "G"))
        S = (U_G.mT @ samples[block] @ U_A).square().mean(0)
        # The batch is the same, so the second version turns nothing but what has no gradient.
        wanted = U_G @ ((U_G.mT @ grad @ U_A) / (S + DAMPING)) @ U_A.mT
        assert relative_error(after[block], wanted) < 1e-4, block
        assert relative_error(after[block], grad) > 0.1, "not the raw gradient"


def test_an_embedding_has_the_whole_fisher_matrix_but_no_eigenbasis() -> None:
    model, *_ = case("words")
    with kfac(model, "kfe") as precond:
        kinds = {spec.name: spec.kind for spec in precond._pipeline.table.specs}
    assert kinds == {"embed": "dense", "norm": "unitwise", "head": "kfe"}
    with kfac(model, "full") as precond:
        assert precond.block_names == ["full"]
        summary = precond.summary()
    assert summary.coverage == 1.0
    assert {row.block.kind for row in summary.rows if row.block is not None} == {"full"}


def test_what_only_functions_use_is_joined_as_well() -> None:
    """Attention projects tokens that come before samples, with rows of one parameter."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1)  # [T, N, 4]
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(0))

    torch.manual_seed(1)
    model = Attending()
    x, t = torch.randn(7, 3, 4, generator=generator(0)), torch.arange(7) % 3
    twin = copy.deepcopy(model).double()
    rows = []
    for n in range(len(x)):
        twin.zero_grad()
        cross_entropy("sum")(twin(x[n : n + 1].double()), t[n : n + 1]).backward()
        assert twin.attention.in_proj_weight.grad is not None
        assert twin.attention.in_proj_bias.grad is not None
        weight = twin.attention.in_proj_weight.grad.chunk(3)
        bias = twin.attention.in_proj_bias.grad.chunk(3)
        rows.append([torch.cat([w, b[:, None]], 1) for w, b in zip(weight, bias, strict=True)])
    with kfac(model, "layer_wise") as precond:
        model.zero_grad()
        cross_entropy("mean")(model(x), t).backward()
        assert model.attention.in_proj_weight.grad is not None
        assert model.attention.in_proj_bias.grad is not None
        weight, bias = model.attention.in_proj_weight.grad, model.attention.in_proj_bias.grad
        before = [
            torch.cat([w, b[:, None]], 1).double()
            for w, b in zip(weight.clone().chunk(3), bias.clone().chunk(3), strict=True)
        ]
        precond.step()
    for i, grad in enumerate(before):
        wanted = solved(fisher_of(torch.stack([row[i] for row in rows])), grad)
        got = torch.cat([weight.chunk(3)[i], bias.chunk(3)[i][:, None]], 1)
        assert relative_error(got, wanted) < TOLERANCE


def test_samples_are_gone_through_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(kind: str) -> dict[str, Tensor]:
        model, x, t = case("conv")
        with kfac(model, kind) as precond:
            run_step(model, x, t, precond)
            run_step(model, x, t, precond)
        return gradients(model)

    for kind in (*COLUMNS, "kfe"):
        whole = step(kind)
        with monkeypatch.context() as patch:
            patch.setattr(sample_statistics, "NUMBERS_PER_CHUNK", 400)
            chunked = step(kind)
        assert all(relative_error(chunked[k], own) < 1e-4 for k, own in whole.items())


def test_terms_accumulation_and_a_sum_say_the_same() -> None:
    """The statistic is that of a single term, however the loss reduces."""
    model, x, t = case("tokens")
    start = copy.deepcopy(model.state_dict())

    def published(losses: Callable[[nn.Module, Preconditioner], list[Tensor]], **more: Any) -> Any:
        model.load_state_dict(start)
        model.zero_grad()
        found: list[Tensor] = []
        for kind in ("layer_wise", "unit_rows"):
            with kfac(model, kind, **more) as precond:
                for loss in losses(model, precond):
                    loss.backward()
                precond.step()
                found += [i.tensors["F.packed"] for i in precond._pipeline.installed]
                model.zero_grad()
        return found

    mean, total = cross_entropy("mean"), cross_entropy("sum")

    def told(model: nn.Module, precond: Preconditioner) -> list[Tensor]:
        loss = mean(model(x), t)
        precond.count_terms(t.numel())
        return [loss]

    def told_sum(model: nn.Module, precond: Preconditioner) -> list[Tensor]:
        loss = total(model(x), t)
        precond.count_terms(t.numel())
        return [loss]

    def halves(model: nn.Module, precond: Preconditioner) -> Any:
        for part in (slice(0, 6), slice(6, 9)):
            loss = mean(model(x[part]), t[part])
            precond.count_terms(t[part].numel())
            yield loss / 2

    reference = published(told)
    for other in (
        published(told_sum, loss_reduction="sum"),
        published(halves, accumulation=2),
    ):
        for one, two in zip(reference, other, strict=True):
            assert relative_error(two, one) < 1e-5


def test_layers_of_different_samples_are_not_joined() -> None:
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place = nn.Embedding(3, 4)
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.place(torch.arange(3)[None]))

    model, x = Placed(), torch.randn(5, 3, 4, generator=generator(0))
    with kfac(model, "full") as precond:
        loss = model(x).square().mean()
        with pytest.raises(CaptureError, match=r"1, 5\] samples.*overrides"):
            loss.backward()
        del precond
    own = [("place", {"kind": "layer_wise"})]
    with kfac(model, "full", overrides=own) as precond:
        assert precond.block_names == ["full", "place"]
        model(x).square().mean().backward()
        precond.step()


def test_a_matrix_that_is_too_large_is_refused_before_it_is_made() -> None:
    model = nn.Sequential(nn.Linear(400, 30), nn.ReLU(), nn.Linear(30, 2))
    with pytest.raises(ConfigError, match=r"block '0'.*dimension 12030.*57893\d+ bytes"):
        kfac(model, "layer_wise")
    with pytest.raises(ConfigError, match=r"block 'full'.*dimension 12092"):
        kfac(model, "full")
    with kfac(model, "layer_wise", overrides=[("0", {"kind": "unit_rows"})]) as precond:
        kinds = [spec.kind for spec in precond._pipeline.table.specs]
    assert kinds == ["unit_rows", "layer_wise"]


def test_settings_that_cannot_work_are_refused() -> None:
    model, *_ = case("conv")
    with pytest.raises(ConfigError, match="'unit_rows' is fixed"):
        kfac(model, "unit_rows", damping=lambda step: 0.1)
    with kfac(model, "layer_wise") as precond, pytest.raises(ConfigError, match="'layer_wise'"):
        precond.damping = 0.2
    with pytest.raises(ConfigError, match=r"head and conv.*one block of kind 'full'"):
        kfac(model, "full", overrides=[("conv", {"damping": 0.5})])
    with kfac(model, "kfe") as precond:
        precond.damping = 0.2


def test_a_matrix_that_no_call_shows_has_the_fisher_matrix_of_its_gradient() -> None:
    """N ḡ ḡᵀ of the mean gradient ḡ over N samples, as for the kinds with two sides."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3, generator=generator(1)))
            self.head = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x @ self.w).tanh())

    x, t = torch.randn(8, 4, generator=generator(2)), torch.arange(8) % 3
    for kind in (*COLUMNS, "kfe"):
        model = Plain()
        with kfac(model, kind) as precond:
            for _ in range(2):
                model.zero_grad()
                cross_entropy("mean")(model(x), t).backward()
                assert model.w.grad is not None
                grad = model.w.grad.double().clone()
                precond.step()
            got = model.w.grad
            tensors = precond._pipeline.installed[precond.block_names.index("w")].tensors
        if kind == "kfe":
            U_A, U_G = (tensors[f"{side}.U"].double() for side in ("A", "G"))
            inside = U_G.mT @ grad @ U_A
            wanted = U_G @ (inside / (8 * inside.square() + DAMPING)) @ U_A.mT
        else:
            # (Of kind full the block of modules has its own; what no module shows has a matrix.)
            column = "layer_wise" if kind == "full" else kind
            wanted = wanted_column(column, 8 * torch.outer(grad.flatten(), grad.flatten()), grad)
        assert relative_error(got, wanted) < 1e-4, kind


def test_a_loss_without_terms_adds_zeros() -> None:
    model, x, t = case("tokens")
    for kind in COLUMNS:
        with kfac(model, kind) as precond:
            model.zero_grad()
            loss = cross_entropy("mean")(model(x), torch.full_like(t, -100))  # NaN
            precond.count_terms(0)
            loss.backward()
            model.zero_grad()
            cross_entropy("mean")(model(x), t).backward()
            before = gradients(model)
            precond.step()
            assert precond.metrics()["statistics_nonfinite"] == 0
        after = gradients(model)
        model.zero_grad()
        with kfac(model, kind) as precond:
            run_step(model, x, t, precond)
        for block, own in gradients(model).items():
            assert relative_error(after[block], own) < 1e-6
            assert relative_error(after[block], before[block]) > 0.1


def test_autocast_rounds_rows_and_not_their_products() -> None:
    model, x, t = case("tokens")
    found = []
    for low in (False, True):
        with kfac(model, "layer_wise") as precond:
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = cross_entropy("mean")(model(x).float(), t)
            loss.backward()
            precond.step()
            found.append([i.tensors["F.packed"] for i in precond._pipeline.installed])
    for exact, rounded in zip(*found, strict=True):
        assert 1e-5 < relative_error(rounded, exact) < 3e-2
