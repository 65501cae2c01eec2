"""DATA specs: every kind read back from small files made here, and every way of getting it wrong."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from recorder import Recorder

from anncvt import data
from anncvt.data import augment, native_size, open_images, parse_spec, read_image
from anncvt.errors import AnncvtError
from anncvt.program import Preprocess

RGB = Preprocess((3, 8, 8), (0.5, 0.25, 0.125), (0.5, 0.25, 2.0))
GREY = Preprocess((1, 8, 8), (0.5,), (0.5,))


def colour(number: int) -> tuple[int, int, int]:
    """A colour that tells pictures apart after decoding."""
    return (number * 7 % 256, number * 13 % 256, number * 29 % 256)


def png(number: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour(number)).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def write_png(path: Path, number: int, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(number, size))


def numbers(images: data.Images) -> list[tuple[int, int, int]]:
    """The colour of every picture (all are of one colour)."""
    assert images.pixels.dtype == torch.uint8
    assert (images.pixels == images.pixels[:, :, :1, :1]).all()
    return [tuple(pixel) for pixel in images.pixels[:, :, 0, 0].tolist()]


def write_parquet(path: Path, rows: list[tuple[int, int]], image: str = "img", label: str = "label") -> None:
    """``rows`` of (picture number, label), three to a row group, with class names as Hugging Face stores them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f"class {i}" for i in range(10)]
    features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
    table = pa.table(
        {
            image: pa.array([{"bytes": png(n), "path": f"{n}.png"} for n, _ in rows]),
            label: pa.array([c for _, c in rows], pa.int64()),
        }
    )
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=3)


def error_of(spec: str, split: str = "train", preprocess: Preprocess = RGB, **options: object) -> AnncvtError:
    with pytest.raises(AnncvtError) as caught:
        open_images(spec, split, preprocess, **options)
    assert caught.value.fix
    return caught.value


# --- specs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("digits", ("digits", "")),
        ("hf:a/b", ("hf", "a/b")),
        ("folder:C:\\x", ("folder", "C:\\x")),
        ("wds:a*", ("wds", "a*")),
    ],
)
def test_specs_are_parsed(spec, parsed):
    assert parse_spec(spec) == parsed


@pytest.mark.parametrize(
    ("spec", "words"),
    [("cifar11", "fashion-mnist"), ("hf", "hf:PATH"), ("hf:", "hf:PATH"), ("digits:3", "write digits")],
)
def test_wrong_specs_say_what_to_write(spec, words):
    with pytest.raises(AnncvtError) as caught:
        parse_spec(spec)
    assert words in caught.value.fix


def test_a_bare_folder_is_told_its_spelling(tmp_path):
    assert f"folder:{tmp_path}" in error_of(str(tmp_path)).fix


# --- digits and synthetic ------------------------------------------------------------------------------------------


def test_digits_are_split_the_same_everywhere():
    train, test = open_images("digits", "train", GREY), open_images("digits", "test", GREY)
    assert (len(train), len(test)) == (1297, 500)
    assert test.labels.bincount().tolist() == [50, 51, 49, 51, 50, 51, 50, 50, 48, 50]
    assert test.labels[:12].tolist() == open_images("digits", "test", GREY, seed=5).labels[:12].tolist()
    assert not train.flip
    assert train.classes == list("0123456789")
    # At 8x8 nothing is resized, so a picture in both halves would be found.
    seen = {row.numpy().tobytes() for row in train.pixels}
    assert sum(row.numpy().tobytes() in seen for row in test.pixels) == 0


def test_digits_are_upscaled_and_replicated():
    small = open_images("digits", "test", GREY)
    large = open_images("digits", "test", Preprocess((3, 16, 16), (0.5,), (0.5,)))
    assert large.pixels.shape == (500, 3, 16, 16)
    assert (large.pixels[:, 0] == large.pixels[:, 2]).all()
    # Averaged back to 8x8 it is the same picture, a little softer.
    halved = torch.nn.functional.avg_pool2d(large.pixels[:, :1].float(), 2)
    assert torch.stack([halved.flatten(), small.pixels.flatten().float()]).corrcoef()[0, 1] > 0.97


