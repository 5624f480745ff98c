"""The options of `diagonal_fisher`, checked in one place, before anything is computed."""

from numbers import Integral
from typing import Literal, get_args

import torch

from ewc_plugin.fisher.scores import BATCHED, FisherType, Score, parsed_type

EngineName = Literal["auto", "rules", "vmap", "loop"]


def check_options(
    fisher_type: FisherType | str | Score,
    *,
    forward: object = None,
    targets: object = None,
    criterion: object = None,
    n_draws: object = 1,
    max_samples: object = None,
    generator: object = None,
    chunk_size: object = None,
    engine: object = "auto",
    progress: object = False,
    class_dim: object = None,
    ignore_index: object = -100,
    positions: object = None,
) -> None:
    """Raise if the options of `diagonal_fisher` are invalid for every model and all data.

    Args:
        fisher_type: As in `diagonal_fisher`; so are all others.
        forward: None, or a function.
        targets: None, or a function.
        criterion: None, or a function; batched types alone.
        n_draws: At least 1; SAMPLED alone.
        max_samples: None, or at least 1; not for batched types.
        generator: None, or a `torch.Generator`.
        chunk_size: None, or at least 1; not for batched types.
        engine: One of `EngineName`.
        progress: A bool.
        class_dim: None, or a whole number; not beside a `criterion`.
        ignore_index: A whole number; -100 beside a `criterion`.
        positions: None, or a function; not for batched types.

    Raises:
        ValueError: A value is out of its range, or does not fit `fisher_type`.
        TypeError: A value has another type.

    Example:
        >>> check_options("predicted", chunk_size=0)
        Traceback (most recent call last):
        ValueError: `chunk_size` must be >= 1, got 0.
    """
    fisher_type = parsed_type(fisher_type)
    if not isinstance(engine, str) or engine not in get_args(EngineName):
        allowed = ", ".join(repr(e) for e in get_args(EngineName))
        raise ValueError(f"`engine` must be one of {allowed}, got {engine!r}.")
    functions = {
        "forward": forward,
        "targets": targets,
        "criterion": criterion,
        "positions": positions,
    }
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"`{name}` must be a function or None, got {function!r}.")
    _check_count("n_draws", n_draws)
    if max_samples is not None:
        _check_count("max_samples", max_samples)
    if chunk_size is not None:
        _check_count("chunk_size", chunk_size)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"`generator` must be a torch.Generator or None, got {generator!r}. Pass "
            "torch.Generator().manual_seed(seed)."
        )
    if not isinstance(progress, bool):
        raise TypeError(f"`progress` must be True or False, got {progress!r}.")
    if class_dim is not None:
        _check_whole("class_dim", class_dim)
    _check_whole("ignore_index", ignore_index)
    batched = fisher_type in BATCHED
    kind = repr(fisher_type.value) if isinstance(fisher_type, FisherType) else "a score"
    if criterion is not None and not batched:
        raise ValueError(f"`criterion` enters the batched fisher types alone, got {kind}.")
    if n_draws != 1 and fisher_type is not FisherType.SAMPLED:
        raise ValueError(f"`n_draws` enters fisher_type 'sampled' alone, got {kind}.")
    if batched and (max_samples is not None or chunk_size is not None):
        raise ValueError(
            f"`max_samples` and `chunk_size` would change what fisher_type {kind} computes. "
            "Leave them out."
        )
    if batched and positions is not None:
        raise ValueError(
            f"`positions` does not enter fisher_type {kind}: pass a `criterion` that leaves out "
            "the others, or give them the label `ignore_index`."
        )
    if criterion is not None and (class_dim is not None or ignore_index != -100):
        raise ValueError(
            "`class_dim` and `ignore_index` do not enter a `criterion` of your own: leave them "
            "out, and let it do what they say."
        )


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be a whole number, got {value!r}.")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be a whole number >= 1, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be >= 1, got {value}.")
