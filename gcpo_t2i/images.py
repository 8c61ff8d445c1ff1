"""Pictures for people: labelled grids of samples."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MIN_CELL = 96  # px; smaller images are enlarged by a whole factor, so that codes stay crisp
PAD = 4
INK, PAPER = (30, 30, 30), (255, 255, 255)

Row = tuple[str, Sequence[Image.Image], Sequence[float] | None]


def enlarge(image: Image.Image, least: int = MIN_CELL) -> Image.Image:
    """The image, enlarged without smoothing by the smallest whole factor that makes both sides at least `least` px."""
    factor = max(1, -(-least // min(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def sample_grid(rows: Sequence[Row], least: int = MIN_CELL) -> Image.Image:
    """One line of images for each (prompt, images, rewards or None), the prompt above it and the reward under each."""
    drawn = [(text, [enlarge(image, least) for image in images], scores) for text, images, scores in rows]
    font = ImageFont.load_default(size=13)
    line = 18
    cell_width = max(image.width for _, images, _ in drawn for image in images) + PAD
    cell_height = max(image.height for _, images, _ in drawn for image in images)
    row_height = line + cell_height + line + PAD
    columns = max(len(images) for _, images, _ in drawn)
    longest = max(font.getlength(text) for text, _, _ in drawn)
    width = PAD + max(columns * cell_width, int(longest) + PAD)
    grid = Image.new("RGB", (width, PAD + len(drawn) * row_height), PAPER)
    pen = ImageDraw.Draw(grid)
    for r, (text, images, scores) in enumerate(drawn):
        top = PAD + r * row_height
        pen.text((PAD, top), text, INK, font)
        for c, image in enumerate(images):
            left = PAD + c * cell_width
            grid.paste(image, (left, top + line))
            if scores is not None:
                pen.text((left, top + line + cell_height), f"{scores[c]:.2f}", INK, font)
    return grid
