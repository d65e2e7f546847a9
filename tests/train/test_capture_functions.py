"""Parameters that functions use instead of modules, tied ones, and those that only have a gradient.

Tolerance: 1e-5 of the largest number of each tensor; float32 sums of float64 products."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from capture_harness import assert_same_totals
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import linear as own_linear

import distcurv
from distcurv.curvature.apply import AffineGradient
from distcurv.curvature.spec import BlockSpec, SideSpec, Tensors
from distcurv.curvature.triangle import unpack_triangle
from distcurv.train.capture import Capture
from distcurv.train.captured_block import Watched
from distcurv.train.discover import find_layer_blocks
from distcurv.train.gradient_source import gradient_statistic
from distcurv.train.loss_scale import LossScale


def capture_of(model: nn.Module) -> tuple[Capture, dict[str, Tensors], dict[str, BlockSpec]]:
    """A dense capture of all two-sided blocks, and where it delivers."""
    blocks: dict[str, Watched] = {}
    for found in find_layer_blocks(model)[0]:
        layer = found.layer
        if layer.one_sided is not None:
            continue
        dims = layer.dims(found.module, layer.trains_bias(found.module))
        sides = tuple(SideSpec(dim, dim, "none", "dense") for dim in dims)
        spec = BlockSpec(found.name, "dense", sides, 0.9)
        blocks[found.name] = Watched(found.module, layer, spec, found.source == "calls", found.tied)
    return Capture(blocks), {}, {name: watched.spec for name, watched in blocks.items()}


def captured(model: nn.Module, *args: Tensor) -> dict[str, Tensors]:
    capture, delivered, specs = capture_of(model)
    with capture.armed({name: {} for name in specs}, delivered.__setitem__):
        model(*args).square().sum().backward()
    return delivered


class Functional(nn.Module):
    """Parameters of its own, used by functions that are looked up in three ways."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 2, 2, 3).double())
        self.line = nn.Parameter(torch.randn(3, 3, 2).double())
        self.first = nn.Parameter(torch.randn(4, 6).double())
        self.second = nn.Parameter(torch.randn(5, 4).double())

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(x, self.kernel, stride=(1, 2), padding=1, dilation=1).flatten(2)
        h = torch.conv1d(h, self.line, None, 2)[..., :6].tanh()
        return F.linear(own_linear(h, self.first).tanh(), weight=self.second)


class Modular(nn.Module):
    """The same out of modules."""

    def __init__(self, model: Functional) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(2, 3, (2, 3), (1, 2), 1, bias=False).double()
        self.line = nn.Conv1d(3, 3, 2, 2, bias=False).double()
        self.first = nn.Linear(6, 4, bias=False).double()
        self.second = nn.Linear(4, 5, bias=False).double()
        for name, parameter in model.named_parameters():
            self.get_submodule(name).weight.data.copy_(parameter)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        h = self.line(self.kernel(x).flatten(2))[..., :6].tanh()
        return self.second(self.first(h).tanh())


def test_functions_are_captured_like_the_modules_they_stand_for() -> None:
    torch.manual_seed(0)
    model = Functional()
    x = torch.randn(4, 2, 5, 6, dtype=torch.float64)
    expected = captured(Modular(model), x)
    assert set(expected) == {"kernel", "line", "first", "second"}
    assert_same_totals(captured(model, x), expected, 1e-5)


def test_functions_are_put_back_at_disarm_after_an_exception_and_without_close() -> None:
    namespaces = [F, torch, sys.modules[__name__]]
    names = ["linear", "conv2d", "embedding", "multi_head_attention_forward", "own_linear"]
    before = [vars(space).get(name) for space in namespaces for name in names]

    def now() -> list[object]:
        return [vars(space).get(name) for space in namespaces for name in names]

    capture, delivered, specs = capture_of(Functional())
    bases: dict[str, Tensors] = {name: {} for name in specs}
    capture.arm(bases, delivered.__setitem__)
    assert now() != before
    capture.disarm()
    assert now() == before
    with pytest.raises(RuntimeError, match="on purpose"), capture.armed(bases, print):
        raise RuntimeError("on purpose")
    assert now() == before
    capture.arm(bases, delivered.__setitem__)
    del capture
    assert now() == before


