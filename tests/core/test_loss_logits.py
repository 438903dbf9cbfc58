import collections
import copy
import dataclasses
import pickle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import yoto_jax as yoto
from tests.oracles import paper

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Pair(NamedTuple):
    fit: Any
    size: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    fit: Any
    size: Any


@jax.tree_util.register_pytree_node_class
class Opaque:
    """A container without key paths: its children have numbers."""

    def __init__(self, *children):
        self.children = children

    def tree_flatten(self):
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


CONTAINERS = [
    ({"fit": 1.0, "size": 2.0}, "fit", 0),
    ({"heads": {"fit": 1.0, "size": 2.0}, "size": 3.0}, "heads/fit", 0),
    ({"heads": {"fit": 1.0, "size": 2.0}, "size": 3.0}, "fit", 0),
    ({"heads": {"fit": 1.0, "size": 2.0}, "size": 3.0}, "size", 2),
    ((1.0, 2.0, 3.0), 1, 1),
    ((1.0, 2.0, 3.0), -1, 2),
    ((1.0, 2.0, 3.0), np.int64(1), 1),
    ([(1.0, 2.0), 3.0], 1, 2),
    ([(1.0, 2.0), 3.0], "0/1", 1),
    ({0: 1.0, 7: 2.0}, 7, 1),
    (Pair(1.0, 2.0), "size", 1),
    (Pair(1.0, 2.0), 0, 0),
    (Record(1.0, 2.0), "size", 1),
    (Opaque(1.0, 2.0), 1, 1),
    (collections.OrderedDict(b=1.0, a=2.0), "a", 1),
    ({"fit": 1.0, "off": None}, "fit", 0),
    ({"a": 1.0, "b": 2.0}, None, None),
    (1.0, None, None),
]


@pytest.mark.parametrize(("losses", "primary", "position"), CONTAINERS)
def test_every_container_and_every_way_to_name_the_primary(losses, primary, position):
    mu = yoto.init_loss_logits(losses, primary, epsilon=0.5)
    count = len(jax.tree.leaves(losses))
    assert mu.primary == position
    assert mu.learned.shape == (count - (position is not None),)
    assert mu.learned.dtype == jnp.float32
    assert not mu.learned.weak_type

    weights = yoto.loss_weights(mu)
    assert jax.tree.structure(weights) == jax.tree.structure(losses)
    relative = [1.0 if i == position else 0.5 for i in range(count)]
    np.testing.assert_allclose(
        jax.tree.leaves(weights), np.array(relative) / sum(relative), rtol=1e-6
    )
    loss = yoto.composite_loss(losses, mu)
    assert loss.shape == ()
    np.testing.assert_allclose(
        loss, np.dot(relative, jax.tree.leaves(losses)) / sum(relative), rtol=1e-6
    )


