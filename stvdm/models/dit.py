# SPDX-License-Identifier: Apache-2.0
"""The spacetime diffusion transformer: a noisy latent, its noise levels and a text go in, the velocity comes out.

A latent is cut into spacetime patches, one token each, which pass through the blocks of `models.block`: self-attention,
cross-attention to the text, an MLP. It is DiT (arXiv:2212.09748) in the form of Wan 2.1 (arXiv:2503.20314), so that the
largest open models are a config of this file.

    dit = DiT(latent_channels=16, text_width=128, **SIZES["S"])
    params = dit.init(key, latent_Bthwz, time_BK, None, text_BSE, text_mask_BS)["params"]
    velocity_Bthwz = dit.apply({"params": params}, latent_Bthwz, time_BK, level_BN, text_BSE, text_mask_BS)

**How time is told** (``time_path``; DiT, section 3.2). Shifts, scales and gates come from the noise level: one time MLP
shared by all blocks, plus a table of each block's own.

    adaln_zero       gates start at zero (time MLP's last layer and the tables), and so do the output layers of
                     cross-attention and of the head: a fresh block is the identity, a fresh model predicts zeros.
                     Wan draws its tables at random; loaded weights don't care.
    adaln            the same function, drawn as other layers are, with gates about one: a start like any transformer's.
                     (DiT's has no gates.)
    in_context       no modulation: the time is one more token of the sequence, where the text stands too if it is in it
    cross_attention  no modulation: the time is one more token beside the words that cross-attention reads

**Time per token.** A clip has few distinct noise levels (what is known, what is being made; one per latent frame
when frames run ahead of each other): time_BK holds those K, level_BN says which one a token has. Modulation is
computed for K levels and selected inside the block, so a [B, N, 6D] array never exists. Where time is a token, all
tokens of a clip see the same ones, and nothing says which is whose: so K is 1.

**How text is read** (``text_path``).

    cross    by cross-attention
    joint    its tokens join the sequence and pass through the same weights, with a modulation table of their own (the
             expert modulation of CogVideoX, arXiv:2408.06072)
    dual     they have all weights for themselves, projections, MLP, norms and modulation, and meet the video in
             attention alone (SD3, arXiv:2403.03206; the first blocks of HunyuanVideo, arXiv:2412.03603)

In the latter two they are told the noisiest level of their clip (what is known has no say in it), have no place, hence
no rotary turn, and are dropped at the end. What they may see is `attention.joint_attention`'s.

**How an image is read** (``image_width``; Wan's image-to-video). Its tokens, as an image tower gives them, pass through
an MLP between two norms, and stand beside the words: cross-attention reads them by keys and values of their own.

**Precision.** Parameters, norms, softmax, modulation and time are float32. Products and the tokens between blocks
(the residual stream) are in ``dtype``.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from stvdm import shapes
from stvdm.models import embeddings
from stvdm.models.block import MODULATED, Block, Conditions, Modulation, layer_norm, modulate
from stvdm.models.linear import linear, xavier, zeros
from stvdm.models.patterns import Size3, check_kind
from stvdm.sharding import constrain, partitioned

SIZES: dict[str, dict[str, int]] = {  # D, layers, A, F                                     parameters
    "tiny": dict(width=192, num_layers=6, num_heads=6, mlp_width=768),
    "S": dict(width=384, num_layers=12, num_heads=6, mlp_width=1536),
    "B": dict(width=768, num_layers=12, num_heads=12, mlp_width=3072),
    "L": dict(width=1024, num_layers=24, num_heads=16, mlp_width=4096),
    "XL": dict(width=1152, num_layers=28, num_heads=16, mlp_width=4608),
    "wan-1.3b": dict(width=1536, num_layers=30, num_heads=12, mlp_width=8960),
    "wan-5b": dict(width=3072, num_layers=30, num_heads=24, mlp_width=14336),
    "wan-14b": dict(width=5120, num_layers=40, num_heads=40, mlp_width=13824),
}

_policies = jax.checkpoint_policies
REMAT: dict[str, Callable[..., Any] | None] = {  # what a block's backward pass computes again
    "nothing": None,  # every intermediate is kept: fastest, most memory
    "projections": _policies.dots_with_no_batch_dims_saveable,  # all but products with weights: cheap to redo
    "attention": _policies.save_only_these_names("attention"),  # all but what self-attention gave, the cost at large N
    "offload": _policies.save_and_offload_only_these_names(  # as "attention", but that waits in the host's memory
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["attention"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "everything": _policies.nothing_saveable,  # the whole block, from its input: least memory, a third more work
}

TIME_PATHS = ("adaln_zero", "adaln", "in_context", "cross_attention")
TEXT_PATHS = ("cross", "joint", "dual")

Streams = tuple[jax.Array, jax.Array | None]  # tokens_BND, and with dual streams the text_BSD


class Tokens(NamedTuple):
    """Words, or the time, or both."""

    tokens_BSD: jax.Array
    mask_BS: jax.Array | None  # True where a token is real; None: all are


class DiT(nn.Module):
    """A spacetime diffusion transformer; see the module's docstring, and ``config.dit`` for every field."""

    latent_channels: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    text_width: int
    image_width: int = 0  # of the tokens of an image that are read beside the text; 0: there are none
    extra_channels: int = 0  # conditioning latents and masks that the caller appends to the latent's channels
    patch: Size3 = (1, 2, 2)
    attention: tuple[str, ...] = ("full",)  # cycled over the layers; factorised is ("frame", "time")
    window: Size3 | None = None
    text_path: str = "cross"
    time_path: str = "adaln_zero"
    time_features: int = 256
    positions: str = "rotary"
    rope_theta: float = 1e4
    qk_norm: bool = True
    remat: str = "nothing"
    scan_layers: bool = True
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        latent_Bthwz: jax.Array,
        time_BK: jax.Array,
        level_BN: jax.Array | None,
        text_BSE: jax.Array,
        text_mask_BS: jax.Array | None = None,
        *,
        image_BSE: jax.Array | None = None,
        place_N3: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts the velocity of a noisy latent.

        Args:
          latent_Bthwz: noisy latent, z = latent_channels + extra_channels.
          time_BK: the K noise levels of each clip, in [0, 1]; 1 is noise. Where time is a token, K is 1.
          level_BN: int, which of its clip's levels each token has; None: all have level 0.
          text_BSE: text features.
          text_mask_BS: True where a text token is real; None: all are.
          image_BSE: features of an image's places, if there is an image_width.
          place_N3: the tokens' places if they are not 0, 1, 2, ...; see `embeddings.grid_places`.

        Returns:
          velocity_Bthwz in float32, z = latent_channels.

        Raises:
          ValueError: if a field or a shape does not fit.
        """
        self._check(latent_Bthwz, time_BK, image_BSE)
        _, t, h, w, _ = latent_Bthwz.shape
        grid = shapes.token_grid((t, h, w), self.patch)
        if place_N3 is None:
            place_N3 = embeddings.grid_places(grid)

        # Tokens.
        x_BND = embeddings.PatchEmbed(self.width, self.patch, self.dtype, name="patch")(latent_Bthwz)
        turns = None
        if self.positions == "rotary":
            turns = embeddings.rotary_turns(place_N3, self.width // self.num_heads, theta=self.rope_theta)
        else:
            x_BND += embeddings.sincos_places(place_N3, self.width, theta=self.rope_theta).astype(self.dtype)
        num_video, num_levels = x_BND.shape[1], time_BK.shape[1]

        # Text and time.
        dense = functools.partial(linear, dtype=self.dtype)
        text_BSD = nn.gelu(dense(self.width, "text", "mlp", name="text_in")(text_BSE.astype(self.dtype)))
        words = Tokens(dense(self.width, "mlp", "width", name="text_out")(text_BSD), text_mask_BS)
        if self.text_path != "cross" and self.time_path in MODULATED:
            time_BK = jnp.concatenate([time_BK, time_BK.max(axis=1, keepdims=True)], axis=1)  # the last is the text's
        features_BKC = embeddings.time_features(time_BK, self.time_features)
        time_BKD = nn.silu(linear(self.width, None, "mlp", name="time_in")(features_BKC))
        time_BKD = linear(self.width, "mlp", "width", name="time_out")(time_BKD)
        clock = Tokens(time_BKD.astype(self.dtype), None)
        image_BSD = image_BSE
        if image_BSE is not None:
            image_BSD = ImageEmbed(self.width, self.dtype, name="image")(image_BSE)

        # Who stands beside the video, and who is read.
        is_read = self.text_path == "cross"
        beside = _together(None if is_read else words, clock if self.time_path == "in_context" else None)
        read = _together(words if is_read else None, clock if self.time_path == "cross_attention" else None)
        second_BSD = beside.tokens_BSD if beside and self.text_path == "dual" else None
        if beside and second_BSD is None:
            x_BND = jnp.concatenate([x_BND, beside.tokens_BSD], axis=1)
        x_BND = constrain(x_BND, "batch", "tokens", None)

        # Blocks.
        num_beside = x_BND.shape[1] - num_video
        modulation, text_modulation = self._modulation(time_BKD, num_levels, level_BN, (num_video, num_beside))
        conditions = Conditions(
            modulation=modulation,
            text_modulation=text_modulation,
            beside_mask_BS=beside and beside.mask_BS,
            read_BSD=read and read.tokens_BSD,
            read_mask_BS=read and read.mask_BS,
            turns=turns,
            image_BSD=image_BSD,
        )
        x_BND, _ = self._layers(grid)((x_BND, second_BSD), conditions)

        # Head.
        x_BND = x_BND[:, :num_video]
        if modulation is None:
            x_BND = layer_norm("head_norm")(x_BND).astype(self.dtype)
        else:
            table_2D = self.param("head_modulation", partitioned(zeros, None, "width"), (2, self.width))
            shift_BKD, scale_BKD = (time_BKD[:, :num_levels] + row for row in table_2D)
            x_BND = modulate(x_BND, shift_BKD, scale_BKD, level_BN)
        head = embeddings.PatchUnembed(self.latent_channels, self.patch, self.dtype, self._last_init, name="head")
        return head(x_BND, grid).astype(jnp.float32)

    @property
    def _last_init(self) -> nn.initializers.Initializer:
        """Of what a model that starts as nothing has at zero."""
        return zeros if self.time_path == "adaln_zero" else xavier

    def _modulation(
        self, time_BKD: jax.Array, num_levels: int, level_BN: jax.Array | None, lengths: tuple[int, int]
    ) -> tuple[Modulation | None, Modulation | None]:
        """Of the sequence, that many tokens of video and beside it, and of the text where it is a stream."""
        if self.time_path not in MODULATED:
            return None, None

        def rows_BK6D(time_BKD: jax.Array, name: str = "time_modulation") -> jax.Array:
            to_rows = linear(6 * self.width, "width", "mlp", init=self._last_init, name=name)
            return to_rows(nn.silu(time_BKD)).reshape(*time_BKD.shape[:2], 6, self.width)

        if self.text_path == "dual":
            text = Modulation(rows_BK6D(time_BKD[:, num_levels:], "text_time_modulation"), None)
            return Modulation(rows_BK6D(time_BKD[:, :num_levels]), level_BN), text
        if self.text_path == "joint":
            B, (N, S) = time_BKD.shape[0], lengths
            level_BN = jnp.zeros((B, N), jnp.int32) if level_BN is None else level_BN
            level_BN = jnp.concatenate([level_BN, jnp.full((B, S), num_levels, level_BN.dtype)], axis=1)
        return Modulation(rows_BK6D(time_BKD), level_BN), None

    def _layers(self, grid: Size3) -> Callable[[Streams, Conditions], Streams]:
        """The stack of blocks: turns of the attention cycle, scanned (one compiled turn) or written out."""
        block = Block
        if self.remat != "nothing":
            # Inside a scan nothing can be merged across the loop, so the costly guard against it is not needed.
            block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=not self.scan_layers)
        cycle = tuple(
            functools.partial(
                block,
                width=self.width,
                num_heads=self.num_heads,
                mlp_width=self.mlp_width,
                qk_norm=self.qk_norm,
                time_path=self.time_path,
                text_path=self.text_path,
                grid=grid,
                pattern=pattern,
                window=self.window,
                reads_image=self.image_width > 0,
                length="tokens",
                dtype=self.dtype,
            )
            for pattern in self.attention
        )
        num_turns = self.num_layers // len(self.attention)
        if self.scan_layers:
            scanned = nn.scan(
                Turn,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=num_turns,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(cycle, name="layers")
            return lambda streams, conditions: scanned(streams, conditions)[0]

        turns = [Turn(cycle, name=f"layers_{i}") for i in range(num_turns)]
        return lambda streams, conditions: functools.reduce(lambda x, turn: turn(x, conditions)[0], turns, streams)

    def _check(self, latent_Bthwz: jax.Array, time_BK: jax.Array, image_BSE: jax.Array | None) -> None:
        for pattern in self.attention:
            check_kind(pattern)
        _choose("text_path", self.text_path, TEXT_PATHS)
        _choose("time_path", self.time_path, TIME_PATHS)
        _choose("positions", self.positions, ("rotary", "sincos"))
        _choose("remat", self.remat, tuple(REMAT))
        if self.num_layers % len(self.attention):
            raise ValueError(
                f"num_layers={self.num_layers}: the attention cycle {tuple(self.attention)} has "
                f"{len(self.attention)} layers, so use a multiple of {len(self.attention)}."
            )
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width}: use a multiple of num_heads={self.num_heads}.")
        channels = self.latent_channels + self.extra_channels
        if latent_Bthwz.ndim != 5 or latent_Bthwz.shape[-1] != channels:
            raise ValueError(
                f"latent of shape {latent_Bthwz.shape}: expected (B, t, h, w, {channels}), channels = "
                f"latent_channels {self.latent_channels} + extra_channels {self.extra_channels}."
            )
        if time_BK.ndim != 2:
            raise ValueError(f"time of shape {time_BK.shape}: expected (B, K); one level per clip is time[:, None].")
        if self.time_path not in MODULATED and time_BK.shape[1] != 1:
            raise ValueError(
                f"time of shape {time_BK.shape}: time_path={self.time_path!r} tells a clip one time, (B, 1); for one "
                "a token use 'adaln_zero' or 'adaln'."
            )
        if self.time_path == "cross_attention" and self.text_path != "cross":
            raise ValueError(
                f"time_path='cross_attention': text_path={self.text_path!r} has no cross-attention; use "
                "text_path='cross', or time_path='in_context'."
            )
        if self.image_width and self.text_path != "cross":
            raise ValueError(
                f"image_width={self.image_width}: an image is read beside the text by cross-attention, which "
                f"text_path={self.text_path!r} has not; use text_path='cross', or image_width=0."
            )
        width = 0 if image_BSE is None else image_BSE.shape[-1]
        if width != self.image_width:
            got = "no image" if image_BSE is None else f"an image of shape {image_BSE.shape}"
            expected = f"(B, S, {self.image_width})" if self.image_width else "none"
            raise ValueError(f"{got}: expected {expected}, as image_width={self.image_width}.")


class ImageEmbed(nn.Module):
    """image_BSE -> image_BSD: norm, MLP of the features' width, norm (Wan's; its norms add 1e-5, its GELU is exact)."""

    width: int
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, image_BSE: jax.Array) -> jax.Array:
        E = image_BSE.shape[-1]
        x_BSE = layer_norm("norm_in", axis="text", epsilon=1e-5)(image_BSE).astype(self.dtype)
        x_BSE = nn.gelu(linear(E, "text", "mlp", dtype=self.dtype, name="linear_in")(x_BSE), approximate=False)
        x_BSD = linear(self.width, "mlp", "width", dtype=self.dtype, name="linear_out")(x_BSE)
        return layer_norm("norm_out", epsilon=1e-5)(x_BSD).astype(self.dtype)


class Turn(nn.Module):
    """One turn of the attention cycle: what `nn.scan` repeats."""

    cycle: tuple[Callable[..., nn.Module], ...]

    @nn.compact
    def __call__(self, streams: Streams, conditions: Conditions) -> tuple[Streams, None]:
        for i, block in enumerate(self.cycle):
            streams = block(name=f"block_{i}")(streams, conditions)
        return streams, None


def _together(*parts: Tokens | None) -> Tokens | None:
    """Those that there are, one after the other."""
    found = [part for part in parts if part is not None]
    if len(found) < 2:
        return found[0] if found else None
    masks = [jnp.ones(one.tokens_BSD.shape[:2], bool) if one.mask_BS is None else one.mask_BS for one in found]
    return Tokens(jnp.concatenate([one.tokens_BSD for one in found], axis=1), jnp.concatenate(masks, axis=1))


def _choose(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        near = difflib.get_close_matches(value, options, n=1)
        raise ValueError(
            f"{name}={value!r}: " + (f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(options)}.")
        )
