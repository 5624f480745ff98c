"""EWC for a plain PyTorch loop: `EWC(model, dataset)`, two training loops and a test loop.

Names, arguments and returned values are those of a small implementation that many scripts are
based on, so that changing the import is enough; the Fisher is the same to rounding, and also right
for batches of any size. Avalanche is not imported.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, default_collate

from ewc_plugin.batch_parts import beside_no_labels, labelled, logits_of, on_device, unpack
from ewc_plugin.batches import Batch, draw_indices, draw_samples, n_samples, take
from ewc_plugin.contexts import evaluating
from ewc_plugin.fisher.diagonal import diagonal_fisher
from ewc_plugin.fisher.scores import FisherType
from ewc_plugin.penalty.options import checked_non_negative
from ewc_plugin.penalty.penalty import QuadraticPenalty

IGNORE_INDEX = -100  # torch's default


class Penalised(Protocol):
    """Protocol of `ewc_train`'s argument `ewc`: an object with a method `penalty(model)`."""

    def penalty(self, model: nn.Module) -> Tensor:
        """A scalar, to be added to the loss."""


class EWC:
    """The EWC penalty around the model's current parameters, with the Fisher on `dataset`.

    penalty(model) = sum_i F_i (theta_i - theta*_i)^2, with theta* the parameters at construction
    and F the diagonal Fisher there. The loss is `cross_entropy + importance * penalty`: importance
    is Avalanche's ewc_lambda, half of the lambda of Kirkpatrick et al.

    Args:
        model: Maps x [N, ...], or a mapping's entries as keyword arguments, to logits [N, C], or
            to a mapping or an object with `logits`.
        dataset: A list or Dataset of samples x, (x, y, ...) or mappings with "labels", a tensor
            [N, ...], or a DataLoader or other iterable of batches of them, of any sizes. They are
            moved to the model's device. Or a Fisher by parameter name, such as `load_fisher` gives.
        fisher_type: Labels that F averages over; EMPIRICAL takes y from the dataset.
        batched: Whether the items of `dataset` are batches. Unset: those of a DataLoader are, those
            of a Dataset or tensor are not, and of other items the model's output on the first one
            decides.
        max_samples: Use at most this many samples, drawn without replacement; of an iterable that
            can only be read from its beginning, the first ones.
        generator: Draws labels and subsets. Default: one with a fixed seed.
        ignore_index: The label of samples that are left out of F, as `ewc_train` leaves them out.

    Raises:
        ValueError: `dataset` is empty; its items may be samples or batches; or as
            `diagonal_fisher`.

    Attributes:
        fisher: F by parameter name, each in its parameter's shape. Unit: nats / theta^2.

    Source: Kirkpatrick et al. 2017.

    Example:
        >>> model = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> ewc = EWC(model, [torch.ones(1), torch.ones(1)])
        >>> _ = nn.init.ones_(model.weight)
        >>> ewc.penalty(model)
        tensor(0.5000, grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Iterable[Any] | Dataset[Any],
        fisher_type: FisherType | str = FisherType.PREDICTED,
        *,
        batched: bool | None = None,
        max_samples: int | None = None,
        generator: torch.Generator | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        if isinstance(dataset, Mapping):
            self.fisher: dict[str, Tensor] = dict(dataset)
        else:
            generator = generator or torch.Generator().manual_seed(0)
            batches = _batches(model, dataset, batched, max_samples, generator)
            self.fisher = diagonal_fisher(
                model,
                _labelled(batches, ignore_index),
                fisher_type,
                forward=_logits_of,
                targets=_targets,
                max_samples=max_samples,
                generator=generator,
            )
        self._penalty = QuadraticPenalty()
        self._penalty.consolidate(model, self.fisher)

    def penalty(self, model: nn.Module) -> Tensor:
        """sum_i F_i (theta_i - theta*_i)^2, with a gradient.

        Args:
            model: The one that this was made with, or one of the same architecture.

        Returns:
            A scalar. Unit: nats.
        """
        return self._penalty(model)


def normal_train(
    model: nn.Module,
    optimizer: Optimizer,
    data_loader: Iterable[Batch],
    *,
    ignore_index: int = IGNORE_INDEX,
) -> float:
    """Train one epoch on the cross entropy.

    Args:
        model: Maps x [N, ...], or a mapping's entries as keyword arguments, to logits [N, C], or to
            a mapping or an object with `logits`; it is left in train mode.
        optimizer: Of its parameters.
        data_loader: Yields (x [N, ...], y [N] int64), or mappings with "labels"; moved to the
            model's device.
        ignore_index: The label of samples that are left out.

    Returns:
        Mean loss over the batches. Unit: nats.

    Raises:
        ValueError: `data_loader` is empty.
        TypeError: Its batches have no labels.
    """
    return _train(model, optimizer, data_loader, None, 0.0, ignore_index)


def ewc_train(
    model: nn.Module,
    optimizer: Optimizer,
    data_loader: Iterable[Batch],
    ewc: Penalised,
    importance: float,
    *,
    ignore_index: int = IGNORE_INDEX,
) -> float:
    """Train one epoch on cross_entropy + importance * ewc.penalty(model).

    Args:
        model: As in `normal_train`.
        optimizer: As in `normal_train`.
        data_loader: As in `normal_train`.
        ewc: Made at the end of the tasks before.
        importance: Strength of the penalty, Avalanche's ewc_lambda.
        ignore_index: As in `normal_train`.

    Returns:
        Mean loss over the batches, with the penalty. Unit: nats.

    Raises:
        ValueError: `data_loader` is empty, or `importance` is negative or not finite.
        TypeError: Its batches have no labels.
    """
    importance = checked_non_negative("importance", importance)
    return _train(model, optimizer, data_loader, ewc, importance, ignore_index)


def test(
    model: nn.Module, data_loader: Iterable[Batch], *, ignore_index: int = IGNORE_INDEX
) -> float:
    """Return the accuracy in eval mode; the modules' flags are left as they were.

    Args:
        model: As in `normal_train`.
        data_loader: As in `normal_train`.
        ignore_index: As in `normal_train`.

    Returns:
        A fraction in 0-1 of the samples that have a label.

    Raises:
        ValueError: `data_loader` is empty, or no sample has a label.
        TypeError: Its batches have no labels.
    """
    correct = n = 0
    with evaluating(model), torch.no_grad():
        for batch in _labelled(_on_device(model, data_loader), ignore_index):
            y = _labels(batch)
            correct += int((_logits_of(model, batch).argmax(1) == y).sum())
            n += len(y)
    return correct / _not_zero(n)


test.__test__ = False  # type: ignore[attr-defined]  # no test of pytest's, which collects by name


def _train(
    model: nn.Module,
    optimizer: Optimizer,
    data_loader: Iterable[Batch],
    ewc: Penalised | None,
    importance: float,
    ignore_index: int,
) -> float:
    model.train()
    losses = []
    for batch in _on_device(model, data_loader):
        optimizer.zero_grad()
        logits = _logits_of(model, batch)
        y = _labels(batch)
        keep = labelled(y, ignore_index)
        if keep is None or bool(keep.any()):
            loss = F.cross_entropy(logits, y, ignore_index=ignore_index)
        else:  # the mean over no label is NaN
            loss = 0.0 * logits.sum()
        if ewc is not None:
            loss = loss + importance * ewc.penalty(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    _not_zero(len(losses))
    return float(torch.stack(losses).double().mean())


def _not_zero(n: int) -> int:
    if n == 0:
        raise ValueError("`data_loader` is empty: it needs at least one batch (x, y).")
    return n


def _on_device(model: nn.Module, batches: Iterable[Batch]) -> Iterator[Batch]:
    device = next(model.parameters()).device
    for batch in batches:
        yield on_device(batch, device)


def _inputs(batch: Batch) -> Any:
    if isinstance(batch, Mapping):
        return unpack(batch).inputs
    return batch[0] if isinstance(batch, tuple | list) else batch


def _logits_of(model: nn.Module, batch: Batch) -> Tensor:
    inputs = _inputs(batch)
    output = model(**inputs) if isinstance(batch, Mapping) else model(inputs)
    logits: Tensor = logits_of(output)
    return logits


def _targets(batch: Batch) -> Tensor:
    targets: Tensor = unpack(batch).targets
    return targets


def _labels(batch: Batch) -> Tensor:
    """The labels, which training and testing need."""
    y = _targets(beside_no_labels(batch))
    if not isinstance(y, Tensor):
        raise TypeError(
            "`data_loader` must yield labels: (x, y), or a mapping with 'labels', got a "
            f"{type(batch).__name__} without."
        )
    return y


def _labelled(batches: Iterable[Batch], ignore_index: int) -> Iterator[Batch]:
    """Yield the batches without the samples whose label is ignored; inputs alone as they are."""
    read = found = False
    for batch in batches:
        read = True
        keep = labelled(_targets(beside_no_labels(batch)), ignore_index)
        if keep is None or bool(keep.any()):
            found = True
            yield batch if keep is None else take(batch, keep)
    if read and not found:
        raise ValueError(
            f"All labels are `ignore_index`, {ignore_index}: at least one must not be."
        )


def _batches(
    model: nn.Module,
    dataset: Iterable[Any] | Dataset[Any],
    batched: bool | None,
    max_samples: int | None,
    generator: torch.Generator,
) -> Iterator[Batch]:
    """The dataset as batches on the model's device; samples as batches of one."""
    if isinstance(dataset, DataLoader | Dataset | Tensor) and batched is None:
        batched = isinstance(dataset, DataLoader)
    indexed = isinstance(dataset, Dataset | Tensor | list | tuple) and hasattr(dataset, "__len__")
    items = _items(dataset, range(len(cast(Any, dataset))) if indexed else None)
    first = next(items, None)
    if first is None:
        raise ValueError("`dataset` is empty: a Fisher needs at least one sample.")
    if batched is None:
        batched = _is_batch(model, first)
    if max_samples is None or not (indexed or isinstance(dataset, DataLoader)):
        items = chain([first], items)
    elif batched:
        items = iter(draw_samples(cast(Iterable[Batch], dataset), max_samples, generator))
    else:
        items = _items(dataset, draw_indices(len(cast(Any, dataset)), max_samples, generator))
    # `diagonal_fisher` joins small batches itself, whatever shapes the samples have.
    return _on_device(model, items if batched else (default_collate([item]) for item in items))


