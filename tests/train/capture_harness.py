"""Runs a capture over a model, adds up what it delivers, and holds the per-sample oracle.

The oracle runs one sample at a time: the loss of that sample alone, its gradient with respect to
each layer's output by `torch.autograd.grad`, and the layer's input rows by unfolding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distcurv.curvature.spec import BlockSpec, SideSpec, Tensors
from distcurv.curvature.triangle import unpack_triangle
from distcurv.layers import find_layer
from distcurv.train.capture import Capture

Loss = Callable[[Tensor, Tensor], Tensor]


class Harness:
    """All Linear and Conv2d modules of a model as blocks.

    Attributes:
        totals: by block, the sum of all that the sink received.
        deliveries: by block, how often the sink was called.
    """

    def __init__(
        self, model: nn.Module, *, encoding: str = "dense", rank: int = 2, **settings: object
    ) -> None:
        self.modules = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        self.specs: dict[str, BlockSpec] = {}
        self.bases: dict[str, Tensors] = {}
        blocks = {}
        for name, module in self.modules.items():
            layer = find_layer(module)
            assert layer is not None
            dims = layer.dims(module, layer.trains_bias(module))
            sides = tuple(SideSpec(dim, min(rank, dim), "diagonal", encoding) for dim in dims)
            self.specs[name] = BlockSpec(name, "lowrank", sides, 0.9)
            self.bases[name] = {
                f"{prefix}.U": torch.linalg.qr(torch.randn(side.dim, side.rank))[0]
                for prefix, side in self.specs[name].named_sides()
            }
            blocks[name] = (module, layer, self.specs[name])
        self.capture = Capture(blocks, **settings)  # type: ignore[arg-type]
        self.totals: dict[str, Tensors] = {}
        self.deliveries: dict[str, int] = dict.fromkeys(self.modules, 0)

    def sink(self, name: str, tensors: Tensors) -> None:
        self.deliveries[name] += 1
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
        total = self.totals.setdefault(name, {})
        for key, value in tensors.items():
            total[key] = total[key] + value if key in total else value

    def arm(self) -> None:
        self.capture.arm(self.bases, self.sink)

    def count(self, name: str, side: str) -> float:
        return self.totals[name][f"{side}.count"].item()

    def factor(self, name: str, side: str) -> Tensor:
        """The mean factor of one side, from a dense encoding."""
        total = self.totals[name]
        dim = dict(self.specs[name].named_sides())[side].dim
        return unpack_triangle(total[f"{side}.packed"], dim) / total[f"{side}.count"]

    def assert_factor(self, name: str, side: str, expected: Tensor, tolerance: float) -> None:
        """The mean of either encoding against a dense factor, relative to its largest entry."""
        spec = dict(self.specs[name].named_sides())[side]
        bound = tolerance * expected.abs().max()
        if spec.encoding == "dense":
            assert (self.factor(name, side) - expected).abs().max() <= bound
            return
        total = {key: value / self.count(name, side) for key, value in self.totals[name].items()}
        basis = self.bases[name][f"{side}.U"].to(expected.dtype)
        assert (total[f"{side}.Y"] - expected @ basis).abs().max() <= 10 * bound
        assert (total[f"{side}.diag"] - expected.diagonal()).abs().max() <= bound
        assert (total[f"{side}.trace"] - expected.trace()).abs() <= len(expected) * bound


def oracle_factors(
    model: nn.Module,
    modules: dict[str, nn.Module],
    inputs: Tensor,
    targets: Tensor,
    loss_of_sample: Loss,
    weight_sharing: str = "expand",
) -> dict[tuple[str, str], Tensor]:
    """(block, side) -> mean factor, one sample at a time."""
    rows: dict[tuple[str, str], list[Tensor]] = {}
    for n in range(len(inputs)):
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def remember(
            module: nn.Module, args: tuple[Tensor], out: Tensor, seen: dict = seen
        ) -> Tensor:
            name = next(key for key, value in modules.items() if value is module)
            seen[name] = (args[0].detach().clone(), out)
            return out.clone()

        handles = [module.register_forward_hook(remember) for module in modules.values()]
        loss = loss_of_sample(model(inputs[n : n + 1]), targets[n : n + 1])
        for handle in handles:
            handle.remove()
        grads = torch.autograd.grad(loss, [out for _, out in seen.values()])
        for (name, (x, _)), grad in zip(seen.items(), grads, strict=True):
            a, g = _rows(modules[name], x, grad)
            if weight_sharing == "reduce":
                a, g = a.mean(0, keepdim=True), g.sum(0, keepdim=True)
            rows.setdefault((name, "A"), []).append(a)
            rows.setdefault((name, "G"), []).append(g)
    factors = {}
    for key, parts in rows.items():
        joined = torch.cat(parts)
        factors[key] = joined.T @ joined / (len(joined) if key[1] == "A" else len(inputs))
    return factors


def _rows(module: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(module, nn.Conv2d):
        a = F.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride)[0].T  # type: ignore[arg-type]
        g = grad[0].flatten(1).T
    else:
        a, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    if module.bias is not None:
        a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
    return a, g


class ConvNet(nn.Module):
    """Images [N, 2, 6, 6] to logits [N, 4], with an in-place ReLU after the convolution."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=bias)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(27, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.conv(x)).flatten(1))


class TokenNet(nn.Module):
    """Tokens [N, T, 3] to logits [N, T, 4]."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5, bias=bias)
        self.head = nn.Linear(5, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).tanh())


def batch(model: nn.Module, samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and class targets for `ConvNet` or `TokenNet`, in the dtype of the model."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    if isinstance(model, ConvNet):
        inputs = torch.randn(samples, 2, 6, 6, generator=generator)
        return inputs.to(dtype), torch.randint(4, (samples,), generator=generator)
    inputs = torch.randn(samples, 3, 3, generator=generator)
    return inputs.to(dtype), torch.randint(4, (samples, 3), generator=generator)


def cross_entropy(reduction: str) -> Loss:
    """Over logits [N, 4] or [N, T, 4]."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)

    return loss


def assert_same_totals(
    left: dict[str, Tensors], right: dict[str, Tensors], tolerance: float
) -> None:
    """Same blocks, names and numbers, relative to the largest number of each tensor."""
    assert left.keys() == right.keys()
    for name, tensors in left.items():
        assert tensors.keys() == right[name].keys()
        for key, value in tensors.items():
            error = (value - right[name][key]).abs().max()
            assert error <= tolerance * value.abs().max(), (name, key, error)


def names(deliveries: dict[str, int]) -> Sequence[str]:
    """Blocks that delivered something."""
    return [name for name, count in deliveries.items() if count]
