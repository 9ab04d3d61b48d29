"""The demonstration model's tokenizer: one token per word, leading space included, as in GPT-2."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dla_hooks.demo.corpus import vocabulary_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unk|>"


def build_tokenizer(texts: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer that knows every word of ``texts`` (default: of the corpus).

    GPT-2's own byte-level splitting cuts the text, writing a leading space as "\u0120". So " Mary"
    and "Mary" are two tokens, and decoding gives back every space. What GPT-2 would then cut into
    smaller pieces stays one token here: a known word, or else the unknown token.

    As with GPT-2, one token begins and ends a text and pads a batch, and encoding adds none.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # A dictionary and not a set: the order of first occurrence gives every word the same number
    # in every process.
    vocabulary = {END_OF_TEXT: 0, UNKNOWN: 1}
    for text in vocabulary_text() if texts is None else texts:
        for word, _ in splitter.pre_tokenize_str(text):
            vocabulary.setdefault(word, len(vocabulary))

    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        # Without this it would also make token types, which GPT-2 takes for further embeddings.
        model_input_names=["input_ids", "attention_mask"],
    )
