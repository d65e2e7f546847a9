"""The kind ``kfe`` against its definition, written out over single samples in float64.

Tolerance: what is published is float32, and eigenvectors of close eigenvalues turn within their
plane; compared are therefore products with the inverse, 1e-5.
"""

from __future__ import annotations

import pytest
import torch
from kind_cases import DAMPING, DECAY, DIM_A, DIM_G, batched, kfe_spec, rows_of, statistic_of
from oracles import generator, relative_error
from torch import Tensor

from distcurv.curvature.apply import AffineGradient, apply, prepare_block
from distcurv.curvature.kinds import KINDS
from distcurv.curvature.kinds.kfe import continued
from distcurv.curvature.sample_gradients import encode_samples
from distcurv.curvature.spec import BlockSpec, SideSpec, Tensors
from distcurv.errors import NumericsError, ShapeError

KFE = KINDS["kfe"]


class Definition:
    """George et al. 2018, section 4, with the carry of S by squares of rotations, in float64."""

    def __init__(self) -> None:
        self.factors: dict[str, Tensor] = {}
        self.weight = self.S_weight = 0.0
        self.bases: dict[str, Tensor] = {}  # the newest, in which the next squares are taken
        self.applied: dict[str, Tensor] = {}
        self.lam: dict[str, Tensor] = {}
        self.S = torch.zeros(DIM_G, DIM_A, dtype=torch.float64)

    def refresh(self, rows: dict[str, Tensor]) -> None:
        """One step, whose second moments are taken in the basis of before."""
        old, weight = dict(self.bases), self.weight
        self.weight = DECAY * weight + 1 - DECAY
        for name in ("A", "G"):
            x = rows[name].double()
            mean = x.mT @ x / len(x)
            before = self.factors.get(name, torch.zeros_like(mean))
            share = (1 - DECAY) / self.weight
            self.factors[name] = (1 - share) * before + share * mean
            lam, U = torch.linalg.eigh(self.factors[name])
            self.lam[name], self.bases[name] = lam, U
        if not old:
            self.S = torch.outer(self.lam["G"], self.lam["A"])
            self.applied = dict(self.bases)
            return
        squares = torch.zeros_like(self.S)
        for g, a in zip(rows["G"].double(), rows["A"].double(), strict=True):
            squares += (old["G"].mT @ torch.outer(g, a) @ old["A"]) ** 2 / len(rows["A"])
        turn = {name: (old[name].mT @ self.applied[name]) ** 2 for name in old}
        S_weight = self.S_weight
        self.S_weight = DECAY * S_weight + 1 - DECAY
        share = (1 - DECAY) / self.S_weight
        # The share is 1 while S is that of products.
        self.S = (1 - share) * turn["G"] @ self.S @ turn["A"].mT + share * squares
        self.applied = old

    def direction(self, grad: Tensor, damping: float) -> Tensor:
        U_A, U_G = self.applied["A"], self.applied["G"]
        inside = U_G.mT @ grad.double() @ U_A
        return U_G @ (inside / (self.S + damping)) @ U_A.mT


def gradient(seed: int = 5) -> Tensor:
    return torch.randn(DIM_G, DIM_A, generator=generator(seed))


def direction(spec: BlockSpec, published: Tensors, grad: Tensor, damping: float) -> Tensor:
    one = {name: tensor[0] for name, tensor in published.items()}
    inverses = KFE.inverses(spec, one, damping, spec.relative_damping)
    worked = AffineGradient(grad.clone(), None)
    apply(prepare_block(inverses, bias=False), worked)
    return worked.weight_OD


@pytest.mark.parametrize("relative", [False, True])
def test_it_is_the_definition_refresh_after_refresh(relative: bool) -> None:
    spec, wanted, grad = kfe_spec(relative), Definition(), gradient()
    published = batched(KFE.start(spec, seed=1))
    state = KFE.seed(spec, published)
    for seed in range(4):
        rows = rows_of(seed)
        state, published, *_ = KFE.refresh(
            spec, state, statistic_of(spec, rows, published, 1), published
        )
        wanted.refresh(rows)
        damping = DAMPING * (wanted.S.mean().item() if relative else 1.0)
        got = direction(spec, published, grad, DAMPING)
        assert relative_error(got, wanted.direction(grad, damping)) < 1e-5
        assert relative_error(got, grad / damping) > 0.05, "the raw gradient is no direction"
        assert published["S.weight"].item() == pytest.approx(1 - DECAY**seed, rel=1e-6)


