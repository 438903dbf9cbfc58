"""Segmentation: Fourier adaptation, conditions, mean IoU and the folder of CamVid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks.data import camvid, conditions
from benchmarks.tasks.segmentation import metrics

fda = jax.jit(conditions.fda)
confusion = jax.jit(metrics.confusion, static_argnums=(2, 3))
mean_iou = jax.jit(metrics.mean_iou)
jitted = {name: jax.jit(condition) for name, condition in conditions.CONDITIONS.items()}
KEY = jax.random.key(0)
N, HEIGHT, WIDTH = 64, 24, 32


def apply(name, key, images, depth=None, strength=None):
    """One program for all strengths, the usual ones among them."""
    strength = strength or conditions.CONDITIONS[name].__kwdefaults__["strength"]
    return jitted[name](key, images, depth, strength=strength)


def rng(seed=0):
    return np.random.default_rng(seed)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def some_images(seed=0, shape=(N, HEIGHT, WIDTH)):
    return rng(seed).uniform(size=(*shape, 3))


# Fourier domain adaptation.


def fda_oracle(source, target, band):
    """As defined by the authors for one image, frequencies sorted around the middle."""
    height, width, _ = source.shape
    fourier = lambda x: np.fft.fftshift(np.fft.fft2(x, axes=(0, 1)), axes=(0, 1))
    s, t = fourier(source), fourier(target)
    b = int(np.floor(min(height, width) * band))
    rows = slice(height // 2 - b, height // 2 + b + 1)
    columns = slice(width // 2 - b, width // 2 + b + 1)
    amplitude = np.abs(s)
    amplitude[rows, columns] = np.abs(t)[rows, columns]
    swapped = amplitude * np.exp(1j * np.angle(s))
    return np.fft.ifft2(np.fft.ifftshift(swapped, axes=(0, 1)), axes=(0, 1)).real


@pytest.mark.parametrize("shape", [(12, 16), (15, 9)])
@pytest.mark.parametrize("band", [0.0, 0.15, 0.4])
def test_fda_equals_its_definition(shape, band):
    source, target = some_images(0, (2, *shape)), some_images(1, (2, *shape))
    expected = [fda_oracle(s, t, band) for s, t in zip(source, target, strict=True)]
    actual = fda(f32(source), f32(target), band)
    np.testing.assert_allclose(actual, expected, atol=5e-6)


def test_each_image_may_have_its_own_band():
    source, target = some_images(0, (3, 12, 16)), some_images(1, (3, 12, 16))
    bands = [0.01, 0.1, 0.3]  # half widths 0, 1 and 3
    expected = [
        fda_oracle(s, t, b) for s, t, b in zip(source, target, bands, strict=True)
    ]
    actual = fda(f32(source), f32(target), f32(bands))
    np.testing.assert_allclose(actual, expected, atol=5e-6)


def test_fda_swaps_amplitudes_within_the_band_alone_and_keeps_every_phase():
    source, target = some_images(0, (2, 12, 16)), some_images(1, (2, 12, 16))
    styled = np.asarray(fda(f32(source), f32(target), 0.2), np.float64)
    rows = np.abs(np.fft.fftfreq(12) * 12)[:, None]
    columns = np.abs(np.fft.fftfreq(16) * 16)[None, :]
    low = (rows <= 2) & (columns <= 2)
    assert low.sum() == 25
    s, t, result = (np.fft.fft2(x, axes=(1, 2)) for x in (source, target, styled))
    close = {"atol": 1e-4}  # of sums of 192 pixels in float32
    np.testing.assert_allclose(np.abs(result)[:, low], np.abs(t)[:, low], **close)
    np.testing.assert_allclose(np.abs(result)[:, ~low], np.abs(s)[:, ~low], **close)
    np.testing.assert_allclose(
        result / np.abs(result), s / np.abs(s), atol=1e-3, rtol=0
    )


def test_fda_of_an_image_with_itself_is_the_image():
    images = f32(some_images())
    np.testing.assert_allclose(fda(images, images, 0.1), images, atol=1e-6)


def test_fda_gives_a_flat_image_the_mean_of_its_target():
    # No frequency but zero has an amplitude, nor a phase that could be kept.
    flat, target = f32(np.full((1, 12, 16, 3), 0.5)), f32(some_images(1, (1, 12, 16)))
    styled = fda(flat, target, 0.0)
    means = jnp.broadcast_to(target.mean((1, 2), keepdims=True), flat.shape)
    np.testing.assert_allclose(styled, means, atol=1e-6)


# Conditions.


@pytest.mark.parametrize("name", conditions.CONDITIONS)
def test_conditions_give_images_and_follow_their_key(name):
    images = f32(some_images())
    first, again, other = (
        apply(name, jax.random.key(seed), images) for seed in (0, 0, 1)
    )
    assert first.shape == images.shape
    assert first.dtype == jnp.float32
    assert np.all((first >= 0) & (first <= 1))
    np.testing.assert_array_equal(first, again)
    differences = np.abs(first - other).max((1, 2, 3))
    assert np.all(differences > 0.01)
    assert np.mean(differences) > 0.1


@pytest.mark.parametrize("name", conditions.CONDITIONS)
def test_equal_images_differ_from_one_another_in_their_conditions(name):
    images = f32(np.tile(some_images(shape=(1, HEIGHT, WIDTH)), (N, 1, 1, 1)))
    views = np.asarray(apply(name, KEY, images))
    differences = np.abs(views[1:] - views[:-1]).mean((1, 2, 3))
    assert np.all(differences > 0.005)


@pytest.mark.parametrize("name", conditions.CONDITIONS)
def test_strength_zero_is_no_condition(name):
    images = f32(some_images())
    same = apply(name, KEY, images, strength=(0.0, 0.0))
    np.testing.assert_allclose(same, images, atol=1e-6)


def test_at_night_it_is_dark_and_blue_with_a_few_lights():
    images = f32(0.3 + 0.5 * some_images())
    view = np.asarray(apply("night", KEY, images))
    assert np.median(view) < 0.25
    red, _, blue = np.median(view, axis=(0, 1, 2))
    assert blue > 1.2 * red
    bright = (view.max(-1) > 0.8).mean((1, 2))
    assert np.all(bright < 0.2)
    assert np.mean(bright > 0) > 0.9


def test_fog_fades_with_depth_into_the_colour_of_the_air():
    depth = np.tile(np.linspace(1, 40, WIDTH), (N, HEIGHT, 1))
    depth[:, :4] = 0  # the sky
    images = f32(some_images())
    view = np.asarray(apply("fog", KEY, images, f32(depth)))
    sky = view[:, :4]
    air = sky[:, :1, :1]
    np.testing.assert_allclose(sky, np.broadcast_to(air, sky.shape), atol=1e-6)
    assert np.all((air > 0.6) & (air < 0.95))
    # By Koschmieder's law, one coefficient for each image.
    clear = (view - air)[:, 4:] / (np.asarray(images) - air)[:, 4:]
    coefficient = -np.log(np.median(clear, axis=(1, 3))) / depth[:, 4]
    near = coefficient[:, :8]  # farther, next to nothing is left to measure
    np.testing.assert_allclose(
        near, np.broadcast_to(near[:, :1], near.shape), rtol=1e-2
    )
    assert np.all((near > 0.1 * 0.5 - 1e-3) & (near < 0.1 + 1e-3))


def test_fog_without_depth_is_densest_above_the_horizon():
    images = f32(some_images())
    view = np.asarray(apply("fog", KEY, images))
    contrast = view.std((0, 2, 3))
    view_contrast = [view[:, rows].std((1, 2, 3)) for rows in (np.s_[:8], np.s_[-8:])]
    assert np.all(view_contrast[0] < 0.5 * view_contrast[1])
    assert contrast[-1] > 0.5 * np.std(images)


def test_weather_takes_contrast_and_is_rain_or_snow():
    flat = f32(np.full((N, HEIGHT, WIDTH, 3), 0.5))
    view = np.asarray(apply("weather", KEY, flat))
    # Flakes are brighter than streaks, and rain darkens what it does not cover.
    darker = np.median(view, axis=(1, 2, 3)) < 0.5
    assert 0.3 < darker.mean() < 0.7
    brightest = view.max((1, 2, 3))
    assert np.median(brightest[~darker]) > np.median(brightest[darker]) + 0.1
    coloured = f32(some_images())
    colour = lambda x: np.asarray(x).std(-1).mean((1, 2))
    assert np.all(colour(apply("weather", KEY, coloured)) < colour(coloured))


# Mean intersection over union.


def test_confusion_counts_true_rows_and_predicted_columns_without_void():
    labels = jnp.asarray([[0, 0, 1], [1, 2, 3]])
    labels_hat = jnp.asarray([[0, 1, 1], [1, 0, 2]])
    counts = confusion(labels_hat, labels, 3, 3)
    np.testing.assert_array_equal(counts, [[1, 1, 0], [0, 2, 0], [1, 0, 0]])
    assert jnp.issubdtype(counts.dtype, jnp.integer)
    # Unions: 3, 3 and 1.
    np.testing.assert_allclose(mean_iou(counts), (1 / 3 + 2 / 3 + 0) / 3, rtol=1e-6)


@pytest.mark.parametrize("void", [0, 11, 255, None])
def test_confusion_equals_a_count_pixel_by_pixel(void):
    labels, labels_hat = rng().integers(0, 11, (2, 4, 6, 5))
    if void is not None:
        labels[rng().uniform(size=labels.shape) < 0.2] = void
    expected = np.zeros((11, 11), int)
    for true, predicted in zip(labels.ravel(), labels_hat.ravel(), strict=True):
        if true != void:
            expected[true, predicted] += 1
    counts = confusion(jnp.asarray(labels_hat), jnp.asarray(labels), 11, void)
    np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([[5, 0], [0, 7]], 1.0),
        ([[0, 5], [7, 0]], 0.0),
        ([[6, 2], [0, 4]], (6 / 8 + 4 / 6) / 2),
        ([[6, 0, 2], [0, 0, 0], [0, 0, 4]], (6 / 8 + 4 / 6) / 2),  # class 1 is absent
        ([[6, 2], [0, 0]], (6 / 8 + 0) / 2),  # class 1 is predicted, so it counts
        ([[0, 0], [0, 0]], np.nan),
    ],
)
def test_mean_iou_by_hand(counts, expected):
    np.testing.assert_allclose(mean_iou(jnp.asarray(counts)), expected, rtol=1e-6)


# The folder of CamVid.


def save(path, array):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two images to train on, one to validate, 4 pixels high and 6 wide."""
    for i, split in enumerate(("train", "train", "val")):
        image = rng(i).integers(0, 256, (4, 6, 3))
        save(tmp_path / split / f"{i}.png", image)
        save(tmp_path / f"{split}annot" / f"{i}.png", rng(i).integers(0, 12, (4, 6)))
    return tmp_path


