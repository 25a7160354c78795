"""The parts of a page: escaped text, tables, pictures inside the file, and its style."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "data_uri",
    "details",
    "document",
    "figure",
    "fold",
    "png_of",
    "read_png",
    "section",
    "table",
    "text",
]

# a name or path longer than this is cut in its middle
_LONGEST = 300
_STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #ddd; --grey: #666;
  --panel: #f5f6f8; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181c; --faint: #3a3e45;
  --grey: #a0a6ad; --panel: #20242a; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 68rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .2rem 0; line-height: 1.25; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--faint); }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; }
.note { color: var(--grey); font-size: .9rem; }
.wide { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--faint); vertical-align: top; }
th { color: var(--grey); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
table.words th { text-align: left; }
table.words td { text-align: left; white-space: normal; min-width: 7rem; }
pre { white-space: pre-wrap; background: var(--panel); padding: .6rem .8rem; border-radius: 6px;
  font-size: .85rem; margin: .4rem 0; }
figure { margin: .6rem 0; }
figure img { max-width: 100%; height: auto; border-radius: 6px; background: #fff; }
figcaption { font-size: .85rem; color: var(--grey); }
details { margin: .2rem 0; }
summary { cursor: pointer; }
.tree details details, .tree .leaf { margin-left: 1.1rem; }
.tree .leaf { padding-left: 1.05rem; }
.bar { display: inline-block; width: 3.4rem; height: .7rem; border-radius: 3px; margin-right: .5rem;
  background: var(--faint); overflow: hidden; }
.bar i { display: block; height: 100%; }
.legend { white-space: nowrap; }
.legend .bar { width: 1.1rem; margin-right: .1rem; }
.value { color: var(--grey); font-size: .88rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .8rem; }
.card { background: var(--panel); border-radius: 6px; padding: .5rem; font-size: .85rem;
  min-width: 0; }
.card img { width: 100%; height: 7rem; object-fit: contain; display: block; margin-bottom: .3rem; }
.card img.pixels { image-rendering: pixelated; }
.card b { font-weight: 600; }
"""


def text(value: Any, longest: int = _LONGEST) -> str:
    """Any value as escaped text; of a very long one the middle is left out."""
    plain = str(value)
    if len(plain) > longest:
        half = (longest - 1) // 2
        plain = f"{plain[:half]}…{plain[-half:]}"
    # a name of a file that is no Unicode holds lone surrogates, which UTF-8 does not take
    plain = plain.encode("utf-8", "replace").decode("utf-8")
    return html.escape(plain)


def section(title: str, parts: Iterable[str]) -> str:
    """Parts below a heading; nothing without any part."""
    body = "\n".join(part for part in parts if part)
    if not body:
        return ""
    return f"<section>\n<h2>{text(title)}</h2>\n{body}\n</section>"


def details(title: str, body: str, opened: bool = False) -> str:
    """A part that a click opens; its title is plain text."""
    return fold(text(title), body, opened)


def fold(summary: str, body: str, opened: bool = False) -> str:
    """A part that a click opens, with a summary that is HTML already."""
    attribute = " open" if opened else ""
    return f"<details{attribute}><summary>{summary}</summary>{body}</details>"


def table(rows: Sequence[Sequence[Any]], words: bool = False) -> str:
    """Rows of cells, the first of them the headings, in a box that scrolls by itself.

    Args:
        rows: The cells.
        words: Cells of text instead of numbers: they stand at the left and may break.
    """
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        cells = "".join(f"<{tag}>{text(cell)}</{tag}>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    kind = ' class="words"' if words else ""
    body = "\n".join(lines)
    return f'<div class="wide"><table{kind}>\n{body}\n</table></div>'


def figure(picture: bytes, caption: str) -> str:
    """A PNG with a line below it."""
    return (
        f'<figure><img alt="{text(caption)}" src="{data_uri(picture)}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def data_uri(picture: bytes) -> str:
    """A PNG or JPEG as an address that holds all of it."""
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def png_of(pixels: np.ndarray, side: int = 160) -> tuple[bytes, bool]:
    """A thumbnail of an image, and whether its pixels are few enough to be seen one by one.

    Args:
        pixels: (H, W, 3), uint8.
        side: Of the larger side, at most.
    """
    from PIL import Image

    image = Image.fromarray(pixels)
    few = max(image.size) <= 64
    out = io.BytesIO()
    if few:
        image.save(out, "PNG")
    else:
        image.thumbnail((side, side))
        image.save(out, "JPEG", quality=80)
    return out.getvalue(), few


def document(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """The whole page."""
    body = "\n".join(part for part in sections if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{text(title)}</h1>\n<p class="note">{text(subtitle)}</p>\n{body}\n</body>\n</html>\n'
    )


def read_png(path: Path) -> bytes | None:
    """A picture's bytes; None where it was not drawn."""
    return path.read_bytes() if path.is_file() else None