def _items(dataset: Any, indices: Iterable[int] | None) -> Iterator[Any]:
    return iter(dataset) if indices is None else (dataset[i] for i in indices)


def _is_batch(model: nn.Module, item: Any) -> bool:
    """Whether the model takes the item as a batch rather than as one sample."""
    as_batch = _logits(model, lambda: item)
    as_sample = _logits(model, lambda: default_collate([item]))
    if as_batch is None and as_sample is None:
        raise ValueError(
            "`dataset` must hold what the model maps to logits [N, C], as samples or in batches; "
            f"its first item, x of shape {_shape(item)}, fits neither way. Say batched=True or "
            "batched=False to see the model's own error."
        )
    if as_batch is None or as_sample is None:
        return as_sample is None
    if as_batch.shape == as_sample.shape and torch.allclose(as_batch, as_sample):
        return True  # one sample, with its axis
    raise ValueError(
        f"`dataset` may hold samples or batches: the model takes its first item, x of shape "
        f"{_shape(item)}, both ways. Say which by batched=False or batched=True."
    )


def _logits(model: nn.Module, make_batch: Callable[[], Batch]) -> Tensor | None:
    """Logits [N, C], or None where the model does not give one row per sample."""
    try:
        with evaluating(model):
            (batch,) = _on_device(model, [make_batch()])
            logits = _logits_of(model, batch).detach()
            fits = logits.dim() == 2 and len(logits) == n_samples(_inputs(batch))
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
        return None  # a wrong shape may raise any error
    return logits if fits else None


def _shape(item: Any) -> str:
    x = _inputs(item)
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__
