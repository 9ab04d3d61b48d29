"""The pieces that attributions are made of, as stacks of vectors: TransformerLens' primitives.

Its methods live on an ``ActivationCache``; here they take a model and an input, or a ``cache``.
Only the selected positions are kept, and only what the stack is made of. On a Hugging Face model
every vector is as it stands in the stream: scales and gains of the model are in it.

Normalised (``apply_ln``) means centred, for a LayerNorm, and divided by the scale that the norm
used; its gain and bias are not applied, as in a model whose norms are folded.
"""

from __future__ import annotations

from dla_hooks.stacks.heads import stack_head_results
from dla_hooks.stacks.logit_attrs import apply_ln_to_stack, logit_attrs
from dla_hooks.stacks.neurons import stack_neuron_results
from dla_hooks.stacks.promoted import promoted_tokens
from dla_hooks.stacks.residual import accumulated_resid, decompose_resid

__all__ = [
    "accumulated_resid",
    "apply_ln_to_stack",
    "decompose_resid",
    "logit_attrs",
    "promoted_tokens",
    "stack_head_results",
    "stack_neuron_results",
]
