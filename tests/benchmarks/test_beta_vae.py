"""The beta-VAE benchmark: an oracle, the losses, fair training, honest tables."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.image import imread, imsave
from PIL import Image
from scipy import stats

from benchmarks.harness.options import Options, UsageError
from benchmarks.harness.results import describe, read_json, record
from benchmarks.tasks.beta_vae import report, task
from benchmarks.tasks.beta_vae import run as beta_vae
from yoto_jax import conditional

pytestmark = pytest.mark.usefixtures("any_rank", "quick_compilation")


# A linear VAE, for which the optimum of every beta is known: reverse water-filling.

VARIANCES = np.array([4.0, 1.0, 0.25])
DECODER_VARIANCE = 0.1
LATENTS = len(VARIANCES)


def water_filling(betas):
    """Squared error and KL divergence of the best linear VAE for each beta."""
    level = betas[:, None] * DECODER_VARIANCE
    error = np.minimum(level, VARIANCES).sum(axis=1)
    return error, np.maximum(0, 0.5 * np.log(VARIANCES / level)).sum(axis=1)


def encoded(weights):
    """With two octaves of waves: the exact solution bends sharply."""
    c = conditional.encode(weights, task.SUPPORT)
    octaves = [2**k * jnp.pi * c for k in range(2)]
    waves = [wave(x) for x in octaves for wave in (jnp.sin, jnp.cos)]
    return jnp.concatenate([c, *waves], axis=-1)


def expected_losses(params, weights):
    """The expectation over data and posterior, without samples.

    Encoder and decoder are affine: they are known by what they make of the unit
    vectors and of zero.
    """
    c = encoded(weights)
    rows = jnp.concatenate([jnp.eye(LATENTS), jnp.zeros((1, LATENTS))])
    rows = jnp.broadcast_to(rows, (len(c), *rows.shape))
    films = params["films"]
    codes = conditional.film(films["encoder"], rows @ params["encoder"], c)
    means = conditional.film(films["decoder"], rows, c) @ params["decoder"]
    log_variance = conditional.film(films["variance"], jnp.zeros_like(c[:, :3]), c)
    (a, a0), (d, d0) = ((x[:, :-1] - x[:, -1:], x[:, -1]) for x in (codes, means))
    variance, s2 = jnp.exp(log_variance), jnp.asarray(VARIANCES, jnp.float32)[:, None]
    error = (
        jnp.sum(s2 * (jnp.eye(LATENTS) - a @ d) ** 2, axis=(1, 2))
        + jnp.sum(variance[:, :, None] * d**2, axis=(1, 2))
        + jnp.sum((jnp.einsum("nk,nkd->nd", a0, d) + d0) ** 2, axis=1)
    )
    second_moment = jnp.sum(s2 * a**2, axis=1) + a0**2 + variance
    kl = 0.5 * jnp.sum(second_moment - 1 - log_variance, axis=1)
    return {"reconstruction": error / (2 * DECODER_VARIANCE), "kl": kl}


def train_linear(steps=2500):
    keys = jax.random.split(jax.random.key(0), 4)
    size = 5 * conditional.encoding_size(task.SUPPORT)
    rotation = jnp.linalg.qr(jax.random.normal(keys[0], (LATENTS, LATENTS)))[0]
    names = ("encoder", "decoder", "variance")
    params = {
        "encoder": rotation,
        "decoder": rotation.T,
        "films": {
            name: conditional.init_film(key, size, LATENTS, hidden=(64,))
            for name, key in zip(names, keys[1:], strict=True)
        },
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def step(carry, key):
        params, state = carry
        weights = task.SUPPORT.sample(key, 64, method="stratified")
        objective = lambda params: conditional.conditional_loss(
            expected_losses(params, weights), weights, normalize="geometric"
        )
        updates, state = optimizer.update(jax.grad(objective)(params), state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(params):
        draws = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), draws)[0][0]

    return train(params)


def test_one_linear_vae_is_the_best_one_for_every_beta():
    betas = np.array([0.25, 1.0, 5.0, 20.0, 50.0, 400.0])
    error, kl = water_filling(betas)
    np.testing.assert_allclose(error[[1, 2, 4]], [0.3, 1.25, 5.25])
    np.testing.assert_allclose(kl[[1, 2, 4]], [3.4539, 1.3863, 0], atol=5e-5)
    losses = expected_losses(train_linear(), task.weights_of(jnp.asarray(betas)))
    ours = 2 * DECODER_VARIANCE * losses["reconstruction"]
    np.testing.assert_allclose(ours, error, rtol=0.02)
    # Within 2 % of the value, and of the range where that is zero.
    np.testing.assert_allclose(losses["kl"][:-2], kl[:-2], rtol=0.02)
    np.testing.assert_allclose(losses["kl"][-2:], 0, atol=0.02 * kl.max())


# The model and its losses.


@pytest.fixture(scope="module")
def trained_params():
    """Of a conditional model whose FiLM layers are no longer the identity."""
    params = task.init(0, 64, 8, conditioned=True)
    noise = np.random.default_rng(0).normal(0, 0.1, params["film"]["w"].shape)
    return params | {"film": params["film"] | {"w": jnp.asarray(noise, jnp.float32)}}


@pytest.fixture(scope="module")
def digits():
    return task.digits()


@jax.jit
def reconstruct(params, c, x):
    return task.codec(params, c, 1 / 16).reconstruct(x)


@jax.jit
def posterior(params, c, x):
    return task.codec(params, c, 1 / 16).encode(x)


def test_losses_are_a_gaussian_likelihood_and_a_divergence(trained_params, digits):
    x, c = digits.test[:5], jnp.zeros((5, 1))
    noise = jax.random.normal(jax.random.key(0), (5, task.LATENT))

    @jax.jit
    def everything(params):
        model = task.codec(params, c, digits.floor)
        mean, deviation = posterior = model.encode(x)
        decoded = model.decode(mean + deviation * noise)
        return posterior, decoded, task.losses_of(model, x, noise)

    (mean, deviation), (pixels, spread), losses = everything(trained_params)
    likelihood = stats.norm.logpdf(x, pixels, spread).sum(axis=1)
    np.testing.assert_allclose(losses["reconstruction"], -likelihood, rtol=1e-4)
    z = mean + deviation * np.random.default_rng(0).normal(size=(20_000, *mean.shape))
    log_ratio = stats.norm.logpdf(z, mean, deviation) - stats.norm.logpdf(z)
    kl = log_ratio.sum(axis=-1).mean(axis=0)
    np.testing.assert_allclose(losses["kl"], kl, rtol=0.03)
    assert np.all(spread > digits.floor)


def test_conditioning_changes_nothing_at_the_start(digits):
    x = digits.test[:3]
    fixed, ours = (task.init(7, 64, 8, conditioned) for conditioned in (False, True))
    expected = posterior(fixed, None, x)
    for position in (-1.0, 1.0):
        found = posterior(ours, jnp.array([position]), x)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_shifts_make_the_biases_of_the_layers_superfluous(digits):
    """(1 + s) (W x + b) + t is (1 + s) W x + t' with t' as linear in beta as t."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32),
        task.init(0, 64, 8, conditioned=True),
    )
    without = task.init(0, 64, 8, conditioned=True, biases=False)
    film, start = {k: np.array(x) for k, x in params["film"].items()}, 0
    for half in task.HALVES:
        for layer, own in zip(params[half], without[half], strict=True):
            own["w"], b = layer["w"], np.array(layer["b"])
            scale, shift = start + np.arange(len(b)), start + len(b) + np.arange(len(b))
            film["w"][:, shift] += film["w"][:, scale] * b
            film["b"][shift] += (1 + film["b"][scale]) * b
            start += 2 * len(b)
    without |= {"trunk": params["trunk"], "film": film}
    c = conditional.encode(task.weights_of(jnp.array([0.5, 200.0])), task.SUPPORT)
    x = digits.test[:2]
    for with_biases, got in zip(
        task.codec(params, c, 0.1).encode(x),
        task.codec(without, c, 0.1).encode(x),
        strict=True,
    ):
        np.testing.assert_allclose(got, with_biases, rtol=1e-5, atol=1e-5)


