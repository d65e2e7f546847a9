"""Ways in which libraries call modules and hold parameters: by keyword, with tuples returned, one
parameter under two names, one block used inside and outside of a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_zoo import make, without_torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distcurv import KfacConfig, Preconditioner
from distcurv.errors import CaptureError
from distcurv.layers import LAYERS
from distcurv.train.discover import FoundLayer, find_layer_blocks

CONFIG = KfacConfig(rank=3, damping=0.1, early_steps=100)


def rewritten(model: nn.Module, loss: Any) -> list[Tensor]:
    """The gradients after one step of the preconditioner."""
    with Preconditioner(model, CONFIG, workers="inline") as precond:
        loss().backward()
        assert precond._source.capture.arming is not None
        precond.step()
        assert len(precond.install_log) == len(precond.block_names)
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return grads


def blocks(model: nn.Module) -> dict[str, FoundLayer]:
    return {found.name: found for found in find_layer_blocks(model)[0]}


def times_held(model: nn.Module) -> dict[str, int]:
    """In how many blocks each parameter is."""
    held = {name: 0 for name, _ in model.named_parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    for found in find_layer_blocks(model)[0]:
        for own in found.layer.parameter_names(found.module):
            held[names[id(found.module.get_parameter(own))]] += 1
    return held


def test_a_module_called_by_keyword_is_captured_as_one_called_by_position() -> None:
    with without_torchvision():
        from transformers.models.llama.modeling_llama import LlamaRMSNorm
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 4), LlamaRMSNorm(4)])
    linear, norm = model
    x = torch.randn(6, 4)

    def by_position() -> Tensor:
        return norm(linear(x)).sin().mean()

    def by_keyword() -> Tensor:
        return norm(hidden_states=linear(input=x)).sin().mean()

    for one, other in zip(rewritten(model, by_position), rewritten(model, by_keyword), strict=True):
        assert torch.equal(one, other)


class Pair(nn.Linear):
    """Takes other things before its input and returns others beside its output."""

    def forward(self, gain: float, features: Tensor) -> Any:  # type: ignore[override]
        return gain * super().forward(features), None


class Record(nn.Linear):
    def forward(self, features: Tensor) -> Any:  # type: ignore[override]
        return {"cache": None, "hidden": super().forward(features)}


class Mute(nn.Linear):
    def forward(self, features: list[Tensor]) -> Any:  # type: ignore[override]
        return [super(Mute, self).forward(one) for one in features]


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (Pair, lambda layer, x: layer(1.0, x)[0]),
        (Pair, lambda layer, x: layer(gain=1.0, features=x)[0]),
        (Record, lambda layer, x: layer(x)["hidden"]),
    ],
)
def test_the_first_tensor_is_the_input_and_the_output(
    kind: type[nn.Linear], call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LAYERS, kind, LAYERS[nn.Linear])
    torch.manual_seed(0)
    plain, layer, x = nn.Linear(4, 3), kind(4, 3), torch.randn(6, 4)
    layer.load_state_dict(plain.state_dict())
    # First bases follow from the names of blocks.
    expected = rewritten(nn.ModuleDict({"layer": plain}), lambda: plain(x).sin().mean())
    actual = rewritten(nn.ModuleDict({"layer": layer}), lambda: call(layer, x).sin().mean())
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one, other)


def test_a_module_without_a_tensor_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(LAYERS, Mute, LAYERS[nn.Linear])
    model = nn.ModuleDict({"odd": Mute(4, 3)})
    with (
        Preconditioner(model, CONFIG, workers="inline"),
        pytest.raises(CaptureError, match=r"block 'odd': its Mute was called with no tensor"),
    ):
        model["odd"]([torch.randn(6, 4)])


def test_a_bias_of_an_untied_head_that_two_modules_hold_is_in_one_block() -> None:
    model = make("bert").model
    decoder = model.get_submodule("cls.predictions.decoder")
    decoder.weight = nn.Parameter(decoder.weight.detach().clone())  # type: ignore[arg-type]
    assert decoder.bias is model.get_parameter("cls.predictions.bias")
    assert set(times_held(model).values()) == {1}
    assert blocks(model)["cls.predictions.bias"].source == "gradient"
    assert blocks(model)["cls.predictions.decoder"].tied == ()


def test_convolutions_that_share_a_weight_keep_their_own_biases() -> None:
    model = nn.Sequential(nn.Conv1d(2, 2, 3), nn.Conv1d(2, 2, 3))
    model[1].weight = model[0].weight
    found = blocks(model)
    assert set(found) == {"0", "0.bias", "1.bias"}
    assert found["0"].tied == (model[1],)
    assert set(times_held(model).values()) == {1}


class Halves(nn.Module):
    """One Linear, used before and amid what is checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)

    def forward(self, x: Tensor, use_reentrant: bool | None) -> Tensor:
        hidden = self.shared(x).tanh()
        for _ in range(2):
            if use_reentrant is None:
                hidden = self.shared(hidden).tanh()
            else:
                hidden = checkpoint(
                    lambda h: self.shared(h).tanh(), hidden, use_reentrant=use_reentrant
                )
        return F.mse_loss(hidden, torch.ones_like(hidden))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_block_used_in_and_out_of_checkpoints_counts_its_samples_once(
    use_reentrant: bool,
) -> None:
    """Tolerance: float32 sums in another order."""
    torch.manual_seed(0)
    model, x = Halves(), torch.randn(6, 4)
    expected = rewritten(model, lambda: model(x, None))
    actual = rewritten(model, lambda: model(x, use_reentrant))
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
