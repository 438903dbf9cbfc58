"""Gradients of a shared representation: one backward pass through the encoder."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr

from yoto_jax._checks import check_flag
from yoto_jax._losses import (
    Params,
    PyTree,
    State,
    Weights,
    find_loss,
    listed,
    loss_names,
)
from yoto_jax._numerics import stacked
from yoto_jax._varying import Axes, axis_size, vary_over, varying_axes, varying_like
from yoto_jax._weighting import LossWeighting
from yoto_jax.gradients._devices import Devices, checks_axes, mean_losses, mean_over
from yoto_jax.gradients._output import without_effect
from yoto_jax.gradients._pass import Batch, Pass
from yoto_jax.gradients._rows import (
    add_leaf,
    cotangents_of,
    tangent_of,
    weighted_sum_of,
)
from yoto_jax.gradients._statistics import (
    inner_products,
    squared_norm,
    statistics_of_list,
)


@dataclasses.dataclass(frozen=True, eq=False)
class OfRepresentation:
    """The source that :func:`of_representation` makes."""

    encoder: Callable[..., PyTree]
    weigh_heads: bool = False

    def forward(self, batch: Batch) -> Pass:
        return _RepresentationPass(self, batch)


def of_representation(
    encoder: Callable[..., Any], *, weigh_heads: bool = False
) -> OfRepresentation:
    r"""Takes per-loss gradients of the representation that the losses share.

    .. math::
      z = \mathrm{encoder}(\theta), \qquad J_k = \nabla_z L_k(\theta, z), \qquad
      \text{update} = \left(\frac{\partial z}{\partial \theta}\right)^{\!\top}
      \sum_k w_k J_k + \sum_k \nabla_\theta L_k(\theta, z).

    The heads are differentiated once, with a copy of z for each loss, and the encoder
    once. With a deep encoder and small heads that costs hardly more than a plain step:
    K multiplies the cost of the heads alone.

    Args:
      encoder: ``encoder(params, *args) -> z``, any tree of arrays that carry the batch
        axis (one that the encoder averages over devices itself needs the check of
        ``shard_map``). ``loss_fn`` becomes ``loss_fn(params, z, *args)``. To get
        something out of the encoder, such as batch statistics, pass it through z.
      weigh_heads: Whether the heads (what ``loss_fn`` itself uses of the parameters)
        follow the weights too, as they should where losses share one; costs a second
        backward pass through them. If not, they descend the plain sum of the losses. A
        downstream loss trains its own head with the weight 1 in any case.

    Returns:
      The value of ``gradients=`` in :func:`yoto_jax.value_and_grad`.

    Examples:
      >>> import jax.numpy as jnp, yoto_jax as yoto
      >>> encoder = lambda params, x: x * params["encoder"]
      >>> heads = lambda params, z, x: {"a": jnp.sum((z - 1) ** 2), "b": jnp.sum(z)}
      >>> weighting = yoto.weightings.upgrad()
      >>> step = yoto.value_and_grad(
      ...     heads, weighting, gradients=yoto.of_representation(encoder)
      ... )
      >>> params = {"encoder": jnp.array(2.0)}
      >>> state = weighting.init({"a": 0.0, "b": 0.0})
      >>> losses, grads, state = step(params, state, jnp.array([1.0, 3.0]))
      >>> print(losses["a"], grads["encoder"])
      26.0 18.0

    References:
      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
      <https://arxiv.org/abs/1810.04650>`_, 2018, Section 3.3.

    .. warning::
      Gradients of z stand in for gradients of the parameters. That is exact where the
      Jacobian of the encoder is orthogonal, and a bound elsewhere. The K copies of z
      cost nothing under ``jit``, which computes their common forward pass once; outside
      it, the heads run K times.
    """
    if not callable(encoder):
        raise TypeError(
            "encoder must be a function encoder(params, *args) -> z, got a "
            f"{type(encoder).__name__}."
        )
    check_flag(weigh_heads=weigh_heads)
    return OfRepresentation(encoder, weigh_heads)


class _RepresentationPass(Pass):
    def __init__(self, source: OfRepresentation, batch: Batch) -> None:
        self.weigh_heads = source.weigh_heads
        self.params = params = batch.params
        self.axes, self.spread = batch.devices
        self.encode = lambda p: source.encoder(p, *batch.args, **batch.kwargs)
        self.z, self.encoder_pullback = jax.vjp(self.encode, params)
        traced = _Traced(batch.losses, params, self.z)
        if batch.weighting.needs != ("losses",):
            traced.check_all_depend_on_z()

        def each_from_its_copy(p: PyTree, copies: list[PyTree]) -> Any:
            # Under jit the copies are one array, the forward passes one computation.
            first, rest = batch.losses(p, copies[0])
            leaves = jax.tree.leaves(first)[:1]
            leaves += [traced.loss(k, p, copies[k]) for k in range(1, len(copies))]
            return traced.structure.unflatten(leaves), rest

        copies = [self.z] * traced.structure.num_leaves
        self.local_losses, self.pullback, (self.aux, self.present) = jax.vjp(
            each_from_its_copy, params, copies, has_aux=True
        )
        self.losses = mean_losses(self.local_losses, self.axes)
        ones = jax.tree.map(jnp.ones_like, self.local_losses)
        plain = cotangents_of(ones, self.local_losses)
        # Of a batch that only steers, gradients are for the steps that look at them.
        self.gradients = lambda: self.pullback(plain)
        if batch.trains:
            found = self.gradients()
            self.gradients = lambda: found
        # Seen from all devices, z is the devices' parts side by side, and the gradient
        # of a mean over n devices is 1/n of the local one.
        self.num_devices = axis_size(self.axes)
        checked = checks_axes(params, self.axes)
        leaves = jax.tree.leaves(self.z)
        self.spread_z = [_spread_z(x, batch.devices, checked) for x in leaves]

    def statistics(self, names: Sequence[str]) -> dict[str, jax.Array]:
        local = statistics_of_list(self.gradients()[1], names, self.spread_z)
        n = self.num_devices
        return {
            name: x / (n**2 if name == "gramian" else n) for name, x in local.items()
        }

    def direction(self, position: int) -> PyTree:
        through = self._encoder_pull(self.gradients()[1][position])
        return mean_over(through, self.axes, self.spread)

    def along(self, v: PyTree) -> tuple[jax.Array, jax.Array]:
        # As a direction of z, so that its products with the gradients of z are those
        # with one vector: cosines between them stay cosines.
        v = vary_over(tangent_of(v, self.params), self.axes)
        _, tangent = jax.jvp(self.encode, (self.params,), (v,))
        products = inner_products(self.gradients()[1], tangent, self.spread_z)
        return products / self.num_devices, squared_norm(tangent, self.spread_z)

    def combine(
        self, weights: Weights, state: State, weighting: LossWeighting
    ) -> tuple[PyTree, Any]:
        vector = stacked(weights)
        of_heads, rows = self.gradients()
        cotangent = jax.tree.map(lambda *xs: weighted_sum_of(vector, xs), *rows)
        through_encoder = self._encoder_pull(cotangent)
        if self.weigh_heads:
            # A loss that only steers still has a head of its own to train.
            weights = _replace_downstream(weights, weighting)
            of_heads = self.pullback(cotangents_of(weights, self.local_losses))[0]
        add = functools.partial(jax.tree.map, add_leaf)
        average = lambda tree: mean_over(tree, self.axes, self.spread)
        if weighting.observe is None:
            return average(add(through_encoder, of_heads)), state
        through_encoder = average(through_encoder)
        squared = squared_norm(cotangent, self.spread_z) / self.num_devices**2
        state = weighting.observe(
            state,
            cotangent_norm=jnp.sqrt(squared),
            gradient_norm=jnp.sqrt(squared_norm(through_encoder, self.spread)),
        )
        return add(through_encoder, average(of_heads)), state

    def _encoder_pull(self, cotangent: PyTree) -> PyTree:
        return self.encoder_pullback(jax.tree.map(varying_like, cotangent, self.z))[0]


class _Traced:
    """The heads, traced once, so that each loss can be computed without the others.

    To call the heads for each of K losses would trace K^2 of them.
    """

    def __init__(
        self, heads: Callable[[PyTree, PyTree], Any], params: Params, z: PyTree
    ) -> None:
        self.traced, shapes = jax.make_jaxpr(heads, return_shape=True)(params, z)
        losses, (_, self.present) = shapes
        self.structure = jax.tree.structure(losses)
        self.num_params = len(jax.tree.leaves(params))

    def loss(self, k: int, params: Params, z: PyTree) -> jax.Array:
        """Loss k alone."""
        jaxpr = self.traced.jaxpr
        wanted = [n == k for n in range(len(jaxpr.outvars))]
        alone, used = dce_jaxpr(jaxpr, wanted)
        inputs = zip(used, jax.tree.leaves((params, z)), strict=True)
        needed = [x for is_used, x in inputs if is_used]
        return jax.core.eval_jaxpr(alone, self.traced.consts, *needed)[0]

    def check_all_depend_on_z(self) -> None:
        """Raise for a loss without z, unless it may be absent: it is constant then."""
        if self.present is not None:
            return
        z = range(self.num_params, len(self.traced.jaxpr.invars))
        without = without_effect(self.traced.jaxpr, z, loss_names(self.structure))
        if without:
            raise ValueError(
                f"z, the output of the encoder, has no effect on {listed(without)}: a "
                "gradient that is zero there means nothing to a weighting. Compute "
                "every loss from z, add such a loss to one that depends on z, or take "
                "gradients=yoto.of_parameters()."
            )


def _spread_z(x: jax.Array, devices: Devices, checked: bool) -> Axes:
    """The axes that one array of the representation is cut up over.

    They are among those of the batch and of ``param_specs``: what varies along others
    belongs to other runs.
    """
    batch, spread = devices
    if batch and not checked:
        return batch
    varying = varying_axes(x)
    # An array that the encoder has averaged over the devices is whole on each.
    own = tuple(axis for axis in batch if axis in varying)
    of_layers = {axis for axes in spread for axis in axes} - set(batch)
    return (*own, *sorted(varying & of_layers, key=str))


def _replace_downstream(weights: Weights, weighting: LossWeighting) -> PyTree:
    """The weights, with 1 for the downstream loss if there is one."""
    if weighting.downstream is None:
        return weights
    position = find_loss("downstream", weighting.downstream, weights)
    leaves, structure = jax.tree.flatten(weights)
    leaves[position] = jnp.ones_like(leaves[position])
    return structure.unflatten(leaves)
