"""The experiments' data: what is read is what was written, and a bad file is a clear error."""

import pickle
import re

import numpy as np
import pytest
import torch
from payload import Payload
from PIL import Image
from skimage.data import camera

from bench.training import images, luma, text, words
from bench.training.data import DataError


def records(count, labels, seed):
    generator = np.random.default_rng(seed)
    values = generator.integers(0, 256, (count, labels + images.PIXELS), dtype=np.uint8)
    values[:, :labels] = generator.integers(0, 10, (count, labels))
    return values


def test_cifar_10_is_read_as_written(tmp_path):
    written = {
        name: records(4, 1, i) for i, name in enumerate(("data_batch_1.bin", "data_batch_4.bin", "test_batch.bin"))
    }
    for name, values in written.items():
        (tmp_path / name).write_bytes(values.tobytes())
    found = images.read_cifar(tmp_path)
    train = np.concatenate([written["data_batch_1.bin"], written["data_batch_4.bin"]])
    assert found.name == "CIFAR-10"
    assert found.classes == 10
    assert found.train_classes.tolist() == train[:, 0].tolist()
    assert found.train[5, 2, 31, 4] == int(train[5, 1 + 2 * 1024 + 31 * 32 + 4])
    assert torch.equal(found.test.flatten(1), torch.from_numpy(written["test_batch.bin"][:, 1:].copy()))


def test_cifar_100_takes_the_fine_classes(tmp_path):
    inner = tmp_path / "cifar-100-binary"
    inner.mkdir()
    for name, seed in (("train.bin", 0), ("test.bin", 1)):
        (inner / name).write_bytes(records(3, 2, seed).tobytes())
    found = images.read_cifar(tmp_path)
    assert found.classes == 100
    assert found.train_classes.tolist() == records(3, 2, 0)[:, 1].tolist()
    assert torch.equal(found.train.flatten(1), torch.from_numpy(records(3, 2, 0)[:, 2:].copy()))


