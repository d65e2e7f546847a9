"""The blocks that one module's own parameters make up.

Mostly one: weight and bias of a registered layer.  Attention has one for each projection; a bias
whose weight is frozen or tied goes alone; and parameters of modules that nothing is known of are
*bare*: a matrix is looked for in function calls (`F.linear`, `F.conv2d`, ...), anything else has a
diagonal block made from its gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

from distcurv.layers.attention import attention_parts
from distcurv.layers.bare import AnyLayer, BareIO
from distcurv.layers.bias_only import BiasOnlyIO
from distcurv.layers.conv import ConvIO
from distcurv.layers.joint import JointIO
from distcurv.layers.layer import LayerIO
from distcurv.layers.linear import LinearIO
from distcurv.layers.local_part import unsharded_type
from distcurv.layers.weight_bias import WeightBias

Source = Literal["module", "calls", "gradient"]


class Part(NamedTuple):
    """One block, or why there is none.

    Attributes:
        name: what it is called within the module; empty for the module's only block.
        layer: how it is seen.
        source: where its statistics come from.
        refusal: why it is no block, None where it is.
    """

    name: str
    layer: AnyLayer
    source: Source
    refusal: str | None = None


def module_parts(
    module: nn.Module, layer: LayerIO | JointIO | None, tied: Collection[int]
) -> Iterator[Part]:
    """The parts of a module's own trainable parameters.

    Args:
        layer: that of the module's type; None where none is registered.
        tied: ids of the parameters that several modules share.
    """
    claimed: set[str] = set()
    for part in _known_parts(module, layer, tied):
        if part.refusal is None:
            claimed.update(part.layer.parameter_names(module))
        else:
            # What a registered layer refuses is not to be guessed at.
            claimed.update(name for name, _ in module.named_parameters(recurse=False))
        yield part
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad and name not in claimed:
            yield _bare(name, parameter)


def _known_parts(
    module: nn.Module, layer: LayerIO | JointIO | None, tied: Collection[int]
) -> Iterator[Part]:
    module_type = unsharded_type(module)
    if module_type is nn.MultiheadAttention:
        attention = cast(nn.MultiheadAttention, module)
        for name, projection in attention_parts(attention):
            if projection.refuse(module) is None:
                yield Part(name, projection, "calls")
        return
    if module_type is NonDynamicallyQuantizableLinear:
        # Its module never runs: attention hands its weight to a function.
        projection = LinearIO()
        if projection.refuse(module) is None:
            yield Part("", projection, "calls")
        return
    if layer is None:
        return
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    trains_bias = bias is not None and bias.requires_grad
    if layer.one_sided in (None, "unitwise") and weight is not None:
        if not weight.requires_grad and trains_bias:
            yield Part("bias", BiasOnlyIO(), "module")
            return
        shares = id(weight) in tied or id(bias) in tied
        if shares and trains_bias and layer.one_sided is None and isinstance(layer, WeightBias):
            # The modules that share one may have their own of the other.
            yield Part("", type(layer)("weight", None), "module", layer.refuse(module))
            yield Part("bias", BiasOnlyIO(), "module")
            return
    yield Part("", layer, "module", layer.refuse(module))


def _bare(name: str, parameter: Tensor) -> Part:
    if isinstance(parameter, UninitializedParameter):
        return Part(name, BareIO(name), "gradient", "it is lazy: run the model once before")
    if parameter.is_complex():
        return Part(name, BareIO(name), "gradient", "it is complex")
    if not parameter.numel():
        return Part(name, BareIO(name), "gradient", "it is empty")
    if parameter.dim() >= 2 and 1 < parameter.shape[0] < parameter.numel():
        if parameter.dim() == 2:
            return Part(name, LinearIO(name, None), "calls")
        if parameter.dim() <= 5:
            return Part(name, ConvIO(name, None), "calls")
    return Part(name, BareIO(name), "gradient")