def test_logits_have_none_at_the_primary_alone():
    mu = yoto.init_loss_logits(
        {"a": 0.0, "b": (0.0, 0.0)}, "b/0", epsilon={"a": 2.0, "b": (None, 0.5)}
    )
    logits = mu.logits
    assert logits["b"][0] is None
    np.testing.assert_allclose(logits["a"], np.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(logits["b"][1], np.log(0.5), rtol=1e-6)
    assert mu.names == ("a", "b/0", "b/1")


def test_losses_may_be_shapes():
    shapes = jax.eval_shape(lambda: {"a": jnp.float32(0), "b": jnp.bfloat16(0)})
    mu = yoto.init_loss_logits(shapes, "a")
    assert mu.learned.shape == (1,)


@pytest.mark.parametrize(
    "epsilon",
    [
        {"b": 0.25, "c": 4.0},
        {"a": None, "b": 0.25, "c": 4.0},
        [0.25, 4.0],
        (0.25, 4.0),
        np.array([0.25, 4.0]),
        jnp.array([0.25, 4.0]),
    ],
    ids=repr,
)
def test_one_epsilon_per_auxiliary_loss(epsilon):
    mu = yoto.init_loss_logits({"a": 0.0, "b": 0.0, "c": 0.0}, "a", epsilon=epsilon)
    np.testing.assert_allclose(mu.learned, np.log([0.25, 4.0]), rtol=1e-6)


@pytest.mark.parametrize("epsilon", [0.1, np.float64(0.1), jnp.float32(0.1), 1])
def test_one_epsilon_for_all(epsilon):
    mu = yoto.init_loss_logits((0.0, 0.0, 0.0), 0, epsilon=epsilon)
    np.testing.assert_allclose(mu.learned, np.log(float(epsilon)), rtol=1e-6)


def test_epsilon_in_order_and_by_name_do_not_mix():
    digits = {str(k): 0.0 for k in range(13)}  # As leaves, "10" comes before "2".
    mu = yoto.init_loss_logits(digits, "0", epsilon=list(range(1, 13)))
    np.testing.assert_allclose(np.exp(mu.learned), range(1, 13), rtol=1e-6)
    named = yoto.init_loss_logits(
        digits, "0", epsilon={k: 1.0 + int(k) for k in mu.names[1:]}
    )
    by_name = dict(zip(mu.names[1:], named.learned, strict=True))
    np.testing.assert_allclose(np.exp(by_name["10"]), 11.0, rtol=1e-6)
    clash = {"a/b": 0.0, "a": {"b": 0.0}, "c": 0.0}
    with pytest.raises(ValueError, match="epsilon must be one number, or one for each"):
        yoto.init_loss_logits(clash, "c", epsilon={"a/b": 0.5, "a": {"b": 0.1}})
    mu = yoto.init_loss_logits(clash, "c", epsilon=[0.1, 0.5])
    np.testing.assert_allclose(np.exp(mu.learned), [0.1, 0.5], rtol=1e-6)


def test_epsilon_may_be_traced():
    def weight(epsilon):
        return yoto.loss_weights(yoto.init_loss_logits((0.0, 0.0), 0, epsilon=epsilon))[
            1
        ]

    weights = jax.vmap(weight)(jnp.array([0.5, 1.0, 3.0]))
    np.testing.assert_allclose(weights, [1 / 3, 1 / 2, 3 / 4], rtol=1e-6)


def test_a_single_loss_weighs_one():
    mu = yoto.init_loss_logits({"only": 0.0}, "only")
    assert mu.learned.shape == (0,)
    assert yoto.loss_weights(mu) == {"only": 1.0}
    assert yoto.composite_loss({"only": 3.0}, mu) == 3.0
    assert yoto.regularizer(mu) == 0.0
    gradient = jax.jit(jax.grad(yoto.composite_loss, argnums=1))({"only": 3.0}, mu)
    assert gradient.learned.shape == (0,)


# Each length is compiled for itself: short ones, long ones, where the form changes.
vectors = st.sampled_from([1, 2, 8, 9, 10, 40]).flatmap(
    lambda size: st.lists(st.floats(-30, 30, width=32), min_size=size, max_size=size)
)


@given(vectors, st.booleans(), st.data())
@settings(deadline=None, max_examples=60)
def test_weights_equal_softmax_for_any_number_of_losses(learned, with_primary, data):
    count = len(learned) + with_primary
    position = data.draw(st.integers(0, count - 1))
    primary = position if with_primary else None
    losses = (0.0,) * count
    mu = dataclasses.replace(
        yoto.init_loss_logits(losses, primary), learned=jnp.array(learned, jnp.float32)
    )
    logits = list(map(float, learned))
    if with_primary:
        logits.insert(position, 0.0)
    weights = np.array(yoto.loss_weights(mu))
    np.testing.assert_allclose(weights, paper.softmax(np.array(logits)), rtol=2e-5)
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)


@pytest.mark.parametrize("count", [2, 9, 10, 40])
def test_extreme_logits_leave_finite_weights_and_gradients(count):
    losses = (1.0,) + (2.0,) * (count - 1)
    mu = yoto.init_loss_logits(losses, 0)
    functions = (lambda mu: yoto.composite_loss(losses, mu), yoto.regularizer)

    @jax.jit
    @jax.vmap
    def derivatives(value):
        learned = mu.learned.at[0].set(value)
        extreme = dataclasses.replace(mu, learned=learned)
        found = [(f(extreme), jax.grad(f)(extreme)) for f in functions]
        hessians = [jax.hessian(f)(extreme).learned.learned for f in functions]
        return sum(yoto.loss_weights(extreme)), found, hessians

    values = jnp.array([-1e30, -200.0, 200.0, 1e30])
    total, *found = derivatives(values)
    np.testing.assert_allclose(total, 1.0, rtol=1e-6)
    for path, x in jax.tree.leaves_with_path(found):
        finite = np.isfinite(x).reshape(len(values), -1).all(axis=1)
        assert finite.all(), (path, values[~finite])


