"""Batches with absurd losses change nothing; all others change what they would."""

import functools
import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import yoto_jax as yoto
import yoto_jax.nnx as yoto_nnx
from yoto_jax import LossWeighting, make_weighting, weightings
from yoto_jax._outliers import OutlierRule
from yoto_jax._skip_outliers import skip_outliers
from yoto_jax._weighting import count_skipped
from yoto_jax.weightings._skip_outliers import skip_outliers as skip_in_weighting

pytestmark = pytest.mark.usefixtures("quick_compilation")

DEFAULTS = {"limit": 1e3, "patience": 10, "positive": False, "floor": 1e-6}
DECAY = 0.99
NAN, INF = np.nan, np.inf
POSITIVE = OutlierRule(positive=True)


# The rule, against a slow one.


class OracleScale:
    """The scale of one loss, in float64."""

    def __init__(self, options):
        self.options = options
        self.mean, self.seen, self.streak = 0.0, 0, 0

    def size(self, loss):
        return max(abs(loss), self.options["floor"])

    def judge(self, loss):
        """Count strange losses in a row; whether this one spoils its batch."""
        o, size = self.options, self.size(loss)
        high = self.seen > 0 and size > o["limit"] * self.mean
        low = self.seen > 0 and size * o["limit"] < self.mean
        low = low and loss != 0
        if high:
            self.streak = max(self.streak, 0) + 1
        elif low:
            self.streak = min(self.streak, 0) - 1
        elif loss != 0:
            self.streak = 0
        self.strange = high or low
        self.restart = self.strange and abs(self.streak) > o["patience"]
        return high and not self.restart

    def accept(self, loss):
        """Take in a loss of an accepted batch."""
        size = self.size(loss)
        if self.restart:
            self.mean, self.seen, self.streak = size, int(loss != 0), 0
        elif loss != 0 and not self.strange:
            early = self.seen < DECAY / (1 - DECAY)
            share = 1 / (self.seen + 1) if early else 1 - DECAY
            self.mean += share * (size - self.mean)
            self.seen += 1


def oracle(stream, sound=None, **options):
    """Which batches (T, K) are accepted, loss by loss, in float64."""
    o = DEFAULTS | options
    stream = np.asarray(stream, np.float64)
    scales = [OracleScale(o) for _ in range(stream.shape[1])]
    accepted = []
    for t, losses in enumerate(stream):
        usable = np.isfinite(losses).all() and (sound is None or sound[t])
        if not usable or (o["positive"] and (losses <= 0).any()):
            accepted.append(False)
            continue
        pairs = list(zip(scales, losses, strict=True))
        spoilt = [scale.judge(loss) for scale, loss in pairs]
        accepted.append(not any(spoilt))
        for scale, loss in pairs if accepted[-1] else ():
            scale.accept(loss)
    means, streaks = ([getattr(s, x) for s in scales] for x in ("mean", "streak"))
    return np.array(accepted), np.array(means), np.array(streaks)


LENGTH, WIDTH = 3000, 3


@functools.cache
def judging(positive):
    """One program for streams of all lengths, which saves most of the time."""

    @jax.jit
    def judge(stream, sound, limit, patience, floor):
        rule = OutlierRule(limit, patience=patience, positive=positive, floor=floor)
        step = lambda scales, batch: rule.judge(batch[0], scales, batch[1])[::-1]
        scales = rule.init(WIDTH, stream.dtype, None).loss_scales
        return jax.lax.scan(step, scales, (stream, sound))

    return judge


