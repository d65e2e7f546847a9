"""The rewriter: which memory is written, in which dtypes, alone and in groups.

Oracle: G⁻¹ ∇W A⁻¹ with the dense inverses in float64; float32 work against it 1e-5.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import generator, relative_error
from torch import Tensor

from distcurv.config import KfacConfig
from distcurv.curvature.apply import AffineGradient
from distcurv.curvature.kinds import KINDS
from distcurv.curvature.spec import BlockSpec, SideSpec
from distcurv.train import rewrite
from distcurv.train.rewrite import Rewriter
from distcurv.train.switch import Install

CPU = torch.device("cpu")
RANK = 3


def spec(name: str, O: int, I: int, kind: str = "lowrank") -> BlockSpec:  # noqa: E741
    if kind == "dense":
        sides = (SideSpec(I, I, "none", "dense"), SideSpec(O, O, "none", "dense"))
    else:
        sides = (SideSpec(I, RANK, "isotropic"), SideSpec(O, RANK, "diagonal"))
    return BlockSpec(name, kind, sides, 0.9, 0.1)


def install(block: int, own: BlockSpec, seed: int, version: int = 1) -> Install:
    """Version 0's tensors with eigenvalues and tails that are not zero."""
    published = KINDS[own.kind].start(own, seed)
    random = generator(seed)
    for name, tensor in published.items():
        if name.endswith(".lam"):
            tensor.copy_(2 + torch.rand(tensor.shape, generator=random).sort(descending=True)[0])
        elif name.endswith((".tail", ".trace")):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=random))
    flat = KINDS[own.kind].published_layout(own).pack(published)
    return Install(block, version, 0, 0, 0, "inline", flat, published)


def gradient(own: BlockSpec, bias: bool, seed: int, **kind: Any) -> AffineGradient:
    I, O = (side.dim for side in own.sides)  # noqa: E741
    matrix = torch.randn(O, I, generator=generator(seed)).to(**kind)
    if not bias:
        return AffineGradient(matrix, None)
    return AffineGradient(matrix[:, :-1].contiguous(), matrix[:, -1].contiguous())


def expected(own: BlockSpec, installed: Install, grad: AffineGradient, damping: float) -> Tensor:
    tensors = {name: tensor.double() for name, tensor in installed.tensors.items()}
    inverse_A, inverse_G = KINDS[own.kind].inverses(own, tensors, damping, False)
    return inverse_G.dense() @ grad.whole().double() @ inverse_A.dense()


def storage(grad: AffineGradient) -> list[int]:
    return [part.data_ptr() for part in grad if part is not None]


# Three blocks of one shape with and without bias, and one of another shape, in between.
SPECS = [spec("a", 6, 8), spec("b", 5, 7), spec("c", 6, 8), spec("d", 6, 8)]
BIASES = [True, True, False, True]
INSTALLED = [install(block, own, block) for block, own in enumerate(SPECS)]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("rule", [{}, {"graft": True}, {"kl_clip": 1e-2}])
def test_all_gradients_in_place(grouped: bool, rule: dict[str, Any]) -> None:
    lr = 0.5
    rewriter = Rewriter(SPECS, KfacConfig(**rule), CPU, grouped)
    for present in ([0, 1, 2, 3], [1, 3], [0, 2, 3], [0, 1, 2, 3]):
        grads = {b: gradient(SPECS[b], BIASES[b], 10 + b) for b in present}
        before = {b: grad.whole().double() for b, grad in grads.items()}
        wanted = {b: expected(SPECS[b], INSTALLED[b], grads[b], 0.1) for b in present}
        if "graft" in rule:
            wanted = {b: w * before[b].norm() / w.norm() for b, w in wanted.items()}
        if "kl_clip" in rule:
            total = sum((before[b] * w).sum().item() for b, w in wanted.items()) * lr**2
            assert total > 1e-2
            wanted = {b: w * (1e-2 / total) ** 0.5 for b, w in wanted.items()}
        places = {b: storage(grad) for b, grad in grads.items()}
        rewriter.rewrite(grads, INSTALLED, [0.1] * 4, lr)
        for b in present:
            assert relative_error(grads[b].whole(), wanted[b]) < 1e-5
            assert storage(grads[b]) == places[b]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float64, 1e-5)]
)
def test_other_dtypes_are_worked_on_in_float32(
    dtype: torch.dtype, tolerance: float, grouped: bool
) -> None:
    grads = {b: gradient(own, BIASES[b], b, dtype=dtype) for b, own in enumerate(SPECS)}
    wanted = {b: expected(SPECS[b], INSTALLED[b], grad, 0.1) for b, grad in grads.items()}
    Rewriter(SPECS, KfacConfig(), CPU, grouped).rewrite(grads, INSTALLED, [0.1] * 4, None)
    for b, grad in grads.items():
        assert grad.weight_OD.dtype == dtype
        assert relative_error(grad.whole(), wanted[b]) < tolerance


@pytest.mark.parametrize("grouped", [True, False])
def test_rows_that_are_not_contiguous(grouped: bool) -> None:
    grads = {}
    for b, own in enumerate(SPECS):
        grad = gradient(own, BIASES[b], b)
        grads[b] = AffineGradient(grad.weight_OD.T.contiguous().T, grad.bias_O)
    wanted = {b: expected(SPECS[b], INSTALLED[b], grad, 0.1) for b, grad in grads.items()}
    Rewriter(SPECS, KfacConfig(), CPU, grouped).rewrite(grads, INSTALLED, [0.1] * 4, None)
    for b, grad in grads.items():
        assert relative_error(grad.whole(), wanted[b]) < 1e-5