def test_one_beta_for_all_is_that_beta_for_each(trained_params, digits):
    x, c = digits.test[:3], jnp.array([0.3])
    one = reconstruct(trained_params, c, x)
    each = reconstruct(trained_params, jnp.broadcast_to(c, (3, 1)), x)
    np.testing.assert_allclose(one, each, rtol=1e-4, atol=1e-6)
    assert not np.allclose(one, reconstruct(trained_params, -c, x), rtol=1e-3)


def test_groups_are_conditioned_row_by_row(trained_params, digits):
    x, c = digits.test[:9].reshape(3, 3, -1), jnp.array([[-1.0], [0.0], [0.5]])
    groups = reconstruct(trained_params, c, x)
    for i in range(3):
        alone = reconstruct(trained_params, c[i], x[i])
        np.testing.assert_allclose(groups[i], alone, rtol=1e-4, atol=1e-6)


# Data.


def test_digits_are_split_by_image(digits):
    parts = (digits.train, digits.validation, digits.test)
    assert sum(map(len, parts)) == 1797
    every = np.concatenate(parts)
    assert len(np.unique(every, axis=0)) == 1797
    assert every.min() == 0
    assert every.max() == 1
    assert digits.shape[0] * digits.shape[1] == every.shape[1]


def test_patches_of_a_folder_keep_its_split(tmp_path, monkeypatch):
    monkeypatch.setattr(task, "SIZE", (12, 16))
    values = {"train": range(10), "val": range(10, 13)}
    for split, of_split in values.items():
        for folder in (split, f"{split}annot"):
            (tmp_path / folder).mkdir()
        for value in of_split:
            image = np.full((12, 16, 3), value / 20)
            imsave(tmp_path / split / f"{value}.png", image)
            labels = np.zeros((12, 16), np.uint8)
            path = tmp_path / f"{split}annot" / f"{value}.png"
            Image.fromarray(labels).save(path)
    data = task.load(tmp_path)
    assert data.shape == (task.SIDE, task.SIDE, 3)
    kinds = [
        set(np.round(20 * np.unique(x)).astype(int))
        for x in (data.train, data.validation, data.test)
    ]
    assert kinds[2] == {10, 11, 12}
    assert kinds[0] | kinds[1] == set(range(10))
    assert not kinds[0] & kinds[1]
    assert len(data.test) == 3 * task.PATCHES