def judged(stream, sound=None, **options):
    """The same by the rule itself."""
    length, width = np.shape(stream)
    padded = np.ones((LENGTH, WIDTH), np.float32)
    padded[:length, :width] = stream
    usable = np.arange(LENGTH) < length
    if sound is not None:
        usable[:length] = sound
    o = DEFAULTS | options
    judge = judging(o["positive"])
    scales, ok = judge(padded, usable, o["limit"], o["patience"], o["floor"])
    return np.asarray(ok)[:length], jax.tree.map(lambda x: x[:width], scales)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positive": True},
        {"patience": 0},
        {"patience": 2, "limit": 10.0, "floor": 1e-3},
        {"patience": 1, "limit": 5.0, "floor": 0.0},
    ],
    ids=str,
)
def test_the_rule_is_that_of_a_slow_oracle(options):
    rng = np.random.default_rng(0)
    for scale in (1.0, 30.0):
        stream = np.exp(rng.normal(size=(200, 3)))
        stream[60:] *= np.exp(scale * rng.normal(size=3))  # another regime
        strange = [NAN, INF, -INF, 1e30, 1e10, -1.0, 0.0, 1e-9, -1e-3, 30.0]
        for place in rng.integers(0, 200, 60):
            stream[place, rng.integers(3)] *= rng.choice(strange)
        stream[150:170, 1] = 0.0
        with np.errstate(over="ignore"):
            stream = stream.astype(np.float32)
        sound = rng.uniform(size=200) > 0.05
        expected, means, streaks = oracle(stream, sound, **options)
        ok, scales = judged(stream, sound, **options)
        np.testing.assert_array_equal(ok, expected)
        np.testing.assert_allclose(scales.means, means, rtol=1e-4)
        np.testing.assert_array_equal(scales.streaks, streaks)
        assert 10 < ok.sum() < 190 or options.get("patience") == 0


def skips(losses, **options):
    """Places of the batches skipped, in a stream of one loss."""
    ok, _ = judged(np.array(losses, np.float32)[:, None], **options)
    return list(np.flatnonzero(~ok))


@pytest.mark.parametrize(
    ("losses", "options", "expected"),
    [
        ([1, 1, NAN, 1, INF, -INF], {}, [2, 4, 5]),
        ([1, 1, 1e30, 1, 1e10, 1001, 999], {}, [2, 4, 5]),
        ([1, 1, -1e10, -999, 1], {}, [2]),
        ([1, 1, -1, 0, 1e-9], {}, []),
        ([1, 1, -1, 0, 1e-9], {"positive": True}, [2, 3]),
        # The first batch has nothing to be compared with: an outlier gets in.
        ([1e10, 1, 1, 1e10], {"patience": 9}, []),
        # But the mean recovers after patience, and the next one is seen.
        ([1e10, *[1] * 5, 1e10], {"patience": 3}, [6]),
        # A new regime is accepted after patience, and is the usual one from then on.
        ([1, *[1e5] * 5, 1e9], {"patience": 3}, [1, 2, 3, 6]),
        # What is not finite is never accepted; it neither adds to patience nor ends it.
        ([1, *[NAN] * 5, 1], {"patience": 3}, [1, 2, 3, 4, 5]),
        ([1, 1e5, NAN, 1e5, 1e5], {"patience": 2}, [1, 2, 3]),
        ([1, *[-1] * 5, 1], {"patience": 3, "positive": True}, [1, 2, 3, 4, 5]),
        # One good batch in between, and patience starts anew.
        ([1, 1e5, 1e5, 1, 1e5, 1e5, 1e5], {"patience": 2}, [1, 2, 4, 5]),
        ([1, 1e5, 1e5], {"patience": 0}, []),
        # Zeros tell nothing: a hinge loss that is rarely not zero is learned from.
        ([0, 0, 0, 0.5, *[0] * 40, 0.7, 0, 300, 0, 1e6], {}, [48]),
        # Down at the floor, nothing is unusual.
        ([1e-12, 1e-8, 1e-15, 1e-4, 1e-12, 1.0], {}, [5]),
        ([1e-12, 1e-8], {"floor": 0.0}, [1]),
    ],
    ids=str,
)
def test_streams_made_by_hand(losses, options, expected):
    assert skips(losses, **options) == expected


def test_a_loss_that_converges_is_followed_down_and_never_skipped():
    losses = 10.0 ** -np.linspace(0, 12, 3000)
    assert skips(losses) == []
    # Faster than its mean can follow, which then starts anew.
    fast = [*10.0 ** -np.linspace(0, 12, 60), *[1e-12] * 20, 1.0]
    assert skips(fast) == [80]


def test_every_loss_has_a_scale_and_a_patience_of_its_own():
    stream = np.ones((12, 2)) * [1.0, 1e6]
    stream[1, 0] = 1e4  # 1e4 times the usual
    stream[2, 1] = 1e8  # 1e2 times the usual
    assert list(np.flatnonzero(~judged(stream)[0])) == [1]
    stream = np.ones((12, 2))
    stream[2:, 0] = 1e6  # a regime
    stream[6, 1] = 1e6  # an outlier just when patience with the other one ends
    ok, scales = judged(stream, patience=4)
    assert list(np.flatnonzero(~ok)) == [2, 3, 4, 5, 6]
    np.testing.assert_allclose(scales.means, [1e6, 1.0])