def test_synthetic_depends_on_seed_and_split_alone():
    first = open_images("synthetic", "train", RGB, limit=20)
    assert len(first) == 20
    assert first.pixels.equal(open_images("synthetic", "train", RGB, limit=20).pixels)
    assert not first.pixels.equal(open_images("synthetic", "train", RGB, limit=20, seed=1).pixels)
    assert not first.pixels.equal(open_images("synthetic", "test", RGB, limit=20).pixels)
    assert first.labels.bincount().tolist() == [2] * 10


@pytest.mark.parametrize("size", [(1, 20), (5, 6, 7), (2, 3, 4, 5)])
def test_synthetic_has_every_shape(size):
    preprocess = Preprocess(size, (0.5,), (0.25,) * size[0])
    images = open_images("synthetic", "train", preprocess, limit=4)
    assert images.batch(torch.arange(4), preprocess).shape == (4, *size)
    assert "x".join(map(str, size)) in error_of("digits", "train", preprocess).what


# --- parquet -------------------------------------------------------------------------------------------------------


def test_parquet_over_files_and_row_groups_in_order(tmp_path):
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", [(i, i % 3) for i in range(7)])
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", [(i, i % 3) for i in range(7, 11)])
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", [(50, 9)])
    train = open_images(f"hf:{tmp_path}", "train", RGB)
    assert numbers(train) == [colour(i) for i in range(11)]
    assert train.labels.tolist() == [i % 3 for i in range(11)]
    assert train.classes[2] == "class 2"
    test = open_images(f"hf:{tmp_path}", "test", RGB)
    assert (numbers(test), test.labels.tolist()) == ([colour(50)], [9])


