"""The caller's hooks: which they are, and how a synthetic run goes past them.

A hook of the caller's belongs to the caller's prompt. It may name a position, put back a stored
activation, or take itself off after one run. A synthetic run must therefore not call it. Hooks of
torch, transformers, accelerate, peft and deepspeed are another matter: they make the model what it
is (weight norms, pruning, sharding, offload), and stay on.

While a synthetic run lasts, each hook of the caller's is replaced under its own key by one that is
silent in the threads of such runs, and calls the caller's in every other thread. Handles, keyword
arguments and ``always_call`` work as ever, since the key stays. Arguments that
``functools.partial`` has bound to a module's ``forward`` are left out in the same way.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch.nn.modules import module as torch_module

from dla_hooks.errors import DLAError, UnsupportedModelError, warn
from dla_hooks.modules.hooks import Place, is_ours

_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "deepspeed")
_OF_MODULES = (
    *("transformers_modules", "transformer_lens", "torchao", "bitsandbytes", "hqq", "optimum"),
    *("gptqmodel", "auto_gptq", "awq", "aqlm", "eetq", "compressed_tensors", "quark", "vptq"),
)
"""More homes of modules that are a model's own: remote code, and other libraries."""
EMBED_HOOK, FINAL_HOOK, LOGIT_HOOK = "embed_hook", "final_hook", "logit_hook"
"""Rows of what hooks write to the token embeddings, at the last stream and the final norm's output,
and at the logits."""

_lock = threading.RLock()

_need_hooks: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
"""Models that run only with hooks of their caller's, as one that casts before the unembedding; and
the modules whose hooks stay on."""

_Table = MutableMapping[Any, Any]


class _Silenced:
    """Stands in a table of hooks for one of the caller's."""

    def __init__(self, hook: Any) -> None:
        self.hook = hook
        self.silent_in: Counter[int] = Counter()  # threads, with how many runs each

    def __call__(self, *args: Any) -> Any:
        return None if threading.get_ident() in self.silent_in else self.hook(*args)


class _Unbound(_Silenced):
    """Stands for a module's ``forward`` that has arguments of the caller's bound to it."""

    def __init__(self, hook: functools.partial[Any]) -> None:
        super().__init__(hook)
        self.__wrapped__ = hook  # its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        silent = threading.get_ident() in self.silent_in
        return (self.hook.func if silent else self.hook)(*args, **kwargs)


def is_callers(hook: Any) -> bool:
    """Tell a hook of the caller's from one of a library, or of ours."""
    if isinstance(hook, _Silenced):
        return True
    if is_ours(hook):
        return False
    while isinstance(hook, functools.partial):
        hook = hook.func
    hook = getattr(hook, "__func__", hook)  # a bound method
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home.partition(".")[0] not in _LIBRARIES


def is_silent(hook: Any) -> bool:
    """Tell whether the runs of this thread go past a hook at present."""
    return isinstance(hook, _Silenced) and threading.get_ident() in hook.silent_in


def is_replaced(module: nn.Module) -> bool:
    """Tell whether a ``forward`` was put on a module itself; accelerate's brings weights only."""
    return "forward" in vars(module) and not hasattr(module, "_hf_hook")


def has_callers(table: Any) -> bool:
    """Tell whether a table of hooks holds one of the caller's."""
    # A list: another thread may put a hook of ours on meanwhile.
    return bool(table) and any(is_callers(hook) for hook in list(table.values()))


def is_hooked(place: Place) -> bool:
    """Tell whether the caller's hooks change what is seen at a place."""
    module = place.module
    return has_callers(module._forward_pre_hooks if place.before else module._forward_hooks)


def is_foreign(module: nn.Module, model: nn.Module) -> bool:
    """Tell whether a module is of no library's class, nor of the model's own home."""
    home, own = (type(one).__module__.partition(".")[0] for one in (module, model))
    return home not in (*_LIBRARIES, *_OF_MODULES, own)


def is_wrapper(module: nn.Module, model: nn.Module) -> bool:
    """Tell whether such a module has others in it."""
    return bool(module._modules) and is_foreign(module, model)


def library_hooks(module: nn.Module) -> tuple[int, ...]:
    """The keys of the hooks on a module that belong to libraries."""
    tables = module._forward_hooks, module._forward_pre_hooks
    return tuple(
        key
        for table in tables
        for key, hook in list(table.items())
        if not is_ours(hook) and not is_callers(hook)
    )


