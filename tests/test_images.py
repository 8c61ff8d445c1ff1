"""Grids by hand."""

from __future__ import annotations

from PIL import Image

from gcpo_t2i.images import enlarge, sample_grid

RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_enlarge_by_a_whole_factor() -> None:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    big = enlarge(image, least=3)  # 1 px high → factor 3
    assert big.size == (6, 3)
    assert big.getpixel((2, 2)) == RED and big.getpixel((3, 0)) == BLUE
    assert enlarge(big, least=3).size == (6, 3)


def test_every_image_is_in_the_grid_and_rows_may_differ_in_length() -> None:
    rows = [
        ("two reds", [Image.new("RGB", (100, 100), RED)] * 2, [0.0, 1.0]),
        ("one blue", [Image.new("RGB", (100, 100), BLUE)], None),
    ]
    counts = {color: n for n, color in sample_grid(rows).getcolors(1 << 20) or []}
    assert counts[RED] == 20_000 and counts[BLUE] == 10_000
