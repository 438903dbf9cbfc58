"""Regulariser of the loss logits, and its decoupled form as an Optax link."""

import functools
import warnings
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from yoto_jax._checks import check_rate
from yoto_jax._choice_logits import is_choice_logits
from yoto_jax._loss_logits import (
    LossLogits,
    check_loss_logits,
    is_loss_logits,
    present_by_logits,
    present_in_order,
)
from yoto_jax._losses import Params, Present, PyTree, State
from yoto_jax._numerics import softmax, sum_of_products, unstack, upcast, with_primary
from yoto_jax._serialization import serializable_state

Entropy = Literal["all", "auxiliary"]


def regularizer(
    mu: LossLogits | Any, *, entropy: Entropy = "all", present: Present | None = None
) -> jax.Array:
    r"""Regulariser of the loss logits: negated entropy plus softplus, without rho.

    .. math::
      L_r(\mu) = \sum_{i=0}^{K} p_i \log p_i + \sum_{i=1}^{K} \log(1 + e^{\mu_i}),
      \quad p = \mathrm{Softmax}(\mu), \qquad
      \frac{\partial L_r}{\partial \mu_i}
        = p_i \Bigl(\mu_i - \sum_j p_j \mu_j\Bigr) + \sigma(\mu_i).

    The entropy draws the weights together and is invariant to a common shift of the
    logits; the softplus bounds them above. The minimum of both weighs every auxiliary
    loss *less* than the primary one: 0.28 times for K = 1, 0.20 for K = 2, 0.16 for
    K = 3, 0.07 for K = 10.

    Args:
      mu: Loss logits. Leading axes are kept.
      entropy: ``"all"`` takes the entropy over all losses, as printed in the paper.
        ``"auxiliary"`` takes it over the auxiliary losses alone, renormalised to sum to
        1: it balances them with each other, not with the primary loss.
      present: Tree of booleans like the losses: the regulariser of those alone.

    Returns:
      Scalar, or an array of the leading axes of the logits; float32, or float64 if the
      logits are.

    Raises:
      TypeError: ``mu`` is not a :class:`LossLogits`.
      ValueError: Unknown ``entropy``, or ``mu`` holds another number of logits than its
        losses need.

    Examples:
      >>> import yoto_jax as yoto
      >>> losses = {"depth": 0.0, "camera": 0.0}
      >>> mu = yoto.init_loss_logits(losses, "depth", epsilon=1.0)
      >>> print(round(float(yoto.regularizer(mu)), 4))  # log(1/2) + log(2)
      0.0

    References:
      Sakaridis, `You Only Train Once <https://arxiv.org/abs/2506.04349>`_, 2025,
      Eqs. 7 and 8.

    .. warning::
      Eq. 7 includes the factor rho and Algorithm 1 multiplies by rho again. Here rho
      appears once, in :func:`add_hyperparameter_decay`. ``entropy="auxiliary"`` is not
      in the paper; it is what the final weights that the paper reports imply.
    """
    check_loss_logits(mu)
    mask = present_in_order(present, mu)
    return _regularizer(
        entropy_spans_primary(mu, entropy),
        upcast(mu.learned),
        *_masks(mu, entropy, mask),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _regularizer(
    spans_primary: bool,
    learned: jax.Array,
    spanned: jax.Array | None,
    there: jax.Array | None,
) -> jax.Array:
    logits = with_primary(learned, spans_primary)
    if spanned is not None:
        logits = jnp.where(spanned, logits, -jnp.inf)
    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    negated_entropy = jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)
    bounds = jax.nn.softplus(learned)
    if there is not None:
        bounds = jnp.where(there, bounds, 0)
    return negated_entropy + jnp.sum(bounds, axis=-1)


@_regularizer.defjvp
def _regularizer_jvp(spans_primary, primals, tangents):
    learned, spanned, there = primals
    slope = regularizer_gradient(spans_primary, learned, spanned, there)
    value = _regularizer(spans_primary, learned, spanned, there)
    return value, jnp.sum(slope * tangents[0], axis=-1)


