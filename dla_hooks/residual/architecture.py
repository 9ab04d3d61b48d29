"""Declarations: an adapter's list of the modules that write to the residual stream.

A declaration names modules. It holds no values and no arithmetic. Norms, scales, gains, caps,
biases and head widths are measured on the model itself, in :mod:`dla_hooks.modules.norms` and
:mod:`dla_hooks.calibration.scales`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Heads:
    """Attention heads, side by side in the input of an output projection.

    Attributes:
        proj: the output projection, relative to the block; its input is ``z`` flattened to
            [batch, pos, head * d_head], head after head. The module that holds it is taken to be
            the attention module itself.
        count: the config field with the number of (query) heads.
        post_norm: the norm, relative to the block and where it has one, between the projection
            and the term, if the term's ``module`` comes after it.
        cross: they read what an encoder put out (``L3X0``), not the stream itself (``L3H0``).
    """

    proj: str
    count: str = "num_attention_heads"
    post_norm: str | None = None
    cross: bool = False


@dataclass(frozen=True)
class Write:
    """One term that blocks add to the residual stream. Blocks without its module lack it.

    Attributes:
        label: what the term is called; block ``l`` labels it ``{l}_{label}``.
        module: the module, relative to the block, whose output is the term. Several names
            stand for the first one that a block has. Names differ between versions of
            transformers, and between kinds of block in one model.
        post_norm: the norm, in blocks that have it, between that output and the stream. The term
            is then the norm's output, and parts of ``module``'s output pass through it.
        heads: how the term splits into attention heads, if it does.
        beside: for a term that is added between this block and the next: the list of modules,
            from the causal LM downwards, whose next element holds ``module``.
        where: only blocks that have this module, too, have the term.
        by_row: the block's keyword argument, if any, with a number for each position that the block
            multiplies the term by, as for positions that no image is read at.
    """

    label: str
    module: str | tuple[str, ...]
    post_norm: str | None = None
    heads: Heads | None = None
    beside: str | None = None
    where: str | None = None
    by_row: str | None = None


@dataclass(frozen=True)
class Architecture:
    """The declaration of the models of one or more ``model_type``.

    Attributes:
        model_types: the values of ``config.model_type`` that this describes; the name of the class
            for a model without one.
        layers: the list of blocks, from the causal LM downwards.
        final_norm: the norm between the last block and the unembedding.
        writes: the terms that each block adds to the stream, in this order.
        positions: the module whose output is added to the token embeddings, if positions enter
            the stream (learned position embeddings); rotary and ALiBi models have none.
        position_limit: the config field with the longest prompt that the model's position table
            can index, if a longer one cannot run.
        start: the module whose output begins the stream, if that is not the first block's
            input.
        after_norm: linear modules, if any, between the final norm and the unembedding.
        between: what the model itself adds to the stream behind some of its blocks, if it does, as
            it is called there (``deepstack``); block ``l`` labels it ``{l}_deepstack``.
        reads: the argument of the forward with the vectors [batch, n, d_model] that cross-attention
            reads, if the blocks that hold it run only where there are such vectors. Made-up runs
            are given some.
    """

    model_types: tuple[str, ...]
    layers: str
    final_norm: str
    writes: tuple[Write, ...]
    positions: str | None = None
    position_limit: str | None = None
    start: str | None = None
    after_norm: tuple[str, ...] = ()
    between: str | None = None
    reads: str | None = None

    @property
    def decoder(self) -> str:
        """The path of the module that holds the blocks."""
        return self.layers.rpartition(".")[0]

    def moved_to(self, decoder: str) -> Architecture | None:
        """The same declaration for a decoder that stands elsewhere.

        Args:
            decoder: the path of the module that holds the blocks there.

        Returns:
            None where the final norm is no part of the decoder.
        """
        old = f"{self.decoder}." if self.decoder else ""
        new = f"{decoder}." if decoder else ""
        if not self.final_norm.startswith(old):
            return None

        def moved(path: str) -> str:
            return new + path.removeprefix(old) if path.startswith(old) else path

        return replace(
            self,
            layers=moved(self.layers),
            final_norm=moved(self.final_norm),
            writes=tuple(
                replace(write, beside=None if write.beside is None else moved(write.beside))
                for write in self.writes
            ),
            positions=None if self.positions is None else moved(self.positions),
            start=None if self.start is None else moved(self.start),
            after_norm=tuple(moved(path) for path in self.after_norm),
        )


@dataclass(frozen=True)
class Refusal:
    """The reason why models of some types cannot be attributed.

    Attributes:
        model_types: the values of ``config.model_type``.
        place: the part of the model that prevents it.
        reason: the computation there.
        needed: the extension that an attribution would need.
        doors: the kinds of model (:data:`dla_hooks.doors.DOORS`) that it holds for; all where it
            names none.
    """

    model_types: tuple[str, ...]
    place: str
    reason: str
    needed: str
    doors: tuple[str, ...] = ()
