import gzip
import hashlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from repalign.data.fashion_mnist import PACKAGED_SIZES, decode, encode, fashion_mnist
from repalign.data.sources import ArraySource, Column, TfdsSource
from repalign.registry import UserError

# sha256 of the first 12,000 / 4,000 images and labels (int32) of the original IDX files.
SHA256 = {
    "train": (
        "04d01e31a4efd6ed648a2e9ad0b7c983f7b6b5be1a1c706d6976e29cb52a3109",
        "13584e45e7049c24983600c0d3517a81bf843e55112e36e40c10b5764a6d4997",
    ),
    "test": (
        "0ca168d904ebf0b19f5ca3d28b9356332f6032b245f9e55d8e384824341f3f3e",
        "1e329ac7952a3e7cd9128d2cf9df7cc6dbd465fe65fb42a2b4207a6d2e16648e",
    ),
}


@pytest.mark.parametrize("split", ["train", "test"])
def test_packaged_images_are_pixel_exact(split):
    source = fashion_mnist(split)
    assert len(source) == PACKAGED_SIZES[split]
    assert source.columns == {
        "image": Column((28, 28, 1), np.dtype(np.uint8)),
        "label": Column((), np.dtype(np.int32)),
    }
    images, labels = source.arrays["image"], source.arrays["label"]
    assert hashlib.sha256(images.tobytes()).hexdigest() == SHA256[split][0]
    assert hashlib.sha256(labels.astype("<i4").tobytes()).hexdigest() == SHA256[split][1]
    # Within a tenth of the uniform share.
    assert np.abs(np.bincount(labels) / len(labels) - 0.1).max() < 0.01


def test_gather_is_rows_in_order_and_does_not_alias():
    source = fashion_mnist("test")
    batch = source.gather(np.array([5, 0, 5]))
    np.testing.assert_array_equal(batch["image"][1], source[0]["image"])
    np.testing.assert_array_equal(batch["image"][0], batch["image"][2])
    batch["image"][:] = 0
    assert source[5]["image"].any()
    with pytest.raises(ValueError, match="read-only"):
        source.arrays["image"][0] = 0


def test_with_columns_and_select():
    source = ArraySource({"image": np.arange(6).reshape(3, 2)})
    both = source.with_columns(tokens=np.arange(3.0))
    assert set(both.columns) == {"image", "tokens"} and set(source.columns) == {"image"}
    record = both.select(np.array([2, 0]))[0]
    assert record["image"].tolist() == [4, 5] and record["tokens"] == 2.0
    with pytest.raises(ValueError, match="one length"):
        source.with_columns(tokens=np.zeros(4))


def test_encode_is_lossless():
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28, 1)).astype(np.uint8)
    labels = np.arange(7, dtype=np.int32)
    decoded_images, decoded_labels = decode(encode(images, labels))
    np.testing.assert_array_equal(decoded_images, images)
    np.testing.assert_array_equal(decoded_labels, labels)


def test_full_reads_original_files(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28)).astype(np.uint8)
    header = np.array([0x803, 5, 28, 28], ">u4").tobytes()
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    labels = np.array([0x801, 5], ">u4").tobytes() + bytes([3, 1, 4, 1, 5])
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    source = fashion_mnist("test", subset="full", data_dir=tmp_path)
    np.testing.assert_array_equal(source.arrays["image"][..., 0], images)
    np.testing.assert_array_equal(source.arrays["label"], [3, 1, 4, 1, 5])
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels[:-1]))
    with pytest.raises(UserError, match="not an IDX file"):
        fashion_mnist("test", subset="full", data_dir=tmp_path)


class TinyColors(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Tensor(shape=(2, 2, 3), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=3),
            "name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(7):
            yield i, {"image": np.full((2, 2, 3), i, np.uint8), "label": i % 3, "name": str(i)}


def test_prepared_tfds_data_set(tmp_path):
    tfds.disable_progress_bar()
    TinyColors(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = TfdsSource("tiny_colors", "train", data_dir=tmp_path)
    assert source.columns == {
        "image": Column((2, 2, 3), np.dtype(np.uint8)),
        "label": Column((), np.dtype(np.int32)),
    }
    batch = source.gather(np.arange(7))
    assert sorted(batch["image"][:, 0, 0, 0].tolist()) == list(range(7))
    np.testing.assert_array_equal(batch["label"], batch["image"][:, 0, 0, 0] % 3)
    np.testing.assert_array_equal(source.gather(np.array([4, 4]))["image"][1], batch["image"][4])
    ragged = TfdsSource(
        "tiny_colors",
        "train",
        data_dir=tmp_path,
        transform=lambda record: {"image": record["image"][: 1 + record["label"] % 2]},
    )
    with pytest.raises(UserError, match="a transform that crops or resizes"):
        ragged.gather(np.arange(7))
    with pytest.raises(UserError, match="Unknown split 'trian'"):
        TfdsSource("tiny_colors", "trian", data_dir=tmp_path)
    with pytest.raises(UserError, match="Did you mean 'image'"):
        TfdsSource("tiny_colors", "train", keys=("imag",), data_dir=tmp_path)


def test_mistakes_name_the_fix(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'train'"):
        fashion_mnist("trian")
    with pytest.raises(UserError, match="dataset-fashion-mnist"):
        fashion_mnist("train", subset="full", data_dir=tmp_path)
    with pytest.raises(UserError, match=f"tfds build cifar10 --data_dir {tmp_path}"):
        TfdsSource("cifar10", "train", data_dir=tmp_path)
    with pytest.raises(UserError, match="no data set of this name"):
        TfdsSource("no_such_set", "train", data_dir=tmp_path)