def test_spikes_below_the_limit_stretch_it():
    # 999 times the usual passes, and makes the mean of four batches 250 times as large.
    assert skips([1, 1, 1, 999, 1e5]) == []


# The optimizer.


def losses_of(w, x):
    return {"a": (w * x - 1.0) ** 2 + 0.1, "b": w**2 + 0.5, "c": (w - 3 * x) ** 2}


MU = yoto.init_loss_logits(losses_of(1.0, 1.0), "b")
PARAMS = {"w": jnp.float32(0.5), "mu": MU}
ROWS = {
    "adamw": lambda: yoto.adamw(0.02, hyperparameter_decay=lambda t: 1 / (1 + t)),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.sgd(0.02)),
}


def stepper(tx):
    """One compiled step on x times a fault in one of the losses."""

    @jax.jit
    def step(params, state, x, fault):
        def objective(params):
            losses = losses_of(params["w"], x)
            losses = {**losses, "c": fault * losses["c"]}
            return yoto.composite_loss(losses, params["mu"]), losses

        grads, losses = jax.grad(objective, has_aux=True)(params)
        if isinstance(tx, optax.GradientTransformationExtraArgs):
            updates, state = tx.update(grads, state, params, losses=losses)
        else:
            updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def train(xs, faults):
        carry = PARAMS, tx.init(PARAMS)
        for x, fault in zip(xs, faults, strict=True):
            carry = step(*carry, x, fault)
        return carry

    return train


X = np.linspace(0.5, 1.5, 12, dtype=np.float32)
ONES = np.ones(12, np.float32)
FAULTY = np.isin(np.arange(12), [3, 4, 7])


@pytest.mark.parametrize("make", ROWS.values(), ids=ROWS)
def test_faults_leave_what_a_run_without_these_batches_does(make):
    train = stepper(skip_outliers(make(), POSITIVE))
    params, state = train(X, ONES)
    got = unkeyed((params, state.inner))
    bare = unkeyed(stepper(make())(X, ONES))  # another program, rounded otherwise
    chex.assert_trees_all_close(got, bare, rtol=1e-5, atol=1e-6)
    assert int(state.num_skipped) == 0
    params, state = train(X[~FAULTY], ONES[~FAULTY])
    for fault in (NAN, INF, 1e30, 1e10, 1e4, -1.0, 0.0):
        faults = np.where(FAULTY, np.float32(fault), ONES)
        got, after = train(X, faults)
        expected = state._replace(num_skipped=jnp.int32(3), accepted=after.accepted)
        chex.assert_trees_all_equal(unkeyed((got, after)), unkeyed((params, expected)))


def test_on_good_batches_it_is_the_transformation_itself_bit_for_bit():
    plain = optax.sgd(0.1, momentum=0.9)
    tx = skip_outliers(plain, losses=2)
    w = jnp.linspace(-1, 1, 7)
    state, expected = tx.init(w), plain.init(w)
    for scale in (1.0, 3.0, 0.1):  # not compiled: operations are not merged
        grads = scale * w
        updates, state = tx.update(grads, state, w, losses=(scale, 1.0))
        bare, expected = plain.update(grads, expected, w)
        chex.assert_trees_all_equal((updates, state.inner), (bare, expected))


def test_it_waits_for_another_small_batch_if_outside_of_multi_steps():
    tx = skip_outliers(optax.MultiSteps(optax.sgd(1.0), 2), losses=1)
    update, state, path = jax.jit(tx.update), tx.init(np.float32(0)), []
    for gradient, loss in [(1.0, 1.0), (1e9, 1e9), (3.0, 1.0), (1.0, 1.0)]:
        updates, state = update(np.float32(gradient), state, losses=loss)
        path.append(float(updates))
    assert path == [0.0, 0.0, -2.0, 0.0]


def test_inside_of_multi_steps_it_sees_the_last_losses():
    tx = optax.MultiSteps(skip_outliers(optax.sgd(1.0), losses=1), 2)
    update, state, path = jax.jit(tx.update), tx.init(np.float32(0)), []
    for gradient, loss in [(1.0, 1.0), (3.0, 1.0), (NAN, NAN), (3.0, 1.0)]:
        updates, state = update(np.float32(gradient), state, losses=loss)
        path.append(float(updates))
    assert path == [0.0, -2.0, 0.0, 0.0]


