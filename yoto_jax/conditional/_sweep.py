"""Sweeps over loss weights, checks of calibration, and selection."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from yoto_jax._losses import Losses, PyTree, Weights, listed, loss_names
from yoto_jax._solvers import dot
from yoto_jax.conditional._pareto import arrays, check_alike


def sweep(
    function: Callable[[PyTree], PyTree],
    weights: Weights,
    *,
    batch_size: int | None = None,
) -> PyTree:
    """Evaluates a conditional model at many weightings.

    Compile it with everything around it: ``jax.jit(lambda params: sweep(...))``.

    Args:
      function: Takes one weighting, a tree of scalars, and returns a tree of arrays:
        the mean of every loss over the data, say, or images.
      weights: Tree of ``(n,)`` arrays, one entry for each weighting, such as a
        distribution's ``grid`` gives.
      batch_size: How many weightings are evaluated side by side. ``None`` is all of
        them, the fastest, in n times the memory of one.

    Returns:
      Tree like the function's result, with a leading axis ``n``.

    Raises:
      ValueError: The weights are not arrays with the same leading axis, or
        ``batch_size`` is not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> def evaluate(weights):
      ...     x = weights["b"]  # the minimiser of a x^2 + b (x - 1)^2, if a + b = 1
      ...     return {"a": x**2, "b": (x - 1) ** 2}
      >>> weights = {"a": jnp.array([1.0, 0.5, 0.0]), "b": jnp.array([0.0, 0.5, 1.0])}
      >>> losses = conditional.sweep(evaluate, weights)
      >>> print(losses["a"], losses["b"])
      [0.   0.25 1.  ] [1.   0.25 0.  ]
    """
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(weights)}
    if len(sizes) != 1 or sizes == {()}:
        shapes = jax.tree.map(np.shape, weights)
        raise ValueError(
            f"weights must be a tree of arrays (n,), with one n for all, got {shapes}."
        )
    weights = jax.tree.map(jnp.asarray, weights)
    if batch_size is None:
        return jax.vmap(function)(weights)
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}.")
    return jax.lax.map(function, weights, batch_size=batch_size)


def cross_matrix(losses: Losses, weights: Weights) -> jax.Array:
    r"""Objective of every weighting at the model of every weighting.

    .. math::
      M_{ij} = \sum_k w_{i,k} L_k(\theta(w_j)).

    In a calibrated model the minimum of row i is ``M[i, i]``: the model conditioned on
    weighting i is the best one for it.

    Args:
      losses: Tree of ``(n,)`` arrays: the losses of the model conditioned on each
        weighting.
      weights: Tree like the losses, of ``(n,)`` arrays.

    Returns:
      Array ``(n, n)`` in float32, or in float64 if an input is.

    Raises:
      ValueError: The trees do not match (missing and unexpected losses are named), or
        an array does not have the shape ``(n,)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> losses = {"a": jnp.array([0.0, 0.25, 1.0]), "b": jnp.array([1.0, 0.25, 0.0])}
      >>> weights = {"a": jnp.array([1.0, 0.5, 0.0]), "b": jnp.array([0.0, 0.5, 1.0])}
      >>> matrix = conditional.cross_matrix(losses, weights)
      >>> print(matrix)
      [[0.   0.25 1.  ]
       [0.5  0.25 0.5 ]
       [1.   0.25 0.  ]]
      >>> print(matrix.argmin(axis=1))
      [0 1 2]
    """
    columns, rows = _pair(losses, weights)
    return dot(jnp.stack(rows, axis=1), jnp.stack(columns))


def gap(losses: Losses, reference_losses: PyTree, weights: Weights) -> jax.Array:
    r"""Excess objective of a conditional model over reference models.

    .. math::
      g_i = \sum_k w_{i,k} \bigl(L_k(w_i) - L^{\mathrm{ref}}_k(w_i)\bigr).

    A difference and not a ratio: losses may be negative, such as negative
    log-likelihoods of densities.

    Args:
      losses: Tree of ``(n,)`` arrays: the losses of the model conditioned on each
        weighting.
      reference_losses: Tree like the losses, of ``(n,)`` arrays: those of the models
        trained for each weighting alone.
      weights: Tree like the losses, of ``(n,)`` arrays.

    Returns:
      Array ``(n,)`` in float32, or in float64 if an input is: positive where the
      conditional model is worse.

    Raises:
      ValueError: The trees do not match (missing and unexpected losses are named), or
        an array does not have the shape ``(n,)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> losses = {"a": jnp.array([0.0, 0.5]), "b": jnp.array([1.0, 0.25])}
      >>> separate = {"a": jnp.array([0.0, 0.25]), "b": jnp.array([1.0, 0.25])}
      >>> weights = {"a": jnp.array([1.0, 0.5]), "b": jnp.array([0.0, 0.5])}
      >>> print(conditional.gap(losses, separate, weights))
      [0.    0.125]
    """
    ours, by_loss = _pair(losses, weights)
    theirs, _ = _pair(reference_losses, weights, what="reference_losses")
    terms = [w * (a - b) for w, a, b in zip(by_loss, ours, theirs, strict=True)]
    return sum(terms[1:], terms[0])


def monotonicity_violations(losses: Losses, weights: Weights) -> jax.Array:
    r"""Violations of monotonicity between weights and losses: 0 for minimisers.

    .. math::
      v_{ab} = \max\Bigl(0, \sum_k (w_{a,k} - w_{b,k}) (L_k(w_a) - L_k(w_b))\Bigr).

    If each model minimises its own weighted sum, the inequalities for a and b add up
    to :math:`v_{ab} = 0`: a larger weight on a loss, a smaller loss.

    Args:
      losses: Tree of ``(n,)`` arrays: the losses of the model conditioned on each
        weighting.
      weights: Tree like the losses, of ``(n,)`` arrays.

    Returns:
      Symmetric array ``(n, n)`` in float32, or in float64 if an input is. Losses
      measured on other data than the model was trained on can violate it by chance.

    Raises:
      ValueError: The trees do not match (missing and unexpected losses are named), or
        an array does not have the shape ``(n,)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> losses = {"a": jnp.array([0.0, 0.25, 1.0]), "b": jnp.array([1.0, 0.25, 0.0])}
      >>> weights = {"a": jnp.array([1.0, 0.5, 0.0]), "b": jnp.array([0.0, 0.5, 1.0])}
      >>> print(conditional.monotonicity_violations(losses, weights))
      [[0. 0. 0.]
       [0. 0. 0.]
       [0. 0. 0.]]
      >>> swapped = {"a": losses["b"], "b": losses["a"]}
      >>> print(conditional.monotonicity_violations(swapped, weights).max())
      2.0
    """
    # As products of differences: the sum of entries of the cross matrix would cancel.
    terms = [
        (w[:, None] - w[None, :]) * (x[:, None] - x[None, :])
        for x, w in zip(*_pair(losses, weights), strict=True)
    ]
    return jnp.maximum(sum(terms[1:], terms[0]), 0)


def concavity_violations(values: jax.Array, positions: jax.Array) -> jax.Array:
    r"""Violations of concavity along a line of weightings: 0 for minima.

    .. math::
      c_i = \max\Bigl(0,\ \frac{(x_{i+1} - x_i) V_{i-1} + (x_i - x_{i-1}) V_{i+1}}
      {x_{i+1} - x_{i-1}} - V_i\Bigr), \qquad i = 1, \dots, n - 2.

    The minimum :math:`V(w) = \min_\theta \sum_k w_k L_k(\theta)` is concave in the
    weights, as the lower envelope of functions that are linear in them. ``V`` is the
    diagonal of :func:`yoto_jax.conditional.cross_matrix`.

    Args:
      values: Array ``(n,)``: the weighted sum of the losses at each weighting.
      positions: Array ``(n,)``: where the weightings lie on a line in the space of
        weights, in order. With one free weight, that weight; not its logarithm, in
        which the minimum is not concave.

    Returns:
      Array ``(n - 2,)`` in float32, or in float64 if an input is.

    Raises:
      ValueError: The arrays have other shapes, fewer than three entries, or positions
        that are out of order or equal.

    Examples:
      >>> import jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> positions = jnp.array([0.0, 0.25, 0.5, 0.75, 1.0])
      >>> minima = jnp.array([0.0, 0.1875, 0.25, 0.1875, 0.0])
      >>> print(conditional.concavity_violations(minima, positions))
      [0. 0. 0.]
      >>> print(conditional.concavity_violations(minima.at[2].set(0.125), positions))
      [0.     0.0625 0.    ]
    """
    leaves = {"values": values, "positions": positions}
    for name, leaf in leaves.items():
        if np.ndim(leaf) != 1 or np.shape(leaf) != np.shape(values):
            raise ValueError(
                "values and positions must be arrays of one shape (n,), got shape "
                f"{np.shape(leaf)} for {name}."
            )
    if np.size(values) < 3:
        raise ValueError(
            f"concavity needs at least 3 values, got {np.size(values)} of them."
        )
    leaves = {name: jnp.asarray(leaf) for name, leaf in leaves.items()}
    x, v = arrays("", leaves)
    if not isinstance(x, jax.core.Tracer):
        steps = np.diff(np.asarray(x))
        if not (np.all(steps > 0) or np.all(steps < 0)):
            raise ValueError(
                "positions must be in order, without equal ones: sort values and "
                f"positions together; got {np.asarray(x)}."
            )
    # The share of the way from the left neighbour to the right one.
    share = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    chord = v[:-2] + share * (v[2:] - v[:-2])
    return jnp.maximum(chord - v[1:-1], 0)


def select(
    metrics: Mapping[str, Any],
    *,
    minimize: str | None = None,
    maximize: str | None = None,
    at_least: Mapping[str, float] | None = None,
    at_most: Mapping[str, float] | None = None,
) -> int:
    """Selects the weighting that is best in one metric, subject to bounds on others.

    It runs on the host, with known values. Measure the metrics on validation data: a
    selection on test data is biased.

    Args:
      metrics: Tree of ``(n,)`` arrays, such as
        :func:`yoto_jax.conditional.sweep` returns. A metric goes by its path in the
        tree: ``"psnr"``, ``"losses/kl"``.
      minimize: The metric to make small; or
      maximize: the metric to make large. Exactly one of the two.
      at_least: Lower bounds of metrics.
      at_most: Upper bounds of metrics.

    Returns:
      Index of the weighting, the first among equals, never one at which a requested
      metric is NaN.

    Raises:
      TypeError: The values are not known, as under ``jit``.
      ValueError: A metric is unknown, a constraint cannot be met (it is named, with how
        far the weightings get), the arrays are not all of one shape ``(n,)``, or two
        have the same path.

    Examples:
      >>> import jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> metrics = {
      ...     "psnr": jnp.array([27.0, 25.0, 24.5, 21.0]),
      ...     "kl": jnp.array([90.0, 40.0, 30.0, 5.0]),
      ... }
      >>> conditional.select(metrics, minimize="kl", at_least={"psnr": 24.0})
      2
      >>> conditional.select(metrics, maximize="psnr", at_most={"kl": 50.0})
      1
    """
    chosen = maximize if minimize is None else minimize
    if chosen is None or None not in (minimize, maximize):
        raise ValueError(
            "name one metric, to minimize or to maximize; got "
            f"minimize = {minimize!r}, maximize = {maximize!r}."
        )
    table = _known(metrics)
    bounds = [
        (name, sign, float(bound))
        for sign, given in ((1, at_least), (-1, at_most))
        for name, bound in (given or {}).items()
    ]
    for name in (chosen, *(name for name, _, _ in bounds)):
        if name not in table:
            raise ValueError(f"no metric {name!r}; the metrics are: {listed(table)}.")
    score = table[chosen] if maximize is None else -table[chosen]
    allowed, met = ~np.isnan(score), []
    if not allowed.any():
        raise ValueError(f"the metric {chosen!r} is NaN at every weighting.")
    for name, sign, bound in bounds:
        fits = sign * table[name] >= sign * bound
        text = f"{name} {'>=' if sign > 0 else '<='} {bound:g}"
        if not fits.any():
            raise ValueError(
                f"no weighting meets {text}: {_closest(table[name], sign)}."
            )
        allowed &= fits
        met.append(f"{text} (met at {fits.sum()})")
    if not allowed.any():
        raise ValueError(
            f"none of the {len(score)} weightings meets all constraints together: "
            f"{', '.join(met)}."
        )
    (candidates,) = np.nonzero(allowed)
    return int(candidates[np.argmin(score[candidates])])


def _known(metrics: PyTree) -> dict[str, np.ndarray]:
    """Metrics by name, on the host."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(metrics)):
        raise TypeError("select needs known values: call it outside of jit and vmap.")
    names = loss_names(jax.tree.structure(metrics))
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"two metrics have the same path {listed(sorted(twice))}: rename one."
        )
    return dict(zip(names, map(np.asarray, arrays("metrics", metrics)), strict=True))


def _closest(values: np.ndarray, sign: int) -> str:
    if np.isnan(values).all():
        return "it is NaN at all of them"
    best = np.nanmax(values) if sign > 0 else np.nanmin(values)
    return f"the {'largest' if sign > 0 else 'smallest'} is {best:.5g}"


def _pair(
    losses: Losses, weights: Weights, what: str = "losses"
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Losses and weights, one array (n,) for each loss, in one order."""
    check_alike(
        what, jax.tree.structure(losses), "weights", jax.tree.structure(weights)
    )
    columns, by_loss = arrays(what, losses), arrays("weights", weights)
    if columns[0].shape != by_loss[0].shape:
        raise ValueError(
            f"{what} and weights must have the same length, one entry for each "
            f"weighting, got {columns[0].size} and {by_loss[0].size}."
        )
    return columns, by_loss
