"""Warn of changes to a batch or its outputs between data loader and loss: the Fisher lacks them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from avalanche.training.templates.base_sgd import BaseSGDTemplate
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ewc_plugin.avalanche.template import overrides
from ewc_plugin.batches import as_pytree, version

_ITERATIONS = 8  # of an experience: a change may happen by chance, such as mixup's


class _Seen(NamedTuple):
    """The leaves of a strategy's batch and outputs at one moment, with their versions."""

    batch: list[tuple[Any, int]]
    outputs: list[tuple[Any, int]]


class WatchedPlugins(list[Any]):
    """A strategy's plugins; each is compared before and after its turn in a hook.

    It takes the place of `strategy.plugins` in the first iterations of an experience. A plugin that
    appends samples of a memory, or replaces a tensor by an equal one, changes nothing.

    Attributes:
        found: Whether it has warned of a change; it does so once.

    Args:
        strategy: About to train.
    """

    def __init__(self, strategy: Any) -> None:
        if isinstance(strategy.plugins, WatchedPlugins):  # of another plugin like ours
            strategy.plugins.stop()
        super().__init__(strategy.plugins)
        self.found = False
        self._strategy, self._own = strategy, strategy.plugins
        self._template: str | None = None  # its part of an iteration that runs between two hooks
        self._last = _seen(strategy)
        self._finished: Any = None  # a batch whose loss is computed
        self._left = _ITERATIONS
        strategy.plugins = self

    def __iter__(self) -> Iterator[Any]:
        """The plugins, in order."""
        if not self._is_before_the_loss:
            yield from super().__iter__()
            return
        self._compare_template()
        for plugin in super().__iter__():
            before = _seen(self._strategy)
            yield plugin
            if self._is_before_the_loss:
                self._compare(type(plugin).__name__, before, _seen(self._strategy))
        self._last = _seen(self._strategy)

    def __reduce__(self) -> Any:
        return list, (list(super().__iter__()),)

    def follows(self, part: str | None) -> None:
        """Say which part of the iteration the template runs next; None: the loss is computed."""
        self._template = part
        if part is None:
            self._finished = self._strategy.mbatch
            self._left -= 1
            if not self._left:
                self.stop()

    def stop(self) -> None:
        """Put the strategy's own list back, with what was added meanwhile."""
        self._left = 0
        if self._strategy.plugins is self:
            self._own[:] = super().__iter__()
            self._strategy.plugins = self._own

    @property
    def _is_before_the_loss(self) -> bool:
        batch = self._strategy.mbatch
        new = batch is not None and batch is not self._finished
        return new and self._left > 0 and bool(self._strategy.is_training)

    def _compare_template(self) -> None:
        """Compare the state with that at the end of the hook before: the template ran between."""
        part, self._template = self._template, None
        if part is None or overrides(self._strategy, part):
            return  # the Fisher calls these itself
        now, last = _seen(self._strategy), self._last
        if part == "forward":
            own_hook = type(self._strategy)._before_forward is not BaseSGDTemplate._before_forward
            last = last._replace(outputs=now.outputs)
            if not own_hook:  # a model may work on its input in place
                now = now._replace(batch=[(leaf, 0) for leaf, _ in now.batch])
                last = last._replace(batch=[(leaf, 0) for leaf, _ in last.batch])
        self._compare(type(self._strategy).__name__, last, now)

    def _compare(self, name: str, before: _Seen, after: _Seen) -> None:
        if _differ(before.batch, after.batch):
            what = "batch"
        elif before.outputs and _differ(before.outputs, after.outputs):
            what = "model's outputs"
        else:
            return
        self.found = True
        self.stop()
        warnings.warn(
            f"{name} changes the {what} between the data loader and the loss, and the Fisher is of "
            "the data without that change. Make it in the data's transforms, or in the template's "
            "`mb_x` or `forward`; or override `forward` of `DiagonalEWCPlugin` to make it there "
            "too.",
            stacklevel=2,
        )


def _seen(strategy: Any) -> _Seen:
    return _Seen(*(_versions(item) for item in (strategy.mbatch, strategy.mb_output)))


def _versions(items: Any) -> list[tuple[Any, int]]:
    leaves = [] if items is None else tree_leaves(as_pytree(items))
    return [(leaf, version(leaf)) for leaf in leaves]


def _differ(before: list[tuple[Any, int]], after: list[tuple[Any, int]]) -> bool:
    """Whether leaves were written to or replaced, other than by more samples."""
    if len(before) != len(after):
        return True
    pairs = zip(before, after, strict=True)
    return any(_differs(*old, *new) for old, new in pairs)


def _differs(old: Any, old_version: int, new: Any, new_version: int) -> bool:
    if old is new:
        return old_version != new_version
    if not (isinstance(old, Tensor) and isinstance(new, Tensor)):
        return isinstance(old, Tensor) or isinstance(new, Tensor)
    return version(old) != old_version or not _extends(new, old)


def _extends(new: Tensor, old: Tensor) -> bool:
    """Whether a tensor has the samples of another one, perhaps beside more, in their order."""
    if new.shape[1:] != old.shape[1:] or new.dim() != old.dim():
        return False
    N = len(old) if old.dim() else 1
    rows = (new[:N], new[len(new) - N :]) if old.dim() else (new,)
    return any(part.shape == old.shape and bool(torch.eq(part, old).all()) for part in rows)