@pytest.mark.parametrize("count", [3, 12])
def test_leading_axes_of_logits_are_a_history(count):
    mu = yoto.init_loss_logits((0.0,) * count, 1)
    learned = jax.random.normal(jax.random.key(0), (5, 2, count - 1))
    history = yoto.loss_weights(dataclasses.replace(mu, learned=learned))
    assert all(weight.shape == (5, 2) for weight in history)
    one = yoto.loss_weights(dataclasses.replace(mu, learned=learned[3, 1]))
    np.testing.assert_allclose([w[3, 1] for w in history], one, rtol=1e-6)
    assert yoto.regularizer(dataclasses.replace(mu, learned=learned)).shape == (5, 2)


def test_float64_logits_are_kept_in_float64():
    with jax.enable_x64(True):
        mu = yoto.init_loss_logits((0.0, 0.0), 0)
        assert mu.learned.dtype == jnp.float32
        wide = dataclasses.replace(mu, learned=jnp.array([0.3], jnp.float64))
        expected = paper.softmax(np.array([0.0, 0.3]))
        np.testing.assert_allclose(yoto.loss_weights(wide), expected, rtol=1e-15)


def test_repr_survives_tracers_and_labels():
    mu = yoto.init_loss_logits({"a": 0.0, "b": 0.0}, "a")
    assert repr(mu) == "LossLogits(a=None, b=-2.303)"
    assert "b=" in repr(jax.eval_shape(lambda: mu))
    assert "model" in repr(jax.tree.map(lambda _: "model", mu))
    assert repr(yoto.init_loss_logits(0.0, None)) == "LossLogits(loss=-2.303)"


def test_stacked_logits_are_shown_in_one_line():
    mu = yoto.init_loss_logits({"a": 0.0, "b": 0.0, "c": 0.0}, "a")
    stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (100, 3, 2)), mu)
    expected = "LossLogits(a=None, b=float32[100,3], c=float32[100,3])"
    assert repr(stacked) == expected
    assert repr(jax.eval_shape(lambda: stacked)) == expected
    two = yoto.init_loss_logits({"a": 0.0, "b": 0.0}, "a")
    alone = jax.tree.map(lambda x: np.ones((1, *x.shape), x.dtype), two)
    assert repr(alone) == "LossLogits(a=None, b=float32[1])"
    shown = []
    jax.vmap(lambda mu: shown.append(repr(mu)))(stacked)
    assert shown == ["LossLogits(a=None, b=float32[3], c=float32[3])"]
    jax.jit(lambda mu: shown.append(repr(mu)))(mu)
    assert shown[1:] == ["LossLogits(a=None, b=float32[], c=float32[])"]


def test_structure_survives_tree_operations_and_copies():
    mu = yoto.init_loss_logits({"a": 0.0, "b": 0.0}, "a")
    pickled = pickle.loads(pickle.dumps(mu))
    assert jax.tree.structure(pickled) == jax.tree.structure(mu)
    again = jax.tree.unflatten(jax.tree.structure(mu), jax.tree.leaves(mu))
    assert jax.tree.structure(again) == jax.tree.structure(copy.deepcopy(mu))
    assert hash(jax.tree.structure(mu)) == hash(jax.tree.structure(again))
    ((path, _),) = jax.tree.leaves_with_path(mu)
    assert jax.tree_util.keystr(path) == ".learned"


