"""Replay: the loss of an earlier step once more, at the parameters of now."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from distcurv.makers.grad_maker import GradientMaker
from distcurv.train.discover import bare_model


class Replay:
    """What a maker is set up with now, to be run later with the same random numbers (dropout) and
    with every module in the mode (training or not) that it has now.

    Tensors of the batch are held, not copied.
    """

    def __init__(self, maker: GradientMaker) -> None:
        # The calls of the maker may be set up anew before the replay.
        self._calls = copy.copy(maker)
        self._calls._model_output = self._calls._loss = None
        self._modes = [(module, module.training) for module in bare_model(maker.model).modules()]
        self._random = torch.get_rng_state()
        self._devices = [
            device
            for device in sorted({p.device.index for p in maker.trained if p.device.type == "cuda"})
            if device is not None
        ]
        self._device_random = [torch.cuda.get_rng_state(device) for device in self._devices]

    def loss(self) -> Tensor:
        """With its graph; neither buffers nor the random numbers to come are changed."""
        with self._as_then():
            return self._calls.run_loss()[1]

    @contextmanager
    def _as_then(self) -> Iterator[None]:
        now = [(module, module.training) for module, _ in self._modes]
        with torch.random.fork_rng(devices=self._devices):
            torch.set_rng_state(self._random)
            for device, state in zip(self._devices, self._device_random, strict=True):
                torch.cuda.set_rng_state(state, device)
            _set_modes(self._modes)
            try:
                yield
            finally:
                _set_modes(now)


def _set_modes(modes: list[tuple[torch.nn.Module, bool]]) -> None:
    # Not train(): it may do more in a subclass, and changes the modules inside as well.
    for module, training in modes:
        module.training = training
