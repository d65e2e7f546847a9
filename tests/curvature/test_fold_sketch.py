"""The fast way of a refresh against the three steps it stands for.

The oracle is `nystrom`, `complete` and `fold` one after the other, in float64 from the same sums
(with the shift that float32 sums need); their own tests hold them to dense matrices.
Tolerances on matrices, eigenvalues and tails, relative to the largest: 1e-9 in float64, where the
two differ by the rounding of an inverse of condition 1e6, and 3e-6 in float32 (what float32 sums
cost both alike, by the shift, is up to ten times that). The basis: 2e-6 in float32.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracles import generator, orthogonality_error, orthonormal, psd, relative_error
from torch import Tensor

from distcurv.curvature import lowrank
from distcurv.curvature.ema import EmaWeights, ema_weights
from distcurv.curvature.estimate import Estimate, complete
from distcurv.curvature.fold import fold
from distcurv.curvature.fold_sketch import Folded, Sketch, fold_sketch
from distcurv.curvature.innovation import innovation
from distcurv.curvature.kinds import KINDS
from distcurv.curvature.lowrank import refresh_side
from distcurv.curvature.nystrom import nystrom
from distcurv.curvature.spec import BlockSpec, SideSpec, Tensors
from distcurv.curvature.statistics import encode_rows
from distcurv.errors import NumericsError

D, R, B = 30, 6, 3
TAILS = ["none", "isotropic", "diagonal"]
each_tail = pytest.mark.parametrize("tail", TAILS)
each_dtype = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 3e-6)]
)


@dataclasses.dataclass
class Given:
    """Blocks with an estimate from one matrix and a sketch of another."""

    tail: str
    old: Estimate
    sketch: Sketch

    def in_dtype(self, dtype: torch.dtype) -> Given:
        s = self.sketch
        diag = None if s.diag_Bd is None else s.diag_Bd.to(dtype)
        sketch = Sketch(s.Y_Bdr.to(dtype), s.Q_Bdr.to(dtype), s.trace_B.to(dtype), diag, s.count_B)
        return Given(self.tail, self.old.to(dtype), sketch)


def estimate_of(A_Bdd: Tensor, tail: str) -> Estimate:
    lam, U = torch.linalg.eigh(A_Bdd)
    return complete(
        U.flip(-1)[..., :R].contiguous(),
        lam.flip(-1)[..., :R],
        tail,
        A_Bdd.diagonal(dim1=-2, dim2=-1).sum(-1),
        A_Bdd.diagonal(dim1=-2, dim2=-1),
    )


def given(tail: str, spectrum: list[float], basis: str, d: int = D) -> Given:
    """``basis``: the sketch is taken against the estimate's, a near or a random one."""
    spectrum = spectrum + [0.0] * (d - len(spectrum))
    old = estimate_of(torch.stack([psd(spectrum, seed=i) for i in range(B)]), tail)
    A = torch.stack([psd([2.0 * x for x in spectrum], seed=10 + i) for i in range(B)])
    Q = old.U_dr
    if basis == "near":
        noise = torch.randn(Q.shape, generator=generator(5), dtype=torch.float64)
        Q = torch.linalg.qr(Q + 0.05 * noise).Q
    if basis == "random":
        Q = orthonormal(d, R, seed=6, batch=(B,))
    count = torch.tensor([1.0, 7.0, 400.0], dtype=torch.float64)
    diag = A.diagonal(dim1=-2, dim2=-1) * count[:, None]
    Y = A @ Q * count[:, None, None]
    return Given(tail, old, Sketch(Y, Q, diag.sum(-1), diag if tail == "diagonal" else None, count))


SPECTRA = {
    "slow": [1.0 / (i + 1) for i in range(D)],
    "fast": [0.5**i for i in range(D)],
    "flat": [1.0] * D,
    "deficient": [1.0, 0.5, 0.2],
}


def shares() -> EmaWeights:
    return ema_weights(0.9, torch.tensor([1.0, 5.0, 3.0]), torch.tensor([0.2, 0.9, 0.0]))


def reference(given: Given, shares: EmaWeights) -> Folded:
    """In float64, with the shift of the dtype that the sums have."""
    s = given.sketch
    U, lam = nystrom(s.Y_Bdr, s.Q_Bdr, s.count_B)
    diag = None if s.diag_Bd is None else s.diag_Bd.double() / s.count_B[:, None]
    second = complete(U.double(), lam, given.tail, s.trace_B.double() / s.count_B, diag)
    old = given.old.double()
    mean_Y = s.Y_Bdr.double() / s.count_B[:, None, None]
    return Folded(
        fold(old, second, shares.old_share, shares.new_share),
        innovation(old, mean_Y, s.Q_Bdr.double()),
    )


