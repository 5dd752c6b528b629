import math

import numpy as np
import pytest

from openjepa.data.raycast import Object, Scene, local, normals, render, span
from openjepa.data.scenes import CLASSES, MARGIN, Scenes, compose, labels


def test_a_scene_is_a_function_of_seed_and_number():
    assert compose(0, 7).objects == compose(0, 7).objects
    assert compose(0, 7).objects != compose(1, 7).objects
    assert np.array_equal(render(compose(0, 7), (32, 32)), render(compose(0, 7), (32, 32)))


def test_objects_never_touch():
    for k in range(300):
        things = compose(0, k).objects
        for i, a in enumerate(things):
            for b in things[:i]:
                assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + MARGIN - 1e-9


def test_every_class_of_every_task_occurs():
    found = [labels(compose(0, k)) for k in range(600)]
    for task, names in CLASSES.items():
        counts = np.bincount([label[task] for label in found], minlength=len(names))
        assert len(counts) == len(names)
        assert counts.min() >= 20


def test_distance_classes_are_vtabs():
    base = compose(0, 0)
    for depth, expected in ((7.9, 0), (8.0, 0), (8.2, 1), (8.9, 2), (9.4, 3), (10.0, 4), (10.1, 5)):
        eye = np.zeros(3)
        eye[2] = 0.35
        thing = Object(0, 0.35, 0, 0, depth, 0.0, 0.0)
        view = np.array([[0, -1.0, 0], [0, 0, 1.0], [1.0, 0, 0]])
        assert labels(Scene([thing], eye, view, base.lamp))["distance"] == expected


@pytest.mark.parametrize("shape", [0, 1, 2])
def test_rays_meet_surfaces_and_normals_face_them(shape):
    thing = Object(shape, 0.7, 0, 0, 0.4, -0.3, 0.5)
    rng = np.random.default_rng(0)
    origin = np.array([5.0, -4.0, 3.0])
    aim = np.array([0.4, -0.3, 0.5]) + rng.uniform(-0.3, 0.3, (500, 3))
    d = tuple((aim - origin).T.astype(np.float32))
    o = local(thing, tuple(np.float32(c) for c in origin))
    ray = local(thing, d, direction=True)
    enter, leave = span(thing, o, ray)
    hit = enter < leave
    assert hit.mean() > 0.9
    p = tuple(o[i] + enter[hit] * ray[i][hit] for i in range(3))
    if shape == 0:
        assert np.allclose(np.sqrt(p[0] ** 2 + p[1] ** 2 + (p[2] - 0.7) ** 2), 0.7, atol=1e-3)
    n = normals(thing, p)
    assert np.allclose(sum(c * c for c in n), 1, atol=1e-2)
    assert (sum(n[i] * ray[i][hit] for i in range(3)) <= 1e-3).all()


def test_shadows_fall_on_the_ground_and_nearer_objects_hide_farther_ones():
    scene = compose(0, 0)
    thing = Object(0, 0.7, 3, 0, 0.0, 0.0, 0.0)
    empty = render(Scene([], scene.eye, scene.view, scene.lamp), (64, 64)).astype(int)
    one = render(Scene([thing], scene.eye, scene.view, scene.lamp), (64, 64)).astype(int)
    grey = np.ptp(one, axis=2) <= 6
    assert (grey & (empty.mean(2) - one.mean(2) > 25)).sum() > 10  # darker, and still the ground's grey
    toward = np.array([scene.eye[0], scene.eye[1]]) / np.hypot(*scene.eye[:2]) * 2.2
    front = Object(1, 0.7, 1, 0, *toward, 0.3)
    both = [
        render(Scene(order, scene.eye, scene.view, scene.lamp), (64, 64)) for order in ([thing, front], [front, thing])
    ]
    assert np.array_equal(*both)


@pytest.mark.parametrize("size", [(64, 64), (96, 128), (224, 224)])
def test_sizes(size):
    image = render(compose(0, 3), size)
    assert image.shape == (*size, 3)
    assert image.std() > 10


def test_the_source_reads_ranges_and_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENJEPA_CACHE", str(tmp_path))
    source, part = Scenes.from_spec("40", (32, 32)), Scenes.from_spec("30-40", (32, 32))
    assert len(source) == 40
    assert np.array_equal(source.read(35), part.read(5))
    assert source.labels["count"][35] == part.labels["count"][5]
    assert np.array_equal(Scenes.from_spec("40", (32, 32)).read(35), source.read(35))
    assert len(list(tmp_path.iterdir())) == 2
