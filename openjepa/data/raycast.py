"""How a scene of simple things looks: ray casting in NumPy, to pixels, masks and depths.

Spheres, cubes and cylinders of two materials stand on a ground plane under a lamp with soft shadows, seen in perspective.
Lengths are CLEVR's units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

SHAPES = ("sphere", "cube", "cylinder")
MATERIALS = ("rubber", "metal")
COLORS = {
    "gray": (0.34, 0.34, 0.34),
    "red": (0.68, 0.14, 0.14),
    "blue": (0.16, 0.29, 0.84),
    "green": (0.11, 0.41, 0.08),
    "brown": (0.51, 0.29, 0.10),
    "purple": (0.51, 0.15, 0.75),
    "cyan": (0.16, 0.82, 0.82),
    "yellow": (1.0, 0.93, 0.20),
}
BLACK, WHITE = (0.02, 0.02, 0.02), (1.0, 1.0, 1.0)
PALETTE = np.array([*COLORS.values(), BLACK, WHITE], dtype=np.float32)
TEXTURES = {"plain": 0.0, "patchwork": 0.6, "checks": 0.7, "stripes": 0.5}  # side of their cells, in radii
FIELD = math.radians(44)  # of view, of the shorter side
SUPERSAMPLE = 2  # rays a pixel, on each axis
LAMP_RADIUS = 0.7
GROUND = np.array([0.60, 0.60, 0.61], dtype=np.float32)
AMBIENT = 0.38


@dataclass(frozen=True)
class Object:
    """One thing on the ground. shape, color, material: indices; radius, x, y: units; turn: radians about its axis.

    texture: an index, 0 for the one colour that usual objects have.
    """

    shape: int
    radius: float
    color: int
    material: int
    x: float
    y: float
    turn: float
    texture: int = 0

    @property
    def height(self) -> float:
        return 2 * self.half if SHAPES[self.shape] == "cube" else 2 * self.radius

    @property
    def half(self) -> float:
        """Half the side of a cube whose corners stand on the circle."""
        return self.radius / math.sqrt(2)


@dataclass(frozen=True)
class Scene:
    """What stands where, and from where it is seen. eye: the camera; view: rows right, up, forward; lamp: its centre."""

    objects: list[Object]
    eye: np.ndarray
    view: np.ndarray
    lamp: np.ndarray

    def depth(self, thing: Object) -> float:
        """Distance of an object's centre along the view, CLEVR's pixel_coords[2]."""
        return float(self.view[2] @ (np.array([thing.x, thing.y, thing.height / 2]) - self.eye))


# ---------------------------------------------------------------- ray casting

Vector = tuple[Any, Any, Any]  # three float32 arrays, or numbers


def local(thing: Object, p: Vector, direction: bool = False) -> Vector:
    """World to the frame of an object: its foot at the origin, turned to its axes."""
    c, s = np.float32(math.cos(thing.turn)), np.float32(math.sin(thing.turn))
    x, y = (p[0], p[1]) if direction else (p[0] - np.float32(thing.x), p[1] - np.float32(thing.y))
    return c * x + s * y, c * y - s * x, p[2]


def span(thing: Object, o: Vector, d: Vector) -> tuple[np.ndarray, np.ndarray]:
    """Where rays o + t d (in the object's frame) enter and leave it; enter > leave where they miss."""
    shape = SHAPES[thing.shape]
    if shape == "sphere":
        oz = o[2] - np.float32(thing.radius)
        a = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
        b = o[0] * d[0] + o[1] * d[1] + oz * d[2]
        root = b * b - a * (o[0] * o[0] + o[1] * o[1] + oz * oz - np.float32(thing.radius**2))
        return roots(a, b, root)
    low, high = slab(o[2], d[2], 0.0, thing.height)
    if shape == "cylinder":
        a = d[0] * d[0] + d[1] * d[1]
        b = o[0] * d[0] + o[1] * d[1]
        root = b * b - a * (o[0] * o[0] + o[1] * o[1] - np.float32(thing.radius**2))
        enter, leave = roots(a, b, root)
        return np.maximum(enter, low), np.minimum(leave, high)
    for i in (0, 1):
        enter, leave = slab(o[i], d[i], -thing.half, thing.half)
        low, high = np.maximum(low, enter), np.minimum(high, leave)
    return low, high


def roots(a: np.ndarray, b: np.ndarray, discriminant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solutions of a t² + 2 b t + c = 0; an empty span where there are none."""
    root = np.sqrt(np.maximum(discriminant, 0))
    inverse = 1 / a
    return np.where(discriminant > 0, (-b - root) * inverse, np.float32(np.inf)), (root - b) * inverse


def slab(o: Any, d: Any, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Where rays are between two parallel planes."""
    inverse = 1 / np.where(np.abs(d) < 1e-8, np.float32(1e-8), d)
    first, second = (np.float32(low) - o) * inverse, (np.float32(high) - o) * inverse
    return np.minimum(first, second), np.maximum(first, second)


def normals(thing: Object, p: Vector) -> Vector:
    """Outward normals, in the object's frame, at points on its surface."""
    shape, r = SHAPES[thing.shape], np.float32(thing.radius)
    if shape == "sphere":
        return p[0] / r, p[1] / r, (p[2] - r) / r
    top = p[2] > thing.height - 1e-3
    if shape == "cylinder":
        return np.where(top, 0, p[0] / r), np.where(top, 0, p[1] / r), top.astype(np.float32)
    along_x = (np.abs(p[0]) > np.abs(p[1])) & ~top
    along_y = ~along_x & ~top
    return along_x * np.sign(p[0]), along_y * np.sign(p[1]), top.astype(np.float32)


def painted(thing: Object, p: Vector) -> np.ndarray:
    """The colour's index in PALETTE at points in the object's frame: cells of a cubic lattice, or layers."""
    texture = list(TEXTURES)[thing.texture]
    if texture == "plain":
        return np.full(len(p[0]), thing.color)
    side = np.float32(TEXTURES[texture] * thing.radius)
    x, y, z = (np.floor(c / side).astype(np.int64) for c in p)
    if texture == "patchwork":  # of all colours but its own
        return (thing.color + 1 + (7 * x + 3 * y + 5 * z) % (len(COLORS) - 1)) % len(COLORS)
    return len(COLORS) + (z if texture == "stripes" else x + y + z) % 2


@dataclass(frozen=True)
class Hits:
    """What each ray of a picture meets first.

    d: directions, three arrays that broadcast to [rows, columns], scaled so that t is the depth along the view. depth:
    float32 [rows, columns]; normal, albedo: float32 [3, rows, columns]; metal: bool; owner: int8, an object's number or -1
    for the ground.
    """

    d: Vector
    depth: np.ndarray
    normal: np.ndarray
    albedo: np.ndarray
    metal: np.ndarray
    owner: np.ndarray
    focal: float  # in rays


def cast(scene: Scene, rows: int, columns: int) -> Hits:
    """One ray through the middle of each cell."""
    focal = min(rows, columns) / 2 / math.tan(FIELD / 2)
    right, up, forward = scene.view.astype(np.float32)
    u = ((np.arange(columns, dtype=np.float32) + 0.5 - columns / 2) / focal)[None, :]
    v = ((rows / 2 - np.arange(rows, dtype=np.float32) - 0.5) / focal)[:, None]
    d: Vector = tuple((forward[i] + u * right[i]) + v * up[i] for i in range(3))  # forward . d = 1
    eye: Vector = tuple(scene.eye.astype(np.float32))

    depth = -eye[2] / np.minimum(d[2], np.float32(-0.02))  # the ground fades before the horizon
    normal = np.zeros((3, rows, columns), dtype=np.float32)
    normal[2] = 1
    albedo = np.broadcast_to(GROUND[:, None, None], (3, rows, columns)).copy()
    metal = np.zeros((rows, columns), dtype=bool)
    owner = np.full((rows, columns), -1, dtype=np.int8)
    for number, thing in enumerate(scene.objects):
        window = bounds(scene, corners(thing), focal, (rows, columns))
        rays: Vector = tuple(c[window] for c in d)
        o, ray = local(thing, eye), local(thing, rays, direction=True)
        enter, leave = span(thing, o, ray)
        front = (enter < leave) & (enter < depth[window])
        if not front.any():
            continue
        t = enter[front]
        p: Vector = tuple(o[i] + t * np.broadcast_to(ray[i], front.shape)[front] for i in range(3))
        nx, ny, nz = normals(thing, p)
        c, s = math.cos(thing.turn), math.sin(thing.turn)
        colours = PALETTE[painted(thing, p)]
        for i, value in enumerate((c * nx - s * ny, s * nx + c * ny, nz)):
            normal[i][window][front] = value
            albedo[i][window][front] = colours[:, i]
        depth[window][front] = t
        metal[window][front] = MATERIALS[thing.material] == "metal"
        owner[window][front] = number
    return Hits(d, depth, normal, albedo, metal, owner, focal)


def render(scene: Scene, size: tuple[int, int]) -> np.ndarray:
    """Ray-cast a scene. size: (height, width) in pixels. Returns uint8 [height, width, 3]."""
    hits = cast(scene, size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE)
    eye: Vector = tuple(scene.eye.astype(np.float32))
    point: Vector = tuple(eye[i] + hits.depth * hits.d[i] for i in range(3))
    light = shadows(scene, point, hits.owner, hits.focal)
    colour = shade(scene, point, hits, light)
    n = range(SUPERSAMPLE)
    pixels = sum(colour[:, i::SUPERSAMPLE, j::SUPERSAMPLE] for i in n for j in n) / np.float32(SUPERSAMPLE**2)
    return (np.sqrt(pixels.clip(0, 1)) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)  # gamma 2


def annotate(scene: Scene, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """What stands at the middle of each pixel, and how far away.

    Returns uint8 [height, width], 0 for the ground and 1 + the shape's index, and float32 depths along the view.
    """
    hits = cast(scene, *size)
    shapes = np.array([0, *(1 + thing.shape for thing in scene.objects)], dtype=np.uint8)
    return shapes[hits.owner + 1], hits.depth


UNIT_BOX = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (0.0, 1.0)])


def corners(thing: Object) -> np.ndarray:
    """The eight corners of the box around an object. [8, 3]."""
    return UNIT_BOX * (thing.radius, thing.radius, thing.height) + (thing.x, thing.y, 0.0)


def bounds(scene: Scene, points: np.ndarray, focal: float, size: tuple[int, int]) -> tuple[slice, slice]:
    """The window of rays that sees the convex hull of some points."""
    x, y, z = scene.view @ (points - scene.eye).T
    z = np.maximum(z, 0.5)
    column, row = size[1] / 2 + focal * x / z, size[0] / 2 - focal * y / z
    return (
        slice(max(0, int(row.min()) - 1), max(0, int(row.max()) + 2)),
        slice(max(0, int(column.min()) - 1), max(0, int(column.max()) + 2)),
    )


def shadows(scene: Scene, point: Vector, owner: np.ndarray, focal: float) -> np.ndarray:
    """How much of the lamp each point sees, 0 to 1: each ray looks at its own spot of the lamp, neighbours average.

    Only the window around an object and its shadow on the ground is tested; no object here shadows itself.
    """
    rows, columns = owner.shape
    spots = lamp_spots(rows, columns)
    light = np.ones((rows, columns), dtype=np.float32)
    for number, thing in enumerate(scene.objects):
        box = corners(thing)
        away = np.maximum(scene.lamp[2] - box[:, 2], 0.5)[:, None]
        lamp = (scene.lamp + LAMP_RADIUS * SQUARE)[:, None]
        ground = box + (box - lamp) * (box[:, 2:] / away)  # [4, 8, 3]: where the box's shadow falls
        window = bounds(scene, np.concatenate([box, ground.reshape(-1, 3)]), focal, (rows, columns))
        start: Vector = tuple(c[window] for c in point)
        to_lamp: Vector = tuple(np.float32(scene.lamp[i]) + spots[i][window] - start[i] for i in range(3))
        enter, leave = span(thing, local(thing, start), local(thing, to_lamp, direction=True))
        light[window][(enter < leave) & (leave > 1e-3) & (enter < 1) & (owner[window] != number)] = 0
    return smooth(smooth(light).T).T


def smooth(x: np.ndarray) -> np.ndarray:
    """The mean of four neighbouring rows: one period of the lamp's spots."""
    y = np.concatenate([x[:1], x, x[-2:]])
    return (y[:-3] + y[1:-2] + y[2:-1] + y[3:]) * np.float32(0.25)


SQUARE = np.array([[x, y, 0.0] for x in (-1.0, 1.0) for y in (-1.0, 1.0)])


@lru_cache(maxsize=4)
def lamp_spots(rows: int, columns: int) -> np.ndarray:
    """A spot of the lamp's disc for each ray, dithered so that any 4 x 4 rays cover it evenly. [3, rows, columns]."""
    order = np.array([0, 8, 2, 10, 12, 4, 14, 6, 3, 11, 1, 9, 15, 7, 13, 5]).reshape(4, 4)  # Bayer
    radius = LAMP_RADIUS * np.sqrt((order + 0.5) / 16)
    angle = order * 2.399963  # the golden angle
    tile = np.stack([radius * np.cos(angle), radius * np.sin(angle), 0 * radius]).astype(np.float32)
    return np.tile(tile, (1, -(-rows // 4), -(-columns // 4)))[:, :rows, :columns]


def shade(scene: Scene, point: Vector, hits: Hits, light: np.ndarray) -> np.ndarray:
    """Ambient, diffuse and specular light. Returns float32 [3, rows, columns]."""
    normal = hits.normal
    lamp = [np.float32(scene.lamp[i]) - point[i] for i in range(3)]
    square = lamp[0] * lamp[0] + lamp[1] * lamp[1] + lamp[2] * lamp[2]
    facing = (normal[0] * lamp[0] + normal[1] * lamp[1] + normal[2] * lamp[2]) / np.sqrt(square)
    diffuse = light * np.maximum(facing, 0) * (90 / (30 + square))
    energy = AMBIENT * (0.75 + 0.25 * normal[2]) + 0.85 * diffuse
    colour: np.ndarray = hits.albedo * np.where(hits.metal, 0.7 * energy, energy)

    things = np.flatnonzero(hits.owner >= 0)
    n = normal.reshape(3, -1)[:, things]
    ray = np.stack([c.ravel()[things] for c in hits.d])
    ray /= np.sqrt((ray * ray).sum(0))
    mirrored = ray - 2 * (ray * n).sum(0) * n
    toward = np.stack([c.ravel()[things] for c in lamp]) / np.sqrt(square.ravel()[things])
    glint = np.maximum((mirrored * toward).sum(0), 0)
    is_metal = hits.metal.ravel()[things]
    spot = np.where(is_metal, 1.3 * glint**48, 0.18 * glint**10) * light.ravel()[things]
    sky = 0.22 * np.clip(mirrored[2] + 0.3, 0, 1) * is_metal  # what a metal reflects of its surroundings
    colour.reshape(3, -1)[:, things] += spot + sky
    return colour