def test_limit_is_a_seeded_sample_with_its_labels(tmp_path):
    write_parquet(tmp_path / "train.parquet", [(i, i // 4) for i in range(40)])
    first = open_images(f"hf:{tmp_path}", "train", RGB, limit=12)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:12].tolist()
    assert numbers(first) == [colour(i) for i in order]
    assert first.labels.tolist() == [i // 4 for i in order]
    longer = open_images(f"hf:{tmp_path}", "train", RGB, limit=1000)
    assert (len(longer), numbers(longer)[:12]) == (40, numbers(first))
    assert numbers(open_images(f"hf:{tmp_path}", "train", RGB, limit=12, seed=1)) != numbers(first)


@pytest.mark.parametrize(("image", "label"), [("image", "labels"), ("img", "fine_label")])
def test_parquet_column_names(tmp_path, image, label):
    write_parquet(tmp_path / "validation-0.parquet", [(1, 4)], image, label)
    images = open_images(f"hf:{tmp_path}", "test", RGB)
    assert (images.labels.tolist(), images.classes[4]) == ([4], "class 4")


def test_hidden_test_labels_fall_back_to_validation(tmp_path):
    write_parquet(tmp_path / "test-0.parquet", [(1, -1), (2, -1)])
    assert "-1" in error_of(f"hf:{tmp_path}", "test").what
    write_parquet(tmp_path / "validation-0.parquet", [(3, 5)])
    assert open_images(f"hf:{tmp_path}", "test", RGB).labels.tolist() == [5]
    unlabelled = open_images(f"hf:{tmp_path}", "test", RGB, labelled=False)
    assert (len(unlabelled), unlabelled.labels, unlabelled.classes) == (2, None, None)


def test_parquet_errors_name_the_way_out(tmp_path):
    assert "hf download someone/cats" in error_of("hf:someone/cats").fix
    assert "folder:" in error_of(f"hf:{tmp_path}").fix
    write_parquet(tmp_path / "train-0.parquet", [(1, 0)])
    missing = error_of(f"hf:{tmp_path}", "test")
    assert "there is train" in missing.what
    (tmp_path / "test-0.parquet").write_bytes(b"PAR1 no longer")
    assert "test-0.parquet" in error_of(f"hf:{tmp_path}", "test").where
    write_parquet(tmp_path / "other/train-0.parquet", [(1, 0)])
    assert "hf:" in error_of(f"hf:{tmp_path}").fix


def test_parquet_columns_that_do_not_fit(tmp_path):
    write_parquet(tmp_path / "a/train.parquet", [(1, 0)], "photo")
    assert "photo" in error_of(f"hf:{tmp_path}/a").what
    write_parquet(tmp_path / "b/train.parquet", [(1, 0)], label="kind")
    assert "kind" in error_of(f"hf:{tmp_path}/b").what
    assert len(open_images(f"hf:{tmp_path}/b", "train", RGB, labelled=False)) == 1
    table = pa.table({"img": [{"bytes": png(1), "path": "x"}, {"bytes": None, "path": "y"}], "label": ["cat", "dog"]})
    (tmp_path / "c").mkdir()
    pq.write_table(table, tmp_path / "c/train.parquet")
    assert "no class numbers" in error_of(f"hf:{tmp_path}/c").what
    assert "row 1" in error_of(f"hf:{tmp_path}/c", labelled=False).where


# --- folders -------------------------------------------------------------------------------------------------------


def test_folder_with_splits(tmp_path):
    for number, name in enumerate(["cat", "dog", "owl"]):
        write_png(tmp_path / "train" / name / "a.png", number)
        write_png(tmp_path / "train" / name / "deep" / "b.PNG", number + 10)
    write_png(tmp_path / "val/owl/c.png", 30)
    train = open_images(f"folder:{tmp_path}", "train", RGB)
    assert numbers(train) == [colour(i) for i in (0, 10, 1, 11, 2, 12)]
    assert (train.labels.tolist(), train.classes) == ([0, 0, 1, 1, 2, 2], ["cat", "dog", "owl"])
    # The held-out split has owls alone; they keep the number that training gave them.
    test = open_images(f"folder:{tmp_path}", "test", RGB)
    assert (test.labels.tolist(), test.classes) == ([2], ["cat", "dog", "owl"])
    write_png(tmp_path / "val/yak/d.png", 31)
    assert "'yak'" in error_of(f"folder:{tmp_path}", "test").what


def test_imagenet_lies_under_the_data_folder(tmp_path):
    write_png(tmp_path / "imagenet/train/n01/a.png", 1)
    write_png(tmp_path / "imagenet/val/n01/b.png", 2)
    assert numbers(open_images("imagenet", "test", RGB, data_dir=tmp_path)) == [colour(2)]
    assert "--data-dir" in error_of("imagenet").fix


def test_folder_of_classes_is_divided_by_hash(tmp_path):
    for number in range(60):
        write_png(tmp_path / "ab"[number % 2] / f"{number}.png", number)
    train = open_images(f"folder:{tmp_path}", "train", RGB)
    test = open_images(f"folder:{tmp_path}", "test", RGB)
    assert not set(numbers(train)) & set(numbers(test))
    assert len(train) + len(test) == 60
    assert 4 <= len(test) <= 24
    before = set(numbers(test))
    for number in range(60, 70):
        write_png(tmp_path / "a" / f"{number}.png", number)
    assert before <= set(numbers(open_images(f"folder:{tmp_path}", "test", RGB)))


def test_a_class_may_be_called_train(tmp_path):
    for number in range(30):
        write_png(tmp_path / "train" / f"{number}.png", number)
        write_png(tmp_path / "car" / f"{number}.png", 100 + number)
    assert open_images(f"folder:{tmp_path}", "train", RGB).classes == ["car", "train"]


def test_flat_folder_is_unlabelled_only(tmp_path):
    for number in range(3):
        write_png(tmp_path / f"{number}.png", number)
    (tmp_path / "notes.txt").write_text("not a picture")
    assert "no class folder" in error_of(f"folder:{tmp_path}").what
    for split in ("train", "test"):
        images = open_images(f"folder:{tmp_path}", split, RGB, labelled=False)
        assert numbers(images) == [colour(i) for i in range(3)]


def test_folder_errors(tmp_path):
    assert "no such folder" in error_of(f"folder:{tmp_path}/none").what
    assert "no pictures" in error_of(f"folder:{tmp_path}").what
    write_png(tmp_path / "train/a/1.png", 1)
    missing = error_of(f"folder:{tmp_path}", "test")
    assert "there is train" in missing.what
    (tmp_path / "train/a/2.jpg").write_bytes(b"\xff\xd8\xff broken")
    assert error_of(f"folder:{tmp_path}").where.endswith("2.jpg")


@pytest.mark.parametrize("broken", [0, 700])
def test_many_pictures_are_decoded_by_threads(tmp_path, broken):
    (tmp_path / "train").mkdir()
    for number in range(700):
        write_png(tmp_path / "train" / f"{number:03}.png", number)
    if not broken:
        images = open_images(f"folder:{tmp_path}", "train", RGB, labelled=False, workers=3)
        assert numbers(images) == [colour(i) for i in range(700)]
        return
    (tmp_path / "train/333.png").write_bytes(png(333)[:-20])
    assert error_of(f"folder:{tmp_path}", labelled=False, workers=3).where.endswith("333.png")


# --- shards --------------------------------------------------------------------------------------------------------


def write_shard(path: Path, samples: list[tuple[str, int, int | None]], mode: str = "w") -> None:
    with tarfile.open(path, mode) as shard:
        for key, number, label in samples:
            members = {f"{key}.png": png(number)}
            if label is not None:
                members[f"{key}.cls"] = str(label).encode()
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))


def test_shards_by_split_name(tmp_path):
    write_shard(tmp_path / "x-train-00.tar", [("a", 1, 4), ("b", 2, 5)])
    write_shard(tmp_path / "x-train-01.tar", [("a", 3, 6)])
    write_shard(tmp_path / "x-val-00.tar", [("a", 4, 7)])
    for pattern in ("*.tar", "x-{train,val}-{00..01}.tar"):
        train = open_images(f"wds:{tmp_path}/{pattern}", "train", RGB)
        assert (numbers(train), train.labels.tolist()) == ([colour(i) for i in (1, 2, 3)], [4, 5, 6])
        assert open_images(f"wds:{tmp_path}/{pattern}", "test", RGB).labels.tolist() == [7]
    assert "there is train" in error_of(f"wds:{tmp_path}/x-train*", "test").what


def test_shards_without_split_names_are_divided(tmp_path):
    write_shard(tmp_path / "0.tar", [(f"{i:03}", i, 0) for i in range(40)])
    train, test = (open_images(f"wds:{tmp_path}/*.tar", split, RGB) for split in ("train", "test"))
    assert not set(numbers(train)) & set(numbers(test))
    assert (len(train) + len(test), len(test) > 0) == (40, True)


def test_shard_errors(tmp_path):
    assert "no such shards" in error_of(f"wds:{tmp_path}/*.tar").what
    write_shard(tmp_path / "train-0.tar", [("a", 1, None)])
    assert "a.cls" in error_of(f"wds:{tmp_path}/*.tar").what
    assert len(open_images(f"wds:{tmp_path}/*.tar", "train", RGB, labelled=False)) == 1
    write_shard(tmp_path / "train-1.tgz", [("a", 1, 0)], "w:gz")
    assert "uncompressed" in error_of(f"wds:{tmp_path}/*.tgz").what


# --- data sets under --data-dir ------------------------------------------------------------------------------------


def write_cifar(folder: Path, name: str, labels: list[int], key: str, first: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = [np.repeat(np.array(colour(first + i), np.uint8), 1024) for i in range(len(labels))]
    with open(folder / name, "wb") as file:
        pickle.dump({"data": np.stack(pixels), key: labels}, file, protocol=2)


def test_cifar10(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    for batch in range(5):
        write_cifar(folder, f"data_batch_{batch + 1}", [batch, 9], "labels", 2 * batch)
    write_cifar(folder, "test_batch", [3], "labels", 20)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, 2))
    train = open_images("cifar10", "train", Preprocess((3, 32, 32), (0.0,), (1.0,)), data_dir=tmp_path)
    assert numbers(train) == [colour(i) for i in range(10)]
    assert (train.labels.tolist(), train.classes[9]) == ([0, 9, 1, 9, 2, 9, 3, 9, 4, 9], "j")
    assert open_images("cifar10", "test", RGB, data_dir=tmp_path).pixels.shape == (1, 3, 8, 8)
    assert native_size("cifar10", tmp_path) == (3, 32, 32)


def test_cifar100_takes_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    write_cifar(folder, "test", [99, 5], "fine_labels")
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}, 2))
    images = open_images("cifar100", "test", RGB, data_dir=tmp_path)
    assert (images.labels.tolist(), len(images.classes)) == ([99, 5], 100)
    assert error_of("cifar100", "train", data_dir=tmp_path).where.endswith("train")


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_hostile_cifar_pickle_is_not_run(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": _Hostile(tmp_path / "owned")}))
    assert "mkdir" in error_of("cifar10", data_dir=tmp_path).what
    assert not (tmp_path / "owned").exists()


def test_cifar_files_that_do_not_fit(tmp_path):
    assert "cs.toronto.edu" in error_of("cifar10", data_dir=tmp_path).fix
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "meta").write_bytes(pickle.dumps({}))
    for content in (
        {"data": np.zeros((2, 9), np.uint8)},
        {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [1]},
        [1],
    ):
        (folder / "train").write_bytes(pickle.dumps(content, 2))
        assert "damaged" in error_of("cifar100", data_dir=tmp_path).what
    (folder / "train").write_bytes(b"\x80\x02")
    assert "damaged" in error_of("cifar100", data_dir=tmp_path).what


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


