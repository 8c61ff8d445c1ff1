"""Maps side by side whose cells tell their numbers when pointed at or touched, which no component of Gradio does.

The HTML is made here, with everything that came from outside escaped; the script only finds the cell and shows its line, as
text. All else of the page is made of Gradio's components.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO

import gradio as gr
from PIL import Image

from gcpo_t2i.maps.draw import Scale, ramp

HINT = "Point at a cell, or touch it, to see its numbers."

STYLE = """
.panels { display: flex; flex-wrap: wrap; gap: 12px; }
figure { margin: 0; flex: 1 1 150px; max-width: 300px; }
@media (max-width: 640px) { figure { flex-basis: 40%; max-width: calc(50% - 6px); } }
figcaption { font-size: 13px; line-height: 1.3; margin-bottom: 4px; color: var(--body-text-color); }
.map { position: relative; cursor: crosshair; touch-action: manipulation; }
.map img { display: block; width: 100%; margin: 0; image-rendering: pixelated; border-radius: 4px; }
.map i { position: absolute; display: none; box-sizing: border-box; border: 2px solid #fff; outline: 2px solid #000;
         pointer-events: none; }
.scale { display: flex; align-items: center; gap: 6px; font-size: 12px; margin-top: 4px; color: var(--body-text-color); }
.scale b { flex: 1; height: 10px; border-radius: 3px; }
small { display: block; font-size: 12px; line-height: 1.3; opacity: 0.75; color: var(--body-text-color); }
output { display: block; min-height: 3em; margin-bottom: 6px; font-size: 14px; color: var(--body-text-color);
         font-variant-numeric: tabular-nums; }
"""

SCRIPT = """
const show = (event) => {
  const map = event.target.closest('.map');
  if (!map) return;
  const box = map.closest('.cells');
  const [rows, columns] = box.dataset.grid.split(',').map(Number);
  const area = map.getBoundingClientRect();
  const at = (place, side, count) => Math.min(count - 1, Math.max(0, Math.floor(place / side * count)));
  const row = at(event.clientY - area.top, area.height, rows);
  const column = at(event.clientX - area.left, area.width, columns);
  box.querySelector('output').textContent = JSON.parse(box.dataset.cells)[row * columns + column];
  for (const mark of box.querySelectorAll('.map i')) {
    mark.style.display = 'block';
    mark.style.width = `${100 / columns}%`;
    mark.style.height = `${100 / rows}%`;
    mark.style.left = `${100 * column / columns}%`;
    mark.style.top = `${100 * row / rows}%`;
  }
};
element.addEventListener('pointermove', show);
element.addEventListener('pointerdown', show);
"""


@dataclass(frozen=True)
class Panel:
    """A picture of which a cell can be pointed at; `scale` if it is a map."""

    title: str
    image: Image.Image
    scale: Scale | None = None
    meaning: str = ""


def cell_map(elem_id: str) -> gr.HTML:
    """The component; its values are made by `render`."""
    return gr.HTML(css_template=STYLE, js_on_load=SCRIPT, apply_default_css=False, elem_id=elem_id)


def render(panels: Sequence[Panel], grid: tuple[int, int], cells: Sequence[str]) -> str:
    """Panels of the same image, of `grid` (H, W) cells, and the T = H·W lines of its cells."""
    figures = "".join(map(_figure, panels))
    data = f'data-grid="{grid[0]},{grid[1]}" data-cells="{escape(json.dumps(list(cells)))}"'
    return f'<div class="cells" {data}><output>{HINT}</output><div class="panels">{figures}</div></div>'


def _figure(panel: Panel) -> str:
    title = escape(panel.title)
    picture = f'<div class="map"><img alt="{title}" src="{_data_url(panel.image)}"><i></i></div>'
    meaning = f"<small>{escape(panel.meaning)}</small>" if panel.meaning else ""
    bar = "" if panel.scale is None else _bar(panel.scale)
    return f"<figure><figcaption>{title}</figcaption>{picture}{bar}{meaning}</figure>"


def _bar(scale: Scale) -> str:
    low, high = (f"{value:+.2f}" if scale.signed else f"{value:.2f}" for value in (scale.low, scale.high))
    colors = ",".join("rgb({},{},{})".format(*color) for color in ramp(scale, 24))
    return (
        f'<div class="scale">{low}<b style="background:linear-gradient(to right,{colors})"></b>{high}</div>'
        f"<small>{escape(scale.label)}</small>"
    )


def _data_url(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
