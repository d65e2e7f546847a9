"""The registry of layers: module type -> LayerIO or JointIO.

A new layer type is one file in this folder and one line in `LAYERS`; one of a library that is not
to be imported for it, a line in `LAYERS_BY_NAME`; and users have `register_layer`.

A module is looked up by its exact type, not through its bases: a subclass may compute something
else with the weight, or never run its forward at all (nn.MultiheadAttention reads the weight of
its ``NonDynamicallyQuantizableLinear`` and passes it to a fused function), and would be captured
wrongly without a word.  A subclass that computes what its base computes is registered on its own:
``register_layer(MyLinear, LAYERS[nn.Linear])``.
"""

from __future__ import annotations

from torch import nn

from distcurv.errors import ConfigError
from distcurv.layers.bias_scale import Bias, BiasIO, Scale, ScaleIO
from distcurv.layers.conv import ConvIO
from distcurv.layers.conv_transpose import ConvTransposeIO
from distcurv.layers.embedding import EmbeddingIO
from distcurv.layers.joint import JointIO
from distcurv.layers.layer import LayerIO
from distcurv.layers.linear import LinearIO
from distcurv.layers.local_part import unsharded_type
from distcurv.layers.norms import (
    BatchNormIO,
    GroupNormIO,
    ImageLayerNormIO,
    InstanceNormIO,
    LayerNormIO,
    RMSNormIO,
    SyncBatchNormIO,
)
from distcurv.layers.registration import checked_layer, type_name
from distcurv.layers.transposed_linear import TransposedLinearIO

__all__ = ["LAYERS", "LAYERS_BY_NAME", "Bias", "Scale", "find_layer", "register_layer"]

LAYERS: dict[type[nn.Module], LayerIO | JointIO] = {
    nn.Linear: LinearIO(),
    nn.Conv1d: ConvIO(),
    nn.Conv2d: ConvIO(),
    nn.Conv3d: ConvIO(),
    nn.ConvTranspose1d: ConvTransposeIO(),
    nn.ConvTranspose2d: ConvTransposeIO(),
    nn.ConvTranspose3d: ConvTransposeIO(),
    nn.Embedding: EmbeddingIO(),
    nn.LayerNorm: LayerNormIO(),
    nn.RMSNorm: RMSNormIO(),
    nn.GroupNorm: GroupNormIO(),
    nn.BatchNorm1d: BatchNormIO(),
    nn.BatchNorm2d: BatchNormIO(),
    nn.BatchNorm3d: BatchNormIO(),
    nn.SyncBatchNorm: SyncBatchNormIO(),
    nn.InstanceNorm1d: InstanceNormIO(1),
    nn.InstanceNorm2d: InstanceNormIO(2),
    nn.InstanceNorm3d: InstanceNormIO(3),
    Bias: BiasIO(),
    Scale: ScaleIO(),
}

_HF_MODELS = "transformers.models"
_ROOT_MEAN_SQUARE = RMSNormIO("variance_epsilon")

# By module and qualified name of the type.
LAYERS_BY_NAME: dict[str, LayerIO | JointIO] = {
    "transformers.pytorch_utils.Conv1D": TransposedLinearIO(),
    f"{_HF_MODELS}.convnext.modeling_convnext.ConvNextLayerNorm": ImageLayerNormIO(),
    f"{_HF_MODELS}.llama.modeling_llama.LlamaRMSNorm": _ROOT_MEAN_SQUARE,
    f"{_HF_MODELS}.mistral.modeling_mistral.MistralRMSNorm": _ROOT_MEAN_SQUARE,
    f"{_HF_MODELS}.qwen2.modeling_qwen2.Qwen2RMSNorm": _ROOT_MEAN_SQUARE,
    f"{_HF_MODELS}.qwen3.modeling_qwen3.Qwen3RMSNorm": _ROOT_MEAN_SQUARE,
    f"{_HF_MODELS}.t5.modeling_t5.T5LayerNorm": _ROOT_MEAN_SQUARE,
}


def find_layer(module: nn.Module) -> LayerIO | JointIO | None:
    """What is registered for the module's exact type, or None.  (`LayerIO.refuse` says whether this
    very module is supported.)  The type is the one before `fully_shard` has replaced it."""
    module_type = unsharded_type(module)
    layer = LAYERS.get(module_type)
    return LAYERS_BY_NAME.get(type_name(module_type)) if layer is None else layer


def register_layer(
    module_type: type[nn.Module],
    layer: LayerIO | JointIO | type[LayerIO] | type[JointIO],
    *,
    replace: bool = False,
) -> None:
    """Have modules of this exact type captured by a layer, in preconditioners made from now on.

    Args:
        module_type: the class of the modules; its subclasses are registered on their own.
        layer: a class without arguments or an instance with all that `LayerIO` (two sides) or
            `JointIO` (one side) asks for.  One instance serves all modules.
        replace: allow a type that is registered already.

    Raises `ConfigError` for a type that is no class of modules, a layer that lacks a part of its
    protocol, or a type that is registered already.  Example: docs/guides/custom-layers.md.
    """
    checked = checked_layer(module_type, layer)
    known = module_type in LAYERS or type_name(module_type) in LAYERS_BY_NAME
    if known and not replace:
        raise ConfigError(
            f"register_layer: {type_name(module_type)} is registered already; to capture it "
            "differently give replace=True"
        )
    LAYERS[module_type] = checked