def test_names_that_a_base_class_imported_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watched class has no namespace of its own with the function in it."""
    (tmp_path / "base_of_somebody_else.py").write_text(
        "import torch\nfrom torch.nn.functional import linear\n"
        "class Base(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return linear(x, self.kernel)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    base = importlib.import_module("base_of_somebody_else").Base

    class Derived(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))

    x = torch.randn(5, 2, dtype=torch.float64)
    assert set(captured(Derived(), x)) == {"kernel"}


def test_functions_without_watched_parameters_are_left_alone() -> None:
    before = F.linear
    capture, delivered, specs = capture_of(nn.Linear(3, 2).double())
    with capture.armed({name: {} for name in specs}, delivered.__setitem__):
        assert F.linear is before


class Tied(nn.Module):
    """Ids to logits over the same ids."""

    def __init__(self, ids: int, size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(ids, size, padding_idx=0)
        self.head = nn.Linear(size, ids)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).tanh())


def test_a_tied_head_is_one_block_with_both_uses_in_equal_proportion() -> None:
    torch.manual_seed(0)
    model = Tied(6, 3).double()
    found, uncovered = find_layer_blocks(model)
    assert not uncovered
    assert [(layer.name, len(layer.tied)) for layer in found] == [("head", 1), ("head.bias", 0)]
    ids = torch.tensor([[1, 2], [2, 0], [5, 5], [3, 1]])
    delivered = captured(model, ids)["head"]

    hidden = model.embed(ids)
    logits = model.head(hidden.tanh())
    grad_hidden, grad_logits = torch.autograd.grad(logits.square().sum(), [hidden, logits])
    grad_logits, grad_hidden = 4 * grad_logits.flatten(0, 1), 4 * grad_hidden.flatten(0, 1)
    rows = hidden.tanh().flatten(0, 1)
    own_A, own_G = rows.T @ rows, grad_logits.T @ grad_logits
    seen = ids.flatten() != 0
    other_A = grad_hidden[seen].T @ grad_hidden[seen]
    other_G = torch.diag(ids.flatten().bincount(minlength=6).double() * (torch.arange(6) != 0))
    root = (own_A.trace() * other_G.trace() / own_G.trace() / other_A.trace()).sqrt()
    A, G = own_A + root * other_A, own_G + other_G / root
    for side, dim, factor in (("A", 3, A), ("G", 6, G)):
        actual = unpack_triangle(delivered[f"{side}.packed"], dim)
        assert (actual - factor).abs().max() <= 1e-5 * factor.abs().max()
    assert delivered["A.count"] == 8 and delivered["G.count"] == 4
    # Neither use is lost in the other: of the two products' traces the sum has less than twice.
    separate = own_A.trace() * own_G.trace() + other_A.trace() * other_G.trace()
    assert separate <= A.trace() * G.trace() <= 2 * separate * (1 + 1e-9)


def test_a_weight_that_only_embeddings_use_is_captured_with_its_sides_swapped() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 3).double())

        def forward(self, ids: Tensor) -> Tensor:
            return F.embedding(ids, self.table, padding_idx=-1)

    model = Lookup()
    ids = torch.tensor([[0, 1], [1, 4]])
    delivered = captured(model, ids)["table"]
    grads = 2 * 2 * model.table[ids].flatten(0, 1)[:3]
    A, G = grads.T @ grads, torch.diag(torch.tensor([1.0, 2, 0, 0, 0]).double())
    assert (unpack_triangle(delivered["A.packed"], 3) - A).abs().max() <= 1e-5 * A.abs().max()
    assert (unpack_triangle(delivered["G.packed"], 5) - G).abs().max() == 0
    assert delivered["A.count"] == 2 and delivered["G.count"] == 4


def test_a_parameter_shared_by_modules_that_differ_is_named() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(3), "scale": distcurv.layers.Scale(3)})
    model["scale"].weight = model["norm"].weight  # type: ignore[union-attr]
    _, uncovered = find_layer_blocks(model)
    assert {name for name, _ in uncovered} == {"norm", "scale"}
    assert "norm = scale" in uncovered[0].reason


def test_the_gradients_statistic_is_exact_for_a_gradient_of_rank_one() -> None:
    torch.manual_seed(0)
    u, v = torch.randn(4), torch.randn(3)
    X = torch.outer(u, v)
    spec = BlockSpec(
        "w", "dense", (SideSpec(3, 3, "none", "dense"), SideSpec(4, 4, "none", "dense")), 0.9
    )
    statistic = gradient_statistic(spec, AffineGradient(X, None), 10.0, 0.5, {})
    A = unpack_triangle(statistic["A.packed"], 3) / statistic["A.count"]
    G = unpack_triangle(statistic["G.packed"], 4) / statistic["G.count"]
    fisher = 10 * torch.outer(X.T.flatten(), X.T.flatten())
    assert (torch.kron(A, G) - fisher).abs().max() <= 1e-5 * fisher.abs().max()
    one = BlockSpec("p", "diagonal", (SideSpec(12, 0, "diagonal", "diagonal"),), 0.9)
    statistic = gradient_statistic(one, AffineGradient(X.reshape(-1, 1), None), 10.0, 0.5, {})
    assert torch.allclose(statistic["F.diag"] / statistic["F.count"], 10 * X.flatten().square())


def test_bare_parameters_are_preconditioned_from_their_gradients() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))
            self.mix = nn.Parameter(torch.randn(3, 4))
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x * self.gain) @ self.mix)

    torch.manual_seed(0)
    model = Bare()
    config = distcurv.KfacConfig(damping=0.1, early_interval=1, factor_decay=0.0, rank=4)
    with distcurv.Preconditioner(model, config, workers=0) as precond:
        x, y = torch.randn(8, 3), torch.randn(8, 2)
        F.mse_loss(model(x), y).backward()
        gain, mix = model.gain.grad.clone(), model.mix.grad.clone()  # type: ignore[union-attr]
        precond.step()
    # N ḡ² + damping, with N = 8 samples.
    expected = gain / (8 * gain.square() + 0.1)
    assert torch.allclose(model.gain.grad, expected, rtol=1e-4)  # type: ignore[arg-type]
    A = mix @ mix.T / mix.square().sum()
    assert A.shape == (3, 3) and not torch.allclose(model.mix.grad, mix)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["vector", "prompt"])
def test_a_model_of_which_no_call_is_seen_is_preconditioned_from_its_gradient(kind: str) -> None:
    """How many terms the loss has nobody shows: the gradient counts as that of one."""

    class Prompt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt = nn.Parameter(torch.randn(*((3,) if kind == "vector" else (2, 3))))
            self.body = nn.Linear(3, 2).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.body((x.unsqueeze(1) * self.prompt).sum(1)).tanh()

    torch.manual_seed(0)
    model = Prompt()
    settings = {"early_interval": 1, "factor_decay": 0.0, "rank": 3}
    config = distcurv.KfacConfig(damping=1e-3, **settings)
    with distcurv.Preconditioner(model, config, workers=0) as precond:
        model(torch.randn(8, 3)).square().mean().backward()
        before = model.prompt.grad.clone()  # type: ignore[union-attr]
        precond.step()
        assert precond.metrics()["version"] == 1
    after = model.prompt.grad
    assert after is not None
    if kind == "vector":
        assert torch.allclose(after, before / (before.square() + 1e-3), rtol=1e-4)
    else:  # not 1000 times the gradient, which is what no curvature at all makes of it
        assert after.norm() < 500 * before.norm()


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_factor_of_a_gradients_statistic(accumulation: int, as_tensor: bool) -> None:
    """Of 5 terms on each of 2 ranks, with every term's gradient 3: DDP averages over ranks."""
    terms = torch.tensor(5.0) if as_tensor else 5
    for reduction, reduced in (("mean", 3.0), ("sum", 5 * 3.0 / accumulation)):
        scale = LossScale(reduction, accumulation, None)
        # N ḡ², with ḡ the mean over all N = 10 terms.
        assert float(scale.fisher_factor(terms, 2)) * reduced**2 == pytest.approx(10 * 3.0**2)
        assert float(scale.fisher_factor(terms * 0, 2)) == 0
        assert scale.fisher_factor(None, 2) == 1


