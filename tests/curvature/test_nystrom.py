"""Single-pass Nyström against dense references.

Tolerances: in float64 the shift √d · eps · ‖Y‖ bounds the error of well-conditioned cases (1e-12);
in float32 that shift is about 1e-6 of ‖Y‖ for d = 64. Orthogonality is that of a float32 QR.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import generator, nystrom_matrix, orthogonality_error, orthonormal, psd, relative_error

from distcurv.curvature.nystrom import nystrom
from distcurv.errors import NumericsError, ShapeError


def rebuilt(U: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    return (U.double() * lam.double().unsqueeze(-2)) @ U.double().mT


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("d", [1, 5, 24])
def test_full_rank_equals_the_matrix(d: int, dtype: torch.dtype, tolerance: float) -> None:
    A = psd([1.0 / (i + 1) for i in range(d)], seed=d)
    Q = orthonormal(d, d, seed=d + 1)
    U, lam = nystrom((A @ Q).to(dtype), Q.to(dtype))
    assert relative_error(rebuilt(U, lam), A) < tolerance
    assert relative_error(lam, torch.linalg.eigvalsh(A).flip(0)) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 3e-5)])
def test_low_rank_equals_the_pseudoinverse_formula(dtype: torch.dtype, tolerance: float) -> None:
    A = psd([0.8**i for i in range(30)], seed=3)
    Q = orthonormal(30, 6, seed=4)
    U, lam = nystrom((A @ Q * 50).to(dtype), Q.to(dtype), count=50)
    assert relative_error(rebuilt(U, lam), nystrom_matrix(A, Q)) < tolerance


def test_the_basis_stays_orthonormal_for_a_spectrum_over_twelve_decades() -> None:
    A = psd([10.0 ** (-12 * i / 63) for i in range(64)], seed=1)
    Q = orthonormal(64, 32, seed=2)
    U, lam = nystrom((A @ Q).float(), Q.float())
    assert U.dtype == torch.float32
    assert orthogonality_error(U) < 1e-6
    assert bool((lam[:-1] >= lam[1:]).all())


@pytest.mark.parametrize("scale", [1e-24, 1e-12, 1e8, 1e16])
def test_scale_does_not_matter(scale: float) -> None:
    A = psd([2.0, 1.0, 0.5, 0.1, 0.1, 0.1], seed=7)
    Q = orthonormal(6, 3, seed=8)
    U, lam = nystrom((A @ Q * scale).float(), Q.float())
    U1, lam1 = nystrom((A @ Q).float(), Q.float())
    assert relative_error(lam / scale, lam1) < 1e-5
    assert relative_error(rebuilt(U, lam / scale), rebuilt(U1, lam1)) < 1e-5


def test_zero_gives_zero_and_a_basis() -> None:
    Q = orthonormal(9, 4, seed=0).float()
    U, lam = nystrom(torch.zeros(9, 4), Q)
    assert lam.tolist() == [0.0] * 4
    assert orthogonality_error(U) < 1e-6
    assert relative_error(U @ U.mT, Q @ Q.mT) < 1e-6


@pytest.mark.parametrize("true_rank", [1, 3])
def test_rank_deficient_is_exact_and_orthonormal(true_rank: int) -> None:
    A = psd([1.0] * true_rank + [0.0] * (20 - true_rank), seed=5)
    Q = orthonormal(20, 8, seed=6)
    U, lam = nystrom((A @ Q).float(), Q.float())
    assert relative_error(rebuilt(U, lam), A) < 1e-5
    assert orthogonality_error(U) < 1e-6
    assert lam[true_rank:].max().item() < 1e-5


def test_duplicated_eigenvalues_and_rank_one() -> None:
    A = psd([3.0] * 5 + [1.0] * 5, seed=9)
    Q = orthonormal(10, 1, seed=10)
    U, lam = nystrom(A @ Q, Q)
    assert relative_error(rebuilt(U, lam), nystrom_matrix(A, Q)) < 1e-12
    identity = torch.eye(10, dtype=torch.float64)
    U, lam = nystrom(identity @ orthonormal(10, 4, 1), orthonormal(10, 4, 1))
    assert lam.tolist() == pytest.approx([1.0] * 4, abs=1e-12)


def test_batched_equals_looped() -> None:
    A = torch.stack([psd([0.7**i for i in range(12)], seed=s) for s in range(6)]).view(2, 3, 12, 12)
    Q = orthonormal(12, 5, seed=11, batch=(2, 3))
    count = torch.arange(1.0, 7.0).view(2, 3)
    U, lam = nystrom((A @ Q).float(), Q.float(), count)
    for i in range(2):
        for j in range(3):
            one_U, one_lam = nystrom((A @ Q)[i, j].float(), Q[i, j].float(), count[i, j])
            assert relative_error(rebuilt(one_U, one_lam), rebuilt(U[i, j], lam[i, j])) < 1e-6


@given(
    d=st.integers(1, 16),
    rank_share=st.floats(0.05, 1.0),
    decay=st.floats(0.1, 1.0),
    seed=st.integers(0, 10_000),
)
def test_never_exceeds_the_matrix(d: int, rank_share: float, decay: float, seed: int) -> None:
    r = max(1, round(d * rank_share))
    A = psd([decay**i for i in range(d)], seed)
    Q = orthonormal(d, r, seed + 1)
    U, lam = nystrom((A @ Q).float(), Q.float())
    assert orthogonality_error(U) < 2e-6
    assert bool((lam >= 0).all())
    gap = torch.linalg.eigvalsh(A - rebuilt(U, lam)).min().item()
    assert gap > -1e-4 * torch.linalg.eigvalsh(A).max().item()
    assert lam.sum().item() <= A.trace().item() * (1 + 1e-5)


def test_noise_of_float32_sums_is_survived() -> None:
    # Rows summed in 2,000 float32 chunks: QᵀY is neither symmetric nor semidefinite to rounding.
    mixing = torch.randn(3, 40, generator=generator(1))
    rows = torch.randn(20_000, 3, generator=generator(0)) @ mixing
    Q = orthonormal(40, 16, seed=2).float()
    Y = torch.zeros(40, 16)
    for chunk in rows.split(10):
        Y += chunk.mT @ (chunk @ Q)
    U, lam = nystrom(Y, Q, 20_000)
    A = rows.double().mT @ rows.double() / 20_000
    assert relative_error(rebuilt(U, lam), A) < 1e-4
    assert orthogonality_error(U) < 1e-6


def test_retry_rescues_what_the_first_shift_does_not() -> None:
    A = psd([1.0] + [0.0] * 15, seed=5)
    Q = orthonormal(16, 4, seed=6)
    noise = torch.randn(16, 4, generator=generator(3), dtype=torch.float64)
    noisy = (A @ Q + 2e-6 * noise).float()
    clean = (A @ Q).float()
    U, lam = nystrom(torch.stack([noisy, clean]), Q.float())
    alone = nystrom(clean, Q.float())
    assert relative_error(rebuilt(U[0], lam[0]), A) < 1e-2
    assert torch.equal(U[1], alone.U_dr)  # a neighbour's retry changes nothing here
    assert torch.equal(lam[1], alone.lam_r)


def test_bad_input_is_refused() -> None:
    Q = orthonormal(8, 3, seed=0).float()
    with pytest.raises(NumericsError, match="NaN or infinite"):
        nystrom(torch.full((8, 3), float("nan")), Q)
    with pytest.raises(NumericsError, match="not positive definite"):
        nystrom(-Q, Q)
    with pytest.raises(ShapeError, match=r"\(8, 2\)"):
        nystrom(torch.zeros(8, 2), Q)
