"""Split, permuted and rotated MNIST streams of Avalanche's, and their tensors a batch at a time.

`Stream.benchmark` gives Avalanche's experiences. `Stream.samples` computes the same samples by
whole-array operations; `fast_data` compares the two on real items before it uses them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.benchmarks.classic import SplitMNIST
from avalanche.benchmarks.classic.cmnist import PixelsPermutation
from torch import Tensor, nn
from torchvision.transforms import Normalize
from torchvision.transforms.functional import rotate

from experiments.data.lazy_stream import class_order, lazy_benchmark
from experiments.data.sources import DataSource, ImageDataset, load_images, split_validation
from experiments.settings.own import function_of
from experiments.settings.own_benchmark import OwnBenchmark, own_benchmark
from experiments.settings.run import N_CLASSES, RunSettings

NORMALIZE = Normalize((0.1307,), (0.3081,))  # Avalanche's default for its MNIST streams


@dataclass(frozen=True)
class Images:
    """Images that are selected, and their pixels permuted, on access.

    Every experience shares `images`, so that a stream of many needs no more memory than one.

    Attributes:
        images: All images of the dataset, transformed, [M, 1, H, W] float32.
        indices: Those meant, in their order, [N] int64.
        pixels: Orders of the pixels, [E, H * W] int64; None where they stay as they are. -1 is a
            pixel that comes from outside of the image.
        which: The row of `pixels` for each image, [N] int64; all zero if E is 1.
        blank: Value of a pixel from outside; None where there are none.
    """

    images: Tensor
    indices: Tensor
    pixels: Tensor | None = None
    which: Tensor | None = None
    blank: float | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: int | slice | Tensor) -> Tensor:
        """The images at `rows`: [1, H, W] for an int, else [N, 1, H, W]."""
        if isinstance(rows, int):
            return self[torch.tensor([rows])][0]
        picked = self.images.index_select(0, self.indices[rows])
        if self.pixels is None:
            return picked
        assert self.which is not None
        flat, orders = picked.flatten(1), self.pixels
        if len(orders) > 1:
            orders = orders.index_select(0, self.which[rows])
        if self.blank is None:
            return _reordered(flat, orders).view_as(picked)
        moved = _reordered(flat, orders.clamp_min(0))
        return moved.masked_fill_(orders < 0, self.blank).view_as(picked)

    def part(self, rows: slice | Tensor) -> Images:
        """Select the images at `rows` without computing them."""
        which = None if self.which is None else self.which[rows]
        return replace(self, indices=self.indices[rows], which=which)

    @staticmethod
    def concatenate(parts: Sequence[Images]) -> Images:
        """Parts of the same dataset, one after the other."""
        indices = torch.cat([part.indices for part in parts])
        if parts[0].pixels is None:
            return Images(parts[0].images, indices)
        pixels = torch.cat([part.pixels for part in parts if part.pixels is not None])
        which = [torch.full_like(part.indices, e) for e, part in enumerate(parts)]
        return Images(parts[0].images, indices, pixels, torch.cat(which), parts[0].blank)


def _reordered(flat: Tensor, orders: Tensor) -> Tensor:
    """Images [N, P] with their pixels in the one order [1, P], or each in its own [N, P]."""
    if len(orders) == 1:
        return flat.index_select(1, orders[0])
    return flat.gather(1, orders)


Samples = Callable[[str, int], tuple[Images, Tensor]]


@dataclass(frozen=True)
class Stream:
    """A benchmark and the samples of its experiences.

    Attributes:
        benchmark: Avalanche's, with `train_stream` and `test_stream`.
        samples: (stream name, experience) -> transformed images and classes [N] int64, in the
            order of the experience's dataset; None for an own benchmark.
        shape: Of a sample, [C, H, W] for images.
        n_outputs: Of the network, or of each of its heads.
        own: An own benchmark and its experiences.
    """

    benchmark: Any
    samples: Samples | None
    shape: tuple[int, ...]
    n_outputs: int
    own: OwnBenchmark | None = None

    @property
    def train_stream(self) -> Sequence[Any]:
        """All that is trained on; of an online stream, its parts."""
        if self.own:
            return [part for parts in self.own.train for part in parts]
        experiences: Sequence[Any] = self.benchmark.train_stream
        return experiences

    @property
    def test_stream(self) -> Sequence[Any]:
        """The experiences to evaluate on."""
        experiences: Sequence[Any] = self.own.test if self.own else self.benchmark.test_stream
        return experiences

    def parts(self, experience: int) -> Sequence[Any]:
        """The parts of an experience to train on; but for online streams, itself alone."""
        return self.own.train[experience] if self.own else [self.train_stream[experience]]


def shared_stream(run: RunSettings, source: DataSource) -> Stream:
    """The stream of a run, kept while runs that share it follow each other."""
    return _kept_stream(run.stream, source)


@functools.lru_cache(maxsize=1)
def _kept_stream(run: RunSettings, source: DataSource) -> Stream:
    return make_stream(run, source)


def make_stream(run: RunSettings, source: DataSource) -> Stream:
    """The stream of a run, as Avalanche's own generators make it of MNIST.

    Split MNIST comes from its generator; digits, and streams whose test part is held out of the
    training images, from the function that it calls. Permuted and rotated MNIST have the samples of
    its generators, made experience by experience.
    """
    if run.benchmark_sha256:
        return _own(run, source)
    train, test = load_images(source)
    if run.validation:
        train, test = split_validation(train)
    if run.benchmark == "split":
        own_generator = source.name == "mnist" and not run.validation
        return _split(run, train, test, source.root if own_generator else None)
    return {"permuted": _permuted, "rotated": _rotated}[run.benchmark](run, train, test)


def _own(run: RunSettings, source: DataSource) -> Stream:
    """The stream of the user's function, which must be as the settings say, whatever the seed."""
    function = function_of("benchmark", run.benchmark, run.benchmark_sha256, source.files)
    made = own_benchmark(function, run.seed, run.n_experiences, run.validation)
    found, expected = (len(made.test), made.scenario), (run.n_experiences, run.scenario)
    if found != expected:
        got = f", got {found} for seed {run.seed} and {expected} for the first"
        raise function.error("have the same experiences and scenario with each seed", got)
    try:
        x = made.test[0].dataset[0][0]
    except Exception as error:  # the user's code may raise any
        raise function.error("return experiences whose `dataset` gives samples", error) from error
    shape = tuple(getattr(x, "shape", ()))
    return Stream(made.benchmark, None, shape, made.n_classes, made)