def test_gradients_whose_squares_overflow_are_bad_whatever_the_losses():
    tx = skip_outliers(optax.adam(0.1), losses=2)
    params = {"w": jnp.ones(3), "b": jnp.ones((), jnp.bfloat16), "none": None}
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    update = jax.jit(tx.update)
    _, state = update(grads, state, params, losses=(1.0, 2.0))
    for bad in (NAN, INF, 1e20, -1e25):
        poisoned = grads | {"w": jnp.array([1.0, bad, 1.0])}
        updates, after = update(poisoned, state, params, losses=(1.0, 2.0))
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
        expected = state._replace(num_skipped=jnp.int32(1), accepted=jnp.asarray(False))
        chex.assert_trees_all_equal(after, expected)


TREES = {
    "plain": {"w": jnp.linspace(-1, 1, 3), "mu": MU},
    "none": {"w": jnp.ones(3), "activation": None, "deep": [{"mu": MU, "bias": None}]},
    "two": {"w": jnp.ones(()), "heads": (MU, MU)},
    "without": {"w": jnp.ones((2, 2)), "b": None},
}
FORMS = {
    "bare": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(10.0), tx),
    "masked": lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda _: True, p)),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
}
LOSSES = {"a": jnp.float32(1), "b": jnp.float32(2), "c": jnp.bfloat16(3)}