@pytest.mark.parametrize(("spec", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_layout(tmp_path, spec, folder):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 28, 28), np.uint8)
    (raw / "t10k-images-idx3-ubyte").write_bytes(idx(pixels))
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.array([3, 1, 9, 0], np.uint8))))
    images = open_images(spec, "test", Preprocess((1, 28, 28), (0.0,), (1.0,)), data_dir=tmp_path)
    assert (images.pixels.numpy() == pixels[:, None]).all()
    assert images.labels.tolist() == [3, 1, 9, 0]
    assert images.flip == (spec == "fashion-mnist")
    assert len(images.classes) == 10
    assert "train-images" in error_of(spec, data_dir=tmp_path).what
    for kind in ("images-idx3", "labels-idx1"):
        source = next(raw.glob(f"t10k-{kind}-ubyte*"))
        (raw / source.name.replace("t10k", "train")).write_bytes(source.read_bytes())
    assert native_size(spec, tmp_path) == (1, 28, 28)
    (raw / "t10k-images-idx3-ubyte").write_bytes(idx(pixels)[:-1])
    assert "bytes for a shape of 4x28x28" in error_of(spec, "test", data_dir=tmp_path).what


# --- pictures ------------------------------------------------------------------------------------------------------


def picture(path: Path, array: np.ndarray) -> Path:
    Image.fromarray(array).save(path)
    return path