def test_it_is_nearer_to_the_fisher_matrix_than_kfac_is() -> None:
    """What the second moments are for: no diagonal in the same basis is nearer (Frobenius)."""
    spec = kfe_spec()
    draw = generator(3)
    a = torch.randn(200, DIM_A, generator=draw)
    g = torch.randn(200, DIM_G, generator=draw) * (0.2 + a[:, :1].square())  # related to a
    rows = {"A": a, "G": g}
    published = batched(KFE.start(spec, seed=1))
    state = KFE.seed(spec, published)
    for _ in range(2):
        state, published, *_ = KFE.refresh(
            spec, state, statistic_of(spec, rows, published, 1), published
        )
    samples = torch.einsum("no,ni->noi", g, a).double().flatten(1)
    fisher = samples.mT @ samples / len(samples)
    U = torch.kron(published["G.basis"][0], published["A.basis"][0]).double()
    second = (U * published["S.mean"][0].double().flatten()) @ U.mT
    products = torch.outer(published["G.lam"][0], published["A.lam"][0]).double()
    kronecker = (U * products.flatten()) @ U.mT
    assert (fisher - second).norm() < 0.95 * (fisher - kronecker).norm()
    assert relative_error(published["S.mean"][0].flatten(), (U.mT @ fisher @ U).diagonal()) < 1e-4


def test_turning_keeps_the_sum_and_a_late_statistic_is_turned_from_its_own_basis() -> None:
    spec = kfe_spec()
    first = batched(KFE.start(spec, seed=1))
    state = KFE.seed(spec, first)
    history = [first]
    for seed in range(2):
        refreshed = KFE.refresh(
            spec, state, statistic_of(spec, rows_of(seed), history[-1], 1), history[-1]
        )
        state = refreshed.state
        history.append(refreshed.published)
    late = statistic_of(spec, rows_of(7), history[1], 1)  # against version 1, at version 2
    new = KFE.refresh(spec, state, late, history[1])
    total = sum(
        (g.norm() * a.norm()) ** 2 for g, a in zip(*(rows_of(7)[s] for s in "GA"), strict=True)
    )
    share = (1 - DECAY) / (1 - DECAY**2)
    wanted = (1 - share) * state["S.mean"].sum() + share * total / 20
    assert new.published["S.mean"].sum().item() == pytest.approx(wanted.item(), rel=1e-5)
    # Against version 0, whose basis is random, only the factors learn something.
    stale = statistic_of(spec, rows_of(7), first, 1)
    kept = KFE.refresh(spec, state, stale, first)
    assert torch.equal(kept.published["S.weight"], state["S.weight"])
    for name in ("S.mean", "A.basis", "G.basis"):
        assert torch.equal(kept.published[name], state[name])
    assert not torch.equal(kept.published["A.lam"], state["A.lam"])


def test_second_moments_below_zero_are_refused() -> None:
    spec = kfe_spec()
    published = batched(KFE.start(spec, seed=1))
    statistic = statistic_of(spec, rows_of(0), published, 1)
    statistic["S.squares"].neg_()
    with pytest.raises(NumericsError, match="second moments"):
        KFE.refresh(spec, KFE.seed(spec, published), statistic, published)


@pytest.mark.parametrize(
    "sides",
    [
        (SideSpec(4, 4, "none", "dense"),),
        (SideSpec(4, 3, "none", "dense"), SideSpec(3, 3, "none", "dense")),
        (SideSpec(4, 4, "isotropic", "dense"), SideSpec(3, 3, "none", "dense")),
        (SideSpec(4, 4, "none", "sketch"), SideSpec(3, 3, "none", "dense")),
    ],
)
def test_other_sides_are_refused(sides: tuple[SideSpec, ...]) -> None:
    spec = BlockSpec("norm.3", "kfe", sides, 0.9)
    for layout in (KFE.statistic_layout, KFE.published_layout):
        with pytest.raises(ShapeError, match=r"norm\.3.*needs"):
            layout(spec)


def test_per_sample_gradients_that_do_not_fit_are_refused() -> None:
    basis = KFE.start(kfe_spec(), 0)
    for shape in ((4, DIM_A), (DIM_G, DIM_A, 3), (DIM_A * DIM_G,)):
        with pytest.raises(ShapeError, match="encode_samples"):
            encode_samples(kfe_spec(), torch.zeros(shape), basis)


def test_eigenvectors_of_equal_eigenvalues_stay_where_they_were() -> None:
    """Else every refresh would turn S between them, for nothing."""
    U = torch.linalg.qr(torch.randn(6, 6, generator=generator(1))).Q
    lam = torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0, 1.0])
    turn = torch.eye(6)
    turn[1:4, 1:4] = torch.linalg.qr(torch.randn(3, 3, generator=generator(2))).Q
    turn[4:, 4:] = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    found = U @ turn * torch.tensor([-1.0, 1, 1, 1, 1, 1])  # what an eigensolver may give
    got = continued(found, lam * (1 + 1e-8 * torch.arange(6).flip(0)), U)
    assert relative_error(got[:, 1:], U[:, 1:]) < 1e-6
    assert torch.equal(got[:, 0], found[:, 0]), "one alone is left as it is"
    assert relative_error(continued(found, torch.zeros(6), U), U) < 1e-6
