"""Fashion-MNIST: its four archives in torchvision's layout, read without being unpacked."""

from __future__ import annotations

import gzip
import hashlib
import socket
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DOWNLOAD_TIMEOUT_S = 20.0
REMEDY = (
    "put the four Fashion-MNIST .gz files there (Debian's package dataset-fashion-mnist has them "
    "in /usr/share/datasets/fashion-mnist), or name the folder above FashionMNIST by --data-root"
)


# Of the unpacked files: Debian packs them in another way than the archives of torchvision.
UNPACKED_MD5 = {
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
}


def folder_of(root: Path) -> Path:
    """Where the archives are under a data root."""
    return root / "FashionMNIST" / "raw"


def missing(root: Path) -> list[str]:
    """The names of the archives that are not there."""
    names = [f"{name}.gz" for name in UNPACKED_MD5]
    return [name for name in names if not (folder_of(root) / name).is_file()]


def corrupt(root: Path) -> list[str]:
    """The names of archives that are there with other content."""
    found = [(folder_of(root) / f"{name}.gz", md5) for name, md5 in UNPACKED_MD5.items()]
    return [path.name for path, md5 in found if path.is_file() and _md5(path) != md5]


def _md5(archive: Path) -> str:
    """The checksum of the content; "" where it can't be unpacked."""
    try:
        return hashlib.md5(gzip.decompress(archive.read_bytes())).hexdigest()
    except (OSError, EOFError, zlib.error):
        return ""


def download(root: Path) -> str:
    """Lets torchvision fetch what is missing; returns why it could not, "" where it could."""
    from torchvision.datasets import FashionMNIST

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        FashionMNIST(root=str(root), train=True, download=True)
    except Exception as error:  # torchvision lets through whatever the network layer raised
        return (str(error).strip().splitlines() or [repr(error)])[-1]
    finally:
        socket.setdefaulttimeout(timeout)
    return ""


def fashion_tensors(root: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images [N, 28, 28] uint8 and classes [N] int64 of a part, `train` or `t10k`."""
    images = _values(folder_of(root) / f"{part}-images-idx3-ubyte.gz", header=16)
    classes = _values(folder_of(root) / f"{part}-labels-idx1-ubyte.gz", header=8)
    return images.view(-1, 28, 28), classes.long()


def _values(archive: Path, header: int) -> Tensor:
    """The bytes of a file in the IDX format, after its header."""
    with gzip.open(archive) as file:
        content = file.read()
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy())
