"""A sheet as one HTML page that works from disk: no server, no library, no network.

The pictures are the cells' own files. Hold the mouse on one to see the same cell of the chosen row
in its place; click for full size and settings.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif }
body { margin: 1rem } h1 { font-size: 1.2rem } h2 { font-size: 1rem; white-space: pre-wrap }
table { border-collapse: collapse } th { font-weight: 600; padding: .3rem; vertical-align: middle }
thead th { position: sticky; top: 0; background: Canvas; z-index: 1 }
tbody th { text-align: right; max-width: 16rem; overflow-wrap: anywhere }
td { padding: 2px }
td img { display: block; width: var(--size, 256px); height: auto; cursor: zoom-in }
dialog { max-width: 95vw } dialog img { max-width: 90vw; max-height: 70vh; display: block }
pre { white-space: pre-wrap; overflow-wrap: anywhere } label { margin-right: 1.5rem }
"""

SCRIPT = """
const all = [...document.querySelectorAll('td img')], row = document.querySelector('#row');
const twin = i => document.querySelector(
  `img[data-p="${i.dataset.p}"][data-c="${i.dataset.c}"][data-r="${row.value}"]`);
for (const image of all) {
  const own = image.getAttribute('src');
  image.onmouseenter = () => { if (row.value) image.src = twin(image).dataset.own };
  image.onmouseleave = () => { image.src = own };
  image.dataset.own = own;
  image.onclick = () => {
    document.querySelector('#large').src = own;
    document.querySelector('#told').textContent = image.title;
    document.querySelector('dialog').showModal();
  };
}
document.querySelector('#size').oninput = e =>
  document.documentElement.style.setProperty('--size', e.target.value + 'px');
"""


def html(side: Mapping[str, Any], title: str) -> str:
    """The page of a side-car (see `compare.sidecar`)."""
    rows, columns, pages = (side["axes"][n]["values"] for n in ("rows", "columns", "pages"))
    cells = {(c["page"], c["row"], c["column"]): c for c in side["cells"]}
    wide = min(512, max(c["settings"]["width"] for c in side["cells"]))
    options = "".join(
        f'<option value="{i}">{escape(label or "the only row")}</option>'
        for i, label in enumerate(rows, 1)
    )
    tables = "".join(
        _table(side, cells, p, label, rows, columns) for p, label in enumerate(pages, 1)
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}</style>
<h1>{escape(title)}</h1>
<p><label>Under the mouse, show <select id="row"><option value="">the picture itself</option>
{options}</select></label>
<label>Size <input id="size" type="range" min="64" max="1024" value="{wide}"></label></p>
{tables}
<p>Drawn by plymix {escape(side["plymix"])} with {escape(side["backend"])}.</p>
<dialog><form method="dialog"><button>Close</button></form>
<img id="large" alt=""><pre id="told"></pre></dialog>
<script>document.documentElement.style.setProperty('--size', '{wide}px');{SCRIPT}</script>
</html>
"""


def _table(
    side: Mapping[str, Any],
    cells: Mapping[tuple[int, int, int], Mapping[str, Any]],
    p: int,
    label: str,
    rows: Sequence[str],
    columns: Sequence[str],
) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    lines = []
    for r, row in enumerate(rows, 1):
        pictures = "".join(_picture(side, cells[p, r, c]) for c in range(1, len(columns) + 1))
        lines.append(f"<tr><th>{escape(row)}</th>{pictures}</tr>")
    heading = f"<h2>{escape(label)}</h2>" if label else ""
    return (
        f"{heading}<table><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _picture(side: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    place = f"{cell['row']},{cell['column']}"
    place += f",{cell['page']}" if cell["page"] > 1 else ""
    json = side["sheet"].rsplit(".", 1)[0] + ".json"
    told = [cell["formula"], ""]
    told += [f"{name}: {value}" for name, value in cell["settings"].items()]
    told += ["", f"plymix compare --redo {shlex.quote(json)} --cell {place}"]
    return (
        f'<td><img src="{escape(quote(cell["file"]))}" loading="lazy" alt=""'
        f' data-p="{cell["page"]}" data-r="{cell["row"]}" data-c="{cell["column"]}"'
        f' title="{escape(chr(10).join(told))}"></td>'
    )
