"""What a Gramian weighting promises of the combined gradient, found on samples.

The samples are Jacobians in float64, of several shapes and ranks, some of them
stationary; the seeds are fixed. The gradients have norms of about 1.
"""

import functools
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from yoto_jax._losses import listed
from yoto_jax._weighting import LossWeighting
from yoto_jax.testing._compare import require

SHAPES = ((3, 5, 3), (9, 11, 5), (9, 11, 9))  # losses, parameters, rank
KINDS = ("normal", "strong", "weak", "off")
# Where one direction descends all losses; independent gradients always have one.
MOVING = {s: ("normal", "off") if s[2] == s[0] else ("off",) for s in SHAPES}


def sample(kind: str, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """A random Jacobian of Frobenius norm sqrt(K)."""
    losses, parameters, rank = shape
    rng = np.random.default_rng(seed)
    jacobian = rng.normal(size=(losses, rank)) @ rng.normal(size=(rank, parameters))
    if kind in ("strong", "weak"):  # J^T w = 0 with w > 0, or w >= 0 and w_0 = 0
        w = rng.uniform(0.2, 1.0, losses)
        if kind == "weak":
            w[0] = 0.0
        jacobian -= np.outer(w, w @ jacobian) / (w @ w)
    if kind == "weak":  # one direction descends loss 0 and leaves the others alone
        direction = rng.normal(size=parameters)
        direction /= np.linalg.norm(direction)
        jacobian -= np.outer(jacobian @ direction, direction)
        jacobian[0] += direction
    if kind == "off":  # one direction descends all: not stationary
        direction = rng.normal(size=parameters)
        direction /= np.linalg.norm(direction)
        along = jacobian @ direction
        size = np.sqrt((jacobian**2).sum() / losses)
        jacobian += np.outer(0.1 * size + np.abs(along) - along, direction)
    if not jacobian.any():
        return jacobian
    return jacobian * np.sqrt(losses) / np.linalg.norm(jacobian)


@functools.cache
def samples(
    kinds: Sequence[str], shape: tuple[int, int, int], count: int = 8
) -> np.ndarray:
    """Jacobians (N, K, P)."""
    return np.stack(
        [sample(k, shape, 100 * s + 7) for k in kinds for s in range(count)]
    )


@functools.lru_cache(maxsize=64)
def _compiled(weighting: LossWeighting, losses: int, dtype: str) -> Any:
    def one(gramian: jax.Array) -> jax.Array:
        values = list(jnp.linspace(1, 2, losses, dtype=dtype))
        weights, _ = weighting.update(
            values, weighting.init(values), gramian=gramian.astype(dtype)
        )
        return jnp.stack(weights)

    return jax.jit(jax.vmap(one))


def weights_on(
    weighting: LossWeighting, jacobians: np.ndarray, dtype: str = "float64"
) -> np.ndarray:
    """Weights (N, K) of a first update for Jacobians (N, K, P)."""
    with jax.enable_x64(dtype == "float64"):
        count = 8 * -(-len(jacobians) // 8)  # few batch sizes, few compilations
        padded = np.concatenate([jacobians, jacobians[: count - len(jacobians)]])
        gramians = np.einsum("nkp,nlp->nkl", padded, padded).astype(dtype)
        parts = np.split(gramians, count // 8)
        update = _compiled(weighting, jacobians.shape[1], dtype)
        out = np.concatenate([np.asarray(update(jnp.asarray(g))) for g in parts])
    return out[: len(jacobians)].astype(np.float64)


def directions(weighting: LossWeighting, jacobians: np.ndarray) -> np.ndarray:
    """Combined gradients (N, P)."""
    return np.einsum("nk,nkp->np", weights_on(weighting, jacobians), jacobians)


def non_conflicting_margin(weighting: LossWeighting, stationary: bool) -> float:
    """The smallest product of a combined gradient with a gradient."""
    least = np.inf
    for shape in SHAPES:
        jacobians = samples(KINDS if stationary else MOVING[shape], shape)
        d = directions(weighting, jacobians)
        least = min(least, np.einsum("nkp,np->nk", jacobians, d).min())
    return float(least)


def permutation_error(weighting: LossWeighting) -> float:
    """How far the combined gradient depends on the order of the losses."""
    worst = 0.0
    for shape in SHAPES:
        jacobians = samples(("normal", "off"), shape)
        d = directions(weighting, jacobians)
        for seed in range(2):
            order = np.random.default_rng(seed).permutation(shape[0])
            worst = max(
                worst, np.abs(directions(weighting, jacobians[:, order]) - d).max()
            )
    return float(worst)


def _factors(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(size=(1, shape[0], 1)))


def nonlinearity(weighting: LossWeighting) -> float:
    """Error of A(diag(a + b) J) = A(diag(a) J) + A(diag(b) J)."""
    worst = 0.0
    for shape in SHAPES:
        jacobians = samples(("normal", "off"), shape)
        a, b = _factors(shape, 1), _factors(shape, 2)
        parts = (
            directions(weighting, a * jacobians),
            directions(weighting, b * jacobians),
        )
        whole = directions(weighting, (a + b) * jacobians)
        error = np.linalg.norm(whole - sum(parts), axis=1)
        size = np.sqrt(((a + b) ** 2).mean())  # of the rows
        worst = max(worst, (error / size).max())
    return float(worst)


def turning(weighting: LossWeighting) -> float:
    """One minus the least cosine of the directions before and after rescaled losses."""
    worst = 0.0
    for shape in SHAPES:
        jacobians = samples(MOVING[shape], shape)
        before = directions(weighting, jacobians)
        after = directions(weighting, _factors(shape, 3) * jacobians)
        size = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        cosine = (before * after).sum(1) / np.maximum(size, 1e-12)
        worst = max(worst, (1 - cosine).max())
    return float(worst)


def smallest_step(weighting: LossWeighting) -> float:
    """The smallest combined gradient where not every loss can be stationary."""
    least = np.inf
    for shape in SHAPES:
        d = directions(weighting, samples(("weak", "off"), shape))
        least = min(least, np.linalg.norm(d, axis=1).min())
    return float(least)


def least_weight(weighting: LossWeighting) -> float:
    """The smallest weight."""
    return min(
        float(weights_on(weighting, samples(KINDS, shape)).min()) for shape in SHAPES
    )


PROPERTIES: Mapping[str, Callable[[LossWeighting], bool]] = types.MappingProxyType(
    {
        "non-conflicting": lambda w: non_conflicting_margin(w, True) >= -4e-4,
        "linear under scaling": lambda w: nonlinearity(w) <= 1e-2,
        "stops at strong stationarity alone": lambda w: smallest_step(w) >= 1e-3,
        "non-conflicting off stationarity": lambda w: (
            non_conflicting_margin(w, False) >= -4e-4
        ),
        "permutation equivariant": lambda w: permutation_error(w) <= 1e-6,
        "direction independent of scale": lambda w: turning(w) <= 1e-3,
        "non-negative weights": lambda w: least_weight(w) >= 0,
    }
)


def gramian_properties(weighting: LossWeighting) -> dict[str, bool]:
    r"""Which properties the combined gradient of a Gramian weighting has, on samples.

    With :math:`A(J) = J^\top w(J J^\top)` the combination of the gradients that are the
    rows of J:

    - ``"non-conflicting"``: :math:`J A(J) \ge 0`, it is opposed to no gradient;
      ``"non-conflicting off stationarity"``: at least not where one direction descends
      all losses;
    - ``"linear under scaling"``: A(diag(a + b) J) = A(diag(a) J) + A(diag(b) J);
    - ``"stops at strong stationarity alone"``: it vanishes only where a mixture of all
      losses is stationary;
    - ``"permutation equivariant"``: A does not depend on the order of the losses;
    - ``"direction independent of scale"``: A(diag(a) J) is parallel to A(J);
    - ``"non-negative weights"``: :math:`w \ge 0`.

    Args:
      weighting: One that needs the Gramian; its first update is looked at.

    Returns:
      For each property, whether no sample contradicts it.

    Examples:
      >>> import yoto_jax as yoto
      >>> from yoto_jax.testing import gramian_properties
      >>> held = gramian_properties(yoto.weightings.equal())
      >>> print([name for name in held if not held[name]])  # doctest: +ELLIPSIS
      ['non-conflicting', ..., 'direction independent of scale']
    """
    return {name: holds(weighting) for name, holds in PROPERTIES.items()}


def check_gramian_properties(weighting: LossWeighting, claimed: Iterable[str]) -> None:
    """Check that a Gramian weighting has the properties that are claimed of it.

    Args:
      weighting: One that needs the Gramian.
      claimed: Names of :func:`gramian_properties`. Others may hold as well.

    Returns:
      None.

    Raises:
      TypeError: ``claimed`` is one name alone.
      ValueError: An unknown name.
      AssertionError: A sample contradicts a property; the message says which.

    Examples:
      >>> import yoto_jax as yoto
      >>> from yoto_jax.testing import check_gramian_properties
      >>> check_gramian_properties(yoto.weightings.equal(), ["non-negative weights"])
    """
    if isinstance(claimed, str):
        raise TypeError(f"claimed must be a sequence of names, got {claimed!r}.")
    claimed = list(claimed)
    if unknown := sorted(set(claimed) - set(PROPERTIES)):
        raise ValueError(
            f"unknown properties {listed(unknown)}; there are {listed(PROPERTIES)}."
        )
    failed = [name for name in claimed if not PROPERTIES[name](weighting)]
    require(not failed, f"samples contradict {listed(failed)}.")
