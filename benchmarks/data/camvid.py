"""Street scenes with labels from a folder in the layout of SegNet's CamVid.

The folder has ``train/`` with images and ``trainannot/`` with annotations of the same
names, likewise ``val/`` and, if there, ``test/``. An annotation is an image with one
channel: the index of the class, 11 for void.
"""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
VOID = len(CLASSES)

_REQUIRED = ("train", "val")
_OPTIONAL = ("test",)


def load(
    folder: str | Path, size: tuple[int, int] | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All images and labels of a folder.

    Args:
      folder: With ``train/``, ``trainannot/``, ``val/``, ``valannot/`` and, optional,
        ``test/``, ``testannot/``.
      size: Height and width to resize to: images are averaged over the area of a pixel,
        labels taken from the nearest. Without it, all must be of one size.

    Returns:
      For each split images, float32 [n, h, w, 3] from 0 to 1, and labels, int32
      [n, h, w], sorted by name.

    Raises:
      FileNotFoundError: If a folder, an image or an annotation is missing.
      ValueError: If a file is not as it should be.
    """
    folder = Path(folder)
    optional = [
        split
        for split in _OPTIONAL
        if (folder / split).exists() or _annotations(folder, split).exists()
    ]
    return {split: _load(folder, split, size) for split in (*_REQUIRED, *optional)}


def _annotations(folder: Path, split: str) -> Path:
    return folder / f"{split}annot"


def _load(
    folder: Path, split: str, size: tuple[int, int] | None
) -> tuple[np.ndarray, np.ndarray]:
    images = _files(folder / split)
    annotations = _files(_annotations(folder, split))
    for name in sorted(images.keys() | annotations.keys()):
        if name not in annotations:
            raise FileNotFoundError(
                f"image without annotation: {images[name]}, expected "
                f"{_annotations(folder, split) / name}"
            )
        if name not in images:
            raise FileNotFoundError(
                f"annotation without image: {annotations[name]}, expected "
                f"{folder / split / name}"
            )
    pairs = [_pair(images[name], annotations[name], size) for name in sorted(images)]
    expected = pairs[0][1].shape
    for name, (_, labels) in zip(sorted(images), pairs, strict=True):
        if labels.shape != expected:
            raise ValueError(
                f"{images[name]} is {_describe(labels.shape)}, others in its folder "
                f"are {_describe(expected)}: give a size to resize to"
            )
    return np.stack([i for i, _ in pairs]), np.stack([labels for _, labels in pairs])


def _files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    files = {path.name: path for path in folder.glob("*.png")}
    if not files:
        raise FileNotFoundError(f"no .png files in {folder}")
    return files


def _pair(
    image_path: Path, annotation_path: Path, size: tuple[int, int] | None
) -> tuple[np.ndarray, np.ndarray]:
    image, annotation = _open(image_path).convert("RGB"), _open(annotation_path)
    if annotation.mode not in ("L", "P"):
        raise ValueError(
            f"{annotation_path} must have one channel of class indices, but its mode "
            f"is {annotation.mode}"
        )
    if image.size != annotation.size:
        raise ValueError(
            f"{annotation_path} is {_describe(annotation.size[::-1])}, but its image "
            f"is {_describe(image.size[::-1])}"
        )
    if (highest := np.asarray(annotation).max()) > VOID:
        raise ValueError(
            f"labels must be 0 to {VOID}, but {annotation_path} has {highest}"
        )
    if size is not None:
        # When it shrinks an image, Pillow widens the filter to all pixels covered.
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
        annotation = annotation.resize(size[::-1], Image.Resampling.NEAREST)
    pixels = np.asarray(image, np.float32) / np.float32(255)
    return pixels, np.asarray(annotation, np.int32)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except OSError as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error


def _describe(size: tuple[int, ...]) -> str:
    height, width = size
    return f"{width}x{height}"
