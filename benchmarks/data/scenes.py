"""Procedural 3-D scenes with exact depth, camera and segmentation.

A scene is a textured ground with buildings, boxes, balls and poles on it, in the open
or inside a room, under one light and seen by a pinhole camera. Every pixel is ray cast,
so depth and labels are exact. Sizes and textures come in metres from the same ranges in
all families: they, the ground and the lens tell the scale of what an image shows.

Coordinates are x to the right, y down and z forward. The ground is y = 0 in the world,
where z runs along the street and x across it, from its middle.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.data.cameras import angles_of

Key = jax.Array
Range = tuple[float, float]

CLASSES = ("sky", "ground", "building", "box", "ball", "pole")
SKY, GROUND, BUILDING, BOX, BALL, POLE = range(len(CLASSES))
FAMILIES = ("street", "yard", "room")
FAR = 60.0  # metres along the optical axis; what is beyond counts as sky


class Domain(NamedTuple):
    """What scenes look like: probabilities of the families, and ranges (low, high)."""

    families: tuple[float, float, float]  # in the order of FAMILIES
    field_of_view: Range = (50.0, 75.0)  # horizontal, degrees
    pitch: Range = (-3.0, 12.0)  # degrees, positive looks down
    roll: Range = (-3.0, 3.0)  # degrees
    height: Range = (1.2, 1.9)  # of the camera, metres
    sun: Range = (25.0, 70.0)  # elevation outdoors, degrees
    ambient: Range = (0.4, 0.6)  # share of the light that casts no shadow
    visibility: Range = (35.0, 90.0)  # scale of the haze outdoors, metres
    noise: Range = (0.005, 0.02)  # standard deviation of the sensor's noise


_OUTDOORS = (0.5, 0.5, 0.0)
_ROOM = (0.0, 0.0, 1.0)
_WIDE = (80.0, 100.0)

DOMAINS = {
    "train": Domain(_OUTDOORS),
    "street": Domain((1.0, 0.0, 0.0)),
    "yard": Domain((0.0, 1.0, 0.0)),
    "room": Domain(_ROOM),
    "lens": Domain(_OUTDOORS, field_of_view=_WIDE),
    "both": Domain(_ROOM, field_of_view=_WIDE),
}
"""For training ``train`` (``street`` and ``yard`` are its two halves); for zero-shot
tests ``room``, a family never seen, ``lens``, a field of view never seen, and
``both``."""


class Scenes(NamedTuple):
    images: jax.Array  # float32 [n, h, w, 3], from 0 to 1
    depth: jax.Array  # float32 [n, h, w], metres along the optical axis; 0 in the sky
    labels: jax.Array  # int32 [n, h, w], index into CLASSES
    focal: jax.Array  # float32 [n], focal length in image widths


def render(key: Key, n: int, domain: Domain, height: int, width: int) -> Scenes:
    """Draw ``n`` random scenes of a domain.

    Domains of one size of image share a compiled program. Images of another size show
    the same scenes. Domains that differ in their ranges alone show, for one key, the
    same scenes with other values in these ranges.

    Args:
      key: For all of them; scene i depends on the key and on i alone.
      n: Number of scenes.
      domain: What they look like.
      height: In pixels.
      width: In pixels.
    """
    keys = _keys(key, n)
    scenes = _draw_scenes(keys, jax.tree.map(jnp.float32, domain))
    return _photograph_scenes(keys, scenes, height, width)


# The camera.


def ray_directions(focal: jax.Array, height: int, width: int) -> jax.Array:
    """Directions through the centres of the pixels, with z = 1.

    Args:
      focal: Focal lengths [...] in image widths. Pixels are square and the principal
        point is the centre of the image.
      height: In pixels.
      width: In pixels.

    Returns:
      [..., height, width, 3] in camera coordinates.
    """
    x = (jnp.arange(width, dtype=jnp.float32) + 0.5 - width / 2) / width
    y = (jnp.arange(height, dtype=jnp.float32) + 0.5 - height / 2) / width
    y, x = jnp.meshgrid(y, x, indexing="ij")
    focal = jnp.asarray(focal)[..., None, None]
    shape = (*focal.shape[:-2], height, width)
    x, y = (jnp.broadcast_to(v, shape) / focal for v in (x, y))
    return jnp.stack([x, y, jnp.ones_like(x)], axis=-1)


def ray_angles(focal: jax.Array, height: int, width: int) -> jax.Array:
    """Azimuth and elevation (positive is down) of the pixels' rays, in radians.

    Returns:
      [..., height, width, 2] for focal lengths [...].
    """
    return angles_of(ray_directions(focal, height, width))


def unproject(depth: jax.Array, focal: jax.Array) -> jax.Array:
    """Points [..., h, w, 3] in metres for depths [..., h, w], in camera coordinates."""
    return depth[..., None] * ray_directions(focal, *depth.shape[-2:])


# What there is in a scene. All solids stand on the ground and lie in one list: the
# ground itself (a box whose top is y = 0), the shell (a box seen from inside: walls and
# ceiling, or far beyond sight outdoors), buildings, boxes, balls and poles.

_BUILDINGS, _BOXES, _BALLS, _POLES = 8, 6, 5, 5
_SMALL = _BOXES + _BALLS + _POLES
_FIRST_BALL = 2 + _BUILDINGS + _BOXES
_FIRST_POLE = _FIRST_BALL + _BALLS
_LABELS = np.repeat(
    [GROUND, BUILDING, BUILDING, BOX, BALL, POLE],
    [1, 1, _BUILDINGS, _BOXES, _BALLS, _POLES],
).astype(np.int32)
_AWAY = -1e3  # where solids go that a scene does not have, behind the camera


class _Solid(NamedTuple):
    """A box, ball or upright cylinder."""

    x: jax.Array  # centre, metres
    y: jax.Array
    z: jax.Array
    half_x: jax.Array  # half of its size; the radius of balls and cylinders
    half_y: jax.Array
    half_z: jax.Array
    cos: jax.Array  # of its turn around the vertical
    sin: jax.Array


class _Material(NamedTuple):
    """Rows of rectangles of one colour on another, and grain."""

    inside: jax.Array  # colour [3] of the rectangles
    outside: jax.Array  # colour [3] between them
    period_u: jax.Array  # metres along the row
    period_v: jax.Array  # metres across the rows
    shift: jax.Array  # of every other row, in periods
    fill_u: jax.Array  # size of the rectangles, in periods
    fill_v: jax.Array
    grain: jax.Array  # amplitude, relative to the colour
    grain_period: jax.Array  # metres
    seed: jax.Array  # uint32, of the grain


class _Camera(NamedTuple):
    focal: jax.Array
    x: jax.Array  # position in the world, metres
    y: jax.Array
    rotation: jax.Array  # [3, 3], from camera to world


class _Light(NamedTuple):
    """One lamp, or the sun: a lamp far away that does not fade with distance."""

    x: jax.Array
    y: jax.Array
    z: jax.Array
    reach: jax.Array  # metres at which it is half as bright
    ambient: jax.Array
    color: jax.Array  # [3]


class _Air(NamedTuple):
    horizon: jax.Array  # colour [3] of the sky there, and of the haze
    zenith: jax.Array  # colour [3]
    clouds: jax.Array  # amount, from 0 to 1
    visibility: jax.Array
    noise: jax.Array
    seed: jax.Array  # uint32


class _Road(NamedTuple):
    half_width: jax.Array  # metres, negative if there is no road
    asphalt: jax.Array  # colour [3]
    paint: jax.Array  # colour [3]


class _Scene(NamedTuple):
    camera: _Camera
    light: _Light
    air: _Air
    road: _Road
    solids: _Solid  # [solids] each
    materials: _Material  # [solids] each


class _Dice:
    """Random numbers, all drawn at once: one key for each would compile slowly."""

    def __init__(self, key: Key, count: int) -> None:
        self._numbers = jax.random.uniform(key, (count,))
        self._used = 0

    def uniform(
        self, bounds: Range = (0.0, 1.0), shape: tuple[int, ...] = ()
    ) -> jax.Array:
        start, self._used = self._used, self._used + math.prod(shape)
        low, high = bounds
        numbers = self._numbers[start : self._used].reshape(shape)
        return low + (high - low) * numbers

    def log_uniform(self, bounds: Range, shape: tuple[int, ...] = ()) -> jax.Array:
        low, high = map(math.log, bounds)
        return jnp.exp(self.uniform((low, high), shape))

    def chance(self, probability: float, n: int) -> jax.Array:
        return self.uniform(shape=(n,)) < probability

    def side(self, n: int) -> jax.Array:
        """Left or right: -1 or 1, [n]."""
        return jnp.where(self.chance(0.5, n), -1.0, 1.0)

    def spread(self, n: int) -> jax.Array:
        """``n`` numbers from 0 to 1 in random order, one in each n-th."""
        return (jnp.argsort(self.uniform(shape=(n,))) + self.uniform(shape=(n,))) / n

    def choose(self, shares: jax.Array) -> jax.Array:
        """Indices [...] for relative frequencies [..., choices]."""
        upto = jnp.cumsum(shares, axis=-1)
        upto = upto / upto[..., -1:]
        return jnp.sum(
            self.uniform(shape=shares.shape[:-1])[..., None] >= upto, axis=-1
        )

    def seeds(self, shape: tuple[int, ...] = ()) -> jax.Array:
        return (self.uniform(shape=shape) * 2**24).astype(jnp.uint32)


@functools.partial(jax.jit, static_argnames="n")
def _keys(key: Key, n: int) -> Key:
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(n))


@jax.jit
def _draw_scenes(keys: Key, domain: Domain) -> _Scene:
    return jax.vmap(_draw_scene, in_axes=(0, None))(keys, domain)


def _draw_scene(key: Key, domain: Domain) -> _Scene:
    dice = _Dice(jax.random.fold_in(key, 0), 1024)
    family = dice.choose(jnp.stack(domain.families))
    indoors = family == FAMILIES.index("room")
    layouts = [draw(dice) for draw in (_street, _yard, _room)]
    layout = jax.tree.map(lambda *x: jnp.stack(x)[family], *layouts)

    focal = 0.5 / jnp.tan(jnp.radians(dice.uniform(domain.field_of_view)) / 2)
    pitch, roll = (
        jnp.radians(dice.uniform(bounds)) for bounds in (domain.pitch, domain.roll)
    )
    camera = _Camera(
        focal,
        layout.camera_x,
        -dice.uniform(domain.height),
        _rotation(layout.yaw, pitch, roll),
    )

    elevation = jnp.radians(dice.uniform(domain.sun))
    azimuth = dice.uniform((0.0, 2 * math.pi))
    sun = 1e4 * jnp.stack(
        [
            jnp.cos(elevation) * jnp.sin(azimuth),
            -jnp.sin(elevation),
            jnp.cos(elevation) * jnp.cos(azimuth),
        ]
    )
    warmth = dice.uniform((-0.08, 0.08))
    exposure = dice.uniform((0.85, 1.15))
    light = _Light(
        *jnp.where(indoors, layout.lamp, sun),
        reach=jnp.where(indoors, 6.0, 1e9),
        ambient=dice.uniform(domain.ambient),
        color=exposure * jnp.stack([1 + warmth, jnp.ones(()), 1 - warmth]),
    )

    grey = dice.uniform((0.65, 0.95))
    air = _Air(
        horizon=grey * jnp.array([0.95, 0.98, 1.0]),
        zenith=dice.uniform((0.45, 0.85)) * jnp.array([0.6, 0.8, 1.05]),
        clouds=dice.uniform(),
        visibility=jnp.where(indoors, 1e3, dice.uniform(domain.visibility)),
        noise=dice.uniform(domain.noise),
        seed=dice.seeds(),
    )

    road = _Road(
        layout.road,
        asphalt=dice.uniform((0.25, 0.5)) * jnp.array([1.0, 1.0, 1.03]),
        paint=dice.uniform((0.7, 0.95)) * jnp.array([1.0, 1.0, 0.95]),
    )
    materials = _draw_materials(dice, indoors)
    return _Scene(camera, light, air, road, layout.solids, materials)


def _rotation(yaw: jax.Array, pitch: jax.Array, roll: jax.Array) -> jax.Array:
    """From camera to world: first roll, then pitch (down), then yaw (to the right)."""

    def turn(angle: jax.Array, a: int, b: int) -> jax.Array:
        """From axis ``a`` towards axis ``b``."""
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return (
            jnp.eye(3)
            .at[[a, b, a, b], [a, b, b, a]]
            .set(jnp.stack([cos, cos, -sin, sin]))
        )

    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return product(product(turn(yaw, 2, 0), turn(pitch, 2, 1)), turn(roll, 0, 1))


# Layouts of the families.


class _Layout(NamedTuple):
    solids: _Solid  # [solids] each
    camera_x: jax.Array  # metres
    yaw: jax.Array  # of the camera, radians
    road: jax.Array  # half of its width, metres; negative if there is none
    lamp: jax.Array  # position [3], metres; only for rooms


class _Plan(NamedTuple):
    """Where solids stand, [solids] each."""

    x: jax.Array
    z: jax.Array
    turn: jax.Array  # radians
    half: jax.Array  # [solids, 3]
    there: jax.Array  # bool


def _outdoors() -> _Plan:
    """A shell that no ray reaches."""
    far = jnp.full((1, 3), 1e4)
    zero = jnp.zeros(1)
    return _Plan(zero, zero, zero, far, zero == 0)


def _build(shell: _Plan, buildings: _Plan, small: _Plan) -> _Solid:
    """All solids, standing on the ground."""
    zero = jnp.zeros(1)
    ground = _Plan(zero, zero, zero, jnp.array([[1e4, 1.0, 1e4]]), zero == 0)
    plan = jax.tree.map(
        lambda *parts: jnp.concatenate(parts), ground, shell, buildings, small
    )
    half_x, half_y, half_z = plan.half.T
    # The top of the ground is its surface, and the shell reaches 1 m below it.
    i = jnp.arange(len(half_y))
    y = jnp.where(i == 0, half_y, jnp.where(i == 1, 1.0, 0.0) - half_y)
    return _Solid(
        plan.x,
        y,
        jnp.where(plan.there, plan.z, _AWAY),
        half_x,
        half_y,
        half_z,
        jnp.cos(plan.turn),
        jnp.sin(plan.turn),
    )


def _small_sizes(dice: _Dice, tallest_pole: float) -> jax.Array:
    """Half sizes of boxes, balls and poles, [solids, 3]."""
    boxes = dice.log_uniform((0.2, 0.8), (_BOXES, 3))
    balls = dice.log_uniform((0.2, 0.7), (_BALLS,))
    radii = dice.uniform((0.06, 0.15), (_POLES,))
    heights = dice.log_uniform((0.45, tallest_pole / 2), (_POLES,))
    return jnp.concatenate(
        [
            boxes,
            jnp.stack([balls, balls, balls], axis=1),
            jnp.stack([radii, heights, radii], axis=1),
        ]
    )


def _street(dice: _Dice) -> _Layout:
    """Along a road, with rows of buildings left and right."""
    road = dice.uniform((2.8, 4.5))

    # Buildings follow each other on both sides, with gaps, [side, number along it].
    rows = (2, _BUILDINGS // 2)
    pavement = dice.uniform((2.0, 4.5), (2, 1))
    half_z = dice.uniform((4.0, 9.0), rows)
    gap = jnp.maximum(0.0, dice.uniform((-3.0, 5.0), rows))
    end = jnp.cumsum(2 * half_z + gap, axis=1) + dice.uniform((-6.0, 6.0), (2, 1))
    half_x = jnp.full(rows, 5.0)
    half_y = dice.uniform((2.5, 7.0), rows)
    setback = dice.uniform((0.0, 0.8), rows)
    side = jnp.array([[-1.0], [1.0]])
    buildings = _Plan(
        x=(side * (road + pavement + setback + half_x)).ravel(),
        z=(end - half_z).ravel(),
        turn=jnp.zeros(_BUILDINGS),
        half=jnp.stack([half_x, half_y, half_z], axis=-1).reshape(-1, 3),
        there=dice.chance(0.9, _BUILDINGS),
    )

    # Poles line the kerb, most else stands on the pavement, some on the road.
    half = _small_sizes(dice, 5.5)
    side = dice.side(_SMALL)
    across = dice.uniform((-2.2, 1.6), (_SMALL,))
    across = jnp.where(jnp.arange(_SMALL) < _BOXES + _BALLS, across, 0.3)
    small = _Plan(
        x=side * (road + across),
        z=3.0 * 9.0 ** dice.spread(_SMALL),
        turn=dice.uniform((-0.4, 0.4), (_SMALL,)),
        half=half,
        there=dice.chance(0.75, _SMALL),
    )
    return _Layout(
        _build(_outdoors(), buildings, small),
        camera_x=dice.uniform((-0.6, 0.6)) * road,
        yaw=dice.uniform((-0.3, 0.3)),
        road=road,
        lamp=jnp.zeros(3),
    )


def _yard(dice: _Dice) -> _Layout:
    """Open ground with scattered things, and a few buildings behind."""
    distance = dice.uniform((20.0, 48.0), (_BUILDINGS,))
    bearing = 1.2 * (2 * dice.spread(_BUILDINGS) - 1)
    low, high = jnp.array([3.0, 2.0, 3.0]), jnp.array([7.0, 5.0, 7.0])
    size = dice.uniform(shape=(_BUILDINGS, 3))
    buildings = _Plan(
        x=distance * jnp.sin(bearing),
        z=distance * jnp.cos(bearing),
        turn=dice.uniform((0.0, math.pi), (_BUILDINGS,)),
        half=jax.vmap(lambda size: low + (high - low) * size)(size),
        there=dice.chance(0.5, _BUILDINGS),
    )
    bearing = 0.8 * (2 * dice.spread(_SMALL) - 1)
    distance = dice.log_uniform((3.0, 27.0), (_SMALL,))
    small = _Plan(
        x=distance * jnp.sin(bearing),
        z=distance * jnp.cos(bearing),
        turn=dice.uniform((0.0, math.pi), (_SMALL,)),
        half=_small_sizes(dice, 5.5),
        there=dice.chance(0.85, _SMALL),
    )
    return _Layout(
        _build(_outdoors(), buildings, small),
        camera_x=jnp.zeros(()),
        yaw=jnp.zeros(()),
        road=-jnp.ones(()),
        lamp=jnp.zeros(3),
    )


def _room(dice: _Dice) -> _Layout:
    """Between four walls and under a ceiling."""
    half_x = dice.uniform((1.8, 3.5))
    front = dice.uniform((4.0, 7.5))
    back = -2.0
    ceiling = dice.uniform((2.4, 3.2))
    middle = (front + back) / 2
    shell = _Plan(
        x=jnp.zeros(1),
        z=middle[None],
        turn=jnp.zeros(1),
        half=jnp.stack([half_x, (ceiling + 1.0) / 2, (front - back) / 2])[None],
        there=jnp.ones(1, bool),
    )
    half = _small_sizes(dice, 2.3)
    # Things keep clear of the camera, and stand along walls as often as not.
    margin = jnp.maximum(half[:, 0], half[:, 2])
    x = 1.6 * (2 * dice.spread(_SMALL) - 1) * half_x
    z = 1.8 + 1.2 * (front - 1.8) * dice.spread(_SMALL)
    small = _Plan(
        x=jnp.clip(x, margin - half_x, half_x - margin),
        z=jnp.minimum(z, front - margin),
        turn=math.pi / 2 * dice.chance(0.5, _SMALL),
        half=half,
        there=dice.chance(0.55, _SMALL),
    )
    nowhere = jnp.zeros(_BUILDINGS)
    return _Layout(
        _build(
            shell,
            _Plan(nowhere, nowhere, nowhere, jnp.ones((_BUILDINGS, 3)), nowhere > 0),
            small,
        ),
        camera_x=dice.uniform((-0.3, 0.3)) * half_x,
        yaw=dice.uniform((-0.5, 0.5)),
        road=-jnp.ones(()),
        lamp=jnp.stack(
            [
                dice.uniform((-0.4, 0.4)) * half_x,
                0.25 - ceiling,
                middle + dice.uniform((-1.0, 1.0)),
            ]
        ),
    )


# Materials.

# period u and v (m), shift, fill u and v, tone inside and outside, share of a second
# colour outside
_PATTERNS = {
    "plain": (1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0),
    "bricks": (0.5, 0.2, 0.5, 0.92, 0.85, 1.0, 0.65, 0.3),
    "windows": (2.4, 3.0, 0.0, 0.5, 0.55, 0.35, 1.0, 0.0),
    "panels": (1.2, 1.2, 0.0, 0.93, 0.93, 1.0, 0.6, 0.0),
    "slabs": (0.6, 0.6, 0.0, 0.92, 0.92, 1.0, 0.65, 0.2),
    "checks": (0.8, 0.4, 0.5, 0.5, 1.0, 1.0, 1.0, 0.8),
    "stripes": (1.0, 0.4, 0.0, 1.0, 0.5, 1.0, 1.0, 0.9),
    "planks": (2.4, 0.2, 0.4, 0.99, 0.9, 1.0, 0.6, 0.0),
}
_USES = {  # by class, how often a pattern is used; ground and walls also indoors
    "ground": {"plain": 4, "slabs": 3, "checks": 1, "bricks": 1},
    "floor": {"plain": 1, "slabs": 2, "checks": 1, "planks": 3},
    "building": {"plain": 1, "windows": 6, "bricks": 2, "panels": 1},
    "wall": {"plain": 4, "bricks": 1, "panels": 1, "stripes": 1},
    "box": {"plain": 3, "planks": 3, "panels": 1, "bricks": 1, "checks": 1},
    "ball": {"plain": 3, "stripes": 2, "checks": 2},
    "pole": {"plain": 4, "stripes": 2},
}
_SATURATION = {  # how far colours of a class are from grey, at most
    "ground": 0.25,
    "floor": 0.3,
    "building": 0.3,
    "wall": 0.25,
    "box": 0.7,
    "ball": 0.8,
    "pole": 0.35,
}


def _tables(indoors: bool) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the patterns [solids, patterns], saturation [solids]."""
    names = [CLASSES[label] for label in _LABELS]
    names[0] = "floor" if indoors else "ground"
    names[1] = "wall"
    uses = np.array([[_USES[n].get(p, 0) for p in _PATTERNS] for n in names])
    saturation = np.array([_SATURATION[n] for n in names])
    return uses.astype(np.float32), saturation.astype(np.float32)


