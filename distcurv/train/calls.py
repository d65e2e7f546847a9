"""What capture remembers while it is armed: forward calls that wait for their backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import Tensors
from distcurv.train.captured_block import CapturedBlock, Reading
from distcurv.train.loss_scale import LossScale
from distcurv.train.rows import StepRows

Sink = Callable[[str, Tensors], None]


class Call:
    """One forward call of a block.

    Attributes:
        arming: the number of the arming it belongs to.
        samples: N, dimension 0 of the module's input.
        bases: the bases that were installed at the forward.
        sampler: chooses the rows that both sides look at.
        input: what makes ``A.*`` of the call.
        output: what makes ``G.*``, None until the output's gradient has arrived.
        sampled: ``G.*`` of targets drawn from the model (``mc``), None before the first.
        reached: whether `Capture.sample` has looked at this call (``mc``).
        done: whether its backward has been counted.
    """

    def __init__(
        self,
        arming: int,
        block: CapturedBlock,
        samples: int,
        bases: Tensors,
        sampler: Sampler | None,
        input: Reading,
    ) -> None:
        self.arming = arming
        self.block = block
        self.samples = samples
        self.bases = bases
        self.sampler = sampler
        self.input = input
        self.output: Reading | None = None
        self.sampled: Tensors | None = None
        self.reached = False
        self.done = False

    def complete(self, grad_output: Tensor, scale: LossScale | None) -> None:
        """The gradient of the output has arrived: that of the training loss with this scale; or,
        without (``mc``), what was sampled is all there is."""
        if scale is not None:
            factor = scale.undo(self.samples, grad_output.device)
            self.output = self._read(grad_output, factor * factor)
        elif self.sampled is not None:
            self.output = partial(dict, self.sampled)
        else:
            # No drawn target depends on this call: its Fisher is zero, its samples count.
            self.output = self._read(torch.zeros_like(grad_output), 1.0)

    def _read(self, grad_output: Tensor, squared_scale: float | Tensor) -> Reading:
        return self.block.read_output(grad_output, self.bases, squared_scale, self.sampler)

    def statistic(self) -> Tensors:
        """``A.*`` and ``G.*`` of a complete call, in float32."""
        assert self.output is not None, "Call.statistic: call complete() first"
        made = self.input() | self.output()
        return {key: value.float() for key, value in made.items()}

    def add_sampled(self, grad_output: Tensor | None, squared_scale: float) -> None:
        """Add the gradients of one draw; None where the sampled loss does not depend on the
        call."""
        self.reached = True
        if grad_output is None:
            return
        drawn = self._read(grad_output, squared_scale)()
        if self.sampled is None:
            self.sampled = drawn
            return
        for key, value in drawn.items():
            # One forward counts its samples once, however many targets are drawn for it.
            if key != "G.count":
                self.sampled[key] = self.sampled[key] + value


class Arming:
    """What lives from `Capture.arm` to `Capture.disarm`."""

    def __init__(
        self,
        number: int,
        blocks: dict[int, CapturedBlock],
        bases: dict[str, Tensors],
        rows: StepRows,
        sink: Sink,
    ) -> None:
        self.number = number
        self.blocks = blocks  # by the id of the module
        self.bases = bases
        self.rows = rows
        self.sink = sink
        self.calls: Counter[str] = Counter()  # forwards so far, by block
        self.arrived: list[Call] = []  # complete, their statistics are still to be made
        self.queued_in = -1  # the backward at whose end they will be made
        self.delivered: set[str] = set()
        self.unsampled: set[str] = set()
        # Where the gradients of the outputs arrive, for `Capture.sample`.  Edges rather than the
        # outputs: an in-place operation (ReLU(inplace=True)) makes the output another tensor, the
        # edge stays where the module ended.
        self.edges: dict[Call, GradientEdge] = {}