def _transform(run: RunSettings) -> nn.Module:
    """What the stream does to pixels in [0, 1]."""
    return nn.Identity() if run.pixels == "unit" else NORMALIZE


def _split(run: RunSettings, train: ImageDataset, test: ImageDataset, root: str | None) -> Stream:
    options: dict[str, Any] = {
        "n_experiences": run.n_experiences,
        "fixed_class_order": list(range(N_CLASSES)),  # 0/1, 2/3, ... as in the literature
        "class_ids_from_zero_in_each_exp": run.scenario != "class",
        "train_transform": _transform(run),
        "eval_transform": _transform(run),
    }
    by_task = run.scenario == "task"
    if root is not None:
        benchmark = SplitMNIST(**options, return_task_id=by_task, dataset_root=root)
    else:
        benchmark = nc_benchmark(train, test, **options, task_labels=by_task)
    patterns = {
        "train": benchmark.train_exps_patterns_assignment,
        "test": benchmark.test_exps_patterns_assignment,
    }
    ordered = _ordered_samples(lambda stream, e: patterns[stream][e], train, test, run)
    per_experience = N_CLASSES // run.n_experiences

    def samples(stream: str, experience: int) -> tuple[Images, Tensor]:
        images, classes = ordered(stream, experience)
        from_zero = options["class_ids_from_zero_in_each_exp"]
        return images, classes - experience * per_experience if from_zero else classes

    n_outputs = N_CLASSES if run.scenario == "class" else per_experience
    return Stream(benchmark, samples, _shape(train), n_outputs)


