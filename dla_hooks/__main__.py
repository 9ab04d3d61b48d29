"""``python -m dla_hooks`` is the command line ``dla-hooks``."""

from dla_hooks.cli import main

if __name__ == "__main__":
    main()