def _draw_materials(dice: _Dice, indoors: jax.Array) -> _Material:
    solids = len(_LABELS)
    uses, saturation = (
        jnp.where(indoors, *both)
        for both in zip(_tables(True), _tables(False), strict=True)
    )
    pattern = dice.choose(uses)
    drawn = jnp.asarray(list(_PATTERNS.values()), jnp.float32)[pattern].T
    period_u, period_v, shift, fill_u, fill_v, tone, other_tone, share = drawn

    def colors() -> jax.Array:
        hue = dice.uniform(shape=(solids, 1))
        wheel = jnp.cos(2 * math.pi * (hue - jnp.array([[0.0, 1 / 3, 2 / 3]])))
        strength = saturation * dice.uniform(shape=(solids,))
        value = dice.uniform((0.25, 0.75), (solids,))
        return value[:, None] * (1 + strength[:, None] * wheel)

    first, second = colors(), colors()
    stretch = dice.uniform((0.85, 1.15), (solids,))
    return _Material(
        inside=first * tone[:, None],
        outside=other_tone[:, None] * (first + share[:, None] * (second - first)),
        period_u=period_u * stretch,
        period_v=period_v * stretch,
        shift=shift,
        fill_u=fill_u,
        fill_v=fill_v,
        grain=dice.uniform((0.1, 0.45), (solids,)),
        grain_period=dice.log_uniform((0.2, 0.5), (solids,)),
        seed=dice.seeds((solids,)),
    )


