"""Dense float64 references for the four-block rule: everything it never forms, formed.

They complete the bases, U⊥ and all, rotate the whole matrix and divide there; they share no code
with distcurv. Tolerances: `FLOAT64` relative (the rest is a difference of energies), `FLOAT32` of
the largest entry for a float32 direction.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from distcurv.curvature import four_block, four_block_state
from distcurv.curvature.four_block_state import FourBlockState

FLOAT64 = 1e-9
FLOAT32 = 5e-3
BETA1, BETA2, EPS = 0.9, 0.95, 1e-8

# (O, I, g, a): tall, wide, square; unequal ranks, rank 1, full on one side, on the other, on both.
SHAPES = [
    (12, 7, 3, 2),
    (6, 15, 2, 5),
    (9, 9, 4, 4),
    (8, 5, 1, 1),
    (7, 10, 7, 3),
    (11, 6, 4, 6),
    (5, 8, 5, 8),
    (1, 6, 1, 2),
    (6, 1, 3, 1),
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(d: int, r: int, gen: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(d, r, generator=gen, dtype=torch.float64)).Q


def complement(basis: Tensor) -> Tensor:
    full = torch.linalg.qr(basis, mode="complete").Q
    return full[:, basis.shape[1] :]


def skewed(d_out: int, d_in: int, gen: torch.Generator) -> Tensor:
    """A gradient whose directions differ in scale by 100, so that wrong scalings show."""
    scale_out = torch.logspace(0, -2, d_out, dtype=torch.float64)[:, None]
    scale_in = torch.logspace(-2, 0, d_in, dtype=torch.float64)[None, :]
    return torch.randn(d_out, d_in, generator=gen, dtype=torch.float64) * scale_out * scale_in


def dense_parts(x: Tensor, u: Tensor, w: Tensor) -> dict[str, Tensor]:
    """The four full-size parts by projectors."""
    p, q = u @ u.T, w @ w.T
    i, j = torch.eye(len(p), dtype=x.dtype), torch.eye(len(q), dtype=x.dtype)
    return {
        "core": p @ x @ q,
        "right": (i - p) @ x @ q,
        "left": p @ x @ (j - q),
        "rest": (i - p) @ x @ (j - q),
    }


class DenseFourBlock:
    """The rule with everything of full size, for a basis that stands."""

    def __init__(self, u: Tensor, w: Tensor) -> None:
        self.u, self.w = u, w
        self.m: Tensor | float = 0.0
        self.v: dict[str, Tensor | float] = dict.fromkeys(("core", "right", "left", "rest"), 0.0)
        self.t = 0

    def coordinates(self, x: Tensor) -> dict[str, Tensor]:
        parts = dense_parts(x, self.u, self.w)
        return {
            "core": self.u.T @ parts["core"] @ self.w,
            "right": parts["right"] @ self.w,
            "left": self.u.T @ parts["left"],
            "rest": complement(self.u).T @ x @ complement(self.w),
        }

    def update(self, x: Tensor) -> Tensor:
        (d_out, g), (d_in, a) = self.u.shape, self.w.shape
        self.t += 1
        self.m = BETA1 * self.m + (1 - BETA1) * x
        for name, part in self.coordinates(x).items():
            square = part.square()
            if name == "rest":
                square = square.mean() if square.numel() else torch.zeros((), dtype=x.dtype)
            self.v[name] = BETA2 * self.v[name] + (1 - BETA2) * square
        total = sum(torch.as_tensor(self.v[k]).sum() for k in ("core", "right", "left"))
        v = {k: torch.as_tensor(value) for k, value in self.v.items()}
        v["rest"] = torch.maximum(v["rest"], 1e-4 * total / (d_out * d_in))
        hat = {
            k: part / (1 - BETA1**self.t) / ((v[k] / (1 - BETA2**self.t)).sqrt() + EPS)
            for k, part in self.coordinates(self.m).items()
        }
        direction = self.u @ hat["core"] @ self.w.T
        if g < d_out:
            direction = direction + ((d_out - g) / d_out) ** 0.5 * hat["right"] @ self.w.T
        if a < d_in:
            direction = direction + ((d_in - a) / d_in) ** 0.5 * self.u @ hat["left"]
        if g < d_out and a < d_in:
            rest = complement(self.u) @ hat["rest"] @ complement(self.w).T
            direction = direction + rest
        return direction


def fresh(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64) -> FourBlockState:
    d_out, d_in, g, a = shape
    return four_block_state.init_state((d_out, d_in), g, a, dtype=dtype)


def step(
    state: FourBlockState, x: Tensor, u: Tensor, w: Tensor, t: int
) -> tuple[Tensor, FourBlockState]:
    return update(state, x, u, w, t, eps=EPS), state


def update(state: FourBlockState, x: Tensor, u: Tensor, w: Tensor, t: int, *, eps: float) -> Tensor:
    """One block alone, its direction formed; the state is overwritten."""
    (direction,) = four_block.advance(
        [state], [x], [u], [w], steps=[t], beta1=BETA1, beta2=BETA2, eps=eps
    )
    return direction.dense()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = FLOAT64) -> None:
    scale = expected.abs().max().clamp_min(1e-30) if expected.numel() else torch.tensor(1.0)
    assert actual.shape == expected.shape
    error = float(((actual.double() - expected).abs() / scale).max()) if actual.numel() else 0.0
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def squared_rotation_soap(grads: list[Tensor], bases: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """SOAP written out: Adam in a full eigenbasis, the moment turned by squared rotations."""
    m, v, directions = torch.zeros_like(grads[0]), torch.zeros_like(grads[0]), []
    before = bases[0]
    for t, (x, (u, w)) in enumerate(zip(grads, bases, strict=True), start=1):
        v = (u.T @ before[0]).square() @ v @ (w.T @ before[1]).square().T
        m = BETA1 * m + (1 - BETA1) * x
        v = BETA2 * v + (1 - BETA2) * (u.T @ x @ w).square()
        root = (v / (1 - BETA2**t)).sqrt() + EPS
        directions.append(u @ ((u.T @ m @ w) / (1 - BETA1**t) / root) @ w.T)
        before = (u, w)
    return directions


def trained(shape: tuple[int, int, int, int], u: Tensor, w: Tensor, seed: int) -> FourBlockState:
    gen, state = generator(seed), fresh(shape)
    for t in range(1, 6):
        _, state = step(state, skewed(shape[0], shape[1], gen), u, w, t)
    return state


def nearby(basis: Tensor, gen: torch.Generator, by: float) -> Tensor:
    noise = torch.randn(basis.shape, generator=gen, dtype=basis.dtype)
    return torch.linalg.qr(basis + by * noise).Q


dimensions = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda d: st.tuples(
        st.just(d[0]),
        st.just(d[1]),
        st.integers(1, d[0]),
        st.integers(1, d[1]),
        st.integers(1, d[0]),
        st.integers(1, d[1]),
    )
)
