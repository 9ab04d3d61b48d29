"""A model of the zoo on the workbench: its places, and all that interventions have done to it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from oracle_families import Family, family_of, module_at
from torch import Tensor, nn
from zoo import ZOO, build, supports

import dla_hooks

NAMES = [spec.name for spec in ZOO]
DTYPES = [torch.float64, torch.float64, torch.float32, torch.float32, torch.bfloat16]


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a module stands: whatever stands there now is found, wrappers and adapters included."""

    parent: nn.Module
    name: str

    @property
    def now(self) -> nn.Module:
        return self.parent._modules[self.name]

    def put(self, module: nn.Module) -> None:
        self.parent._modules[self.name] = module


@dataclasses.dataclass(frozen=True)
class Block:
    """The places of one block; post-norms only where the family has them."""

    whole: Slot
    attn: Slot
    mlp: Slot
    o_proj: Slot
    norms: list[Slot]
    post_attn: Slot | None
    post_mlp: Slot | None


@dataclasses.dataclass
class Bench:
    """One draw's model, with what it is run on.

    Attributes:
        model: what is asked; the family's own model, or one around it.
        root: the family's own model.
        positional: whether some intervention treats positions differently, or expects a shape.
        only_sums: whether an intervention leaves it open what a row is; the sum is still held.
        contexts: what every run is made within.
        resets: called before every run, for interventions with a memory.
        said: a line for each intervention.
    """

    spec: str
    model: Any
    root: nn.Module
    family: Family
    random: random.Random
    generator: torch.Generator
    ids: Tensor
    mask: Tensor | None
    blocks: list[Block]
    positional: bool = False
    only_sums: bool = False
    contexts: list[Callable[[], Any]] = dataclasses.field(default_factory=list)
    resets: list[Callable[[], Any]] = dataclasses.field(default_factory=list)
    said: list[str] = dataclasses.field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.root.parameters()).dtype

    def chosen(self, *options: Any) -> Any:
        return options[self.random.randrange(len(options))]

    def noise(self, *shape: int) -> Tensor:
        noise = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return noise.to(self.dtype)

    def slot(self, path: str) -> Slot:
        """A place by its path from the root, as the family's table has it."""
        for alternative in path.split("|"):
            parent, _, name = alternative.rpartition(".")
            with contextlib.suppress(LookupError):
                found = Slot(module_at(self.root, parent) if parent else self.root, name)
                if name in found.parent._modules:
                    return found
        raise LookupError(path)

    @property
    def places(self) -> dict[str, Slot]:
        """Every place that an intervention may choose, by name; blocks by their number."""
        family = self.family
        found = {"embed": self.slot(family.embed), "final_norm": self.slot(family.final_norm)}
        found["head"] = self.slot(family.head)
        if family.positions is not None:
            found["positions"] = self.slot(family.positions)
        for number, block in enumerate(self.blocks):
            found |= {f"{number}.block": block.whole, f"{number}.attn": block.attn}
            found |= {f"{number}.mlp": block.mlp, f"{number}.o_proj": block.o_proj}
            found |= {f"{number}.norm{i}": slot for i, slot in enumerate(block.norms)}
        return found

    def place(self, *kinds: str) -> tuple[str, Slot]:
        """A random place, of some kinds ("attn", "block", "head", …); of none, any module."""
        if not kinds and self.random.random() < 0.2:
            name, _ = self.chosen(*list(self.root.named_modules())[1:])
            holder, _, last = name.rpartition(".")
            return name, Slot(self.root.get_submodule(holder), last)
        found = [name for name in self.places if not kinds or name.split(".")[-1][:4] in kinds]
        name = self.chosen(*found)
        return name, self.places[name]

    def reseed(self, seed: int) -> None:
        """Begin anew with random numbers: what comes next does not depend on what came before."""
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """What every run, ours and the library's, is made within."""
        for reset in self.resets:
            reset()
        with contextlib.ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", dla_hooks.DLAWarning)  # which draws look at
            for context in self.contexts:
                stack.enter_context(context())
            yield


def bench_of(rng: random.Random) -> Bench:
    """A model without interventions, and a prompt for it."""
    spec = rng.choice(NAMES)
    dtype = rng.choice(DTYPES)
    attn = rng.choice([attn for attn in ("eager", "sdpa") if supports(spec, attn)])
    model = _copied(spec, rng.randrange(2), dtype, attn)
    generator = torch.Generator().manual_seed(rng.randrange(2**16))
    batch, length = rng.randint(1, 3), rng.randint(2, 9)
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=generator)
    family = family_of(model)
    layers = module_at(model, family.layers)
    blocks = [block_at(family, layers, name) for name in layers._modules]
    mask = _mask(rng, batch, length)
    bench = Bench(spec, model, model, family, rng, generator, ids, mask, blocks)
    shown = "" if mask is None else f", mask {mask.int().tolist()}"
    bench.said.append(f"{spec} {str(dtype)[6:]} {attn}, ids {list(ids.shape)}{shown}")
    return bench


def block_at(family: Family, layers: nn.Module, name: str) -> Block:
    """The places of the block that stands at a name among the layers."""
    block = layers._modules[name]

    def slot(path: str) -> Slot:
        for alternative in path.split("|"):
            parent, _, last = alternative.rpartition(".")
            with contextlib.suppress(AttributeError):
                found = Slot(block.get_submodule(parent), last)
                if last in found.parent._modules:
                    return found
        raise LookupError(path)

    norms = [Slot(block, n) for n in block._modules if "norm" in n or n.startswith("ln_")]
    post = (
        (None, None) if family.post_norms is None else [Slot(block, n) for n in family.post_norms]
    )
    return Block(
        Slot(layers, name), slot(family.attn), slot(family.mlp), slot(family.o_proj), norms, *post
    )


@functools.lru_cache(maxsize=128)
def _built(spec: str, seed: int, dtype: torch.dtype, attn: str) -> nn.Module:
    return build(spec, seed, dtype, attn)


def _copied(spec: str, seed: int, dtype: torch.dtype, attn: str) -> Any:
    return copy.deepcopy(_built(spec, seed, dtype, attn))


def _mask(rng: random.Random, batch: int, length: int) -> Tensor | None:
    kind = rng.choice([None, None, None, None, "left", "right", "holes", "ones"])
    if kind is None:
        return None
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        gone = rng.randrange(length)
        if kind == "left":
            mask[row, :gone] = 0
        elif kind == "right":
            mask[row, length - gone :] = 0
        elif kind == "holes" and 0 < gone < length - 1:
            mask[row, gone] = 0
    return mask
