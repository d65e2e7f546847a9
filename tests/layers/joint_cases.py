"""Cases for each registered one-sided layer type, and the float64 oracle for all of them.

The oracle knows nothing of normalisation, units or positions.  Every such layer is affine in its
parameters, so the derivative of the output by one entry is the difference that adding 1 to it
makes; the gradient of a sample is the sum, over that sample's outputs, of derivative times output
gradient.  That this is the gradient is tied to autograd by a test of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distcurv.layers import LAYERS, Bias, Scale
from distcurv.layers.joint import JointIO


@dataclass(frozen=True)
class JointCase:
    """``make(bias)`` a module, ``input_shape`` with the samples first; ``mixes``: in training
    every sample's output depends on the other samples."""

    label: str
    make: Callable[[bool], nn.Module]
    input_shape: tuple[int, ...]
    has_bias: bool = True
    mixes: bool = False


def randomised(module: nn.Module) -> nn.Module:
    """In float64, with weights and running statistics that are no special numbers."""
    module = module.double()
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return module


def layer_norm(label: str, units: tuple[int, ...], shape: tuple[int, ...]) -> JointCase:
    def make(bias: bool) -> nn.Module:
        return randomised(nn.LayerNorm(units, bias=bias))

    return JointCase(f"layernorm-{label}", make, shape)


def rms_norm(
    label: str, units: tuple[int, ...], shape: tuple[int, ...], eps: float | None = None
) -> JointCase:
    return JointCase(
        f"rmsnorm-{label}", lambda bias: randomised(nn.RMSNorm(units, eps)), shape, has_bias=False
    )


def frozen_bias(
    label: str, make: Callable[[], nn.Module], shape: tuple[int, ...], mixes: bool = False
) -> JointCase:
    """Of a type that always has a bias: without one it is frozen."""

    def made(bias: bool) -> nn.Module:
        module = randomised(make())
        module.get_parameter("bias").requires_grad_(bias)
        return module

    return JointCase(label, made, shape, mixes=mixes)


def no_bias(label: str, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> JointCase:
    return JointCase(label, lambda bias: randomised(make()), shape, has_bias=False)


JOINT_CASES: dict[type[nn.Module], list[JointCase]] = {
    nn.LayerNorm: [
        layer_norm("2d", (4,), (5, 4)),
        layer_norm("3d", (4,), (5, 3, 4)),
        layer_norm("4d", (4,), (3, 2, 2, 4)),
        layer_norm("matrix-2d", (3, 4), (5, 3, 4)),
        layer_norm("matrix-3d", (3, 2), (4, 2, 3, 2)),
    ],
    nn.RMSNorm: [
        rms_norm("2d", (4,), (5, 4)),
        rms_norm("3d-eps", (4,), (5, 3, 4), eps=0.1),
        rms_norm("matrix", (3, 2), (4, 2, 3, 2)),
    ],
    nn.GroupNorm: [
        frozen_bias("groupnorm-2d", lambda: nn.GroupNorm(2, 4), (5, 4)),
        frozen_bias("groupnorm-3d", lambda: nn.GroupNorm(2, 4), (5, 4, 3)),
        frozen_bias("groupnorm-4d", lambda: nn.GroupNorm(1, 4), (3, 4, 2, 3)),
    ],
    nn.BatchNorm1d: [
        frozen_bias("batchnorm1d-2d", lambda: nn.BatchNorm1d(4), (6, 4), mixes=True),
        frozen_bias("batchnorm1d-3d", lambda: nn.BatchNorm1d(3), (4, 3, 5), mixes=True),
        frozen_bias(
            "batchnorm1d-no-running",
            lambda: nn.BatchNorm1d(4, track_running_stats=False),
            (6, 4),
            mixes=True,
        ),
    ],
    nn.BatchNorm2d: [
        frozen_bias("batchnorm2d", lambda: nn.BatchNorm2d(3, eps=0.1), (4, 3, 2, 3), mixes=True),
    ],
    nn.BatchNorm3d: [
        frozen_bias("batchnorm3d", lambda: nn.BatchNorm3d(2), (3, 2, 2, 2, 2), mixes=True),
    ],
    nn.InstanceNorm1d: [
        frozen_bias("instancenorm1d", lambda: nn.InstanceNorm1d(3, affine=True), (4, 3, 5)),
    ],
    nn.InstanceNorm2d: [
        frozen_bias("instancenorm2d", lambda: nn.InstanceNorm2d(3, affine=True), (4, 3, 2, 3)),
        frozen_bias(
            "instancenorm2d-running",
            lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
            (4, 3, 2, 3),
        ),
    ],
    nn.InstanceNorm3d: [
        frozen_bias("instancenorm3d", lambda: nn.InstanceNorm3d(2, affine=True), (3, 2, 2, 1, 2)),
    ],
    Bias: [
        no_bias("bias-number", Bias, (5, 4)),
        no_bias("bias-vector", lambda: Bias(4), (5, 3, 4)),
        no_bias("bias-image", lambda: Bias(3, 1, 1), (4, 3, 2, 2)),
        no_bias("bias-of-samples", lambda: Bias(1, 4), (5, 4)),
        no_bias("bias-widens", lambda: Bias(4), (5, 3, 1)),
        no_bias("bias-plain", Bias, (5,)),
    ],
    Scale: [
        no_bias("scale-number", Scale, (5, 4)),
        no_bias("scale-vector", lambda: Scale(4), (5, 3, 4)),
        no_bias("scale-image", lambda: Scale(3, 1, 1), (4, 3, 2, 2)),
        no_bias("scale-widens", lambda: Scale(4), (5, 3, 1)),
    ],
}

# Registered for the sake of a clear reason: every module of these types is refused.
REFUSED_TYPES: set[type[nn.Module]] = {nn.SyncBatchNorm}

ALL = [case for cases in JOINT_CASES.values() for case in cases]


def joint_layer(module: nn.Module) -> JointIO:
    layer = LAYERS[type(module)]
    assert layer.one_sided is not None
    return layer  # type: ignore[return-value]


def sample_gradients(module: nn.Module, input: Tensor, grad_output: Tensor, name: str) -> Tensor:
    """[N, U] of the parameter ``name``; one output is computed for each of its entries."""
    values = {key: parameter.detach() for key, parameter in module.named_parameters()}
    before = functional_call(module, values, (input,))
    columns = []
    for unit in range(values[name].numel()):
        moved = values[name].clone()
        moved.view(-1)[unit] += 1
        difference = functional_call(module, values | {name: moved}, (input,)) - before
        columns.append((difference * grad_output).reshape(len(input), -1).sum(1))
    return torch.stack(columns, dim=1)


def expected_statistic(
    case: JointCase, module: nn.Module, input: Tensor, grad_output: Tensor, bias: bool
) -> dict[str, Tensor]:
    """Without the count."""
    w_NU = sample_gradients(module, input, grad_output, "weight")
    if joint_layer(module).one_sided == "diagonal":
        return {"diag": w_NU.square().sum(0)}
    b_NU = torch.zeros_like(w_NU)
    if bias and case.has_bias:
        b_NU = sample_gradients(module, input, grad_output, "bias")
    return {
        "ww": w_NU.square().sum(0),
        "wb": (w_NU * b_NU).sum(0),
        "bb": b_NU.square().sum(0),
    }