@pytest.mark.parametrize(
    ("losses", "primary", "epsilon", "error", "message"),
    [
        ({}, None, 0.1, ValueError, "no leaves"),
        ({"a": 0.0}, "b", 0.1, ValueError, "'b' is unknown.*'a'"),
        ((0.0, 0.0), 2, 0.1, ValueError, "2 is out of range for 2 losses"),
        (
            {"x": {"a": 0.0}, "y": {"a": 0.0}},
            "a",
            0.1,
            ValueError,
            "ambiguous.*'x/a', 'y/a'",
        ),
        ({"x": {"a": 0.0, "b": 0.0}}, "x", 0.1, ValueError, "ambiguous.*'x/a', 'x/b'"),
        ([(0.0, 0.0), 0.0], 0, 0.1, ValueError, "ambiguous.*'0/0', '0/1'"),
        ({"a/b": 0.0, "a": {"b": 0.0}}, "a/b", 0.1, ValueError, "ambiguous"),
        ({"a": 0.0, "b": 0.0}, ("a", "b"), 0.1, TypeError, "exactly one.*'a', 'b'"),
        ({"a": 0.0, "b": 0.0}, True, 0.1, TypeError, "exactly one"),
        ({"a": jnp.ones(3)}, "a", 0.1, ValueError, r"'a' must be a scalar.*\(3,\)"),
        ({"a": 0.0, "b": 1}, "a", 0.1, TypeError, "'b'.*int"),
        ({"a": 0.0, "b": True}, "a", 0.1, TypeError, "'b'.*bool"),
        ({"a": 0.0, "b": 1j}, "a", 0.1, TypeError, "'b'.*complex"),
        ({"a": 0.0, "b": "text"}, "a", 0.1, TypeError, "'b' is the string 'text'"),
        ({"a": 0.0, "b": 0.0}, "a", 0.0, ValueError, "'b' must be positive"),
        ({"a": 0.0, "b": 0.0}, "a", -1, ValueError, "'b' must be positive"),
        ({"a": 0.0, "b": 0.0}, "a", float("nan"), ValueError, "'b' must be positive"),
        ({"a": 0.0, "b": 0.0}, "a", float("inf"), ValueError, "'b'.*finite"),
        ({"a": 0.0, "b": 0.0}, "a", {"c": 0.1}, ValueError, "auxiliary loss.*'b'"),
        ({"a": 0.0, "b": 0.0}, "a", [0.1, 0.1], ValueError, "auxiliary loss.*'b'"),
        ({"a": 0.0, "b": 0.0}, "a", [np.ones(2)], ValueError, "'b' must be a scalar"),
        ({"a": 0.0, "b": 0.0}, "a", "0.1", TypeError, "epsilon"),
    ],
)
def test_errors_name_the_culprit(losses, primary, epsilon, error, message):
    with pytest.raises(error, match=message):
        yoto.init_loss_logits(losses, primary, epsilon=epsilon)


@pytest.mark.parametrize("learned", [jnp.zeros(5), jnp.zeros(1), jnp.zeros(()), None])
def test_the_number_of_logits_must_fit_the_losses(learned):
    mu = yoto.init_loss_logits({"a": 0.0, "b": 0.0, "c": 0.0}, "b")
    wrong = dataclasses.replace(mu, learned=learned)
    losses = {"a": 6.0, "b": 6.0, "c": 6.0}
    for f in (
        yoto.loss_weights,
        yoto.regularizer,
        lambda mu: yoto.composite_loss(losses, mu),
    ):
        with pytest.raises((TypeError, ValueError), match="mu must hold"):
            f(wrong)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"learned": jnp.zeros(2, int)}, TypeError, "floating-point logits, got.*int"),
        ({"primary": -1}, ValueError, "primary of mu must be.*'a', 'b', 'c', got -1"),
        ({"primary": 3}, ValueError, "primary of mu must be.*got 3"),
        ({"primary": "b"}, ValueError, "primary of mu must be.*got 'b'"),
    ],
)
def test_what_is_made_by_hand_is_checked(change, error, message):
    mu = yoto.init_loss_logits({"a": 0.0, "b": 0.0, "c": 0.0}, "b")
    wrong = dataclasses.replace(mu, **change)
    for f in (yoto.loss_weights, yoto.regularizer):
        with pytest.raises(error, match=message):
            f(wrong)


def test_only_loss_logits_are_loss_logits():
    plain: Any = {"a": 0.0}
    for f in (
        yoto.loss_weights,
        yoto.regularizer,
        lambda mu: yoto.composite_loss({"a": 1.0}, mu),
    ):
        with pytest.raises(TypeError, match="must be a LossLogits.*dict"):
            f(plain)
