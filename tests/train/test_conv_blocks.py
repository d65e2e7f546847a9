"""Convolutions of every kind and Hugging Face's Conv1D, from the model to the rewritten gradient.

Their statistics are held to oracles in tests/layers; here they meet capture and apply.
"""

from __future__ import annotations

import copy

import pytest
import torch
from capture_harness import ConvNet, Harness, batch, cross_entropy
from test_capture_curvlinops import compare, witness
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from distcurv.config import KfacConfig
from distcurv.train.discover import find_layer_blocks
from distcurv.train.preconditioner import Preconditioner


class DilatedNet(ConvNet):
    """`ConvNet` with holes in its kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=2, dilation=2)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_factors_of_a_dilated_convolution_are_those_of_curvlinops(weight_sharing: str) -> None:
    """(Its groups are another approximation: it averages the groups' inputs before the product.)"""
    torch.manual_seed(5)
    model = DilatedNet().double()
    inputs, targets = batch(model, 6)
    harness = Harness(model, weight_sharing=weight_sharing)
    with harness.capture.armed(harness.bases, harness.sink):
        cross_entropy("mean")(model(inputs), targets).backward()
    expected = witness(
        model,
        inputs,
        targets,
        reduction="mean",
        weight_sharing=weight_sharing,
        fisher_type="empirical",
    )
    compare(harness, expected)


class Images(nn.Module):
    """One of each convolution: [N, 2, 8] to logits [N, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv1d(2, 4, 3, padding="same", groups=2, padding_mode="circular")
        self.up = nn.ConvTranspose1d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4)
        self.up2 = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.volume = nn.Conv3d(2, 2, 3, stride=2, padding=1)
        self.up3 = nn.ConvTranspose3d(2, 2, 2)
        self.mixed = Conv1D(4, 2 * 3 * 5 * 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.grouped(x).tanh()).tanh()  # [N, 4, 16]
        x = self.depthwise(x.unflatten(2, (4, 4))).tanh()
        x = self.up2(x).tanh()  # [N, 2, 8, 8]
        x = self.volume(x.unflatten(2, (4, 2)).transpose(3, 4)[..., :8, :]).tanh()
        x = F.interpolate(self.up3(x), size=(3, 5, 5)).tanh()
        return self.mixed(x.flatten(1))


@pytest.mark.parametrize("max_rows", [8, None])
@pytest.mark.parametrize("kind", ["lowrank", "dense"])
def test_every_convolution_is_found_and_preconditioned(kind: str, max_rows: int | None) -> None:
    torch.manual_seed(0)
    model = Images()
    x, targets = torch.randn(16, 2, 8), torch.randint(4, (16,))
    at_once = {"preconditioner_upd_interval": 1, "curvature_upd_interval": 1, "early_steps": 1000}
    config = KfacConfig(rank=4, damping=0.1, kind=kind, max_rows=max_rows, **at_once)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    losses = []
    with Preconditioner(model, config, workers="inline") as precond:
        assert precond.block_names == [name for name, _ in model.named_children()]
        for _ in range(6):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), targets)
            loss.backward()
            raw = {name: _gradients(module) for name, module in model.named_children()}
            precond.step()
            for name, module in model.named_children():
                mine = _gradients(module)
                assert mine.isfinite().all(), name
                assert not torch.allclose(mine, raw[name]), name
                assert mine @ raw[name] > 0, name  # a positive definite matrix times the gradient
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


def _gradients(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def test_a_transposed_linear_is_preconditioned_like_a_linear() -> None:
    torch.manual_seed(0)
    turned = nn.Sequential(Conv1D(6, 5), nn.Tanh(), Conv1D(3, 6)).double()
    linear = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    for mine, theirs in zip(turned[::2], linear[::2], strict=True):
        assert isinstance(theirs, nn.Linear) and theirs.bias is not None
        with torch.no_grad():
            theirs.weight.copy_(mine.weight.T)
            theirs.bias.copy_(mine.bias)
    x, targets = torch.randn(7, 4, 5, dtype=torch.float64), torch.randn(7, 4, 3).double()
    config = KfacConfig(preconditioner_upd_interval=1, curvature_upd_interval=1, rank=3)
    for model in (turned, linear):
        with Preconditioner(model, config, workers="inline") as precond:
            for _ in range(3):
                model.zero_grad()
                F.mse_loss(model(x), targets).backward()
                precond.step()
    for mine, theirs in zip(turned[::2], linear[::2], strict=True):
        assert isinstance(theirs, nn.Linear)
        assert mine.weight.grad is not None and theirs.weight.grad is not None
        error = (mine.weight.grad.T - theirs.weight.grad).abs().max()
        assert error <= 1e-4 * theirs.weight.grad.abs().max()  # factors are float32


def test_lazy_modules_are_left_out_with_the_reason_until_they_have_run() -> None:
    model = nn.Sequential(nn.LazyConv1d(3, 2), nn.LazyConvTranspose1d(2, 2), nn.Flatten())
    found, uncovered = find_layer_blocks(model)
    assert not found
    assert {entry.name for entry in uncovered} >= {"0.weight", "1.weight"}
    assert all("lazy" in entry.reason for entry in uncovered)
    model(torch.randn(2, 3, 8))
    assert [block.name for block in find_layer_blocks(model)[0]] == ["0", "1"]


def test_a_transposed_linear_with_a_tied_weight_keeps_its_layout() -> None:
    first = Conv1D(4, 4)
    second = copy.deepcopy(first)
    second.weight = first.weight
    found, _ = find_layer_blocks(nn.Sequential(first, nn.Tanh(), second))
    weights = [block for block in found if block.layer.weight == "weight"]
    assert [block.name for block in weights] == ["0"]
    assert not weights[0].layer.weight_is_matrix
