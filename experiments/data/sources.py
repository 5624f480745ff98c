"""Where the images come from: torchvision's MNIST, or scikit-learn's embedded digits.

MNIST is looked for under one root, verified by checksum, and downloaded by torchvision where it is
missing. Only if no dataset was asked for by name does a missing MNIST fall back to the digits. The
libraries that hold them are imported where they are needed: the parent of a sweep needs none.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import Tensor
from torch.utils.data import Dataset

from experiments.data import fashion
from experiments.settings.own import OwnFile

DATA_ROOT_VARIABLE = "EWC_DATA_ROOT"
DOWNLOAD_TIMEOUT_S = 20.0
N_DIGITS_TEST = 360  # of 1,797
VALIDATION_FRACTION = 1 / 6  # MNIST: the last 10,000 of the 60,000 training images

# The four files as they are unpacked from the archives whose checksums torchvision ships.
UNPACKED_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class DataUnavailableError(ValueError):
    """The requested dataset is not available; the message lists what was tried."""


class CorruptDataError(DataUnavailableError):
    """A data file exists but is corrupt; there is no fallback to another dataset."""


@dataclass(frozen=True)
class DataSource:
    """A dataset that is available and verified.

    Attributes:
        name: `mnist`, `digits` or `fashion-mnist`, written to every row of every table; `own` where
            every benchmark is the user's.
        root: Folder of the files; None where the images are embedded in a package.
        checksum: Of the images and labels, so that tables say what they were computed on.
        note: One line for the user where the source isn't what they would expect, else "".
        files: Those of the user's own benchmarks, models and methods.
    """

    name: str
    root: str | None
    checksum: str
    note: str = ""
    files: tuple[OwnFile, ...] = ()


class ImageDataset(Dataset[Any]):
    """Grey images in memory, in torchvision's form: `data` [N, H, W], `targets` [N] int64.

    Items are (image [1, H, W] float32 in 0-1, class as int), as Avalanche's own `TensorMNIST`.
    """

    def __init__(self, data: Tensor, targets: Tensor, *, scale: float) -> None:
        self.data = data
        self.targets = targets
        self.scale = scale

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.data[index].float().unsqueeze(0) / self.scale, int(self.targets[index])

    def images(self) -> Tensor:
        """All images at once, [N, 1, H, W] in 0-1: bit for bit what the items hold."""
        return self.data.float().unsqueeze(1) / self.scale

    def part(self, indices: Sequence[int] | slice) -> ImageDataset:
        """The images at `indices`."""
        return ImageDataset(self.data[indices], self.targets[indices], scale=self.scale)


def find_data(dataset: str | None, data_root: str | None) -> DataSource:
    """Return the requested dataset, verified; by default MNIST, else the digits.

    Args:
        dataset: `mnist`, `digits`, `fashion-mnist`, or None for MNIST or else the digits.
        data_root: Folder that holds or gets `MNIST/raw/*.gz`; None for the environment variable
            `EWC_DATA_ROOT`, else the platform's cache folder.

    Returns:
        What was found.

    Raises:
        DataUnavailableError: What was asked for by name can't be had, or a file is corrupt.
    """
    if dataset == "digits":
        return _digits()
    root = Path(data_root or os.environ.get(DATA_ROOT_VARIABLE) or _cache_root()).expanduser()
    if dataset == "fashion-mnist":
        return find_fashion(root)
    try:
        return _mnist(root)
    except CorruptDataError:
        raise
    except DataUnavailableError as error:
        if dataset == "mnist":
            raise
        return _digits(
            note=f"MNIST is not at hand ({error}): this run uses scikit-learn's digits "
            "(8x8, 1,797 images) instead, and every row says dataset=digits."
        )


def own_data(files: tuple[OwnFile, ...]) -> DataSource:
    """The source of runs whose benchmarks are all the user's own."""
    checksum = hashlib.md5("".join(file.sha256 for file in files).encode()).hexdigest()
    return DataSource("own", None, checksum, files=files)


def load_images(source: DataSource) -> tuple[ImageDataset, ImageDataset]:
    """Training and test images of a verified source, in that order."""
    if source.name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = ImageDataset(
            torch.from_numpy(digits.images), torch.from_numpy(digits.target).long(), scale=16.0
        )
        n_train = len(images) - N_DIGITS_TEST
        return images.part(slice(0, n_train)), images.part(slice(n_train, None))
    if source.name == "fashion-mnist":
        pairs = (
            fashion.fashion_tensors(Path(source.root or ""), part) for part in ("train", "t10k")
        )
        train, test = (ImageDataset(*pair, scale=255.0) for pair in pairs)
        return train, test
    from avalanche.benchmarks.datasets.external_datasets.mnist import TensorMNIST

    sets = (TensorMNIST(root=source.root, train=train) for train in (True, False))
    train, test = (ImageDataset(s.data, s.targets, scale=255.0) for s in sets)
    return train, test


