"""Depth: losses, views and metrics against NumPy in float64 and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.data import cameras as depth_cameras
from benchmarks.data import scenes
from benchmarks.tasks.depth import losses as depth_losses
from benchmarks.tasks.depth import metrics as depth_task
from benchmarks.tasks.depth import views as depth_views
from benchmarks.tasks.depth.views import Warp

silog = jax.jit(depth_losses.silog)
silog_gradient = jax.jit(jax.grad(depth_losses.silog))
random_warp = jax.jit(depth_views.random_warp, static_argnums=1)
warp_images = jax.jit(depth_views.warp_images)
warp_depth = jax.jit(depth_views.warp_depth)
warp_nearest = jax.jit(depth_views.warp_nearest)
warp_angles = jax.jit(depth_views.warp_angles, static_argnums=(2, 3))
warp_directions = jax.jit(depth_views.warp_directions, static_argnums=(2, 3))
seen_by_both = jax.jit(depth_views.seen_by_both, static_argnums=(2, 3))
relative = jax.jit(depth_views.relative)
invariance = jax.jit(depth_losses.invariance)
jitted_metrics = jax.jit(depth_task.depth_metrics)

HEIGHT, WIDTH = 8, 12


def depth_metrics(*arguments, max_depth=depth_task.MAX_DEPTH):
    return jitted_metrics(*arguments, max_depth=max_depth)


def rng():
    return np.random.default_rng(0)


def some_depth(n=3, height=HEIGHT, width=WIDTH):
    depth = rng().uniform(1, 30, (n, height, width))
    return np.where(rng().uniform(size=depth.shape) < 0.2, 0, depth)


def some_warps(seed=0, n=3, scale=(0.7, 1.6)):
    return random_warp(jax.random.key(seed), n, scale)


def f32(x):
    return jnp.asarray(x, jnp.float32)


# Losses.


def silog_oracle(log_prediction, depth):
    e = log_prediction[depth > 0] - np.log(depth[depth > 0])
    return np.sqrt(np.var(e) + 0.15 * np.mean(e) ** 2)


def test_silog_equals_its_definition_over_the_valid_pixels():
    depth = some_depth()
    log_prediction = rng().normal(1.5, 1, depth.shape)
    np.testing.assert_allclose(
        silog(f32(log_prediction), f32(depth)),
        silog_oracle(log_prediction, depth),
        rtol=1e-5,
    )


def test_silog_of_two_pixels_by_hand():
    # e = 0 and 2: variance 1, mean 1.
    loss = silog(f32([0.0, 2.0, 9.0]), f32([1.0, 1.0, 0.0]))
    np.testing.assert_allclose(loss, np.sqrt(1.15), rtol=1e-6)


@pytest.mark.parametrize("error", [-2.0, -1e-3, 0.5])
def test_silog_of_a_wrong_scale_is_its_share_of_the_scale(error):
    depth = f32(some_depth())
    log_prediction = jnp.log(jnp.where(depth > 0, depth, 1)) + error
    np.testing.assert_allclose(
        # Rounding of log depth (up to 3.4) is 2e-7.
        silog(log_prediction, depth),
        np.sqrt(0.15) * abs(error),
        rtol=1e-5,
        atol=2e-7,
    )


def test_silog_gradient_equals_its_closed_form_and_is_zero_where_depth_is_missing():
    depth = some_depth()
    log_prediction = rng().normal(1.5, 1, depth.shape)
    valid = depth > 0
    e = np.where(valid, log_prediction - np.log(np.where(valid, depth, 1)), 0)
    mean = e.sum() / valid.sum()
    loss = silog_oracle(log_prediction, depth)
    expected = valid * (e - mean + 0.15 * mean) / valid.sum() / loss
    actual = silog_gradient(f32(log_prediction), f32(depth))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-7)
    assert np.all(np.asarray(actual)[~valid] == 0)


def test_silog_of_a_perfect_prediction_and_its_gradient_are_zero():
    depth = jnp.exp2(jnp.arange(6.0))
    assert silog(jnp.log(depth), depth) == 0
    assert np.all(silog_gradient(jnp.log(depth), depth) == 0)


@pytest.mark.parametrize("error", [1e-30, 1e-20, 1e-10, 1e-5, 1e3])
def test_silog_gradient_is_finite_near_a_perfect_prediction(error):
    depth = jnp.ones(4)
    log_prediction = jnp.asarray([error, 0.0, 0.0, -error], jnp.float32)
    gradient = silog_gradient(log_prediction, depth)
    assert np.all(np.isfinite(gradient))
    assert np.linalg.norm(gradient) <= 1  # the loss is a seminorm below rms


@pytest.mark.parametrize("valid", [0, 1])
def test_silog_and_its_gradient_are_finite_with_hardly_a_valid_pixel(valid):
    depth = jnp.zeros(5).at[:valid].set(2.0)
    log_prediction = jnp.asarray([0.0, jnp.inf, -jnp.inf, jnp.nan, 1.0])
    # Nothing but the valid pixels counts, whatever is predicted there.
    expected = valid * np.sqrt(0.15) * np.log(2)
    np.testing.assert_allclose(silog(log_prediction, depth), expected, rtol=1e-6)
    gradient = silog_gradient(log_prediction, depth)
    np.testing.assert_allclose(gradient[0], -valid * np.sqrt(0.15), rtol=1e-6)
    assert np.all(gradient[1:] == 0)


def test_camera_loss_is_the_mean_square_over_pixels_and_both_angles():
    angles = rng().normal(size=(2, 3, 4, 2))
    loss = depth_losses.camera(f32(angles + np.array([0.1, -0.3])), f32(angles))
    np.testing.assert_allclose(loss, (0.1**2 + 0.3**2) / 2, rtol=1e-5)


# Views.


def test_a_random_view_is_inside_the_image_or_shows_all_of_it():
    warp = some_warps(n=500, scale=(0.5, 2.0))
    scale, shift = (np.asarray(x) for x in warp)
    assert np.all((scale >= 0.5) & (scale <= 2))
    corners = np.array([-0.5, 0.5])[:, None, None]
    seen = (corners - shift) / scale[:, None]  # by the corners of the view
    shown = corners * scale[:, None] + shift  # of the image, in the view
    zoomed_in = scale >= 1
    assert np.abs(seen[:, zoomed_in]).max() <= 0.5 + 1e-6
    assert np.abs(shown[:, ~zoomed_in]).max() <= 0.5 + 1e-6
    assert 0.4 < zoomed_in.mean() < 0.6  # log-uniform
    assert np.abs(shift[zoomed_in]).max() > 0.4  # all of the room is used


def test_the_identity_changes_nothing():
    images = f32(rng().uniform(size=(3, HEIGHT, WIDTH, 2)))
    warp = depth_views.identity(3)
    np.testing.assert_array_equal(warp_images(images, warp), images)
    np.testing.assert_array_equal(warp_depth(images[..., 0], warp), images[..., 0])
    np.testing.assert_array_equal(
        depth_views.warp_focal(f32([1, 2, 3]), warp), [1, 2, 3]
    )
    assert np.all(seen_by_both(warp, warp, HEIGHT, WIDTH))


def test_relative_of_equal_views_is_the_identity_and_leads_from_one_to_the_other():
    warp1, warp2 = some_warps(1), some_warps(2)
    same = relative(warp1, warp1)
    np.testing.assert_allclose(same.scale, 1, rtol=1e-6)
    np.testing.assert_allclose(same.shift, 0, atol=1e-7)
    between = relative(warp2, warp1)
    p = rng().uniform(-0.5, 0.5, (3, 2))
    in1 = warp1.scale[:, None] * p + warp1.shift
    in2 = warp2.scale[:, None] * p + warp2.shift
    moved = between.scale[:, None] * in1 + between.shift
    np.testing.assert_allclose(moved, in2, atol=1e-6)
    assert np.all(seen_by_both(warp1, warp1, HEIGHT, WIDTH).any((1, 2)))


def centres(size):
    return (np.arange(size) + 0.5) / size - 0.5


def sources(warp, height, width):
    """Where the pixels of the views are in the images, in their coordinates."""
    scale, shift = (np.asarray(x, np.float64) for x in warp)
    x = (centres(width)[None] - shift[:, :1]) / scale[:, None]
    y = (centres(height)[None] - shift[:, 1:]) / scale[:, None]
    return x, y


def warp_oracle(images, warp):
    n, height, width, _ = images.shape
    view = np.empty_like(images)
    x, y = sources(warp, height, width)
    for i in range(n):
        for row in range(height):
            for column in range(width):
                r = np.clip((y[i, row] + 0.5) * height - 0.5, 0, height - 1)
                c = np.clip((x[i, column] + 0.5) * width - 0.5, 0, width - 1)
                r0, c0 = int(r), int(c)
                r1, c1 = min(r0 + 1, height - 1), min(c0 + 1, width - 1)
                r, c = r - r0, c - c0
                top = (1 - c) * images[i, r0, c0] + c * images[i, r0, c1]
                bottom = (1 - c) * images[i, r1, c0] + c * images[i, r1, c1]
                view[i, row, column] = (1 - r) * top + r * bottom
    return view


def test_warped_images_equal_interpolation_pixel_by_pixel():
    images = rng().uniform(size=(3, HEIGHT, WIDTH, 2))
    warp = some_warps()
    np.testing.assert_allclose(
        warp_images(f32(images), warp), warp_oracle(images, warp), atol=2e-6
    )


def ramp(x, y):
    """An image [n, h, w, 2] that is linear in the position."""
    shape = (len(x), y.shape[1], x.shape[1])
    x = np.broadcast_to(x[:, None, :], shape)
    y = np.broadcast_to(y[:, :, None], shape)
    return np.stack([0.3 + x - 2 * y, 3 * x + y], axis=-1)


def test_a_linear_ramp_is_warped_exactly_where_the_view_is_inside():
    warp = some_warps(scale=(1.2, 1.6))
    image = ramp(*sources(depth_views.identity(3), HEIGHT, WIDTH))
    view = ramp(*sources(warp, HEIGHT, WIDTH))
    # All but half a pixel of the image has pixels around it.
    inside = seen_by_both(depth_views.identity(3), warp, HEIGHT, WIDTH)
    assert np.mean(inside) > 0.8
    actual = np.asarray(warp_images(f32(image), warp))
    np.testing.assert_allclose(actual[inside], view[inside], atol=2e-6)


def test_moving_by_whole_pixels_is_exact_and_marks_what_is_outside():
    depth = 1 + rng().uniform(size=(1, HEIGHT, WIDTH))
    warp = Warp(jnp.ones(1), f32([[2 / WIDTH, -3 / HEIGHT]]))  # right 2, up 3
    expected = np.zeros_like(depth)
    expected[:, :-3, 2:] = depth[:, 3:, :-2]
    np.testing.assert_array_equal(warp_depth(f32(depth), warp), f32(expected))
    labels = rng().integers(0, 5, (1, HEIGHT, WIDTH)).astype(np.int32)
    void = np.full_like(labels, 11)
    void[:, :-3, 2:] = labels[:, 3:, :-2]
    moved = warp_nearest(labels, warp, 11)
    np.testing.assert_array_equal(moved, void)
    assert moved.dtype == jnp.int32


def test_warped_depth_is_the_nearest_pixel():
    depth = rng().uniform(1, 2, (3, HEIGHT, WIDTH))
    warp = some_warps()
    x, y = sources(warp, HEIGHT, WIDTH)
    expected = np.zeros_like(depth)
    for i, row, column in np.ndindex(*depth.shape):
        r, c = (y[i, row] + 0.5) * HEIGHT, (x[i, column] + 0.5) * WIDTH
        if 0 <= r < HEIGHT and 0 <= c < WIDTH:
            expected[i, row, column] = depth[i, int(r), int(c)]
    np.testing.assert_array_equal(warp_depth(f32(depth), warp), f32(expected))


def test_without_a_shift_a_view_has_the_camera_of_its_focal_length():
    focal = f32([0.7, 1.3, 1.0])
    warp = Warp(f32([0.8, 1.5, 1.0]), jnp.zeros((3, 2)))
    directions = warp_directions(focal, warp, HEIGHT, WIDTH)
    angles = warp_angles(focal, warp, HEIGHT, WIDTH)
    zoomed = depth_views.warp_focal(focal, warp)
    np.testing.assert_allclose(
        directions, scenes.ray_directions(zoomed, HEIGHT, WIDTH), atol=1e-6
    )
    np.testing.assert_allclose(
        angles, scenes.ray_angles(zoomed, HEIGHT, WIDTH), atol=1e-6
    )


def test_a_point_keeps_its_direction_in_every_view():
    focal = np.array([0.6, 1.0, 1.5])
    warp = some_warps()
    x, y = sources(warp, HEIGHT, WIDTH)
    directions = np.ones((3, HEIGHT, WIDTH, 3))
    directions[..., 0] = (x / focal[:, None])[:, None, :]
    directions[..., 1] = (y * HEIGHT / WIDTH / focal[:, None])[:, :, None]
    np.testing.assert_allclose(
        warp_directions(f32(focal), warp, HEIGHT, WIDTH), directions, atol=2e-6
    )
    norm = np.linalg.norm(directions, axis=-1)
    angles = np.stack(
        [np.arctan2(directions[..., 0], 1), np.arcsin(directions[..., 1] / norm)], -1
    )
    actual = warp_angles(f32(focal), warp, HEIGHT, WIDTH)
    np.testing.assert_allclose(actual, angles, atol=2e-6)
    np.testing.assert_allclose(
        depth_cameras.directions_of(actual), directions, rtol=1e-5, atol=2e-6
    )


def seen_by_both_oracle(warp1, warp2, height, width, slack=0.0):
    """The slack is in pixels of the image and of the first view."""
    x, y = sources(warp2, height, width)
    in_image = within(x, y, 0.5 + slack / width, 0.5 + slack / height)
    scale, shift = (np.asarray(v, np.float64) for v in warp1)
    x = scale[:, None] * x + shift[:, :1]
    y = scale[:, None] * y + shift[:, 1:]
    across, down = (0.5 - (0.5 - slack) / size for size in (width, height))
    return in_image & within(x, y, across, down)


def within(x, y, across, down):
    return (np.abs(x) <= across)[:, None, :] & (np.abs(y) <= down)[:, :, None]


def test_pixels_seen_by_both_are_in_the_image_and_between_pixels_of_the_first_view():
    warp1, warp2 = some_warps(1, n=500), some_warps(2, n=500)
    actual = np.asarray(seen_by_both(warp1, warp2, HEIGHT, WIDTH))
    surely = seen_by_both_oracle(warp1, warp2, HEIGHT, WIDTH)
    at_most = seen_by_both_oracle(warp1, warp2, HEIGHT, WIDTH, slack=3e-3)
    assert np.all(actual[surely])
    assert not np.any(actual[~at_most])
    assert 0.2 < surely.mean() < 0.8


def test_invariance_is_zero_for_features_that_are_linear_in_the_position():
    warp1, warp2 = some_warps(1), some_warps(2)
    features1 = f32(ramp(*sources(warp1, HEIGHT, WIDTH)))
    features2 = f32(ramp(*sources(warp2, HEIGHT, WIDTH)))
    assert invariance(features1, features2, warp1, warp2) < 2e-6
    assert invariance(features1, features2, warp2, warp1) > 0.1
    assert invariance(features1, features1, warp1, warp2) > 0.1


def test_invariance_equals_its_definition():
    warp1, warp2 = some_warps(1), some_warps(2)
    features1, features2 = rng().normal(size=(2, 3, HEIGHT, WIDTH, 2))
    moved = warp_oracle(features1, relative(warp2, warp1))
    shared = seen_by_both_oracle(warp1, warp2, HEIGHT, WIDTH)
    expected = np.abs(moved - features2)[shared].mean()
    actual = invariance(f32(features1), f32(features2), warp1, warp2)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_invariance_has_no_gradient_in_its_target_and_none_without_overlap():
    warp1, warp2 = some_warps(1), some_warps(2)
    features1, features2 = f32(rng().normal(size=(2, 3, HEIGHT, WIDTH, 2)))
    gradients = jax.jit(jax.grad(depth_losses.invariance, argnums=(0, 1)))
    gradient1, gradient2 = gradients(features1, features2, warp1, warp2)
    assert np.any(gradient1 != 0)
    assert np.all(gradient2 == 0)
    # Left and right half of the images, enlarged, and hardly anything in common.
    left = Warp(jnp.full(3, 4.0), f32([[1.5, 0.0]] * 3))
    right = Warp(jnp.full(3, 4.0), f32([[-1.5, 0.0]] * 3))
    assert invariance(features1, features2, left, right) == 0
    gradient1, _ = gradients(features1, features2, left, right)
    assert np.all(gradient1 == 0)


# Metrics.


def some_directions(n=3, height=HEIGHT, width=WIDTH):
    focal = jnp.linspace(0.7, 1.2, n)
    return warp_directions(focal, depth_views.identity(n), height, width)


def metrics_oracle(depth_hat, directions_hat, depth, directions, max_depth, grid):
    valid = depth > 0
    d_hat, d = depth_hat[valid], depth[valid]
    e = np.log(d_hat) - np.log(d)
    on_grid = np.zeros_like(valid)
    on_grid[grid] = True
    on_grid &= valid
    hat = depth_hat[on_grid][:, None] * directions_hat[on_grid]
    true = depth[on_grid][:, None] * directions[on_grid]
    distances = np.linalg.norm(hat[:, None] - true[None], axis=-1)
    there, back = distances.min(1), distances.min(0)
    scores = []
    for t in np.linspace(0, max_depth / 20, 101)[1:]:
        p, r = np.mean(there < t), np.mean(back < t)
        scores.append(2 * p * r / (p + r) if p + r else 0)
    return {
        "A.Rel": np.mean(np.abs(d_hat - d) / d),
        "RMS": np.sqrt(np.mean((d_hat - d) ** 2)),
        "RMSlog": np.sqrt(np.mean(e**2)),
        "delta1": np.mean(np.maximum(d_hat / d, d / d_hat) < 1.25),
        "SIlog": 100 * np.std(e),
        "CD": (there.mean() + back.mean()) / 2,
        "FA": 100 * np.mean(scores),
    }


@pytest.mark.parametrize(
    ("height", "width", "grid"),
    [
        (HEIGHT, WIDTH, np.s_[:, :]),
        (33, 48, np.s_[1::3, 1::3]),  # 11 x 16 points; every second would be 408
    ],
)
def test_metrics_equal_their_definitions_image_by_image(height, width, grid):
    depth = some_depth(3, height, width)
    depth_hat = np.where(depth > 0, depth, 5) * np.exp(
        rng().normal(0, 0.2, depth.shape)
    )
    directions = np.asarray(some_directions(3, height, width), np.float64)
    directions_hat = directions * [1.1, 0.95, 1.0]
    arguments = depth_hat, directions_hat, depth, directions
    actual = depth_metrics(*(f32(x) for x in arguments), max_depth=60.0)
    assert set(actual) == set(depth_task.METRICS)
    for i in range(3):
        expected = metrics_oracle(
            depth_hat[i],
            directions_hat[i],
            depth[i],
            directions[i],
            60.0,
            grid,
        )
        for name, value in expected.items():
            np.testing.assert_allclose(actual[name][i], value, rtol=2e-5, err_msg=name)
    means = depth_task.mean_metrics(actual, f32(depth))
    np.testing.assert_allclose(means["CD"], np.mean(actual["CD"]), rtol=1e-6)


def test_metrics_of_a_perfect_prediction():
    depth, directions = f32(some_depth()), some_directions()
    depth_hat = jnp.where(depth > 0, depth, 7.0)
    metrics = depth_metrics(depth_hat, directions, depth, directions)
    for name in ("A.Rel", "RMS", "RMSlog", "SIlog", "CD"):
        np.testing.assert_allclose(metrics[name], 0, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(metrics["delta1"], 1)
    np.testing.assert_allclose(metrics["FA"], 100, rtol=1e-6)


def test_metrics_of_a_wrong_scale():
    depth, directions = f32(some_depth()), some_directions()
    depth_hat = 1.3 * jnp.where(depth > 0, depth, 7.0)
    metrics = depth_metrics(depth_hat, directions, depth, directions)
    np.testing.assert_allclose(metrics["A.Rel"], 0.3, rtol=1e-5)
    np.testing.assert_allclose(metrics["RMSlog"], np.log(1.3), rtol=1e-5)
    np.testing.assert_allclose(metrics["delta1"], 0)
    np.testing.assert_allclose(metrics["SIlog"], 0, atol=1e-4)
    d = np.ma.masked_equal(depth, 0)
    np.testing.assert_allclose(
        metrics["RMS"], 0.3 * np.sqrt((d**2).mean((1, 2))), rtol=1e-5
    )
    assert np.all(metrics["CD"] > 0)
    assert np.all(metrics["FA"] < 100)


def two_points(*hat):
    """Metrics of two predicted points, given that (0, 0, 1) and (2, 0, 1) are true."""
    directions_hat = f32(hat)[None, None]
    directions = f32([[0, 0, 1], [2, 0, 1]])[None, None]
    ones = jnp.ones((1, 1, 2))
    metrics = depth_metrics(ones, directions_hat, ones, directions, max_depth=20.0)
    return metrics["CD"].item(), metrics["FA"].item()


def test_clouds_of_two_points_both_beside_the_true_ones():
    distance, area = two_points((0, 0.305, 1), (2, -0.305, 1))
    np.testing.assert_allclose(distance, 0.305, rtol=1e-6)
    np.testing.assert_allclose(area, 70, rtol=1e-6)  # thresholds of 0.31 to 1 m


def test_clouds_of_two_points_that_miss_one_of_the_true_ones():
    distance, area = two_points((0, 0, 1), (0, 0, 1))
    np.testing.assert_allclose(distance, (0 + (0 + 2) / 2) / 2, rtol=1e-6)
    np.testing.assert_allclose(area, 100 * 2 / 3, rtol=1e-6)  # precision 1, recall 1/2


def test_clouds_out_of_reach():
    distance, area = two_points((0, 5, 1), (2, 5, 1))
    np.testing.assert_allclose(distance, 5, rtol=1e-6)
    assert area == 0


def test_images_without_a_valid_pixel_are_left_out_of_the_means():
    depth, directions = f32(some_depth()).at[1].set(0.0), some_directions()
    depth_hat = 1.3 * jnp.where(depth > 0, depth, 7.0)
    metrics = depth_metrics(depth_hat, directions, depth, directions)
    means = depth_task.mean_metrics(metrics, depth)
    for name, values in metrics.items():
        assert np.isnan(values[1]), name
        np.testing.assert_allclose(
            means[name], np.mean(np.asarray(values)[[0, 2]]), rtol=1e-6, err_msg=name
        )


def test_a_prediction_that_is_not_finite_shows_in_the_means():
    depth, directions = f32(some_depth()), some_directions()
    depth_hat = jnp.where(depth > 0, depth, 7.0).at[0].set(jnp.nan)
    metrics = depth_metrics(depth_hat, directions, depth, directions)
    means = depth_task.mean_metrics(metrics, depth)
    for name in ("A.Rel", "RMS", "RMSlog", "SIlog", "CD"):
        assert not np.isfinite(means[name]), name
    # No pixel is close: these are as bad as can be, but for the perfect images.
    np.testing.assert_allclose(means["delta1"], 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(means["FA"], 200 / 3, rtol=1e-6)


def test_all_of_it_runs_under_vmap():
    warps1, warps2 = (
        jax.tree.map(lambda *x: jnp.stack(x), *map(some_warps, seeds))
        for seeds in (range(4), range(4, 8))
    )
    images = f32(rng().uniform(1, 2, (3, HEIGHT, WIDTH, 2)))
    focal = jnp.ones(3)

    def one_run(warp1, warp2):
        view = depth_views.warp_images(images, warp1)
        depth = depth_views.warp_depth(images[..., 0], warp1)
        directions = depth_views.warp_directions(focal, warp1, HEIGHT, WIDTH)
        return {
            "silog": depth_losses.silog(jnp.log(view[..., 0]), depth),
            "invariance": depth_losses.invariance(view, images, warp1, warp2),
            **depth_task.depth_metrics(depth + 0.1, directions, depth, directions),
        }

    together = jax.jit(jax.vmap(one_run))(warps1, warps2)
    warp1, warp2 = jax.tree.map(lambda x: x[2], (warps1, warps2))
    view = warp_oracle(np.asarray(images, np.float64), warp1)
    depth = np.asarray(warp_depth(images[..., 0], warp1))
    expected = silog_oracle(np.log(view[..., 0]), depth)
    np.testing.assert_allclose(together["silog"][2], expected, rtol=1e-4)
    expected = invariance(f32(view), images, warp1, warp2)
    np.testing.assert_allclose(together["invariance"][2], expected, rtol=1e-4)
    np.testing.assert_allclose(together["RMS"], 0.1, rtol=1e-4)
    assert all(together[name].shape == (4, 3) for name in depth_task.METRICS)
