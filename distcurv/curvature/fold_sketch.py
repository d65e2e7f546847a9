"""A sketch folded into a low-rank estimate at once: the fast way of a refresh, for 2r ≤ d.

It does what `nystrom`, `complete` and `fold` do one after the other (they remain the reference,
and the way out), several times faster, because the estimate's own basis U is orthonormal already:

    Y + νQ = [U, V] [S; R]       in a `Frame`: no QR of d x 2r as in `fold`, as a rule none at all
    Nyström  [U, V] N Nᵀ [U, V]ᵀ N = [S; R] C⁻ᵀ, C the Cholesky factor of Qᵀ(Y + νQ)
    fold     [U, V] K [U, V]ᵀ    K = diag(a w, 0) + b N f(NᵀN) Nᵀ, whose eigenpairs are the result

Only the products that lead to the frame, and the new basis, are tall. All else is at most 2r x 2r
and float64. Gram matrices are safe there where they are not in `nystrom`: ν keeps NᵀN away from
singular, and the basis comes from eigenvectors of K, not from a division by singular values.

Source of the Nyström form with a shift ν: Tropp, Yurtsever, Udell and Cevher 2017, Algorithm 3.

Shape suffixes: B blocks, d dimension, r rank of the estimate and of the sketch, s = 2r.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.curvature.ema import EmaWeights
from distcurv.curvature.estimate import ROUNDING, Estimate, isotropic_level, rounding_of
from distcurv.curvature.factorisation import eigh_ascending
from distcurv.curvature.frame import Frame, frame_with
from distcurv.curvature.innovation import ratio
from distcurv.curvature.nystrom import outweigh
from distcurv.curvature.precision import products_are_full

_TINY = 1e-20  # stands for the size of a sketch that is zero
_TIE = 1e-10  # share of themselves that eigenvalues count with beside what they are above the tail


class Sketch(NamedTuple):
    """Sums over rows, float32 or float64."""

    Y_Bdr: Tensor
    Q_Bdr: Tensor  # what the rows were sketched against: orthonormal columns
    trace_B: Tensor
    diag_Bd: Tensor | None  # where the tail is diagonal
    count_B: Tensor  # float64, above 0
    noise: float = 0.0  # what each number of Y may err by beyond float32, as a share of it


class Folded(NamedTuple):
    """The new estimate, in the dtype of the old, and ‖Y − A_old Q‖ / ‖Y‖ as `ratio` cuts it."""

    estimate: Estimate
    innovation_B: Tensor


class _Projected(NamedTuple):
    """The sketch in the frame, divided by its trace; float64."""

    frame: Frame
    Y_Bsr: Tensor  # coordinates of Y + νQ
    core_Brr: Tensor  # Qᵀ(Y + νQ), see also `outweigh`
    shift_B1: Tensor  # ν
    scale_B1: Tensor  # what it was divided by
    trace_B1: Tensor  # 1, or 0 for an empty sketch
    innovation_B: Tensor


def fold_sketch(old: Estimate, sketch: Sketch, shares: EmaWeights) -> Folded | None:
    """shares.old_share · old + shares.new_share · (the Nyström estimate of the sketch), at rank r.

    Args:
        old: the running estimate [B, ...], its U orthonormal, d ≥ 2r. Where its share is 0 its U
            still spans, with the sketch, what the result is taken from.
        sketch: of the same dimension, rank and kind of tail.
        shares: [B], float64.

    Returns:
        None where some block's numbers belong to no positive semidefinite matrix, or need more
        than float32 and one shift: what to do then, and what to say, is the reference's business.

    Raises:
        NumericsError: an eigendecomposition did not converge.
    """
    frame, Y_Bsr, core_Brr, shift_B1, scale_B1, trace_B1, innovation_B = _projected(old, sketch)
    (d, r), diagonal = old.U_dr.shape[-2:], old.has_diagonal_tail()
    a_B1 = shares.old_share.unsqueeze(-1)
    b_B1 = (shares.new_share / sketch.count_B).unsqueeze(-1) * scale_B1

    core_chol_Brr, core_info_B = torch.linalg.cholesky_ex(core_Brr)
    N_Brs = torch.linalg.solve_triangular(core_chol_Brr, Y_Bsr.mT, upper=False)
    isotropic = old.tail is not None and not diagonal
    seen_Bsr, level_B1, left_B1 = _beside_tail(N_Brs, shift_B1, trace_B1, d if isotropic else None)

    # K, its largest r eigenpairs descending and the others.
    old_weights_Br, old_trace_B1 = old.low_rank_weights().double(), old.trace.double().unsqueeze(-1)
    # Directions that the tail takes in whole would otherwise be chosen by rounding.
    raw_Bsr = torch.cat([seen_Bsr, N_Brs.mT * _TIE**0.5], -1)
    K_Bss = (raw_Bsr * b_B1.unsqueeze(-1)) @ raw_Bsr.mT
    raw_Br = old_weights_Br + old.lam_r.double() * _TIE
    K_Bss.diagonal(dim1=-2, dim2=-1)[:, :r].add_((raw_Br * a_B1).clamp_(min=0))
    theta_Bs, W_Bss = eigh_ascending(K_Bss)
    cut_Br, theta_Br = torch.split(theta_Bs.clamp_(min=0), r, -1)
    lam_Br, W_Bsr = theta_Br.flip(-1), W_Bss[..., r:].flip(-1)

    # No entry may be negative; the last two go as far as `complete` does.
    share = rounding_of(sketch.noise)
    margins = [
        -core_info_B.unsqueeze(-1),
        torch.add(old_weights_Br, old_trace_B1, alpha=ROUNDING),
        torch.add(left_B1, trace_B1, alpha=share),
    ]
    tail: Tensor | None = None
    if diagonal:
        assert old.tail is not None and sketch.diag_Bd is not None
        cut_Bsr = W_Bss[..., :r] * cut_Br.sqrt().unsqueeze(-2)
        tall = frame.vectors(torch.cat([W_Bsr, cut_Bsr, seen_Bsr], -1))
        U_Bdr, cut_Bdr, seen_Bdr = torch.split(tall, r, -1)
        U_Bdr = U_Bdr.contiguous()
        res_Bd = sketch.diag_Bd / scale_B1 - seen_Bdr.square().sum(-1)
        margins.append(torch.add(res_Bd, trace_B1, alpha=share))
        tail = old.tail * a_B1 + res_Bd.clamp_(min=0) * b_B1 + cut_Bdr.square().sum(-1)
    else:
        U_Bdr = frame.vectors(W_Bsr)
        if isotropic:
            assert old.tail is not None
            tail = old.tail * a_B1 + level_B1 * b_B1
            lam_Br = lam_Br + tail
            tail = tail + cut_Br.sum(-1, keepdim=True) / (d - r)
    if not bool(torch.cat(margins, -1).amin() >= 0):  # nor is it for NaN
        return None
    trace_B = (old_trace_B1 * a_B1 + trace_B1 * b_B1).squeeze(-1)
    return Folded(Estimate(U_Bdr, lam_Br, tail, trace_B).to(old.U_dr.dtype), innovation_B)


def _projected(old: Estimate, sketch: Sketch) -> _Projected:
    dtype = old.U_dr.dtype if products_are_full(old.U_dr.device) else torch.float64
    U_Bdr, Q_Bdr = old.U_dr.to(dtype), sketch.Q_Bdr.to(dtype)
    # Often it is the same basis; elsewhere than on the CPU finding out means waiting.
    same = U_Bdr.device.type == "cpu" and torch.equal(U_Bdr, Q_Bdr)
    scale_B = torch.where(sketch.trace_B > 0, sketch.trace_B, 1.0)
    Y_Bdr = sketch.Y_Bdr.to(dtype) / scale_B[:, None, None].to(dtype)
    size_B11 = torch.linalg.vector_norm(Y_Bdr, dim=(-2, -1), keepdim=True)
    # What the shift must outweigh is the rounding of the data: see `nystrom`.
    rounding = math.sqrt(U_Bdr.shape[-2]) * torch.finfo(sketch.Y_Bdr.dtype).eps
    shift_B11 = (rounding + sketch.noise**2) * size_B11.clamp(min=_TINY)
    Y_Bdr.add_(Q_Bdr * shift_B11)

    frame, Y_Bsr = frame_with(U_Bdr, Y_Bdr)
    core_Brr = Y_Bsr[:, : Q_Bdr.shape[-1]] if same else (Q_Bdr.mT @ Y_Bdr).double()
    if sketch.noise:
        core_Brr = outweigh(core_Brr, Y_Bsr, sketch.noise)
    shift_B1, size_B1 = shift_B11.double().squeeze(-1), size_B11.double().squeeze(-1)
    scale_B1 = scale_B.double().unsqueeze(-1)
    unit_B1 = scale_B1 / sketch.count_B.unsqueeze(-1)
    if same and not old.has_diagonal_tail():
        change_Bsr = Y_Bsr.clone()
        change_Bsr.diagonal(dim1=-2, dim2=-1).sub_(shift_B1 + old.lam_r / unit_B1)
        change_B = torch.linalg.vector_norm(change_Bsr, dim=(-2, -1))
    else:
        weights_Br = (old.low_rank_weights() / unit_B1).to(dtype)
        beside = shift_B1 if old.tail is None else shift_B1 + old.tail / unit_B1
        UQ_Brr = weights_Br.unsqueeze(-1) * (U_Bdr.mT @ Q_Bdr)
        change_Bdr = torch.baddbmm(Y_Bdr, U_Bdr, UQ_Brr, alpha=-1)
        change_Bdr.sub_(Q_Bdr * beside.to(dtype).unsqueeze(-1))
        change_B = torch.linalg.vector_norm(change_Bdr, dim=(-2, -1)).double()
    innovation_B = ratio(change_B, size_B1.squeeze(-1))
    trace_B1 = sketch.trace_B.double().unsqueeze(-1) / scale_B1
    return _Projected(frame, Y_Bsr, core_Brr, shift_B1, scale_B1, trace_B1, innovation_B)


def _beside_tail(
    N_Brs: Tensor, shift_B1: Tensor, trace_B1: Tensor, d: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the sketch's estimate is beside its tail.

    With H = NᵀN and t the isotropic tail (``d`` given) or 0, that is N f(H) Nᵀ with
    f(x) = max(x − ν − t, 0) / x: eigenvalues less ν and t.

    Returns:
        F [B, s, r] with F Fᵀ = N f(H) Nᵀ; t [B, 1]; and the trace less the eigenvalues [B, 1].
    """
    r = N_Brs.shape[-2]
    H_Brr = N_Brs @ N_Brs.mT
    left_B1 = trace_B1 - H_Brr.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) + r * shift_B1
    level_B1 = torch.zeros_like(left_B1) if d is None else (left_B1 / (d - r)).clamp_(min=0)
    # As a rule nothing is cut off at 0. Then two Cholesky factorisations do: with H = L Lᵀ and
    # Z = L⁻¹Nᵀ the result is Zᵀ (LᵀL − (ν + t) I) Z.
    chol_Brr, info_B = torch.linalg.cholesky_ex(H_Brr)
    middle_Brr = chol_Brr.mT @ chol_Brr
    middle_Brr.diagonal(dim1=-2, dim2=-1).sub_(shift_B1 + level_B1)
    root_Brr, root_info_B = torch.linalg.cholesky_ex(middle_Brr)
    if not bool((info_B + root_info_B).any()):
        Z_Brs = torch.linalg.solve_triangular(chol_Brr, N_Brs, upper=False)
        return Z_Brs.mT @ root_Brr, level_B1, left_B1
    square_Br, P_Brr = eigh_ascending(H_Brr)
    lam_Br = (square_Br - shift_B1).clamp_(min=0)
    left_B1 = trace_B1 - lam_Br.sum(-1, keepdim=True)
    if d is not None:
        level_B1 = isotropic_level(lam_Br, left_B1, d)
    share_Br = (lam_Br - level_B1).clamp_(min=0) / square_Br
    return (N_Brs.mT @ P_Brr) * share_Br.sqrt().unsqueeze(-2), level_B1, left_B1
