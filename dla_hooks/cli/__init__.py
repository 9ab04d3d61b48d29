"""The command line ``dla-hooks``. It parses, calls the library, and prints."""

from dla_hooks.cli.app import app, main

__all__ = ["app", "main"]