def test_images_and_labels_are_loaded_in_the_order_of_their_names(folder):
    splits = camvid.load(folder)
    assert list(splits) == ["train", "val"]
    images, labels = splits["train"]
    assert images.dtype == np.float32
    assert labels.dtype == np.int32
    for i in range(2):
        np.testing.assert_allclose(
            images[i], rng(i).integers(0, 256, (4, 6, 3)) / 255, rtol=1e-6
        )
        np.testing.assert_array_equal(labels[i], rng(i).integers(0, 12, (4, 6)))
    assert splits["val"][0].shape == (1, 4, 6, 3)


def test_the_test_split_is_loaded_if_it_is_there(folder):
    save(folder / "test" / "a.png", np.zeros((4, 6, 3)))
    save(folder / "testannot" / "a.png", np.zeros((4, 6)))
    assert list(camvid.load(str(folder))) == ["train", "val", "test"]


def test_images_are_averaged_and_labels_are_taken_from_one_pixel(folder):
    image = np.zeros((8, 12, 3))
    image[:, ::2] = 200
    labels = np.kron(np.arange(6).reshape(2, 3), np.ones((4, 4)))
    save(folder / "val" / "2.png", image)
    save(folder / "valannot" / "2.png", labels)
    splits = camvid.load(folder, size=(2, 3))
    assert splits["train"][0].shape == (2, 2, 3, 3)
    images, resized = splits["val"]
    np.testing.assert_allclose(images, 100 / 255, atol=0.05)
    np.testing.assert_array_equal(resized[0], np.arange(6).reshape(2, 3))


