"""Weights whose composite gradient points where a downstream loss falls."""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from yoto_jax._checks import check_decay, check_hyperparameter
from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting
from yoto_jax._numerics import running_mean
from yoto_jax._serialization import serializable_state
from yoto_jax._solvers import dot, safe_divide, solve_bounded_qp
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._inner_optimizer import descend, init_each

Algorithm = Literal[
    "sgd", "scaled-sgd", "closed-form", "warmup-sgd", "warmup-scaled-sgd"
]
Transform = Literal["abs", "linear"]
Normalization = Literal["gradient", "sum", "none"]


@serializable_state
class GrapState(NamedTuple):
    """What :func:`grap` has learned; K counts the losses without the downstream one."""

    raw_weights: jax.Array  # (K,), phi
    gradient_norms: jax.Array  # (K,), running means of the norms, nu
    cosines: jax.Array  # (K, K), running mean of those between the gradients, C
    alignments: jax.Array  # (K,), running mean of those with the downstream one, p
    solution: jax.Array  # (K,), running mean of closed-form weights, 0 before the first
    encoder_gain: jax.Array  # scalar, norm of cotangent by norm of gradient, tau
    opt_state: optax.OptState  # with counters for each loss
    num_batches: jax.Array  # int32 (K, K), batches with both losses
    num_compared: jax.Array  # int32 (K,), of them with a downstream gradient
    num_aligned: jax.Array  # int32 scalar, batches with a downstream gradient
    num_observed: jax.Array  # int32 scalar, times that the encoder's gain was observed
    num_zero_steps: jax.Array  # int32 scalar, closed-form weights of 0 in a row