def test_a_picture_of_the_right_size_is_left_alone(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    tensor = read_image(picture(tmp_path / "x.png", pixels), RGB)
    expected = (pixels.transpose(2, 0, 1) / 255 - np.reshape(RGB.mean, (3, 1, 1))) / np.reshape(RGB.std, (3, 1, 1))
    assert tensor.shape == (1, 3, 8, 8)
    np.testing.assert_allclose(tensor[0].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_large_picture_is_resized_and_its_centre_cut_out(tmp_path):
    # A ramp over 512x256 that counts columns: scaled so that the shorter side is 256 / 0.875 -> crop of known columns.
    ramp = np.broadcast_to((np.arange(512) // 2).astype(np.uint8), (256, 512))
    tensor = read_image(picture(tmp_path / "x.png", ramp), Preprocess((1, 112, 112), (0.0,), (1 / 255,)))
    row = tensor[0, 0, 50]
    assert torch.allclose(tensor[0, 0], row.expand(112, 112), atol=1e-3)
    # Shorter side 256 -> 128, so the 112 columns are 2 source columns (one grey level) each, around the middle, 128.
    assert row[0].item() == pytest.approx(72, abs=1)
    assert row[-1].item() == pytest.approx(183, abs=1)


@pytest.mark.parametrize(("side", "cropped"), [(64, False), (65, True)])
def test_thumbnails_are_not_cropped(tmp_path, side, cropped):
    framed = np.zeros((side, side), np.uint8)
    framed[:3], framed[-3:], framed[:, :3], framed[:, -3:] = 255, 255, 255, 255
    tensor = read_image(picture(tmp_path / "x.png", framed), Preprocess((1, 32, 32), (0.0,), (1.0,)))
    assert (tensor[0, 0, 0].min().item() > 0.5) != cropped


def test_colour_modes(tmp_path):
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(tmp_path / f"{mode}.tif")
        assert read_image(tmp_path / f"{mode}.tif", RGB)[0, 0].mean().item() == pytest.approx(1.0)
        assert read_image(tmp_path / f"{mode}.tif", GREY).shape == (1, 1, 8, 8)
    deep = picture(tmp_path / "deep.png", np.full((8, 8), 0x8000, np.uint16))
    assert read_image(deep, GREY).mean().item() == pytest.approx((128 / 255 - 0.5) / 0.5, abs=1e-6)


def test_read_image_errors(tmp_path):
    with pytest.raises(AnncvtError, match="no such picture"):
        read_image(tmp_path / "none.png", RGB)
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(AnncvtError, match=r"text\.png"):
        read_image(tmp_path / "text.png", RGB)
    with pytest.raises(AnncvtError, match="4x8x8"):
        read_image(picture(tmp_path / "x.png", np.zeros((8, 8), np.uint8)), Preprocess((4, 8, 8), (0.0,), (1.0,)))


# --- images --------------------------------------------------------------------------------------------------------


def test_batch_and_subset():
    images = open_images("synthetic", "train", RGB, limit=10)
    chosen = images.subset([7, 2])
    assert chosen.labels.tolist() == [images.labels[7], images.labels[2]]
    batch = images.batch(torch.tensor([7, 2]), RGB)
    assert batch.dtype == torch.float32
    assert batch.equal(chosen.batch(torch.arange(2), RGB))
    back = batch * torch.tensor(RGB.std).view(3, 1, 1) + torch.tensor(RGB.mean).view(3, 1, 1)
    assert torch.allclose(back * 255, chosen.pixels.float(), atol=1e-3)


def test_batch_of_another_size_or_channels():
    images = open_images("synthetic", "train", RGB, limit=2)
    with pytest.raises(AnncvtError, match="3x8x8"):
        images.batch(torch.arange(2), GREY)
    with pytest.raises(AnncvtError, match="2 values"):
        images.batch(torch.arange(2), Preprocess((3, 8, 8), (0.5, 0.5), (1.0,)))


def test_too_many_images_for_the_memory(monkeypatch):
    monkeypatch.setattr(data, "available_memory", lambda: 100 * 192)
    refused = error_of("synthetic", limit=51)
    assert "51 images of 3x8x8" in refused.what
    assert "--limit 50" in refused.fix
    assert len(open_images("synthetic", "train", RGB, limit=50)) == 50


def test_available_memory_is_believable():
    found = data.available_memory()
    assert found is None or 2**20 < found < 2**50


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_is_positive(limit):
    assert "--limit" in error_of("digits", limit=limit).fix


def test_native_size(tmp_path):
    assert native_size("digits") == (1, 8, 8)
    assert native_size("synthetic") is None
    write_png(tmp_path / "test/a/1.png", 1, (9, 7))
    write_png(tmp_path / "test/a/2.png", 2, (9, 7))
    assert native_size(f"folder:{tmp_path}") == (3, 7, 9)
    write_png(tmp_path / "test/a/3.png", 3, (9, 8))
    assert native_size(f"folder:{tmp_path}") is None


# --- augmentation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("flip", [False, True])
def test_augment_shifts_and_mirrors_each_picture(dtype, flip):
    batch = torch.randint(1, 256, (64, 3, 6, 5)).to(dtype)
    out = augment(batch, torch.Generator().manual_seed(3), pad=2, flip=flip)
    assert (out.shape, out.dtype) == (batch.shape, dtype)
    padded = torch.nn.functional.pad(batch, (2, 2, 2, 2))
    seen = set()
    for source, result in zip(padded, out, strict=True):
        matches = [
            (dy, dx, mirrored)
            for dy in range(5)
            for dx in range(5)
            for mirrored in (False, True)
            if result.equal(
                source[:, dy : dy + 6, dx : dx + 5].flip(2) if mirrored else source[:, dy : dy + 6, dx : dx + 5]
            )
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {dy for dy, _, _ in seen} == {dx for _, dx, _ in seen} == set(range(5))
    assert {mirrored for _, _, mirrored in seen} == ({False, True} if flip else {False})


def test_augment_follows_its_generator():
    batch = torch.rand(16, 1, 8, 8)
    first, second, other = (augment(batch, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.equal(second)
    assert not first.equal(other)


def test_progress_reaches_the_end():
    recorder = Recorder()
    open_images("synthetic", "train", RGB, limit=300, progress=recorder)
    assert [recorder.done] == recorder.totals == [300]
