"""The command line: its commands, and how they end.

Results go to stdout, everything else to stderr. torch and transformers are imported once a
command needs them, so that ``--help`` and mistyped options answer at once.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import dla_hooks
from dla_hooks.cli import (
    attribute,
    compare,
    demo,
    effects,
    generate,
    listing,
    many,
    promote,
    report,
    startup,
    upstream,
    verify,
)
from dla_hooks.cli.bundles import spread
from dla_hooks.cli.help import Command
from dla_hooks.cli.terminal import complain, note, out, say_warnings, spell_out
from dla_hooks.errors import DLAError


def _of_system(error: OSError) -> str:
    """What the system refused, as to write to a full disk."""
    what = error.strerror or str(error)
    return what if error.filename is None else f"{error.filename}: {what}"


class _Commands(TyperGroup):
    """Commands whose expected failures are one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DLAError as error:
            complain(error)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            note("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise  # whoever read has seen enough
        except OSError as error:
            complain(_of_system(error))
            raise typer.Exit(1) from None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Each with its whole sentence."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.help or "") for name, one in self.commands.items()])

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order in which they are met, not by the alphabet."""
        return [*self.commands]


app = typer.Typer(
    name="dla-hooks",
    cls=_Commands,
    help="Direct Logit Attribution on Hugging Face causal language models: who wrote this logit?",
    no_args_is_help=True,
    rich_markup_mode=None,  # whole words at any width
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        out().print(f"dla-hooks {dla_hooks.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


for _name, _command in {
    "demo": demo.demo,
    "attribute": attribute.attribute,
    "report": report.report,
    "many": many.many,
    "generate": generate.generate,
    "compare": compare.compare,
    "effects": effects.effects,
    "upstream": upstream.upstream,
    "promote": promote.promote,
    "verify": verify.verify,
    "list": listing.list_architectures,
}.items():
    app.command(_name, cls=Command, epilog=getattr(_command, "examples", None))(spread(_command))


def main() -> None:
    """The console script ``dla-hooks``."""
    startup.claim()
    spell_out(sys.stdout, sys.stderr)
    say_warnings()
    app(prog_name="dla-hooks")
