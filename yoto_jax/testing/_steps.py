"""What a weighting promises as part of a training step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from yoto_jax._losses import Params
from yoto_jax._weighting import count_skipped, weights_of
from yoto_jax.testing._compare import (
    named_leaves,
    numbers,
    require,
    require_close,
    require_equal,
    require_finite,
    require_types,
)
from yoto_jax.testing._promises import check_weights, require_dtype, require_skipped
from yoto_jax.testing._trial import Trial, descend


def check_training(trial: Trial) -> None:
    """One trace, types that never change, finite numbers, and every batch counts."""
    steps = len(trial.batches)
    start = trial.init()
    params, state, history = trial.train(steps)
    require(
        trial.traces == 1,
        f"one trace is enough for all steps, {trial.traces} were made.",
    )
    require_types(state, start, "the state")
    for weights in history:
        check_weights(weights, trial, "loss weights")
    require_finite((params, state), "parameters and state")
    updates = int(optax.tree.get(state, "num_updates"))
    skipped = count_skipped(state)
    due = trial.weighting.due is not None
    require(
        updates == steps or (due and 0 < updates < steps),
        f"num_updates must count the batches, {steps}, got {updates}.",
    )
    require(skipped == 0, f"num_skipped must be 0 after good batches, got {skipped}.")
    again = trial.train(steps)
    require_equal(again, (params, state, history), "a second run")


def check_eager(trial: Trial) -> None:
    """Without ``jit`` the same comes out."""
    arguments = trial.params, trial.init(), trial.batches[0]
    expected = trial.step(*arguments)
    require_close(trial.value_and_grad()(*arguments), expected, "a step without jit")


def check_scan_and_vmap(trial: Trial) -> None:
    """Under ``scan`` under ``vmap`` the same comes out as in a loop."""
    batches, scales = trial.batches[:3], (0.5, 1.0)

    def run(scale: jax.Array) -> Any:
        def step(carry: Any, x: jax.Array) -> Any:
            params, state = carry
            _, grads, state = trial.step(params, state, x)
            return (descend(params, grads), state), weights_of(state)

        params = jax.tree.map(lambda p: p * scale, trial.params)
        return jax.lax.scan(step, (params, trial.init()), batches)

    many = jax.jit(jax.vmap(run))(jnp.array(scales))
    for lane, scale in enumerate(scales):
        *expected, history = trial.train(len(batches), scale)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *history)
        got = jax.tree.map(lambda x, lane=lane: x[lane], many)
        wanted = tuple(expected), stacked
        require_close(got, wanted, "training under scan and vmap", rtol=1e-4)


def check_gradient(trial: Trial) -> None:
    """The gradient is that of the weighted sum, and the losses are as they were."""
    x = trial.batches[1]
    losses, grads, state = trial.stay(2)
    weights = jax.tree.leaves(weights_of(state))

    def composite(params: Params) -> jax.Array:
        leaves = jax.tree.leaves(trial.loss_fn(params, x))
        return sum(map(jnp.multiply, weights, leaves), jnp.zeros(()))

    require_close(grads, jax.grad(composite)(trial.params), "the gradient")
    require_close(losses, trial.loss_fn(trial.params, x), "losses")


def check_zero_gradients(trial: Trial) -> None:
    """Where no loss has a slope, weights are finite and the gradient is zero."""
    nothing = jax.tree.map(jnp.zeros_like, trial.params)
    for count in (1, 2, 3):
        _, grads, state = trial.stay(count, nothing)
        for name, g in named_leaves(grads).items():
            require(not numbers(g).any(), f"the gradient must be 0, {name!r} is {g}.")
    require_finite((grads, state), "gradient and state where no loss has a slope")
    skipped = count_skipped(state)
    require(skipped == 0, f"gradients of zero are no reason to skip, {skipped} were.")


def check_bad_batches(trial: Trial) -> None:
    """A batch that is not finite changes nothing but a counter."""
    for bad in (np.nan, np.inf):
        _, _, state = trial.stay(2)
        spoilt = trial.batches[2].at[3, 1].set(bad)
        spoilt = spoilt.at[4, 1].set(-bad)  # tanh turns infinities into numbers
        poison = jax.tree.map(lambda p, bad=bad: p * bad, trial.params)
        _, _, after = trial.step(poison, state, spoilt)
        require_skipped(after, state, f"losses and gradients of {bad}")
        _, grads, state = trial.step(trial.params, after, trial.batches[3])
        require_finite((grads, state), f"gradient and state after a batch of {bad}")


def check_precision(trial: Trial) -> None:
    """Losses in bfloat16 have weights in float32, those in float64 in float64."""
    for dtype, wide in (("bfloat16", "float32"), ("float64", "float64")):
        with jax.enable_x64(dtype == "float64"):
            cast = lambda x, dtype=dtype: jnp.asarray(np.asarray(x), dtype)
            params = jax.tree.map(cast, trial.params)
            shapes = jax.eval_shape(trial.loss_fn, params, cast(trial.batches[0]))
            out: Any = None, None, trial.weighting.init(shapes)
            step = jax.jit(trial.value_and_grad())
            for x in trial.batches[:2]:
                new = step(params, out[-1], cast(x))
                require_types(new[-1], out[-1], f"the state with losses in {dtype}")
                out = new
            losses, grads, state = out
            require_dtype(losses, dtype, f"losses in {dtype}")
            require_dtype(grads, dtype, f"gradients of parameters in {dtype}")
            require_dtype(weights_of(state), wide, f"weights of losses in {dtype}")
            require_finite((grads, state), f"gradient and state in {dtype}")