# Ray casting. The functions below are about one ray and one solid: scalars, so that
# vmap lays the rays out along the fastest axis.


class _Ray(NamedTuple):
    """The points x + t dx, y + t dy, z + t dz with t > 0."""

    x: jax.Array
    y: jax.Array
    z: jax.Array
    dx: jax.Array
    dy: jax.Array
    dz: jax.Array


_IN_PIXEL = np.array(  # of its rays, the first is for depth and label
    [[0, 0, 0], [-0.3, -0.1, 0], [0.1, -0.3, 0], [0.3, 0.1, 0], [-0.1, 0.3, 0]],
    np.float32,
)

_Span = tuple[jax.Array, jax.Array]


def _to_solid(ray: _Ray, solid: _Solid) -> _Ray:
    """The ray as seen from the middle of the solid, along its sides."""
    x, z = ray.x - solid.x, ray.z - solid.z
    return _Ray(
        solid.cos * x - solid.sin * z,
        ray.y - solid.y,
        solid.sin * x + solid.cos * z,
        solid.cos * ray.dx - solid.sin * ray.dz,
        ray.dy,
        solid.sin * ray.dx + solid.cos * ray.dz,
    )


def _slab(x: jax.Array, dx: jax.Array, half: jax.Array) -> _Span:
    """From where to where the ray is between two parallel planes."""
    inverse = 1.0 / jnp.where(jnp.abs(dx) < 1e-9, 1e-9, dx)
    middle, reach = -x * inverse, half * jnp.abs(inverse)
    return middle - reach, middle + reach