def regularizer_gradient(
    spans_primary: bool,
    learned: jax.Array,
    spanned: jax.Array | None = None,
    there: jax.Array | None = None,
) -> jax.Array:
    """Eq. 8 without rho.

    ``spanned`` are the losses that the entropy spans, ``there`` those with a learned
    logit, as far as they are present.
    """
    p = softmax(learned, spans_primary, spanned)[..., int(spans_primary) :]
    weighed = jnp.where(p > 0, learned, 0.0)  # 0 times infinity is 0 here.
    mean = sum_of_products(p, unstack(weighed))  # The primary's logit is 0.
    slope = p * (weighed - mean[..., None]) + jax.nn.sigmoid(learned)
    return slope if there is None else jnp.where(there, slope, 0)


def decay_gradient(
    mu: LossLogits, entropy: Entropy, present: Present | None
) -> jax.Array:
    """What the decay pulls the logits by, before rho."""
    return regularizer_gradient(
        entropy_spans_primary(mu, entropy),
        upcast(mu.learned),
        *_masks(mu, entropy, present_in_order(present, mu)),
    )


def _masks(
    mu: LossLogits, entropy: Entropy, present: jax.Array | None
) -> tuple[jax.Array | None, jax.Array | None]:
    """Masks of the present losses: those in the entropy, and the learned ones."""
    if present is None:
        return None, None
    there = present[int(mu.primary is not None) :]
    return (present if entropy_spans_primary(mu, entropy) else there), there


def entropy_spans_primary(mu: LossLogits, entropy: Entropy) -> bool:
    check_entropy(entropy)
    return mu.primary is not None and entropy == "all"


@serializable_state
class HyperparameterDecayState(NamedTuple):
    """State of a decay whose strength is a schedule.

    Of :func:`add_hyperparameter_decay` and of :func:`add_choice_decay`.
    """

    count: jax.Array  # int32 scalar, steps taken


def init_strength(strength: optax.ScalarOrSchedule) -> optax.OptState:
    """State of a decay: the count of steps, if its strength is a schedule."""
    if callable(strength):
        return HyperparameterDecayState(count=jnp.zeros((), jnp.int32))
    return optax.EmptyState()


def strength_at(strength: optax.ScalarOrSchedule, state: State) -> tuple[Any, Any]:
    """The strength in this step, and the state of the next one."""
    if not callable(strength):
        return strength, state
    count = jnp.asarray(optax.safe_increment(state.count))
    return strength(state.count), HyperparameterDecayState(count)


