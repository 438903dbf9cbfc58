"""A small problem with three losses, and streams of batches that go wrong.

The losses are bowls with different centres, curvatures and scales, so that no point is
best for all and weights settle somewhere. Every batch has noise of its own. A fault
multiplies a loss by a factor, inside the loss function: its gradient goes wrong with
it, as it would in life.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import yoto_jax as yoto
from yoto_jax._skip_outliers import skip_outliers
from yoto_jax.weightings import _skip_outliers as wrapper

Array = jax.Array

NAMES = ("a", "b", "c")
SIZE = 24  # parameters
SCALES = jnp.array([1.0, 0.3, 3.0])
CENTRES = jax.random.normal(jax.random.key(0), (3, SIZE))
CURVATURES = jnp.exp(jax.random.uniform(jax.random.key(1), (3, SIZE), minval=-0.7))
NOISE = 0.1
OFFSET = 0.1  # so that no loss comes to 0
PROBABILITY = 0.01  # of a fault, for every loss of every batch

FAULTS = {
    "NaN": np.nan,
    "inf": np.inf,
    "1e30": 1e30,
    "1e10": 1e10,
    "negative": -1.0,
    "zero": 0.0,
}
OTHERS = 3  # clean runs on other batches: how far apart do weights end by chance?
STREAMS = ("clean", *(f"other{k}" for k in range(1, OTHERS + 1)), *FAULTS)
FACTORS = np.array([1.0] * (1 + OTHERS) + list(FAULTS.values()), np.float32)
BATCHES = np.array([0, *range(1, OTHERS + 1)] + [0] * len(FAULTS))  # noise of a stream

RATE = 0.01
CONSECUTIVE = 10  # bad batches in a row, for apply_if_finite
RULE = yoto.OutlierRule(positive=True)


def losses_of(w: Array, noise: Array, factors: Array) -> dict[str, Array]:
    """The losses at w (SIZE,) on a batch: noise (3, SIZE), a factor for each loss."""
    squares = CURVATURES * (w[None] - CENTRES - NOISE * noise) ** 2
    values = factors * SCALES * (0.5 * jnp.mean(squares, axis=1) + OFFSET)
    return dict(zip(NAMES, values, strict=True))


def kernel_diagonal(w: Array, noise: Array, factors: Array) -> Array:
    """Squared gradient norms of the roots of the losses, for the tangent kernel."""
    losses = jnp.stack(list(losses_of(w, noise, factors).values()))
    rows = jnp.stack(list(jax.jacobian(losses_of)(w, noise, factors).values()))
    size = jnp.abs(losses)
    return jnp.where(size == 0, 0, jnp.sum(rows**2, axis=1) / (4 * size))


def _all_wrapped() -> yoto.LossWeighting:
    w = yoto.weightings
    return w.normalize(w.smooth(w.every(w.imtl_g(), 2), decay=0.5))


def _firm(rate: float) -> optax.GradientTransformationExtraArgs:
    """With a rho at which no weight goes to 0 in the end, see ``yoto_jax.adamw``."""
    return yoto.adamw(rate, hyperparameter_decay=20.0)


w = yoto.weightings
LEFT_OUT = {
    "grap_closed_form": "of the same running means as grap",
    "modo": "as moco, with a second batch",
    "sdmgrad": "as moco, with a second batch",
}
WEIGHTINGS: dict[str, Callable[[], yoto.LossWeighting]] = {
    name: functools.partial(method.example, "a")
    for name, method in w.methods().items()
    if name not in LEFT_OUT
} | {
    "yoto(rho=20)": lambda: w.yoto("a", optimizer=_firm(RATE)),
    "every(imtl_g)": lambda: w.every(w.imtl_g(), 2),
    "smooth(imtl_g)": lambda: w.smooth(w.imtl_g(), decay=0.5),
    "normalize(famo)": lambda: w.normalize(w.famo()),
    "normalize(smooth(every(imtl_g)))": _all_wrapped,
}
# Layer 1: loss logits among the parameters, one optimizer for both.
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
    "layer 1, adamw": lambda: yoto.adamw(RATE),
    "layer 1, adamw, rho=20": lambda: _firm(RATE),
    "layer 1, adamw, rho=20, clipped": lambda: clipped(_firm(RATE)),
    "layer 1, sgdw": lambda: yoto.sgdw(0.3),
    "layer 1, sgdw, clipped": lambda: clipped(yoto.sgdw(0.3)),
}
METHODS = (*WEIGHTINGS, *OPTIMIZERS)


def clipped(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """With its gradient no longer than 1: an infinite one, by overflow, becomes 0."""
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


class Outcome(NamedTuple):
    """What came of a method on every stream; S streams."""

    weights: np.ndarray  # (S, 3) mean over the last fifth of the steps
    earlier: np.ndarray  # (S, 3) the same, as many steps earlier as there are faults
    losses: np.ndarray  # (S, 3) mean of the true losses, without noise or fault
    state_broke: np.ndarray  # (S,) the weighting's state was not finite at some step
    training_broke: np.ndarray  # (S,) parameters or the optimizer's state were not
    skipped: np.ndarray  # (S,) batches that the weighting skipped
    not_stepped: np.ndarray  # (S,) batches on which no step was taken


class _Run(NamedTuple):
    """One training run: how it starts, steps, and what is to be seen of it."""

    start: Any
    step: Callable[[Any, Array, Array], Any]
    w: Callable[[Any], Array]
    weights: Callable[[Any], Any]
    weighting_state: Callable[[Any], Any]
    optimizer_state: Callable[[Any], Any]


def run(method: str, protected: bool, steps: int) -> Outcome:
    """Train on all streams side by side, in one program."""
    build = _of_optimizer if method in OPTIMIZERS else _of_weighting
    one = build(method, protected)
    seeds = jax.random.split(jax.random.key(2), OTHERS + 1)
    noise = lambda seed: jax.random.normal(seed, (steps, 3, SIZE))
    faults = jax.random.bernoulli(jax.random.key(3), PROBABILITY, (steps, 3))
    num_faulty = jnp.sum(jnp.any(faults, axis=1))
    window = max(1, steps // 5)
    last = jnp.arange(steps) >= steps - window
    earlier = jnp.roll(last, -num_faulty)
    factors, batches = jnp.asarray(FACTORS), jnp.asarray(BATCHES)

    def step(carry: Any, given: Any) -> Any:
        noise, faulty, *windows = given
        state, sums, broke = carry

        def advance(state: Any, batch: Array, factor: Array) -> Any:
            # Not a product: 0 times NaN would be a fault where there is none.
            return one.step(state, noise[batch], jnp.where(faulty, factor, 1.0))

        state = jax.vmap(advance)(state, batches, factors)
        weights, losses, broken = jax.vmap(lambda s: _seen(one, s))(state)
        last, earlier = windows
        parts = (last, weights), (earlier, weights), (last, losses)
        parts = [jnp.where(use, x, 0) for use, x in parts]
        sums = jax.tree.map(jnp.add, sums, parts)
        broke = jax.tree.map(jnp.logical_or, broke, broken)
        return (state, sums, broke), None

    @jax.jit
    def train() -> Any:
        many = jax.tree.map(lambda x: jnp.stack([x] * len(STREAMS)), one.start)
        none = [jnp.zeros((len(STREAMS), 3)) for _ in range(3)]
        never = [jnp.zeros(len(STREAMS), bool) for _ in range(2)]
        given = jnp.moveaxis(jax.vmap(noise)(seeds), 0, 1), faults, last, earlier
        (state, sums, broke), _ = jax.lax.scan(step, (many, none, never), given)
        count = lambda state, *names: next(
            sum(found)
            for name in names
            if (found := [x for _, x in optax.tree.get_all_with_path(state, name)])
        )
        nobody = jnp.zeros(len(STREAMS), jnp.int32)
        weighting_state = one.weighting_state(state)
        return (
            *(x / window for x in sums),
            *broke,
            count(weighting_state, "num_skipped") if weighting_state else nobody,
            count(one.optimizer_state(state), "num_skipped", "total_notfinite"),
        )

    return Outcome(*map(np.asarray, train()))


def _seen(one: _Run, state: Any) -> Any:
    """Weights and true losses, and what of the state is not finite."""
    weights = jnp.stack(jax.tree.leaves(one.weights(state)))
    true = losses_of(one.w(state), jnp.zeros((3, SIZE)), jnp.ones(3))
    broke = lambda tree: ~wrapper.all_finite(tree)
    training = one.w(state), one.optimizer_state(state)
    return (
        weights,
        jnp.stack(list(true.values())),
        [broke((weights, one.weighting_state(state))), broke(training)],
    )


def _protect(tx: Any, protected: bool) -> Any:
    if protected:
        return skip_outliers(tx, RULE, losses=dict.fromkeys(NAMES, 0.0))
    return optax.apply_if_finite(tx, CONSECUTIVE)


def _of_weighting(method: str, protected: bool) -> _Run:
    weighting = WEIGHTINGS[method]()
    if protected:
        weighting = wrapper.skip_outliers(weighting, RULE)
    tx = _protect(clipped(optax.adam(RATE)), protected)
    statistics = {"ntk_diagonal": kernel_diagonal}
    asked = {k: f for k, f in statistics.items() if k in weighting.needs}
    value_and_grad = yoto.value_and_grad(losses_of, weighting, statistics=asked)

    def step(carry: Any, noise: Array, factors: Array) -> Any:
        params, opt_state, state = carry
        losses, grads, state = value_and_grad(params, state, noise, factors)
        extra = {"losses": losses} if protected else {}
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, state

    params = jnp.zeros(SIZE)
    return _Run(
        (params, tx.init(params), weighting.init(dict.fromkeys(NAMES, 0.0))),
        step,
        w=lambda carry: carry[0],
        weights=lambda carry: optax.tree.get(carry[2], "loss_weights"),
        weighting_state=lambda carry: carry[2],
        optimizer_state=lambda carry: carry[1],
    )


def _of_optimizer(method: str, protected: bool) -> _Run:
    tx = _protect(OPTIMIZERS[method](), protected)

    def step(carry: Any, noise: Array, factors: Array) -> Any:
        params, opt_state = carry

        def objective(params: Any) -> tuple[Array, Any]:
            losses = losses_of(params["w"], noise, factors)
            return yoto.composite_loss(losses, params["mu"]), losses

        grads, losses = jax.grad(objective, has_aux=True)(params)
        extra = {"losses": losses} if protected else {}
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    mu = yoto.init_loss_logits(dict.fromkeys(NAMES, 0.0), primary="a")
    params = {"w": jnp.zeros(SIZE), "mu": mu}
    return _Run(
        (params, tx.init(params)),
        step,
        w=lambda carry: carry[0]["w"],
        weights=lambda carry: yoto.loss_weights(carry[0]["mu"]),
        weighting_state=lambda carry: (),
        optimizer_state=lambda carry: carry[1],
    )