def types(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [
        (x.shape, x.dtype, getattr(x, "weak_type", None)) for x in leaves
    ]


def gradients(params):
    return jax.tree.map(lambda x: jnp.cos(x).astype(x.dtype), params)


@pytest.mark.filterwarnings("ignore:the parameters hold no LossLogits")
@pytest.mark.parametrize(
    ("form", "params"),
    [
        *itertools.product(["bare"], [TREES["none"], TREES["without"]]),
        *itertools.product(list(FORMS)[1:], [TREES["plain"]]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_every_form_keeps_types_and_traces_once(form, params):
    chex.clear_trace_counter()
    inner = yoto.adamw(0.02) if form == "bare" else optax.sgd(0.02, momentum=0.9)
    tx = FORMS[form](skip_outliers(inner, losses=LOSSES))

    @jax.jit
    @chex.assert_max_traces(1)
    def step(params, state, losses):
        updates, state = tx.update(gradients(params), state, params, losses=losses)
        return updates, state

    state = tx.init(params)
    for scale in (1.0, 1.0, 1e9, 1.0):
        losses = jax.tree.map(lambda x: (x * scale).astype(x.dtype), LOSSES)
        updates, new = step(params, state, losses)
        assert types(new) == types(state)
        assert types(updates)[0] == types(params)[0]
        chex.assert_trees_all_equal_dtypes(updates, params)
        state = new
    chex.assert_tree_all_finite(updates)
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)


@pytest.mark.filterwarnings("ignore:the loss logits are bfloat16")
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtypes_inside_cond(dtype):
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda x: x.astype(dtype), TREES["plain"])
        losses = jax.tree.map(lambda x: x.astype(dtype), LOSSES)
        tx = skip_outliers(yoto.adamw(0.02))
        state = tx.init(params)
        update = lambda p, s: tx.update(gradients(p), s, p, losses=losses)
        out = jax.jit(
            lambda p, s: jax.lax.cond(True, update, lambda p, s: (p, s), p, s)
        )(params, state)
        assert types(out) == types((params, state))


def test_vmap_scan_and_donation():
    tx = skip_outliers(yoto.adamw(0.02))

    def step(carry, losses):
        params, state = carry
        updates, state = tx.update(gradients(params), state, params, losses=losses)
        return (optax.apply_updates(params, updates), state), None

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train(params, state, bad):  # Batches of the usual losses, then a fault.
        losses = jax.tree.map(lambda x: x * jnp.stack([1.0, 1.0, bad]), LOSSES)
        return jax.lax.scan(step, (params, state), losses)[0]

    params = jax.tree.map(lambda x: np.stack([x, x]), TREES["two"])
    many = jax.jit(jax.vmap(train), donate_argnums=(0, 1))
    params, state = many(
        jax.device_put(params), jax.jit(jax.vmap(tx.init))(params), jnp.array([1, 1e9])
    )
    np.testing.assert_array_equal(state.num_skipped, [0, 1])
    for place, bad in enumerate((1.0, 1e9)):
        start = jax.tree.map(jnp.copy, TREES["two"])
        single, _ = train(start, tx.init(start), jnp.float32(bad))
        got = jax.tree.map(lambda x, place=place: x[place], params)
        chex.assert_trees_all_close(got, single, rtol=1e-6)


def test_integer_parameters_and_their_gradients():
    tx = skip_outliers(optax.identity(), losses=1)
    params = {"w": jnp.ones(2), "table": jnp.arange(3)}
    loss = lambda p: jnp.sum(p["w"] ** 2)
    grads = jax.grad(loss, allow_int=True)(params)
    update = jax.jit(lambda s, value: tx.update(grads, s, params, losses=value))
    for value in (1.0, NAN):
        updates, _ = update(tx.init(params), jnp.float32(value))
        assert updates["table"].dtype == jax.dtypes.float0
        expected = 2.0 if value == 1.0 else 0.0
        np.testing.assert_array_equal(updates["w"], [expected, expected])


def test_around_aggregate_it_keeps_the_weights_too():
    weighting = weightings.famo()
    like = {"fit": 0.0, "size": 0.0}
    chain = optax.chain(yoto.aggregate(weighting, like), optax.adam(0.1))
    tx = skip_outliers(chain, losses=like)
    loss_fn = lambda w, f: {"fit": f * jnp.sum((w - 1) ** 2), "size": jnp.sum(w**2)}
    w = jnp.array([0.5, -1.0])
    state = tx.init(w)

    @jax.jit
    def step(w, state, fault):
        losses, jacobian = yoto.value_and_jacobian(loss_fn)(w, fault)
        updates, state = tx.update(jacobian, state, w, losses=losses)
        return w + updates, state

    w, state = step(w, state, 1.0)
    again, after = step(w, state, 1e10)
    np.testing.assert_array_equal(again, w)
    chex.assert_trees_all_equal(after.inner, state.inner)


def test_in_an_nnx_optimizer():
    layer = yoto_nnx.CompositeLoss({"a": 0.0, "b": 0.0}, "a")
    tx = skip_outliers(yoto.adamw(0.1))
    optimizer = nnx.Optimizer(layer, tx, wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer, scale):
        losses = {"a": scale, "b": 2.0 * scale}
        grads = nnx.grad(lambda layer: layer(losses))(layer)
        optimizer.update(layer, grads, losses=losses)

    seen = []
    for scale in (1.0, 1.0, 1e10):
        step(layer, optimizer, jnp.float32(scale))
        seen.append(float(layer.loss_weights["b"]))
    assert seen[0] != seen[1] == seen[2]


def test_it_is_found_in_a_chain_and_takes_what_it_does_not_know():
    tx = optax.chain(optax.identity(), skip_outliers(optax.sgd(1.0), losses=1))
    one = np.float32(1)
    _, state = jax.jit(tx.update)(one, tx.init(one), one, losses=NAN, value=3.0)
    assert int(optax.tree.get(state, "num_skipped")) == 1
    inner = skip_outliers(optax.sgd(1.0))
    assert isinstance(inner, optax.GradientTransformationExtraArgs)
    names = list(inspect.signature(inner.update).parameters)
    assert names[:3] == ["updates", "state", "params"]


def test_a_checkpoint_continues_bit_for_bit(tmp_path):
    tx = skip_outliers(yoto.adamw(0.02))
    weighting = skip_in_weighting(weightings.relobralo())

    @jax.jit
    def step(params, state, weights, scale):
        losses = jax.tree.map(lambda x: x * scale.astype(x.dtype), LOSSES)
        updates, state = tx.update(gradients(params), state, params, losses=losses)
        _, weights = weighting.update(losses, weights)
        return optax.apply_updates(params, updates), state, weights

    carry = PARAMS, tx.init(PARAMS), weighting.init(LOSSES)
    for scale in (1.0, 1.0, 1e10, 1e10):
        carry = step(*carry, jnp.float32(scale))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", carry)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "run", jax.eval_shape(lambda: carry))
    assert jax.tree.structure(restored) == jax.tree.structure(carry)
    for scale in (1e10, 1.0):
        carry = step(*carry, jnp.float32(scale))
        restored = step(*restored, jnp.float32(scale))
    chex.assert_trees_all_equal(unkeyed(restored), unkeyed(carry))
    assert int(carry[1].num_skipped) == 3


def unkeyed(tree):
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
@pytest.mark.parametrize("way", ["pmap", "shard_map", "explicit"])
def test_all_devices_decide_alike(way):
    tx = skip_outliers(yoto.adamw(0.02))
    batches = np.ones((3, 8), np.float32)
    batches[1, 5] = 1e6  # one device sees a fault

    def train(params, batches, axis=None):
        def step(carry, x):
            params, state = carry
            losses = jax.tree.map(jnp.mean, losses_of(params["w"], x))
            grads = gradients(params)
            if axis is not None:
                losses, grads = jax.lax.pmean((losses, grads), axis)
            updates, state = tx.update(grads, state, params, losses=losses)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), batches)[0]

    expected = jax.jit(train)(PARAMS, batches)
    assert int(expected[1].num_skipped) == 1
    local = functools.partial(train, axis="d")
    if way == "pmap":
        many = jax.pmap(local, axis_name="d", in_axes=(None, 1))
        every = jax.device_get(many(PARAMS, batches[:, :, None]))
        for place in (0, 5):
            got = jax.tree.map(lambda x, place=place: x[place], every)
            chex.assert_trees_all_close(got, expected, rtol=1e-5)
        return
    kinds = jax.sharding.AxisType
    kind = kinds.Explicit if way == "explicit" else kinds.Auto
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    spread = jax.P(None, "d")
    if way == "shard_map":
        specs = {"in_specs": (jax.P(), spread), "out_specs": jax.P()}
        got = jax.jit(jax.shard_map(local, mesh=mesh, **specs))(PARAMS, batches)
    else:
        with jax.set_mesh(mesh):
            got = jax.jit(train)(PARAMS, jax.device_put(batches, spread))
    chex.assert_trees_all_close(got, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tx: tx.update({}, tx.init({}), {}), "needs the losses"),
        (lambda tx: tx.update({}, tx.init({}), {}, losses=(1.0,)), "number of losses"),
    ],
)
def test_what_is_missing_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(skip_outliers(optax.sgd(1.0)))


