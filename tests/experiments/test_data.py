"""Where the images come from, with and without MNIST at hand; no test here uses the network."""

import gzip
import hashlib
import struct

import numpy as np
import pytest
import torch
from avalanche.benchmarks.classic import PermutedMNIST, RotatedMNIST
from avalanche.benchmarks.datasets.external_datasets.mnist import TensorMNIST

from experiments.data import sources as data
from experiments.data.sources import DataUnavailableError, find_data, load_images
from experiments.data.streams import make_stream
from experiments.settings.run import RunSettings


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No mirror to download from, and a cache folder of its own."""
    monkeypatch.setattr(TensorMNIST, "mirrors", ["file:///nowhere/"])
    monkeypatch.setattr(data, "_cache_root", lambda: tmp_path / "cache")
    monkeypatch.delenv(data.DATA_ROOT_VARIABLE, raising=False)


@pytest.fixture
def archives(monkeypatch, tmp_path):
    """Archives in MNIST's format with images of noise, whose checksums count as MNIST's."""
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    packed, unpacked = [], {}
    for part, n in (("train", 120), ("t10k", 30)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = np.arange(n, dtype=np.uint8) % 10
        for kind, content in (
            ("images-idx3", struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes()),
            ("labels-idx1", struct.pack(">II", 2049, n) + labels.tobytes()),
        ):
            name = f"{part}-{kind}-ubyte"
            unpacked[name] = hashlib.md5(content).hexdigest()
            archive = gzip.compress(content)
            (raw / f"{name}.gz").write_bytes(archive)
            packed.append((f"{name}.gz", hashlib.md5(archive).hexdigest()))
    monkeypatch.setattr(data, "UNPACKED_MD5", unpacked)
    monkeypatch.setattr(data, "_archives", lambda: packed)
    monkeypatch.setattr(TensorMNIST, "resources", packed)
    return raw


def test_without_mnist_the_default_is_the_digits_and_says_so(tmp_path):
    source = find_data(None, str(tmp_path))
    assert source.name == "digits"
    assert str(tmp_path) in source.note
    assert "dataset=digits" in source.note


def test_mnist_by_name_fails_where_it_cannot_be_had(tmp_path):
    with pytest.raises(DataUnavailableError) as error:
        find_data("mnist", str(tmp_path))
    for part in (str(tmp_path), "download failed", "--data-root", "EWC_DATA_ROOT"):
        assert part in str(error.value)


def test_archives_are_unpacked_where_they_lie(archives):
    root = archives.parent.parent
    assert find_data("mnist", str(root)).root == str(root)
    train, test = load_images(find_data("mnist", str(root)))
    assert (len(train), len(test)) == (120, 30)
    assert train.images().shape == (120, 1, 28, 28)
    assert torch.equal(train.images()[7], train[7][0])


def test_the_environment_variable_names_the_root(archives, monkeypatch):
    monkeypatch.setenv(data.DATA_ROOT_VARIABLE, str(archives.parent.parent))
    assert find_data(None, None).name == "mnist"


def test_a_read_only_root_is_left_as_it_is(archives, tmp_path):
    archives.chmod(0o555)
    try:
        source = find_data("mnist", str(archives.parent.parent))
    finally:
        archives.chmod(0o755)
    assert source.root == str(tmp_path / "cache")
    assert sorted(p.suffix for p in archives.iterdir()) == [".gz"] * 4


def test_a_damaged_file_is_named(archives):
    root = str(archives.parent.parent)
    find_data("mnist", root)
    with (archives / "train-labels-idx1-ubyte").open("r+b") as file:
        file.seek(20)
        file.write(b"\x63")
    with pytest.raises(DataUnavailableError, match=r"train-labels-idx1-ubyte: wrong checksum"):
        find_data("mnist", root)


def test_a_damaged_archive_is_named(archives):
    (archives / "t10k-labels-idx1-ubyte.gz").write_bytes(b"not this")
    with pytest.raises(DataUnavailableError, match=r"t10k-labels-idx1-ubyte.gz with a wrong"):
        find_data("mnist", str(archives.parent.parent))


@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize(
    ("benchmark", "scenario"),
    [("split", "task"), ("split", "domain"), ("split", "class"), ("permuted", "task")],
)
@pytest.mark.parametrize("dataset", ["mnist", "digits"])
def test_samples_are_those_of_avalanches_stream(archives, dataset, benchmark, scenario, validation):
    source = find_data(dataset, str(archives.parent.parent))
    settings = RunSettings(benchmark, dataset, scenario, "naive", 3, validation=validation)
    stream = make_stream(settings, source)
    for avalanche_stream in (stream.benchmark.train_stream, stream.benchmark.test_stream):
        for experience in avalanche_stream:
            x, y = stream.samples(experience.origin_stream.name, experience.current_experience)
            items = list(experience.dataset)
            assert torch.equal(torch.stack([item[0] for item in items]), x[:])
            assert [item[1] for item in items] == y.tolist()
            assert {item[2] for item in items} == {experience.task_label}


@pytest.mark.parametrize("seed", [0, 7])
def test_rotated_images_are_those_of_avalanches_own_stream(archives, seed):
    source = find_data("mnist", str(archives.parent.parent))
    theirs = RotatedMNIST(3, seed=seed, dataset_root=source.root)
    ours = make_stream(RunSettings("rotated", "mnist", "domain", "naive", seed), source)
    # The seed draws an angle per experience: the first three are those of a stream of three.
    for name in ("train", "test"):
        for experience in getattr(theirs, f"{name}_stream"):
            images, classes = ours.samples(name, experience.current_experience)
            items = [experience.dataset[i][:2] for i in range(len(experience.dataset))]
            assert torch.equal(images[:], torch.stack([x for x, _ in items]))
            assert classes.tolist() == [y for _, y in items]
            own = getattr(ours.benchmark, f"{name}_stream")[experience.current_experience].dataset
            assert torch.equal(images[5], own[5][0])


@pytest.mark.parametrize("scenario", ["domain", "task"])
def test_permuted_images_are_those_of_avalanches_own_stream(archives, scenario):
    """Also where Avalanche's set of an experience's classes is not in ascending order."""
    source = find_data("mnist", str(archives.parent.parent))
    theirs = PermutedMNIST(11, seed=5, return_task_id=scenario == "task", dataset_root=source.root)
    ours = make_stream(
        RunSettings("permuted", "mnist", scenario, "naive", 5, n_experiences=11), source
    )
    for name in ("train", "test"):
        streams = (getattr(one, f"{name}_stream") for one in (ours.benchmark, theirs))
        for own, other in zip(*streams, strict=True):
            for attribute in ("current_experience", "task_label", "task_labels"):
                assert getattr(own, attribute) == getattr(other, attribute)
            assert set(own.classes_in_this_experience) == set(other.classes_in_this_experience)
            assert list(own.dataset.targets) == list(other.dataset.targets)
            assert own.dataset.targets_task_labels.uniques == {other.task_label}
            for i in range(len(other.dataset)):
                (x, y, task), (their_x, their_y, their_task) = own.dataset[i], other.dataset[i]
                assert (y, task) == (their_y, their_task)
                assert torch.equal(x, their_x)
