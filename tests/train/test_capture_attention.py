"""The projections of nn.MultiheadAttention against four Linear modules that do the same.

What capture sees of Linear modules is held against per-sample gradients in `test_capture.py`.
Tolerance: 1e-5 of the largest number of each tensor; float32 sums of float64 products."""

from __future__ import annotations

import pytest
import torch
from capture_harness import assert_same_totals
from torch import Tensor, nn

from distcurv.curvature.spec import BlockSpec, SideSpec, Tensors
from distcurv.train.capture import Capture
from distcurv.train.captured_block import Watched
from distcurv.train.discover import find_layer_blocks

PARTS = ["q_proj", "k_proj", "v_proj", "out_proj"]


class Explicit(nn.Module):
    """The same attention out of Linear modules, samples first."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        size, bias = attention.embed_dim, attention.in_proj_bias
        packed = attention.in_proj_weight
        weights = (
            packed.chunk(3)
            if packed is not None
            else (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        )
        for i, (name, weight) in enumerate(zip(PARTS, weights, strict=False)):
            linear = nn.Linear(weight.shape[1], size, bias=bias is not None).double()
            linear.weight.data.copy_(weight)
            if bias is not None:
                linear.bias.data.copy_(bias[i * size : (i + 1) * size])
            self.add_module(name, linear)
        out = attention.out_proj
        self.out_proj = nn.Linear(size, size, bias=out.bias is not None).double()
        self.out_proj.load_state_dict(out.state_dict())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.q_proj(q)), split(self.k_proj(k)), split(self.v_proj(v))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))


def totals(model: nn.Module, *args: Tensor) -> dict[str, Tensors]:
    """What capture delivers of every two-sided block for one backward, dense."""
    found, uncovered = find_layer_blocks(model)
    assert not uncovered
    blocks = {}
    for layer in found:
        if layer.layer.one_sided is None:
            dims = layer.layer.dims(layer.module, layer.layer.trains_bias(layer.module))
            sides = tuple(SideSpec(dim, dim, "none", "dense") for dim in dims)
            spec = BlockSpec(layer.name, "dense", sides, 0.9)
            blocks[layer.name] = Watched(layer.module, layer.layer, spec, layer.source == "calls")
    delivered: dict[str, Tensors] = {}
    capture = Capture(blocks)
    with capture.armed({name: {} for name in blocks}, delivered.__setitem__):
        output = model(*args)
        output = output[0] if isinstance(output, tuple) else output
        (output.square().sum() / len(blocks)).backward()
    return delivered


CASES = {
    "self": {},
    "self-without-bias": {"bias": False},
    "self-with-weights": {"need_weights": True},
    "cross-same-keys": {"inputs": "cross"},
    "cross": {"inputs": "three"},
    "other-widths": {"inputs": "three", "kdim": 5, "vdim": 3},
    "other-widths-without-bias": {"inputs": "three", "kdim": 5, "vdim": 3, "bias": False},
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_projections_are_those_of_linear_layers(case: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    settings = dict(CASES[case])
    need_weights = settings.pop("need_weights", False)
    inputs = settings.pop("inputs", "self")
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **settings).double()  # type: ignore[arg-type]
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    q = torch.randn(3, 5, 8, dtype=torch.float64)
    k = torch.randn(3, 4, attention.kdim, dtype=torch.float64)
    v = torch.randn(3, 4, attention.vdim, dtype=torch.float64)
    given = {"self": (q, q, q), "cross": (q, k, k), "three": (q, k, v)}[inputs]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, *tensors: Tensor) -> Tensor:
            moved = {id(x): x if batch_first else x.transpose(0, 1).contiguous() for x in tensors}
            out, _ = self.attention(*(moved[id(x)] for x in tensors), need_weights=need_weights)
            return out

    explicit = Explicit(attention)
    expected = totals(explicit, *given)
    actual = totals(Model(), *given)
    assert set(actual) == {f"attention.{name}" for name in PARTS}
    assert_same_totals(
        {name.removeprefix("attention."): value for name, value in actual.items()}, expected, 1e-5
    )


def test_attention_without_a_batch_is_one_sample() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    actual = totals(attention, x, x, x)
    batched = totals(attention, *[x.unsqueeze(1)] * 3)
    assert_same_totals(actual, batched, 1e-5)
    assert all(value["G.count"] == 1 for value in actual.values())


def test_masks_biases_of_keys_and_torchs_own_layer() -> None:
    """Masks change gradients, never what is watched; bias_k and bias_v are parameters of their
    own; nn.Transformer calls its attentions with keywords."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True).double()
    found, uncovered = find_layer_blocks(attention)
    assert not uncovered
    assert {layer.name: layer.source for layer in found} == {
        "q_proj": "calls",
        "k_proj": "calls",
        "v_proj": "calls",
        "bias_k": "gradient",
        "bias_v": "gradient",
        "out_proj": "calls",
    }
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True, dropout=0.0).double()
    found, uncovered = find_layer_blocks(model)
    covered = sum(model.get_submodule(layer.name.rpartition(".")[0]) is not None for layer in found)
    assert covered == len(found) and not uncovered
    source, target = torch.randn(3, 4, 8).double(), torch.randn(3, 5, 8).double()
    delivered = totals(model, source, target)
    two_sided = {layer.name for layer in found if layer.layer.one_sided is None}
    assert set(delivered) == two_sided
    assert all(value["G.count"] == 3 for value in delivered.values())


def test_fast_path_and_eval_mode_change_nothing() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    expected = totals(attention, x, x, x)
    assert_same_totals(totals(attention.eval(), x, x, x), expected, 1e-12)
