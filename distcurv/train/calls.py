"""What capture remembers while it is armed: forward calls that wait for their backward."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.autograd.graph import GradientEdge

from distcurv.curvature.spec import Tensors
from distcurv.train.captured_block import CapturedBlock

Sink = Callable[[str, Tensors], None]


class Call:
    """One forward call of a block.

    Attributes:
        arming: the number of the arming it belongs to.
        samples: N, dimension 0 of the module's input.
        bases: the bases that were installed at the forward.
        input: ``A.*`` of the call.
        sampled: ``G.*`` of targets drawn from the model (``mc``), None before the first.
        reached: whether `Capture.sample` has looked at this call (``mc``).
        done: whether its backward has been counted.
    """

    def __init__(
        self, arming: int, block: CapturedBlock, samples: int, bases: Tensors, input: Tensors
    ) -> None:
        self.arming = arming
        self.block = block
        self.samples = samples
        self.bases = bases
        self.input = input
        self.sampled: Tensors | None = None
        self.reached = False
        self.done = False

    def add_sampled(self, grad_output: Tensor | None, squared_scale: float) -> None:
        """Add the gradients of one draw; None where the sampled loss does not depend on the
        call."""
        self.reached = True
        if grad_output is None:
            return
        drawn = self.block.encode_output(grad_output, self.bases, squared_scale)
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
        self, number: int, blocks: dict[int, CapturedBlock], bases: dict[str, Tensors], sink: Sink
    ) -> None:
        self.number = number
        self.blocks = blocks  # by the id of the module
        self.bases = bases
        self.sink = sink
        self.delivered: set[str] = set()
        self.unsampled: set[str] = set()
        # Where the gradients of the outputs arrive, for `Capture.sample`.  Edges rather than the
        # outputs: an in-place operation (ReLU(inplace=True)) makes the output another tensor, the
        # edge stays where the module ended.
        self.edges: dict[Call, GradientEdge] = {}
