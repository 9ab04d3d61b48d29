"""One self-contained html file from the content of a report.

The file asks nothing of any network: its content security policy allows the one style sheet and
the one script that are written into it, by their hashes, and nothing else. Text of prompts comes
as JSON, in which no tag can begin.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import lru_cache
from html import escape
from importlib import resources
from typing import Any

from dla_hooks.pages.grid import packed
from dla_hooks.results.wording import printable

# In the order in which they are read: each uses those before it.
SCRIPTS = (
    "data.js",
    "page.js",
    "numbers.js",
    "dom.js",
    "colours.js",
    "svg.js",
    "state.js",
    "export.js",
    "panel.js",
    "header.js",
    "strip.js",
    "waterfall.js",
    "heatmap.js",
    "card.js",
    "table.js",
    "keys.js",
    "main.js",
)


def page(title: str, content: dict[str, Any], summary: str) -> str:
    """The text of the file.

    Args:
        title: of the window.
        content: what :mod:`dla_hooks.pages.gather` found; its grids become bytes.
        summary: plain text, for readers without scripts.
    """
    style, script = _asset("page.css"), _script()
    plain, blob = packed(content)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "img-src blob: data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{escape(printable(title))}</title>
<style>{style}</style>
</head>
<body>
<main id="app"></main>
<noscript><pre>{escape(printable(summary))}</pre></noscript>
<script type="application/json" id="content">{embedded(plain)}</script>
<script type="text/plain" id="numbers">{blob}</script>
<script>{script}</script>
</body>
</html>
"""


def embedded(value: Any) -> str:
    """JSON that can stand in a script element: ASCII, without what could begin a tag."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@lru_cache
def _asset(name: str) -> str:
    folder = resources.files("dla_hooks.pages") / "assets"
    text = (folder / name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")  # a browser hashes what it reads: line feeds


@lru_cache
def _script() -> str:
    body = "\n".join(_asset(name) for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{body}\n}})();'


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
