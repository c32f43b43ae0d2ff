# SPDX-License-Identifier: Apache-2.0
import collections
import dataclasses

import numpy as np
import pytest

from stvdm.data import kinetic_shapes
from stvdm.data.kinetic_scene import AREA, Background, Scene, Thing
from stvdm.data.kinetic_shapes import MOTIONS, World, canonical_caption, ground_truth, held_out, render, sample_scene

GREY = Background("plain", ((90.0, 90.0, 90.0), (90.0, 90.0, 90.0)))
BALL = Thing("red", "ball", "right", radius=0.15, position=(-0.3, 0.1), velocity=(0.3, 0.0))


def scene_of(*things, **fields):
    return Scene(things, GREY, "a caption", **fields)


def redness(video_THWC):
    """How far each pixel has gone from the grey background towards the thing's red, 0 to 1."""
    return (video_THWC[..., 0].astype(np.float64) - 90) / (224 - 90)


def test_the_same_index_gives_the_same_scene_and_other_indices_others():
    scenes = [sample_scene(3, index) for index in range(50)]
    assert scenes == [sample_scene(3, index) for index in range(50)]
    assert len(set(scenes)) == 50
    assert sample_scene(4, 0) != scenes[0] and sample_scene(3, 0, split="validation") != scenes[0]
    np.testing.assert_array_equal(render(scenes[7]), render(sample_scene(3, 7)))


def test_a_known_scene_is_what_it_was():
    """Data made today must be the data of the bundled model; if this changes, so must the world's version."""
    assert [sample_scene(0, index).caption for index in range(3)] == [
        "a red triangle slides to the right",
        "three things: a cyan square grows, a magenta triangle moves towards the left "
        "and a green ball leaves the frame on the right and comes back",
        "a yellow ball slides downwards",
    ]


def test_held_out_combinations_are_only_in_the_test_split():
    for split in ("train", "validation"):
        for index in range(300):
            assert not any(held_out(thing.combination) for thing in sample_scene(0, index, split=split).things)
    scenes = [sample_scene(0, index, split="test") for index in range(300)]
    assert all(any(held_out(thing.combination) for thing in scene.things) for scene in scenes)
    assert np.mean([held_out(thing.combination) for scene in scenes for thing in scene.things]) > 0.95


def test_a_tenth_is_held_out_and_every_colour_shape_and_motion_stays_frequent():
    world = World()
    grid = [(c, s, m) for c in world.colours for s in world.shapes for m in world.motions]
    held = [combination for combination in grid if held_out(combination)]
    assert 0.08 < len(held) / len(grid) < 0.12
    assert not held_out(("red", "ball", "bounce_right"))  # the sentence of the README
    things = [thing for index in range(600) for thing in sample_scene(0, index).things]
    for field, num in (("colour", 6), ("shape", 3), ("motion", 15)):
        counts = collections.Counter(getattr(thing, field) for thing in things)
        assert len(counts) == num and min(counts.values()) > 0.4 * len(things) / num


def test_the_world_keeps_its_probabilities():
    world = World(num_things=(0.5, 0.3, 0.2), occluder=0.3, pan=0.2)
    scenes = [sample_scene(0, index, world=world) for index in range(600)]
    counts = np.bincount([len(scene.things) for scene in scenes], minlength=4)[1:] / 600
    np.testing.assert_allclose(counts, world.num_things, atol=0.06)
    assert abs(np.mean([scene.bar is not None for scene in scenes]) - 0.3 * 0.8) < 0.05
    assert abs(np.mean([scene.camera[0] != 0 for scene in scenes]) - 0.2 * (1 - 0.3 * 0.8)) < 0.05
    assert not any(scene.bar and scene.camera[0] for scene in scenes)
    assert all(len({thing.colour for thing in scene.things}) == len(scene.things) for scene in scenes)


def test_things_stay_in_the_frame_rarely_touch_and_do_what_they_are_for():
    hidden = []
    for index in range(300):
        scene = sample_scene(1, index)
        visibility = ground_truth(scene)["visibility"]
        for thing, seen in zip(scene.things, visibility, strict=True):
            if scene.bar is not None or MOTIONS[thing.motion].kind == "return":
                assert seen[0] > 0.9 and seen[-1] > 0.9 and seen.min() < 0.1, (index, thing)
            elif not scene.camera[0]:
                hidden.append(seen.min())
    assert np.mean(np.asarray(hidden) < 0.9) < 0.03 and np.median(hidden) > 0.99