def hooked_modules(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that carry hooks of the caller's."""
    return [
        module
        for module in modules
        if (module._forward_hooks or module._forward_pre_hooks)
        and (has_callers(module._forward_hooks) or has_callers(module._forward_pre_hooks))
    ]


def needed_hooks(model: nn.Module) -> Collection[nn.Module]:
    """The modules whose hooks stay on in synthetic runs: the model does not run without them."""
    return _need_hooks.get(model, ())


def switch_hooks(model: nn.Module, modules: Iterable[nn.Module]) -> Iterator[str]:
    """Let synthetic runs have some of the caller's hooks: the model does not run as it is.

    The first to be tried are those on modules of another dtype, which something must cast for. A
    hook that acts once would be spent, so that others stay off where these are enough.

    Args:
        model: the model.
        modules: those of its modules whose hooks may be the caller's.

    Yields:
        How it runs from now on, in words.
    """
    before = _need_hooks.pop(model, WeakSet())
    if before:
        yield "without your hooks"
    hooked = hooked_modules(modules)
    cast = _of_other_dtype(model, hooked)
    for kept in (cast, hooked):
        if kept and set(kept) != set(before) and (kept is hooked or len(cast) < len(hooked)):
            _need_hooks[model] = WeakSet(kept)
            path = next(path for path, one in model.named_modules() if one is kept[0])
            yield f"with your hooks ({path or 'the model'} has one)"
    _need_hooks.pop(model, None)
    if before:
        _need_hooks[model] = before


def warn_of_hooks_that_stay(model: nn.Module) -> None:
    """Warn of hooks that stay on in synthetic runs, and may do more than the model needs."""
    kept = list(needed_hooks(model))
    more = [one for one in kept if one not in _of_other_dtype(model, kept) or _several(one)]
    paths = [path or "the model" for path, one in model.named_modules() if one in more]
    if paths:
        warn(
            f"the model does not run without hooks of yours, so those on {', '.join(paths[:3])} "
            "are also called in the runs on made-up tokens that measure it. One that acts once, or "
            "records, is spent there. Put a cast that the model needs on the module that needs it, "
            "and nothing else there"
        )


def _of_other_dtype(model: nn.Module, modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those whose weights are all of another dtype than most of the model's."""
    usual = Counter(weight.dtype for weight in model.parameters()).most_common(1)
    return [
        module
        for module in modules
        if (dtypes := {weight.dtype for weight in module.parameters()})
        and usual[0][0] not in dtypes
    ]


def _several(module: nn.Module) -> bool:
    """Whether more hooks are on a module than one at each end, as a cast needs."""
    tables = module._forward_hooks, module._forward_pre_hooks
    return any(sum(is_callers(hook) for hook in list(table.values())) > 1 for table in tables)


def callers_hooks(model: nn.Module) -> Iterator[str]:
    """The path of every module that carries hooks of the caller's."""
    for path, module in model.named_modules():
        if has_callers(module._forward_hooks) or has_callers(module._forward_pre_hooks):
            yield path


def callers_changes(model: nn.Module) -> Iterator[tuple[str, str]]:
    """What of the caller's may change a run, beside weights and settings.

    Yields:
        The path of each module, and what it is or has: a hook, a ``forward``, a wrapper.
    """
    for path, module in model.named_modules():
        if has_callers(module._forward_hooks) or has_callers(module._forward_pre_hooks):
            yield path, "has a hook of yours"
        elif is_replaced(module) and is_callers(vars(module)["forward"]):
            yield path, "has a forward of yours"
        elif len(module._modules) == 1 and is_foreign(module, model):
            yield path, "is a wrapper of yours"


@contextmanager
def silenced(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run without the caller's hooks on some modules, in this thread only."""
    thread = threading.get_ident()
    standing: list[tuple[_Table, Any, _Silenced]] = []
    with _lock:
        for module in modules:
            for table, key, silent in _silent_ones(module):
                silent.silent_in[thread] += 1
                table[key] = silent
                standing.append((table, key, silent))
    try:
        yield
    finally:
        with _lock:
            for table, key, silent in standing:
                silent.silent_in[thread] -= 1
                if not silent.silent_in[thread]:
                    del silent.silent_in[thread]
                # A hook may have been taken off, or its place taken by another, meanwhile.
                if not silent.silent_in and table.get(key) is silent:
                    table[key] = silent.hook


def _silent_ones(module: nn.Module) -> Iterator[tuple[Any, Any, _Silenced]]:
    """What is to stand, in each table of a module and under each key, while a run is silent."""
    tables: tuple[Any, ...] = module._forward_pre_hooks, module._forward_hooks
    for table in tables:
        for key, hook in list(table.items()) if table else ():
            if is_callers(hook):
                yield table, key, hook if isinstance(hook, _Silenced) else _Silenced(hook)
    bound = module.__dict__.get("forward")
    # accelerate's own stand there as partials of another function.
    if isinstance(bound, functools.partial) and bound.func == type(module).forward.__get__(module):
        yield module.__dict__, "forward", _Unbound(bound)
    elif isinstance(bound, _Unbound):
        yield module.__dict__, "forward", bound


def refuse_second_run(model: nn.Module, error: DLAError) -> None:
    """Raise an error again where the model has hooks of the caller's.

    What was remembered of the model may have caused it, and a second run would tell. But hooks may
    act in the first run alone, and the second would then be of another model.

    Raises:
        DLAError: the same, with what to do next.
    """
    path = next(callers_hooks(model), None)
    if path is not None:
        said = str(error).rstrip(".")
        raise type(error)(
            f"{said}. {path or 'The model'} has a hook of yours, so the model was not run a "
            "second time. If a weight was changed through .data, call again: it is measured anew"
        ) from error


def check_global_hooks() -> None:
    """Refuse hooks that torch calls for every module.

    They run ahead of every hook of a module, so that what they change cannot be told from what
    the module computes.

    Raises:
        UnsupportedModelError: naming the first of them.
    """
    tables = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
    for table in tables:
        for hook in list(table.values()) if table else ():
            if is_callers(hook):
                name = getattr(hook, "__qualname__", type(hook).__qualname__)
                raise UnsupportedModelError(
                    f"a global module hook ({name}) is on, which changes every module of this "
                    "process and cannot be attributed; take it off, or put hooks on the modules "
                    "themselves"
                )