def _disc(toward: jax.Array, square: jax.Array, miss: jax.Array, r: jax.Array) -> _Span:
    """From where to where the ray is in a ball or a round column.

    Args:
      toward: - position · direction.
      square: |direction|².
      miss: Square of the distance at which the line passes the centre.
      r: Radius.
    """
    inside = r**2 - miss
    reach = jnp.sqrt(jnp.maximum(inside, 0.0) / square)
    near, far = toward / square - reach, toward / square + reach
    return jnp.where(inside > 0, near, jnp.inf), jnp.where(inside > 0, far, -jnp.inf)


def _cross_box(ray: _Ray, solid: _Solid) -> _Span:
    ray = _to_solid(ray, solid)
    spans = (
        _slab(ray.x, ray.dx, solid.half_x),
        _slab(ray.y, ray.dy, solid.half_y),
        _slab(ray.z, ray.dz, solid.half_z),
    )
    (a, b), (c, d), (e, f) = spans
    return jnp.maximum(jnp.maximum(a, c), e), jnp.minimum(jnp.minimum(b, d), f)


def _cross_ball(ray: _Ray, solid: _Solid) -> _Span:
    x, y, z = ray.x - solid.x, ray.y - solid.y, ray.z - solid.z
    square = ray.dx**2 + ray.dy**2 + ray.dz**2
    toward = -(x * ray.dx + y * ray.dy + z * ray.dz)
    t = toward / square
    miss = (x + t * ray.dx) ** 2 + (y + t * ray.dy) ** 2 + (z + t * ray.dz) ** 2
    return _disc(toward, square, miss, solid.half_x)