@pytest.mark.parametrize("missing", ["train", "valannot"])
def test_a_folder_that_is_missing_is_named(folder, missing):
    (folder / missing).rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"no such folder: .*{missing}$"):
        camvid.load(folder)


def test_a_test_split_is_all_there_or_not_at_all(folder):
    save(folder / "test" / "a.png", np.zeros((4, 6, 3)))
    with pytest.raises(FileNotFoundError, match="no such folder: .*testannot"):
        camvid.load(folder)


def test_a_folder_without_images_is_named(folder):
    (folder / "val" / "2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"no \.png files in .*val$"):
        camvid.load(folder)


def test_images_and_annotations_come_in_pairs(folder):
    (folder / "trainannot" / "1.png").rename(folder / "trainannot" / "3.png")
    with pytest.raises(FileNotFoundError, match=r"image without.*: .*train/1\.png"):
        camvid.load(folder)
    (folder / "train" / "1.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"annotation without.*: .*trainannot/3\.png"
    ):
        camvid.load(folder)


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (np.zeros((6, 4)), "is 4x6, but its image is 6x4"),
        (np.full((4, 6), 12), "must be 0 to 11, .* has 12"),
        (np.zeros((4, 6, 3)), "one channel .* RGB"),
    ],
)
def test_a_wrong_annotation_is_named_with_the_reason(folder, annotation, reason):
    save(folder / "trainannot" / "1.png", annotation)
    with pytest.raises(ValueError, match=reason) as error:
        camvid.load(folder)
    assert str(folder / "trainannot" / "1.png") in str(error.value)


def test_images_of_different_sizes_need_a_size(folder):
    save(folder / "train" / "1.png", np.zeros((5, 6, 3)))
    save(folder / "trainannot" / "1.png", np.zeros((5, 6)))
    with pytest.raises(ValueError, match=r"train/1\.png is 6x5, .* are 6x4"):
        camvid.load(folder)
    assert camvid.load(folder, (4, 6))["train"][1].shape == (2, 4, 6)


def test_a_file_that_is_no_image_is_named(folder):
    (folder / "train" / "1.png").write_text("no image")
    with pytest.raises(ValueError, match=r"train/1\.png is not a readable image"):
        camvid.load(folder)
