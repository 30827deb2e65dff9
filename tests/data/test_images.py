"""data=images: folders, archives, decoding, augmentation, and refused files."""

import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.data import datasets
from trainer.data.archives import open_files
from trainer.data.checked import CheckedSplit
from trainer.data.datasets import DatasetSplit
from trainer.data.images import images
from trainer.data.pixels import Pixels
from trainer.errors import RunError

PLAIN = {"mean": [0, 0, 0], "std": [1, 1, 1]}


def picture(number, width=8, height=8, form="PNG"):
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue(), torch.from_numpy(pixels)


def contents(count=6, **options):
    """Files of two classes by name."""
    return {
        f"{kind}/{number}.png": picture(number + offset, **options)[0]
        for offset, kind in ((0, "cat"), (100, "dog"))
        for number in range(count)
    }


def as_folder(path, files):
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return path


def as_zip(path, files, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def as_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def read(split, epoch=None, order=None):
    order = [torch.arange(len(split))] if order is None else order
    batches = list(split.batches(order, epoch))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


@pytest.fixture
def root(tmp_path):
    """A folder with train in a zip with a folder of its own, validation in a tar, and test."""
    files = contents()
    as_zip(tmp_path / "train.zip", {f"train/{name}": c for name, c in files.items()})
    as_tar(tmp_path / "val.tar", files)
    as_folder(tmp_path / "test", files)
    return tmp_path


def test_folders_and_archives_hold_the_same_images(root):
    splits = images(str(root), **PLAIN)
    inputs, targets = read(splits.test)
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs[7], picture(101)[1].permute(2, 0, 1) / 255)
    assert targets.tolist() == [0] * 6 + [1] * 6
    for split in (splits.train, splits.validation):
        assert torch.equal(read(split)[0], inputs)
        assert torch.equal(read(split)[1], targets)


def test_deflated_and_pickled_archives(tmp_path):
    path = as_zip(tmp_path / "a.zip", {"a.bin": b"x" * 1000, "b.bin": b"y"}, zipfile.ZIP_DEFLATED)
    files = open_files(path)
    assert files(0) == b"x" * 1000
    again = pickle.loads(pickle.dumps(files))
    assert (again(1), again.path(1)) == (b"y", f"{path}: b.bin")


def test_a_damaged_archive_is_refused(tmp_path):
    path = as_zip(tmp_path / "a.zip", {"a.bin": b"x" * 100})
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="its checksum does not match"):
        open_files(path)(0)
    (tmp_path / "b.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"b\.zip: it cannot be read"):
        open_files(tmp_path / "b.zip")


def test_parts_are_held_out_without_augmentation_and_the_same_for_every_seed(tmp_path):
    as_folder(tmp_path, contents(count=10))
    one, other = (images(str(tmp_path), flip=True, seed=seed, **PLAIN) for seed in (0, 1))
    assert [len(s) for s in (one.train, one.validation, one.test)] == [16, 2, 2]
    assert torch.equal(read(one.test, epoch=0)[0], read(other.test)[0])
    seen = torch.cat([read(split)[0] for split in vars(one).values()])
    plain = torch.stack([x for s in vars(other).values() for x in read(s)[0]])
    assert len({x.sum().item() for x in seen}) == len({x.sum().item() for x in plain}) == 20


def test_webdataset_shards(tmp_path):
    for shard in range(2):
        files = {}
        for number in range(3):
            key = f"{shard}{number}"
            files |= {f"{key}.png": picture(number)[0], f"{key}.cls": f"{number}\n".encode()}
        as_tar(tmp_path / f"train-{shard}.tar", files)
    splits = images(str(tmp_path), hold_out=0.2, **PLAIN)
    assert sorted(s for split in vars(splits).values() for s in read(split)[1].tolist()) == [
        0, 0, 1, 1, 2, 2,
    ]  # fmt: skip
    as_tar(tmp_path / "train-2.tar", {"9.png": picture(1)[0], "9.cls": b"cat"})
    with pytest.raises(ValueError, match=r"9\.cls: it must hold the number of a class"):
        images(str(tmp_path))


def test_augmentation_depends_on_seed_epoch_and_image_alone(root):
    options = {"pad": 2, "flip": True}
    splits = [images(str(root), seed=seed, **options) for seed in (3, 3, 4)]
    order = torch.randperm(12)
    first = read(splits[0].train, 1)[0]
    again = read(splits[1].train, 1, order.split(5))[0]
    assert torch.equal(first[order], again)
    assert not torch.equal(first, read(splits[0].train, 2)[0])
    assert not torch.equal(first, read(splits[2].train, 1)[0])


@pytest.mark.integration
def test_loader_processes_read_the_same(root):
    one = images(str(root), size=6, resize=7, pad=1, flip=True)
    two = images(str(root), size=6, resize=7, pad=1, flip=True, loader_workers=1)
    assert torch.equal(read(one.train, 0)[0], read(two.train, 0)[0])


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"size": 4}, (4, 4)),
        ({"size": 12, "resize": 16}, (12, 12)),
        ({"size": 5, "area": [0.2, 0.5]}, (5, 5)),
        ({"size": 4, "channels": 1}, (4, 4)),
    ],
)
def test_sizes(settings, shape, tmp_path):
    as_folder(tmp_path, contents(width=9, height=6) | {"dog/x.jpg": picture(1, 40, 30, "JPEG")[0]})
    splits = images(str(tmp_path), **settings)
    for split, epoch in ((splits.train, 0), (splits.test, None)):
        inputs, _ = read(split, epoch)
        assert inputs.shape[1:] == (settings.get("channels", 3), *shape)