def test_a_bounce_is_energy_lost_only_at_the_floor():
    thing = Thing(
        "red", "square", "bounce_right", 0.1, (0.0, -0.3), (0.2, 0.0), gravity=3.0, restitution=0.8, floor=0.45
    )
    seconds = np.linspace(0, 3, 3001)
    x, y = thing.path(seconds).T
    rest = 0.45 - 0.09
    np.testing.assert_allclose(x, 0.2 * seconds)
    assert y.max() <= rest + 1e-9 and rest - y.max() < 1e-3
    acceleration = np.diff(y, 2) / 1e-6
    smooth = np.abs(acceleration) < 100
    np.testing.assert_allclose(acceleration[smooth], 3.0, atol=1e-4)
    assert 2 <= (~smooth).sum() <= 10  # one or two samples a contact
    peaks = rest - y[1:-1][(np.diff(y)[:-1] < 0) & (np.diff(y)[1:] >= 0)]
    np.testing.assert_allclose(peaks[0] / (rest + 0.3), 0.8**2, atol=1e-3)
    np.testing.assert_allclose(peaks[1] / peaks[0], 0.8**2, atol=1e-3)


def test_a_bounce_that_dies_away_rests_on_the_floor():
    thing = Thing("red", "ball", "bounce_in_place", 0.1, (0.0, 0.2), gravity=3.0, restitution=0.3, floor=0.45)
    assert thing.path(np.asarray([5.0]))[0, 1] == pytest.approx(0.35)


@pytest.mark.parametrize("shape", kinetic_shapes.SHAPES)
@pytest.mark.parametrize("height, width", [(64, 64), (48, 96)])
def test_pixels_agree_with_the_truth(shape, height, width):
    scene = scene_of(dataclasses.replace(BALL, shape=shape), camera=(0.1, 0.0))
    cover = redness(render(scene, 9, height, width, 8))
    truth = ground_truth(scene, 9, height, width, 8)
    rows, columns = np.mgrid[:height, :width]
    mass = cover.sum((1, 2))
    centre = np.stack([(cover * columns).sum((1, 2)), (cover * rows).sum((1, 2))], -1) / mass[:, None]
    np.testing.assert_allclose(centre, truth["tracks"][0], atol=0.1)
    np.testing.assert_allclose(mass, AREA[shape] * truth["radius"][0] ** 2, rtol=0.05)
    np.testing.assert_allclose(truth["visibility"], 1, atol=0.05)


def test_a_scene_knows_no_resolution():
    scene = next(s for s in (sample_scene(0, i) for i in range(100)) if s.camera[0] and len(s.things) == 2)
    small, large = ground_truth(scene, 5, 32, 32, 4), ground_truth(scene, 17, 128, 128, 16)
    np.testing.assert_allclose((small["tracks"] + 0.5) * 4, large["tracks"][:, ::4] + 0.5, rtol=1e-4)
    pooled = render(scene, 17, 128, 128, 16)[::4].reshape(5, 32, 4, 32, 4, 3).mean((2, 4))
    assert np.abs(pooled - render(scene, 5, 32, 32, 4)).mean() < 1.5


def test_a_bar_hides_and_visibility_says_so():
    scene = scene_of(dataclasses.replace(BALL, position=(-0.3, 0.0)), bar=(0.0, 0.32))
    truth = ground_truth(scene, 17, 64, 64, 8)
    cover = redness(render(scene, 17, 64, 64, 8))
    cover[:, :, 21:43] = 0  # the bar is lighter than the background
    np.testing.assert_allclose(cover.sum((1, 2)) / cover.sum((1, 2))[0], truth["visibility"][0], atol=0.05)
    assert truth["visibility"][0, 0] > 0.95 and truth["visibility"][0, 8] < 0.02 and truth["visibility"][0, 16] > 0.95


def test_later_things_are_in_front():
    other = dataclasses.replace(BALL, colour="blue", velocity=(0.0, 0.0), position=(0.0, 0.1))
    truth = ground_truth(scene_of(BALL, other), 17, 64, 64, 8)
    assert truth["visibility"][0].min() < 0.1 and truth["visibility"][1].min() > 0.95
    assert (render(scene_of(BALL, other), 17, 64, 64, 8)[8, 38, 32] == kinetic_shapes.COLOURS["blue"]).all()


