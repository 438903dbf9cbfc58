"""Style transfer: filters and losses mean what they say, and the benchmark runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks.harness.options import Options
from benchmarks.harness.results import read_json, select
from benchmarks.tasks.style import methods, report, task
from benchmarks.tasks.style import run as style

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("quick_compilation", "any_rank"),
]

SIDE = style.SIZES["quick"].side


@pytest.fixture(scope="module")
def photographs():
    return task.load()


@pytest.fixture(scope="module")
def made(photographs):
    return task.make_task(photographs, SIDE, counts=(16, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the quick preset writes."""
    folder = tmp_path_factory.mktemp("results")
    with jax.numpy_rank_promotion("allow"):
        options = Options("style", preset="quick", seeds=2, out=folder)
        style.main(options)
    return folder


@pytest.fixture(scope="module")
def result(folder):
    return read_json(folder / "style.json")


# Images.


def test_contents_for_testing_are_from_elsewhere(photographs):
    left, right = photographs.train
    (between,) = photographs.test
    whole = np.concatenate([left, between, right], axis=1)
    assert whole.shape == (213, 320, 3)
    assert len(np.unique(whole[0] @ [1, 1000, 1e6])) > 50  # no part twice


def test_crops_are_spread_by_area():
    images = [np.full((16, 16, 3), 0.25), np.full((40, 24, 3), 0.75)]
    cut = task.crops(images, 8, 500, seed=0)
    assert cut.shape == (500, 8, 8, 3)
    rooms = 9 * 9, 33 * 17
    assert (cut[:, 0, 0, 0] > 0.5).mean() == pytest.approx(
        rooms[1] / sum(rooms), abs=0.05
    )


def test_contents_may_come_from_a_folder(tmp_path):
    for split, brightness in (("train", 50), ("val", 200)):
        for kind, mode in ((split, "RGB"), (f"{split}annot", "L")):
            (tmp_path / kind).mkdir()
            value = (brightness,) * 3 if mode == "RGB" else 0
            Image.new(mode, (160, 120), value).save(tmp_path / kind / "a.png")
    images = task.load(tmp_path)
    assert images.train[0].shape == (96, 128, 3)
    np.testing.assert_allclose(images.train[0], 50 / 255, rtol=1e-5)
    np.testing.assert_allclose(images.test[0], 200 / 255, rtol=1e-5)


# Features and losses.


def test_filters_measure_derivatives_along_their_angle():
    y, x = np.mgrid[:9, :9].astype(np.float32)
    ramp = (0.02 * x + 0.05 * y)[None, ..., None]
    responses = np.asarray(task._respond(ramp))[0, ..., 0, :]
    along = 0.02 * np.cos(task.ANGLES) + 0.05 * np.sin(task.ANGLES)
    expected = np.concatenate([along, np.zeros(4)])
    np.testing.assert_allclose(
        responses, np.broadcast_to(expected, responses.shape), atol=1e-6
    )


def test_second_derivatives_turn_with_the_image():
    stripes = np.zeros((1, 7, 7, 1), np.float32)
    stripes[:, 3] = 1
    across = np.asarray(task._respond(stripes))[0, 2, 2, 0]
    along = np.asarray(task._respond(stripes.swapaxes(1, 2)))[0, 2, 2, 0]
    np.testing.assert_allclose(across[[4, 6]], along[[6, 4]], atol=1e-6)
    assert across[6] > 0.4
    assert abs(across[4]) < 1e-6


def test_a_uniform_image_has_colours_and_no_strokes():
    uniform = jnp.full((1, 32, 32, 3), 0.3)
    strengths = 3 * task.DERIVATIVES.shape[1]
    for level in task.filter_bank(uniform):
        np.testing.assert_allclose(level[..., :strengths], 0, atol=1e-6)
        np.testing.assert_allclose(level[..., strengths], 0.3 * 3**0.5, rtol=1e-5)
        np.testing.assert_allclose(level[..., strengths + 1], 0, atol=1e-6)


def test_losses_are_in_units_of_no_style_and_no_content(made):
    contents = jnp.asarray(made.train)
    untouched = made.losses(contents, contents)
    np.testing.assert_allclose(untouched["content"], 0, atol=1e-6)
    for name in task.STYLES:
        assert untouched[name].shape == (len(contents),)
        assert float(untouched[name].mean()) == pytest.approx(1, rel=1e-4)
    grey = made.losses(jnp.full_like(contents, 0.5), contents)
    assert float(grey["content"].mean()) == pytest.approx(1, rel=1e-4)


def test_the_style_has_no_style_loss(made):
    image = jnp.asarray(made.images.style)[None]
    losses = made.losses(image, jnp.zeros_like(image))
    for name in task.STYLES:
        np.testing.assert_allclose(losses[name], 0, atol=1e-6)


def test_features_may_be_your_own(photographs):
    def features(images):
        return [images**power for power in (1, 2, 3, 4)]

    own = task.make_task(
        photographs,
        SIDE,
        features,
        content=lambda images: images[:, ::4, ::4],
        counts=(8, 2),
    )
    contents = jnp.asarray(own.train)
    mirrored = contents[:, :, ::-1]
    plain, turned = own.losses(contents, contents), own.losses(mirrored, contents)
    for name in task.STYLES:  # Means of products of channels know no places ...
        np.testing.assert_allclose(plain[name], turned[name], rtol=1e-3)
    assert (np.asarray(turned["content"]) > 0.01).all()  # ... the content does.


