"""`DiagonalEWC`: a drop-in for Avalanche's `EWC` strategy."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from avalanche.training.supervised import EWC
from avalanche.training.templates import SupervisedTemplate

from ewc_plugin.avalanche.checked import AVALANCHE
from ewc_plugin.avalanche.plugin import DiagonalEWCPlugin

_AVALANCHES = dict(inspect.signature(EWC.__init__).parameters)
_PLUGINS = dict(inspect.signature(DiagonalEWCPlugin).parameters)


def _with_both_signatures(init: Callable[..., None]) -> Callable[..., None]:
    """Give `init` a signature that lists Avalanche's arguments, then the plugin's."""
    *avalanches, rest = _AVALANCHES.values()
    plugins = [
        p.replace(default=AVALANCHE) if name == "normalize" else p
        for name, p in _PLUGINS.items()
        if name not in _AVALANCHES
    ]
    init.__signature__ = inspect.Signature([*avalanches, *plugins, rest])  # type: ignore[attr-defined]
    return init


class DiagonalEWC(SupervisedTemplate):
    """Elastic Weight Consolidation with an exact per-sample Fisher.

    Arguments up to `eval_every` are those of `avalanche.training.supervised.EWC`, in its order and
    with its defaults; then come the keyword arguments of `DiagonalEWCPlugin`, and those of
    Avalanche's `SupervisedTemplate`. `plugins` is not changed.

    `normalize` alone has another default than the plugin's: "avalanche", so that the ewc_lambda of
    a script that used Avalanche's EWC is as strong. With ten tasks and mini-batches of 512 that
    serves with fisher_type="class_mean" alone; results/drop_in has all settings that were measured.
    """

    @_with_both_signatures
    def __init__(self, **arguments: Any) -> None:
        bound = inspect.signature(DiagonalEWC.__init__).bind(self, **arguments)
        bound.apply_defaults()
        given = {**bound.arguments, **bound.arguments["base_kwargs"]}
        del given["self"], given["base_kwargs"]
        ewc = DiagonalEWCPlugin(**{name: given.pop(name) for name in _PLUGINS})
        given["plugins"] = [*(given["plugins"] or []), ewc]
        super().__init__(**given)