def check(got: Estimate, wanted: Estimate, tolerance: float) -> None:
    for i in range(len(wanted.trace)):
        top = wanted.lam_r[i, 0].item()
        assert relative_error(got.dense()[i], wanted.dense()[i]) < tolerance
        assert (got.lam_r[i] - wanted.lam_r[i]).abs().max().item() < tolerance * top
        assert bool((got.lam_r[i][:-1] >= got.lam_r[i][1:]).all())
        assert orthogonality_error(got.U_dr[i]) < (
            2e-6 if got.U_dr.dtype == torch.float32 else 1e-10
        )
        if wanted.tail is not None:
            assert got.tail is not None
            assert (got.tail[i] - wanted.tail[i]).abs().max().item() < tolerance * top
            assert bool((got.tail[i] >= 0).all())
    assert relative_error(got.trace, wanted.trace) < 1e-6


@each_tail
@each_dtype
@pytest.mark.parametrize("basis", ["same", "near", "random"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_equals_the_three_steps(
    tail: str, dtype: torch.dtype, tolerance: float, basis: str, spectrum: str
) -> None:
    case = given(tail, SPECTRA[spectrum], basis).in_dtype(dtype)
    got = fold_sketch(case.old, case.sketch, shares())
    wanted = reference(case, shares())
    assert got is not None
    assert got.estimate.U_dr.dtype == dtype
    check(got.estimate, wanted.estimate, tolerance)
    torch.testing.assert_close(got.innovation_B.double(), wanted.innovation_B, rtol=1e-4, atol=1e-6)


@each_tail
def test_at_twice_the_rank_nothing_is_cut(tail: str) -> None:
    case = given(tail, SPECTRA["slow"][: 2 * R], "random", d=2 * R)
    got = fold_sketch(case.old, case.sketch, shares())
    assert got is not None
    check(got.estimate, reference(case, shares()).estimate, 1e-9)


@each_tail
def test_batched_equals_alone(tail: str) -> None:
    case = given(tail, SPECTRA["slow"], "near").in_dtype(torch.float32)
    whole = fold_sketch(case.old, case.sketch, shares())
    assert whole is not None

    def one(tensors, i: int):  # type: ignore[no-untyped-def]
        parts = (t[i : i + 1].clone() if isinstance(t, torch.Tensor) else t for t in tensors)
        return type(tensors)(*parts)

    for i in range(B):
        alone = fold_sketch(one(case.old, i), one(case.sketch, i), one(shares(), i))
        assert alone is not None
        assert relative_error(whole.estimate.dense()[i], alone.estimate.dense()[0]) < 1e-5
        assert whole.innovation_B[i].item() == pytest.approx(alone.innovation_B.item(), rel=1e-4)


@each_tail
@pytest.mark.parametrize("scale", [1e-24, 1e-10, 1e16])
def test_the_size_of_the_numbers_does_not_matter(tail: str, scale: float) -> None:
    case = given(tail, SPECTRA["slow"], "near").in_dtype(torch.float32)
    s, old = case.sketch, case.old
    diag = None if s.diag_Bd is None else s.diag_Bd * scale
    sketch = Sketch(s.Y_Bdr * scale, s.Q_Bdr, s.trace_B * scale, diag, s.count_B)
    old_tail = None if old.tail is None else old.tail * scale
    scaled = Estimate(old.U_dr, old.lam_r * scale, old_tail, old.trace * scale)
    got, wanted = fold_sketch(scaled, sketch, shares()), fold_sketch(old, s, shares())
    assert got is not None
    assert wanted is not None
    for i in range(B):
        wide = got.estimate.double().dense()[i] / scale
        assert relative_error(wide, wanted.estimate.dense()[i]) < 1e-5
    torch.testing.assert_close(got.innovation_B, wanted.innovation_B, rtol=1e-4, atol=0.0)


@each_tail
def test_no_float32_product_where_the_caller_allows_less(tail: str) -> None:
    case = given(tail, SPECTRA["slow"], "near").in_dtype(torch.float32)
    wanted = reference(case, shares()).estimate
    torch.set_float32_matmul_precision("medium")
    try:
        got = fold_sketch(case.old, case.sketch, shares())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert got is not None
    assert got.estimate.U_dr.dtype == torch.float32
    check(got.estimate, wanted, 3e-6)


def spoiled(case: Given, what: str) -> Given:
    s, old = case.sketch, case.old
    if what == "negative":
        return Given(case.tail, old, s._replace(Y_Bdr=-s.Y_Bdr))
    if what == "nan":
        Y = s.Y_Bdr.clone()
        Y[1, 2, 3] = float("nan")
        return Given(case.tail, old, s._replace(Y_Bdr=Y))
    if what == "trace":
        return Given(case.tail, old, s._replace(trace_B=s.trace_B * 0.5))
    return Given(case.tail, old._replace(lam_r=old.lam_r - 2.0), s)


@pytest.mark.parametrize("what", ["negative", "nan", "trace", "old"])
@pytest.mark.parametrize("tail", ["none", "isotropic"])
def test_what_the_reference_refuses_is_left_to_it(tail: str, what: str) -> None:
    case = spoiled(given(tail, SPECTRA["fast"], "same").in_dtype(torch.float32), what)
    with pytest.raises(NumericsError):
        reference(case, shares())
    try:
        assert fold_sketch(case.old, case.sketch, shares()) is None
    except NumericsError as error:
        assert what == "nan" and "eigh" in str(error)  # LAPACK's way with a NaN


def test_a_diagonal_below_the_sketch_is_left_to_the_reference() -> None:
    case = given("diagonal", SPECTRA["slow"], "same")
    assert case.sketch.diag_Bd is not None
    diag = case.sketch.diag_Bd.clone()
    diag[2, 4] *= -1.0
    case.sketch = case.sketch._replace(diag_Bd=diag)
    with pytest.raises(NumericsError, match="diagonal tail"):
        reference(case, shares())
    assert fold_sketch(case.old, case.sketch, shares()) is None


@each_tail
def test_a_side_falls_back_on_the_reference(tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = given(tail, SPECTRA["slow"], "near").in_dtype(torch.float32)
    s = case.sketch
    statistic = {"Y": s.Y_Bdr, "trace": s.trace_B, "count": s.count_B.float()}
    if s.diag_Bd is not None:
        statistic["diag"] = s.diag_Bd
    side = SideSpec(D, R, tail, "sketch")
    known = torch.tensor([True, True, False])
    arguments = (side, case.old, known, statistic, s.Q_Bdr, shares())
    fast = refresh_side(*arguments)

    def gives_up(*_: object) -> None:
        raise NumericsError("no convergence")

    for instead in (gives_up, lambda *_: None):
        monkeypatch.setattr(lowrank, "fold_sketch", instead)
        slow = refresh_side(*arguments)
        check(fast.estimate, slow.estimate.double(), 3e-6)
        torch.testing.assert_close(fast.innovation, slow.innovation, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(fast.uncaptured, slow.uncaptured, rtol=1e-4, atol=1e-6)
        assert fast.innovation[2].item() == -1.0


@each_tail
def test_an_empty_sketch_only_makes_the_old_less(tail: str) -> None:
    case = given(tail, SPECTRA["slow"], "same").in_dtype(torch.float32)
    s = case.sketch
    statistic = {"Y": s.Y_Bdr * 0, "trace": s.trace_B * 0, "count": s.count_B.float()}
    if s.diag_Bd is not None:
        statistic["diag"] = s.diag_Bd * 0
    got = refresh_side(
        SideSpec(D, R, tail, "sketch"), case.old, torch.ones(B) > 0, statistic, s.Q_Bdr, shares()
    ).estimate
    for i in range(2):
        wanted = shares().old_share[i] * case.old.double().dense()[i]
        assert relative_error(got.dense()[i], wanted) < 1e-5


def windows(tail: str, rows: int, count: int, d: int, r: int) -> list[float]:
    """How far the basis is off orthonormal after each of ``count`` refreshes of one side."""
    spec = BlockSpec("block", "lowrank", (SideSpec(d, r, tail, "sketch"),), 0.9)
    kind = KINDS["lowrank"]
    published: Tensors = {name: t.unsqueeze(0) for name, t in kind.start(spec, 0).items()}
    state = kind.seed(spec, published)
    draw = generator(0)
    scale = torch.arange(1, d + 1).rsqrt()
    errors = []
    for _ in range(count):
        X = torch.randn(1, rows, d, generator=draw) * scale
        encoded = encode_rows(spec.sides[0], X, published["F.U"])
        statistic = {f"F.{name}": tensor for name, tensor in encoded.items()}
        statistic |= {"F.count": torch.tensor([float(rows)]), "steps": torch.ones(1)}
        refreshed = kind.refresh(spec, state, statistic, published)
        state, published = refreshed.state, refreshed.published
        errors.append(orthogonality_error(published["F.U"][0]))
    return errors


def test_the_basis_is_orthonormal_after_two_thousand_refreshes() -> None:
    errors = windows("isotropic", rows=30, count=2000, d=24, r=4)
    assert max(errors) < 2e-6
    # Nothing has added up.
    assert max(errors[-100:]) < 2.0 * max(errors[100:200])


@each_tail
def test_the_basis_is_orthonormal_where_rows_are_fewer_than_the_rank(tail: str) -> None:
    assert max(windows(tail, rows=3, count=60, d=24, r=8)) < 2e-6
