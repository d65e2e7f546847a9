"""Every registered layer, captured in a model: Fisher type × reduction × dtype against autograd.

The loss is a mean or a sum of squares over the outputs of the layer's own model.  The oracle takes
one sample at a time, in float64: the gradient of the summed loss in the layer's output for the
data's targets (``empirical``), or for each logit its unit vector times the root of the Hessian
(``exact``; ``mc`` with scripted draws whose average is that very Hessian).  What a layer makes of
such a gradient are the oracles of its family, `layer_cases` and `joint_cases`; an entry without a
case fails.

Tolerances, of the largest number of each statistic: 1e-5 where the model runs in float64 (what is
delivered is float32), 2e-4 in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from joint_cases import JOINT_CASES, REFUSED_TYPES, JointCase, expected_statistic
from layer_cases import CASES, LayerCase, input_factor, input_rows, output_factor, output_rows
from torch import Tensor, nn

from distcurv.curvature.spec import BlockSpec, SideSpec, Tensors
from distcurv.curvature.triangle import unpack_triangle
from distcurv.layers import LAYERS, LAYERS_BY_NAME, find_layer
from distcurv.layers.registration import type_name
from distcurv.train.capture import Capture
from distcurv.train.likelihoods import Gaussian

VOCABULARY, WIDTH = 5, 3
TOLERANCES = {torch.float64: 1e-5, torch.float32: 2e-4}
# Norms of libraries: tests/models/test_models_norms.py goes through all of them.
BY_NAME_ELSEWHERE = {name for name, layer in LAYERS_BY_NAME.items() if layer.one_sided is not None}


Case = LayerCase | JointCase | None
ENTRIES: dict[type[nn.Module], Case] = {
    **{kind: cases[-1] for kind, cases in CASES.items()},
    **{kind: cases[0] for kind, cases in JOINT_CASES.items()},
    nn.Embedding: None,
}


def test_every_entry_of_the_registry_is_here() -> None:
    assert set(LAYERS) - REFUSED_TYPES <= set(ENTRIES)
    known = {type_name(kind) for kind in ENTRIES} | BY_NAME_ELSEWHERE
    assert set(LAYERS_BY_NAME) <= known


class Enumerated(Gaussian):
    """Squared errors without the factor 1/2, whose draws are ± e_k √(K/2 ...) in turn: the score
    (output - target) / var has the Hessian for its average square over one round of K draws."""

    def __init__(self) -> None:
        super().__init__(0.5)
        self.turn = 0

    def sample(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        elements = logits[0].numel()
        moved = torch.zeros(len(logits), elements, dtype=logits.dtype)
        # The score is 2 (output - target); its square over a round must average to 2.
        moved[:, self.turn % elements] = (elements / 2) ** 0.5
        self.turn += 1
        return logits - moved.view(logits.shape)


def setting(kind: type[nn.Module], case: Case) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    if case is None:
        ids = torch.randint(VOCABULARY, (4, 3))
        ids[0, 0] = 2
        return nn.Embedding(VOCABULARY, WIDTH, padding_idx=2).double(), ids
    module = case.make(True).double()
    return module, torch.randn(case.input_shape, dtype=torch.float64)


def make_spec(module: nn.Module, layer: Any, bias: bool) -> BlockSpec:
    dims = layer.dims(module, bias)
    if layer.one_sided is not None:
        encoding = "unit" if layer.one_sided == "unitwise" else "diagonal"
        return BlockSpec(
            "layer", layer.one_sided, (SideSpec(dims[0], 0, "diagonal", encoding),), 0.9
        )
    sides = tuple(
        SideSpec(dim, 0, "diagonal", "diagonal")
        if name in layer.diagonal_sides
        else SideSpec(dim, dim, "none", "dense")
        for name, dim in zip("AG", dims, strict=True)
    )
    return BlockSpec("layer", "lowrank", sides, 0.9)


def output_gradients(output: Tensor, targets: Tensor, fisher_type: str) -> Iterator[Tensor]:
    """Those of every sample's own summed loss; their statistics add up."""
    if fisher_type == "empirical":
        yield 2 * (output - targets)
        return
    # The Hessian of the squared error is 2.
    for k in range(output[0].numel()):
        unit = torch.zeros(len(output), output[0].numel(), dtype=output.dtype)
        unit[:, k] = 2**0.5
        yield unit.view(output.shape)


