# SPDX-License-Identifier: Apache-2.0
"""CLIP (Radford et al. 2021, arXiv:2103.00020): a tower that reads text and one that looks at images, which meet in
one space.

    text.embedding_BE = W_t LayerNorm(Layers(words + positions))[at the end of the text]
    image.embedding_BE = W_i LayerNorm(Layers(LayerNorm([class] patches + positions))[class])
    logits = exp(scale) cos(text, image)

    clip, params, tokenizer = judges.clip("openai/clip-vit-base-patch32")        # stvdm.interop.judges
    said = clip.apply({"params": params}, tokenizer(["a red ball"])[0], method="read")
    seen = clip.apply({"params": params}, prepare(frames_BHWC), method="look")   # `prepare`: bytes as it wants them

Beside the embedding each gives the states of its last layer and of all layers, which condition generators.

It cannot see: most of what makes a video one. A frame is looked at alone, at 224 pixels; counts, which thing has which
colour, and left and right move the embedding little (Yuksekgonul et al. 2023, arXiv:2210.01936).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from stvdm.models.linear import linear
from stvdm.models.transformer import Layers, norm
from stvdm.sharding import partitioned

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of its training images


class Seen(NamedTuple):
    """What a tower makes of its input, by `transformers`' names.

    embedding_BE: in the shared space, not made unit: text_embeds, image_embeds before their division.
    hidden_BND: last_hidden_state: of text after the last norm; of images, class first, before it.
    layers_BND: hidden_states: what enters the first layer, then what each layer gives.
    """

    embedding_BE: jax.Array
    hidden_BND: jax.Array
    layers_BND: tuple[jax.Array, ...]


class TextTower(nn.Module):
    """Tokens to `Seen`; a token sees those before it, and the embedding is taken at the first ``end_token``."""

    vocabulary_size: int = 49408
    max_tokens: int = 77
    width: int = 512
    num_layers: int = 12
    num_heads: int = 8
    mlp_width: int = 2048
    embedding: int | None = 512  # width of the shared space; None: not led there, as where generators read
    end_token: int = 49407
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, tokens_BS: jax.Array, mask_BS: jax.Array | None = None) -> Seen:
        """``mask_BS`` is True where a token is real; None: padding is looked at too, but only by padding behind it."""
        num_tokens = tokens_BS.shape[1]
        if num_tokens > self.max_tokens:
            raise ValueError(f"{num_tokens} tokens: this tower reads at most max_tokens={self.max_tokens}.")
        small = nn.initializers.normal(0.02)
        words_VD = self.param("words", partitioned(small, "vocab", "width"), (self.vocabulary_size, self.width))
        places_SD = self.param("positions", partitioned(small, None, "width"), (self.max_tokens, self.width))
        x_BSD = jnp.asarray(words_VD)[tokens_BS] + jnp.asarray(places_SD)[:num_tokens]
        layers = Layers(
            self.num_layers,
            self.num_heads,
            self.mlp_width,
            activation=self.activation,
            epsilon=self.epsilon,
            causal=True,
            dtype=self.dtype,
            name="layers",
        )(x_BSD, mask_BS)
        hidden_BSD = norm("norm", self.epsilon)(layers[-1])
        end_B = jnp.argmax(tokens_BS == self.end_token, axis=1)
        at_end_BD = jnp.take_along_axis(hidden_BSD, end_B[:, None, None], axis=1)[:, 0]
        embedding_BE = at_end_BD if self.embedding is None else _projection(self.embedding)(at_end_BD)
        return Seen(embedding_BE, hidden_BSD, layers)


class ImageTower(nn.Module):
    """Images as `prepare` makes them to `Seen`; a class token stands before the patches."""

    image_size: int = 224
    patch: int = 32
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    embedding: int | None = 512  # width of the shared space; None: not led there, as where generators look
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, image_BHWC: jax.Array) -> Seen:
        B, H, W, _ = image_BHWC.shape
        if {H, W} != {self.image_size}:
            raise ValueError(
                f"images of {H}x{W}: this tower looks at {self.image_size}x{self.image_size}; `prepare` them."
            )
        p, side = self.patch, self.image_size // self.patch
        patches = nn.Conv(
            self.width,
            (p, p),
            (p, p),
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            kernel_init=partitioned(nn.initializers.lecun_normal(), None, None, None, "width"),
            name="patches",
        )(image_BHWC)
        x_BND = patches.reshape(B, side * side, self.width)
        small = nn.initializers.normal(0.02)
        first_D = self.param("class", partitioned(small, "width"), (self.width,))
        places_ND = self.param("positions", partitioned(small, None, "width"), (1 + side * side, self.width))
        first_B1D = jnp.broadcast_to(jnp.asarray(first_D), (B, 1, self.width))
        x_BND = jnp.concatenate([first_B1D, x_BND.astype(jnp.float32)], axis=1) + jnp.asarray(places_ND)
        layers = Layers(
            self.num_layers,
            self.num_heads,
            self.mlp_width,
            activation=self.activation,
            epsilon=self.epsilon,
            dtype=self.dtype,
            name="layers",
        )(norm("first_norm", self.epsilon)(x_BND))
        class_BD = norm("norm", self.epsilon)(layers[-1][:, 0])
        embedding_BE = class_BD if self.embedding is None else _projection(self.embedding)(class_BD)
        return Seen(embedding_BE, layers[-1], layers)


class CLIP(nn.Module):
    """Both towers, and the logarithm of the scale of their logits."""

    text: TextTower
    image: ImageTower

    def setup(self) -> None:
        self.log_scale = self.param("log_scale", partitioned(nn.initializers.constant(np.log(1 / 0.07))), ())

    def read(self, tokens_BS: jax.Array, mask_BS: jax.Array | None = None) -> Seen:
        """What the text tower makes of tokens."""
        return self.text(tokens_BS, mask_BS)

    def look(self, image_BHWC: jax.Array) -> Seen:
        """What the image tower makes of images."""
        return self.image(image_BHWC)

    def __call__(self, tokens_BS: jax.Array, image_MHWC: jax.Array, mask_BS: jax.Array | None = None) -> jax.Array:
        """Logits (B, M): how well each text fits each image."""
        text_BE, image_ME = (unit(seen.embedding_BE) for seen in (self.read(tokens_BS, mask_BS), self.look(image_MHWC)))
        return jnp.exp(jnp.asarray(self.log_scale)) * text_BE @ image_ME.T


def unit(x_BE: jax.Array) -> jax.Array:
    """Each row divided by its length."""
    return x_BE / jnp.linalg.norm(x_BE, axis=-1, keepdims=True)


def prepare(
    images: np.ndarray | Sequence[np.ndarray],
    size: int = 224,
    *,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> np.ndarray:
    """Bytes (H, W, 3), of any size, as the image tower wants them: float32 (B, size, size, 3).

    The shorter side becomes ``size`` by Pillow's bicubic filter, the middle is cut out, bytes / 255 are normalised:
    what transformers' CLIPImageProcessor does on Pillow, bit for bit but for the last rounding (1e-6).

    Raises:
      ValueError: for images that are not bytes of three channels.
    """
    from PIL import Image

    made = []
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"an image of shape {image.shape} and type {image.dtype}: expected bytes (H, W, 3).")
        H, W = image.shape[:2]
        height, width = (size, int(size * W / H)) if H <= W else (int(size * H / W), size)
        resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
        top, left = (height - size) // 2, (width - size) // 2
        made.append(resized[top : top + size, left : left + size])
    return ((np.stack(made) / 255.0 - np.asarray(mean)) / np.asarray(std)).astype(np.float32)


def _projection(width: int) -> nn.Dense:
    return linear(width, "width", None, name="projection", use_bias=False)
