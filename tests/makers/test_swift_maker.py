"""SKFAC against dense K-FAC: the same statistics make the same direction, by rows or by matrices.

Tolerance: both invert in float64 and round once to float32; damping is 0.1: 1e-5.
"""

from __future__ import annotations

import copy
from contextlib import closing
from typing import Any

import pytest
import torch
from maker_models import model_of
from test_kfac_maker import config, step
from torch import Tensor, nn
from torch.nn import functional as F

from distcurv.curvature.batch_side import (
    averaged,
    invert_side,
    is_matrix,
    side_of_rows,
    trace_of_side,
)
from distcurv.errors import CaptureError, ConfigError, StateError
from distcurv.makers.kfac import KfacGradientMaker
from distcurv.makers.natural_gradient import NaturalGradientMaker

TYPES = {
    "fisher_emp": {},
    "fisher_mc": {"seed": 3},
    "many draws": {"seed": 3, "n_mc_samples": 3},
    "fisher_exact": {},
}


def run(model: nn.Module, batches: list[tuple[Tensor, Tensor]], gm: Any) -> list[Tensor]:
    grads = []
    with closing(gm):
        for x, t in batches:
            model.zero_grad()
            gm.setup_loss_call(F.cross_entropy, gm.setup_model_call(model, x), t)
            gm.forward_and_backward()
            grads += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return grads


def batches(samples: list[int], features: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, features, generator=generator),
            torch.randint(0, 3, (n,), generator=generator),
        )
        for n in samples
    ]


