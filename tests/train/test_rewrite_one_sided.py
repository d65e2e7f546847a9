"""The rewriter with blocks that have one side, or a diagonal one, among the others.

Oracle: the dense inverses in float64; float32 work against it 1e-5.
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


def one_sided(name: str, kind: str, units: int) -> BlockSpec:
    encoding = "unit" if kind == "unitwise" else "diagonal"
    return BlockSpec(name, kind, (SideSpec(units, 0, "diagonal", encoding),), 0.9)


def two_sided(name: str, side_A: SideSpec, side_G: SideSpec) -> BlockSpec:
    return BlockSpec(name, "lowrank", (side_A, side_G), 0.9)


LINEAR = (SideSpec(8, 3), SideSpec(6, 3, "diagonal"))
EMBEDDING = (SideSpec(11, 0, "diagonal", "diagonal"), SideSpec(6, 3, "diagonal"))
SPECS = [
    one_sided("norm1", "unitwise", 6),
    two_sided("linear", *LINEAR),
    one_sided("norm2", "unitwise", 6),
    one_sided("scale", "diagonal", 6),
    two_sided("embedding", *EMBEDDING),
    one_sided("norm without bias", "unitwise", 4),
]
BIASES = [True, True, True, False, False, False]
RULES: list[dict[str, Any]] = [{}, {"graft": True}, {"kl_clip": 1e-2}]


def install(block: int, spec: BlockSpec) -> Install:
    """Version 0's tensors filled with numbers that belong to a factor."""
    random = generator(block)
    published = KINDS[spec.kind].start(spec, block)
    for name, tensor in published.items():
        own = name.rpartition(".")[2]
        if own in ("lam", "tail", "trace", "diag", "ww", "bb"):
            tensor.copy_((1 + torch.rand(tensor.shape, generator=random)).sort(descending=True)[0])
        elif own == "wb":
            tensor.copy_(torch.rand(tensor.shape, generator=random) - 0.5)
        elif own == "weight":
            tensor.fill_(0.5)
    if not BIASES[block] and spec.kind == "unitwise":
        published["F.wb"].zero_()
        published["F.bb"].zero_()
    flat = KINDS[spec.kind].published_layout(spec).pack(published)
    return Install(block, 1, 0, 0, 0, "inline", flat, published)


def gradient(block: int) -> AffineGradient:
    dims = [side.dim for side in SPECS[block].sides]
    columns = dims[0] if len(dims) == 2 else 1 + BIASES[block]
    matrix = torch.randn(dims[-1], columns, generator=generator(100 + block))
    if not BIASES[block]:
        return AffineGradient(matrix, None)
    return AffineGradient(matrix[:, :-1].contiguous(), matrix[:, -1].contiguous())


def expected(block: int, installed: Install, damping: float) -> Tensor:
    tensors = {name: tensor.double() for name, tensor in installed.tensors.items()}
    grad = gradient(block).whole().double()
    if SPECS[block].kind == "unitwise":
        ww, wb, bb = (tensors[f"F.{entry}"] for entry in ("ww", "wb", "bb"))
        matrix = torch.stack([ww, wb, wb, bb], -1).view(-1, 2, 2) + damping * torch.eye(2)
        columns = grad.shape[1]
        return torch.linalg.solve(matrix[:, :columns, :columns], grad.unsqueeze(-1)).squeeze(-1)
    if SPECS[block].kind == "diagonal":
        return grad / (tensors["F.diag"] + damping).unsqueeze(-1)
    inverse_A, inverse_G = KINDS["lowrank"].inverses(SPECS[block], tensors, damping, False)
    return inverse_G.dense() @ grad @ inverse_A.dense()


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_all_blocks_of_a_model(rule: dict[str, Any], grouped: bool) -> None:
    lr, damping = 0.5, 0.3
    installed = [install(block, spec) for block, spec in enumerate(SPECS)]
    grads = {block: gradient(block) for block in range(len(SPECS))}
    before = {block: grad.whole().double() for block, grad in grads.items()}
    wanted = {block: expected(block, installed[block], damping) for block in grads}
    if "graft" in rule:
        wanted = {b: w * before[b].norm() / w.norm() for b, w in wanted.items()}
    if "kl_clip" in rule:
        total = sum((before[b] * w).sum().item() for b, w in wanted.items()) * lr**2
        assert total > 1e-2
        wanted = {b: w * (1e-2 / total) ** 0.5 for b, w in wanted.items()}
    rewriter = Rewriter(SPECS, KfacConfig(**rule), torch.device("cpu"), grouped)
    rewriter.rewrite(grads, installed, [damping] * len(SPECS), lr)
    for block, grad in grads.items():
        assert relative_error(grad.whole(), wanted[block]) < 1e-5, SPECS[block].name


def test_one_sided_blocks_are_grouped_by_shape_like_others() -> None:
    grafts = [False] * len(SPECS)
    assert rewrite._groups(SPECS, grafts, True) == [[0, 2], [1], [3], [4], [5]]
