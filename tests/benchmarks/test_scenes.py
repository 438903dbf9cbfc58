"""The scenes are what their depth, labels and focal lengths say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.data import scenes as task

N, HEIGHT, WIDTH = 6, 24, 32  # one size, so that one program serves all tests
KEY = jax.random.key(7)


def render(name="train", key=KEY):
    return task.render(key, N, task.DOMAINS[name], HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def scenes():
    """Of every domain, as NumPy arrays."""
    return {name: jax.tree.map(np.asarray, render(name)) for name in task.DOMAINS}


@pytest.fixture(scope="module")
def drawn():
    """What stands in the scenes of every domain, before it is rendered."""
    keys = task._keys(KEY, N)
    draw = task._draw_scenes
    return {
        name: jax.tree.map(np.asarray, draw(keys, jax.tree.map(jnp.float32, domain)))
        for name, domain in task.DOMAINS.items()
    }


def directions(focal):
    """Rays through pixel centres in float64, [h, w, 3]."""
    i, j = np.mgrid[:HEIGHT, :WIDTH].astype(np.float64)
    x = (j + 0.5 - WIDTH / 2) / (WIDTH * float(focal))
    y = (i + 0.5 - HEIGHT / 2) / (WIDTH * float(focal))
    return np.stack([x, y, np.ones_like(x)], axis=-1)


def distances_to_solids(origin, rays, solids):
    """Oracle in float64: distances [solids, h, w], from equations of surfaces.

    Candidates are all crossings of all faces' planes, balls and columns; those off the
    solid are dropped. The renderer intersects intervals instead.
    """
    found = []
    for i in range(len(task._LABELS)):
        x, y, z, *half, cos, sin = (float(field[i]) for field in solids)
        turn = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
        o, d = turn @ (origin - [x, y, z]), rays @ turn.T
        with np.errstate(invalid="ignore", divide="ignore"):
            if i < task._FIRST_BALL:
                crossings = box_crossings
            elif i < task._FIRST_POLE:
                crossings = ball_crossings
            else:
                crossings = pole_crossings
            found.append(np.min(crossings(o, d, np.array(half)), axis=0))
    return np.stack(found)


# Distances [candidates, h, w] along rays o + t d to the surfaces of one solid at the
# origin, infinite where a ray misses.


def box_crossings(o, d, half):
    candidates = []
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        for side in (-1, 1):
            t = (side * half[axis] - o[axis]) / d[..., axis]
            p = o + t[..., None] * d
            inside = np.all(np.abs(p[..., others]) <= half[others], axis=-1)
            candidates.append(ahead(t, inside))
    return candidates


def ball_crossings(o, d, half):
    return [ahead(t, True) for t in round_crossings(o, d, half[0], [0, 1, 2])]


def pole_crossings(o, d, half):
    candidates = []
    for t in round_crossings(o, d, half[0], [0, 2]):
        p = o + t[..., None] * d
        candidates.append(ahead(t, np.abs(p[..., 1]) <= half[1]))
    for side in (-1, 1):
        t = (side * half[1] - o[1]) / d[..., 1]
        p = o + t[..., None] * d
        candidates.append(ahead(t, np.hypot(p[..., 0], p[..., 2]) <= half[0]))
    return candidates


def round_crossings(o, d, radius, columns):
    """Where rays meet a ball, or an endless column: roots of a quadratic equation."""
    a = (d[..., columns] ** 2).sum(-1)
    b = (o[columns] * d[..., columns]).sum(-1)
    c = (o[columns] ** 2).sum() - radius**2
    root = np.sqrt(np.where(b**2 > a * c, b**2 - a * c, np.nan))
    return (-b - root) / a, (-b + root) / a


def ahead(t, inside):
    return np.where((t > 1e-6) & inside, t, np.inf)


@pytest.mark.parametrize("name", ["street", "yard", "room", "both"])
def test_depth_and_labels_agree_with_an_independent_ray_caster(scenes, drawn, name):
    differing = 0
    for i in range(N):
        camera = drawn[name].camera
        solids = jax.tree.map(lambda x, i=i: x[i], drawn[name].solids)
        rotation = np.asarray(camera.rotation[i], np.float64)
        origin = np.array([camera.x[i], camera.y[i], 0.0])
        rays = directions(camera.focal[i]) @ rotation.T
        t = distances_to_solids(origin, rays, solids)
        depth = np.min(t, axis=0)
        label = task._LABELS[np.argmin(t, axis=0)]
        label = np.where(depth < task.FAR, label, task.SKY)
        depth = np.where(depth < task.FAR, depth, 0.0)
        same = (scenes[name].labels[i] == label) & np.isclose(
            scenes[name].depth[i], depth, rtol=1e-3, atol=1e-3
        )
        differing += np.sum(~same)
    # Rays that graze an edge may fall on its other side in float32.
    assert differing <= 2


def test_depth_of_the_ground_is_that_of_a_plane_in_closed_form(scenes, drawn):
    camera = drawn["train"].camera
    for i in range(N):
        x, y, _ = np.moveaxis(directions(camera.focal[i]), -1, 0)
        # Downward part of each ray: y-components of the rotated axes of the camera.
        right, down, ahead = np.asarray(camera.rotation[i], np.float64)[1]
        slope = right * x + down * y + ahead
        ground = scenes["train"].labels[i] == task.GROUND
        expected = -camera.y[i] / slope[ground]
        np.testing.assert_allclose(
            scenes["train"].depth[i][ground], expected, rtol=1e-3
        )


def test_the_camera_turns_down_by_its_pitch_and_right_by_its_yaw():
    pitch = 0.2
    turned = task._rotation(jnp.float32(0.7), jnp.float32(pitch), jnp.float32(0.1))
    ahead = np.asarray(turned) @ np.array([0.0, 0.0, 1.0])
    np.testing.assert_allclose(ahead[1], np.sin(pitch), rtol=1e-5)
    np.testing.assert_allclose(np.arctan2(ahead[0], ahead[2]), 0.7, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(turned) @ turned.T, np.eye(3), atol=1e-6)


def test_a_ball_ahead_is_met_at_its_front():
    one = [jnp.float32(x) for x in (0, 0, 0, 0, 0, 1)]
    ball = task._Solid(*(jnp.float32(x) for x in (0, 0, 5, 2, 2, 2, 1, 0)))
    near, far = task._cross_ball(task._Ray(*one), ball)
    np.testing.assert_allclose([near, far], [3.0, 7.0], rtol=1e-6)


def test_points_lie_on_their_rays_at_their_depths(scenes):
    some = scenes["train"]
    points = np.asarray(
        task.unproject(jnp.asarray(some.depth), jnp.asarray(some.focal))
    )
    expected = np.stack([directions(f) for f in some.focal]) * some.depth[..., None]
    np.testing.assert_allclose(points, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(points[..., 2], some.depth)


def test_angles_are_those_of_the_rays():
    focal = jnp.array([0.5, 1.0])
    angles = np.asarray(task.ray_angles(focal, HEIGHT, WIDTH), np.float64)
    azimuth, elevation = np.moveaxis(angles, -1, 0)
    unit = np.stack(
        [
            np.cos(elevation) * np.sin(azimuth),
            np.sin(elevation),
            np.cos(elevation) * np.cos(azimuth),
        ],
        axis=-1,
    )
    expected = np.stack([directions(f) for f in (0.5, 1.0)])
    expected = expected / np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(unit, expected, atol=1e-6)
    assert task.ray_angles(jnp.float32(1.0), 3, 4).shape == (3, 4, 2)


@pytest.mark.parametrize("name", task.DOMAINS)
def test_arrays_are_finite_and_of_the_promised_kind(scenes, name):
    images, depth, labels, focal = scenes[name]
    assert images.shape == (N, HEIGHT, WIDTH, 3)
    assert depth.shape == labels.shape == (N, HEIGHT, WIDTH)
    assert focal.shape == (N,)
    assert images.dtype == depth.dtype == focal.dtype == np.float32
    assert labels.dtype == np.int32
    assert np.isfinite(images).all()
    assert np.isfinite(depth).all()
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std(axis=(1, 2)).min() > 0.01


@pytest.mark.parametrize("name", task.DOMAINS)
def test_the_sky_is_where_there_is_no_depth(scenes, name):
    depth, labels = scenes[name].depth, scenes[name].labels
    np.testing.assert_array_equal(labels == task.SKY, depth == 0)
    assert depth[depth > 0].min() > 0.5
    assert depth.max() < task.FAR
    assert labels.min() >= 0
    assert labels.max() < len(task.CLASSES)


def test_all_classes_occur_outdoors_and_all_but_the_sky_in_rooms(scenes):
    assert set(np.unique(scenes["train"].labels)) == set(range(len(task.CLASSES)))
    assert set(np.unique(scenes["room"].labels)) == set(range(1, len(task.CLASSES)))


def test_rooms_are_small(scenes):
    depth = scenes["room"].depth
    assert depth.max() < 9
    assert np.median(scenes["train"].depth[scenes["train"].depth > 0]) > 5


@pytest.mark.parametrize("name", task.DOMAINS)
def test_lenses_and_cameras_stay_in_the_ranges_of_their_domain(scenes, drawn, name):
    domain, camera = task.DOMAINS[name], drawn[name].camera
    np.testing.assert_allclose(scenes[name].focal, camera.focal, rtol=1e-6)
    field_of_view = np.degrees(2 * np.arctan(0.5 / camera.focal))
    pitch = np.degrees(np.arcsin(camera.rotation[:, 1, 2]))
    for values, (low, high) in (
        (field_of_view, domain.field_of_view),
        (-camera.y, domain.height),
        (pitch, domain.pitch),
    ):
        assert values.min() >= low - 1e-3
        assert values.max() <= high + 1e-3
        assert len(np.unique(values)) == N


def test_zero_shot_domains_share_neither_family_nor_lens_with_training():
    train = task.DOMAINS["train"]
    for name, other in task.DOMAINS.items():
        new_family = all(
            a * b == 0 for a, b in zip(train.families, other.families, strict=True)
        )
        new_lens = (
            other.field_of_view[0] > train.field_of_view[1]
            or other.field_of_view[1] < train.field_of_view[0]
        )
        expected = {
            "room": (True, False),
            "lens": (False, True),
            "both": (True, True),
        }
        assert (new_family, new_lens) == expected.get(name, (False, False))


def test_a_key_gives_the_same_scenes_and_another_key_others(scenes):
    again = render()
    jax.tree.map(np.testing.assert_array_equal, again, scenes["train"])
    other = render(key=jax.random.key(8))
    assert np.all(np.asarray(other.focal) != scenes["train"].focal)


def test_more_scenes_begin_with_the_same_ones():
    few, many = (jax.random.key_data(task._keys(KEY, n)) for n in (3, N))
    np.testing.assert_array_equal(few, many[:3])


def test_things_cast_shadows():
    """Under a lamp at the zenith, a box darkens a point below it and no other."""
    fields = np.zeros((8, len(task._LABELS)), np.float32)
    fields[3:6] = 0.01
    fields[6] = 1.0
    fields[2] = task._AWAY
    fields[:6, 2] = [0, -5, 10, 1, 1, 1]
    solids = task._Solid(*map(jnp.asarray, fields))
    zero, up = jnp.zeros(2), -jnp.ones(2)
    at = task._Surface(
        jnp.array([0.0, 3.0]), zero, 10 - zero, zero, up, zero, *[zero] * 4
    )
    light = task._Light(
        *(jnp.float32(x) for x in (0, -1e4, 10, 1e9, 0.5)), color=jnp.ones(3)
    )
    dark, bright = np.asarray(jax.jit(task._illuminate)(light, at, solids))
    np.testing.assert_allclose(dark, 0.5 * 1.25, rtol=1e-6)
    np.testing.assert_allclose(bright, 0.5 * 1.25 + 0.7, rtol=1e-5)


def test_texture_is_averaged_over_the_pixel():
    """Pulses of a narrow pixel are sharp, those of a wide one their mean."""
    x = jnp.array([0.1, 0.6, 0.25, 0.3])
    width = jnp.array([0.02, 0.02, 0.1, 50.0])
    share = task._pulses(x, width, jnp.full(4, 0.25))
    np.testing.assert_allclose(share, [1, 0, 0.5, 0.25], atol=6e-3)