@pytest.mark.parametrize("grouped", [True, False])
def test_parts_of_one_bucket_are_written_where_they_are(grouped: bool) -> None:
    """As DistributedDataParallel's gradients: views of a flat buffer, at odd offsets."""
    numbers = [own.sides[0].dim * own.sides[1].dim for own in SPECS]
    bucket = torch.randn(1 + sum(numbers), generator=generator(0))
    grads, position = {}, 1
    for b, own in enumerate(SPECS):
        I, O = (side.dim for side in own.sides)  # noqa: E741
        weights = O * (I - BIASES[b])
        own_part = bucket[position : position + numbers[b]]
        bias = own_part[weights:] if BIASES[b] else None
        grads[b] = AffineGradient(own_part[:weights].view(O, -1), bias)
        position += numbers[b]
    wanted = [expected(SPECS[b], INSTALLED[b], grad, 0.1) for b, grad in grads.items()]
    first = bucket[0].clone()
    Rewriter(SPECS, KfacConfig(), CPU, grouped).rewrite(grads, INSTALLED, [0.1] * 4, None)
    assert bucket[0] == first
    position = 1
    for b, direction in enumerate(wanted):
        parts = [direction[:, :-1], direction[:, -1]] if BIASES[b] else [direction]
        flat = torch.cat([part.reshape(-1) for part in parts])
        assert relative_error(bucket[position : position + numbers[b]], flat) < 1e-5
        position += numbers[b]


@pytest.mark.parametrize("grouped", [True, False])
def test_what_is_kept_follows_installs_and_damping(grouped: bool) -> None:
    rewriter = Rewriter(SPECS, KfacConfig(), CPU, grouped)
    installed = list(INSTALLED)
    for change in range(4):
        damping = 0.1 if change < 2 else 0.7
        if change in (1, 3):
            block = change - 1
            installed[block] = install(block, SPECS[block], seed=50 + change, version=2)
        grads = {b: gradient(own, BIASES[b], b) for b, own in enumerate(SPECS)}
        wanted = {b: expected(SPECS[b], installed[b], grads[b], damping) for b in grads}
        rewriter.rewrite(grads, installed, [damping] * 4, None)
        for b, grad in grads.items():
            assert relative_error(grad.whole(), wanted[b]) < 1e-5


def test_inverses_are_made_once_for_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    inverses = KINDS["lowrank"].inverses

    def counted(*args: Any) -> Any:
        calls.append(args)
        return inverses(*args)

    monkeypatch.setattr(KINDS["lowrank"], "inverses", counted)
    rewriter = Rewriter(SPECS, KfacConfig(), CPU, grouped=False)
    for damping in (0.1, 0.1, 0.1, 0.2, 0.2):
        grads = {b: gradient(own, BIASES[b], b) for b, own in enumerate(SPECS)}
        rewriter.rewrite(grads, INSTALLED, [damping] * 4, None)
    assert len(calls) == 2 * len(SPECS)
    grouped = Rewriter(SPECS, KfacConfig(), CPU, grouped=True)
    grouped.rewrite(
        {b: gradient(own, BIASES[b], b) for b, own in enumerate(SPECS)}, INSTALLED, [0.1] * 4, None
    )
    assert len(calls) == 2 * len(SPECS) + 2  # a group of three, and one alone


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("graft", [True, False])
def test_the_dense_kind(graft: bool, grouped: bool) -> None:
    specs = [spec("a", 4, 5, "dense"), spec("b", 4, 5, "dense")]
    installed = []
    for b, own in enumerate(specs):
        made = install(b, own, b)
        for name in ("A.inverse", "G.inverse"):
            made.tensors[name].add_(0.1 * torch.rand(made.tensors[name].shape))
        installed.append(made)
    grads = {b: gradient(own, True, b) for b, own in enumerate(specs)}
    wanted = {b: expected(specs[b], installed[b], grad, 0.1) for b, grad in grads.items()}
    before = {b: grad.whole() for b, grad in grads.items()}
    config = KfacConfig(kind="dense", graft=graft)
    Rewriter(specs, config, CPU, grouped).rewrite(grads, installed, [0.1] * 2, None)
    for b, grad in grads.items():
        scale = before[b].norm() / wanted[b].norm() if graft else 1.0
        assert relative_error(grad.whole(), wanted[b] * scale) < 1e-5


def test_groups_are_small_blocks_of_one_shape_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [*SPECS, spec("large", 7, 8), spec("large too", 7, 8), spec("e", 6, 8)]

    def groups(grouped: bool) -> list[list[int]]:
        return rewrite._groups(specs, [False] * len(specs), grouped)

    assert groups(False) == [[0], [1], [2], [3], [4], [5], [6]]
    assert groups(True) == [[0, 2, 3, 6], [1], [4, 5]]
    monkeypatch.setattr(rewrite, "MOST_NUMBERS_IN_BLOCK", 6 * 8)
    assert groups(True) == [[0, 2, 3, 6], [1], [4], [5]]
    monkeypatch.setattr(rewrite, "MOST_NUMBERS_IN_GROUP", 3 * 6 * 8)
    assert groups(True) == [[0, 2, 3], [1], [4], [5], [6]]


def test_nothing_to_rewrite() -> None:
    for rule in ({}, {"graft": True}, {"kl_clip": 0.1}):
        Rewriter(SPECS, KfacConfig(**rule), CPU).rewrite({}, INSTALLED, [0.1] * 4, 1.0)  # type: ignore[arg-type]