@pytest.mark.parametrize("ema", [None, 0.4])
@pytest.mark.parametrize("name", TYPES)
def test_equals_dense(name: str, ema: float | None) -> None:
    """Sides of 12, 11, 10 and 3 dimensions; rows are fewer than some of them, and with the average
    become more."""
    model = nn.Sequential(nn.Linear(11, 10), nn.Tanh(), nn.Linear(10, 3))
    fisher_type = name if name.startswith("fisher") else "fisher_mc"
    found = {}
    for swift in (True, False):
        own = copy.deepcopy(model)
        maker = KfacGradientMaker(
            own, config(ema_decay=ema), fisher_type, swift=swift, **TYPES[name]
        )
        found[swift] = run(own, batches([4, 4, 9, 30], 11), maker)
    for one, other in zip(found[True], found[False], strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("model_name", ["conv", "mlp", "tokens"])
def test_equals_dense_for_layers(model_name: str, sharing: str) -> None:
    found = []
    for swift in (True, False):
        model = model_of(model_name)
        settings = config(weight_sharing=sharing, damping_form="relative")
        with closing(KfacGradientMaker(model, settings, "fisher_emp", swift=swift)) as gm:
            found.append(step(gm, model, model_name, 0))
    for key, other in found[1].items():
        assert (found[0][key] - other).abs().max() < 1e-5 * other.abs().max()


def test_activations_are_not_touched() -> None:
    """(ASDL scales them in place.)"""
    model = nn.Sequential(nn.Linear(11, 10), nn.Linear(10, 3))
    ((x, t),) = batches([4], 11)
    before = x.clone()
    run(model, [(x, t)], KfacGradientMaker(model, config(ema_decay=0.1), "fisher_emp", swift=True))
    assert torch.equal(x, before)


class Branches(nn.Module):
    """Uses one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(11, 3)
        self.right = nn.Linear(11, 3)
        self.used = "left"

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.get_submodule(self.used)(x)
        return out


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_block_without_finite_rows_keeps_what_it_has(ema: float | None) -> None:
    model = Branches()
    maker = KfacGradientMaker(model, config(ema_decay=ema), "fisher_emp", swift=True)
    (x, t), *_ = batches([4], 11)
    with closing(maker):
        kept: list[dict[str, Tensor]] = []
        for used, factor in (("left", 1.0), ("right", 1.0), ("left", float("inf")), ("left", 2.0)):
            model.used = used
            model.zero_grad()
            maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x * factor), t)
            maker.forward_and_backward()
            kept.append(dict(maker.state["swift"]["installed"]))
    assert set(kept[0]) == {"left/A", "left/G"} and len(kept[1]) == 4
    assert torch.equal(kept[1]["left/A"], kept[0]["left/A"])
    assert all(torch.equal(kept[2][key], kept[1][key]) for key in kept[1])
    assert not torch.equal(kept[3]["left/A"], kept[2]["left/A"])
    assert torch.equal(kept[3]["right/A"], kept[2]["right/A"])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.Linear(11, 11)
        self.head = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.mid(torch.tanh(self.mid(x))))
        return out


def test_what_it_cannot_do_is_said() -> None:
    model = Twice()
    maker = KfacGradientMaker(model, config(), "fisher_emp", swift=True)
    with pytest.raises(CaptureError, match="mid has run 2 times; give it the shape 'kron'"):
        run(model, batches([4], 11), maker)
    assigned = NaturalGradientMaker(model, config(), "fisher_emp", ["swift_kron", ("mid", "kron")])
    assert len(run(model, batches([4], 11), assigned)) == 4
    with pytest.raises(ConfigError, match="swift_kron has no kl_clip and no graft"):
        KfacGradientMaker(model, config(graft=True), swift=True)
    tied = Twice()
    tied.head = nn.Linear(11, 11)
    tied.head.weight = tied.mid.weight
    with closing(KfacGradientMaker(tied, config(), "fisher_emp", swift=True)) as served:
        text = served.summary()
    assert "swift_kron" not in text and text.startswith("KfacGradientMaker: served")


# -- the maths ----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 5, 8])
@pytest.mark.parametrize("damping", [1e-6, 0.3])
def test_both_forms_are_one_inverse(rows: int, damping: float) -> None:
    torch.manual_seed(rows)
    R = torch.randn(rows, 5, dtype=torch.float64)
    side = side_of_rows(R)
    assert is_matrix(side) == (rows >= 5)
    dense = R.T @ R + damping * torch.eye(5, dtype=torch.float64)
    delta = torch.tensor(damping, dtype=torch.float64)
    inverse = invert_side(side, delta, torch.float64).dense()
    expected = torch.linalg.inv(dense)
    assert (inverse - expected).abs().max() < 1e-9 * expected.abs().max()
    assert torch.allclose(trace_of_side(side), R.square().sum())


def test_averages_in_any_form() -> None:
    torch.manual_seed(0)
    parts = {n: torch.randn(n, 6, dtype=torch.float64) for n in (2, 3, 5, 9)}
    for first, A in parts.items():
        for second, B in parts.items():
            made = averaged(side_of_rows(A), 0.7, side_of_rows(B), 0.3)
            matrix = made if is_matrix(made) else made.T @ made
            assert torch.allclose(matrix, 0.7 * A.T @ A + 0.3 * B.T @ B)
            assert is_matrix(made) == (max(first, second, first + second) >= 6)


def test_a_state_of_other_sides_is_refused() -> None:
    """At once, and nothing of it is taken."""
    model = nn.Sequential(nn.Linear(11, 10), nn.Linear(10, 3))
    maker = KfacGradientMaker(model, config(), "fisher_emp", swift=True)
    run(model, batches([4], 11), maker)
    before = maker.state_dict()
    narrow = nn.Sequential(nn.Linear(9, 10), nn.Linear(10, 3))
    other = KfacGradientMaker(narrow, config(), "fisher_emp", swift=True)
    run(narrow, batches([4], 9), other)
    half = copy.deepcopy(before)
    for part in half["swift"].values():
        part.pop("0/G")
    for state in (other.state_dict(), half):
        with pytest.raises(StateError, match="this state_dict has"):
            maker.load_state_dict(state)
    for key, side in before["swift"]["held"].items():
        assert torch.equal(maker.state["swift"]["held"][key], side)
    maker.load_state_dict(before)
