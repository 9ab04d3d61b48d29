"""From a model and its declaration to the modules themselves.

Decided here: which module a declared name stands for, and each write's label (``3_mlp_out``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import nn

from dla_hooks.backends import Backend
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.hooks import Place, Use
from dla_hooks.modules.linear import input_width, output_width
from dla_hooks.modules.past_wrappers import NONE
from dla_hooks.modules.user_hooks import is_wrapper
from dla_hooks.residual.architecture import Architecture, Write
from dla_hooks.residual.carriers import with_carriers
from dla_hooks.residual.head_site import HeadSite
from dla_hooks.residual.look import child, descend, look
from dla_hooks.residual.stream import Block, Stream, WriteSite


def locate(backend: Backend, architecture: Architecture) -> Stream:
    """Find every module that a declaration names.

    Args:
        backend: of a model that it accepts.
        architecture: the declaration.

    Raises:
        UnsupportedModelError: when the model lacks a module that the declaration names.
    """
    model = backend.root
    finder = _Finder(backend, architecture)
    found = (finder.optional(model, path) for path in architecture.after_norm)
    after_norm = tuple(module for module in found if module is not None)
    unembed = backend.unembed()
    limit = architecture.position_limit
    blocks = finder.blocks()
    return Stream(
        backend=backend,
        architecture=architecture,
        blocks=blocks,
        positions=finder.positions(),
        declared_start=finder.start(),
        final_norm=finder.final_norm(),
        after_norm=after_norm,
        unembed=unembed,
        d_model=input_width((*after_norm, unembed)[0]),
        vocabulary=output_width(unembed),
        position_limit=finder.number(limit)
        if limit and backend.number(limit) is not None
        else None,
    )


class _Finder:
    """Resolves a declaration's paths and field names. A refusal names the missing one."""

    def __init__(self, backend: Backend, architecture: Architecture) -> None:
        self.backend = backend
        self.model = backend.root
        self.architecture = architecture
        self._numbers: dict[str, Any] = {}

    def refusal(self, what: str) -> UnsupportedModelError:
        types = self.architecture.model_types
        known = types[0] if len(types) == 1 else f"{types[0]} and {len(types) - 1} other types"
        return UnsupportedModelError(
            f"{what}: {type(self.model).__name__} (model type {self.backend.model_type!r}) does "
            f"not fit the declaration of {known}"
        )

    def module(self, root: nn.Module, path: str) -> nn.Module:
        found = self.optional(root, path)
        if found is None:
            raise self.refusal(f"there is no module {path!r}")
        return found

    def positions(self) -> Place | None:
        path = self.architecture.positions
        found = self.optional(self.model, path) if path else None
        return None if path is None or found is None else Place(found, path)

    def start(self) -> Place | None:
        path = self.architecture.start
        return Place(self.module(self.model, path), path) if path else None

    def final_norm(self) -> Place:
        found = self.optional(self.model, self.architecture.final_norm)
        stand_in = self.backend.last_stream(self.architecture.layers) if found is None else None
        if stand_in is not None:
            return Place(self.module(self.model, stand_in), stand_in)
        ours = None
        if found is None:
            ours = self.backend.stand_in(self.architecture.layers, self.architecture.final_norm)
        if ours is not None:
            return Place(*ours)
        if found is None:
            raise self.refusal(
                f"there is no final norm ({self.architecture.final_norm}), as in models whose "
                "blocks norm their own sum; those are no sums of writes"
            )
        return Place(found, self.architecture.final_norm)

    def optional(self, root: nn.Module, path: str) -> nn.Module | None:
        """Return the module, or None if it is missing or switched off by the config."""
        found: Any = root
        for name in filter(None, path.split(".")):
            inner = getattr(found, name, None)
            if inner is None and found is self.model and "." in path:
                # LlamaForQuestionAnswering calls the decoder `transformer`, not `model`.
                inner = getattr(found, getattr(type(found), "base_model_prefix", "") or name, None)
            found = inner
        return found if isinstance(found, nn.Module) else None

    def number(self, field: str) -> int:
        value = self.backend.number(field)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refusal(f"config.{field} should be a number, but is {value!r}")
        return value

    def blocks(self) -> tuple[Block, ...]:
        path = self.architecture.layers
        layers: Any = self.module(self.model, path)
        modules = list(layers) if isinstance(layers, Iterable) else list(layers.children())
        if not modules:
            raise self.refusal(f"{path} holds no blocks")
        uses = Counter(modules)
        so_far: Counter[nn.Module] = Counter()
        blocks = []
        for layer, module in enumerate(modules):
            use = Use(so_far[module], uses[module])
            so_far[module] += 1
            name = f"{path}.{layer}"
            inner, inside = self.unwrapped(module, name)
            found = (self.write(inner, inside, layer, w, use) for w in self.architecture.writes)
            writes = tuple(write for write in found if write is not None)
            names = [write.name for write in writes]
            if len(set(names)) < len(names):
                twice = next(one for one in names if names.count(one) > 1)
                raise self.refusal(f"{twice} is said to make two writes of one block")
            if not writes:
                sought = ", ".join(self.first_names)
                raise self.refusal(f"{name} has none of the modules {sought}")
            optional = self.architecture.reads is not None and any(
                write.heads is not None and write.heads.cross for write in writes
            )
            block = Block(layer, module, name, use, writes, optional=optional)
            if inner is not module and self.goes_past(module):
                block = replace(block, inner=Place(inner, inside, use))
            blocks.append(block)
        return with_carriers(self.with_uses(tuple(blocks)))

    def goes_past(self, wrapper: nn.Module) -> bool:
        """Whether made-up runs go past a wrapper, and a real one shows what it writes."""
        return self.backend.past != NONE and is_wrapper(wrapper, self.model)

    @cached_property
    def first_names(self) -> list[str]:
        """What at least one of the writes of each block is found by."""
        here = (write for write in self.architecture.writes if write.beside is None)
        paths = (name for write in here for name in _names(write))
        return list(dict.fromkeys(path.partition(".")[0] for path in paths))

    def unwrapped(self, block: nn.Module, name: str) -> tuple[nn.Module, str]:
        """The module that has a block's parts: the block, or the one that it is a wrapper of."""
        names = self.first_names
        inside = descend(block, lambda one: any(child(one, first) for first in names))
        if is_wrapper(block, self.model):
            # It may hand on attributes of what it wraps, and has none of the modules itself.
            own = descend(block, lambda one: not one._modules.keys().isdisjoint(names))
            inside = own or inside
        return (block, name) if inside is None else (inside[0], ".".join((name, *inside[1])))

    def with_uses(self, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        """Number the uses of every write's module, since blocks may share it."""
        total = Counter(write.written_by for block in blocks for write in block.writes)
        so_far: Counter[nn.Module] = Counter()
        counted = []
        for block in blocks:
            writes = []
            for write in block.writes:
                use = Use(so_far[write.written_by], total[write.written_by])
                so_far[write.written_by] += 1
                heads = write.heads
                if heads is not None and heads.use != use:
                    heads = replace(heads, use=use)
                if write.use != use or heads is not write.heads:
                    write = replace(write, use=use, heads=heads)
                writes.append(write)
            changed = any(a is not b for a, b in zip(writes, block.writes, strict=True))
            counted.append(replace(block, writes=tuple(writes)) if changed else block)
        return tuple(counted)

    def write(
        self, block: nn.Module, prefix: str, layer: int, write: Write, use: Use
    ) -> WriteSite | None:
        if write.beside is not None:
            neighbours: Any = self.module(self.model, write.beside)
            if not hasattr(neighbours, "__len__"):
                raise self.refusal(f"{write.beside} is no list of modules")
            if layer + 1 >= len(neighbours):
                return None
            block, prefix = neighbours[layer + 1], f"{write.beside}.{layer + 1}"
        found = next(filter(None, (look(block, name) for name in _names(write))), None)
        if found is None or (write.where is not None and look(block, write.where) is None):
            return None
        post_norm = look(block, write.post_norm) if write.post_norm else None
        heads, missing = self.heads(block, prefix, write)
        return WriteSite(
            label=f"{layer}_{write.label}",
            layer=layer,
            module=found.module,
            post_norm=None if post_norm is None else post_norm.module,
            name=f"{prefix}.{(post_norm or found).path}",
            use=use,
            heads=heads,
            without_heads=missing,
            by_row=write.by_row,
        )

    def heads(self, block: nn.Module, prefix: str, write: Write) -> tuple[HeadSite | None, str]:
        """Where a write's heads can be seen; or the path of the projection that is not there."""
        if write.heads is None:
            return None, ""
        found = look(block, write.heads.proj)
        if found is None:
            return None, f"{prefix}.{write.heads.proj}"
        proj = found.module
        # The attention itself, inside of its wrappers. Its projection may be wrapped once more.
        inside = isinstance(write.module, str) and write.heads.proj.startswith(f"{write.module}.")
        depth = len(str(write.module).split(".")) if inside else -1
        attention = found.holders[depth]
        after = write.heads.post_norm or write.post_norm
        post_norm = look(block, after) if after else None
        linear = self.backend.linear(attention, proj)
        n_heads, width = self.declared_heads(attention, write.heads.count), _width(linear)
        site = HeadSite(
            proj=proj,
            name=f"{prefix}.{found.path}",
            linear=linear,
            attention=attention,
            n_heads=n_heads,
            d_head=width // n_heads if n_heads and width % n_heads == 0 else 0,
            post_norm=None if post_norm is None else post_norm.module,
            post_norm_name="" if post_norm is None else f"{prefix}.{post_norm.path}",
            cross=write.heads.cross,
        )
        return site, ""

    def declared_heads(self, attention: Any, field: str) -> int:
        """The number of heads that a layer or the config names; 0 where neither does."""
        # The layer knows best: layers of one model may differ, and then the config has no answer.
        said: Any = getattr(attention, "num_heads", None)
        if isinstance(said, bool) or not isinstance(said, int):
            if field not in self._numbers:  # configs take long to read
                self._numbers[field] = self.backend.number(field)
            said = self._numbers[field]
        return said if isinstance(said, int) and not isinstance(said, bool) and said > 0 else 0


def _names(write: Write) -> tuple[str, ...]:
    return (write.module,) if isinstance(write.module, str) else write.module


def _width(linear: nn.Module) -> int:
    """The width of a projection's input, or 0 where a run must show it."""
    try:
        return input_width(linear)
    except UnsupportedModelError:
        return 0
