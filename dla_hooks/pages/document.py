"""A report: results as pages of one html file."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from dla_hooks._version import __version__
from dla_hooks.pages.gather import pages_of
from dla_hooks.pages.grid import plain
from dla_hooks.pages.html import page
from dla_hooks.pages.names import check_page
from dla_hooks.results.files import checked, write_text
from dla_hooks.results.wording import are_ids, without_patches

_TALL = 860


class Report:
    """Results as one html file to look at, which needs no network; :func:`report` makes it.

    Every number on the page is one of the results it was made from. :meth:`data` has them all.

    Example:
        >>> import dla_hooks
        >>> model, tokenizer = dla_hooks.demo.load()
        >>> heads = dla_hooks.direct_logit_attribution(
        ...     model, "The keys near the cabinet", " are", " is", unit="head", pos=None,
        ...     tokenizer=tokenizer)
        >>> found = dla_hooks.Report.of(heads)
        >>> "https://" in found.html()
        False

    Attributes:
        title: of the window.
        pages: the content of each page, its numbers not yet as text.
        texts: what each page shows to a reader without scripts.
    """

    __module__ = "dla_hooks"

    def __init__(self, title: str, pages: list[dict[str, Any]], texts: list[str]) -> None:
        self.title, self.pages, self.texts = title, pages, texts

    @classmethod
    def of(
        cls,
        *results: Any,
        title: str | None = None,
        about: Mapping[str, Any] | None = None,
        effects: Any = None,
    ) -> Report:
        """Make a report of results that are there already.

        Args:
            results: attributions of any unit, or the dictionary that a call for several units
                returns; :class:`PromotedTokens` behind them; comparisons of two runs; summaries of
                data sets. Those of the same prompt and question share a page, a batch has one page
                for each prompt.
            title: of the window; None makes one of the prompt.
            about: lines to show in every page's header, such as ``{"dtype": "float32"}``.
            effects: direct and total effects of rows, as lines with the keys ``label``, ``direct``
                and ``total``, or an object whose ``records()`` are such lines.

        Raises:
            ArgumentTypeError: for what cannot be shown.
            InputError: when there is nothing to show, or several answers in one result.
        """
        pages = pages_of(results, effects)
        for one in pages:
            one["about"] = dict(about or {})
        if title is None:
            title = _title(pages[0])
        return cls(title, pages, [_text(one) for one in pages])

    def html(self) -> str:
        """The text of the file."""
        content = {"version": __version__, "title": self.title, "pages": self.pages}
        return page(self.title, content, "\n\n".join(self.texts))

    def save(self, path: str | Path) -> Path:
        """Write the html file.

        Args:
            path: of the file to write.

        Raises:
            InputError: for what is no path, or ends as other kinds of files do, or cannot be
                written.
        """
        return write_text(check_page(checked(path)), self.html())

    def data(self) -> dict[str, Any]:
        """Everything that the page shows, as nested lists and dictionaries that JSON can hold."""
        return {"version": __version__, "title": self.title, "pages": plain(self.pages)}

    def __len__(self) -> int:
        return len(self.pages)

    def __repr__(self) -> str:
        pages = f"{len(self)} page{'s' * (len(self) != 1)}"
        return f"Report({self.title!r}, {pages}); save('page.html') writes it"

    def _repr_html_(self) -> str:
        """The page in a frame of its own, which may run its script and save files, no more."""
        return (
            f'<iframe srcdoc="{escape(self.html())}" sandbox="allow-scripts allow-downloads" '
            f'allow="fullscreen" style="width:100%;height:{_TALL}px;border:0"></iframe>'
        )


def _title(first: dict[str, Any]) -> str:
    text = _prompt(first).strip()
    return f"{text[:60]}{'…' * (len(text) > 60)} · {first['question']}".lstrip(" ·")


def _prompt(one: dict[str, Any]) -> str:
    """The tokens as one text; ids, where no tokenizer named them, with blanks between."""
    tokens = without_patches(one["tokens"])
    ids = are_ids(tokens) and are_ids(one.get("answers", ()), default=True)
    return (" " if ids else "").join(tokens)


def _text(one: dict[str, Any]) -> str:
    """The strongest rows of each unit where the page opens, as plain text."""
    focus = one["focus"]
    lines = [_prompt(one), f"{one['question']} · {one['model']}"]
    for unit in one["units"]:
        if not unit["dense"] or unit["cumulative"] or "exact" not in unit:
            continue
        values = unit["exact"].values[:, 0].tolist()
        pairs = sorted(
            zip(unit["rows"]["label"], values, strict=True), key=lambda row: -abs(row[1])
        )
        lines.append(f"{unit['title']}, the strongest:")
        lines += [f"  {label:<16} {value:+.4f}" for label, value in pairs[:10]]
    lines.append(f"bias {one['bias'][focus]}, logit {one['logit'][focus]}")
    return "\n".join(lines)
