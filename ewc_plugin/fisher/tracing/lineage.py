"""Which tensors of a forward pass are computed from parameters alone.

A model seldom hands a parameter over as it is: it slices a position table, transposes a matrix,
multiplies two factors of low rank, expands a class token into the batch. Whatever is computed from
parameters and constants alone has the same value for every sample, so the first operation that
brings it together with the batch is a layer call, and its per-sample gradients are pulled back to
the parameters through the graph in between, which no sample has touched.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ewc_plugin.contexts import ModelState
from ewc_plugin.fisher.rules.base import Sums
from ewc_plugin.fisher.rules.broadcast import ELEMENTWISE


def _methods(*names: str) -> set[Any]:
    owners = (torch, torch.Tensor)
    return {getattr(owner, name) for owner in owners for name in names if hasattr(owner, name)}


EXPANSIONS = _methods("expand", "expand_as", "broadcast_to", "repeat")
# Functions that pick entries, each at most once, or act on each entry alone.
_SELECTIONS = ELEMENTWISE | _methods(
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel", "view_as"),
    *("t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "adjoint"),
    *("narrow", "select", "split", "chunk", "unbind", "tensor_split", "diagonal", "flip", "roll"),
    *("contiguous", "clone", "to", "float", "double", "neg", "exp", "sigmoid", "tanh", "square"),
    *("tril", "triu", "masked_fill", "clamp", "abs", "sqrt", "rsqrt", "reciprocal", "log"),
)
_SELECTIONS |= {getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}
_SELECTIONS |= {F.softplus, torch.Tensor.__neg__}
# Functions that read only the shape or dtype of a tensor after the first.
_FIRST_ALONE = _methods("expand_as", "view_as", "reshape_as", "type_as", "to")
_PLAIN = (
    *(bool, int, float, complex, str, type(None), type(Ellipsis)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor computed from parameters alone.

    Attributes:
        value: The tensor, with the graph that leads to the parameters and to nothing else.
        params: Those parameters by name.
        selects: Whether each entry of a parameter reaches at most one entry of `value`, and each of
            these comes from one parameter, so that squares can be pulled back as they are.
        unexpanded: What `value` is an expansion of.
    """

    value: Tensor
    params: dict[str, Tensor]
    selects: bool = True
    unexpanded: "Source | None" = None

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter itself."""
        return any(p is self.value for p in self.params.values())

    def pull_back(self, gradients: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Gradients [N, ...] of `value`, as gradients [N, ...] of its parameters."""
        if self.is_parameter:
            yield next(iter(self.params)), gradients
            return
        pulled = torch.autograd.grad(
            self.value,
            list(self.params.values()),
            gradients.to(self.value.dtype),
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
        for name, gradient in zip(self.params, pulled, strict=True):
            if gradient is not None:
                yield name, gradient

    def add_squares(self, squares: Tensor, into: Sums) -> None:
        """Add squares of `value`'s gradients to those of its only parameter, where it selects."""
        ((name, p),) = self.params.items()

        def pulled(t: Tensor) -> Tensor:
            return torch.autograd.grad(self.value, p, t, retain_graph=True)[0]

        # g_p = c g_value entry by entry: once c from the squares, and once more from ones.
        into[name].addcmul_(pulled(squares.to(self.value.dtype)), pulled(torch.ones_like(squares)))


class Lineage:
    """Knows of each tensor seen so far whether it comes from parameters, constants or the batch.

    A tensor that is changed in place afterwards counts as coming from the batch.
    """

    def __init__(self, model: ModelState, names: dict[int, str]) -> None:
        self._known: dict[int, tuple[Tensor, int, Source | None]] = {}  # None: a constant
        for p in model.parameters:
            if name := names.get(id(p)):
                self._learn(p, Source(p, {name: p}))
            elif not p.requires_grad:
                self._learn(p, None)
        for buffer in model.buffers:
            self._learn(buffer, None)

    def source(self, t: Any) -> Source | None:
        """What is known of a tensor that comes from parameters alone."""
        return None if self.is_of_batch(t) else self._known[id(t)][2]

    def is_of_batch(self, t: Any) -> bool:
        """Whether a tensor may come from the batch, and not from parameters and constants alone."""
        # One with a hook counts as such, so that its gradient goes through the hook.
        known = self._known.get(id(t))
        return known is None or known[1] != t._version or bool(t._backward_hooks)

    def sources(self, args: Iterable[Any]) -> tuple[list[Source], bool]:
        """The sources among arguments, and whether any other argument may come from the batch."""
        found: list[Source] = []
        foreign = False
        for arg in args:
            if isinstance(arg, Tensor):
                if self.is_of_batch(arg):
                    foreign = True
                elif source := self.source(arg):
                    found.append(source)
            elif isinstance(arg, (tuple, list)):
                inner, inner_foreign = self.sources(arg)
                found += inner
                foreign |= inner_foreign
            elif isinstance(arg, slice):
                foreign |= any(isinstance(x, Tensor) for x in (arg.start, arg.stop, arg.step))
            elif not isinstance(arg, _PLAIN):
                foreign = True
        return found, foreign

    def read_by(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Source], bool]:
        """The same for the tensors whose values a function reads."""
        if func in _FIRST_ALONE:
            return self.sources(args[:1])
        return self.sources((*args, *kwargs.values()))

    def learn_constant(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """Remember what was computed from constants; a new one may have the batch's size."""
        if func in (torch.arange, torch.tensor) or (
            args and func not in EXPANSIONS and tensors_in(args)
        ):
            for t in tensors_in((out,)):
                self._learn(t, None)

    def learn(self, func: Any, args: tuple[Any, ...], found: list[Source], out: Any) -> None:
        """Remember what was computed from parameters and constants."""
        params = {name: p for source in found for name, p in source.params.items()}
        single = len(found) == 1 and found[0].selects
        unexpanded = None
        if func in EXPANSIONS and _stretches(func, found[0].value, out):
            unexpanded = found[0]
        for t in tensors_in((out,)):
            if not t.requires_grad:
                self._learn(t, None)
                continue
            if t.dtype not in (torch.float32, torch.float64):
                continue  # squares pulled back in half precision would be lost
            selects = single and t.numel() <= found[0].value.numel() and _selects(func, args)
            self._learn(t, Source(t, params, selects, unexpanded))

    def _learn(self, t: Tensor, source: Source | None) -> None:
        if not t.is_inference():
            self._known[id(t)] = t, t._version, source


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values, and those in lists and tuples."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors_in(value)
    return found


def _stretches(func: Any, value: Tensor, out: Tensor) -> bool:
    """Whether `value.expand(out.shape)` has the entries of `out`: `repeat` may do otherwise."""
    sizes = zip(reversed(value.shape), reversed(out.shape), strict=False)
    return all(before in (1, after) for before, after in sizes)


def _selects(func: Any, args: tuple[Any, ...]) -> bool:
    if func is torch.Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in index) or (
            len(index) == 1 and _unique(index[0])
        )
    if func is F.embedding:
        return _unique(args[0])
    return func in _SELECTIONS


def _unique(index: Any) -> bool:
    """Whether an index picks no entry twice."""
    whole = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
    return whole and index.unique().numel() == index.numel()
