"""The truth about encoder-decoders: stored vectors, and the model run again without a part.

Nothing here is shared with the library. Names of modules are written down for each family.

    oracle = Oracle(model, "t5", given)
    oracle.parts(5, 7)                                  # {"embed": [batch, pos], ..., "bias": ...}
    oracle.without(2, "cross", channels)                # [batch, pos, vocab], last norm frozen
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch

LN, RMS, RMS1 = "layer norm", "rms norm", "rms norm with weight + 1"


@dataclasses.dataclass(frozen=True)
class Family:
    """Names of modules: the blocks, the last norm, and what each block writes, in order."""

    layers: str
    norm: str
    kind: str
    writes: dict[str, str]
    post: dict[str, str]
    o_proj: dict[str, str]
    v_proj: str
    head: str
    positions: str | None = None


_T5 = Family(
    "decoder.block",
    "decoder.final_layer_norm",
    RMS,
    {
        "attn_out": "layer.0.SelfAttention",
        "cross_attn_out": "layer.1.EncDecAttention",
        "mlp_out": "layer.2.DenseReluDense",
    },
    {},
    {"self": "layer.0.SelfAttention.o", "cross": "layer.1.EncDecAttention.o"},
    "layer.1.EncDecAttention.v",
    "lm_head",
)
_BART = Family(
    "model.decoder.layers",
    "model.decoder.layer_norm",
    LN,
    {"attn_out": "self_attn", "cross_attn_out": "encoder_attn", "mlp_out": "fc2"},
    {},
    {"self": "self_attn.out_proj", "cross": "encoder_attn.out_proj"},
    "encoder_attn.v_proj",
    "lm_head",
)
_GEMMA = Family(
    "model.decoder.layers",
    "model.decoder.norm",
    RMS1,
    {
        "attn_out": "post_self_attn_layernorm",
        "cross_attn_out": "post_cross_attn_layernorm",
        "mlp_out": "post_feedforward_layernorm",
    },
    {"self": "post_self_attn_layernorm", "cross": "post_cross_attn_layernorm"},
    {"self": "self_attn.o_proj", "cross": "cross_attn.o_proj"},
    "cross_attn.v_proj",
    "lm_head.out_proj",
)
FAMILIES = {
    "t5": _T5,
    "mt5": _T5,
    "mbart": _BART,
    "pegasus": dataclasses.replace(_BART, positions="model.decoder.embed_positions"),
    "m2m_100": dataclasses.replace(_BART, positions="model.decoder.embed_positions"),
    "whisper": dataclasses.replace(
        _BART, positions="model.decoder.embed_positions", head="proj_out"
    ),
    "t5gemma": _GEMMA,
}


class Oracle:
    """One model and what it is run on.

    Args:
        model: in float64.
        name: of its family.
        given: arguments of its forward.
    """

    def __init__(self, model, name, given):
        self.model, self.family, self.given = model, FAMILIES[name], given
        self.blocks = model.get_submodule(self.family.layers)
        self.norm = model.get_submodule(self.family.norm)
        self._seen = {}
        places = {("norm",): (self.norm, True)}
        for layer, block in enumerate(self.blocks):
            places["start", layer] = block, True
            for label, path in self.family.writes.items():
                places["write", f"{layer}_{label}"] = block.get_submodule(path), False
            for which, path in self.family.post.items():
                places["post", layer, which] = block.get_submodule(path), True
        if self.family.positions:
            places["positions",] = model.get_submodule(self.family.positions), False
        with contextlib.ExitStack() as stack:
            for key, (module, before) in places.items():
                stack.enter_context(self._kept(key, module, before))
            self.logits = self.run()

    @torch.no_grad()
    def run(self):
        """The logits [batch, pos, vocab] before a cap."""
        logits = self.model(**self.given, use_cache=False).logits
        config = getattr(self.model.config, "decoder", None)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.atanh(logits / cap)

    @torch.no_grad()
    def parts(self, answer, incorrect):
        """What each part adds to the difference of two logits, and the bias."""
        stream = self._seen["norm",]
        readout = self.model.get_submodule(self.family.head).weight
        row = readout[answer] - readout[incorrect]
        scale = self._logit_scale()

        def read(x):
            return scale * self._frozen(self.norm, stream, x) @ row

        bias = read(torch.zeros_like(stream))
        start = self._seen["start", 0]
        named = {key[1]: x for key, x in self._seen.items() if key[0] == "write"}
        if "positions" in {key[0] for key in self._seen}:
            named["pos_embed"] = self._seen["positions",].expand_as(start)
            start = start - named["pos_embed"]
        found = {label: read(x) - bias for label, x in {"embed": start, **named}.items()}
        behind = getattr(self.model, "final_logits_bias", None)
        if behind is not None:
            bias = bias + behind[0, answer] - behind[0, incorrect]
        return {**found, "bias": bias}

    def without(self, layer, which, channels):
        """The logits where one projection does not read some channels, all norms as before."""
        linear = self.blocks[layer].get_submodule(self.family.o_proj[which])

        def hook(_, args):
            changed = args[0].clone()
            changed[..., channels] = 0
            return (changed,)

        return self._changed(linear.register_forward_pre_hook(hook), layer, which)

    def without_value(self, layer, column, channels):
        """The logits where one position of the encoder gives no value to some channels."""
        linear = self.blocks[layer].get_submodule(self.family.v_proj)

        def hook(_, args, out):
            changed = out.clone()
            changed[:, column, channels] = 0
            return changed

        return self._changed(linear.register_forward_hook(hook), layer, "cross")

    def _changed(self, handle, layer, which):
        with contextlib.ExitStack() as stack:
            stack.callback(handle.remove)
            stack.enter_context(self._held(self.norm, self._seen["norm",]))
            if ("post", layer, which) in self._seen:
                post = self.blocks[layer].get_submodule(self.family.post[which])
                stack.enter_context(self._held(post, self._seen["post", layer, which]))
            if layer == len(self.blocks) - 1:  # what follows is held, too
                for path in list(self.family.writes.values())[-1:]:
                    held = self._seen["write", f"{layer}_mlp_out"]
                    module = self.blocks[layer].get_submodule(path)
                    stack.enter_context(self._replaced(module, lambda args, out, x=held: x))
                if which == "self":
                    held = self._seen["write", f"{layer}_cross_attn_out"]
                    module = self.blocks[layer].get_submodule(self.family.writes["cross_attn_out"])
                    stack.enter_context(self._replaced(module, lambda args, out, x=held: x))
            return self.run()

    def _logit_scale(self):
        scaled = getattr(self.model.config, "scale_decoder_outputs", False)
        return self.model.config.d_model**-0.5 if scaled else 1.0

    def _frozen(self, norm, seen, x):
        """The norm of x, with the scale that it had."""
        eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
        if self.family.kind == LN:
            scale = (seen.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
            return (x - x.mean(-1, keepdim=True)) / scale * norm.weight + norm.bias
        scale = (seen.square().mean(-1, keepdim=True) + eps).sqrt()
        return x / scale * (norm.weight + (self.family.kind == RMS1))

    @contextlib.contextmanager
    def _held(self, norm, seen):
        with self._replaced(norm, lambda args, out: self._frozen(norm, seen, args[0])):
            yield

    @contextlib.contextmanager
    def _replaced(self, module, make):
        def hook(_, args, out):
            if isinstance(out, tuple):
                return (make(args, out), *out[1:])
            return make(args, out)

        handle = module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _kept(self, key, module, before):
        def hook(_, args, kwargs, *out):
            x = (args[0] if args else kwargs["hidden_states"]) if before else out[0]
            self._seen[key] = (x[0] if isinstance(x, tuple) else x).detach().clone()

        how = module.register_forward_pre_hook if before else module.register_forward_hook
        handle = how(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
