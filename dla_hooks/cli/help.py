"""Commands that say their options in groups, whole at any width, and take each option once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

_NAMES = 22
"""Characters of an option's name; behind a longer one the help begins on its own line."""


class Command(TyperCommand):
    """A command with its options in groups, and its epilog as examples, line by line."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Usage, what it does, arguments and options by their panels, examples."""
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            kind = "Arguments" if param.param_type_name == "argument" else "Other options"
            groups.setdefault(getattr(param, "rich_help_panel", None) or kind, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records, col_max=_NAMES)
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse an option that is given twice, unless it collects."""
        order: list[Any] = self.make_parser(ctx).parse_args(args=list(args))[2]
        for param, times in Counter(order).items():
            collects = getattr(param, "multiple", False) or param.nargs != 1
            if times > 1 and param.param_type_name == "option" and not collects:
                raise typer.BadParameter(
                    f"it is given {times} times, and takes one value", ctx=ctx, param=param
                )
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise


def examples(*lines: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Put examples below a command's help."""

    def put(command: Callable[..., None]) -> Callable[..., None]:
        command.examples = "\n".join(lines)  # type: ignore[attr-defined]
        return command

    return put