# What is made of the numbers.

GAPS = {0.5: 0.0, 8.0: 2.0}  # by beta, all others 1


def made_up(shift=0.0):
    """Two seeds of models of which the fixed ones are 1 better, or ``-shift``."""
    records = []
    for method, betas in {"fixed": task.BETAS, "conditional": task.GRID}.items():
        note = lambda metric, value, method=method, **rest: records.append(
            record(method, metric, value, **rest)
        )
        note("parameters", 100, config="width=1")
        for domain in ("test", "train", "validation"):
            for seed in range(2):
                for beta in betas:
                    kl = 4 / beta
                    worse = GAPS.get(beta, 1.0) + shift
                    reconstruction = 10 + 4 * np.log(beta)
                    if method == "conditional":
                        reconstruction += worse
                    where = {"seed": seed, "domain": domain}
                    config = describe(width=1, beta=beta)
                    note("kl", kl, config=config, **where)
                    note("reconstruction", reconstruction, config=config, **where)
    meta = {"seeds": 2, "steps": 5, "data": "no data", "device": "cpu"}
    meta |= {"cpu_count": 1, "hidden": 32, "rounds": 1}
    return {"meta": meta, "records": records}


def test_the_gap_is_of_the_objective_of_each_beta():
    expected = [GAPS.get(beta, 1.0) for beta in task.BETAS]
    gaps = report.gap(made_up(), 1)
    np.testing.assert_allclose(gaps, [expected, expected], atol=1e-3)
    objective = 14 + 4 * np.log(task.BETAS)
    spread = np.ptp(objective)
    np.testing.assert_allclose(report.spread(made_up(), 1), spread, rtol=1e-4)
    (row,) = report.table(made_up()).rows
    cells = dict(zip(report.table(made_up()).columns, row, strict=True))
    assert cells["mean gap (nats)"] == "1.00 ± 0.00"
    assert cells["largest gap"] == "2.00 ± 0.00 at 8"
    assert cells["of the spread"] == f"{100 / spread:.1f} ± 0.0 %"


