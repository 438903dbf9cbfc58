"""A weighting that is one of several: which one is in its state."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from yoto_jax._losses import (
    Losses,
    Present,
    PyTree,
    State,
    Weights,
    path_name,
    stack_present,
)
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import (
    LossWeighting,
    and_present,
    check_state,
    count_skipped,
    mask_weights,
    weights_of,
)

NOT_STARTED = -1
Named = dict[str, tuple[jax.Array, ...]]
"""The leaves of one weighting by its name: names and their order are structure."""


@serializable_state
class OneOfState(NamedTuple):
    """State of :func:`one_of`."""

    loss_weights: Weights  # scalars, a tree like the losses: the weights used last
    arm: jax.Array  # int32 scalar, which weighting this lane has; -1: not started
    inner: tuple[Named, ...]  # states of all, without the two counters
    num_updates: jax.Array  # int32 scalar, of that weighting, as in its own state
    num_skipped: jax.Array  # int32 scalar, bad batches of that weighting


def one_of(weightings: Mapping[str, LossWeighting]) -> LossWeighting:
    """Packs several weightings into one; each lane of a race runs a different one.

    Args:
      weightings: By name, none of them steered by a downstream loss. Lane i of
        :func:`start` has the i-th; loss weights take part as
        :func:`yoto_jax.weightings.static`.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs what any of them needs.
      :func:`start` numbers the lanes; without it all have the first weighting, and
      :func:`keep` and :func:`alone` raise an error.

    Raises:
      TypeError: One of them is no weighting. In ``update``: the state of another one.
      ValueError: There is none, or one has a downstream loss. In ``init``: one of them
        is a ``one_of`` itself. In ``update``: the state of several lanes, without
        ``vmap``.

    Examples:
      >>> import jax, jax.numpy as jnp, yoto_jax as yoto
      >>> arms = yoto.racing.one_of(
      ...     {
      ...         "equal": yoto.weightings.equal(),
      ...         "half": yoto.weightings.static({"fit": 1.0, "size": 0.5}),
      ...     }
      ... )
      >>> losses = {"fit": 2.0, "size": 4.0}
      >>> states = yoto.racing.start(arms.init(losses), 2)
      >>> weights, states = jax.vmap(lambda s: arms.update(losses, s))(states)
      >>> print(weights["fit"], weights["size"])
      [0.5 1. ] [0.5 0.5]

    .. note::
      Each lane costs what the most expensive weighting needs: one that looks at
      gradients makes all lanes compute them, at the steps at which any looks. With
      :func:`yoto_jax.weightings.hold` or :func:`yoto_jax.weightings.every` around
      those, most steps cost what they cost with fixed weights. Under ``vmap`` the
      arithmetic of every weighting is done in every lane, which is little beside the
      gradients. :func:`alone` takes the winner out of it.
    """
    _check(weightings)
    arms = _Arms(dict(weightings))
    every = arms.every
    return LossWeighting(
        arms.init,
        arms.update,
        tuple(dict.fromkeys(name for one in every for name in one.needs)),
        due=arms.due if any(one.due for one in every) else None,
        observe=arms.observe if any(one.observe for one in every) else None,
        observe_step=(
            arms.observe_step if any(one.observe_step for one in every) else None
        ),
        positive=any(one.positive for one in every),
    )


def _check(weightings: Mapping[str, LossWeighting]) -> None:
    if not isinstance(weightings, Mapping):
        raise TypeError(
            "weightings must be a mapping from names to weightings, got a "
            f"{type(weightings).__name__}."
        )
    if not weightings:
        raise ValueError("weightings must hold at least one.")
    for name, weighting in weightings.items():
        if not isinstance(weighting, LossWeighting):
            raise TypeError(
                f"weightings[{name!r}] must be a LossWeighting, got a "
                f"{type(weighting).__name__}; of constant weights make "
                "yoto.weightings.static(weights)."
            )
        if weighting.downstream is not None:
            raise ValueError(
                f"weightings[{name!r}] is steered by a downstream loss, which the "
                "others do not have: race it on its own."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class _Arms:
    """The functions of :func:`one_of`."""

    weightings: dict[str, LossWeighting]

    @property
    def every(self) -> tuple[LossWeighting, ...]:
        return tuple(self.weightings.values())

    def init(self, losses: Losses) -> OneOfState:
        states = [one.init(losses) for one in self.every]
        is_own = lambda x: isinstance(x, OneOfState)
        if any(map(is_own, jax.tree.leaves(states, is_leaf=is_own))):
            raise ValueError(
                "a weighting of one_of is made by one_of itself: give all of them to "
                "one."
            )
        return OneOfState(
            jax.tree.map(jnp.copy, weights_of(states[0])),
            jnp.full((), NOT_STARTED, jnp.int32),
            tuple(
                {_key(name): _Kind(one, losses).pack(x)}
                for (name, one), x in zip(self.weightings.items(), states, strict=True)
            ),
            *_counts(states[0]),
        )

    def update(
        self,
        losses: Losses,
        state: OneOfState,
        *,
        present: Present | None = None,
        **statistics: Any,
    ) -> tuple[PyTree, OneOfState]:
        def act(one: LossWeighting, own: Any) -> Any:
            seen = {k: v for k, v in statistics.items() if k in one.needs}
            return one.update(losses, own, **and_present(one, seen, present))[1]

        state = self._change(state, act, batches=1)
        mask = stack_present(present, jax.tree.structure(state.loss_weights))
        return mask_weights(state.loss_weights, mask), state

    def due(self, state: OneOfState) -> jax.Array:
        """Whether the weighting of this lane looks at statistics now."""
        check_state(state, OneOfState)
        _check_arms(self.weightings, state)

        def branch(index: int) -> Callable[[], jax.Array]:
            def run() -> jax.Array:
                one = self.every[index]
                if one.due is None:
                    return jnp.asarray(bool(set(one.needs) - {"losses"}))
                kind = _Kind(one, state.loss_weights)
                return jnp.asarray(one.due(kind.unpack(state, index)))

            return run

        return self._switch(state.arm, branch)

    def observe(self, state: OneOfState, **seen: Any) -> OneOfState:
        return self._change(
            state,
            lambda one, own: one.observe(own, **seen) if one.observe else own,
        )

    def observe_step(
        self, losses: Losses, state: OneOfState, **kwargs: Any
    ) -> OneOfState:
        return self._change(
            state,
            lambda one, own: (
                one.observe_step(losses, own, **kwargs) if one.observe_step else own
            ),
        )

    def _change(
        self,
        state: OneOfState,
        act: Callable[[LossWeighting, Any], Any],
        batches: int = 0,
    ) -> OneOfState:
        """``act(weighting, state) -> state`` on the weighting of this lane."""
        check_state(state, OneOfState)
        if jnp.ndim(state.arm):
            raise ValueError("state is that of several lanes: update under jax.vmap.")
        _check_arms(self.weightings, state)

        def branch(index: int) -> Callable[[], OneOfState]:
            def run() -> OneOfState:
                kind = _Kind(self.every[index], state.loss_weights)
                new = act(self.every[index], kind.unpack(state, index))
                ((key, before),) = state.inner[index].items()
                packed = zip(kind.pack(new), before, strict=True)
                inner = list(state.inner)
                inner[index] = {key: tuple(_as(x, old) for x, old in packed)}
                used = weights_of(new)
                weights = jax.tree.map(_as, used, state.loss_weights)
                updates, skipped = _counts(new, state.num_updates + batches)
                return OneOfState(weights, state.arm, tuple(inner), updates, skipped)

            return run

        return self._switch(state.arm, branch)

    def _switch(self, arm: jax.Array, branch: Callable[[int], Any]) -> Any:
        branches = [branch(index) for index in range(len(self.every))]
        return lax.switch(jnp.maximum(arm, 0), branches)


def alone(
    weightings: Mapping[str, LossWeighting], state: OneOfState
) -> tuple[str, LossWeighting, Any]:
    """Takes the weighting of one lane, and its state, out of :func:`one_of`.

    Args:
      weightings: What :func:`one_of` was given.
      state: Of one lane, without the axis of lanes; outside ``jit``.

    Returns:
      Name, weighting and state.

    Raises:
      TypeError: ``state`` is that of other weightings; their order counts, too.
      ValueError: ``state`` is that of several lanes, or was not made by :func:`start`.

    Examples:
      >>> import yoto_jax as yoto
      >>> both = {"equal": yoto.weightings.equal(), "dwa": yoto.weightings.dwa()}
      >>> lanes = yoto.racing.start(yoto.racing.one_of(both).init({"a": 1.0}), 2)
      >>> name, weighting, state = yoto.racing.alone(both, yoto.racing.lane(lanes, 1))
      >>> print(name)
      dwa
    """
    check_state(state, OneOfState)
    if jnp.ndim(state.arm):
        raise ValueError("state is that of several lanes: take one, by racing.lane.")
    _check_arms(weightings, state)
    check_started(state)
    index = int(state.arm)
    name, weighting = list(weightings.items())[index]
    kind = _Kind(weighting, state.loss_weights)
    return name, weighting, kind.unpack(state, index)


def check_started(lanes: PyTree) -> None:
    """Raise if the lanes have a :func:`one_of` that is the first arm in each."""
    is_own = lambda x: isinstance(x, OneOfState)
    for node in filter(is_own, jax.tree.leaves(lanes, is_leaf=is_own)):
        arm = node.arm
        if not isinstance(arm, jax.core.Tracer) and bool(jnp.any(arm == NOT_STARTED)):
            first = next(iter(node.inner[0])).removeprefix(_key(""))
            raise ValueError(
                f"the lanes were not made by racing.start: all run {first!r}, the "
                "first weighting of one_of."
            )


def numbered(lanes: PyTree, arms: int) -> PyTree:
    """Lanes in which every :func:`one_of` has another weighting in each."""

    def number(node: Any) -> Any:
        if not isinstance(node, OneOfState):
            return node
        if len(node.inner) != arms:
            raise ValueError(
                f"one_of has {len(node.inner)} weightings: start as many lanes, not "
                f"{arms}."
            )
        shape = node.arm.shape  # With more axes where a lane has several seeds.
        numbers = jnp.arange(arms, dtype=jnp.int32)
        numbers = numbers.reshape(-1, *[1] * (len(shape) - 1))
        return node._replace(arm=jnp.broadcast_to(numbers, shape))

    return jax.tree.map(number, lanes, is_leaf=lambda x: isinstance(x, OneOfState))


def _key(name: str) -> str:
    """Never that of a field, which states are searched for."""
    return f"arm {name}"


def _check_arms(weightings: Mapping[str, LossWeighting], state: OneOfState) -> None:
    """Raise unless these weightings, in this order, have such states."""
    names = [key for one in state.inner for key in one]
    if names != [_key(name) for name in weightings]:
        raise TypeError(
            f"state is that of another one_of: it has {', '.join(names)}, in this "
            f"order, and the weightings given are {', '.join(map(str, weightings))}."
        )
    wanted = [_Kind(one, state.loss_weights).types for one in weightings.values()]
    got = [[x.dtype for x in leaves] for one in state.inner for leaves in one.values()]
    if wanted != got:
        raise TypeError(
            "state is that of another one_of: its weightings remember "
            f"{[len(x) for x in got]} arrays each, those given {list(map(len, wanted))}"
            ", or in other dtypes. Take it from the init of the weighting that is "
            "updated."
        )


class _Kind:
    """States of one weighting as leaves without names, so that theirs are not found."""

    def __init__(self, weighting: LossWeighting, losses: Losses):
        shapes = jax.eval_shape(weighting.init, losses)
        self._structure = jax.tree.structure(shapes)
        paths = [path for path, _ in jax.tree.leaves_with_path(shapes)]
        self._counters: dict[int, str] = {}
        for counter in ("num_updates", "num_skipped"):
            found = [i for i, path in enumerate(paths) if _last(path) == counter]
            if len(found) == 1:  # A wrapper may have one more, and keeps both.
                self._counters[found[0]] = counter
        self.types = [leaf.dtype for leaf in self.pack(shapes)]

    def pack(self, state: State) -> tuple[jax.Array, ...]:
        leaves = enumerate(jax.tree.leaves(state))
        return tuple(leaf for i, leaf in leaves if i not in self._counters)

    def unpack(self, state: OneOfState, index: int) -> Any:
        """The state of the weighting of this lane, the one at ``index``."""
        (leaves,) = state.inner[index].values()
        rest = iter(leaves)
        return self._structure.unflatten(
            getattr(state, self._counters[i]) if i in self._counters else next(rest)
            for i in range(self._structure.num_leaves)
        )


def _last(path: tuple[Any, ...]) -> str:
    """The name of a leaf in its container."""
    return path_name(path[-1:])


def _as(x: Any, old: jax.Array) -> Any:
    """A leaf in the dtype that it had; random keys as they are."""
    if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
        return x
    return jnp.asarray(x, old.dtype)


def _counts(state: State, updates: Any = 0) -> tuple[jax.Array, jax.Array]:
    """Batches that were taken and skipped; ``updates`` if the state does not tell."""
    told = optax.tree.get(state, "num_updates")
    skipped = count_skipped(state)
    return (
        jnp.array(updates if told is None else told, jnp.int32),
        jnp.array(0 if skipped is None else skipped, jnp.int32),
    )