def grap(
    downstream: str | int,
    *,
    algorithm: Algorithm = "sgd",
    optimizer: optax.GradientTransformation | None = None,
    transform: Transform = "abs",
    normalization: Normalization = "gradient",
    regularization: float = 0.0,
    gramian_decay: float = 0.9,
    norm_decay: float = 0.9,
    solution_decay: float = 0.0,
    warmup: int = 10,
    scale: float = 1.0,
    downstream_weight: float = 0.0,
    initial: PyTree = 1.0,
    max_skipped: int | None = 5,
) -> LossWeighting:
    r"""GraP: weights that align the composite gradient with a downstream gradient.

    The downstream loss is one of the losses. It steers the weights of the others, the
    pretraining losses, and has no weight of its own unless you give it one. With
    :math:`s_k` the gradient of pretraining loss k, d that of the downstream loss,
    :math:`\nu_k` the running mean of :math:`\|s_k\|`, C the matrix of cosines between
    the :math:`s_k`, and p the vector of their cosines with d (running means both),

    .. math::
      u_k = |\phi_k| \, \nu_k / \tau, \qquad w = u / \sqrt{u^T C u}, \qquad
      \lambda_k = \tau \, w_k / \nu_k,

    is the weight :math:`\lambda_k` of loss k. The composite gradient
    :math:`\sum_k \lambda_k s_k` has norm :math:`\tau`, however large the losses. The
    raw weights :math:`\phi` descend the negative cosine between it and d,

    .. math::
      H(\phi) = -p^T w + \rho \, (\|u\| - 1)^2,

    with C, p, :math:`\nu` and :math:`\tau` held constant. The weights of a step come
    from :math:`\phi` before its update. :math:`\tau` is 1 where gradients of parameters
    are weighed. Where they are those of a representation (``encoder=`` in
    :func:`yoto_jax.value_and_grad`), it is the running mean of what the encoder divides
    norms by, so that the gradient of the encoder's parameters has norm 1.

    Args:
      downstream: The loss that steers: its path or its index among the losses.
      algorithm: ``"sgd"``: as above. ``"scaled-sgd"``: with :math:`u_k = |\phi_k|`, raw
        weights of gradients of norm 1. ``"closed-form"``: the w that maximises
        :math:`p^T w` with :math:`w^T C w = 1` and, for ``"abs"``, :math:`w \ge 0`; the
        raw weights become this w. ``"warmup-sgd"``, ``"warmup-scaled-sgd"``: the closed
        form for the first ``warmup`` steps.
      optimizer: Steps on the raw weights. ``optax.adam(0.01, b1=0.0, b2=0.99)``, as in
        the published runs on event sequences, if none is given. To clip, chain it here.
      transform: ``"abs"`` weights by :math:`|\phi_k|`, ``"linear"`` by :math:`\phi_k`,
        of any sign.
      normalization: ``"gradient"`` as above; ``"sum"`` with
        :math:`w = u / \sum_k u_k`; ``"none"`` with :math:`w = u`. The closed form has
        ``"gradient"`` alone.
      regularization: :math:`\rho`. It holds the norm of u, on which nothing else
        depends, at 1; the published runs have 1.0.
      gramian_decay: Decay of the running means C and p, in [0, 1).
      norm_decay: Decay of the running means :math:`\nu` and :math:`\tau`, in [0, 1).
      solution_decay: Decay of a running mean of closed-form weights, in [0, 1).
      warmup: Steps for which C and p are plain means of all that was seen.
      scale: Factor on all weights: the norm of the composite gradient.
      downstream_weight: Norm, relative to ``scale``, with which the downstream gradient
        joins the composite one.
      initial: Initial raw weights: one number, one for each loss in the order of
        ``jax.tree.leaves``, or a tree like the losses; that of the downstream loss is
        not used.
      max_skipped: How many steps in a row may have weights of 0 because no combination
        of gradients helps (closed form); those after it have :math:`w_k = 1`. ``None``:
        any number.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the Gramian of all losses, the
      downstream one among them. Its weights multiply raw losses; they are not
      normalised, their composite gradient is.

    Raises:
      TypeError: ``downstream`` is neither a path nor an index.
      ValueError: An option out of its range. In ``init``: no loss, or more than one, is
        called ``downstream``, or there is no other loss.

    Examples:
      >>> import jax, jax.numpy as jnp, yoto_jax as yoto
      >>> losses = {"contrastive": 1.0, "label": 0.7, "next": 2.0}
      >>> weighting = yoto.weightings.grap("label")
      >>> state, update = weighting.init(losses), jax.jit(weighting.update)
      >>> gradients = jnp.array([[3.0, 0.0], [0.0, 1.0], [0.0, 4.0]])
      >>> for _ in range(50):  # The gradient of "next" points along that of "label".
      ...     weights, state = update(losses, state, gramian=gradients @ gradients.T)
      >>> print({name: round(float(weight), 2) for name, weight in weights.items()})
      {'contrastive': 0.1, 'label': 0.0, 'next': 0.24}

    References:
      Karpukhin and Savchenko, `When Losses Align: Gradient-Based Composite Loss
      Weighting for Efficient Pretraining <https://arxiv.org/abs/2605.07756>`_, 2026.

    .. warning::
      The composite gradient has a norm that never shrinks, not at the optimum either:
      let the learning rate decay. Where it points straight away from d, the gradient of
      the cosine is zero, and the escape slow.

      Deviations from the published implementation:

      - If gradients cancel, :math:`u^T C u` is taken to be no less than a rounding
        error, relative to u. There the weights would be :math:`10^{16}`, or the raw
        weights NaN for good. With ``"sum"``, a sum that cancels is treated alike.
      - Norms have no smallest value but 0: weights do not depend on the unit of the
        losses. A loss whose gradient has been zero so far has the weight 0.
      - A batch without downstream gradient, as one without labels, updates
        :math:`\nu` and C. Raw weights, their optimizer and p stay what they are, and
        the closed form stays with the last solution.
      - A step whose composite gradient is zero does not enter :math:`\tau`.
      - In a step with closed-form weights of 0 the gradient is zero and the step of
        your optimizer up to you. The raw weights stay what they are. The warmups count
        such steps too.
      - The closed form is an exact quadratic program, not a search among supports.
    """
    _check(
        algorithm,
        transform,
        normalization,
        {
            "gramian_decay": gramian_decay,
            "norm_decay": norm_decay,
            "solution_decay": solution_decay,
        },
        {
            "regularization": regularization,
            "warmup": warmup,
            "scale": scale,
            "downstream_weight": downstream_weight,
            "max_skipped": max_skipped,
        },
    )
    tx = optax.adam(0.01, b1=0.0, b2=0.99) if optimizer is None else optimizer
    scaled = algorithm == "warmup-scaled-sgd" or algorithm == "scaled-sgd"
    may_solve = algorithm not in ("sgd", "scaled-sgd")

    def first_raw_weights(spec: LossSpec) -> jax.Array:
        _, others = spec.apart(downstream)
        return spec.vector("initial", initial)[others]

    def init(spec: LossSpec) -> GrapState:
        spec.check_others("grap")
        raw = first_raw_weights(spec)
        zeros = lambda *shape: jnp.zeros(shape, spec.dtype)
        count = lambda: jnp.zeros((), jnp.int32)
        return GrapState(
            raw_weights=raw,
            gradient_norms=zeros(raw.size),
            cosines=zeros(raw.size, raw.size),
            alignments=zeros(raw.size),
            solution=zeros(raw.size),
            encoder_gain=jnp.ones((), spec.dtype),
            opt_state=init_each(tx, raw),
            num_batches=jnp.zeros((raw.size, raw.size), jnp.int32),
            num_compared=jnp.zeros((raw.size,), jnp.int32),
            num_aligned=count(),
            num_observed=count(),
            num_zero_steps=count(),
        )

    def update(
        losses: jax.Array, inner: GrapState, spec: LossSpec, *, gramian: jax.Array
    ) -> tuple[jax.Array, GrapState]:
        del losses
        place, others = spec.apart(downstream)
        norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
        norm, own_norms = norms[place], norms[others]
        aligned = norm > 0
        there = jnp.full(own_norms.shape, True)
        if spec.present is not None:
            there = spec.present[others]
        both = there[:, None] & there[None, :]

        nu = running_mean(
            inner.gradient_norms,
            own_norms,
            jnp.diagonal(inner.num_batches),
            0,
            norm_decay,
        )
        nu = jnp.where(there, nu, inner.gradient_norms)
        # A gradient far below its running mean counts as zero: it is rounding error.
        inverse = safe_divide(jnp.ones_like(nu), jnp.maximum(own_norms, 1e-8 * nu))
        cosines = gramian[others][:, others] * inverse[:, None] * inverse[None, :]
        alignments = safe_divide(gramian[others, place] * inverse, norm)
        cosines = running_mean(
            inner.cosines, cosines, inner.num_batches, warmup, gramian_decay
        )
        cosines = jnp.where(both, cosines, inner.cosines)
        alignments = jnp.where(
            aligned & there,
            running_mean(
                inner.alignments,
                alignments,
                inner.num_compared,
                warmup,
                gramian_decay,
            ),
            inner.alignments,
        )

        inner = inner._replace(
            gradient_norms=nu,
            cosines=cosines,
            alignments=alignments,
            num_batches=inner.num_batches + both.astype(jnp.int32),
            num_compared=inner.num_compared + (aligned & there).astype(jnp.int32),
        )
        w, inner = step(inner, aligned, there)
        inner = inner._replace(
            num_aligned=inner.num_aligned + aligned.astype(jnp.int32)
        )

        size = inner.encoder_gain * scale
        weights = safe_divide(size * w, nu)
        own = safe_divide(size * downstream_weight, norm)
        weights = jnp.concatenate([weights[:place], own[None], weights[place:]])
        return weights, inner

    def step(
        inner: GrapState, aligned: jax.Array, there: jax.Array
    ) -> tuple[jax.Array, GrapState]:
        if not may_solve:
            return follow(inner, aligned, there)
        if algorithm == "closed-form":
            return solve(inner, aligned, there)
        early = inner.num_aligned < warmup
        return jax.tree.map(
            functools.partial(jnp.where, early),
            solve(inner, aligned & early, there),
            follow(inner, aligned, there),
        )

    def follow(
        inner: GrapState, aligned: jax.Array, there: jax.Array
    ) -> tuple[jax.Array, GrapState]:
        """The weights of now; raw weights a step down the negative cosine."""
        factors = inner.gradient_norms / inner.encoder_gain
        factors = jnp.ones_like(factors) if scaled else factors

        def objective(raw: jax.Array) -> tuple[jax.Array, jax.Array]:
            # The derivative at 0 is 1, not 0: a raw weight can leave it.
            positive = raw * jnp.where(raw < 0, -1, 1)
            u = factors * (raw if transform == "linear" else positive)
            u = jnp.where(there, u, 0)
            w = _normalized(u, inner.cosines, normalization)
            pull = jnp.square(optax.safe_norm(u, jnp.finfo(u.dtype).tiny) - 1)
            return regularization * pull - dot(inner.alignments, w), w

        slope, w = jax.grad(objective, has_aux=True)(inner.raw_weights)
        raw, opt_state = descend(
            tx, slope, inner.opt_state, inner.raw_weights, aligned & there
        )
        return w, inner._replace(raw_weights=raw, opt_state=opt_state)

    def solve(
        inner: GrapState, aligned: jax.Array, there: jax.Array
    ) -> tuple[jax.Array, GrapState]:
        """The best weights for the running means; raw weights become these."""
        free = transform == "linear"
        both = there[:, None] & there[None, :]
        cosines = jnp.where(both, inner.cosines, 0)
        alignments = jnp.where(there, inner.alignments, 0)
        solution = lax.cond(
            aligned,
            lambda: maximise_alignment(cosines, alignments, nonnegative=not free),
            lambda: jnp.zeros_like(inner.raw_weights),
        )
        solved = jnp.linalg.norm(solution) >= 1e-8
        renewed = solved & there
        mean = jnp.where(
            jnp.any(inner.solution != 0),
            solution_decay * inner.solution + (1 - solution_decay) * solution,
            solution,
        )
        raw = jnp.where(renewed, mean, inner.raw_weights)

        # Without a downstream gradient the last solution goes on, rescaled.
        held = _normalized(jnp.where(there, raw, 0), cosines, "gradient")
        zero_steps = inner.num_zero_steps
        patient = True if max_skipped is None else zero_steps < max_skipped
        gave_up = jnp.where(patient, jnp.zeros_like(raw), jnp.ones_like(raw))
        w = jnp.where(solved, raw, jnp.where(aligned, gave_up, held))
        return w, inner._replace(
            raw_weights=raw,
            solution=jnp.where(renewed, mean, inner.solution),
            num_zero_steps=jnp.where(
                solved, 0, zero_steps + (aligned & jnp.any(there))
            ),
        )

    def observe(
        inner: GrapState,
        spec: LossSpec,
        *,
        cotangent_norm: jax.Array,
        gradient_norm: jax.Array,
    ) -> GrapState:
        ratio = cotangent_norm / jnp.maximum(gradient_norm, 1e-16)
        gain = running_mean(
            inner.encoder_gain, ratio, inner.num_observed, 0, norm_decay
        )
        # A step without weights, or without any path to the encoder, tells nothing.
        telling = (cotangent_norm > 0) & (gradient_norm > 0)
        return inner._replace(
            encoder_gain=jnp.where(telling, gain, inner.encoder_gain),
            num_observed=inner.num_observed + telling.astype(jnp.int32),
        )

    def first_weights(spec: LossSpec) -> jax.Array:
        place, _ = spec.apart(downstream)
        raw = spec.vector("initial", initial)
        raw = jnp.abs(raw) if transform == "abs" else raw
        return raw.at[place].set(downstream_weight)

    return make_weighting(
        init,
        update,
        needs=("gramian",),
        downstream=downstream,
        first_weights=first_weights,
        observe=observe,
    )


