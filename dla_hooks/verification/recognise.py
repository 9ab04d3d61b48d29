"""From a model to its located stream: by its declaration, or by a known shape that verifies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dla_hooks.backends import Backend, backend_of
from dla_hooks.calibration.scales import with_scales
from dla_hooks.doors import door_of
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.faults import SyntheticRunError, described_error
from dla_hooks.modules.past_wrappers import BLOCKS, EVERY, NONE, every_wrapper
from dla_hooks.modules.user_hooks import switch_hooks, warn_of_hooks_that_stay
from dla_hooks.modules.version import Remembered
from dla_hooks.residual.architecture import Architecture
from dla_hooks.residual.locate import locate
from dla_hooks.residual.registry import architectures, declarations_for, refusal_for
from dla_hooks.residual.stream import Stream
from dla_hooks.verification.suggest import sketch
from dla_hooks.verification.trace import Verification, trace_report

_TAKEN = "taken for"
_matched: Remembered[Architecture] = Remembered()
_past: Remembered[str] = Remembered()


def stream_of(model: Any) -> Stream:
    """Check a model and locate its residual stream, or refuse.

    Args:
        model: a model of any backend, or what :func:`dla_hooks.wrap` made of one.

    Raises:
        InputError: for what is no causal language model in evaluation mode.
        UnsupportedModelError: when no declaration is true of the model.
    """
    backend = backend_of(model)
    check(backend)
    return located(backend)


def check(backend: Backend) -> None:
    """Refuse a model that cannot be attributed as it stands, with the reason that is known.

    Raises:
        InputError: for what is no such model, or not set up as it must be.
        UnsupportedModelError: for a model that no setting would help.
    """
    try:
        backend.check()
    except UnsupportedModelError as error:
        known = _known_refusal(backend)
        if known is None:
            raise
        raise UnsupportedModelError(known) from error


def located(backend: Backend) -> Stream:
    """Locate the residual stream of a model that its backend has let through, or refuse.

    A model type without a declaration is compared with every known shape, and the first one that
    verifies on a few tokens is taken. That is done once per version of a model. The model is
    measured without its caller's hooks; with them, where it does not run without. So it is with
    wrappers of the caller's around blocks. Other wrappers run, unless they fail in it.

    A model of a declared type whose modules are elsewhere, as in a vision-language class, is
    compared with every known shape, too.

    Raises:
        UnsupportedModelError: when no declaration is true of the model.
    """
    known = _past.find(backend.model, backend.state.version)
    ways = (BLOCKS, EVERY, NONE) if known is None else (known,)  # the model may need one, to cast
    for find in (_located, _located_or_with_hooks):  # a hook that acts once is spent in the second
        for past in ways:
            backend.past = past
            try:
                found = find(backend)
            except UnsupportedModelError as error:
                if past != ways[-1] and (backend.wrappers or every_wrapper(backend.root)):
                    continue
                if find is _located and isinstance(error, SyntheticRunError):
                    break
                raise
            if past != BLOCKS:
                _past.keep(backend.model, backend.state.version, past)
            return found
    raise AssertionError


def _located_or_with_hooks(backend: Backend) -> Stream:
    try:
        return _located(backend)
    except SyntheticRunError as error:
        how, last = "", error
        for way in switch_hooks(backend.model, backend.hookable()):
            how = way
            try:
                found = _located(backend)
            except SyntheticRunError as again:
                last = again
            else:
                warn_of_hooks_that_stay(backend.model)
                return found
        if not how:
            raise
        raise UnsupportedModelError(
            f"{error}. {how[0].upper()}{how[1:]} it fails, too ({described_error(last.cause)}). "
            "Where the model needs a hook to run at all, let that hook take any batch and length"
        ) from last


def _located(backend: Backend) -> Stream:
    try:
        return _declared_or_matched(backend)
    except SyntheticRunError:
        raise
    except UnsupportedModelError as error:
        known = _known_refusal(backend)
        if known is None or known in str(error):
            raise
        raise UnsupportedModelError(known) from error


def _known_refusal(backend: Backend) -> str | None:
    """Why models of this type and kind are refused, where that is known."""
    name = type(backend.root).__name__
    door = door_of(backend.model_type, name)
    known = refusal_for(backend.model_type, None if door is None else door.name)
    if known is None:
        return None
    return (
        f"model type {backend.model_type!r} ({name}) cannot be attributed. {known.place}: "
        f"{known.reason}. It would need {known.needed}."
    )


def _declared_or_matched(backend: Backend) -> Stream:
    declared = declarations_for(backend.model_type)
    misfit: UnsupportedModelError | None = None
    for architecture in declared:
        try:
            stream = locate(backend, architecture)
        except UnsupportedModelError as error:
            misfit = misfit or error
            continue
        if architecture is declared[-1]:
            return with_scales(stream)
        try:
            return with_scales(stream)
        except UnsupportedModelError as error:
            misfit = misfit or error
    if misfit is not None and any(_stands(backend, one) for one in declared):
        raise misfit  # the blocks are where they are declared, and something else is not
    known = _matched.find(backend.model, backend.state.version)
    if known is None:
        try:
            known = _match(backend, declared)
        except UnsupportedModelError as error:
            # A shape that has all of the model's modules says more than one that has not.
            if misfit is not None and _TAKEN not in str(error):
                raise misfit from None
            raise
        # A first run may change the weights itself.
        _matched.keep(backend.model, backend.read_state().version, known)
    return with_scales(locate(backend, known))


def verify(model: Any, *, show: bool = True) -> Verification:
    """Verify, block by block, that a model is the sum of writes that its declaration names.

    Args:
        model: a causal LM in evaluation mode.
        show: print the table.

    Returns:
        The table: one line per block, per set of heads, and for the logits.

    Raises:
        UnsupportedModelError: when the model cannot be located at all.
    """
    report = trace_report(stream_of(model))
    if show:
        from rich.console import Console

        Console(highlight=False, soft_wrap=True).print(str(report), markup=False)
    return report


def _stands(backend: Backend, architecture: Architecture) -> bool:
    """Whether the model has a list of blocks where the declaration says."""
    found: Any = backend.root
    for name in architecture.layers.split("."):
        found = getattr(found, name, None)
    return found is not None


def _places(backend: Backend) -> list[str]:
    """Paths at which the decoder may stand: the modules that hold the token embeddings."""
    embedding = backend.embedding()
    paths = [path for path, module in backend.root.named_modules() if module is embedding]
    names = [path.split(".")[:-1] for path in paths]
    return [".".join(parts[:n]) for parts in names for n in range(len(parts), -1, -1)]


def _shapes(backend: Backend, declared: tuple[Architecture, ...]) -> Iterator[Architecture]:
    """The known shapes as they are declared, then at the places where the decoder may stand."""
    known = tuple(dict.fromkeys((*declared, *architectures())))
    moved = (one.moved_to(place) for place in _places(backend) for one in known)
    seen = set()
    for architecture in (*known, *(one for one in moved if one is not None)):
        form = replace(architecture, model_types=())
        if form not in seen:
            seen.add(form)
            yield architecture


def _candidates(backend: Backend, declared: tuple[Architecture, ...]) -> list[tuple[float, Stream]]:
    """The known shapes whose module names the model has, those with more of them first."""
    found = []
    for architecture in _shapes(backend, declared):
        try:
            stream = locate(backend, architecture)
        except UnsupportedModelError:
            continue  # other module names: not this shape, and nothing to tell
        # Attention to an encoder is there in models that have one only.
        sites = [w for w in stream.writes if w.heads is None or not w.heads.cross]
        named = [w for w in architecture.writes if w.heads is None or not w.heads.cross]
        has = sum(1 + (w.post_norm is not None) + (w.heads is not None) for w in sites)
        could = sum(1 + (w.post_norm is not None) + (w.heads is not None) for w in named)
        found.append((has / (could * len(stream.blocks)), stream))
    # Ties: prefer the declaration with positions added to the stream, then the one with more heads.
    # The type's own go first, and those that stand where they are declared.
    own = {name for architecture in declared for name in architecture.model_types}
    known = set(architectures())
    return sorted(
        found,
        key=lambda e: (
            own.isdisjoint(e[1].architecture.model_types),
            e[1].architecture not in known,
            -e[0],
            not _stands(backend, e[1].architecture),
            e[1].positions is None,
            -_n_heads(e[1]),
        ),
    )


def _n_heads(stream: Stream) -> int:
    return sum(write.heads.n_heads for write in stream.writes if write.heads is not None)


def _match(backend: Backend, declared: tuple[Architecture, ...] = ()) -> Architecture:
    misses: dict[str, str] = {}  # each reason, with the first shape that failed for it
    for coverage, candidate in _candidates(backend, declared):
        try:
            report = trace_report(with_scales(candidate))
        except Exception as error:  # a shape that is not the model's may fail in any way
            if coverage == 1:
                misses.setdefault(str(error), candidate.architecture.model_types[0])
            continue
        if report.ok:
            return candidate.architecture
        misses.setdefault(report.diagnosis(), candidate.architecture.model_types[0])
    what = f"model type {backend.model_type!r} ({type(backend.root).__name__})"
    found = "; ".join(f"{_TAKEN} {name}: {miss}" for miss, name in misses.items())
    raise UnsupportedModelError(
        f"{what} has no declaration, and was not recognised: "
        f"{found or 'none of the known shapes has its module names'}. If its stream is a sum of "
        f"writes, start from these lines:\n{sketch(backend.root, backend.model_type)}"
    )