def _cross_pole(ray: _Ray, solid: _Solid) -> _Span:
    x, z = ray.x - solid.x, ray.z - solid.z
    square = jnp.maximum(ray.dx**2 + ray.dz**2, 1e-12)
    toward = -(x * ray.dx + z * ray.dz)
    miss = (x * ray.dz - z * ray.dx) ** 2 / square
    near, far = _disc(toward, square, miss, solid.half_x)
    bottom, top = _slab(ray.y - solid.y, ray.dy, solid.half_y)
    return jnp.maximum(near, bottom), jnp.minimum(far, top)


def _entries(rays: _Ray, solids: _Solid) -> jax.Array:
    """Where rays enter solids, or infinity: [solids but ground and shell, rays]."""

    def entry(
        cross: Callable[[_Ray, _Solid], _Span], first: int, last: int
    ) -> jax.Array:
        some = jax.tree.map(lambda x: x[first:last], solids)
        over_rays = jax.vmap(cross, in_axes=(0, None))
        near, far = jax.vmap(over_rays, in_axes=(None, 0))(rays, some)
        return jnp.where((near < far) & (near > 1e-3), near, jnp.inf)

    return jnp.concatenate(
        [
            entry(_cross_box, 2, _FIRST_BALL),
            entry(_cross_ball, _FIRST_BALL, _FIRST_POLE),
            entry(_cross_pole, _FIRST_POLE, len(_LABELS)),
        ]
    )


