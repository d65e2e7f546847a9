"""Notices that a model's parameters are no longer those that a preconditioner was made for.

`fully_shard`, `load_state_dict(assign=True)`, a parametrization and alike put other parameters into
the modules, and ``model.to(device)`` moves them.  The old ones then never get a gradient again, so
without this check a step would do nothing, without a word.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distcurv.errors import StateError


class SameParameters:
    """The parameters as they were when this was made.

    Args:
        owner: what was made for them, for the message.
        places: module and name of each parameter in it.
        may_be_gathered: sharded parameters are not looked for in the modules, which have gathered
            ones between a forward and its backward, or after a forward without one.
    """

    def __init__(
        self,
        owner: str,
        places: Iterable[tuple[nn.Module, str]],
        *,
        may_be_gathered: bool = False,
    ) -> None:
        self._owner = owner
        self._known: list[tuple[nn.Module, str, Tensor]] = []
        for module, name in places:
            parameter = module.get_parameter(name)
            if not (may_be_gathered and isinstance(parameter, DTensor)):
                self._known.append((module, name, parameter))
        self._devices = [parameter.device for _, _, parameter in self._known]

    def check(self) -> None:
        """Raises `StateError` where one of them is another or elsewhere now; looks at no number."""
        for (module, name, before), device in zip(self._known, self._devices, strict=True):
            now = module._parameters.get(name)
            if now is not before:
                what = _became(before, now)
            elif now.device != device:
                what = f"is on {now.device} now and was on {device}"
            else:
                continue
            raise StateError(
                f"the {name} of a {type(module).__name__} of the model {what} since "
                f"{self._owner} was made: make it after the model has its final parameters (after "
                "fully_shard, model.to(device), load_state_dict(assign=True), parametrizations)"
            )


def _became(before: Tensor, now: Tensor | None) -> str:
    if now is None:
        return "is no parameter any more"
    if isinstance(now, DTensor) and not isinstance(before, DTensor):
        return "has been replaced by a sharded one"
    if isinstance(before, DTensor) and not isinstance(now, DTensor):
        return "is gathered, not sharded (by a forward without a backward? call reshard() first),"
    return "has been replaced by another"
