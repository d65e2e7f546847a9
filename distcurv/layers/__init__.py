"""The registry of layers: module type -> LayerIO.

A new layer type is one file in this folder and one line in `LAYERS`.

A module is looked up by its exact type, not through its bases: a subclass may compute something
else with the weight, or never run its forward at all (nn.MultiheadAttention reads the weight of
its ``NonDynamicallyQuantizableLinear`` and passes it to a fused function), and would be captured
wrongly without a word.  A subclass that computes what its base computes gets its own line:
``LAYERS[MyLinear] = LAYERS[nn.Linear]``.
"""

from __future__ import annotations

from torch import nn

from distcurv.layers.conv2d import Conv2dIO
from distcurv.layers.layer import LayerIO
from distcurv.layers.linear import LinearIO

LAYERS: dict[type[nn.Module], LayerIO] = {
    nn.Linear: LinearIO(),
    nn.Conv2d: Conv2dIO(),
}


def find_layer(module: nn.Module) -> LayerIO | None:
    """The LayerIO of the module's exact type, or None.  (`LayerIO.refuse` says whether this very
    module is supported.)"""
    return LAYERS.get(type(module))