def _cast(rays: _Ray, solids: _Solid) -> tuple[jax.Array, jax.Array]:
    """Where rays meet the first surface, and which solid that is of, [rays] each."""
    shell = jax.tree.map(lambda x: x[1], solids)
    down = rays.dy > 1e-6
    on_ground = jnp.where(down, -rays.y / jnp.where(down, rays.dy, 1.0), jnp.inf)
    _, out = jax.vmap(_cross_box, in_axes=(0, None))(rays, shell)
    t = jnp.concatenate([on_ground[None], out[None], _entries(rays, solids)])
    return jnp.min(t, axis=0), jnp.argmin(t, axis=0)


# Shading.


class _Surface(NamedTuple):
    """Where a ray meets a solid, in the world and on its texture."""

    x: jax.Array
    y: jax.Array
    z: jax.Array
    normal_x: jax.Array  # towards the viewer
    normal_y: jax.Array
    normal_z: jax.Array
    u: jax.Array  # metres along the surface
    v: jax.Array
    width_u: jax.Array  # what a pixel covers of it, metres
    width_v: jax.Array


def _meet(
    ray: _Ray, t: jax.Array, pixel: jax.Array, label: jax.Array, solid: _Solid
) -> _Surface:
    """The surface at ``t``, where rays of neighbouring pixels are ``t pixel`` apart."""
    local = _to_solid(ray, solid)
    x, y, z = (local.x + t * local.dx, local.y + t * local.dy, local.z + t * local.dz)
    ball, pole = label == BALL, label == POLE

    # The face of a box is the one that the point reaches furthest.
    a, b, c = (
        jnp.abs(x / solid.half_x),
        jnp.abs(y / solid.half_y),
        jnp.abs(z / solid.half_z),
    )
    around = jnp.hypot(x, z)
    level = b > jnp.where(pole, around / solid.half_x, jnp.maximum(a, c))
    level = level & ~ball
    first = (a > c) & ~level
    round_ = ball | (pole & ~level)
    nx = jnp.where(round_, x, jnp.where(first, jnp.sign(x), 0.0))
    ny = jnp.where(ball | level, jnp.where(ball, y, jnp.sign(y)), 0.0)
    nz = jnp.where(round_, z, jnp.where(first | level, 0.0, jnp.sign(z)))
    length = jnp.sqrt(nx**2 + ny**2 + nz**2)
    facing = (nx * local.dx + ny * local.dy + nz * local.dz) / length
    scale = jnp.where(facing > 0, -1.0, 1.0) / length
    nx, ny, nz = nx * scale, ny * scale, nz * scale

    u = jnp.where(first, z, x)
    u = jnp.where(round_, solid.half_x * jnp.arctan2(x, z), u)
    height = -(ray.y + t * ray.dy)
    v = jnp.where(level, z, height)

    # A pixel sees a disc across the ray, which the surface stretches along the ray.
    slant = jnp.maximum(jnp.abs(facing), 0.01)
    along_u = jnp.where(first, local.dz, local.dx) / slant
    along_v = jnp.where(level, local.dz, local.dy) / slant
    across = 1.0 / slant
    size = t * pixel
    width_u = size * jnp.where(round_, across, jnp.sqrt(1 + along_u**2))
    width_v = size * jnp.where(ball, across, jnp.sqrt(1 + along_v**2))
    return _Surface(
        ray.x + t * ray.dx,
        -height,
        ray.z + t * ray.dz,
        solid.cos * nx + solid.sin * nz,
        ny,
        solid.cos * nz - solid.sin * nx,
        u,
        v,
        width_u,
        width_v,
    )


