"""From a model and its declaration to the modules themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from dla_hooks.backends import Backend
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.hooks import Place, Use
from dla_hooks.modules.linear import input_width, output_width
from dla_hooks.residual.architecture import Architecture, Write
from dla_hooks.residual.stream import Block, HeadSite, Stream, WriteSite


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

    def refusal(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{type(self.model).__name__} (model type {self.backend.model_type!r}) does not "
            f"fit the declaration of {', '.join(self.architecture.model_types)}: {what}"
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
            if inner is None and found is self.model:
                # LlamaForQuestionAnswering calls the decoder `transformer`, not `model`.
                inner = getattr(found, getattr(found, "base_model_prefix", "") or name, None)
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
            found = (self.write(module, name, layer, w, use) for w in self.architecture.writes)
            writes = tuple(write for write in found if write is not None)
            twice = [n for n, k in Counter(w.name for w in writes).items() if k > 1]
            if twice:
                raise self.refusal(f"{twice[0]} is said to make two writes of one block")
            if not writes:
                names = [write.module for write in self.architecture.writes]
                raise self.refusal(f"{name} has none of the modules {names}")
            blocks.append(Block(layer, module, name, use, writes))
        return self.with_uses(tuple(blocks))

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
        names = (write.module,) if isinstance(write.module, str) else write.module
        path = next((name for name in names if self.optional(block, name) is not None), None)
        if path is None:
            return None
        post_norm = self.optional(block, write.post_norm) if write.post_norm else None
        return WriteSite(
            label=f"{layer}_{write.label}",
            layer=layer,
            module=self.module(block, path),
            post_norm=post_norm,
            name=f"{prefix}.{path if post_norm is None else write.post_norm}",
            use=use,
            heads=self.heads(block, prefix, write),
        )

    def heads(self, block: nn.Module, prefix: str, write: Write) -> HeadSite | None:
        proj = self.optional(block, write.heads.proj) if write.heads is not None else None
        if write.heads is None or proj is None:
            return None
        attention: Any = self.module(block, write.heads.proj.rpartition(".")[0])
        if isinstance(write.module, str) and write.heads.proj.startswith(f"{write.module}."):
            attention = self.module(block, write.module)  # a projection may be wrapped once more
        # The attention module first: layers may differ, and the config has one number for all.
        n_heads = getattr(attention, "num_heads", None)
        if isinstance(n_heads, bool) or not isinstance(n_heads, int):
            n_heads = self.number(write.heads.count)
        linear = self.backend.linear(attention, proj)
        try:
            width = input_width(linear)
        except UnsupportedModelError:
            width = 0  # unit="head" says why it is refused; the other units need no width
        if width % n_heads:
            raise self.refusal(
                f"{prefix}.{write.heads.proj} reads {width} channels, which {n_heads} heads "
                f"(config.{write.heads.count}) cannot share evenly"
            )
        after = write.heads.post_norm or write.post_norm
        return HeadSite(
            proj=proj,
            name=f"{prefix}.{write.heads.proj}",
            linear=linear,
            attention=attention,
            n_heads=n_heads,
            d_head=width // n_heads,
            post_norm=self.optional(block, after) if after else None,
            post_norm_name=f"{prefix}.{after}" if after else "",
        )
