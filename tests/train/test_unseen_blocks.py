"""Blocks that capture never sees are named once, and their gradients stay as they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from distcurv import KfacConfig, Preconditioner


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen, self.mapped, self.unused = (nn.Linear(3, 2) for _ in range(3))
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        params = dict(self.mapped.named_parameters())
        mapped: Tensor = vmap(lambda row: functional_call(self.mapped, params, (row,)))(x)
        return self.seen(x) + mapped * self.gain


def test_blocks_that_are_never_seen_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Model()
    config = KfacConfig(damping=1e-3, rank=2, curvature_upd_interval=1, early_steps=4)
    with Preconditioner(model, config, "inline") as precond:
        for step in range(25):
            model.zero_grad()
            model(torch.randn(6, 3)).square().mean().backward()
            before = model.mapped.weight.grad.clone()  # type: ignore[union-attr]
            precond.step()
            if step < 9:
                assert "no statistics" not in caplog.text
        assert torch.allclose(model.mapped.weight.grad, before, rtol=1e-5)  # type: ignore[arg-type]
    (text,) = [r.getMessage() for r in caplog.records if "no statistics" in r.getMessage()]
    assert "no statistics of mapped, unused in 10 steps" in text
