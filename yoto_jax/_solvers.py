"""Small dense problems in the Gramian: a bounded number of steps, on the device.

Everything here works under ``jit`` and ``vmap``, in float32 and float64, and for
matrices that are singular or zero.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from yoto_jax._varying import varying_like

HIGHEST = lax.Precision.HIGHEST  # float32 products on accelerators are float32


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a @ b`` in full precision."""
    return jnp.matmul(a, b, precision=HIGHEST)


def safe_divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a / b``, and 0 where ``b`` is 0."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def unit_trace(gramian: jax.Array) -> jax.Array:
    """The Gramian divided by its trace; zero stays zero."""
    return safe_divide(gramian, jnp.trace(gramian))


def combined_norm(gramian: jax.Array, weights: jax.Array) -> jax.Array:
    """Norm of the weighted sum of the gradients."""
    return jnp.sqrt(jnp.maximum(jnp.vdot(weights, dot(gramian, weights)), 0))


def cosines(gramian: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines between gradients, and the norms of the gradients.

    A gradient that is zero has cosine 0 with every other one, and with itself.
    """
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
    # One norm at a time: the product of two can overflow or underflow.
    rows = safe_divide(gramian, norms[:, None])
    return safe_divide(rows, norms[None, :]), norms


def _factor(matrix: jax.Array) -> jax.Array:
    return lax.linalg.cholesky(matrix, symmetrize_input=False)


def _solve(factor: jax.Array, right: jax.Array) -> jax.Array:
    """Solve with one vector, or several in the columns, given the Cholesky factor."""
    columns = right[:, None] if right.ndim == 1 else right
    y = lax.linalg.triangular_solve(factor, columns, left_side=True, lower=True)
    x = lax.linalg.triangular_solve(
        factor, y, left_side=True, lower=True, transpose_a=True
    )
    return x[:, 0] if right.ndim == 1 else x


def _longest_step(x: jax.Array, step: jax.Array) -> jax.Array:
    """The largest fraction of ``step``, up to 1, that leaves ``x`` positive."""
    return 1 / jnp.maximum(jnp.max(-step / x), 1)


def _shorten(x: jax.Array, step: jax.Array) -> jax.Array:
    """The largest fraction of ``step``, up to 1, well inside of what is positive."""
    return jnp.minimum(1, 0.995 / jnp.maximum(jnp.max(-step / x), 0.5))


def _accept(ok: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(ok & jnp.all(jnp.isfinite(new)), new, old)


def solve_bounded_qp(
    matrix: jax.Array, linear: jax.Array, lower: jax.Array
) -> jax.Array:
    r"""Minimise :math:`\frac12 v^\top A v - q^\top v` subject to :math:`v \ge u`.

    Mehrotra's predictor-corrector interior point method, then one solve on the bounds
    that it found to be active. That last solution is exact up to rounding, with
    ``v == u`` on the active bounds, and taken only if it is optimal.

    Args:
      matrix: (K, K) symmetric positive semi-definite A.
      linear: (K,) q. For a singular A it must be in its range, or the minimum may be at
        infinity and the result is large but finite.
      lower: (K,) u.

    Returns:
      (K,) v. For several q or u with one A use ``jax.vmap``.
    """
    size, dtype = matrix.shape[0], matrix.dtype
    eps = jnp.finfo(dtype).eps
    # x = d (v - u) / s >= 0 with a unit diagonal and a linear term of order 1.
    scale = jnp.sqrt(jnp.maximum(jnp.diagonal(matrix), 0))
    scale = jnp.where(scale > 0, scale, 1)
    a = matrix / scale[:, None] / scale[None, :]
    b = (linear - dot(matrix, lower)) / scale
    height = jnp.max(jnp.abs(b))
    height = jnp.where(height > 0, height, 1)
    b = b / height
    # Much below the accuracy of the result, it keeps singular matrices invertible.
    ridged = a + eps * jnp.eye(size, dtype=dtype)

    def step(
        _: jax.Array, carry: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        x, z = carry  # z >= 0 is the multiplier of x >= 0
        gap = jnp.vdot(x, z)
        residual = dot(ridged, x) - b - z
        factor = _factor(ridged + jnp.diag(z / x))
        dx = _solve(factor, -residual - z)
        dz = -z - z / x * dx
        t = jnp.minimum(_longest_step(x, dx), _longest_step(z, dz))
        centred = jnp.vdot(x + t * dx, z + t * dz) / gap
        correction = (centred**3 * gap / size - dx * dz) / x
        dx = _solve(factor, -residual - z + correction)
        dz = -z - z / x * dx + correction
        # One length for both: in a quadratic problem the residual needs it.
        t = jnp.minimum(_shorten(x, dx), _shorten(z, dz))
        new_x, new_z = x + t * dx, z + t * dz
        # Once converged, rounding may push either across its bound: stay then.
        ok = jnp.all((new_x > 0) & (new_z > 0) & jnp.isfinite(new_x + new_z))
        return jnp.where(ok, new_x, x), jnp.where(ok, new_z, z)

    x = varying_like(jnp.ones((size,), dtype), b)
    z = jnp.maximum(dot(a, x) - b, 1)
    x, z = lax.fori_loop(0, 16, step, (x, z))

    free = x > z
    eye = jnp.eye(size, dtype=dtype)
    factor = _factor(jnp.where(free[:, None] & free[None, :], ridged, eye))
    polished = jnp.where(free, x, 0)
    for _ in range(2):  # the second one takes the ridge out again
        residual = jnp.where(free, b - dot(a, polished), 0)
        polished = polished + _solve(factor, residual)
    slack = dot(a, polished) - b
    tolerance = 4 * size * eps
    stationary = jnp.abs(slack) <= tolerance * (1 + jnp.max(jnp.abs(polished)))
    optimal = jnp.where(
        free, stationary & (polished >= -tolerance), slack >= -tolerance
    )
    x = _accept(jnp.all(optimal), jnp.maximum(polished, 0), x)
    # Then nothing pushes off the bounds: also of a matrix of zeros, exactly.
    x = jnp.where(jnp.all(b <= 0), 0, x)
    return lower + x * height / scale


_ENTRIES = 2**22  # of matrices that are factorised side by side


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor up to a limit, 1 at least."""
    return max(d for d in range(1, max(1, limit) + 1) if number % d == 0)


def solve_axis_qps(matrix: jax.Array, lengths: jax.Array) -> jax.Array:
    r"""Minimise :math:`v_i^\top A v_i` subject to :math:`v_i \ge p_i e_i`, for every i.

    Args:
      matrix: (K, K) symmetric positive semi-definite A.
      lengths: (K,) p > 0.

    Returns:
      (K, K) v, one solution a row, as exact as those of :func:`solve_bounded_qp`.
    """
    size = matrix.shape[0]

    def one_by_one() -> jax.Array:
        solve = lambda u: solve_bounded_qp(matrix, jnp.zeros_like(u), u)
        at_once = _largest_divisor(size, _ENTRIES // size**2)
        return lax.map(solve, jnp.diag(lengths), batch_size=at_once)

    if size <= 16:  # a millisecond at most, however hard
        return one_by_one()
    v, exact = _axis_qps_together(matrix, lengths)
    # A loop, for under vmap a condition would always solve one by one as well.
    return lax.while_loop(
        lambda carry: ~carry[1],
        lambda carry: (one_by_one(), jnp.ones_like(carry[1])),
        (v, exact),
    )[0]


def _axis_qps_together(
    matrix: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The solutions of :func:`solve_axis_qps`, and whether all of them are optimal.

    With a unit diagonal, and divided by its length, problem i is to minimise
    (e_i + x)^T a (e_i + x) / 2 over x >= 0. With one x a row, all gradients are
    x a + a. Conjugate gradients on the positive entries go up to the first bound in the
    way, then follows one step of the projected gradient. Where the gradient on the
    bounds outweighs the rest, a step along it frees them (Dostal and Schoeberl, 2005).
    Each row takes the best step along a direction of its own, and none once optimal.
    """
    size, dtype = matrix.shape[0], matrix.dtype
    eps = jnp.finfo(dtype).eps
    scale = jnp.sqrt(jnp.maximum(jnp.diagonal(matrix), 0))
    scale = jnp.where(scale > 0, scale, 1)
    a = matrix / scale[:, None] / scale[None, :]
    stride = 2 / jnp.max(jnp.sum(jnp.abs(a), axis=1))
    ones = jnp.ones((size, 1), dtype)
    sums = lambda terms: dot(terms, ones)  # on CPUs several times faster than jnp.sum

    def push(x: jax.Array, g: jax.Array) -> jax.Array:
        """The gradient, without what the bounds hold."""
        return jnp.where(x > 0, g, jnp.minimum(g, 0))

    def step(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        count, _, x, g, d, conjugate = carry
        along = dot(d, a)
        curvature = sums(d * along)
        best = safe_divide(sums(g * d), curvature)
        ahead = jnp.where(d > 0, x / jnp.where(d > 0, d, 1), jnp.inf)
        furthest = jnp.min(ahead, axis=1, keepdims=True)
        t = jnp.maximum(jnp.minimum(best, furthest), 0)
        x = jnp.where((d > 0) & (t * d >= x), 0, x - t * d)
        g = g - t * along
        free, pushed = jnp.where(x > 0, g, 0), push(x, g)
        held = pushed - free
        projected = jnp.minimum(x, stride * free)
        project = conjugate & (best > furthest)
        release = stride * sums(held**2) > sums(projected * free)
        turn = jnp.where(conjugate, safe_divide(sums(free * along), curvature), 0)
        d = jnp.where(release, held, jnp.where(project, projected, free - turn * d))
        # Well below rounding, or errors in flat directions remain.
        moving = sums(pushed**2) > (0.1 * eps) ** 2 * (1 + sums(x**2))
        d = jnp.where(moving, d, 0)
        return count + 1, jnp.any(moving), x, g, d, ~(release | project)

    d = jnp.minimum(a, 0)
    x, conjugate = varying_like((jnp.zeros_like(a), jnp.zeros((size, 1), bool)), a)
    start = (0, jnp.any(d < 0), x, a, d, conjugate)
    more = lambda carry: (carry[0] < 8 * size) & carry[1]
    _, going, x, *_ = lax.while_loop(more, step, start)
    wrong = jnp.max(jnp.abs(push(x, dot(x, a) + a)), axis=1)
    exact = jnp.all(wrong <= 4 * size * eps * (1 + jnp.max(x, axis=1)))
    excess = x * (lengths * scale)[:, None] / scale[None, :]
    return jnp.diag(lengths) + excess, exact & ~going


def smallest_convex_combination(
    gramian: jax.Array, present: jax.Array | None = None
) -> jax.Array:
    r"""Minimise :math:`w^\top G w` subject to :math:`w \ge 0` and :math:`\sum w = 1`.

    Any w of other sum t costs :math:`t^2 w^\top G w`, so that minimising
    :math:`v^\top G v + s (1^\top v - 1)^2` over :math:`v \ge 0` gives v proportional to
    w for every s > 0: a problem with bounds alone.

    Args:
      gramian: (K, K) symmetric positive semi-definite G.
      present: (K,) which entries may be positive, all if not given. Rows and columns of
        the others must be 0.

    Returns:
      (K,) w with exact zeros.
    """
    size = gramian.shape[0]
    there = jnp.full((size,), True) if present is None else present
    a = unit_trace(gramian)
    squares = jnp.diagonal(a)
    # Of the order of the minimum, or the small gradients are lost in rounding.
    s = jnp.min(jnp.where(squares > 0, squares, jnp.inf))
    s = jnp.full((size,), jnp.where(jnp.isfinite(s), s, 1))
    # Absent ones are pushed against their bounds, each on its own.
    both = there[:, None] & there[None, :]
    matrix = jnp.where(both, a + s[:, None], jnp.diag(s))
    v = solve_bounded_qp(matrix, jnp.where(there, s, -s), jnp.zeros_like(s))
    # Where gradients are zero they have it all, without rounding of the others.
    zero = there & (squares == 0)
    v = jnp.where(jnp.any(zero), zero.astype(v.dtype), v)
    return safe_divide(v, jnp.sum(v))


def minimise_on_simplex(
    derivatives: Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]],
    size: int,
    dtype: jnp.dtype,
) -> jax.Array:
    r"""Minimise a smooth convex f(w) subject to :math:`w \ge 0`, :math:`\sum w = 1`.

    The interior point method of :func:`solve_bounded_qp` with one equality. The best of
    all iterates is returned.

    Args:
      derivatives: ``derivatives(w) -> (value, gradient, hessian)`` of a function of
        order 1.
      size: K.
      dtype: Of w.

    Returns:
      (K,) w.
    """
    eps = jnp.finfo(dtype).eps
    ones = jnp.ones((size,), dtype)
    eye = jnp.eye(size, dtype=dtype)

    def step(_: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        w, z, y, best, least = carry  # y is the multiplier of the sum
        value, gradient, hessian = derivatives(w)
        best, least = jnp.where(value < least, w, best), jnp.minimum(value, least)
        gap = jnp.vdot(w, z)
        residual = gradient - y - z
        factor = _factor(hessian + jnp.diag(z / w) + eps * eye)

        def newton(correction: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            right = jnp.stack([correction - residual - z, ones], axis=1)
            free, along = _solve(factor, right).T
            dy = -jnp.sum(free) / jnp.sum(along)
            dw = free + dy * along
            return dw, correction - z - z / w * dw, dy

        dw, dz, _ = newton(jnp.zeros_like(w))
        t = jnp.minimum(_longest_step(w, dw), _longest_step(z, dz))
        centred = jnp.vdot(w + t * dw, z + t * dz) / gap
        dw, dz, dy = newton((centred**3 * gap / size - dw * dz) / w)
        t = jnp.minimum(_shorten(w, dw), _shorten(z, dz))
        new_w, new_z, new_y = w + t * dw, z + t * dz, y + t * dy
        ok = jnp.all((new_w > 0) & (new_z > 0) & jnp.isfinite(new_w + new_z + new_y))
        return (
            jnp.where(ok, new_w / jnp.sum(new_w), w),
            jnp.where(ok, new_z, z),
            jnp.where(ok, new_y, y),
            best,
            least,
        )

    w = ones / size
    found = value, gradient, _ = derivatives(w)
    y = jnp.min(gradient) - 1
    start = varying_like((w, gradient - y, y, w, value), *found)
    w, _, _, best, least = lax.fori_loop(0, 20, step, start)
    return jnp.where(derivatives(w)[0] <= least, w, best)


def solve_simplex_qp(
    matrix: jax.Array, linear: jax.Array, present: jax.Array | None = None
) -> jax.Array:
    r"""Minimise :math:`\frac12 w^\top A w - q^\top w` subject to w >= 0 and sum 1.

    :func:`minimise_on_simplex`, then one solve on the face that it found, taken only if
    it is optimal.

    Args:
      matrix: (K, K) symmetric positive semi-definite A, of order 1 at most.
      linear: (K,) q, of order 1.
      present: (K,) which entries may be positive, all if not given.

    Returns:
      (K,) w, exact up to rounding, or as exact as the interior point method.
    """
    size, dtype = matrix.shape[0], matrix.dtype
    eps = jnp.finfo(dtype).eps
    squares = jnp.diagonal(matrix)
    if present is not None:
        # Out of reach: no mixture of the others costs as much as half of this.
        both = present[:, None] & present[None, :]
        matrix = jnp.where(both, matrix, 0)
        highest = jnp.max(jnp.where(present, linear, -jnp.inf))
        lowest = jnp.min(jnp.where(present, linear, jnp.inf))
        reach = highest - lowest + jnp.max(jnp.where(present, squares, 0)) + 1
        linear = jnp.where(present, linear - highest, -2 * reach)
        linear = jnp.where(jnp.any(present), linear, 0)
    else:
        linear = linear - jnp.max(linear)
    # A constant more on the simplex: regular where only a mixture of all vanishes.
    a = matrix + jnp.ones((), dtype)

    def derivatives(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        aw = dot(matrix, w)
        return 0.5 * jnp.vdot(w, aw) - jnp.vdot(w, linear), aw - linear, a

    w = minimise_on_simplex(derivatives, size, dtype)
    slope = derivatives(w)[1]
    free = w > slope - jnp.vdot(w, slope)
    ridged = a + eps * jnp.eye(size, dtype=dtype)
    eye = jnp.eye(size, dtype=dtype)
    factor = _factor(jnp.where(free[:, None] & free[None, :], ridged, eye))
    along = _solve(factor, free.astype(dtype))
    polished = jnp.where(free, w, 0)
    for _ in range(3):  # the later ones take the ridge out again
        rest = jnp.where(free, linear - dot(matrix, polished), 0)
        step = _solve(factor, rest)
        lacking = 1 - jnp.sum(polished) - jnp.sum(step)
        polished = polished + step + lacking / jnp.sum(along) * along
    slope = derivatives(polished)[1]
    level = jnp.vdot(polished, slope)
    height = jnp.max(jnp.abs(linear)) + jnp.max(jnp.abs(matrix))
    tolerance = 4 * size * eps * jnp.maximum(height, 1)
    optimal = jnp.where(
        free,
        (jnp.abs(slope - level) <= tolerance) & (polished >= -tolerance),
        slope >= level - tolerance,
    )
    w = _accept(jnp.all(optimal), jnp.maximum(polished, 0), w)
    return w / jnp.sum(w)


def solve_power_equation(
    matrix: jax.Array, scale: jax.Array, power: jax.Array | float, *, steps: int = 20
) -> jax.Array:
    r"""Solve :math:`(C b)_i = m_i b_i^{-\beta}` for :math:`b > 0`.

    b minimises :math:`\frac12 b^\top C b - \sum_i m_i \phi(b_i)` with
    :math:`\phi(b) = b^{1-\beta} / (1 - \beta)`, or :math:`\log b` for
    :math:`\beta = 1`, which is strictly convex. Newton's method, in relative steps, for
    the derivative and for the logarithm of the equation: the best of a few lengths.

    Args:
      matrix: (K, K) symmetric positive definite C.
      scale: (K,) m > 0.
      power: beta > 0.
      steps: The number of Newton steps.

    Returns:
      (K,) b.
    """
    dtype = matrix.dtype
    power = jnp.asarray(power, dtype)
    lengths = jnp.asarray([1, 0.7, 0.5, 0.25, 0.1, 0.03, 0.01, 0.001], dtype)
    floor = jnp.finfo(dtype).tiny ** 0.5  # weights below are nothing

    def terms(b: jax.Array) -> jax.Array:
        return scale * b ** (1 - power)  # b times what C b has to be

    def along_ray(b: jax.Array) -> jax.Array:
        """The best positive multiple of b."""
        have, want = jnp.vdot(b, dot(matrix, b)), jnp.sum(terms(b))
        return b * (want / have) ** (1 / (1 + power))

    def potential(b: jax.Array) -> jax.Array:
        quadratic = 0.5 * jnp.vdot(b, dot(matrix, b))
        # expm1 makes it right at power = 1 and near it.
        logs = jnp.log(b)
        exponent = 1 - power
        near = jnp.abs(exponent) < 1e-3
        phi = jnp.where(
            near,
            logs * (1 + 0.5 * exponent * logs),
            jnp.expm1(exponent * logs) / jnp.where(near, 1, exponent),
        )
        return quadratic - jnp.sum(scale * phi)

    def newton(scaled: jax.Array, slope: jax.Array, curvature: jax.Array) -> jax.Array:
        hessian = scaled + jnp.diag(curvature)
        # A unit diagonal, for the sake of scales that differ by many orders.
        root = jnp.sqrt(jnp.diagonal(hessian))
        hessian = hessian / root[:, None] / root[None, :]
        return _solve(_factor(hessian), slope / root) / root

    def step(_: jax.Array, b: jax.Array) -> jax.Array:
        scaled = b[:, None] * matrix * b[None, :]
        want, have = terms(b), jnp.sum(scaled, axis=1)
        # Newton's method for the potential: always descends, but crawls where b is
        # too large. For the logarithm of the equation: a power law in one step.
        plain = newton(scaled, want - have, power * want)
        far = jnp.max(jnp.abs(plain))
        bounded = jnp.maximum(have, 1e-3 * want)
        steep = newton(scaled, bounded * jnp.log(want / bounded), power * bounded)
        plain = lengths[:, None] * (plain / jnp.maximum(1, far / 4))[None, :]
        plain = jnp.where(plain > 0, jnp.log1p(jnp.maximum(plain, 0)), plain)
        steep = lengths[:, None] * jnp.clip(steep, -6, 4)[None, :]
        trials = jnp.concatenate([plain, steep])
        trials = jnp.maximum(b[None, :] * jnp.exp(trials), floor)
        values = jax.vmap(potential)(trials)
        values = jnp.where(jnp.isfinite(values), values, jnp.inf)
        # Near the solution the values differ by rounding alone: full step then.
        chosen = jnp.where(far < 0.1, 0, jnp.argmin(values))
        new = along_ray(trials[chosen])
        return _accept(jnp.all(new > 0), new, b)

    b = along_ray(scale ** (1 / (1 + power)))
    return lax.fori_loop(0, steps, step, b)


def spectrum(gramian: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eigenvalues, eigenvectors in the columns, and which values are not rounding."""
    values, vectors = jnp.linalg.eigh(gramian, symmetrize_input=False)
    eps = jnp.finfo(gramian.dtype).eps
    return values, vectors, values > gramian.shape[0] * eps * values[-1]


def projection_weights(cosine: jax.Array, targets: jax.Array) -> jax.Array:
    """Pseudo-inverse of the cosines times targets: ``b = pinv(C) p``."""
    values, vectors, kept = spectrum(cosine)
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    # Of gradients that cancel nothing is left but rounding, which a caller would scale
    # up to a step of full size.
    parts = vectors * targets[:, None]
    sums, sizes = jnp.sum(parts, axis=0), jnp.sum(jnp.abs(parts), axis=0)
    noise = 2 * cosine.shape[0] * jnp.finfo(cosine.dtype).eps
    return dot(vectors, inverse * jnp.where(jnp.abs(sums) <= noise * sizes, 0, sums))


def surgery(alter: Callable[..., Any], rows: Any, key: jax.Array) -> Any:
    """Let every loss go through all losses, in a random order of its own.

    Args:
      alter: ``alter(row, i, j) -> row``: what becomes of the row of loss i at loss j.
      rows: A tree of arrays with a leading axis of size K, one row per loss. One of
        them varies under ``shard_map`` as what ``alter`` looks at.
      key: Typed key of the orders.

    Returns:
      The rows in the end.
    """
    size = jax.tree.leaves(rows)[0].shape[0]
    places = jnp.arange(size)
    orders = jax.vmap(lambda k: jax.random.permutation(k, size))(
        jax.random.split(key, size)
    )

    def visit(rows: Any, others: jax.Array) -> tuple[Any, None]:
        return jax.vmap(alter)(rows, places, others), None

    rows = varying_like(rows, orders, *jax.tree.leaves(rows))
    return lax.scan(visit, rows, orders.T)[0]


def weights_of_rows(rows: jax.Array, norms: jax.Array) -> jax.Array:
    """Weights of the gradients in the sum of what :func:`surgery` made of them.

    Args:
      rows: (K, K) row i is what became of the gradient of loss i, relative to its norm,
        in gradients of unit length.
      norms: (K,) of the gradients.

    Returns:
      (K,) weights; 1 for a gradient that is zero.
    """
    sums = jnp.einsum("i,ij->j", norms, rows, precision=HIGHEST)
    return jnp.where(norms > 0, safe_divide(sums, norms), 1)
