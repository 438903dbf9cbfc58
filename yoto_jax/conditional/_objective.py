"""Objectives of conditional training, from losses and weights per example."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from yoto_jax._checks import check_integers, check_not_negative, check_positive
from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import Losses, PyTree, Weights, check_structure, loss_names
from yoto_jax._numerics import float_type, upcast

Normalization = Literal["sum", "geometric", "max"] | Callable[[PyTree], jax.Array]


def conditional_loss(
    losses: Losses,
    weights: Weights,
    *,
    normalize: Normalization | None = None,
    scalarization: Callable[[PyTree, PyTree], jax.Array] | None = None,
    groups: int | None = None,
) -> jax.Array:
    r"""Objective of a model that is conditioned on its loss weights.

    .. math::
      \frac1n \sum_{b=1}^n \frac{1}{c(\lambda_b)} \sum_i \lambda_{b,i}\, l_i(x_b;
      \lambda_b)

    Every example is weighted by the weights that condition its forward pass.

    Args:
      losses: Tree of losses, each with one value per example: arrays ``(n,)``.
      weights: Tree of arrays ``(n,)`` with the same structure, from ``sample``.
      normalize: The divisor c: ``None`` for 1, ``"sum"`` of an example's weights, their
        ``"geometric"`` mean (the reference's option; for positive weights alone), their
        ``"max"``, or a function of the tree of weights.
      scalarization: Function of two trees, the losses and weights of an example, such
        as :func:`weighted_sum` (the default), :func:`cosmos`, :func:`smooth_chebyshev`
        or :func:`pbi`.
      groups: Number of groups of consecutive examples whose means take the place of
        single examples, for losses defined over several examples. Sample the weights
        with the same ``groups``.

    Returns:
      Scalar in float32, or in float64 if an input is.

    Raises:
      TypeError: A loss is complex, or ``scalarization`` no function.
      ValueError: Missing or unexpected losses, losses or weights that are not arrays of
        one shape ``(n,)``, an unknown normalisation, or ``groups`` not dividing n;
        where values are known, a negative or non-finite weight, or a divisor that is
        not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> losses = {"fit": jnp.array([2.0, 4.0]), "kl": jnp.array([1.0, 3.0])}
      >>> weights = {"fit": jnp.ones(2), "kl": jnp.array([1.0, 3.0])}
      >>> print(conditional.conditional_loss(losses, weights))  # (3 + 13) / 2
      8.0
      >>> print(conditional.conditional_loss(losses, weights, normalize="sum"))
      2.375

    References:
      Dosovitskiy and Djolonga, `You Only Train Once: Loss-Conditional Training of Deep
      Networks <https://openreview.net/forum?id=HyxY6JHKwr>`_, 2020.

    """
    check_per_example(losses, weights)
    _check_known_weights(weights)
    if scalarization is not None and not callable(scalarization):
        raise TypeError(
            "scalarization must be a function of losses and weights, such as "
            f"conditional.cosmos, got {scalarization!r}."
        )
    if groups is not None:
        losses, weights = group_mean(losses, groups), group_mean(weights, groups)
    scalarize = weighted_sum if scalarization is None else scalarization
    values = jnp.asarray(scalarize(losses, weights))
    divisor = _divisor(normalize, weights)
    n = jnp.shape(jax.tree.leaves(losses)[0])
    for what, given in (("scalarization", values), ("normalization", divisor)):
        if given.shape != n:
            raise ValueError(
                f"the {what} must give one value per example, shape {n}; got shape "
                f"{given.shape}."
            )
    known = _known(divisor)
    if known is not None and not (known > 0).all():
        raise ValueError(
            f"normalize={normalize!r} must give a positive number for every example, "
            f"got {float(known.min()):g}."
        )
    return jnp.mean(values / divisor.astype(values.dtype))


def _divisor(normalize: Normalization | None, weights: Weights) -> jax.Array:
    w = _stack(weights, "weights")
    if normalize is None:
        return jnp.ones(w.shape[:-1], w.dtype)
    if callable(normalize):
        return upcast(jnp.asarray(normalize(weights)))
    ways = {
        "sum": functools.partial(jnp.sum, axis=-1),
        "geometric": lambda w: jnp.exp(jnp.mean(jnp.log(w), axis=-1)),
        "max": functools.partial(jnp.max, axis=-1),
    }
    if not isinstance(normalize, str) or normalize not in ways:
        raise ValueError(
            f"normalize must be None, a function, or one of {', '.join(ways)}; got "
            f"{normalize!r}."
        )
    return ways[normalize](w)


def group_mean(tree: PyTree, groups: int) -> PyTree:
    """Averages over groups of consecutive examples.

    Args:
      tree: Tree of arrays ``(n, ...)``.
      groups: Number of groups; divides n.

    Returns:
      Tree of arrays ``(groups, ...)`` in float32, or in float64 if they come in that.

    Raises:
      TypeError: ``groups`` is no integer.
      ValueError: ``groups`` does not divide n.

    Examples:
      >>> import jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> print(conditional.group_mean({"fit": jnp.arange(4.0)}, 2)["fit"])
      [0.5 2.5]
    """
    check_integers(groups=groups)

    def of_one(x: Any) -> jax.Array:
        x = upcast(jnp.asarray(x))
        n = x.shape[0] if x.ndim else 0
        if groups < 1 or not n or n % groups:
            raise ValueError(
                f"groups must divide the number of examples, {n}; got {groups}."
            )
        return jnp.mean(x.reshape(groups, n // groups, *x.shape[1:]), axis=1)

    return jax.tree.map(of_one, tree)


# Scalarizations.


def weighted_sum(losses: Losses, weights: Weights) -> jax.Array:
    r"""Linear scalarization, :math:`\sum_i \lambda_i l_i`.

    A larger :math:`\lambda_i` makes :math:`l_i` smaller. The minima reach only the
    convex parts of a Pareto front.

    Args:
      losses: Tree of arrays of one shape, such as ``(n,)`` or scalars.
      weights: Tree like the losses.

    Returns:
      Array of that shape.

    Raises:
      ValueError: The trees do not match.

    Examples:
      >>> from yoto_jax import conditional
      >>> print(conditional.weighted_sum({"a": 2.0, "b": 1.0}, {"a": 0.3, "b": 0.7}))
      1.3
    """
    values, w = _pair(losses, weights)
    return jnp.sum(w * values, axis=-1)


def cosmos(losses: Losses, weights: Weights, *, penalty: float = 2.0) -> jax.Array:
    r"""COSMOS: weighted sum minus a cosine that spreads solutions over the front.

    .. math::
      \sum_i r_i l_i - \mu\, \frac{r \cdot l}{\lVert r \rVert \lVert l \rVert}

    In the sum, a larger :math:`r_i` makes :math:`l_i` smaller; the cosine pulls the
    vector of losses parallel to r, so that a larger :math:`r_i` makes :math:`l_i`
    *larger*. The penalty decides between the two.

    Args:
      losses: Tree of non-negative losses, arrays of one shape, means over a batch in
        the paper (``groups=1`` of :func:`conditional_loss`).
      weights: Tree like the losses, drawn from a :class:`Dirichlet`.
      penalty: The factor :math:`\mu` (2 in the paper on MultiMNIST).

    Returns:
      Array of that shape. Where all losses are 0, the cosine counts as 0.

    Raises:
      ValueError: The trees do not match, or ``penalty`` is negative.

    Examples:
      >>> from yoto_jax import conditional
      >>> value = conditional.cosmos({"a": 2.0, "b": 1.0}, {"a": 0.3, "b": 0.7})
      >>> print(round(float(value), 6))
      -0.226773

    References:
      Ruchte and Grabocka, `Scalable Pareto Front Approximation for Deep Multi-Objective
      Learning <https://arxiv.org/abs/2103.13392>`_, 2021, Eq. 5.
    """
    check_not_negative(penalty=penalty)
    values, w = _pair(losses, weights)
    product = jnp.sum(w * values, axis=-1)
    length = _norm(w) * _norm(values)
    cosine = jnp.where(length > 0, product / jnp.where(length > 0, length, 1), 0)
    return product - penalty * cosine


def smooth_chebyshev(
    losses: Losses, weights: Weights, *, smoothing: float = 1.0, ideal: PyTree = 0.0
) -> jax.Array:
    r"""Smooth Chebyshev: a soft maximum of the weighted losses.

    .. math::
      \mu \log \sum_i \exp \frac{\lambda_i (l_i - z_i)}{\mu}

    What weights mean: a larger :math:`\lambda_i` makes :math:`l_i` smaller. With little
    smoothing, the minimum has all :math:`\lambda_i (l_i - z_i)` equal (an exact ray),
    and every point of the front is one, on its concave parts too. Its gradient is what
    :func:`yoto_jax.weightings.stch` weighs losses by.

    Args:
      losses: Tree of arrays of one shape.
      weights: Tree like the losses.
      smoothing: The :math:`\mu` (positive, in the unit of the weighted losses). Under
        ``jit``, where its value is not known, 0 gives the maximum itself.
      ideal: The values :math:`z_i` that losses are measured from, at most the lowest
        ones: one number, one per loss in the order of ``jax.tree.leaves``, or a tree
        like the losses.

    Returns:
      Array of that shape.

    Raises:
      ValueError: The trees do not match, ``ideal`` does not fit the losses, or
        ``smoothing`` is not positive.

    Examples:
      >>> from yoto_jax import conditional
      >>> losses, weights = {"a": 2.0, "b": 1.0}, {"a": 0.3, "b": 0.7}
      >>> value = conditional.smooth_chebyshev(losses, weights, smoothing=0.01)
      >>> print(round(float(value), 3))
      0.7

    References:
      Lin et al., `Smooth Tchebycheff Scalarization for Multi-Objective Optimization
      <https://arxiv.org/abs/2402.19078>`_, 2024.
    """
    check_positive(smoothing=smoothing)
    values, w = _pair(losses, weights)
    distances = w * (values - _ideal(ideal, losses, values))
    return smooth_maximum(distances, smoothing, axis=-1)


_LARGEST = 1e30
"""Of ratios of losses to the smoothing; the soft maximum is the maximum there."""


def smooth_maximum(x: jax.Array, smoothing: Any, axis: int) -> jax.Array:
    """Soft maximum along an axis; where the smoothing is 0, the maximum itself."""
    mu = jnp.asarray(smoothing, x.dtype)
    most = jnp.max(x, axis=axis)
    ratios = x / jnp.where(mu > 0, mu, 1)
    # Without the minimum, a compiler may take the largest entry, rounded, from the same
    # entry before it is rounded: of large ones more than exp can take.
    smooth = mu * jax.nn.logsumexp(jnp.minimum(ratios, _LARGEST), axis=axis)
    return jnp.where((mu > 0) & (most <= mu * _LARGEST), smooth, most)


def pbi(
    losses: Losses, weights: Weights, *, penalty: float = 5.0, ideal: PyTree = 0.0
) -> jax.Array:
    r"""Penalty-based boundary intersection: distance along a ray and from it.

    .. math::
      d_1 + \theta\, d_2, \quad d_1 = \frac{(l - z) \cdot \lambda}{\lVert \lambda
      \rVert}, \quad
      d_2 = \Big\lVert (l - z) - d_1 \frac{\lambda}{\lVert \lambda \rVert} \Big\rVert

    The losses become *parallel* to the weights, so that a larger :math:`\lambda_i`
    makes :math:`l_i` larger.

    Args:
      losses: Tree of arrays of one shape.
      weights: Tree like the losses: the direction of the ray.
      penalty: The :math:`\theta` on the distance from the ray (5 in the paper).
      ideal: Where the ray begins: one number, one per loss in the order of
        ``jax.tree.leaves``, or a tree like the losses.

    Returns:
      Array of that shape.

    Raises:
      ValueError: The trees do not match, ``ideal`` does not fit the losses, or
        ``penalty`` is negative.

    Examples:
      >>> from yoto_jax import conditional
      >>> losses, weights = {"a": 3.0, "b": 4.0}, {"a": 1.0, "b": 0.0}
      >>> print(conditional.pbi(losses, weights))  # 3 along a, 4 away from it
      23.0

    References:
      Zhang and Li, `MOEA/D <https://doi.org/10.1109/TEVC.2007.892759>`_, 2007.
    """
    check_not_negative(penalty=penalty)
    values, w = _pair(losses, weights)
    values = values - _ideal(ideal, losses, values)
    length = _norm(w)[..., None]
    ray = w / jnp.where(length > 0, length, 1)
    along = jnp.sum(values * ray, axis=-1)
    return along + penalty * _norm(values - along[..., None] * ray)


# Families of losses that are not weighted sums.


def pinball_loss(
    predictions: jax.Array, targets: jax.Array, quantile: jax.Array
) -> jax.Array:
    r"""Pinball loss, minimised by a quantile of the targets.

    .. math::
      \max(\tau e, (\tau - 1) e), \quad e = y - \hat y

    Args:
      predictions: Array ``(n, ...)``.
      targets: Array of the same shape.
      quantile: The levels :math:`\tau` in (0, 1): ``(n,)``, or a scalar for all.

    Returns:
      Array ``(n,)``: means over the further axes.

    Raises:
      ValueError: Shapes do not match, or a level that is known is not in (0, 1).

    Examples:
      >>> import jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> loss = conditional.pinball_loss(jnp.zeros(2), jnp.array([1.0, -1.0]), 0.9)
      >>> print([round(float(x), 2) for x in loss])
      [0.9, 0.1]

    References:
      Koenker and Bassett, `Regression Quantiles
      <https://doi.org/10.2307/1913643>`_, 1978.
    """
    if jnp.shape(predictions) != jnp.shape(targets) or not jnp.ndim(targets):
        raise ValueError(
            "predictions and targets must have one shape (n, ...), got "
            f"{jnp.shape(predictions)} and {jnp.shape(targets)}."
        )
    error = upcast(jnp.asarray(targets)) - upcast(jnp.asarray(predictions))
    known = _known(quantile)
    if known is not None and not ((known > 0) & (known < 1)).all():
        raise ValueError(f"quantile must be in (0, 1), got {quantile}.")
    tau = _per_example("quantile", quantile, error)
    values = jnp.maximum(tau * error, (tau - 1) * error)
    return jnp.mean(values.reshape(len(values), -1), axis=-1)


def focal_loss(
    logits: jax.Array, labels: jax.Array, gamma: jax.Array | float
) -> jax.Array:
    r"""Focal loss: cross-entropy that downweights well-classified examples.

    .. math::
      -(1 - p_y)^\gamma \log p_y

    Args:
      logits: Array ``(n, classes)``.
      labels: Integers ``(n,)``.
      gamma: The focus :math:`\gamma \ge 0`: ``(n,)``, or a scalar for all; 0 is the
        plain cross-entropy.

    Returns:
      Array ``(n,)``. Under ``jit``, where values are not known, it is NaN for a label
      that is no class and for a negative ``gamma``.

    Raises:
      TypeError: The labels are no integers.
      ValueError: Shapes do not match, a label is no class, or ``gamma`` is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> logits, labels = jnp.zeros((2, 2)), jnp.array([0, 1])
      >>> loss = conditional.focal_loss(logits, labels, jnp.array([0.0, 2.0]))
      >>> print([round(float(x), 3) for x in loss])
      [0.693, 0.173]

    References:
      Lin et al., `Focal Loss for Dense Object Detection
      <https://arxiv.org/abs/1708.02002>`_, 2017, Eq. 4.
    """
    if jnp.ndim(logits) != 2 or jnp.shape(labels) != jnp.shape(logits)[:1]:
        raise ValueError(
            "logits must have shape (n, classes) and labels (n,), got "
            f"{jnp.shape(logits)} and {jnp.shape(labels)}."
        )
    if logits.shape[-1] < 2:
        raise ValueError("a classification needs at least two classes, got one.")
    _check_labels(labels, logits.shape[-1])
    known = _known(gamma)
    if known is not None and not (known >= 0).all():
        raise ValueError(f"gamma must not be negative, got {gamma}.")
    log_p = jax.nn.log_softmax(upcast(jnp.asarray(logits)), axis=-1)
    right = jax.nn.one_hot(labels, log_p.shape[-1], dtype=bool)
    log_right = jnp.sum(jnp.where(right, log_p, 0), axis=-1)
    # log(1 - p) from the other classes: 1 - p itself loses all digits as p nears 1.
    others = jnp.where(right, -jnp.inf, log_p)
    focus = _per_example("gamma", gamma, log_right)
    # An example that cannot be wrong has log(1 - p) = -inf, and no slope.
    sure = jnp.all(others == -jnp.inf, axis=-1)
    log_wrong = jax.nn.logsumexp(jnp.where(sure[:, None], 0, others), axis=-1)
    factor = jnp.exp(focus * jnp.where(sure, 0, log_wrong))
    loss = -jnp.where(sure & (focus > 0), 0, factor) * log_right
    return jnp.where(jnp.any(right, axis=-1) & (focus >= 0), loss, jnp.nan)


# Checks and small arithmetic.


def check_per_example(losses: Losses, weights: Weights) -> None:
    """Checks that both are trees of arrays ``(n,)`` with one structure and one n."""
    check_match(losses, weights)
    leaves = jax.tree.leaves(losses) + jax.tree.leaves(weights)
    n = jnp.shape(jax.tree.leaves(weights)[0])
    names = loss_names(jax.tree.structure(losses))
    kinds = ["loss"] * len(names) + ["the weight of loss"] * len(names)
    for kind, name, leaf in zip(kinds, names * 2, leaves, strict=True):
        shape = jnp.shape(leaf)
        if len(shape) != 1 or shape != n:
            raise ValueError(
                f"{kind} {name!r} must have one value per example, shape (n,) with the "
                f"n of the weights; got shape {shape}, beside {n}. Losses of whole "
                "groups of examples need one weighting per group: see group_mean."
            )


def _known(x: Any) -> np.ndarray | None:
    """The values; None if they are traced or lie in other processes."""
    traced = isinstance(x, jax.core.Tracer)
    if traced or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(x)


def _check_known_weights(weights: Weights) -> None:
    names = loss_names(jax.tree.structure(weights))
    for name, leaf in zip(names, jax.tree.leaves(weights), strict=True):
        if (known := _known(leaf)) is None:
            continue
        bad = known[~((known >= 0) & (known < np.inf))]
        if bad.size:
            raise ValueError(
                f"the weight of loss {name!r} must be non-negative and finite, got "
                f"{float(bad[0]):g} for {bad.size} of {known.size} examples."
            )


def _check_labels(labels: Any, classes: int) -> None:
    dtype = jnp.result_type(labels)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got dtype {dtype}.")
    known = _known(labels)
    if known is not None and not ((known >= 0) & (known < classes)).all():
        raise ValueError(
            f"labels must be from 0 to {classes - 1}, got {known.min()} to "
            f"{known.max()}."
        )


def check_match(losses: Losses, weights: Weights) -> None:
    """Checks that losses have the structure of the weights."""
    structure = jax.tree.structure(weights)
    check_structure(jax.tree.structure(losses), structure, "the weights")
    if not structure.num_leaves:
        raise ValueError("there are no losses to weigh.")


def _pair(losses: Losses, weights: Weights) -> tuple[jax.Array, jax.Array]:
    """Losses and weights, stacked on a last axis."""
    check_match(losses, weights)
    values, w = _stack(losses, "losses"), _stack(weights, "weights")
    if values.shape != w.shape:
        raise ValueError(
            f"losses have shape {values.shape[:-1]}, but weights {w.shape[:-1]}."
        )
    dtype = float_type([values.dtype, w.dtype])
    return values.astype(dtype), w.astype(dtype)


def _stack(tree: PyTree, what: str) -> jax.Array:
    leaves = jax.tree.leaves(tree)
    shapes = sorted({jnp.shape(x) for x in leaves})
    if len(shapes) > 1:
        raise ValueError(f"all {what} must have one shape, got {shapes}.")
    arrays = [jnp.asarray(x) for x in leaves]
    if any(jnp.iscomplexobj(x) for x in arrays):
        raise TypeError(f"{what} must be real numbers, got complex ones.")
    dtype = float_type(x.dtype for x in arrays)
    return jnp.stack([x.astype(dtype) for x in arrays], axis=-1)


def _ideal(ideal: Any, losses: Losses, values: jax.Array) -> jax.Array:
    spec = LossSpec(jax.tree.structure(losses), values.dtype)
    return jnp.broadcast_to(spec.vector("ideal", ideal), values.shape)


def _norm(x: jax.Array) -> jax.Array:
    """Euclidean length on the last axis; its gradient at 0 is 0, not NaN."""
    squared = jnp.sum(x**2, axis=-1)
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)


def _per_example(what: str, value: Any, beside: jax.Array) -> jax.Array:
    """A parameter per example, broadcast to the shape of ``beside``."""
    value = jnp.asarray(value, beside.dtype)
    if value.shape not in ((), beside.shape[:1]):
        raise ValueError(
            f"{what} must be a scalar or have shape {beside.shape[:1]}, got "
            f"{value.shape}."
        )
    axes = (-1,) + (1,) * (beside.ndim - 1)
    return jnp.broadcast_to(value.reshape(axes), beside.shape)