def test_other_losses_are_refused():
    tx = skip_outliers(optax.sgd(1.0))
    with pytest.raises(ValueError, match="missing: 'b'"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, losses={"a": 1.0, "c": 1.0})
    tx = skip_outliers(optax.sgd(1.0), losses=2)
    with pytest.raises(ValueError, match="made for 2 losses, got 3"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, losses=LOSSES)
    other = yoto.init_loss_logits((0.0, 0.0), 0)
    with pytest.raises(ValueError, match="2 sets of losses"):
        skip_outliers(optax.sgd(1.0)).init({"one": MU, "other": other})
    skip_outliers(optax.sgd(1.0), losses=3).init({"one": MU, "other": other})
    state = skip_outliers(optax.sgd(1.0), losses=np.int64(3)).init(PARAMS)
    assert state.loss_scales.means.shape == (3,)
    for number in (0, -1, True):
        with pytest.raises(ValueError, match=f"number, which is positive.*{number}"):
            skip_outliers(optax.sgd(1.0), losses=number)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 1.0}, "limit must be larger than 1"),
        ({"patience": -1}, "patience must not be negative"),
        ({"floor": -1.0}, "floor must not be negative"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        OutlierRule(**options)


@pytest.mark.parametrize(
    ("wrap", "wrapped"),
    [(skip_outliers, optax.sgd(1.0)), (skip_in_weighting, weightings.equal())],
)
def test_a_bare_limit_is_no_rule(wrap, wrapped):
    with pytest.raises(TypeError, match="rule must be an OutlierRule.*got 100"):
        wrap(wrapped, 100.0)


# The weighting.

WEIGHTINGS = {
    "relobralo": weightings.relobralo,
    "yoto": lambda: weightings.yoto("a"),
    "wrapped": lambda: weightings.normalize(
        weightings.smooth(weightings.every(weightings.dwa(), 2))
    ),
}


def weigher(weighting):
    def loss_fn(w, x, fault):
        losses = losses_of(w[0], x)
        return {**losses, "c": fault * losses["c"] * (1 + w[1] ** 2)}

    step = jax.jit(yoto.value_and_grad(loss_fn, weighting))
    w = np.array([0.5, 0.1], np.float32)

    def train(xs, faults):
        state = weighting.init(losses_of(1.0, 1.0))
        for x, fault in zip(xs, faults, strict=True):
            _, _, state = step(w * x, state, x, fault)
        return state

    return train


@pytest.mark.parametrize("make", WEIGHTINGS.values(), ids=WEIGHTINGS)
def test_a_weighting_learns_as_if_bad_batches_had_never_come(make):
    train = weigher(skip_in_weighting(make(), POSITIVE))
    clean = unkeyed(train(X, ONES).inner)
    bare = unkeyed(weigher(make())(X, ONES))
    chex.assert_trees_all_close(clean, bare, rtol=1e-5, atol=1e-6)
    expected = train(X[~FAULTY], ONES[~FAULTY])
    assert count_skipped(expected) == 0
    expected = unkeyed(expected._replace(num_skipped=jnp.int32(3)))
    for fault in (NAN, INF, 1e30, 1e10, -1.0, 0.0):
        faults = np.where(FAULTY, np.float32(fault), ONES)
        chex.assert_trees_all_equal(unkeyed(train(X, faults)), expected)


def test_a_weighting_is_held_outside_jit_without_a_complaint():
    weighting = skip_in_weighting(weightings.scale_invariant(), POSITIVE)
    state = weighting.init({"a": 1.0})
    weights, state = weighting.update({"a": 0.5}, state)
    for bad in (NAN, -1.0, 0.0, 1e9):
        held, state = weighting.update({"a": bad}, state)
        assert float(held["a"]) == float(weights["a"]) == 2.0
    assert (state.num_skipped, state.inner.num_skipped) == (4, 0)
    assert types(state) == types(weighting.init({"a": jnp.float32(1)}))


def inverse_squares():
    def update(losses, inner, spec, *, gramian):
        return 1 / jnp.diagonal(gramian), inner

    return make_weighting(lambda spec: (), update, needs=("gramian",))


def test_statistics_that_are_not_finite_make_a_batch_bad():
    weighting = skip_in_weighting(inverse_squares())
    update = jax.jit(weighting.update)
    state, losses = weighting.init((1.0, 1.0)), (np.float32(1), np.float32(1))
    gramian = np.diag(np.array([1, 2], np.float32))
    _, state = update(losses, state, gramian=gramian)
    _, after = update(losses, state, gramian=np.where(gramian == 2, INF, gramian))
    chex.assert_trees_all_equal(after.loss_scales, state.loss_scales)
    assert (after.num_skipped, after.inner.num_skipped) == (1, 0)
    assert not after.accepted
    assert weighting.needs == ("losses", "gramian")


def test_due_reaches_through():
    weighting = skip_in_weighting(weightings.every(inverse_squares(), 2))
    state, update = weighting.init((1.0, 1.0)), jax.jit(weighting.update)
    due = []
    for loss in (1.0, 1e9, 1.0, 1.0):
        due.append(bool(weighting.due(state)))
        _, state = update((loss, 1.0), state, gramian=np.eye(2, dtype=np.float32))
    # The second batch was skipped, and its step comes again.
    assert due == [True, False, False, True]
    assert skip_in_weighting(inverse_squares()).due is None


def test_what_is_observed_of_a_bad_batch_is_not_learned():
    def observe(inner, spec, *, cotangent_norm, gradient_norm):
        return inner + cotangent_norm / gradient_norm

    weighting = make_weighting(
        lambda spec: jnp.zeros((), spec.dtype),
        lambda losses, inner, spec: (losses, inner),
        observe=observe,
    )
    weighting = skip_in_weighting(weighting)
    update = jax.jit(weighting.update)
    observe = lambda state: weighting.observe(
        state, cotangent_norm=2.0, gradient_norm=1.0
    )
    _, state = update(LOSSES, weighting.init(LOSSES))
    assert float(observe(state).inner.inner) == 2.0
    bad = LOSSES | {"a": jnp.float32(1e10)}
    _, state = update(bad, state)
    assert float(observe(state).inner.inner) == 0.0

    exact = skip_in_weighting(weightings.famo(exact=True))
    exact = exact._replace(
        update=jax.jit(exact.update), observe_step=jax.jit(exact.observe_step)
    )
    _, state = exact.update(LOSSES, exact.init(LOSSES))
    for after in (bad, LOSSES | {"b": jnp.float32(NAN)}):
        chex.assert_trees_all_equal(exact.observe_step(after, state), state)
    better = exact.observe_step(LOSSES | {"a": jnp.float32(0.5)}, state)
    assert jnp.any(better.inner.inner.task_logits)
    _, held = exact.update(bad, better)
    chex.assert_trees_all_equal(exact.observe_step(LOSSES, held), held)


def test_a_weighting_without_counters_is_held_too():
    weighting = skip_in_weighting(
        LossWeighting(
            init=lambda losses: {"loss_weights": jax.tree.map(jnp.ones_like, losses)},
            update=lambda losses, state: (losses, {"loss_weights": losses}),
        )
    )
    state = weighting.init({"a": jnp.float32(1)})
    for loss, expected in ((2.0, 2.0), (1e9, 2.0), (3.0, 3.0)):
        weights, state = weighting.update({"a": jnp.float32(loss)}, state)
        assert float(weights["a"]) == expected
    assert state.num_skipped == 1


def test_both_wrappers_skip_the_same_batches():
    weighting = skip_in_weighting(weightings.famo())
    tx = skip_outliers(optax.sgd(0.1), losses=2)
    rng = np.random.default_rng(1)
    stream = np.exp(2 * rng.normal(size=(60, 2))).astype(np.float32)
    stream[rng.integers(0, 60, 9), 0] *= 1e6

    def step(carry, losses):
        state, opt_state = carry
        losses = tuple(losses)
        _, state = weighting.update(losses, state)
        updates, opt_state = tx.update(jnp.float32(1), opt_state, losses=losses)
        return (state, opt_state), (state.accepted, updates != 0)

    start = weighting.init((1.0, 1.0)), tx.init(jnp.float32(0))
    (state, opt_state), (ok, stepped) = jax.lax.scan(step, start, jnp.asarray(stream))
    np.testing.assert_array_equal(ok, stepped)
    chex.assert_trees_all_equal(state.loss_scales, opt_state.loss_scales)
    assert 5 <= int(opt_state.num_skipped) == int(state.num_skipped) <= 9
    assert state.inner.num_skipped == 0


def test_a_loss_of_zero_does_not_end_a_streak():
    """A hinge loss that is 0 now and then, and for good a thousand times larger."""
    weighting = skip_in_weighting(weightings.equal(), OutlierRule(10.0, patience=3))
    state = weighting.init({"a": 0.0})
    skipped = []
    for loss in (1.0, 1.0, 50.0, 0.0, 50.0, 0.0, 50.0, 0.0, 50.0, 50.0):
        _, state = weighting.update({"a": loss}, state)
        skipped.append(not bool(state.accepted))
    assert skipped == [
        False,
        False,
        True,
        False,
        True,
        False,
        True,
        False,
        False,
        False,
    ]


def test_the_state_knows_its_losses():
    losses = {"a": jnp.float32(1.0), "b": jnp.float32(1e6)}
    tx = skip_outliers(optax.sgd(1.0), losses=losses)
    state = tx.init(PARAMS)
    other = skip_outliers(optax.sgd(1.0), losses={"b": 0.0, "c": 0.0})
    with pytest.raises(ValueError, match="that of the losses 'a', 'b', got 'b', 'c'"):
        other.update(PARAMS, state, PARAMS, losses={"b": 1e6, "c": 1.0})
    assert jax.tree.structure(state) != jax.tree.structure(other.init(PARAMS))
    counted = skip_outliers(optax.sgd(1.0), losses=2)  # Of these, no name is known.
    counted.update(PARAMS, counted.init(PARAMS), PARAMS, losses=losses)


@pytest.mark.parametrize("losses", [None, {"a": 0.0, "b": 0.0}, 2])
def test_optax_maps_over_what_is_like_the_parameters(losses):
    tx = skip_outliers(yoto.adamw(1e-2), losses=losses)
    state = tx.init(PARAMS)
    mapped = optax.tree.map_params(tx, lambda x, like: x + like, state, PARAMS)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    (adam,) = (s for s in mapped.inner if isinstance(s, optax.ScaleByAdamState))
    chex.assert_trees_all_equal(adam.mu, PARAMS)
