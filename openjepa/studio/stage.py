"""The image with its block, which is dragged: the one component of the page that Gradio does not have.

Its value: {"image": a data URL, "rows", "columns": of the grid, "top", "left", "height", "width": of the block, in patches}.
A drag moves the block, its lower right corner changes its size; arrow keys do both, the latter with Shift.
"""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

HTML = """
<div class="stage"><img src="${value.image}" alt="the image, with the block that is hidden" draggable="false">
<div class="masked" tabindex="0" role="application"
  aria-label="hidden block: drag it, or press arrow keys to move it, with Shift to size it"
  style="left:${100 * value.left / value.columns}%;width:${100 * value.width / value.columns}%;
  top:${100 * value.top / value.rows}%;height:${100 * value.height / value.rows}%"><i></i></div></div>
"""

CSS = """
.stage { position: relative; width: 100%; line-height: 0; user-select: none; border-radius: 6px; overflow: hidden; }
.stage img { width: 100%; image-rendering: auto; pointer-events: none; }
.masked { position: absolute; background: #00aa5040; outline: 2px solid #00aa50; outline-offset: -2px;
  box-shadow: 0 0 0 1px #ffffffb0; cursor: grab; touch-action: none; box-sizing: border-box; }
.masked:focus-visible { outline-width: 4px; }
.masked i { position: absolute; right: 0; bottom: 0; width: 18px; height: 18px; max-width: 50%; max-height: 50%;
  cursor: nwse-resize; background: #00aa50; border: 2px solid #fff; border-radius: 4px 0 0 0; box-sizing: border-box; }
"""

JS = """
const limit = (x, low, high) => Math.min(Math.max(x, low), high);
let drag = null;
const fitted = (v, b) => {
  b.height = limit(b.height, 1, v.rows); b.width = limit(b.width, 1, v.columns);
  b.top = limit(b.top, 0, v.rows - b.height); b.left = limit(b.left, 0, v.columns - b.width);
  return b;
};
const laid = (node, v, b) => {
  node.style.left = 100 * b.left / v.columns + '%'; node.style.top = 100 * b.top / v.rows + '%';
  node.style.width = 100 * b.width / v.columns + '%'; node.style.height = 100 * b.height / v.rows + '%';
};
const settle = (b) => {
  const v = props.value;
  if (['top', 'left', 'height', 'width'].every((k) => v[k] === b[k])) return;
  props.value = {...v, ...b};
  trigger('input');
};
const moved = (v, b, down, right, sizes) => fitted(v, sizes
  ? {...b, height: limit(b.height + down, 1, v.rows - b.top), width: limit(b.width + right, 1, v.columns - b.left)}
  : {...b, top: b.top + down, left: b.left + right});
const begun = (v) => ({top: v.top, left: v.left, height: v.height, width: v.width});
element.addEventListener('pointerdown', (e) => {
  const node = e.target.closest(".masked");
  if (!node) return;
  const box = node.parentElement.getBoundingClientRect();
  drag = {node, x: e.clientX, y: e.clientY, box, from: begun(props.value), sizes: e.target.tagName === 'I'};
  drag.to = drag.from;
  node.setPointerCapture(e.pointerId);
});
element.addEventListener('pointermove', (e) => {
  if (!drag) return;
  const v = props.value;
  drag.to = moved(v, drag.from, Math.round((e.clientY - drag.y) / drag.box.height * v.rows),
    Math.round((e.clientX - drag.x) / drag.box.width * v.columns), drag.sizes);
  laid(drag.node, v, drag.to);
});
const end = () => { if (drag) { const to = drag.to; drag = null; settle(to); } };
element.addEventListener('pointerup', end);
element.addEventListener('pointercancel', end);
element.addEventListener('keydown', (e) => {
  const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[e.key];
  if (!step || !e.target.closest(".masked")) return;
  e.preventDefault();
  settle(moved(props.value, begun(props.value), step[0], step[1], e.shiftKey));
  requestAnimationFrame(() => element.querySelector(".masked").focus());
});
"""

Block = tuple[int, int, int, int]  # row, column, height, width


def value(image: Image.Image, grid: tuple[int, int], block: Block) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    top, left, height, width = block
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    places = {"top": top, "left": left, "height": height, "width": width}
    return {"image": uri, "rows": grid[0], "columns": grid[1], **places}


def block(value: Any) -> Block | None:
    """What a browser sent; None where that is no block."""
    found = [value.get(name) for name in ("top", "left", "height", "width")] if isinstance(value, dict) else []
    whole = [side for side in found if type(side) is int]
    return (whole[0], whole[1], whole[2], whole[3]) if len(whole) == 4 else None