def _pulses(x: jax.Array, width: jax.Array, fill: jax.Array) -> jax.Array:
    """Share of [x - width/2, x + width/2] in the intervals [i, i + fill]."""

    def integral(x: jax.Array) -> jax.Array:
        return jnp.floor(x) * fill + jnp.minimum(x - jnp.floor(x), fill)

    width = jnp.maximum(width, 1e-2)
    return (integral(x + width / 2) - integral(x - width / 2)) / width


def _value_noise(u: jax.Array, v: jax.Array, seed: jax.Array) -> jax.Array:
    """Smooth noise from -1 to 1 that changes over distances of 1."""
    i, j = jnp.floor(u), jnp.floor(v)

    def corner(di: int, dj: int) -> jax.Array:
        a = (i.astype(jnp.int32) + di).astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
        b = (j.astype(jnp.int32) + dj).astype(jnp.uint32) * jnp.uint32(0x85EBCA77)
        bits = (a ^ b ^ seed) * jnp.uint32(0x27D4EB2F)
        bits = (bits ^ (bits >> 15)) * jnp.uint32(0x2C1B3C6D)
        return (bits >> 9).astype(jnp.float32) * (2.0 / 2**23) - 1.0

    s, t = u - i, v - j
    s, t = s * s * (3 - 2 * s), t * t * (3 - 2 * t)
    top = corner(0, 0) + s * (corner(1, 0) - corner(0, 0))
    bottom = corner(0, 1) + s * (corner(1, 1) - corner(0, 1))
    return top + t * (bottom - top)


def _texture(material: _Material, at: _Surface) -> jax.Array:
    """Colour [3] of the surface, averaged over what a pixel covers."""
    row = at.v / material.period_v
    odd = jnp.floor(row) - 2 * jnp.floor(row / 2)
    share = _pulses(
        at.u / material.period_u + odd * material.shift,
        at.width_u / material.period_u,
        material.fill_u,
    ) * _pulses(row, at.width_v / material.period_v, material.fill_v)
    color = material.outside + share * (material.inside - material.outside)
    return color * (1 + material.grain * _grain(material, at))


def _grain(material: _Material, at: _Surface) -> jax.Array:
    """Noise of two sizes, less of it where a pixel covers much."""
    total = jnp.zeros_like(at.u)
    for octave, size in enumerate((1.0, 5.0)):
        period = size * material.grain_period
        noise = _value_noise(
            at.u / period, at.v / period, material.seed + jnp.uint32(octave)
        )
        cover = at.width_u * at.width_v / period**2
        total = total + 0.5 * noise / (1 + 2 * cover)
    return total


def _paint_road(road: _Road, color: jax.Array, at: _Surface) -> jax.Array:
    """Asphalt between two lines, with dashes in the middle."""

    def band(x: jax.Array, half: float | jax.Array) -> jax.Array:
        """Share of the pixel with |x| < half."""
        width = jnp.maximum(at.width_u, 1e-3)
        low, high = jnp.maximum(x - width / 2, -half), jnp.minimum(x + width / 2, half)
        return jnp.maximum(high - low, 0.0) / width

    dashes = band(at.x, 0.08) * _pulses(at.z / 6.0, at.width_v / 6.0, jnp.float32(0.5))
    lines = band(jnp.abs(at.x) - road.half_width + 0.25, 0.07)
    asphalt = road.asphalt * (color / jnp.maximum(jnp.mean(color), 0.1)) ** 0.5
    asphalt = asphalt + jnp.minimum(dashes + lines, 1.0) * (road.paint - asphalt)
    return color + band(at.x, road.half_width) * (asphalt - color)


