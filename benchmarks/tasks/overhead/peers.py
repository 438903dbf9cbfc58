"""TorchJD's steps and solvers, to be timed and tested beside those of this library.

PyTorch and TorchJD are no dependency of this project: where they are not installed,
``available()`` is False and nothing else here is to be called. The model is the
transformer of ``models.small`` with its heads, built from the same parameters, so that
losses and gradients agree and only the libraries differ.
"""

import functools
import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.models import small

Tensor = Any  # torch is imported where it is needed
Step = Callable[[], Tensor]

NEEDED = ("torch", "torchjd", "quadprog", "cvxpy", "ecos")
AGGREGATORS: dict[str, tuple[str, dict[str, Any]]] = {  # with the papers' settings
    "pcgrad": ("PCGrad", {}),
    "gradvac": ("GradVac", {"beta": 0.01}),
    "cagrad": ("CAGrad", {"c": 0.4}),
    "mgda": ("MGDA", {}),
    "nash_mtl": ("NashMTL", {}),
    "fair_grad": ("FairGrad", {"alpha": 2.0}),
    "imtl_g": ("IMTLG", {}),
    "aligned_mtl": ("AlignedMTL", {}),
    "upgrad": ("UPGrad", {}),
    "dual_proj": ("DualProj", {}),
    "config": ("ConFIG", {}),
}
METHODS = tuple(AGGREGATORS)
WAYS = ("parameters", "features")
WIDTH, HEADS = 128, 4


def available() -> bool:
    """Whether TorchJD and the solvers it calls are installed."""
    return all(importlib.util.find_spec(name) for name in NEEDED)


# Solvers.


def aggregator(method: str, count: int) -> Any:
    """TorchJD's aggregator of ``count`` gradients."""
    kind, settings = AGGREGATORS[method]
    if method == "nash_mtl":
        settings = settings | {"n_tasks": count}
    with _quiet():
        torchjd = importlib.import_module("torchjd.aggregation")
        return getattr(torchjd, kind)(**settings)


def weights(method: str, gramian: np.ndarray) -> np.ndarray:
    """The weights that TorchJD gives gradients with this Gramian (K, K)."""
    solved = np.asarray(solver(method, gramian)())
    if method == "config":  # It gives a direction, J^T w, of an invertible J.
        return np.linalg.solve(_root(gramian).T, solved)
    return solved


def solver(method: str, gramian: np.ndarray) -> Step:
    """What turns this Gramian (K, K) into weights, to be called and timed.

    ConFIG and Nash-MTL are made for gradients: they get a square root of the Gramian.
    ConFIG gives their combination.
    """
    torch = importlib.import_module("torch")
    aggregate = aggregator(method, len(gramian))
    if method in ("config", "nash_mtl"):
        matrix = torch.tensor(_root(gramian))
        weigh = aggregate if method == "config" else aggregate.weighting
    else:
        matrix, weigh = torch.tensor(gramian), aggregate.gramian_weighting

    def solve() -> Tensor:
        if method == "nash_mtl":  # Or else it would start from the solution.
            weigh.prvs_alpha = np.ones(len(gramian), np.float32)
        with _quiet():
            return weigh(matrix)

    return solve


def _root(gramian: np.ndarray) -> np.ndarray:
    """J with J J^T the Gramian, in its dtype."""
    values, vectors = np.linalg.eigh(gramian.astype(np.float64))
    return (vectors * np.sqrt(np.maximum(values, 0))).astype(gramian.dtype)


