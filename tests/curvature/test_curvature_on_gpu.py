"""The refresh on a GPU, batched and with TF32 switched on, against the CPU's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kind_cases import SPECS, batched, describe, rows_of, statistic_of
from oracles import orthogonality_error, relative_error

from distcurv.curvature.kinds import KINDS
from distcurv.curvature.spec import BlockSpec, Tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def on_gpu(tensors: Tensors) -> Tensors:
    return {name: tensor.cuda() for name, tensor in tensors.items()}


@pytest.mark.parametrize("spec", SPECS, ids=describe)
def test_batched_refresh_equals_the_cpu(spec: BlockSpec) -> None:
    kind = KINDS[spec.kind]
    singles = [batched(kind.start(spec, seed=i)) for i in range(3)]
    published = {name: torch.cat([s[name] for s in singles]) for name in singles[0]}
    state = kind.seed(spec, published)
    for step in range(3):
        # Statistics are taken on the GPU: TF32 must not have reached them either.
        rows = [rows_of(10 * step + i) for i in range(3)]
        parts = [
            statistic_of(spec, on_gpu(rows[i]), on_gpu(singles[i]), steps=i + 1) for i in range(3)
        ]
        statistic = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
        gpu = kind.refresh(spec, on_gpu(state), on_gpu(statistic), on_gpu(published))
        cpu = kind.refresh(spec, state, statistic, published)
        pairs = zip(
            kind.inverses(spec, gpu.published, 0.1, spec.relative_damping),
            kind.inverses(spec, cpu.published, 0.1, spec.relative_damping),
            strict=True,
        )
        for on_device, reference in pairs:
            assert on_device.dense().is_cuda
            assert relative_error(on_device.dense().cpu(), reference.dense()) < 1e-4
        for name in (n for n in gpu.published if n.endswith(".U")):
            for i in range(3):
                assert orthogonality_error(gpu.published[name][i].cpu()) < 2e-6
        state, published = cpu.state, cpu.published
        singles = [
            {name: tensor[i : i + 1] for name, tensor in published.items()} for i in range(3)
        ]
