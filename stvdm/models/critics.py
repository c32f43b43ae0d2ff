# SPDX-License-Identifier: Apache-2.0
"""What the autoencoder is judged by: reconstruction, a perceptual distance, and a discriminator.

    loss = reconstruction(decoded, video) + kl_weight * kl
         + perceptual * perceptual_distance(...) + adversarial(step) * balance * generator_loss(D(decoded))

``balance`` is VQGAN's adaptive weight (https://arxiv.org/abs/2012.09841, equation 7): the ratio of the gradients that
the two sides send back into the decoder, taken here at its output. The discriminator is a 3-D PatchGAN (https://arxiv.org/abs/1611.07004).

    pull, judging = adversarial_terms(discriminator, params, decoded_BTHWC, video_BTHWC, reconstruction=reconstruct)
    loss += ramp(step, weight=0.1, start=5000) * pull + judging
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stvdm.models.causal_conv import CausalConv


def reconstruction(
    decoded_BTHWC: jax.Array, video_BTHWC: jax.Array, *, absolute: float = 1.0, squared: float = 0.0
) -> jax.Array:
    """``absolute`` mean |error| + ``squared`` mean error². L1 keeps edges; the square weighs what is far off."""
    error = decoded_BTHWC - video_BTHWC
    return absolute * jnp.mean(jnp.abs(error)) + squared * jnp.mean(jnp.square(error))


class FeatureNet(nn.Module):
    """A small convolution net over frames, whose features `perceptual_distance` compares.

    LPIPS (https://arxiv.org/abs/1801.03924) does this with VGG trained on ImageNet and weights fitted to human
    judgement. Neither is here. With random weights the distance still compares local structure at three scales, which
    pays for blur more than a pixel loss does, but it knows nothing of objects and is no measure of how alike two
    images look to a person: use it as a loss, and report no number of it as LPIPS. Weights trained on any task over
    frames may be put in its place.
    """

    widths: Sequence[int] = (32, 64, 128)

    @nn.compact
    def __call__(self, video_BTHWC: jax.Array) -> list[jax.Array]:
        """One array (B, T, H / 2^i, W / 2^i, widths[i]) for each scale i."""
        features, x = [], video_BTHWC
        for i, width in enumerate(self.widths):
            x = nn.relu(CausalConv(width, (1, 3, 3), stride=(1, 2, 2) if i else (1, 1, 1), name=f"conv_{i}a")(x))
            x = nn.relu(CausalConv(width, (1, 3, 3), name=f"conv_{i}b")(x))
            features.append(x)
        return features


def perceptual_distance(net: FeatureNet, params: Any, decoded_BTHWC: jax.Array, video_BTHWC: jax.Array) -> jax.Array:
    """Mean over scales of the squared distance of features made unit over channels; 0 for equal clips, at most 4.

    ``params`` are constants here: no gradient flows to them.
    """
    params = jax.lax.stop_gradient(params)
    pairs = zip(*(net.apply({"params": params}, clip) for clip in (decoded_BTHWC, video_BTHWC)), strict=True)
    return jnp.mean(jnp.stack([jnp.mean(jnp.sum(jnp.square(_unit(a) - _unit(b)), axis=-1)) for a, b in pairs]))


class Discriminator(nn.Module):
    """A 3-D PatchGAN: a verdict for each patch of space at each time, above 0 for real.

    Layers of 3x3x3 halve space and look back in time, so that flicker and broken motion show. There are no norms: the
    verdict on a clip doesn't depend on its batch.
    """

    width: int = 32
    num_layers: int = 3
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, video_BTHWC: jax.Array) -> jax.Array:
        """(B, T, H / 2^num_layers, W / 2^num_layers, 1), float32."""
        x = video_BTHWC
        for i in range(self.num_layers):
            width = self.width * 2 ** min(i, 2)
            x = CausalConv(width, (3, 3, 3), stride=(1, 2, 2), dtype=self.dtype, name=f"conv_{i}")(x)
            x = nn.leaky_relu(x, 0.2)
        return CausalConv(1, (3, 3, 3), dtype=self.dtype, name="verdict")(x).astype(jnp.float32)


def adversarial_terms(
    discriminator: Discriminator,
    params: Any,
    decoded_BTHWC: jax.Array,
    video_BTHWC: jax.Array,
    *,
    reconstruction: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """(what the autoencoder is to lower, balanced against ``reconstruction``; what the discriminator is to lower).

    Each reaches only its own side: the first has no gradient for ``params``, the second none for the autoencoder. So
    one gradient of their sum, over both sides' parameters, is a step of each.
    """

    def pull(decoded_BTHWC: jax.Array) -> jax.Array:
        return generator_loss(discriminator.apply({"params": jax.lax.stop_gradient(params)}, decoded_BTHWC))

    balance = adaptive_weight(jax.grad(reconstruction)(decoded_BTHWC), jax.grad(pull)(decoded_BTHWC))
    real = discriminator.apply({"params": params}, video_BTHWC)
    fake = discriminator.apply({"params": params}, jax.lax.stop_gradient(decoded_BTHWC))
    return balance * pull(decoded_BTHWC), discriminator_loss(real, fake)


def discriminator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Hinge (https://arxiv.org/abs/1705.02894): real verdicts above 1 and fake ones below -1 cost nothing."""
    return 0.5 * (jnp.mean(nn.relu(1.0 - real)) + jnp.mean(nn.relu(1.0 + fake)))


def generator_loss(fake: jax.Array) -> jax.Array:
    """The autoencoder's side of the hinge: minus the mean verdict on what it decoded."""
    return -jnp.mean(fake)


def adaptive_weight(reconstruction_grad: Any, adversarial_grad: Any, *, largest: float = 1e4) -> jax.Array:
    """|gradient of the reconstruction| / |gradient of the adversary|, at the same place, as a constant.

    With it the adversary pulls there as hard as the reconstruction, whatever the scale of the verdicts. VQGAN takes the
    decoder's last kernel, `adversarial_terms` its output, which every decoder has. Bounded by ``largest``.
    """
    ratio = _norm(reconstruction_grad) / (_norm(adversarial_grad) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, largest))


def ramp(step: jax.Array | int, *, weight: float, start: int) -> jax.Array:
    """``weight`` from step ``start`` on, 0 before: a discriminator has to know something before it is listened to."""
    return jnp.where(jnp.asarray(step) >= start, weight, 0.0)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-8)


def _norm(tree: Any) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)])))
