"""One file per shape of decoder; each lists its declarations as ``ARCHITECTURES``.

This folder is installed as ``dla_hooks.adapters``. Loaded under any other name (as ``adapters``
from the root of a checkout, say) it would hide the unrelated package of that name on PyPI.
"""

if __name__ != "dla_hooks.adapters":
    raise ImportError(
        f"this folder holds the architecture declarations of dla_hooks and is no package called "
        f"{__name__!r}: run Python outside the root of the checkout, or `pip install -e .` there"
    )
