"""ShapesWorld pictures and masks: pixels that can be told by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gcpo_t2i.shapes import (
    BACKGROUNDS,
    GRID,
    IMAGE_SIZE,
    PALETTE,
    SHAPES,
    SIZES,
    Object,
    Scene,
    cell_masks,
    object_masks,
    render,
    sample_scene,
    shape_mask,
    train_specs,
)
from gcpo_t2i.shapes.scenes import shape_alpha


def test_a_square_fills_its_box_and_nothing_else() -> None:
    image = render(Scene((Object("square", "red", 12, x=8, y=20),), BACKGROUNDS[1]))
    assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and image.dtype == np.uint8
    expected = np.full_like(image, 212)
    expected[20:32, 8:20] = (220, 40, 40)
    assert np.array_equal(image, expected)


def test_the_box_of_an_object_ends_where_the_next_one_could_begin() -> None:
    assert Object("ring", "blue", 16, x=4, y=12).box == (4, 12, 20, 28)


@pytest.mark.parametrize(
    ("shape", "size", "area"),
    [
        ("square", 12, 144),
        ("square", 16, 256),
        # Two bars of 0.34 · 12 = 4.08 px on each side of 0 would be 4 px wide: 2 · 4 · 12 − 4 · 4 = 80.
        ("cross", 12, 80),
        # Half of the box.
        ("triangle", 12, 72),
    ],
)
def test_areas_that_follow_from_the_definition(shape: str, size: int, area: int) -> None:
    assert shape_mask(shape, size).sum() == area


def test_round_shapes_have_the_area_of_round_shapes() -> None:
    # π · 8² = 201.1 px for the circle; the ring lacks a disc of 0.52 of its radius.
    assert shape_alpha("circle", 16).sum() == pytest.approx(math.pi * 64, rel=0.01)
    assert shape_alpha("ring", 16).sum() == pytest.approx(math.pi * 64 * (1 - 0.52**2), rel=0.01)


def test_the_tip_of_the_star_is_two_pixels_in_the_middle_of_the_second_row() -> None:
    star = shape_mask("star", 12)
    assert not star[0].any()  # the tip covers less than half of the first row's pixels
    assert np.flatnonzero(star[1]).tolist() == [5, 6]
    assert star[4].sum() == 10  # the arms
    assert not star[10, 5:7].any()  # between the legs


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_silhouettes_are_symmetric_opaque_and_distinct(shape: str, size: int) -> None:
    alpha, mask = shape_alpha(shape, size), shape_mask(shape, size)
    assert np.array_equal(alpha, alpha[:, ::-1])
    assert alpha.min() == 0.0 or shape == "square"
    assert alpha.max() == 1.0
    for other in SHAPES:
        overlap = (mask & shape_mask(other, size)).sum() / (mask | shape_mask(other, size)).sum()
        assert (overlap == 1.0) == (other == shape) and (other == shape or overlap < 0.85)


def test_an_unknown_shape_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'hexagon' is unknown; known: circle, square"):
        shape_mask("hexagon", 12)


def test_colours_are_exact_inside_and_mixed_at_the_edge() -> None:
    for color, rgb in PALETTE.items():
        image = render(Scene((Object("circle", color, 16, x=16, y=16),)))
        assert image[24, 24].tolist() == list(rgb)
        inside = shape_alpha("circle", 16) == 1.0
        assert (image[16:32, 16:32][inside] == rgb).all()
    # A pixel of coverage c is background + c · (colour − background), rounded.
    alpha = shape_alpha("circle", 16)
    y, x = np.argwhere((alpha > 0.3) & (alpha < 0.7))[0]
    mixed = 240 + alpha[y, x] * (np.array(PALETTE["brown"]) - 240)
    assert np.abs(render(Scene((Object("circle", "brown", 16, 0, 0),)))[y, x] - mixed).max() <= 0.5


def test_a_ring_shows_the_background_through_its_hole() -> None:
    assert render(Scene((Object("ring", "green", 16, 0, 0),), BACKGROUNDS[2]))[8, 8].tolist() == [184, 184, 184]


def test_later_objects_cover_earlier_ones() -> None:
    scene = Scene((Object("square", "red", 16, 0, 0), Object("square", "blue", 12, 0, 0)))
    image = render(scene)
    assert image[0, 0].tolist() == list(PALETTE["blue"]) and image[15, 15].tolist() == list(PALETTE["red"])


def test_masks_are_where_the_objects_are() -> None:
    scene = Scene((Object("square", "red", 12, x=8, y=20), Object("cross", "blue", 12, x=28, y=0)))
    square, cross = object_masks(scene)
    assert square.sum() == 144 and square[20:32, 8:20].all()
    assert cross.sum() == 80 and not cross[:4, 28:32].any()  # a cross leaves its corners free
    square_cells, cross_cells = cell_masks(scene)
    assert square_cells.shape == (GRID, GRID)
    # 12 px at (8, 20) are 3 × 3 cells of 4 px from column 2, row 5; a cross of 12 px lacks exactly the 4 corner cells.
    assert np.argwhere(square_cells).tolist() == [[y, x] for y in (5, 6, 7) for x in (2, 3, 4)]
    assert np.argwhere(cross_cells).tolist() == [[0, 8], [1, 7], [1, 8], [1, 9], [2, 8]]


def test_masks_of_sampled_scenes_are_disjoint_and_on_the_lattice() -> None:
    rng = np.random.default_rng(0)
    specs = train_specs()
    for index in rng.integers(len(specs), size=100):
        scene = sample_scene(specs[index], rng)
        assert np.sum(object_masks(scene), axis=0).max() == 1
        assert np.sum(cell_masks(scene), axis=0).max() == 1
        for obj in scene.objects:
            assert obj.x % 4 == 0 and obj.y % 4 == 0 and min(obj.box) >= 0 and max(obj.box) <= IMAGE_SIZE
