"""Statistics against their dense sums, and the identities that make them add.

float32 sums of a few hundred products: 1e-5 relative.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import generator, orthonormal, relative_error, triangle

from distcurv.curvature.kinds import KINDS
from distcurv.curvature.spec import BlockSpec, SideSpec, Tensors
from distcurv.curvature.statistics import (
    encode_gradient,
    encode_rows,
    guard_finite,
    resolve_encoding,
    statistic_shapes,
)
from distcurv.errors import ShapeError


@given(d=st.integers(1, 300), share=st.floats(0.01, 1), tail=st.sampled_from(["none", "diagonal"]))
def test_auto_takes_the_smaller_encoding(d: int, share: float, tail: str) -> None:
    r = max(1, round(d * share))
    sizes: dict[str, int] = {}
    for encoding in ("dense", "sketch"):
        shapes = statistic_shapes(BlockSpec("b", "k", (SideSpec(d, r, tail, encoding),), 0.9))
        sizes[encoding] = sum(int(torch.Size(shape).numel()) for shape in shapes.values())
    chosen = resolve_encoding(d, r, tail, "auto")
    assert sizes[chosen] == min(sizes.values())


def test_explicit_encoding_stays_and_nonsense_is_refused() -> None:
    assert resolve_encoding(1000, 8, "none", "dense") == "dense"
    assert resolve_encoding(4, 4, "none", "sketch") == "sketch"
    with pytest.raises(ShapeError, match="half"):
        resolve_encoding(4, 4, "none", "half")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weight", [2.5, torch.tensor(2.5)])
def test_rows_against_the_dense_sums(dtype: torch.dtype, weight: float | torch.Tensor) -> None:
    rows = torch.randn(200, 12, generator=generator(0)).to(dtype)
    Q = orthonormal(12, 3, seed=2).float()
    X = rows.double()
    A = 2.5 * X.mT @ X
    sketch = encode_rows(SideSpec(12, 3, "diagonal"), rows, Q, weight=weight)
    assert sketch.keys() == {"Y", "diag", "trace"}
    assert sketch["Y"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(sketch["Y"], A @ Q.double()) < 1e-5
    assert relative_error(sketch["diag"], A.diagonal()) < 1e-5
    assert sketch["trace"].item() == pytest.approx(A.trace().item(), rel=1e-5)
    dense = encode_rows(SideSpec(12, 3, "diagonal", "dense"), rows, None, weight=weight)
    assert relative_error(dense["packed"], torch.tensor(triangle(A))) < 1e-5
    alone = encode_rows(SideSpec(12, 0, "diagonal", "diagonal"), rows, None, weight=weight)
    assert alone.keys() == {"diag"}
    assert torch.equal(alone["diag"], sketch["diag"])


def test_bf16_rows_under_autocast_are_summed_in_float32() -> None:
    rows = torch.randn(64, 8, generator=generator(0)).bfloat16()
    Q = orthonormal(8, 2, seed=1).float()
    side = SideSpec(8, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = encode_rows(side, rows, Q)
    outside = encode_rows(side, rows, Q)
    assert torch.equal(inside["Y"], outside["Y"])


SIDES = [
    SideSpec(10, 3, "isotropic"),
    SideSpec(10, 4, "diagonal"),
    SideSpec(10, 10, "none", "dense"),
    SideSpec(10, 0, "diagonal", "diagonal"),
]


@pytest.mark.parametrize("side", SIDES)
def test_statistics_add_over_micro_batches_and_ranks(side: SideSpec) -> None:
    rows = torch.randn(4, 30, 10, generator=generator(5), dtype=torch.float64)
    Q = orthonormal(10, max(1, side.rank), seed=6)
    whole = encode_rows(side, rows.reshape(120, 10), Q)
    parts = [encode_rows(side, part, Q) for part in rows]
    stacked = encode_rows(side, rows, Q.expand(4, 10, Q.shape[-1]))
    for name, tensor in whole.items():
        assert relative_error(torch.stack([p[name] for p in parts]).sum(0), tensor) < 1e-14
        assert relative_error(stacked[name].sum(0), tensor) < 1e-14


def gradient_spec(encoding_A: str = "sketch", encoding_G: str = "sketch") -> BlockSpec:
    sides = (SideSpec(7, 3, "isotropic", encoding_A), SideSpec(5, 2, "diagonal", encoding_G))
    return BlockSpec("layer", "lowrank", sides, decay=0.9)


def test_gradient_sides_are_both_gram_matrices() -> None:
    spec = gradient_spec("sketch", "dense")
    basis = KINDS["lowrank"].start(spec, seed=0)
    grad = torch.randn(5, 7, generator=generator(0))
    got = encode_gradient(spec, grad, basis)
    X = grad.double()
    assert relative_error(got["A.Y"], X.mT @ X @ basis["A.U"].double()) < 1e-6
    assert relative_error(got["G.packed"], torch.tensor(triangle(X @ X.mT))) < 1e-6
    assert got["A.trace"].item() == pytest.approx((X**2).sum().item(), rel=1e-6)
    assert [got[name].item() for name in ("A.count", "G.count", "steps")] == [1.0, 1.0, 1.0]
    assert list(got) == list(statistic_shapes(spec))


def test_gradient_products_are_reused() -> None:
    spec = gradient_spec()
    basis = KINDS["lowrank"].start(spec, seed=0)
    grad = torch.randn(2, 5, 7, generator=generator(1))
    stacked = {name: tensor.expand(2, *tensor.shape) for name, tensor in basis.items()}
    plain = encode_gradient(spec, grad, stacked)
    reused = encode_gradient(
        spec, grad, stacked, grad_Ua=grad @ basis["A.U"], Ug_grad=basis["G.U"].mT @ grad
    )
    marked = encode_gradient(spec, grad, stacked, grad_Ua=torch.zeros(2, 5, 3))
    for name, tensor in plain.items():
        assert relative_error(reused[name], tensor) < 1e-6
    assert marked["A.Y"].abs().max().item() == 0.0  # the given product is what is used


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_non_finite_gradient_contributes_nothing(bad: float) -> None:
    spec = gradient_spec("sketch", "dense")
    basis = KINDS["lowrank"].start(spec, seed=0)
    grad = torch.randn(3, 5, 7, generator=generator(2))
    grad[1, 2, 3] = bad  # 1e30 overflows in its square
    stacked = {name: tensor.expand(3, *tensor.shape) for name, tensor in basis.items()}
    got = encode_gradient(spec, grad, stacked)
    clean = encode_gradient(
        spec, grad[[0, 2]], {name: tensor[:2] for name, tensor in stacked.items()}
    )
    for name, tensor in got.items():
        assert tensor[1].abs().max().item() == 0.0, name
        assert relative_error(tensor[[0, 2]], clean[name]) < 1e-6
    assert got["steps"].tolist() == [1.0, 0.0, 1.0]


def test_guard_leaves_finite_statistics_alone_and_knows_its_names() -> None:
    statistic: Tensors = {"Y": torch.ones(4, 2), "trace": torch.ones(()), "count": torch.ones(())}
    assert all(torch.equal(guard_finite(statistic)[n], t) for n, t in statistic.items())
    statistic["trace"] = torch.tensor(float("nan"))
    assert all(t.abs().max().item() == 0.0 for t in guard_finite(statistic).values())
    with pytest.raises(ShapeError, match=r"A\.mean"):
        guard_finite({"A.mean": torch.ones(3)})


@pytest.mark.parametrize(
    ("kind", "encoding", "bad"),
    [
        ("unitwise", "unit", "F.ww"),
        ("unitwise", "unit", "F.wb"),
        ("unitwise", "unit", "F.bb"),
        ("diagonal", "diagonal", "F.diag"),
        ("diagonal", "diagonal", "F.count"),
    ],
)
def test_guard_sees_every_number_of_a_one_sided_statistic(
    kind: str, encoding: str, bad: str
) -> None:
    spec = BlockSpec("norm", kind, (SideSpec(4, 0, "diagonal", encoding),), 0.9)
    layout = KINDS[kind].statistic_layout(spec)
    for value in (float("nan"), float("inf"), float("-inf")):
        statistic = {name: t.clone() for name, t in layout.views(torch.ones(layout.size)).items()}
        assert all(torch.equal(guard_finite(statistic)[n], t) for n, t in statistic.items())
        statistic[bad].view(-1)[-1] = value
        assert not layout.pack(guard_finite(statistic)).any()
        batch = {n: torch.stack([t, torch.ones_like(t)]) for n, t in statistic.items()}
        guarded = layout.pack(guard_finite(batch))
        assert not guarded[0].any()
        assert torch.equal(guarded[1], torch.ones(layout.size))


def test_guard_sees_a_diagonal_that_has_no_trace() -> None:
    statistic = {"A.diag": torch.tensor([1.0, float("inf")]), "A.count": torch.ones(())}
    assert not guard_finite(statistic)["A.diag"].any()


def test_wrong_shapes_are_named() -> None:
    side = SideSpec(6, 2)
    with pytest.raises(ShapeError, match="dim is 6"):
        encode_rows(side, torch.zeros(3, 5), None)
    with pytest.raises(ShapeError, match="basis of shape None"):
        encode_rows(side, torch.zeros(3, 6), None)
    with pytest.raises(ShapeError, match="product of shape"):
        encode_rows(side, torch.zeros(3, 6), None, product_Nr=torch.zeros(2, 2))
    with pytest.raises(ShapeError, match="unit"):
        encode_rows(SideSpec(6, 0, "diagonal", "unit"), torch.zeros(3, 6), None)
    with pytest.raises(ShapeError, match="layer"):
        encode_gradient(gradient_spec(), torch.zeros(7, 5), {})
