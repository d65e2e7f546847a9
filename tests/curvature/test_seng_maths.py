"""Sketches of samples' gradients: exact where nothing is dropped, right on average elsewhere."""

from __future__ import annotations

import pytest
import torch
from oracles import best_rank, generator
from torch import Tensor

from distcurv.curvature import seng
from distcurv.curvature.seng import (
    Draw,
    Samples,
    combination,
    draw,
    kernel,
    products,
    sketched_gradient,
    sketched_samples,
    truncated,
)

N, S, Di, Do = 4, 6, 5, 3  # inputs without the bias coordinate


def samples(seed: int = 0) -> Samples:
    random = generator(seed)
    a = torch.randn(N, S, Di + 1, generator=random, dtype=torch.float64)
    a[..., -1] = 1
    return Samples(a, torch.randn(N, S, Do, generator=random, dtype=torch.float64))


def dense(of: Samples) -> Tensor:
    """[N, Do, I]"""
    return torch.stack(
        [
            sum((torch.outer(g, a) for g, a in zip(g_SO, a_SI, strict=True)), torch.zeros(()))
            for a_SI, g_SO in zip(*of, strict=True)
        ]
    )


def test_products_and_combinations_are_those_of_the_matrices() -> None:
    of = samples()
    M = dense(of)
    grad = torch.randn(Do, Di + 1, generator=generator(1), dtype=torch.float64)
    c = torch.randn(N, generator=generator(2), dtype=torch.float64)
    torch.testing.assert_close(kernel(of), M.flatten(1) @ M.flatten(1).mT)
    torch.testing.assert_close(products(of, grad), (M * grad).sum((1, 2)))
    torch.testing.assert_close(combination(of, c), torch.einsum("n,noi->oi", c, M))


@pytest.mark.parametrize("most", [1, N * S * S, 3 * N * S * S])
def test_the_kernel_is_the_same_made_in_strips(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    of = samples()
    M = dense(of).flatten(1)
    monkeypatch.setattr(seng, "_MOST_PRODUCTS", most)
    torch.testing.assert_close(kernel(of), M @ M.mT)
    none = Samples(of.a_NSI[:0], of.g_NSO[:0])
    assert kernel(none).shape == (0, 0)


def test_truncation_keeps_what_the_rank_holds() -> None:
    of = samples()
    exact = truncated(of, 3)
    assert exact.g_NSO.shape == (N, 3, Do)  # of six positions: rank is at most Do = 3
    torch.testing.assert_close(dense(exact), dense(of))
    assert truncated(of, S) is of


def test_truncation_of_what_is_not_finite_is_not_finite() -> None:
    of = samples()
    of.g_NSO[1, 2, 0] = torch.nan
    assert truncated(of, 3).g_NSO.isnan().any()


def test_truncation_is_the_best_approximation_of_the_output_gradients() -> None:
    of = samples()
    low = truncated(of, 2)
    for n in range(N):
        U, sizes, Vh = torch.linalg.svd(of.g_NSO[n], full_matrices=False)
        near = (U[:, :2] * sizes[:2]) @ Vh[:2]
        torch.testing.assert_close(dense(low)[n], near.mT @ of.a_NSI[n])
        gram = near.mT @ near
        torch.testing.assert_close(gram, best_rank(of.g_NSO[n].mT @ of.g_NSO[n], 2))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_sketch_by_hand(size: int) -> None:
    of = samples()
    chosen = draw(size, Di, Do, generator(3))
    rows = range(Di) if chosen.inputs is None else chosen.inputs.tolist()
    columns = range(Do) if chosen.outputs is None else chosen.outputs.tolist()
    assert len(set(rows)) == min(size, Di)
    assert len(set(columns)) == min(size, Do)
    S_in = torch.zeros(len(rows) + 1, Di + 1, dtype=torch.float64)
    for i, row in enumerate(rows):
        S_in[i, row] = (Di / len(rows)) ** 0.5
    S_in[-1, Di] = 1
    S_out = torch.zeros(len(columns), Do, dtype=torch.float64)
    for i, column in enumerate(columns):
        S_out[i, column] = (Do / len(columns)) ** 0.5
    grad = torch.randn(Do, Di + 1, generator=generator(1), dtype=torch.float64)
    got = sketched_samples(of, chosen, Di)
    torch.testing.assert_close(dense(got), S_out @ dense(of) @ S_in.mT)
    torch.testing.assert_close(sketched_gradient(grad, chosen, Di), S_out @ grad @ S_in.mT)


def test_sketched_products_are_right_on_average() -> None:
    """Over all pairs of single coordinates the mean is exact."""
    of = samples()
    grad = torch.randn(Do, Di + 1, generator=generator(1), dtype=torch.float64)
    kernels, found = [], []
    for i in range(Di):
        for j in range(Do):
            chosen = Draw(torch.tensor([i]), torch.tensor([j]))
            part = sketched_samples(of, chosen, Di)
            kernels.append(kernel(part))
            found.append(products(part, sketched_gradient(grad, chosen, Di)))
    torch.testing.assert_close(torch.stack(kernels).mean(0), kernel(of))
    torch.testing.assert_close(torch.stack(found).mean(0), products(of, grad))


def test_nothing_is_drawn_where_all_fit() -> None:
    assert draw(5, 5, 3, generator(0)) == Draw(None, None)
    chosen = draw(4, 5, 3, generator(0))
    assert chosen.inputs is not None
    assert chosen.outputs is None
