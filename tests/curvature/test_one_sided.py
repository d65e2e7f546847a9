"""Blocks with one side: the closed 2 x 2 inverse, and its product with a gradient in place.

Oracles: `torch.linalg.inv` or an eigendecomposition of every unit's matrix in float64, 1e-11; in
float32 1e-5.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kind_cases import DAMPING, DIM_F, batched, factor_of, one_sided_spec, rows_of, statistic_of
from oracles import generator, relative_error
from torch import Tensor

from distcurv.curvature.apply import AffineGradient, apply, finish, prepare_block
from distcurv.curvature.inverse import FLOOR, DenseInverse, Inverse, LowRankInverse, invert_diagonal
from distcurv.curvature.kinds import KINDS
from distcurv.curvature.norm_rule import graft_scale
from distcurv.curvature.one_sided import OneSidedInverse, UnitInverse, invert_units
from distcurv.errors import NumericsError, ShapeError

D = 5


def units(seed: int, spread: float = 1.0, lead: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
    """ww, wb, bb [..., D] float64 of positive definite matrices, whose size falls by ``spread``."""
    roots = torch.randn(*lead, D, 2, 2, generator=generator(seed), dtype=torch.float64)
    matrices = roots @ roots.mT * (spread ** -torch.arange(D))[:, None, None]
    return matrices[..., 0, 0], matrices[..., 0, 1], matrices[..., 1, 1]


def dense(entries: tuple[Tensor, ...]) -> Tensor:
    return UnitInverse(*entries).dense()


def gradient(seed: int, bias: bool, lead: tuple[int, ...] = ()) -> AffineGradient:
    """With batch dimensions the bias is the second column."""
    both = torch.randn(*lead, D, 2, generator=generator(seed), dtype=torch.float64)
    if not bias:
        return AffineGradient(both[..., :1].clone(), None)
    return AffineGradient(both, None) if lead else AffineGradient(both[:, :1].clone(), both[:, 1])


@given(seed=st.integers(0, 10_000), damping=st.floats(1e-3, 1e3), spread=st.floats(1.0, 5.0))
def test_the_closed_form_is_the_inverse_of_every_unit(
    seed: int, damping: float, spread: float
) -> None:
    entries = units(seed, spread)
    exact = dense(entries)
    if damping < FLOOR * torch.linalg.eigvalsh(exact).max():
        return  # below the floor: the next test
    got = invert_units(*entries, torch.tensor(damping, dtype=torch.float64)).dense()
    wanted = torch.linalg.inv(exact + damping * torch.eye(2).double())
    assert relative_error(got, wanted) < 1e-11


def test_no_eigenvalue_is_taken_below_the_floor() -> None:
    # The last unit's matrix is singular, the last two lie below the floor altogether.
    vectors = torch.tensor([[3.0, 1.0], [1.0, 0.0], [2.0, 2.0], [1e-3, 2e-3], [1e-6, 1e-6]])
    exact = vectors.double().unsqueeze(-1) * vectors.double().unsqueeze(-2)
    exact[1] += torch.diag(torch.tensor([0.0, 1e-3]))
    entries = exact[:, 0, 0], exact[:, 0, 1], exact[:, 1, 1]
    for damping in (0.0, 1e-5, 0.1):
        lam, Q = torch.linalg.eigh(exact)
        kept = (lam + damping).clamp(min=FLOOR * lam.max().item())
        wanted = (Q / kept.unsqueeze(-2)) @ Q.mT
        got = invert_units(*entries, torch.tensor(damping, dtype=torch.float64)).dense()
        assert relative_error(got, wanted) < 1e-11


def test_where_there_is_nothing_the_inverse_is_the_identity() -> None:
    zeros = torch.zeros(3, D)
    got = invert_units(zeros, zeros, zeros, torch.tensor([0.0, 0.5, 2.0]))
    assert torch.equal(got.ww_d[:, 0], torch.tensor([1.0, 2.0, 0.5]))
    assert torch.equal(got.bb_d, got.ww_d)
    assert not got.wb_d.any()
    for kind in ("unitwise", "diagonal"):  # a block that has seen nothing, whatever the damping
        spec = one_sided_spec(kind)
        for relative in (False, True):
            start = batched(KINDS[kind].start(spec, seed=0))
            (inverse,) = KINDS[kind].inverses(spec, start, 1e-3, relative)
            matrix = inverse.dense()[0]
            assert torch.equal(matrix, torch.eye(matrix.shape[-1]).expand_as(matrix))


def test_without_a_bias_only_the_weight_counts() -> None:
    ww = units(1)[0]
    got = invert_units(ww, torch.zeros(D), torch.zeros(D), torch.tensor(0.3, dtype=torch.float64))
    assert relative_error(got.ww_d, 1 / (ww + 0.3)) < 1e-14
    assert not got.wb_d.any()
    grad = gradient(2, bias=False)
    wanted = grad.weight_OD / (ww + 0.3).unsqueeze(-1)
    apply(prepare_block([got], bias=False), grad)
    assert relative_error(grad.weight_OD, wanted) < 1e-14


def inverse_and_matrix(kind: str, lead: tuple[int, ...]) -> tuple[OneSidedInverse, Tensor]:
    """An inverse, and what multiplies (weight, bias) of every unit."""
    damping = torch.full(lead, 0.2, dtype=torch.float64)
    ww, wb, bb = units(3, lead=lead)
    if kind == "unitwise":
        inverse = invert_units(ww, wb, bb, damping)
        return inverse, torch.linalg.inv(dense((ww, wb, bb)) + 0.2 * torch.eye(2).double())
    return invert_diagonal(ww, damping), torch.diag_embed((1 / (ww + 0.2)).unsqueeze(-1))


@pytest.mark.parametrize("lead", [(), (3,)], ids=["one", "batch"])
@pytest.mark.parametrize(("kind", "bias"), [("unitwise", True), ("diagonal", False)])
def test_the_product_is_made_in_place_and_measured(
    kind: str, bias: bool, lead: tuple[int, ...]
) -> None:
    inverse, matrix = inverse_and_matrix(kind, lead)
    grad = gradient(4, bias, lead)
    before = grad.whole().clone()
    places = [part.data_ptr() for part in grad if part is not None]
    wanted = (matrix @ before.unsqueeze(-1)).squeeze(-1)
    prepared = prepare_block([inverse], bias=grad.bias_O is not None)
    done = apply(prepared, grad, norms=True, inner=True)
    assert done.grad_norm is not None
    assert done.norm is not None
    assert done.inner is not None
    torch.testing.assert_close(done.grad_norm, before.flatten(-2).norm(dim=-1))
    torch.testing.assert_close(done.norm, wanted.flatten(-2).norm(dim=-1))
    torch.testing.assert_close(done.inner, (before * wanted).flatten(-2).sum(-1))
    scale = graft_scale(done.grad_norm, done.norm)
    finish(grad, done.row_O1, scale)
    assert relative_error(grad.whole(), wanted * scale[..., None, None]) < 1e-12
    assert [part.data_ptr() for part in grad if part is not None] == places
    unmeasured = AffineGradient(before, None)
    if bias and not lead:
        unmeasured = AffineGradient(before[:, :1].clone(), before[:, 1].clone())
    done = apply(prepared, unmeasured)
    assert (done.grad_norm, done.norm, done.inner, done.row_O1) == (None, None, None, None)
    assert relative_error(unmeasured.whole(), wanted) < 1e-12


@pytest.mark.parametrize("kind", ["unitwise", "diagonal"])
def test_a_gradient_that_does_not_fit_is_refused(kind: str) -> None:
    prepared = prepare_block([inverse_and_matrix(kind, ())[0]], bias=False)
    wide = 3 if kind == "unitwise" else 2
    for weight in (torch.zeros(D + 1, 1), torch.zeros(D, wide), torch.zeros(2, D, 1)):
        with pytest.raises(ShapeError, match="5 units"):
            apply(prepared, AffineGradient(weight.double(), None))
    if kind == "diagonal":
        with pytest.raises(ShapeError, match="a bias"):
            apply(prepared, AffineGradient(torch.zeros(D, 1).double(), torch.zeros(D).double()))


def test_inverses_that_make_no_block_are_refused() -> None:
    unit = invert_units(*units(0), torch.tensor(1.0))
    thin: list[Inverse] = [
        LowRankInverse(torch.ones(D), torch.zeros(D, 2)),
        DenseInverse(torch.eye(D)),
    ]
    for inverse in thin:
        with pytest.raises(ShapeError, match="one side"):
            prepare_block([inverse], bias=False)
    with pytest.raises(ShapeError, match="whole block"):
        prepare_block([thin[0], unit], bias=False)


@pytest.mark.parametrize("relative", [False, True])
def test_from_statistic_to_direction(relative: bool) -> None:
    """Weight and bias of a normalisation layer: (F/count + damping I)⁻¹ g, unit by unit."""
    kind, spec = KINDS["unitwise"], one_sided_spec("unitwise")
    start = batched(kind.start(spec, seed=0))
    rows = rows_of(0)
    refreshed = kind.refresh(
        spec, kind.seed(spec, start), statistic_of(spec, rows, start, 1), start
    )
    published = {name: tensor[0] for name, tensor in refreshed.published.items()}
    factor = factor_of(spec.sides[0], rows["F"])
    damping = DAMPING
    if relative:
        damping *= factor.diagonal(dim1=-2, dim2=-1).sum().item() / DIM_F
    both = torch.randn(DIM_F, 2, generator=generator(1))
    wanted = torch.linalg.solve(
        factor + damping * torch.eye(2).double(), both.double().unsqueeze(-1)
    )
    grad = AffineGradient(both[:, :1].clone(), both[:, 1].clone())
    apply(prepare_block(kind.inverses(spec, published, DAMPING, relative), bias=True), grad)
    assert relative_error(grad.whole(), wanted.squeeze(-1)) < 1e-5


def test_products_larger_than_the_squares_allow_are_no_statistic() -> None:
    kind, spec = KINDS["unitwise"], one_sided_spec("unitwise")
    start = batched(kind.start(spec, seed=0))
    statistic = statistic_of(spec, rows_of(0), start, 1)
    largest = (statistic["F.ww"] * statistic["F.bb"]).sqrt()
    for share, fails in ((-1.0, False), (1.0, False), (1.1, True), (-1.1, True)):
        statistic["F.wb"] = share * largest
        if not fails:
            kind.refresh(spec, kind.seed(spec, start), statistic, start)
            continue
        with pytest.raises(NumericsError, match="squares allow"):
            kind.refresh(spec, kind.seed(spec, start), statistic, start)
