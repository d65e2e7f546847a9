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
        if window == 0:
            # Two passes before there is anything to be warm from.
            state_of_generator = generator.get_state()
            statistic, _ = _statistic(spec, basis, generator)
            basis = turned_basis(spec, basis, statistic)
            generator.set_state(state_of_generator)
        statistic, mean_dd = _statistic(spec, basis, generator)
        shares = ema_weights(DECAY, torch.tensor(STEPS), weight)
        weight = shares.weight
        factor_dd = float(shares.old_share) * factor_dd + float(shares.new_share) * mean_dd
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
    U_dr, lam_r = published["F.U"][0].double(), published["F.lam"][0].double()
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

    Where 2r ≤ d: eight products of 2 d r² (Uᵀ and Qᵀ times Y, Y less its projection, three Gram
    matrices, the new basis of 2r columns), an eigendecomposition of 2r at 10 n³, and about 20 r³
    for the other small matrices.

    Else, as `nystrom` and `fold` do it: core, triangular solve, QR with its Q, turn
    (2 + 1 + 4 + 2) d r²; innovation 4 d r²; fold of d×2r: QR with its Q (16 d r²) and turn
    (8 d r²); two small SVDs of r and 2r at about 20 n³."""
    if 2 * r <= d:
        return 16.0 * d * r**2 + 10.0 * (2 * r) ** 3 + 20.0 * r**3
    return 37.0 * d * r**2 + 20.0 * (r**3 + (2 * r) ** 3)


def _statistic(
    spec: BlockSpec, basis: Tensors, generator: torch.Generator
) -> tuple[Tensors, Tensor]:
    """The statistic of d new rows of every block, and the mean [d, d] of the first block's.

    The rows of all blocks at once would not fit into a small machine's memory."""
    side, U_Bdr = spec.sides[0], basis["F.U"]
    parts = []
    for block, U_dr in enumerate(U_Bdr):
        rows_Nd = _rows(side.dim, U_dr.device, generator)
        parts.append(encode_rows(side, rows_Nd, U_dr))
        if block == 0:
            mean_dd = rows_Nd.mT @ rows_Nd / len(rows_Nd)
    statistic = {f"F.{name}": torch.stack([part[name] for part in parts]) for name in parts[0]}
    ones_B = U_Bdr.new_ones(len(U_Bdr))
    return statistic | {"F.count": ones_B * side.dim, "steps": ones_B * STEPS}, mean_dd


def _rows(d: int, device: torch.device, generator: torch.Generator) -> Tensor:
    scale_d = torch.arange(1, d + 1, device=device, dtype=torch.float32).rsqrt()
    return torch.randn(d, d, device=device, generator=generator) * scale_d


def _residual(factor_dd: Tensor, approximation_dd: Tensor) -> float:
    return float((factor_dd - approximation_dd).norm() / factor_dd.norm())
