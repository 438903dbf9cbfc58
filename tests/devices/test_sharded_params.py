"""Parameters spread over devices: a norm or a Gramian is a sum over their parts."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import yoto_jax as yoto
from yoto_jax import weightings

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices"),
    pytest.mark.usefixtures("quick_compilation"),
]

PARAMS = {
    "w1": jax.random.normal(jax.random.key(0), (8, 16)) / 3,
    "w2": jax.random.normal(jax.random.key(1), (16, 8)) / 3,
    "b": jnp.linspace(-1.0, 1.0, 3),
}
BATCHES = jax.random.normal(jax.random.key(2), (2, 16, 8))
WHOLE = lambda w: w
NAMES = ("a", "b", "c")


def encoder(params, x, gather=WHOLE):
    return jnp.tanh(x @ gather(params["w1"]))


def heads(params, z, x, gather=WHOLE, total=WHOLE):
    del x
    y = total(z @ gather(params["w2"]))
    return {
        "a": jnp.mean((y - 1.0) ** 2),
        "b": jnp.mean(jnp.abs(y)) * params["b"][0] ** 2,
        "c": jnp.mean(jnp.sin(y + params["b"][1])),
    }


def loss_fn(params, x, gather=WHOLE, total=WHOLE):
    return heads(params, encoder(params, x, gather), x, gather, total)


WEIGHTINGS = {
    "famo": weightings.famo(),  # losses alone
    "gradnorm": weightings.gradnorm(),  # norms
    "lr_annealing": weightings.lr_annealing("a"),  # largest and mean entries
    "inverse_dirichlet": weightings.inverse_dirichlet(),  # deviations of entries
    "upgrad": weightings.upgrad(),  # Gramian
    "grap": weightings.grap("c"),
}


@functools.cache
def reference(name, by_encoder):
    step = make(WEIGHTINGS[name], by_encoder)
    return run(jax.jit(step), PARAMS, WEIGHTINGS[name].init(dict.fromkeys(NAMES, 0.0)))


def make(weighting, by_encoder, gather=WHOLE, total=WHOLE, **options):
    if by_encoder:
        return yoto.value_and_grad(
            functools.partial(heads, gather=gather, total=total),
            weighting,
            gradients=yoto.of_representation(functools.partial(encoder, gather=gather)),
            **options,
        )
    f = functools.partial(loss_fn, gather=gather, total=total)
    return yoto.value_and_grad(f, weighting, **options)


def run(step, params, state, put=WHOLE):
    """Some steps of gradient descent; whole arrays, as NumPy has them."""
    seen = []
    for x in BATCHES:
        losses, grads, state = step(params, state, put(x))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        weights = optax.tree.get(state, "loss_weights")
        seen.append(jax.device_get((losses, grads, weights)))
    return seen, jax.device_get(params)


def mesh_of(shape, names, axis_type="Auto"):
    kind = getattr(jax.sharding.AxisType, axis_type)
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def put_on(mesh, tree, specs):
    place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
    return jax.tree.map(place, tree, specs)


def check(name, by_encoder, mesh, specs, batch_spec, checked, step):
    replicated = jax.P()
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(specs, replicated, batch_spec),
        out_specs=(replicated, specs, replicated),
        check_vma=checked,
    )
    state = WEIGHTINGS[name].init(dict.fromkeys(NAMES, 0.0))
    put = lambda x: jax.device_put(x, jax.NamedSharding(mesh, batch_spec))
    params = put_on(mesh, PARAMS, specs)
    found = run(jax.jit(mapped), params, state, put)
    expected = reference(name, by_encoder)
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=1e-6)


def cases(*names):
    chosen = [tuple(name.split(", ")) for name in names]
    chosen = [(name, bool(rest)) for name, *rest in chosen]
    return pytest.mark.parametrize(("name", "by_encoder"), chosen)


@cases("lr_annealing", "inverse_dirichlet", "upgrad", "grap, encoder")
def test_every_device_holds_a_part_and_gathers_the_whole(name, by_encoder):
    """As in fully sharded data parallelism, on the axis of the batch itself."""
    mesh = mesh_of((8,), ("d",))
    specs = {"w1": jax.P("d"), "w2": jax.P(None, "d"), "b": jax.P()}

    def gather(w):  # Each has an eighth of an axis that had 8 or 16 entries.
        return lax.all_gather(w, "d", axis=int(w.shape[0] == 16), tiled=True)

    options = {"axis_name": "d", "param_specs": specs}
    step = make(WEIGHTINGS[name], by_encoder, gather, **options)
    check(name, by_encoder, mesh, specs, jax.P("d"), True, step)


def test_gathering_without_the_check_of_varying_axes():
    mesh = mesh_of((8,), ("d",))
    specs = {"w1": jax.P("d"), "w2": jax.P(None, "d"), "b": jax.P()}

    def gather(w):
        return lax.all_gather(w, "d", axis=int(w.shape[0] == 16), tiled=True)

    options = {"axis_name": "d", "param_specs": specs}
    step = make(WEIGHTINGS["upgrad"], False, gather, **options)
    check("upgrad", False, mesh, specs, jax.P("d"), False, step)


@cases("famo", "gradnorm", "grap", "upgrad, encoder")
def test_layers_cut_up_over_a_second_axis(name, by_encoder):
    """Tensor parallelism: columns of one layer, rows of the next, and their sum."""
    mesh = mesh_of((2, 4), ("d", "m"))
    specs = {"w1": jax.P(None, "m"), "w2": jax.P("m", None), "b": jax.P()}
    total = lambda y: lax.psum(y, "m")
    options = {"axis_name": "d", "param_specs": specs}
    step = make(WEIGHTINGS[name], by_encoder, total=total, **options)
    check(name, by_encoder, mesh, specs, jax.P("d"), True, step)


@cases("gradnorm, encoder", "lr_annealing, encoder", "upgrad")
def test_layers_cut_up_where_every_device_has_the_whole_batch(name, by_encoder):
    mesh = mesh_of((8,), ("m",))
    specs = {"w1": jax.P(None, "m"), "w2": jax.P("m", None), "b": jax.P()}
    total = lambda y: lax.psum(y, "m")
    step = make(WEIGHTINGS[name], by_encoder, total=total, param_specs=specs)
    check(name, by_encoder, mesh, specs, jax.P(), True, step)


@cases("gradnorm, encoder", "inverse_dirichlet, encoder", "upgrad")
def test_runs_side_by_side_whose_layers_are_cut_up(name, by_encoder):
    """An axis of runs is none of the representation: each is as if it were alone."""
    mesh = mesh_of((2, 4), ("runs", "m"))
    specs = {"w1": jax.P(None, "m"), "w2": jax.P("m", None), "b": jax.P()}
    weighting = WEIGHTINGS[name]
    total = lambda y: lax.psum(y, "m")
    step = make(weighting, by_encoder, total=total, param_specs=specs)

    def run_of_device(params, state, x):
        out = step(*jax.tree.map(lambda leaf: leaf[0], (params, state)), x)
        return jax.tree.map(lambda leaf: leaf[None], out)

    def of_runs(tree):
        return jax.tree.map(lambda spec: jax.P("runs", *spec), tree)

    runs = [PARAMS, jax.tree.map(lambda w: -2.0 * w, PARAMS)]
    state = weighting.init(dict.fromkeys(NAMES, 0.0))
    stack = lambda *leaves: jnp.stack(leaves)
    side_by_side = jax.jit(
        jax.shard_map(
            run_of_device,
            mesh=mesh,
            in_specs=(of_runs(specs), jax.P("runs"), jax.P()),
            out_specs=(jax.P("runs"), of_runs(specs), jax.P("runs")),
        )
    )
    params = put_on(mesh, jax.tree.map(stack, *runs), of_runs(specs))
    found = side_by_side(params, jax.tree.map(stack, state, state), BATCHES[0])
    alone = jax.jit(make(weighting, by_encoder))
    expected = [alone(params, state, BATCHES[0]) for params in runs]
    expected = jax.device_get(jax.tree.map(stack, *expected))
    chex.assert_trees_all_close(jax.device_get(found), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("gradnorm", yoto.of_parameters(keep=False, chunk_size=1)),
        ("upgrad", yoto.of_parameters(keep=False)),
    ],
)
def test_parts_of_gradients_that_are_not_kept(name, source):
    mesh = mesh_of((2, 4), ("d", "m"))
    specs = {"w1": jax.P(None, "m"), "w2": jax.P("m", None), "b": jax.P()}
    total = lambda y: lax.psum(y, "m")
    options = {"axis_name": "d", "param_specs": specs, "gradients": source}
    step = make(WEIGHTINGS[name], False, total=total, **options)
    check(name, False, mesh, specs, jax.P("d"), True, step)


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
@cases("upgrad", "grap, encoder")
def test_jit_with_sharded_parameters(name, by_encoder, axis_type):
    mesh = mesh_of((2, 4), ("d", "m"), axis_type)
    specs = {"w1": jax.P(None, "m"), "w2": jax.P("m", None), "b": jax.P()}
    explicit = axis_type == "Explicit"

    def total(y):  # With explicit sharding, a sum over parts has to be asked for.
        return jax.sharding.reshard(y, jax.P("d")) if explicit else y

    def contract(z, w):
        return jnp.matmul(z, w, out_sharding=jax.P("d")) if explicit else z @ w

    def heads_on_mesh(params, z, x):
        y = contract(z, params["w2"])
        return heads({"w2": jnp.eye(8), "b": params["b"]}, y, x)

    if by_encoder:
        of_z = yoto.of_representation(encoder)
        step = yoto.value_and_grad(heads_on_mesh, WEIGHTINGS[name], gradients=of_z)
    else:
        whole = lambda params, x: heads_on_mesh(params, encoder(params, x), x)
        step = yoto.value_and_grad(whole, WEIGHTINGS[name])
    with jax.set_mesh(mesh):
        params = put_on(mesh, PARAMS, specs)
        put = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P("d")))
        state = WEIGHTINGS[name].init(dict.fromkeys(NAMES, 0.0))
        found = run(jax.jit(step), params, state, put)
    expected = reference(name, by_encoder)
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=1e-6)


def test_stacked_gradients_in_parts():
    mesh = mesh_of((8,), ("d",))
    specs = {"w1": jax.P("d"), "w2": jax.P(None, "d"), "b": jax.P()}
    upgrad = weightings.upgrad()
    losses, jacobian = yoto.value_and_jacobian(loss_fn)(PARAMS, BATCHES[0])
    whole = yoto.aggregate(upgrad, losses)
    expected, _ = whole.update(jacobian, whole.init(PARAMS), losses=losses)

    def step(params, x):
        gather = lambda w: lax.all_gather(
            w, "d", axis=int(w.shape[0] == 16), tiled=True
        )
        f = functools.partial(loss_fn, gather=gather)
        compute = yoto.value_and_jacobian(f, axis_name="d", param_specs=specs)
        losses, jacobian = compute(params, x)
        tx = yoto.aggregate(upgrad, losses, param_specs=specs)
        return tx.update(jacobian, tx.init(params), losses=losses)[0]

    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(specs, jax.P("d")), out_specs=specs
    )
    found = jax.jit(mapped)(PARAMS, BATCHES[0])
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        ({"w1": jax.P()}, ValueError, "param_specs must be a tree of PartitionSpec"),
        ({"w1": "d", "w2": jax.P(), "b": jax.P()}, TypeError, "got a str in it"),
        (jax.P("typo"), ValueError, "param_specs: 'typo' is no axis of a pmap or sh"),
    ],
)
def test_specs_that_do_not_fit(specs, error, message):
    step = yoto.value_and_grad(loss_fn, weightings.upgrad(), param_specs=specs)
    state = weightings.upgrad().init(dict.fromkeys(NAMES, 0.0))
    with pytest.raises(error, match=message):
        step(PARAMS, state, BATCHES[0])


def test_one_spec_for_all():
    step = yoto.value_and_grad(loss_fn, weightings.upgrad(), param_specs=jax.P())
    state = weightings.upgrad().init(dict.fromkeys(NAMES, 0.0))
    out = step(PARAMS, state, BATCHES[0])
    plain = yoto.value_and_grad(loss_fn, weightings.upgrad())
    chex.assert_trees_all_equal(out, plain(PARAMS, state, BATCHES[0]))
    assert np.isfinite(out[0]["a"])


FSDP = {"w1": jax.P("d"), "w2": jax.P(None, "d"), "b": jax.P()}


def gather_over_d(w):
    return lax.all_gather(w, "d", axis=int(w.shape[0] == 16), tiled=True)


OPTIONS = {
    "select": {
        "gradients": yoto.of_parameters(select=lambda p: (p["w2"], p["w1"])),
    },
    "unweighted": {
        "gradients": yoto.of_parameters(unweighted=lambda p: (p["w2"], p["b"])),
    },
    "aligned": {"steering": yoto.on_validation()},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_engine_see_all_parts(option):
    weighting = weightings.grap("c") if option == "aligned" else weightings.upgrad()
    given = OPTIONS[option]
    state = weighting.init(dict.fromkeys(NAMES, 0.0))
    call = lambda f: (
        (lambda p, s, x, v: f(p, s, (v,), x))
        if option == "aligned"
        else (lambda p, s, x, v: f(p, s, x))
    )
    whole = call(yoto.value_and_grad(loss_fn, weighting, **given))
    expected = jax.jit(whole)(PARAMS, state, BATCHES[0], BATCHES[1])
    f = functools.partial(loss_fn, gather=gather_over_d)
    step = yoto.value_and_grad(f, weighting, axis_name="d", param_specs=FSDP, **given)
    mapped = jax.shard_map(
        call(step),
        mesh=mesh_of((8,), ("d",)),
        in_specs=(FSDP, jax.P(), jax.P("d"), jax.P("d")),
        out_specs=(jax.P(), FSDP, jax.P()),
    )
    found = jax.jit(mapped)(PARAMS, state, BATCHES[0], BATCHES[1])
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=1e-6)


def averaged(params, x):
    """Losses that come out the same on all devices."""
    return {
        "fit": lax.pmean(jnp.mean((x @ params["w1"] - 1.0) ** 2), "d"),
        "size": lax.psum(jnp.sum(params["w1"] ** 2), "d") / 8,
        "far": jnp.mean(jnp.abs(x @ params["w1"])),
    }


def plain(params, x):
    return {
        "fit": jnp.mean((x @ params["w1"] - 1.0) ** 2),
        "size": jnp.sum(params["w1"] ** 2),
        "far": jnp.mean(jnp.abs(x @ params["w1"])),
    }


@pytest.mark.parametrize("checked", [True, False])
def test_losses_that_are_averaged_already(checked):
    mesh, params = mesh_of((8,), ("d",)), {"w1": PARAMS["w1"]}
    upgrad = weightings.upgrad()
    state = upgrad.init(dict.fromkeys(("fit", "size", "far"), 0.0))
    expected = yoto.value_and_grad(plain, upgrad)(params, state, BATCHES[0])
    mapped = jax.shard_map(
        yoto.value_and_grad(averaged, upgrad, axis_name="d"),
        mesh=mesh,
        in_specs=(jax.P(), jax.P(), jax.P("d")),
        out_specs=jax.P(),
        check_vma=checked,
    )
    found = jax.jit(mapped)(params, state, BATCHES[0])
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=1e-6)


def test_a_loss_of_parts_that_are_summed_up():
    """As the size of all parameters is, when each device has some of them."""

    def in_parts(params, x):
        w = lax.all_gather(params["w1"], "d", tiled=True)
        size = lax.psum(jnp.sum(params["w1"] ** 2), "d")
        return plain({"w1": w}, x) | {"size": size}

    params, specs = {"w1": PARAMS["w1"]}, {"w1": jax.P("d")}
    expected = yoto.value_and_jacobian(plain)(params, BATCHES[0])
    mapped = jax.shard_map(
        yoto.value_and_jacobian(in_parts, axis_name="d", param_specs=specs),
        mesh=mesh_of((8,), ("d",)),
        in_specs=(specs, jax.P("d")),
        out_specs=(jax.P(), {"w1": jax.P(None, "d")}),
    )
    found = jax.jit(mapped)(params, BATCHES[0])
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=1e-6)


def test_statistics_of_the_caller_are_those_of_each_device():
    def squared(params, x):
        slope = jax.grad(lambda w: jnp.mean((x @ w) ** 2))(params["w1"])
        return jnp.stack([jnp.sum(jnp.abs(slope)), 1.0, 2.0])

    def on(x, **options):
        step = yoto.value_and_grad(
            plain, weightings.ntk(), statistics={"ntk_diagonal": squared}, **options
        )
        state = weightings.ntk().init(dict.fromkeys(("fit", "size", "far"), 0.0))
        return step({"w1": PARAMS["w1"]}, state, x)

    same = jnp.tile(BATCHES[0][:2], (8, 1))  # every device sees what one would
    mapped = jax.shard_map(
        functools.partial(on, axis_name="d"),
        mesh=mesh_of((8,), ("d",)),
        in_specs=jax.P("d"),
        out_specs=jax.P(),
    )
    chex.assert_trees_all_close(jax.jit(mapped)(same), on(same[:2]), rtol=2e-5)


def test_a_representation_that_the_encoder_averages():
    def pooled(params, x, mean=WHOLE):
        return {"each": x @ params["w1"], "all": mean(jnp.mean(x @ params["w1"], 0))}

    def of_z(params, z, x):
        del params, x
        return {"a": jnp.mean(z["each"] ** 2), "b": jnp.mean((z["all"] - 1.0) ** 2)}

    params, mgda = {"w1": PARAMS["w1"]}, weightings.mgda()
    state = mgda.init({"a": 0.0, "b": 0.0})
    alone = yoto.value_and_grad(of_z, mgda, gradients=yoto.of_representation(pooled))
    expected = alone(params, state, BATCHES[0])
    mean = functools.partial(pooled, mean=lambda x: lax.pmean(x, "d"))
    mapped = jax.shard_map(
        yoto.value_and_grad(
            of_z, mgda, gradients=yoto.of_representation(mean), axis_name="d"
        ),
        mesh=mesh_of((8,), ("d",)),
        in_specs=(jax.P(), jax.P(), jax.P("d")),
        out_specs=jax.P(),
    )
    found = jax.jit(mapped)(params, state, BATCHES[0])
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=1e-6)


def test_what_would_be_wrong_in_silence_is_an_error():
    mesh = mesh_of((2, 4), ("d", "m"))
    state = WEIGHTINGS["upgrad"].init(dict.fromkeys(NAMES, 0.0))

    def attempt(gather, specs, given, checked):
        step = make(WEIGHTINGS["upgrad"], False, gather, axis_name="d", **given)
        mapped = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(specs, jax.P(), jax.P("d")),
            out_specs=(jax.P(), specs, jax.P()),
            check_vma=checked,
        )
        jax.jit(mapped).lower(PARAMS, state, BATCHES[0])

    parts = {"w1": jax.P("d"), "w2": jax.P(), "b": jax.P()}
    with pytest.raises(ValueError, match="parameter 'w1' may differ between the"):
        attempt(gather_over_d, parts, {}, True)
    columns = {"w1": jax.P(None, "m"), "w2": jax.P("m"), "b": jax.P()}
    with pytest.raises(ValueError, match="needs shard_map with check_vma=True"):
        attempt(WHOLE, columns, {"param_specs": columns}, False)


def test_means_of_losses_are_taken_in_float32():
    """A float32 loss beside one in bfloat16, which comes first."""

    def two(params, x):
        mean = jnp.mean(x) * params["w1"][0, 0]
        return {"a": mean.astype(jnp.bfloat16), "b": mean}

    equal = weightings.equal()
    mapped = jax.shard_map(
        yoto.value_and_grad(two, equal, axis_name="d"),
        mesh=mesh_of((8,), ("d",)),
        in_specs=(jax.P(), jax.P(), jax.P("d")),
        out_specs=jax.P(),
    )
    state = equal.init({"a": jnp.zeros((), jnp.bfloat16), "b": 0.0})
    losses, *_ = jax.jit(mapped)(PARAMS, state, BATCHES[0])
    expected = two(PARAMS, BATCHES[0])
    assert losses["a"].dtype == jnp.bfloat16
    np.testing.assert_allclose(losses["b"], expected["b"], rtol=1e-6)