def _quiet() -> warnings.catch_warnings:
    """Without what cvxpy says of the form of Nash-MTL's problem, at every solve."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


# Steps.


def problem(depth: int = 2, batch: int = 8, length: int = 64) -> small.Shared:
    """The model in JAX: a transformer and four heads, a loss for each."""
    model = small.transformer(WIDTH, depth, heads=HEADS, batch=batch, length=length)
    return small.with_heads(model, WIDTH)


def steps(model: small.Shared, methods: tuple[str, ...] = METHODS) -> dict[str, Step]:
    """Training steps with AdamW: ``"plain"``, and ``"method, way"`` for all others.

    The plain step descends the sum of the losses, and so do the heads in all steps.
    *Parameters*: the encoder descends the combination of the gradients of its
    parameters, TorchJD's ``mtl_backward``. *Features*: the gradients that are combined
    are those of its output, as with :func:`yoto_jax.of_representation`.
    """
    made = {"plain": Trainer(model).plain}
    for method in methods:
        for way in WAYS:
            trainer = Trainer(model)
            combine = aggregator(method, len(small.NAMES))
            made[f"{method}, {way}"] = functools.partial(getattr(trainer, way), combine)
    return made


class Trainer:
    """The model in PyTorch, its optimizer, and the ways to make a step."""

    def __init__(self, model: small.Shared) -> None:
        self.torch: Any = importlib.import_module("torch")
        self.autojac: Any = importlib.import_module("torchjd.autojac")
        params = model.init(jax.random.key(0))
        x = jax.random.normal(jax.random.key(1), model.inputs)
        self.layers = [
            {name: self._linear(**layer) for name, layer in block.items()}
            for block in params["encoder"]
        ]
        self.heads = {k: self._leaf(w.T) for k, w in params["heads"].items()}
        self.shared = [p for b in self.layers for pair in b.values() for p in pair]
        every = [*self.shared, *self.heads.values()]
        self.optimizer = self.torch.optim.AdamW(every, lr=1e-3)
        self.x = self.torch.tensor(np.array(x))

    def _leaf(self, x: jax.Array) -> Tensor:
        return self.torch.tensor(np.array(x), requires_grad=True)

    def _linear(self, w: jax.Array, b: jax.Array) -> tuple[Tensor, Tensor]:
        return self._leaf(w.T), self._leaf(b)

    def encode(self) -> Tensor:
        f = self.torch.nn.functional
        x = self.x
        norm = lambda x: f.layer_norm(x, x.shape[-1:], eps=1e-5)
        for layer in self.layers:
            split = f.linear(norm(x), *layer["qkv"]).unflatten(-1, (3, HEADS, -1))
            q, k, v = split.movedim((2, 3), (0, 2))
            # Written out: the fused kernel's backward pass has no rule for vmap, which
            # TorchJD uses, and would be slower there.
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            mixed = scores.softmax(-1) @ v
            x = x + f.linear(mixed.movedim(1, 2).flatten(-2), *layer["out"])
            up = f.gelu(f.linear(norm(x), *layer["up"]), approximate="tanh")
            x = x + f.linear(up, *layer["down"])
        return x

    def losses(self, z: Tensor) -> list[Tensor]:
        """Those of ``models.small.heads``, in the order of their names there."""
        f = self.torch.nn.functional
        flat = z.flatten(0, -2)
        y = {name: f.linear(flat, kernel) for name, kernel in self.heads.items()}
        first = self.torch.zeros(len(flat), dtype=self.torch.long)
        losses = {
            "fit": ((y["fit"] - 1.0) ** 2).mean(),
            "size": y["size"].abs().mean() + 0.1,
            "class": f.cross_entropy(y["class"], first),
            "smooth": ((y["smooth"][1:] - y["smooth"][:-1]) ** 2).mean(),
        }
        return [losses[name] for name in small.NAMES]

    def _advance(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def plain(self) -> list[Tensor]:
        losses = self.losses(self.encode())
        sum(losses).backward()
        self._advance()
        return losses

    def parameters(self, combine: Any) -> list[Tensor]:
        z = self.encode()
        losses = self.losses(z)
        self.autojac.mtl_backward(losses, features=z)
        with _quiet():
            self.autojac.jac_to_grad(self.shared, combine)
        self._advance()
        return losses

    def features(self, combine: Any) -> list[Tensor]:
        z = self.encode()
        leaf = z.detach().requires_grad_()
        losses = self.losses(leaf)
        heads = [[kernel] for kernel in self.heads.values()]
        # With the features as the shared parameters, only the heads are crossed.
        self.autojac.mtl_backward(
            losses, features=leaf, tasks_params=heads, shared_params=[leaf]
        )
        with _quiet():
            self.autojac.jac_to_grad([leaf], combine)
        z.backward(leaf.grad)
        self._advance()
        return losses