def test_positions_that_all_samples_share_count_as_theirs() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Embedding(3, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.positions(torch.arange(3).unsqueeze(0)))

    torch.manual_seed(0)
    model = Positions().double()
    x, y = torch.randn(5, 3, 4).double(), torch.randn(5, 3, 2).double()
    blocks = {}
    for found in find_layer_blocks(model)[0]:
        dims = found.layer.dims(found.module, found.layer.trains_bias(found.module))
        sides = [SideSpec(dim, dim, "none", "dense") for dim in dims]
        if found.name == "positions":
            sides[0] = SideSpec(3, 0, "diagonal", "diagonal")
        blocks[found.name] = Watched(
            found.module, found.layer, BlockSpec(found.name, "dense", tuple(sides), 0.9)
        )
    delivered: dict[str, Tensors] = {}
    with Capture(blocks).armed({name: {} for name in blocks}, delivered.__setitem__):
        hidden = []
        handle = model.positions.register_forward_hook(
            lambda module, args, output: hidden.append(output)
        )
        loss = F.mse_loss(model(x), y)
        grads = torch.autograd.grad(loss, hidden[0], retain_graph=True)[0][0] * 5
        loss.backward()
        handle.remove()
    statistic = delivered["positions"]
    assert statistic["G.count"] == delivered["head"]["G.count"] == 5
    G = unpack_triangle(statistic["G.packed"], 4)
    assert (G - grads.T @ grads).abs().max() <= 1e-5 * G.abs().max()