def split_validation(train: ImageDataset) -> tuple[ImageDataset, ImageDataset]:
    """Split off the last sixth of the training images as the validation set for λ."""
    n_fit = len(train) - round(len(train) * VALIDATION_FRACTION)
    return train.part(slice(0, n_fit)), train.part(slice(n_fit, None))


def _cache_root() -> Path:
    return Path(platformdirs.user_cache_dir("ewc-plugin"))


def _digits(note: str = "") -> DataSource:
    from sklearn.datasets import load_digits

    digits = load_digits()
    checksum = hashlib.md5(digits.images.tobytes() + digits.target.tobytes()).hexdigest()
    return DataSource("digits", None, checksum, note)


def _mnist(root: Path) -> DataSource:
    raw = root / "MNIST" / "raw"
    if not _unpacked(raw) and raw.is_dir() and not _writable(raw):
        root, raw = _copy_to_cache(raw)
    if not _unpacked(raw):
        _download(root, raw)
    bad = [name for name, md5 in UNPACKED_MD5.items() if not _intact(raw / name, md5)]
    if bad:
        raise CorruptDataError(
            f"`{raw}` holds a corrupt MNIST file ({', '.join(bad)}: wrong checksum); "
            "delete it and run again"
        )
    digest = hashlib.md5("".join(UNPACKED_MD5.values()).encode()).hexdigest()
    return DataSource("mnist", str(root), digest)


def find_fashion(root: Path) -> DataSource:
    """Fashion-MNIST, verified; downloaded where it is missing.

    Raises:
        DataUnavailableError: It can't be had, or a file is corrupt; with the remedy.
    """
    folder = fashion.folder_of(root)
    cause = fashion.download(root) if fashion.missing(root) and not fashion.corrupt(root) else ""
    if bad := fashion.corrupt(root):
        raise CorruptDataError(
            f"`{folder}` holds a corrupt file ({', '.join(bad)}: wrong checksum); delete it, and "
            f"{fashion.REMEDY}"
        )
    if fashion.missing(root):
        raise DataUnavailableError(
            f"looked in `{folder}` and the download failed: {cause}; {fashion.REMEDY}"
        )
    digest = hashlib.md5("".join(fashion.UNPACKED_MD5.values()).encode()).hexdigest()
    return DataSource("fashion-mnist", str(root), digest)


def _unpacked(raw: Path) -> bool:
    return all((raw / name).is_file() for name in UNPACKED_MD5)


def _archives() -> list[tuple[str, str]]:
    """MNIST's files and their MD5, as torchvision keeps them."""
    from torchvision.datasets import MNIST

    return list(MNIST.resources)


def _intact(file: Path, md5: str) -> bool:
    return file.is_file() and hashlib.md5(file.read_bytes()).hexdigest() == md5


def _writable(folder: Path) -> bool:
    """Whether the folder's mode allows writing, also for root."""
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


def _copy_to_cache(raw: Path) -> tuple[Path, Path]:
    """Copies intact archives from a read-only folder to where they may be unpacked."""
    cache = _cache_root()
    cache_raw = cache / "MNIST" / "raw"
    cache_raw.mkdir(parents=True, exist_ok=True)
    for name, md5 in _archives():
        if _intact(raw / name, md5) and not _intact(cache_raw / name, md5):
            shutil.copyfile(raw / name, cache_raw / name)
    return cache, cache_raw


def _download(root: Path, raw: Path) -> None:
    """Let torchvision fetch what is missing and unpack it, and turn its failures into one line.

    Raises:
        DataUnavailableError: With the folder, the first cause and the remedy.
    """
    from avalanche.benchmarks.datasets.external_datasets.mnist import TensorMNIST

    found = {n: _intact(raw / n, md5) for n, md5 in _archives() if (raw / n).exists()}
    present = [name if good else f"{name} with a wrong checksum" for name, good in found.items()]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        TensorMNIST(root=str(root), train=True, download=True)
    except Exception as error:  # torchvision lets through whatever the network layer raised
        cause = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        kind = DataUnavailableError if all(found.values()) else CorruptDataError
        raise kind(
            f"looked in `{raw}` (found {', '.join(present) or 'nothing'}) and the download failed: "
            f"{cause}; put the four MNIST .gz files there, or name their folder by --data-root "
            f"or {DATA_ROOT_VARIABLE}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
