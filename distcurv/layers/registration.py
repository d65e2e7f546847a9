"""What `distcurv.register_layer` demands, so that a mistake is found when it is made."""

from __future__ import annotations

import inspect

from torch import nn

from distcurv.errors import ConfigError
from distcurv.layers.joint import JointIO
from distcurv.layers.layer import LayerIO


def type_name(module_type: type[nn.Module]) -> str:
    """The name under which a type can be registered without importing where it comes from."""
    return f"{module_type.__module__}.{module_type.__qualname__}"


def checked_layer(
    module_type: object, layer: LayerIO | JointIO | type[LayerIO] | type[JointIO]
) -> LayerIO | JointIO:
    """The layer, made where it is a class, with all that its protocol asks for.

    Raises `ConfigError` for anything but a class of modules and a layer."""
    if not (inspect.isclass(module_type) and issubclass(module_type, nn.Module)):
        raise ConfigError(
            f"register_layer got {module_type!r} as the module's type: give the class, a subclass "
            "of torch.nn.Module (not an instance)"
        )
    if isinstance(layer, type):
        try:
            layer = layer()
        except TypeError as error:
            raise ConfigError(
                f"register_layer cannot make a {layer!r} without arguments ({error}): give "
                "an instance"
            ) from error
    one_sided = getattr(layer, "one_sided", None)
    protocol: type = LayerIO if one_sided is None else JointIO
    missing = [name for name in _asked(protocol) if not hasattr(layer, name)]
    if missing:
        raise ConfigError(
            f"register_layer got {layer!r} for {module_type.__name__}: it lacks "
            f"{', '.join(missing)} of {protocol.__module__}.{protocol.__name__}; a subclass of "
            "WeightBias or LinearIO has most of them"
        )
    return layer


def _asked(protocol: type) -> list[str]:
    """The attributes and methods of a protocol."""
    methods = [name for name, value in vars(protocol).items() if inspect.isfunction(value)]
    return [
        *(name for name in protocol.__annotations__ if not name.startswith("_")),
        *(name for name in methods if not name.startswith("_")),
    ]