def test_the_center_is_evaluated_and_half_of_the_images_are_mirrored():
    content, pixels = picture(1, 9, 6)
    assert torch.equal(Pixels(3, None, None, None, 0, True, False)(content), pixels)
    center = Pixels(3, 4, 6, None, 0, False, False)(content)
    assert torch.equal(center, pixels[1:5, 2:6])
    flip = Pixels(3, None, None, None, 0, True, True)
    mirrored = sum(torch.equal(flip(content), pixels.flip(1)) for _ in range(200))
    assert 60 < mirrored < 140


class Halves:
    """A transform of one's own, as torchvision's are."""

    def __call__(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 2


def test_transforms_of_ones_own(root):
    splits = images(str(root), train_transform=Halves(), transform=Halves())
    assert torch.equal(read(splits.train, 0)[0], read(splits.test)[0])
    assert torch.equal(read(splits.test)[0][0], picture(0)[1].permute(2, 0, 1) / 2)
    with pytest.raises(ValueError, match="give both"):
        images(str(root), transform=Halves())


def test_a_bad_image_is_named(root):
    (root / "test" / "cat" / "3.png").write_bytes(b"GIF89a and no more")
    split = CheckedSplit(images(str(root)).test, "test", lambda targets: None)
    with pytest.raises(RunError, match=r"test sample 3: .*test/cat/3\.png cannot be read as an im"):
        read(split)
    content = picture(1, 64, 64, "JPEG")[0]
    (root / "test" / "cat" / "3.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match=r"cat/3\.png cannot be read as an image: .*truncated"):
        read(split)


def test_images_of_other_sizes_are_named_with_what_to_do(root):
    (root / "test" / "dog" / "0.png").write_bytes(picture(1, 9, 9)[0])
    with pytest.raises(RunError, match=r"sample 6: its inputs have the shape \[9, 9, 3\]"):
        read(CheckedSplit(images(str(root)).test, "test", lambda targets: None))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"channels": 2}, r"data\.channels=2: it must be 3"),
        ({"size": 8, "resize": 4}, r"data\.resize=4: it must be at least data\.size"),
        ({"resize": 4}, r"data\.resize=4: it must be at least data\.size"),
        ({"area": [0.5, 1]}, r"data\.area: it needs data\.size"),
        ({"size": 4, "area": [0.5, 2]}, r"data\.area=\[0\.5, 2\]: it must be a range"),
        ({"pad": -1}, r"data\.pad=-1"),
        ({"std": [1, 0, 1]}, r"data\.std=\[1, 0, 1\]: it must be 3 numbers"),
        ({"validation": "nowhere"}, "nowhere: there is no such file or folder"),
        ({"root": "nowhere"}, r"data\.root=nowhere: there is no such file or folder"),
    ],
)
def test_wrong_settings(root, settings, said):
    with pytest.raises(ValueError, match=said):
        images(**{"root": str(root), **settings})


def test_wrong_folders(tmp_path):
    with pytest.raises(ValueError, match="there are no images in"):
        images(str(as_folder(tmp_path / "a", {"cat/readme.txt": b""})))
    with pytest.raises(ValueError, match=r"1\.png is in no folder"):
        images(str(as_folder(tmp_path / "b", {"1.png": b"", "cat/1.png": b""})))
    as_folder(tmp_path / "c" / "train", contents())
    as_folder(tmp_path / "c" / "test", {"bird/1.png": b""})
    with pytest.raises(ValueError, match="has the class 'bird', which the training images do not"):
        images(str(tmp_path / "c"))


def test_targets_are_listed(root):
    split = images(str(root)).train
    assert isinstance(split, DatasetSplit)
    assert split.listed_targets().tolist() == [0] * 6 + [1] * 6


def test_loader_processes_are_chosen_by_spare_cpus_and_cost(root, monkeypatch):
    def chosen(spare, cost):
        monkeypatch.setattr(datasets, "spare_cpus", lambda: spare)
        monkeypatch.setattr(datasets, "_PROCESS_S", cost)
        return images(str(root)).train.loader_workers

    assert (chosen(0, 0), chosen(3, 0), chosen(99, 0), chosen(3, 60)) == (0, 3, 8, 0)