def add_hyperparameter_decay(
    hyperparameter_decay: optax.ScalarOrSchedule, *, entropy: Entropy = "all"
) -> optax.GradientTransformationExtraArgs:
    r"""Adds rho times the gradient of the regulariser to updates of loss logits.

    .. math::
      u_\mu \leftarrow u_\mu + \rho \, \nabla L_r(\mu)

    The counterpart of ``optax.add_decayed_weights`` for every :class:`LossLogits` in
    the parameters; all else passes unchanged. After the scaling by momentum or Adam and
    before that by the learning rate, the decay is decoupled, as in the paper; before
    both, it is coupled. Behind the learning rate, as after ``optax.adam(1e-2)``,
    its sign is wrong and the weights run away.

    Args:
      hyperparameter_decay: rho, the strength of the regulariser (non-negative; in units
        of the update it is added to: of a loss for gradients, none after Adam), or a
        schedule of it.
      entropy: Which losses the entropy spans, see :func:`regularizer`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` needs ``params``.
      With ``present=``, a tree of booleans like the losses, the regulariser spans the
      present losses. Its ``init`` warns of parameters without loss logits, unless they
      hold choices, ``optax.partition`` or ``optax.masked`` picks them or rho is 0, and
      of logits of less than 32 bits, which small steps do not move.

    Raises:
      TypeError: rho is neither a number, nor a scalar array, nor a schedule.
      ValueError: rho is negative or not finite, or ``entropy`` is unknown. In
        ``update``: ``params`` is missing, or holds no loss logits where the updates do.

    Examples:
      >>> import jax, optax, yoto_jax as yoto
      >>> params = {"mu": yoto.init_loss_logits((0.0, 0.0), primary=0)}
      >>> tx = optax.chain(
      ...     optax.scale_by_lion(),
      ...     yoto.add_hyperparameter_decay(0.5),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )
      >>> state = tx.init(params)
      >>> grads = jax.tree.map(jax.numpy.zeros_like, params)
      >>> updates, state = tx.update(grads, state, params)
      >>> print(f"{updates['mu'].learned[0]:.1e}")
      5.0e-05

    References:
      Sakaridis, `You Only Train Once <https://arxiv.org/abs/2506.04349>`_, 2025, Eq. 8
      and Algorithm 1.
    """
    check_rate("hyperparameter_decay", hyperparameter_decay)
    check_entropy(entropy)

    def init_fn(params: Params) -> optax.OptState:
        _warn_of_logits(params, hyperparameter_decay)
        return init_strength(hyperparameter_decay)

    def update_fn(
        updates: Params,
        state: State,
        params: Params | None = None,
        *,
        present: Present | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        del extra_args
        if params is None:
            raise ValueError(
                "add_hyperparameter_decay needs the current loss logits: call "
                "update(updates, state, params)."
            )
        rho, state = strength_at(hyperparameter_decay, state)
        own = iter(present_by_logits(present, updates))

        def decay(update: Any, param: Any) -> Any:
            # A mask or filter that works leaf by leaf empties a LossLogits.
            if not (is_loss_logits(update) and jax.tree.leaves(update)):
                return update
            if not is_loss_logits(param):
                raise ValueError(
                    "the updates hold LossLogits where the parameters hold a "
                    f"{type(param).__name__}."
                )
            slope = decay_gradient(param, entropy, next(own))
            learned = (upcast(update.learned) + rho * slope).astype(
                update.learned.dtype
            )
            return LossLogits(learned, update.structure, update.primary)

        updates = jax.tree.map(
            decay, updates, params, is_leaf=lambda x: x is None or is_loss_logits(x)
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _warn_of_logits(params: Params, rho: Any) -> None:
    """Warns if there are no loss logits, or if they cannot take small steps."""
    nodes = jax.tree.leaves(
        params,
        is_leaf=lambda x: (
            isinstance(x, LossLogits | optax.MaskedNode) or is_choice_logits(x)
        ),
    )
    logits = [x for x in nodes if is_loss_logits(x)]
    # Of a part of the parameters, the loss logits may be in another.
    whole = not any(isinstance(x, optax.MaskedNode) for x in nodes)
    unused = isinstance(rho, int | float) and rho == 0
    unused |= any(map(is_choice_logits, nodes))  # They are learned, and no others.
    if nodes and whole and not logits and not unused:
        warnings.warn(
            "the parameters hold no LossLogits: hyperparameter decay does nothing. "
            "Give the whole tree with its LossLogits (see init_loss_logits), not an "
            "array made of it: optax.flatten and ravel_pytree lose them and belong "
            "around the model's optimizer alone, inside optax.partition by "
            "label_loss_logits. If there are none on purpose, use Optax's own "
            "optimizer, or hyperparameter_decay=0.",
            stacklevel=3,
        )
    learned = [("loss logits", mu.learned) for mu in logits]
    learned += [("choice logits", x.logits) for x in nodes if is_choice_logits(x)]
    for what, array in learned:
        dtype = getattr(array, "dtype", jnp.float32)
        if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
            warnings.warn(
                f"the {what} are {dtype}: steps of less than about "
                f"{float(jnp.finfo(dtype).eps) / 2:.1g} of a logit are rounded away, "
                "and their weights may never move. Keep the logits in float32: cast "
                "the model alone, not the whole tree of parameters.",
                stacklevel=3,
            )


def check_entropy(entropy: str) -> None:
    if entropy not in ("all", "auxiliary"):
        raise ValueError(f"entropy must be 'all' or 'auxiliary', got {entropy!r}.")