def _shape(images: ImageDataset) -> tuple[int, ...]:
    return (1, *images.data.shape[1:])


def _permuted(run: RunSettings, train: ImageDataset, test: ImageDataset) -> Stream:
    size = train.data[0].numel()
    random = np.random.RandomState(run.seed)  # as Avalanche draws them
    orders = [torch.from_numpy(random.permutation(size)).long() for _ in range(run.n_experiences)]
    moves = [PixelsPermutation(order) for order in orders]
    return _stream_of_orders(run, train, test, moves, orders)


def _rotated(run: RunSettings, train: ImageDataset, test: ImageDataset) -> Stream:
    """The stream of `RotatedMNIST`, whose own transform draws a random number for each image."""
    random = np.random.RandomState(run.seed)  # as Avalanche draws them
    angles = [int(random.randint(-180, 181)) for _ in range(run.n_experiences)]
    orders = [_order_of_rotation(_shape(train), angle) for angle in angles]
    moves = [_Reorder(order) for order in orders]
    blank = float(_transform(run)(torch.zeros(1, 1, 1)))
    return _stream_of_orders(run, train, test, moves, orders, blank)


def _order_of_rotation(shape: Sequence[int], angle: int) -> Tensor:
    """The pixel that each pixel of a rotated image is copied from, [H * W]; -1 for none."""
    numbered = torch.arange(1.0, 1 + math.prod(shape)).view(*shape)  # float32, as images are
    return rotate(numbered, angle).flatten().long() - 1


class _Reorder:
    """Moves the pixels of an image in [0, 1]; those from outside are black."""

    def __init__(self, order: Tensor) -> None:
        self.order = order

    def __call__(self, image: Tensor) -> Tensor:
        moved = image.flatten()[self.order.clamp_min(0)]
        return moved.masked_fill(self.order < 0, 0.0).view_as(image)


def _stream_of_orders(
    run: RunSettings,
    train: ImageDataset,
    test: ImageDataset,
    moves: Sequence[Any],
    orders: Sequence[Tensor],
    blank: float | None = None,
) -> Stream:
    """A stream of all images in each experience, their pixels in another order in each.

    Args:
        run: The settings.
        train: Images of the training stream.
        test: Images of the test stream.
        moves: What moves the pixels of one image, by experience.
        orders: The order of the pixels, by experience.
        blank: Value of a pixel from outside, for orders with a -1.

    Returns:
        The stream.
    """
    by_task = run.scenario == "task"
    benchmark = lazy_benchmark(train, test, moves, _transform(run), by_task=by_task)
    ordered = _ordered_samples(
        lambda stream, classes: benchmark.streams[stream].indices(classes), train, test, run
    )

    def samples(stream: str, experience: int) -> tuple[Images, Tensor]:
        images, classes = ordered(stream, class_order(experience))
        # The transform is elementwise, so that it commutes with moving pixels.
        pixels, which = orders[experience].unsqueeze(0), torch.zeros_like(classes)
        return replace(images, pixels=pixels, which=which, blank=blank), classes

    return Stream(benchmark, samples, _shape(train), N_CLASSES)


def _ordered_samples(
    indices: Callable[[str, Any], Sequence[int]],
    train: ImageDataset,
    test: ImageDataset,
    run: RunSettings,
) -> Callable[[str, Any], tuple[Images, Tensor]]:
    """The transformed samples of a dataset in its order.

    Args:
        indices: (stream name, what tells its datasets apart) -> images of that dataset.
        train: Images of the training stream.
        test: Images of the test stream.
        run: The settings.

    Returns:
        A function of the same arguments; what it has made is kept.
    """
    transform = _transform(run)
    columns = {
        name: (transform(part.images()), part.targets)
        for name, part in (("train", train), ("test", test))
    }

    @functools.cache
    def samples(stream: str, dataset: Any) -> tuple[Images, Tensor]:
        images, classes = columns[stream]
        rows = torch.as_tensor(indices(stream, dataset))
        return Images(images, rows), classes[rows]

    return samples