# The network.


def test_at_the_start_the_network_ignores_the_weights_and_takes_any_size():
    net = task.Transfer(width=8, blocks=2)
    contents = jax.random.uniform(jax.random.key(0), (2, 16, 24, 3))
    noise = task.draw_noise(jax.random.key(1), contents)
    low, high = jnp.full((2, 4), -1.0), jnp.ones((2, 4))
    apply = jax.jit(net.apply)
    params = jax.jit(net.init)(jax.random.key(2), contents, noise, low)
    made = apply(params, contents, noise, low)
    assert made.shape == contents.shape
    np.testing.assert_allclose(made, apply(params, contents, noise, high), atol=1e-6)


def test_enlarging_is_linear_and_keeps_the_border():
    matrix = task._enlarging(4, 2)
    assert matrix.shape == (20, 4)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-6)
    enlarged = matrix @ np.arange(4)
    np.testing.assert_allclose(enlarged[:4], 0)  # 2 of the margin, 2 of the border
    np.testing.assert_allclose(np.diff(enlarged)[4:15], 0.25, atol=1e-6)


# Weightings.


def test_a_walk_turns_one_dial():
    weights = methods.walk("style2", 5)
    np.testing.assert_allclose(
        weights["style2"], np.geomspace(methods.LOW, methods.HIGH, 5)
    )
    np.testing.assert_allclose(weights["style1"], methods.LOW)
    np.testing.assert_allclose(weights["content"], 1)
    every = methods.walk("all", 5)
    np.testing.assert_allclose(every["style1"], every["style4"])


# The result.


def test_every_number_is_there(result):
    records, points = result["records"], result["meta"]["points"]
    numbers = 2 * len(task.LOSSES)
    weightings, walks = len(methods.WEIGHTINGS), points * len(methods.WALKS)
    fixed = select(records, method="fixed")
    assert len(fixed) == weightings * numbers
    for method in report.CONDITIONAL:
        of = select(records, method=method)
        assert len(of) == (weightings + walks) * numbers
    assert all(np.isfinite(r["value"]) for r in records)


def test_a_walk_meets_the_weightings_at_its_ends(result):
    for dial in task.STYLES:
        ends = [f"{methods.LOW:.4g}", f"{methods.HIGH:.4g}"]
        walked = report._losses(result, "conditional", dial, ends)
        named = report._losses(result, "conditional", "", ["all low", f"{dial} high"])
        for loss in task.LOSSES:
            np.testing.assert_allclose(walked[loss], named[loss], rtol=1e-3)


def test_networks_for_high_style_weights_leave_the_content_more(result):
    losses = report._losses(result, "fixed", "", ["all low", "all high"])
    assert (losses["content"][:, 0] < losses["content"][:, 1]).all()


def test_tables_and_conclusions_follow_from_the_records(result):
    tables = {"style": report.table(result), **report.tables(result)}
    for table in tables.values():
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert len(tables["style"].rows) == len(methods.WEIGHTINGS)
    assert len(report.conclusions(result)) == 5


def test_without_fixed_networks_there_are_no_gaps(result):
    alone = select(result["records"], method="conditional")
    only = {**result, "records": alone}
    assert report.table(only).columns == ["weighting", "conditional"]
    assert len(report.conclusions(only)) == 1


def test_figures_are_drawn(result, folder, tmp_path):
    report.figure(result, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (folder / "style.png").read_bytes()
    with Image.open(folder / "style_examples.png") as picture:
        assert min(picture.size) > 500


# Measures, on losses that are known.


def synthetic(factor, dials=None):
    """Conditional losses are ``factor`` times the fixed ones."""
    names = list(methods.WEIGHTINGS)
    fixed = {
        loss: np.full((2, len(names)), 0.1 * (i + 1))
        for i, loss in enumerate(task.LOSSES)
    }
    records = style._records("fixed", "", names, fixed)
    ours = {loss: factor * values for loss, values in fixed.items()}
    records += style._records("conditional", "", names, ours)
    for dial, values in (dials or {}).items():
        records += style._records("conditional", dial, methods.places_of(3), values)
    return {"meta": {"seeds": 2, "points": 3}, "records": records}


def test_the_gap_is_relative_to_the_fixed_networks():
    result = synthetic(1.2)
    np.testing.assert_allclose(report.gaps(result, "conditional"), 0.2, rtol=1e-4)
    np.testing.assert_allclose(report.elsewhere(result), 0, atol=1e-6)
    low = report.totals(result, "fixed")[:, 0]
    content, weight = 0.1, methods.LOW
    expected = (content + weight * (0.2 + 0.3 + 0.4 + 0.5)) / (1 + 4 * weight)
    np.testing.assert_allclose(low, expected, rtol=1e-5)


def test_a_dial_that_turns_the_wrong_way_is_found():
    rising = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])  # the first seed violates
    values = {loss: rising for loss in task.LOSSES}
    turned = report.turn(synthetic(1, {"style1": values}), "conditional", "style1")
    np.testing.assert_allclose(turned["correlation"], [1, -1], atol=1e-9)
    np.testing.assert_allclose(turned["violations"], [1, 0])