def maximise_alignment(
    cosines: jax.Array, alignments: jax.Array, *, nonnegative: bool
) -> jax.Array:
    r"""The w that maximises p^T w on the ellipsoid w^T C w = 1, or zeros.

    Zeros come out if no w has a positive p^T w, or none beyond rounding error. The
    non-negative solution is that of :math:`\min_{w \ge 0} w^T C w / 2 - p^T w`, brought
    to the ellipsoid.

    Args:
      cosines: (K, K), C, positive semi-definite.
      alignments: (K,), p.
      nonnegative: Whether no entry may be negative.

    Returns:
      (K,), with exact zeros where the bound holds.
    """
    size = jnp.max(jnp.abs(cosines))
    some = (size >= 1e-12) & (jnp.max(jnp.abs(alignments)) >= 1e-12)
    matrix = safe_divide(cosines, size)
    if nonnegative:
        # Among solutions that are equally good it takes the shortest.
        ridge = 1e-10 + 8 * jnp.finfo(matrix.dtype).eps
        ridged = matrix + ridge * jnp.eye(len(alignments), dtype=matrix.dtype)
        x = solve_bounded_qp(ridged, alignments, jnp.zeros_like(alignments))
    else:
        x = _least_squares(matrix, alignments)
    # Here p^T x is x^T C x, and p^T w its root, the best cosine.
    some &= dot(alignments, x) > 1e-12 * size
    w = safe_divide(_normalized(x, matrix, "gradient"), jnp.sqrt(size))
    return jnp.where(some, w, 0)


