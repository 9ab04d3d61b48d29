"""Whether a model of the Hugging Face hub can be had: asked once and quickly.

The hub's own client tries each file of a model five times over half a minute, silently.
"""

from __future__ import annotations

from dla_hooks.errors import CheckpointError

OFFLINE = "HF_HUB_OFFLINE"
_SECONDS = 10


def is_offline() -> bool:
    """Whether the hub's client has been told to look in the local cache alone."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def is_cached(name: str) -> bool:
    """Whether the local cache has a model's configuration.

    Raises:
        ValueError: for what can be no name on the hub.
    """
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def is_reachable(name: str) -> bool:
    """Whether the hub answers when it is asked for a model, be it that there is none."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    url = hf_hub_url(name, "config.json")
    try:
        get_session().head(url, timeout=_SECONDS)
    except Exception:  # each version's client has errors of its own
        return False
    return True


def check(name: str) -> None:
    """Refuse a model that is not here while the hub cannot be reached.

    Raises:
        CheckpointError: it says so.
    """
    if is_offline():
        return  # the client looks in the cache alone, and says what it lacks
    try:
        cached = is_cached(name)
    except ValueError:
        return  # the loader says why
    if not cached and not is_reachable(name):
        raise unreachable(name)


def unreachable(name: str) -> CheckpointError:
    """What is said of a model that is not here."""
    return CheckpointError(
        f"{name} is neither a folder here nor in the local cache, and the Hugging Face hub cannot "
        "be reached"
    )