def test_missing_and_damaged_pictures_are_clear_errors(tmp_path):
    with pytest.raises(DataError, match=r"no folder; expected one with data_batch_1.bin"):
        images.read_cifar(tmp_path / "nowhere")
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(Payload(tmp_path / "unpickled")))
    with pytest.raises(DataError, match=r"got none of data_batch_1.bin, train.bin; expected .* binary .*toronto.edu"):
        images.read_cifar(tmp_path)
    whole = records(2, 1, 0).tobytes()
    (tmp_path / "data_batch_1.bin").write_bytes(whole[:-5])
    with pytest.raises(DataError, match=r"data_batch_1.bin: got 6141 bytes, expected .* a multiple of 3073"):
        images.read_cifar(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(pickle.dumps(Payload(tmp_path / "unpickled")))
    with pytest.raises(DataError, match="a multiple of 3073"):
        images.read_cifar(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(bytes([77]) + whole[1:])
    with pytest.raises(DataError, match="got class 77, expected one of CIFAR-10's 10"):
        images.read_cifar(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(whole)
    with pytest.raises(DataError, match=r"test_batch.bin: not there; expected CIFAR-10 in records"):
        images.read_cifar(tmp_path)
    assert not (tmp_path / "unpickled").exists()


def test_textures_are_the_same_every_time_and_have_directions():
    """A grating varies along its direction and not across: class 0 from left to right, in every row alike."""
    first, second = images.textures(300, 20), images.textures(300, 20)
    assert torch.equal(first.train, second.train)
    assert set(first.train_classes.tolist()) == set(range(10))
    rows = first.train[first.train_classes == 0].float()
    along, across = rows.mean(2).var(-1), rows.mean(3).var(-1)
    assert (along.mean(1) > across.mean(1)).float().mean() > 0.95


def test_words_are_numbered_by_frequency(tmp_path):
    (tmp_path / "train.txt").write_text(" the cat <unk> \n\n the dog sat on the mat cat \n")
    (tmp_path / "valid.txt").write_text("the bird\n")
    (tmp_path / "ptb.test.txt").write_text("cat the\n")
    found = words.load(tmp_path, vocabulary=4)
    assert found.vocabulary == 4
    # <unk> 0, the 1 (three times), <eos> 2 and cat 3 (twice, by name)
    assert found.train.tolist() == [1, 3, 0, 2, 1, 0, 0, 0, 1, 0, 3, 2]
    assert found.valid.tolist() == [1, 0, 2]
    assert found.test.tolist() == [3, 1, 2]


def test_missing_and_empty_texts_are_clear_errors(tmp_path):
    with pytest.raises(
        DataError, match=r"got none of train.txt, ptb.train.txt; expected a text .*WikiText-2.*Treebank"
    ):
        words.load(tmp_path, 10)
    (tmp_path / "train.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"train.txt: empty"):
        words.load(tmp_path, 10)
    (tmp_path / "train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="expected UTF-8"):
        words.load(tmp_path, 10)


def test_texts_shorter_than_a_batch_are_refused(tmp_path):
    for part in words.PARTS:
        (tmp_path / f"{part}.txt").write_text("a b c d e f\n" * (3 if part == "valid" else 10))
    with pytest.raises(DataError, match=r"got 21 words in valid.txt, expected at least 40"):
        text.texts(tmp_path, 10)


def test_text_that_comes_along():
    found = words.load(None, 500)
    assert found.name == "Python's help"
    assert found.vocabulary == 500
    assert len(found.train) > 7 * len(found.test) > 10_000


def test_luma_is_in_studio_range():
    corners = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0]]], dtype=np.uint8)
    assert luma.luma(corners).tolist() == [[16, 235, 81, 145]]
    assert luma.luma(corners[..., 0]).tolist() == [[16, 235, 235, 16]]


def test_pairs_are_cut_to_the_scale_and_quality_ignores_the_border():
    target = luma.luma(camera())[150:250, 150:239]
    bicubic, cut = luma.pair(target, 3)
    assert bicubic.shape == cut.shape == (99, 87)
    assert np.array_equal(cut, target[:99, :87])
    with np.errstate(divide="ignore"):
        assert luma.quality(cut, cut, 3) == (float("inf"), 1.0)
    off = cut + 5.0
    assert luma.quality(off, cut, 3)[0] == pytest.approx(20 * np.log10(255 / 5))
    off[:3] = 0
    off[:, -3:] = 0
    assert luma.quality(off, cut, 3)[0] == pytest.approx(20 * np.log10(255 / 5))
    psnr, ssim = luma.quality(bicubic, cut, 3)
    assert 20 < psnr < 40
    assert 0.5 < ssim < 1


def test_ssim_is_the_published_formula():
    """Wang et al. (2004), equation 13, with its Gaussian windows of 11x11: here by torch's convolution."""
    generator = np.random.default_rng(0)
    x = generator.uniform(0, 255, (40, 50))
    y = x + generator.normal(0, 20, x.shape)
    axis = torch.arange(-5, 6, dtype=torch.float64)
    line = torch.exp(-axis.square() / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum().square())[None, None]

    def smooth(values):
        return torch.nn.functional.conv2d(torch.as_tensor(values)[None, None], window)

    mx, my = smooth(x), smooth(y)
    vx, vy, both = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = ((2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
    padded = np.pad(np.stack([x, y]), ((0, 0), (3, 3), (3, 3)))
    assert luma.quality(padded[1], padded[0], 3)[1] == pytest.approx(float(expected), rel=1e-9)


def test_missing_and_damaged_picture_folders_are_clear_errors(tmp_path):
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'train'}: not there or empty; expected a folder")):
        luma.load(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "Set14").mkdir()
    for folder in ("train", "Set14"):
        Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / folder / "black.png")
    train, test = luma.load(tmp_path)
    assert train["black"].shape == test["black"].shape == (40, 50)
    assert (train["black"] == 16).all()
    path = tmp_path / "Set14" / "black.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"black.png: expected a whole picture"):
        luma.load(tmp_path)