def oracle(
    case: Case, module: nn.Module, input: Tensor, targets: Tensor, fisher_type: str
) -> dict[str, Tensor]:
    """The sums, without counts."""
    output = module(input).detach()
    total: dict[str, Tensor] = {}
    if isinstance(case, LayerCase):
        total["A"] = input_factor(input_rows(case, module, input, _has_bias(module)), "expand")[0]
    elif case is None:
        counts = torch.bincount(input.flatten(), minlength=VOCABULARY).double()
        counts[2] = 0  # padding
        total["A"] = counts
    for g in output_gradients(output, targets, fisher_type):
        for name, value in _of_output(case, module, input, g).items():
            total[name] = total[name] + value if name in total else value
    return total


def _of_output(case: Case, module: nn.Module, input: Tensor, g: Tensor) -> dict[str, Tensor]:
    if isinstance(case, JointCase):
        return expected_statistic(case, module, input, g, case.has_bias)
    if isinstance(case, LayerCase):
        return {"G": output_factor(output_rows(case, g), "expand")[0]}
    rows = (g * (input != 2).unsqueeze(-1)).flatten(0, -2)
    return {"G": rows.T @ rows}


def _has_bias(module: nn.Module) -> bool:
    bias = module._parameters.get("bias")
    return bias is not None and bias.requires_grad


def captured(
    module: nn.Module, input: Tensor, targets: Tensor, fisher_type: str, reduction: str
) -> tuple[Tensors, int]:
    layer = find_layer(module)
    assert layer is not None
    spec = make_spec(module, layer, layer.trains_bias(module))
    model = nn.Sequential(module)
    capture = Capture(
        {"layer": (module, layer, spec)}, fisher_type=fisher_type, loss_reduction=reduction
    )
    got: list[Tensors] = []
    with capture.armed({"layer": {}}, lambda name, tensors: got.append(tensors)):
        output = model(input)
        likelihood = Enumerated() if fisher_type == "mc" else Gaussian(0.5)
        capture.observe_loss(output, targets, likelihood, n_samples=output[0].numel())
        squares = (output - targets).square()
        (squares.mean() if reduction == "mean" else squares.sum()).backward()
    (statistic,) = got
    assert all(tensor.dtype == torch.float32 for tensor in statistic.values())
    return statistic, output.numel()


@pytest.mark.parametrize("kind", ENTRIES, ids=lambda kind: kind.__name__)
def test_an_entry_is_captured_as_its_per_sample_gradients(kind: type[nn.Module]) -> None:
    case = ENTRIES[kind]
    module, input = setting(kind, case)
    with torch.no_grad():
        targets = torch.randn_like(module(input))
    for fisher_type in ("empirical", "mc", "exact"):
        expected = oracle(case, copy.deepcopy(module), input, targets, fisher_type)
        for reduction in ("mean", "sum"):
            for dtype, tolerance in TOLERANCES.items():
                where = (kind.__name__, fisher_type, reduction, dtype)
                own = copy.deepcopy(module).to(dtype)
                x = input.to(dtype) if input.is_floating_point() else input
                statistic, terms = captured(own, x, targets.to(dtype), fisher_type, reduction)
                _compare(expected, statistic, terms, tolerance, where)


def _compare(
    expected: dict[str, Tensor], statistic: Tensors, terms: int, tolerance: float, where: object
) -> None:
    for name, value in expected.items():
        if name in ("A", "G"):
            packed = statistic.get(f"{name}.packed")
            got = statistic[f"{name}.diag"] if packed is None else _unpacked(packed, len(value))
        else:
            got = statistic[f"F.{name}"]
        largest = max(expected[key].abs().max() for key in expected if _alike(key, name))
        assert (got - value).abs().max() <= tolerance * largest, (*where, name)  # type: ignore[misc]
    for side in ("G", "F"):
        if f"{side}.count" in statistic:
            assert statistic[f"{side}.count"] == terms, where


def _alike(key: str, name: str) -> bool:
    """The mixed moments of a unit may all be tiny beside the others."""
    return key == name or (len(key) == 2 and len(name) == 2)


def _unpacked(packed: Tensor, d: int) -> Tensor:
    return unpack_triangle(packed, d)
