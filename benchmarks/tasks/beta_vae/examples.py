"""Pictures of what the trained models of the conditional VAE make."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.tasks.beta_vae import task
from yoto_jax import conditional

EXAMPLES = (0.125, 2.0, 512.0)  # betas


SHOWN = 10  # images


def examples(params: dict[str, Any], data: task.Data, width: float, path: Path) -> None:
    """Reconstructions and samples at three betas, of the first seed."""
    x = data.test[:SHOWN]
    z = jax.random.normal(jax.random.key(0), (SHOWN, task.LATENT))

    @jax.jit
    def program(params: Any, c: Any, x: jax.Array, z: jax.Array) -> tuple[Any, Any]:
        model = task.codec(params, c, data.floor)
        return model.reconstruct(x), model.decode(z)[0]

    drawing = Figure(figsize=(12, 4.6), dpi=100, layout="compressed")
    panels = drawing.subplots(1 + 2 * len(EXAMPLES), 2)
    panels[0, 0].set_title("reconstructions of test images, by their mean")
    panels[0, 1].set_title("samples, by their mean (same noise in every row)")
    _draw_images(panels[0, 0], x, data.shape)
    _label(panels[0, 0], "data")
    panels[0, 1].set_axis_off()
    for i, beta in enumerate(EXAMPLES):
        weights = {"reconstruction": 1.0, "kl": beta}
        seven = task.BETAS.index(beta)
        pick = {"conditional": (0,), "fixed": (0, seven)}
        for j, (method, index) in enumerate(pick.items()):
            c = None
            if method == "conditional":
                c = conditional.encode(weights, task.SUPPORT)
            own = jax.tree.map(lambda leaf, index=index: leaf[index], params[method])
            row = panels[1 + 2 * i + j]
            images = program(own, c, x, z)
            for panel, drawn in zip(row, images, strict=True):
                _draw_images(panel, drawn, data.shape)
            _label(row[0], f"{method}, beta {beta:g}")
    drawing.suptitle(f"{data.name}, width {width:g}")
    drawing.savefig(path)


def _draw_images(panel: Axes, rows: jax.Array, shape: tuple[int, int, int]) -> None:
    """Images beside each other, with a white line between."""
    images = np.clip(np.asarray(rows).reshape(-1, *shape), 0, 1)
    if shape[-1] == 1:
        images = 1 - np.repeat(images, 3, axis=-1)  # ink on paper
    padded = np.pad(images, ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=1)
    panel.imshow(np.concatenate(list(padded), axis=1)[:, :-1])
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_visible(False)


def _label(panel: Axes, text: str) -> None:
    panel.set_ylabel(text, rotation=0, ha="right", va="center")
