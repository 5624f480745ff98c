"""Fashion-MNIST from archives at the data root, and clear errors where they are not."""

import gzip
import hashlib

import pytest
import torch

from experiments.__main__ import main
from experiments.data import fashion
from experiments.data.sources import CorruptDataError, find_data, load_images
from experiments.settings.run import RunSettings
from experiments.training.run import run

N = {"train": 120, "t10k": 40}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Small files in the format of the large ones."""
    folder = fashion.folder_of(tmp_path)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    md5 = {}
    for part, n in N.items():
        images = torch.randint(0, 256, (n, 784), generator=generator, dtype=torch.uint8)
        classes = (torch.arange(n) % 10).to(torch.uint8)
        for kind, header, values in (("images-idx3", 16, images), ("labels-idx1", 8, classes)):
            file = folder / f"{part}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(bytes(header) + values.numpy().tobytes()))
            md5[file.stem] = hashlib.md5(gzip.decompress(file.read_bytes())).hexdigest()
    monkeypatch.setattr(fashion, "UNPACKED_MD5", md5)
    monkeypatch.setattr(fashion, "download", lambda root: "no network")
    return tmp_path


def test_its_images_make_the_streams(root):
    source = find_data("fashion-mnist", str(root))
    train, test = load_images(source)
    assert (len(train), len(test)) == (120, 40)
    assert train.data.shape == (120, 28, 28)
    assert train.targets[:12].tolist() == [*range(10), 0, 1]
    for benchmark, scenario in (("split", "class"), ("permuted", "domain")):
        settings = RunSettings(benchmark, "fashion-mnist", scenario, "naive", 0, n_experiences=2)
        record = run(settings, source).record
        assert record["status"] == "ok", record["reason"]
        assert record["dataset"] == "fashion-mnist"


def test_a_missing_file_is_named_with_its_remedy(root, capsys):
    (fashion.folder_of(root) / "t10k-images-idx3-ubyte.gz").unlink()
    arguments = ["split-mnist", "--dataset", "fashion-mnist", "--data-root", str(root)]
    assert main([*arguments, "--methods", "naive"]) == 2
    error = capsys.readouterr().err
    assert "download failed: no network" in error
    assert "dataset-fashion-mnist" in error


def test_a_corrupt_file_is_named(root):
    (fashion.folder_of(root) / "train-labels-idx1-ubyte.gz").write_bytes(b"nothing")
    with pytest.raises(CorruptDataError, match="train-labels-idx1-ubyte.gz: wrong checksum"):
        find_data("fashion-mnist", str(root))
