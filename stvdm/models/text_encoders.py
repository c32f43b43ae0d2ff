# SPDX-License-Identifier: Apache-2.0
"""Captions as features: a word tokenizer and a small encoder that is trained together with the model.

    text_BSE = LayerNorm(Block(... Block(words)))       pre-norm blocks, every word sees every word, rotary positions

Which words belong together is most of what a caption says ("a red ball ... and a blue square ..."). Two choices here
decide how soon that is learned, if at all: positions are rotary, so that "the next word" is the same thing everywhere
in a caption, and words start at unit variance, so that a first block's average over the caption does not drown them.

Whatever turns captions into (text_BSE, mask_BS) can condition a DiT; published towers that do are in `models.t5` and
`models.clip`, their tokenizers in `models.tokenizers`.

    tokenizer = WordTokenizer(collect_words(captions), max_tokens=32)
    tokens_BS, mask_BS = tokenizer(["a red ball bounces to the right", ""])
    encoder = TextEncoder(tokenizer.vocabulary_size, width=128, num_layers=2, num_heads=4, max_tokens=32)
    text_BSE = encoder.apply({"params": params}, tokens_BS, mask_BS)
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from stvdm.models import embeddings
from stvdm.models.attention import cross_attention
from stvdm.models.linear import linear
from stvdm.sharding import constrain, partitioned

PAD, START, UNKNOWN = 0, 1, 2
NUM_SPECIAL = 3

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")  # letters and digits of any script; "don't" is one word


def collect_words(captions: Iterable[str]) -> tuple[str, ...]:
    """The vocabulary of these captions: every word once, in lower case, sorted."""
    return tuple(sorted({word for caption in captions for word in _split(caption)}))


class WordTokenizer:
    """Captions to word numbers: 0 pads, 1 starts every caption (also ""), 2 is a word outside the vocabulary.

    Args:
      words: the vocabulary, e.g. from `collect_words`; word i becomes number i + 3.
      max_tokens: S, the start included; longer captions are cut, with one warning for each tokenizer.

    Raises:
      ValueError: if a word stands twice, or is not one that `collect_words` can give.
    """

    def __init__(self, words: Sequence[str], max_tokens: int):
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: expected at least 1, the start of every caption.")
        self.words = tuple(words)
        self.max_tokens = max_tokens
        self._number = {word: NUM_SPECIAL + i for i, word in enumerate(self.words)}
        self._warned = False
        wrong = [word for word, count in Counter(self.words).items() if count > 1 or _split(word) != [word]]
        if wrong:
            raise ValueError(f"words: expected single words in lower case, each once; change {wrong}.")

    @property
    def vocabulary_size(self) -> int:
        """Rows of an embedding for these words: the vocabulary and the three special tokens."""
        return NUM_SPECIAL + len(self.words)

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens_BS int32, mask_BS bool): padded to max_tokens, the mask True where a token is real."""
        tokens_BS = np.full((len(captions), self.max_tokens), PAD, np.int32)
        for row, caption in zip(tokens_BS, captions, strict=True):
            numbers = [START, *(self._number.get(word, UNKNOWN) for word in _split(caption))]
            if len(numbers) > self.max_tokens and not self._warned:
                self._warned = True
                warnings.warn(
                    f"caption {caption!r} has {len(numbers)} tokens, its start included: "
                    f"only the first max_tokens={self.max_tokens} are read.",
                    stacklevel=2,
                )
            row[: len(numbers)] = numbers[: self.max_tokens]
        return tokens_BS, tokens_BS != PAD

    def problem(self, caption: str) -> str:
        """Why a caption cannot be read as it stands, and what to change; "" if it can."""
        unknown = [word for word in dict.fromkeys(_split(caption)) if word not in self._number]
        known = f"it knows {len(self.words)}: {', '.join(self.words)}"
        if not _split(caption):
            return f"prompt {caption!r}: expected at least one word; the model reads words alone, and {known}."
        if unknown:
            return f"prompt {caption!r}: the model never saw the words {', '.join(map(repr, unknown))}; {known}."
        num_tokens = 1 + len(_split(caption))
        if num_tokens > self.max_tokens:
            return f"prompt {caption!r}: {num_tokens} tokens, and the model reads {self.max_tokens}; shorten it."
        return ""


class TextEncoder(nn.Module):
    """A small pre-norm transformer over words: (tokens_BS, mask_BS) -> text_BSE, float32, zero at padding."""

    vocabulary_size: int
    width: int
    num_layers: int
    num_heads: int
    max_tokens: int

    @nn.compact
    def __call__(self, tokens_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
        E, num_tokens = self.width, tokens_BS.shape[1]
        if num_tokens > self.max_tokens:
            raise ValueError(f"{num_tokens} tokens: this encoder reads at most max_tokens={self.max_tokens}.")
        if E % (2 * self.num_heads):
            raise ValueError(f"width={E}: use a multiple of 2 * num_heads={2 * self.num_heads}; positions turn pairs.")
        words_VE = self.param(
            "words", partitioned(nn.initializers.normal(1.0), "vocab", "width"), (self.vocabulary_size, E)
        )
        text_BSE = jnp.asarray(words_VE)[tokens_BS]
        turns = embeddings.rotary_turns(jnp.arange(num_tokens, dtype=jnp.float32)[:, None], E // self.num_heads)
        for layer in range(self.num_layers):
            text_BSE = TextBlock(self.num_heads, name=f"block_{layer}")(text_BSE, mask_BS, turns)
        return _norm("norm")(text_BSE) * mask_BS[..., None]


class TextBlock(nn.Module):
    """x + Attention(LayerNorm(x)), then x + MLP(LayerNorm(x))."""

    num_heads: int

    @nn.compact
    def __call__(self, text_BSE: jax.Array, mask_BS: jax.Array, turns: embeddings.Turns) -> jax.Array:
        (B, S, E), A = text_BSE.shape, self.num_heads
        y_BSE = _norm("attention_norm")(text_BSE)
        q, k, v = (
            constrain(
                linear(E, "width", "heads", name=name)(y_BSE).reshape(B, S, A, E // A), "batch", None, "heads", None
            )
            for name in ("query", "key", "value")
        )
        q, k = embeddings.rotate(q, turns), embeddings.rotate(k, turns)
        y_BSE = cross_attention(q, k, v, mask_BS).reshape(B, S, E)
        text_BSE = text_BSE + linear(E, "heads", "width", name="out")(y_BSE)

        y_BSF = nn.gelu(linear(4 * E, "width", "mlp", name="mlp_in")(_norm("mlp_norm")(text_BSE)))
        text_BSE = text_BSE + linear(E, "mlp", "width", name="mlp_out")(y_BSF)
        return constrain(text_BSE, "batch", None, None)


def _split(caption: str) -> list[str]:
    return _WORD.findall(caption.lower())


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=1e-6,
        scale_init=partitioned(nn.initializers.ones, "width"),
        bias_init=partitioned(nn.initializers.zeros, "width"),
        name=name,
    )