def _sky(air: _Air, ray: _Ray) -> jax.Array:
    """Colour [3] in the direction of the ray."""
    up = -ray.dy / jnp.sqrt(ray.dx**2 + ray.dy**2 + ray.dz**2)
    up = jnp.maximum(up, 0.0)
    color = air.horizon + jnp.sqrt(up) * (air.zenith - air.horizon)
    height = up + 0.15
    clouds = _value_noise(1.5 * ray.dx / height, 1.5 * ray.dz / height, air.seed)
    clouds = clouds + 0.5 * _value_noise(
        4 * ray.dx / height, 4 * ray.dz / height, air.seed + jnp.uint32(1)
    )
    share = air.clouds * jnp.clip(clouds, 0.0, 0.8) * jnp.minimum(1.0, 4 * up)
    return color + share * (0.95 - color)


def _look(camera: _Camera, directions: jax.Array) -> _Ray:
    """Rays in the world for directions [rays, 3] of the camera."""
    # Sums of products: matrix products may be of low precision on accelerators.
    x, y, z = directions.T
    dx, dy, dz = (a * x + b * y + c * z for a, b, c in camera.rotation)
    x, y, z = (jnp.full(dx.shape, x) for x in (camera.x, camera.y, 0.0))
    return _Ray(x, y, z, dx, dy, dz)


def _illuminate(light: _Light, at: _Surface, solids: _Solid) -> jax.Array:
    """Brightness [rays]."""
    x, y, z = light.x - at.x, light.y - at.y, light.z - at.z
    distance = jnp.sqrt(x**2 + y**2 + z**2)
    x, y, z = x / distance, y / distance, z / distance
    lambert = at.normal_x * x + at.normal_y * y + at.normal_z * z
    fade = 1.0 / (1.0 + (distance / light.reach) ** 2)
    # The ray to the light starts off the surface, lest that shades itself.
    gap = 0.005
    to_light = _Ray(
        at.x + gap * at.normal_x,
        at.y + gap * at.normal_y,
        at.z + gap * at.normal_z,
        *(x, y, z),
    )
    free = jnp.min(_entries(to_light, solids), axis=0) > distance
    direct = jnp.where(free, jnp.maximum(lambert, 0.0), 0.0) * fade
    # Surfaces that face up get more of the ambient light.
    around = 1 - 0.25 * at.normal_y
    return 1.4 * (1 - light.ambient) * direct + light.ambient * around


def _shade(
    rays: _Ray, scene: _Scene, pixel: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Colour [rays, 3] that arrives at the camera, depth [rays] and label [rays]."""
    t, which = _cast(rays, scene.solids)
    seen = t < FAR
    t = jnp.minimum(t, FAR)
    solid, material = jax.tree.map(lambda x: x[which], (scene.solids, scene.materials))
    label = jnp.asarray(_LABELS)[which]
    at = jax.vmap(_meet, in_axes=(0, 0, None, 0, 0))(rays, t, pixel, label, solid)
    color = jax.vmap(_texture)(material, at)
    road = jax.vmap(_paint_road, in_axes=(None, 0, 0))(scene.road, color, at)
    color = jnp.where(label[:, None] == GROUND, road, color)
    brightness = _illuminate(scene.light, at, scene.solids)
    color = color * scene.light.color[None] * brightness[:, None]

    horizon = scene.air.horizon[None]
    clear = jnp.exp(-((t / scene.air.visibility) ** 2))
    color = horizon + clear[:, None] * (color - horizon)
    sky = jax.vmap(_sky, in_axes=(None, 0))(scene.air, rays)
    return (
        jnp.where(seen[:, None], color, sky),
        jnp.where(seen, t, 0.0),
        jnp.where(seen, label, SKY),
    )


def _photograph(key: Key, scene: _Scene, height: int, width: int) -> Scenes:
    """One scene, with means of the colours over each pixel."""
    focal = scene.camera.focal
    pixel = 1.0 / (focal * width)
    directions = ray_directions(focal, height, width).reshape(1, -1, 3)
    directions = directions + pixel * jnp.asarray(_IN_PIXEL)[:, None]
    rays = _look(scene.camera, directions.reshape(-1, 3))
    color, depth, label = (
        x.reshape(len(_IN_PIXEL), height, width, *x.shape[1:])
        for x in _shade(rays, scene, pixel)
    )
    image = jnp.mean(color, axis=0)
    image = image + scene.air.noise * jax.random.normal(key, image.shape)
    return Scenes(jnp.clip(image, 0.0, 1.0), depth[0], label[0], focal)


@functools.partial(jax.jit, static_argnames=("height", "width"))
def _photograph_scenes(keys: Key, scenes: _Scene, height: int, width: int) -> Scenes:
    # One image after the other: side by side, their rays would fill the memory.
    return jax.lax.map(
        lambda both: _photograph(both[0], both[1], height, width),
        (jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys), scenes),
    )
