"""A factor that drifts, and what `bench refresh` does with it.

The rows of each window are Gaussian with the eigenvalues 1/i, a slow decay that low rank does not
flatter.  The low-rank side sees only sketches against the basis of its previous version, as in
training; its rivals are handed the exact dense average.  So its residual carries the truncation of
every version before, and what it gains from a warm start.

Shape suffixes: B blocks, N rows, d the side's dimension, r its rank, p = d(d+1)/2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distcurv.curvature.ema import ema_weights
from distcurv.curvature.kinds import KINDS
from distcurv.curvature.lowrank import turned_basis
from distcurv.curvature.spec import BlockSpec, SideSpec, Tensors
from distcurv.curvature.statistics import encode_rows

DECAY = 0.95
STEPS = 10  # statistic steps in a window
WINDOWS = 4


@dataclass
class Case:
    """One size, ready for the last refresh.

    Attributes:
        spec: a block with one side, sketched.
        state, statistic, basis: arguments of the kind's refresh, [B, ...].
        factor_dd: the exact average of the first block after that refresh.
    """

    spec: BlockSpec
    state: Tensors
    statistic: Tensors
    basis: Tensors
    factor_dd: Tensor


def make_case(d: int, r: int, blocks: int, device: str, *, tail: str = "isotropic") -> Case:
    """Blocks of one shape after `WINDOWS` − 1 refreshes, with the statistic of the next one."""
    spec = BlockSpec("bench", "lowrank", (SideSpec(d, r, tail, "sketch"),), DECAY)
    kind = KINDS[spec.kind]
    generator = torch.Generator(device).manual_seed(0)
    start = {name: t.to(device) for name, t in kind.start(spec, 0).items()}
    basis = {name: t.expand(blocks, *t.shape).contiguous() for name, t in start.items()}
    state = kind.seed(spec, basis)
    factor_dd = torch.zeros(d, d, device=device)
    weight = torch.zeros((), dtype=torch.float64)
    statistic: Tensors = {}
    for window in range(WINDOWS):
        rows_BNd = _rows(blocks, d, device, generator)
        if window == 0:
            # Two passes before there is anything to be warm from.
            basis = turned_basis(spec, basis, _statistic(spec, rows_BNd, basis))
        statistic = _statistic(spec, rows_BNd, basis)
        shares = ema_weights(DECAY, torch.tensor(STEPS), weight)
        weight = shares.weight
        first_Nd = rows_BNd[0]
        factor_dd = float(shares.old_share) * factor_dd + (
            float(shares.new_share) / len(first_Nd)
        ) * (first_Nd.mT @ first_Nd)
        if window < WINDOWS - 1:
            refreshed = kind.refresh(spec, state, statistic, basis)
            state, basis = refreshed.state, refreshed.published
    return Case(spec, state, statistic, basis, factor_dd)


def refresh(case: Case) -> Tensors:
    """What is timed: fold the statistic and finish the next version, as a worker does."""
    kind = KINDS[case.spec.kind]
    return kind.refresh(case.spec, case.state, case.statistic, case.basis).published


def low_rank_residual(case: Case) -> float:
    """‖F − U λ Uᵀ‖ / ‖F‖ of the refreshed version against the exact average (no tail)."""
    published = refresh(case)
    U_dr, lam_r = published["A.U"][0].double(), published["A.lam"][0].double()
    return _residual(case.factor_dd.double(), (U_dr * lam_r) @ U_dr.mT)


def cold_residual(case: Case, passes: int) -> float:
    """The same for a randomized SVD of the exact average from a random start, with ``passes``
    power iterations (Halko et al. 2011; `torch.svd_lowrank`)."""
    r = case.spec.sides[0].rank
    torch.manual_seed(0)
    factor_dd = case.factor_dd.double()
    U_dr, lam_r, V_dr = torch.svd_lowrank(factor_dd, q=r, niter=passes)
    return _residual(factor_dd, (U_dr * lam_r) @ V_dr.mT)


def best_residual(case: Case) -> float:
    """The smallest that rank r allows (Eckart and Young), from `torch.linalg.eigvalsh`."""
    r = case.spec.sides[0].rank
    lam_d = torch.linalg.eigvalsh(case.factor_dd.double()).flip(-1)
    return float(lam_d[r:].norm() / lam_d.norm())


def nominal_flops(d: int, r: int) -> float:
    """Floating point operations of one side's refresh, terms in d alone dropped.

    Sketch to eigenpairs: core, triangular solve, QR with its Q, turn (2 + 1 + 4 + 2) d r²;
    innovation 4 d r²; fold of d×2r: QR with its Q (16 d r²) and turn (8 d r²); two small SVDs of r
    and 2r at about 20 n³."""
    return 37.0 * d * r**2 + 20.0 * (r**3 + (2 * r) ** 3)


def _rows(blocks: int, d: int, device: str, generator: torch.Generator) -> Tensor:
    scale_d = torch.arange(1, d + 1, device=device, dtype=torch.float32).rsqrt()
    return torch.randn(blocks, d, d, device=device, generator=generator) * scale_d


def _statistic(spec: BlockSpec, rows_BNd: Tensor, basis: Tensors) -> Tensors:
    side = spec.sides[0]
    encoded = encode_rows(side, rows_BNd, basis["A.U"])
    statistic = {f"A.{name}": tensor for name, tensor in encoded.items()}
    ones_B = rows_BNd.new_ones(len(rows_BNd))
    statistic["A.count"] = ones_B * rows_BNd.shape[1]
    statistic["steps"] = ones_B * STEPS
    return statistic


def _residual(factor_dd: Tensor, approximation_dd: Tensor) -> float:
    return float((factor_dd - approximation_dd).norm() / factor_dd.norm())
