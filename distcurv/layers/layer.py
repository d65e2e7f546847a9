"""What capture must know about a layer type: the LayerIO protocol.

A LayerIO turns one call of a module into statistics of its two sides, and the module's ``.grad``
into a matrix and back.  It is pure: the module is only read (but for `LayerIO.write_gradient`),
nothing is attached to it, and no state is kept between calls, so one instance serves all modules
of its type.

Letters: N samples (dimension 0 of the module's input), S positions (tokens, pixels; 1 for plain
inputs), d a side's dimension, r its rank, I = Di (+1 with the bias coordinate), O = Do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from distcurv.curvature.apply import AffineGradient
from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import SideSpec, Tensors

WeightSharing = Literal["expand", "reduce"]
WEIGHT_SHARING: tuple[WeightSharing, ...] = ("expand", "reduce")


@dataclass(frozen=True)
class Rows:
    """Drawn rows of one side of one call, copied, from which its statistic is made later.

    Attributes:
        rows_nd: [n, d], without the bias coordinate, in the dtype of the captured tensor or wider.
        weight: of the sums over them, see `Sampler`.
        count: that of the statistic of all rows.
    """

    rows_nd: Tensor
    weight: int
    count: int


class LayerIO(Protocol):
    """How one family of modules is captured.

    ``bias`` says everywhere whether the block has the bias as a homogeneous coordinate: a last
    input coordinate that is always 1, so that the gradient matrix is [O, Di + 1].

    Weight sharing follows Eschenhagen et al. 2023 ("Kronecker-Factored Approximate Curvature for
    Modern Neural Network Architectures", section 3).  With a_ns and g_ns the inputs and output
    gradients of sample n at position s, as sums that are divided by their counts later:

    * ``expand``: A = sum_ns a_ns a_ns^T, count N S; G = sum_ns g_ns g_ns^T, count N.
    * ``reduce``: A = sum_n a_n a_n^T with a_n = mean_s a_ns, count N; G = sum_n g_n g_n^T with
      g_n = sum_s g_ns, count N.

    The rows of ``expand`` are counted position by position, those of ``reduce`` are the samples.

    The ``module`` of the four methods that read statistics may be a stand-in for a function call
    (`F.conv2d`), with the attributes of such a module that are no parameters (stride, ...).

    Attributes:
        one_sided: None: the block has the sides A and G.  (See `JointIO` for others.)
        diagonal_sides: of these the statistic is ``diag`` by nature, and ``count``; it is made of
            the whole call, never of drawn rows.
        weight_is_matrix: whether the gradient's matrix is the weight's ``flatten(1)``.
        weight: the name of the weight in the module.
        rows: the outputs that are the block's, (start, stop); None for all.
        call_kind: the `FunctionCall` that does what such a module does, ``""`` for none.
    """

    one_sided: str | None
    diagonal_sides: frozenset[str]
    weight_is_matrix: bool
    weight: str
    rows: tuple[int, int] | None
    call_kind: str

    def parameter_names(self, module: nn.Module) -> list[str]:
        """The names in the module of the block's parameters: the weight's, then the bias's where
        it is trained."""
        ...

    def refuse(self, module: nn.Module) -> str | None:
        """Why this very module cannot be a block (a variant that comes in a later version, a
        frozen weight, ...), or None where it can."""
        ...

    def trains_bias(self, module: nn.Module) -> bool:
        """Whether the module has a bias that is trained, hence a bias coordinate.  A frozen bias
        is left out of the block."""
        ...

    def dims(self, module: nn.Module, bias: bool) -> tuple[int, ...]:
        """(I, O): the dimensions of the input side and of the output side."""
        ...

    def input_statistic(
        self,
        module: nn.Module,
        input: Tensor,
        side: SideSpec,
        basis_dr: Tensor | None,
        *,
        bias: bool,
        weight_sharing: WeightSharing,
    ) -> Tensors:
        """The sums of side A for one call: ``Y``, ``diag`` (where the tail is diagonal) and
        ``trace``, or ``packed``; and ``count``.  In float64 for a float64 input, else in float32.

        ``basis_dr`` is the installed basis, needed for the encoding ``sketch`` alone.  The caller
        has entered `full_float32` and no_grad, so that no product is rounded by autocast or TF32.
        Raises `CaptureError` where the input has no batch dimension."""
        ...

    def output_statistic(
        self,
        module: nn.Module,
        grad_output: Tensor,
        side: SideSpec,
        basis_dr: Tensor | None,
        *,
        weight_sharing: WeightSharing,
    ) -> Tensors:
        """The same of side G, from the gradient with respect to the module's output, as it is:
        the scale that makes it the gradient of a per-sample loss is the caller's."""
        ...

    def counted_positions(self, module: nn.Module, input: Tensor) -> Tensor | None:
        """Which positions of a call the weight has a part in, boolean, of the shape of the output
        without its features (an embedding's padding has none); None: all of them.  Asked where
        `input_statistic` is."""
        ...

    def input_rows(
        self,
        module: nn.Module,
        input: Tensor,
        sampler: Sampler,
        *,
        weight_sharing: WeightSharing,
    ) -> Rows:
        """Some rows of side A of one call, an unbiased sample of those that `input_statistic`
        sums over.  As few operations as can be: it runs amid the user's forward."""
        ...

    def output_rows(
        self,
        module: nn.Module,
        grad_output: Tensor,
        sampler: Sampler,
        *,
        weight_sharing: WeightSharing,
    ) -> Rows:
        """The same of side G."""
        ...

    def gradient(self, module: nn.Module, bias: bool) -> AffineGradient | None:
        """The ``.grad`` of the parameters as a matrix [O, Di] and, with a bias, a vector [O], in
        their dtype: views wherever the memory format allows, so that what is written into them is
        written; else copies.  None where there is none.  Raises `CaptureError` where the bias
        alone has none."""
        ...

    def write_gradient(self, module: nn.Module, bias: bool, grad: AffineGradient) -> None:
        """Overwrite the ``.grad`` of the parameters, in place, with ``grad`` of the shapes that
        `gradient` gives; copies nothing where ``grad`` is the very memory of ``.grad``."""
        ...
