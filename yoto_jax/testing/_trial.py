"""A small problem to try a weighting on, and the programs that the checks share."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from yoto_jax._losses import (
    Losses,
    Params,
    Present,
    PyTree,
    State,
    find_loss,
    loss_names,
    split,
)
from yoto_jax._weighting import GRADIENT_STATISTICS, LossWeighting, weights_of
from yoto_jax.gradients._value_and_grad import value_and_grad
from yoto_jax.testing._compare import require

RATE = 0.05


class Batch(NamedTuple):
    """What an update is told, in NumPy: K losses and statistics of their gradients."""

    losses: np.ndarray
    statistics: dict[str, np.ndarray]


class Trial:
    """A weighting, and a small problem with K losses to try it on.

    The checks of :func:`checks` share its compiled programs. All losses of the problem
    are positive and of order 1.

    Args:
      weighting: What is tried.
      losses: A tree whose structure the losses have. ``{"a", "b", "c"}`` unless given.
      about: The loss that the weighting singles out, such as a primary one: its path or
        its index. That of ``weighting.downstream`` unless given.
      statistics: For statistics of the weighting's own, functions ``f(params, x)`` as
        :func:`yoto_jax.value_and_grad` takes them, of a dict of ``w`` (4, 3) and ``b``
        (3,), and of x (16, 4). Positive numbers unless given.

    Attributes:
      params: Parameters to start from.
      batches: Batches, on the first axis.
      traces: How often ``step`` has been traced.

    Examples:
      >>> import yoto_jax as yoto
      >>> from yoto_jax.testing import Trial, checks
      >>> trial = Trial(yoto.weightings.imtl_g(), losses={"depth": 0.0, "flow": 0.0})
      >>> checks()["training"](trial)
      >>> x = trial.batches[0]
      >>> losses, grads, state = trial.step(trial.params, trial.init(), x)
      >>> print(sorted(losses), sorted(grads))
      ['depth', 'flow'] ['b', 'none', 'w']
    """

    def __init__(
        self,
        weighting: LossWeighting,
        losses: Losses = None,
        *,
        about: str | int | None = None,
        statistics: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        if not isinstance(weighting, LossWeighting):
            raise TypeError(
                "weighting must be a LossWeighting, such as the one that "
                f"yoto.weightings.equal() returns, got a {type(weighting).__name__}."
            )
        self.weighting = weighting
        losses = dict.fromkeys("abc", 0.0) if losses is None else losses
        self.structure = jax.tree.structure(losses)
        self.size = self.structure.num_leaves
        self.names = loss_names(self.structure)
        about = weighting.downstream if about is None else about
        self.position: int | None = None
        if about is not None:
            self.position = find_loss("about", about, losses)
        known = ("losses", "alignment", *GRADIENT_STATISTICS)
        own = [name for name in weighting.needs if name not in known]
        self.statistics = {name: self.some_numbers for name in own}
        if "cross_gramian" in own:
            self.statistics["cross_gramian"] = self.some_products
        self.statistics |= dict(statistics or {})
        self.params = {
            "w": jax.random.normal(jax.random.key(0), (4, 3)) / 2,
            "b": jnp.linspace(-1, 1, 3),
            "none": None,
        }
        self.batches = jax.random.normal(jax.random.key(1), (6, 16, 4))
        self.traces = 0

    # The problem.

    def encoder(self, params: Params, x: jax.Array) -> jax.Array:
        """Features of a batch."""
        return jnp.tanh(x @ params["w"])

    def heads(self, params: Params, z: jax.Array, x: jax.Array) -> PyTree:
        """The losses, from the features."""
        del x
        shifts = jnp.arange(self.size, dtype=z.dtype)
        waves = jnp.sin((z @ params["b"])[:, None] + shifts[None])
        sizes = jnp.mean(z**2, axis=0)[jnp.arange(self.size) % 3]
        losses = jnp.mean((waves - 0.5) ** 2, axis=0) + 0.05 * sizes + 0.05
        return split(losses, self.structure)

    def loss_fn(self, params: Params, x: jax.Array) -> PyTree:
        """The losses of a batch."""
        return self.heads(params, self.encoder(params, x), x)

    def some_numbers(self, params: Params, x: jax.Array) -> jax.Array:
        """A statistic (K,) of no meaning: positive, and zero where gradients are."""
        numbers = jnp.arange(1, self.size + 1, dtype=x.dtype) + jnp.mean(jnp.abs(x))
        return numbers * jnp.any(params["w"])

    def some_products(self, params: Params, x: jax.Array) -> jax.Array:
        """A statistic (K, K) of no meaning."""
        return jnp.diag(self.some_numbers(params, x))

    # The weighting on it.

    def value_and_grad(self, loss_fn: Any = None, **options: Any) -> Callable[..., Any]:
        """That of the library, not compiled."""
        f = self.loss_fn if loss_fn is None else loss_fn
        statistics: Any = self.statistics or None
        return value_and_grad(f, self.weighting, statistics=statistics, **options)

    @functools.cached_property
    def step(self) -> Any:
        """``step(params, state, x) -> (losses, grads, state)``, compiled."""
        value_and_grad = self.value_and_grad()

        def step(params: Params, state: State, x: jax.Array) -> Any:
            self.traces += 1
            return value_and_grad(params, state, x)

        return jax.jit(step)

    @functools.cached_property
    def update(self) -> Any:
        """The update of the weighting, compiled, with ``present=``."""
        update = self.weighting.update
        knows = "present" in inspect.signature(update).parameters
        require(knows, "update must take present=, see LossWeighting.")

        def fn(
            losses: Losses, state: State, present: Present, seen: dict[str, Any]
        ) -> Any:
            return update(losses, state, present=present, **seen)

        return jax.jit(fn)

    @functools.cached_property
    def shapes(self) -> PyTree:
        """Those of the losses."""
        return jax.eval_shape(self.loss_fn, self.params, self.batches[0])

    def init(self) -> Any:
        """A first state, from shapes alone."""
        return self.weighting.init(self.shapes)

    def stay(self, count: int, params: Params = None) -> tuple[PyTree, PyTree, Any]:
        """Losses, gradient and state after some steps that the parameters sit out."""
        params = self.params if params is None else params
        out: Any = None, None, self.init()
        for x in self.batches[:count]:
            out = self.step(params, out[-1], x)
        return out

    def train(self, count: int, scale: float = 1.0) -> tuple[PyTree, Any, list[PyTree]]:
        """Parameters and state after some steps, and the weights on the way."""
        params, state = jax.tree.map(lambda p: p * scale, self.params), self.init()
        history = []
        for x in self.batches[:count]:
            _, grads, state = self.step(params, state, x)
            params = descend(params, grads)
            history.append(weights_of(state))
        return params, state, history

    # Updates without a model.

    def batch(self, seed: int) -> Batch:
        """Losses, and the statistics of gradients drawn at random."""
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(self.size, 5)) * rng.uniform(0.5, 2, (self.size, 1))
        rows -= 0.7 * np.mean(rows, axis=0)  # in conflict
        steering = rows[self.position or 0]
        known = {
            "gramian": rows @ rows.T,
            "norms": np.linalg.norm(rows, axis=1),
            "max_abs": np.abs(rows).max(1),
            "mean_abs": np.abs(rows).mean(1),
            "std": rows.std(1),
            "alignment": rows @ steering,
        }
        own = {name: np.sum(rows**2, 1) for name in self.statistics}
        other = rows + np.random.default_rng(seed + 1).normal(size=rows.shape)
        own["cross_gramian"] = rows @ other.T
        seen = known | own
        needed = [name for name in self.weighting.needs if name != "losses"]
        losses = rng.uniform(0.3, 2.0, self.size)
        return Batch(losses, {name: seen[name] for name in needed})

    def tell(
        self, batch: Batch, state: State, present: np.ndarray | None = None
    ) -> tuple[PyTree, Any]:
        """One update with a batch; all losses are there unless told."""
        there = np.full(self.size, True) if present is None else present
        losses, seen = jax.tree.map(np.float32, (batch.losses, batch.statistics))
        trees = (self.structure.unflatten(list(x)) for x in (losses, there))
        return self.update(next(trees), state, next(trees), seen)

    def state_that_is_due(self, seed: int = 100) -> Any:
        """A state after two updates or more, at which the next one looks at all."""
        state = self.init()
        for number in range(200):
            due = self.weighting.due
            if number >= 2 and (due is None or due(state)):
                return state
            _, state = self.tell(self.batch(seed + number), state)
        raise AssertionError("due(state) was False 200 times in a row.")


def descend(params: Params, grads: Params) -> PyTree:
    """A step of gradient descent."""
    return jax.tree.map(lambda p, g: p - RATE * g, params, grads)