def _least_squares(matrix: jax.Array, linear: jax.Array) -> jax.Array:
    """The shortest solution; directions that are zero but for rounding are left out."""
    values, vectors = jnp.linalg.eigh(matrix)
    smallest = jnp.maximum(1e-8, matrix.shape[0] * jnp.finfo(matrix.dtype).eps)
    kept = values > smallest * jnp.max(jnp.abs(values))
    inverse = safe_divide(jnp.ones_like(values), jnp.where(kept, values, 0))
    return dot(vectors, inverse * dot(linear, vectors))


def _normalized(
    u: jax.Array, cosines: jax.Array, normalization: Normalization
) -> jax.Array:
    """Weights of the given direction; of zeros if there is none."""
    size = jnp.sum(u * jnp.where(u < 0, -1, 1))
    some = size > 0
    unit = safe_divide(u, size)  # Its squares neither under- nor overflow.
    rounding = jnp.finfo(u.dtype).eps
    if normalization == "none":
        return u
    if normalization == "sum":
        total = jnp.sum(unit)
        floor = jnp.where(total < 0, -rounding, rounding)
        length = jnp.where(jnp.abs(total) < rounding, floor, total)
    else:
        length = jnp.sqrt(jnp.maximum(dot(unit, dot(cosines, unit)), rounding))
    return jnp.where(some, unit / jnp.where(some, length, 1), u)


def _check(
    algorithm: str,
    transform: str,
    normalization: str,
    decays: dict[str, Any],
    sizes: dict[str, Any],
) -> None:
    options = (
        ("algorithm", algorithm, Algorithm),
        ("transform", transform, Transform),
        ("normalization", normalization, Normalization),
    )
    for name, value, known in options:
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {get_args(known)}, got {value!r}.")
    if algorithm not in ("sgd", "scaled-sgd") and normalization != "gradient":
        raise ValueError(
            f"algorithm={algorithm!r} has normalization='gradient' alone, got "
            f"{normalization!r}."
        )
    check_decay(**decays)
    for name, value in sizes.items():
        if value is not None:
            check_hyperparameter(name, value, lambda x: x >= 0, "be at least 0")
