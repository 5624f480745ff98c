"""The networks: Avalanche's `SimpleMLP` and a small CNN, with one head or one per task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from avalanche.models import CosineLinear, MultiHeadClassifier, MultiTaskModule, SimpleMLP
from torch import Tensor, nn

from experiments.data.streams import Stream
from experiments.settings.own import OwnFile, function_of
from experiments.settings.run import RunSettings


class MultiHead(MultiTaskModule):
    """A network whose last layer is replaced by one head per task label."""

    def __init__(self, features: nn.Module, n_features: int, n_classes: int) -> None:
        super().__init__()
        self.features = features
        # Heads are all of one size here, so that there are no units to mask.
        self.classifier = MultiHeadClassifier(n_features, n_classes, masking=False)

    def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
        """Logits [N, C] of each sample's own head."""
        return self.classifier(self.features(x), task_labels)


class Scale(nn.Module):
    """Logits of cosines, in [-1, 1], wide enough for a softmax to be certain of a class."""

    def forward(self, cosines: Tensor) -> Tensor:
        """Logits [N, C]."""
        return COSINE_SCALE * cosines


COSINE_SCALE = 10.0


def make_model(run: RunSettings, stream: Stream, files: Sequence[OwnFile] = ()) -> nn.Module:
    """The run's network, initialised from the global RNG.

    Args:
        run: Settings.
        stream: Of the run.
        files: Of own functions.

    Returns:
        The network.

    Raises:
        ValueError: The network can't take the stream's samples, or an own function returns none.
    """
    n_classes = stream.n_outputs
    if run.model_sha256:
        return _own(run, stream, files)
    features, n_features = _FEATURES[run.model](run, stream)
    if run.scenario == "task":
        return MultiHead(features, n_features, n_classes)
    if run.head == "cosine":
        return nn.Sequential(features, CosineLinear(n_features, n_classes, sigma=False), Scale())
    return nn.Sequential(features, nn.Linear(n_features, n_classes))


def _own(run: RunSettings, stream: Stream, files: Sequence[OwnFile]) -> nn.Module:
    function = function_of("model", run.model, run.model_sha256, files)
    model = function(
        n_classes=stream.n_outputs,
        benchmark=stream.benchmark,
        hidden_size=run.hidden_size,
        hidden_layers=run.hidden_layers,
        dropout=run.dropout,
    )
    if not isinstance(model, nn.Module):
        raise function.error("return an `nn.Module`", f", got {type(model).__name__}")
    return model


def _mlp(run: RunSettings, stream: Stream) -> tuple[nn.Module, int]:
    mlp: Any = SimpleMLP(
        input_size=math.prod(stream.shape),
        hidden_size=run.hidden_size,
        hidden_layers=run.hidden_layers,
        drop_rate=run.dropout,
    )
    return nn.Sequential(nn.Flatten(), mlp.features), run.hidden_size


def _cnn(run: RunSettings, stream: Stream) -> tuple[nn.Module, int]:
    if len(stream.shape) != 3:
        raise ValueError(f"`model` must be mlp for samples of the shape {stream.shape}, got cnn.")
    layers = nn.Sequential(
        nn.Conv2d(stream.shape[0], 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(run.dropout),
    )
    return layers, 64 * 2 * 2


_FEATURES = {"mlp": _mlp, "cnn": _cnn}
