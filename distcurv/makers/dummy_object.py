"""DummyObject: a recording of what is to be done with a model's output, before there is one.

``setup_model_call`` returns one.  Items, attributes, calls, arithmetic and torch functions applied
to it are recorded, and `DummyObject.eval` does them to the real output.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch.utils._pytree import tree_map


class _Operation(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], DummyObject]:
    def record(self: DummyObject, other: Any) -> DummyObject:
        return DummyObject(_Operation(function, (self, other), {}))

    return record


def _reflected(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], DummyObject]:
    def record(self: DummyObject, other: Any) -> DummyObject:
        return DummyObject(_Operation(function, (other, self), {}))

    return record


def _unary(function: Callable[[Any], Any]) -> Callable[[Any], DummyObject]:
    def record(self: DummyObject) -> DummyObject:
        return DummyObject(_Operation(function, (self,), {}))

    return record


class DummyObject:
    """What is done to it is recorded; each operation gives a new DummyObject.

    Example::

        dummy_y = gm.setup_model_call(model, x)
        loss = F.cross_entropy(dummy_y.logits.flatten(0, 1), t) + 0.1 * dummy_y.aux.square().mean()
        gm.setup_loss_repr(loss)

    What is used twice is computed once.  Not recorded, because Python needs their result at once:
    truth, iteration and unpacking, which raise `TypeError`; a DummyObject has no length and takes
    neither items nor attributes.
    """

    __slots__ = ("__weakref__", "_dummy_operands", "_dummy_operation")

    def __init__(self, operation: _Operation | None = None) -> None:
        self._dummy_operation = operation
        self._dummy_operands: list[DummyObject] = []
        if operation is not None:
            tree = (operation.args, dict(operation.kwargs))
            _replaced(tree, self._dummy_operands)

    def eval(self, base_value: Any) -> Any:
        """Do what was recorded to ``base_value``; also inside of containers among the arguments."""
        values: dict[int, Any] = {}
        pending = [self]
        # Not recursive: what is built up in a loop may be longer than Python's stack.
        while pending:
            node = pending[-1]
            missing = [each for each in node._dummy_operands if id(each) not in values]
            if missing:
                pending.extend(missing)
                continue
            pending.pop()
            operation = node._dummy_operation
            if operation is None:
                values[id(node)] = base_value
            elif id(node) not in values:
                args, kwargs = _replaced((operation.args, dict(operation.kwargs)), [], values)
                values[id(node)] = operation.function(*args, **kwargs)
        return values[id(self)]

    def __getattr__(self, name: str) -> DummyObject:
        # What asks for special methods (copy, pickle, numpy, ...) must see that there are none.
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(f"a DummyObject has no {name}")
        return DummyObject(_Operation(getattr, (self, name), {}))

    def __call__(self, *args: Any, **kwargs: Any) -> DummyObject:
        return DummyObject(_Operation(_call, (self, *args), kwargs))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> DummyObject:
        return cls(_Operation(func, args, kwargs or {}))

    def __bool__(self) -> bool:
        raise TypeError(
            "a DummyObject has no truth value: the model has not run yet; decide inside the loss "
            "function instead"
        )

    def __iter__(self) -> Iterator[Any]:
        raise TypeError(
            "a DummyObject cannot be unpacked: the model has not run yet; use items, dummy_y[0]"
        )

    def __repr__(self) -> str:
        operation = self._dummy_operation
        if operation is None:
            return "DummyObject()"
        name = getattr(operation.function, "__name__", repr(operation.function)).strip("_")
        parts = [repr(arg) for arg in operation.args]
        parts += [f"{key}={value!r}" for key, value in operation.kwargs.items()]
        return f"{name}({', '.join(parts)})"

    __hash__ = object.__hash__
    __getitem__ = _binary(operator.getitem)
    __add__, __radd__ = _binary(operator.add), _reflected(operator.add)
    __sub__, __rsub__ = _binary(operator.sub), _reflected(operator.sub)
    __mul__, __rmul__ = _binary(operator.mul), _reflected(operator.mul)
    __truediv__, __rtruediv__ = _binary(operator.truediv), _reflected(operator.truediv)
    __floordiv__, __rfloordiv__ = _binary(operator.floordiv), _reflected(operator.floordiv)
    __mod__, __rmod__ = _binary(operator.mod), _reflected(operator.mod)
    __pow__, __rpow__ = _binary(operator.pow), _reflected(operator.pow)
    __matmul__, __rmatmul__ = _binary(operator.matmul), _reflected(operator.matmul)
    __lshift__, __rlshift__ = _binary(operator.lshift), _reflected(operator.lshift)
    __rshift__, __rrshift__ = _binary(operator.rshift), _reflected(operator.rshift)
    __and__, __rand__ = _binary(operator.and_), _reflected(operator.and_)
    __or__, __ror__ = _binary(operator.or_), _reflected(operator.or_)
    __xor__, __rxor__ = _binary(operator.xor), _reflected(operator.xor)
    __lt__, __le__ = _binary(operator.lt), _binary(operator.le)
    __gt__, __ge__ = _binary(operator.gt), _binary(operator.ge)
    __eq__, __ne__ = _binary(operator.eq), _binary(operator.ne)  # type: ignore[assignment]
    __neg__, __pos__ = _unary(operator.neg), _unary(operator.pos)
    __abs__, __invert__ = _unary(operator.abs), _unary(operator.invert)


def evaluate(values: Any, base_value: Any) -> Any:
    """Every DummyObject in a tree of containers (and slices) replaced by what it evaluates to."""
    return DummyObject(_Operation(_same, (values,), {})).eval(base_value)


def default_logits() -> DummyObject:
    """What stands for the logits unless the user says otherwise: ``logits`` of a mapping or an
    object that has them; else the first item; else the output itself."""
    return DummyObject(_Operation(_logits, (DummyObject(),), {}))


def _logits(output: Any) -> Any:
    if isinstance(output, Mapping):
        return output["logits"] if "logits" in output else next(iter(output.values()), output)
    if hasattr(output, "logits"):
        return output.logits
    return output[0] if isinstance(output, tuple | list) and output else output


def _replaced(tree: Any, found: list[DummyObject], values: Mapping[int, Any] | None = None) -> Any:
    """A tree with its DummyObjects, which are listed in ``found``, replaced by their values."""

    def leaf(value: Any) -> Any:
        if isinstance(value, slice):  # no container to torch's pytree
            return slice(leaf(value.start), leaf(value.stop), leaf(value.step))
        if not isinstance(value, DummyObject):
            return value
        found.append(value)
        return value if values is None else values[id(value)]

    return tree_map(leaf, tree)


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _same(value: Any) -> Any:
    return value
