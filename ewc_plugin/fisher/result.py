"""`Fisher`: a dict of tensors with its Fisher type and number of samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Fisher(dict[str, Tensor]):
    """The diagonal Fisher F, a dict from parameter name to tensor.

    Attributes:
        fisher_type: The value of its `FisherType`, or the name of a score; None: not known.
        n_samples: Number of samples that it is the mean of; None: not known.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        fisher_type: str | None = None,
        n_samples: int | None = None,
    ) -> None:
        super().__init__(tensors)
        self.fisher_type, self.n_samples = fisher_type, n_samples

    def __reduce__(self) -> Any:
        return type(self), (dict(self),), vars(self)


def check_finite_squares(sums: Mapping[str, Tensor]) -> None:
    """Raise where a sum of squares is not finite.

    Args:
        sums: By parameter name.

    Raises:
        ValueError: One is not.
    """
    for name, total in sums.items():
        if total.numel() and not math.isfinite(float(total.max())):  # squares: no -inf
            raise ValueError(
                f"The Fisher of `{name}` is not finite: its gradients are NaN, "
                f"or overflow {total.dtype}."
            )
