"""Every maker on the off-the-shelf models that capture is tested with."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
import torch
from every_maker import ROWS
from models.model_zoo import MAKERS, make
from torch import Tensor, nn

from distcurv.makers import KronBfgsGradientMaker, SengGradientMaker

FEW = 500  # numbers, for those that have a matrix of them all
DENSE = ("full", "layer_wise", "emp", "psgd", "newton", "natural, by module")
LAYERS = (KronBfgsGradientMaker, SengGradientMaker)  # of some types; the rest is left alone


def train_few(model: nn.Module) -> None:
    """Freeze all but what is small, from the end on."""
    left = FEW
    for parameter in reversed([*model.parameters()]):
        fits = parameter.numel() <= left
        parameter.requires_grad_(fits)
        left -= parameter.numel() if fits else 0


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def refused_by_vmap(model_name: str, model: nn.Module) -> bool:
    """A sample alone has no batch statistics; BERT's library looks at the values of its mask."""
    return model_name == "bert" or any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("model_name", MAKERS)
@pytest.mark.parametrize("name", [name for name in ROWS if name != "natural"])
def test_a_step_on(name: str, model_name: str) -> None:
    row = ROWS[name]
    model, batch = make(model_name)
    if name == "natural, by module":
        row = replace(row, options={"fisher_type": "fisher_emp"})
    if name in DENSE:
        train_few(model)
    if name == "smw" and refused_by_vmap(model_name, model):
        return
    # An embedding of positions has no samples, of which one matrix for everything needs the same.
    ignored = ["relative_attention_bias"] if name in DENSE else []
    torch.manual_seed(1)  # dropout
    model(**batch)["loss"].backward()
    raw = gradients(model)
    with closing(row.make(model, ignore_modules=ignored)) as gm:
        for _ in range(2 if name == "soap" else 1):  # its first gradient only makes its basis
            model.zero_grad()
            torch.manual_seed(1)
            gm.setup_loss_repr(gm.setup_model_call(model, **batch)["loss"])
            gm.forward_and_backward()
    found = gradients(model)
    assert found.keys() == raw.keys()
    most = max(grad.norm() for grad in raw.values())
    changed = 0
    for key, grad in raw.items():
        assert torch.isfinite(found[key]).all(), key
        differs = (found[key] - grad).norm() > 1e-3 * grad.norm()
        changed += int(differs)
        left = row.maker in LAYERS or any(part in key for part in ignored)
        assert differs or left or grad.norm() < 1e-6 * most, key
    assert changed > 0