@pytest.mark.parametrize(("shift", "word"), [(0.0, "1.00 ± 0.00 nats above"), (-2, "")])
def test_a_conclusion_says_on_which_side_the_model_is(shift, word):
    sentence = report.conclusions(made_up(shift))[0]
    assert (word or "1.00 ± 0.00 nats below") in sentence
    where = report.conclusions(made_up(shift))[1]  # of one width
    worse = "0.125, 2, 8, 32, 128, 512" if shift == 0 else "none"
    assert f"worse at beta {worse}, better at" in where


def test_order_and_calibration_are_counted():
    kl = np.array([[3.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.005]])  # up by 1, and by noise
    losses = {"kl": kl, "reconstruction": np.array([[0, 1, 2, 1.5, 3, 3, 3.0]])}
    assert report.disorder(losses) == (2, 1.0)  # at 2 and at 8
    steady = {"kl": -np.arange(7.0)[None], "reconstruction": np.arange(7.0)[None]}
    assert report.disorder(steady) == (0, 0.0)
    # 1 / x + beta x is least where x^2 = 1 / beta: a calibrated family.
    x = 1 / np.sqrt(task.BETAS)[None]
    assert report.off_diagonal({"kl": x, "reconstruction": 1 / x})[0] == 0
    mixed = {"kl": x[:, ::-1], "reconstruction": 1 / x[:, ::-1]}
    count, worst = report.off_diagonal(mixed)
    assert count == 6  # The middle one is where it was.
    assert worst > 1


# The quick preset.


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quick_compilation):
    folder = tmp_path_factory.mktemp("results")
    with jax.numpy_rank_promotion("allow"):
        beta_vae.main(options(folder, ("fixed", "conditional", "cost")))
    return folder


def options(folder, methods):
    return Options("beta_vae", methods, seeds=2, steps=4, preset="quick", out=folder)


@pytest.fixture(scope="module")
def result(folder):
    return read_json(folder / "beta_vae.json")


def test_records_are_complete(result):
    records = result["records"]
    for method, betas in {"fixed": task.BETAS, "conditional": task.GRID}.items():
        losses = report.losses_of(result, method, 1, betas)
        assert losses["kl"].shape == losses["reconstruction"].shape == (2, len(betas))
        assert np.all(losses["kl"] > 0)
    assert np.all(np.isfinite([r["value"] for r in records]))
    assert result["meta"]["steps"] == 4


def test_all_is_made_from_the_file(result, folder, tmp_path):
    tables = [report.table(result), *report.tables(result).values()]
    assert len(tables) == 3
    for table in tables:
        assert len({len(row) for row in (table.columns, *table.rows)}) == 1
    report.figure(result, tmp_path / "again.png")
    for name in (tmp_path / "again.png", folder / "beta_vae_examples.png"):
        assert imread(name).std() > 0
    assert any("forward pass" in text for text in report.conclusions(result))


def test_a_timed_step_is_a_training_step(quick_compilation, digits):
    call = beta_vae.step_arms(1, digits)["beta per group"]()
    call()
    params, state = call()
    assert np.any(params["film"]["w"] != 0)
    assert optax.tree_utils.tree_get(state, "mu")["film"]["w"].any()


def test_costs_alone_keep_the_rest(result, folder, monkeypatch):
    made = [record("cost: fixed", "forward: microseconds", 7, config="width=1")]
    monkeypatch.setattr(beta_vae, "costs", lambda *_: made)
    monkeypatch.setattr(report, "cost_table", lambda result: report.table(result))
    before = json.loads((folder / "beta_vae.json").read_text())
    beta_vae.main(options(folder, ("cost",)))
    after = read_json(folder / "beta_vae.json")
    kept = [r for r in before["records"] if not r["method"].startswith("cost")]
    assert after["records"] == kept + made
    assert after["meta"]["date"] == before["meta"]["date"]
    assert "--methods cost" in after["meta"]["again"]["cost"]["command"]


def test_unknown_methods_are_refused(tmp_path):
    with pytest.raises(UsageError, match="unknown method 'yoto'"):
        beta_vae.main(options(tmp_path, ("yoto",)))