def test_a_pan_moves_the_background_by_the_camera():
    stripes = Background("stripes", ((60.0,) * 3, (120.0,) * 3), period=0.25)
    still, panned = Scene((), stripes, ""), Scene((), stripes, "", camera=(0.125, 0.0))  # one pixel a frame
    video = render(panned, 9, 64, 64, 8)
    np.testing.assert_array_equal(video[0], render(still, 1, 64, 64, 8)[0])
    for t in range(9):
        np.testing.assert_allclose(video[t, :, : 64 - t].astype(int), video[0, :, t:].astype(int), atol=1)


def test_captions_say_what_how_many_and_where_to():
    words = set()
    for index in range(300):
        scene = sample_scene(5, index)
        words |= set(scene.caption.replace(",", "").replace(":", "").split())
        for text in (scene.caption, canonical_caption(scene)):
            for thing in scene.things:
                assert thing.colour in text and any(noun in text for noun in kinetic_shapes.SHAPES[thing.shape].nouns)
                motion = MOTIONS[thing.motion]
                assert motion.x == 0 or ("left" if motion.x < 0 else "right") in text
                assert motion.y == 0 or ("up" if motion.y < 0 else "down") in text
                assert motion.kind != "bounce" or "bounces" in text
                assert motion.kind != "return" or "comes back" in text or "returns" in text
            assert ("camera pans" in text) == (scene.camera[0] != 0)
            assert ("behind a grey bar" in text) == (scene.bar is not None)
    assert len(words) < 70
    thing = dataclasses.replace(BALL, motion="bounce_right")
    assert canonical_caption(scene_of(thing)) == "a red ball bounces to the right"
    world = World(("red",), ("ball",), ("bounce_right",), (1.0,), (1.0,))
    assert canonical_caption(scene_of(thing)) in {sample_scene(0, index, world=world).caption for index in range(30)}


def test_json_round_trip():
    for index in range(60):
        scene = sample_scene(2, index, split="test")
        assert Scene.from_json(scene.to_json()) == scene


def test_errors_teach():
    with pytest.raises(ValueError, match=r"colours=\('orange',\).*motion_weights.*occluder=2"):
        World(colours=("orange",), motion_weights=(1.0,), occluder=2)
    with pytest.raises(ValueError, match="split='val': expected 'train', 'validation' or 'test'"):
        sample_scene(0, 0, split="val")
    with pytest.raises(ValueError, match="seed=-1: expected a whole number of at least 0"):
        sample_scene(-1, 0)
    with pytest.raises(ValueError, match="held_out=1.0: leaves this split no"):
        sample_scene(0, 0, world=World(held_out=1.0))
    assert World(radius=[0.1, 0.2]) == World(radius=(0.1, 0.2))  # as JSON and config files write it


def test_a_small_world_still_works():
    world = World(colours=("red",), shapes=("ball",), motions=("grow",), motion_weights=(1,), num_things=(1,))
    assert all(sample_scene(0, index, world=world).things[0].motion == "grow" for index in range(20))


def test_records_hold_the_whole_truth(tmp_path):
    from stvdm.data import kinetic_shapes_tfds as on_disk

    def config():
        return on_disk.KineticShapesConfig(num_frames=5, height=16, width=24, fps=4, seed=9, num_clips={"test": 7})

    directory = on_disk.write(tmp_path, config())
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*record*")}
    assert before and on_disk.write(tmp_path, config()) == directory
    assert before == {path: path.stat().st_mtime_ns for path in directory.rglob("*record*")}
    source = on_disk.read(directory, split="test")
    examples = {example["index"]: example for example in map(on_disk.decode, source)}
    assert sorted(examples) == list(range(7))
    for index, example in examples.items():
        assert example["scene"] == sample_scene(9, index, split="test")
        assert example["caption"] == example["scene"].caption
        np.testing.assert_array_equal(example["video"], render(example["scene"], 5, 16, 24, 4))
    other = dataclasses.replace(World(), pan=0.5)
    assert on_disk.KineticShapesConfig(world=other).name != on_disk.KineticShapesConfig().name
    with pytest.raises(ValueError, match="num_clips"):
        on_disk.KineticShapesConfig(num_clips={"val": 3})
    with pytest.raises(ValueError, match="expected what write"):
        on_disk.read(tmp_path)
