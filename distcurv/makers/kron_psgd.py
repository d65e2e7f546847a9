"""KronPsgdGradientMaker: PSGD with a Kronecker product for each layer (Li 2018)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distcurv.curvature import psgd
from distcurv.curvature.psgd import Factors
from distcurv.errors import ConfigError
from distcurv.layers import find_layer
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.psgd import PsgdGradientMaker, Tensors, wide
from distcurv.train.discover import bare_model, find_layer_blocks


@dataclass(frozen=True)
class _Block:
    """Parameters that share a preconditioner.

    Attributes:
        name: of the layer or, alone, of the parameter.
        weight, bias: places among the covered parameters; the bias is a last column.
        shape: (O, I) of the matrix, None for a vector, which has a diagonal.
        diagonal: whether left and right are.
    """

    name: str
    weight: int
    bias: int | None
    shape: tuple[int, int] | None
    diagonal: tuple[bool, bool]

    def matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """[O, I], or the vector [n]."""
        weight = tensors[self.weight]
        if self.shape is None:
            return weight.reshape(-1)
        if self.bias is None:
            return weight.flatten(1)
        return torch.cat([weight.flatten(1), tensors[self.bias].unsqueeze(1)], 1)


class KronPsgdGradientMaker(PsgdGradientMaker):
    r"""PSGD with P = (RᵀR) ⊗ (LᵀL) for each layer: O² + I² numbers for a weight [O, ...] of I
    columns, the last of which is the bias.

    All that is no such layer is preconditioned as well: other weights with two dimensions or more
    alone, vectors (norms, lone biases) with a diagonal.  The rows of an embedding have a diagonal
    in place of L.  Otherwise as `PsgdGradientMaker`.

    Args:
        model: bare or wrapped in DistributedDataParallel.
        config: when and how.
        precond_lr: relative size of an update of L and R, 0 < it < 1.
        init_scale: L and R begin as this times the identity.
        use_functorch: both ways of ASDL's to make the product are one here.
        max_dim: a side that is larger has a diagonal.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PreconditioningConfig,
        precond_lr: float = 0.01,
        init_scale: float = 1.0,
        use_functorch: bool = False,
        max_dim: int = 8192,
    ) -> None:
        if max_dim < 1:
            raise ConfigError(f"max_dim is {max_dim}: give at least 1")
        self.max_dim = max_dim
        self._blocks: list[_Block] = []
        super().__init__(model, config, precond_lr, init_scale, use_functorch)

    def _initial(self) -> dict[str, Tensor]:
        if not self._blocks:
            self._blocks = list(self._find_blocks())
        params = list(self.covered.values())
        made = {}
        for block in self._blocks:
            dtype = wide([params[block.weight]])
            if block.shape is None:
                ones = torch.ones(params[block.weight].numel(), dtype=dtype, device=self._device)
                made[f"{block.name}.diagonal"] = self.init_scale * ones
                continue
            sides = zip(("left", "right"), block.shape, block.diagonal, strict=True)
            for side, size, diagonal in sides:
                one = torch.ones(size, dtype=dtype, device=self._device)
                made[f"{block.name}.{side}"] = self.init_scale * (one if diagonal else one.diag())
        return made

    def _find_blocks(self) -> Iterator[_Block]:
        names = list(self.covered)
        place = {id(p): i for i, p in enumerate(self.covered.values())}
        bare = bare_model(self.model)
        layer_of, bias_of = {}, {}
        for found in find_layer_blocks(bare)[0]:
            layer = found.layer
            if layer.one_sided is not None or not layer.weight_is_matrix or layer.rows is not None:
                continue
            own = [found.module.get_parameter(name) for name in layer.parameter_names(found.module)]
            if any(id(p) not in place for p in own):
                continue
            weight = place[id(own[0])]
            layer_of[weight] = found.name
            if len(own) == 2 and own[1].shape == own[0].shape[:1]:
                bias_of[weight] = place[id(own[1])]
        by_row = {
            id(p)
            for module in bare.modules()
            if (io := find_layer(module)) is not None and io.diagonal_sides
            for p in module.parameters(recurse=False)
        }
        joined = set(bias_of.values())
        for i, (name, parameter) in enumerate(self.covered.items()):
            if i in joined:
                continue
            if parameter.dim() < 2:
                yield _Block(name, i, None, None, (True, True))
                continue
            bias = bias_of.get(i)
            outputs = parameter.shape[0]
            shape = outputs, parameter.numel() // outputs + (bias is not None)
            diagonal = (
                outputs > self.max_dim or id(parameter) in by_row,
                shape[1] > self.max_dim,
            )
            yield _Block(layer_of.get(i) or names[i], i, bias, shape, diagonal)

    def _factors(self, block: _Block) -> Factors:
        return Factors(self.state[f"{block.name}.left"], self.state[f"{block.name}.right"])

    def _fit(self, dx: Tensors, dg: Tensors) -> None:
        for block in self._blocks:
            own_dx, own_dg = block.matrix(dx), block.matrix(dg)
            if block.shape is None:
                key = f"{block.name}.diagonal"
                q = self.state[key]
                self.state[key] = psgd.fit(q, own_dx.to(q), own_dg.to(q), self.precond_lr)
                continue
            old = self._factors(block)
            new = psgd.fit_factors(old, own_dx.to(old.left), own_dg.to(old.left), self.precond_lr)
            self.state[f"{block.name}.left"], self.state[f"{block.name}.right"] = new

    def _apply(self, grads: Tensors) -> Tensors:
        new = list(grads)
        for block in self._blocks:
            g = block.matrix(grads)
            if block.shape is None:
                q = self.state[f"{block.name}.diagonal"]
                new[block.weight] = psgd.apply(q, g.to(q))
                continue
            factors = self._factors(block)
            p = psgd.apply_factors(factors, g.to(factors.left))
            if block.bias is not None:
                new[block.bias] = p[:, -1]
                p = p[:, :-1]
            new[block.weight] = p.reshape(-1)
        return new

    def _criterion(self, dx: Tensors, dg: Tensors) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for block in self._blocks:
            own_dx, own_dg = block.matrix(dx), block.matrix(dg)
            if block.shape is None:
                q = self.state[f"{block.name}.diagonal"]
                total += psgd.criterion(q, own_dx.to(q), own_dg.to(q))
            else:
                factors = self._factors(block)
                left = factors.left
                total += psgd.criterion_factors(factors, own_dx.to(left), own_dg.to(left))
        return total
