# SPDX-License-Identifier: Apache-2.0
"""Every metric that judges clips without a giant network, each with what it is said to see: for `agreement`.

    of a clip and the one it was made from    psnr, ssim, excess_flicker, change_error
    of a clip alone                           frame_change; VBench's dimensions; the tracked physics
    of a set and a set of real clips          Frechet and kernel distance, precision, recall; for each row of FEATURES

VBench's in-between frames and flows come from `block_matching`, its features from FEATURES: relatives of its numbers,
to be compared with themselves. A further network is one more row of FEATURES: any function from uint8 videos_NTHWC to
features_ND.

    scores = score(Clips(videos_NTHWC, originals_NTHWC, scenes, fps=8.0))      # name -> (N,)
    distances(features_ND, real_MD)                                            # name -> number
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stvdm.data.kinetic_scene import Scene
from stvdm.evaluation import block_matching, distributions, metrics, physics, vbench
from stvdm.models import video_features

PSNR_OF_EQUALS = 60.0  # dB, in place of infinity: more than bytes that are off by one level have


class Clips(NamedTuple):
    """What is judged: clips, those that they were made from, and what was asked for."""

    videos: np.ndarray  # uint8 (N, T, H, W, 3)
    originals: np.ndarray  # the same, undamaged
    scenes: Sequence[Scene]
    fps: float


class Instrument(NamedTuple):
    """A metric, and what is expected of it; fixed before anything was measured.

    sees: damages that it is there to see, or is in use to see. blind: those that it cannot or should not react to.
    Of the rest nothing is expected. better: which of two values is the better one; "nearer 0" has faults on both sides.
    """

    name: str
    reads: Literal["pair", "clip", "set"]
    better: Literal["higher", "lower", "nearer 0"]
    sees: tuple[str, ...] = ()
    blind: tuple[str, ...] = ()

    def expected(self, damage: str) -> str:
        """ "sees", "blind" or "": of one damage."""
        return "sees" if damage in self.sees else "blind" if damage in self.blind else ""

    def fault(self, values: np.ndarray) -> np.ndarray:
        """The values turned so that more is worse."""
        return {"higher": np.negative, "lower": np.positive, "nearer 0": np.abs}[self.better](values)


class Features(NamedTuple):
    """A row of features: what they are called, the function, and what distances over them are expected to see."""

    name: str
    of: Callable[[np.ndarray], np.ndarray]  # uint8 videos_NTHWC -> features_ND
    sees: tuple[str, ...] = ()
    blind: tuple[str, ...] = ()
    stands_in: str = ""  # VBench's consistency that frames' features are taken for; "": none, or videos only


def colours(videos_NTHWC: np.ndarray) -> np.ndarray:
    """Hand-made: the mean colour of each field of a grid of 4 x 4, over all frames; (N, 48), 0 to 1.

    Cannot see: time, nor anything smaller than a field.
    """
    N, _, H, W, C = videos_NTHWC.shape
    rows, columns = (np.array_split(np.arange(size), 4) for size in (H, W))
    still = videos_NTHWC.mean(axis=1, dtype=np.float64) / 255
    fields = [still[:, r[0] : r[-1] + 1, c[0] : c[-1] + 1].mean((1, 2)) for r in rows for c in columns]
    return np.stack(fields, 1).reshape(N, 16 * C)


def random_weights(videos_NTHWC: np.ndarray) -> np.ndarray:
    """Untrained: two layers of convolutions with random weights over frames and their changes, averaged; (N, 64).

    A network that has learned nothing, as the least that features can be. The changes of a clip of one frame are 0.
    """
    videos = [videos_NTHWC[start : start + 32] for start in range(0, len(videos_NTHWC), 32)]
    return np.concatenate([np.asarray(_random_network(part), np.float64) for part in videos])


@jax.jit
def _random_network(videos_NTHWC: jax.Array) -> jax.Array:
    N, T, H, W, C = videos_NTHWC.shape
    x = jnp.asarray(videos_NTHWC, jnp.float32) / 127.5 - 1
    change = jnp.pad(jnp.diff(x, axis=1), ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
    x = jnp.concatenate([x, change], -1).reshape(N * T, H, W, 2 * C)
    for kernel in _random_kernels(2 * C):
        layout = ("NHWC", "HWIO", "NHWC")
        x = jax.nn.relu(lax.conv_general_dilated(x, jnp.asarray(kernel), (2, 2), "SAME", dimension_numbers=layout))
    return x.mean((1, 2)).reshape(N, T, -1).mean(1)


@functools.cache
def _random_kernels(channels: int) -> tuple[np.ndarray, ...]:
    """He's scale (2015, arXiv:1502.01852), always the same numbers."""
    rng = np.random.default_rng(0)
    sizes = ((5, 5, channels, 16), (3, 3, 16, 64))
    return tuple(rng.normal(0, (2 / np.prod(size[:3])) ** 0.5, size).astype(np.float32) for size in sizes)


_EVERYTHING = (
    "flicker",
    "identity_swap",
    "vanishing",
    "teleport",
    "time_reversal",
    "blur",
    "colour_drift",
    "freeze",
)
_FORWARDS_ALL = tuple(name for name in _EVERYTHING if name != "time_reversal")

FEATURES = (
    # Distances of sets are in use for all that can be wrong with clips. But that clips run backwards no distribution
    # can tell, where there is as much to the left as to the right, and growing as shrinking.
    Features("random", random_weights, _FORWARDS_ALL, ("time_reversal",), "subject_consistency"),
    Features("kinetic", lambda videos: video_features.bundled().extract(videos), _FORWARDS_ALL, ("time_reversal",)),
    Features("colours", colours, ("colour_drift",), ("flicker", "time_reversal"), "background_consistency"),
)

_PHYSICS = {  # item: sees, blind
    "colour": ((), ("flicker", "teleport", "time_reversal", "blur", "freeze")),
    "count": (("identity_swap",), ("flicker", "teleport", "time_reversal", "blur", "freeze")),
    "shape": ((), ("flicker", "teleport", "time_reversal", "freeze")),
    "motion": (("time_reversal", "freeze"), ("flicker", "blur", "colour_drift")),
    "direction": (("time_reversal",), ("flicker", "blur", "colour_drift")),
    "camera": (("time_reversal",), ("identity_swap", "vanishing", "teleport", "blur")),
    "persistence": (("identity_swap", "vanishing"), ("flicker", "time_reversal", "freeze")),
    "occlusion": (("identity_swap", "time_reversal", "freeze"), ("flicker", "blur")),
    "smoothness": (("teleport",), ("flicker", "time_reversal", "blur", "colour_drift")),
    "all_right": (("identity_swap", "vanishing", "teleport", "time_reversal", "freeze"), ("flicker",)),
    "colour_constancy": (("flicker", "colour_drift"), ("teleport", "time_reversal")),
    "residual": (("teleport", "freeze"), ("flicker", "blur", "colour_drift")),
    "flicker": ((), ("time_reversal",)),
}
_LOWER_IS_BETTER = ("residual", "flicker")
_CONSISTENT = {  # VBench's, of frames' features
    "subject_consistency": ("identity_swap", "vanishing"),
    "background_consistency": ("flicker", "colour_drift"),
}


def instruments(features: Sequence[Features] = FEATURES) -> tuple[Instrument, ...]:
    """All of them, with what is expected of each."""
    backwards = ("time_reversal",)
    ssim_sees = ("identity_swap", "vanishing", "teleport", "time_reversal", "blur", "freeze")
    return (
        Instrument("psnr", "pair", "higher", _EVERYTHING),
        Instrument("ssim", "pair", "higher", ssim_sees),
        Instrument("excess_flicker", "pair", "nearer 0", ("flicker",), backwards),
        Instrument("change_error", "pair", "lower", _EVERYTHING),
        Instrument("frame_change", "clip", "lower", ("flicker",), backwards),
        Instrument("temporal_flickering", "clip", "higher", ("flicker",), backwards),
        Instrument(
            "motion_smoothness", "clip", "higher", ("flicker", "identity_swap", "vanishing", "teleport"), backwards
        ),
        Instrument(
            "dynamic_degree", "clip", "higher", ("freeze",), ("flicker", "time_reversal", "blur", "colour_drift")
        ),
        *(
            Instrument(f"{row.stands_in} ({row.name})", "clip", "higher", _CONSISTENT[row.stands_in], backwards)
            for row in features
            if row.stands_in
        ),
        *(
            Instrument(f"physics {item}", "clip", "lower" if item in _LOWER_IS_BETTER else "higher", *_PHYSICS[item])
            for item in physics.ITEMS
        ),
        *(
            instrument
            for row in features
            for instrument in (
                Instrument(f"frechet ({row.name})", "set", "lower", row.sees, row.blind),
                Instrument(f"kernel ({row.name})", "set", "lower", row.sees, row.blind),
                Instrument(f"precision ({row.name})", "set", "higher", row.sees, row.blind),
                Instrument(f"recall ({row.name})", "set", "higher"),
            )
        ),
    )


def score(clips: Clips, features: Sequence[Features] = FEATURES) -> dict[str, np.ndarray]:
    """The instruments of clips and of pairs: name -> (N,), nan where a clip gives nothing to judge.

    Six decimals, so that a sum of float32 in another order is no change.
    """
    found = {**_of_pairs(clips), **_of_pixels(clips.videos)}
    for row in features:
        if row.stands_in:
            found[f"{row.stands_in} ({row.name})"] = _consistency(clips.videos, row.of)
    judged = [
        physics.score(video, scene, fps=clips.fps) for video, scene in zip(clips.videos, clips.scenes, strict=True)
    ]
    found |= {f"physics {item}": np.asarray([one[item] for one in judged]) for item in physics.ITEMS}
    return {name: np.round(np.asarray(values, np.float64), 6) for name, values in found.items()}


def distances(made_ND: np.ndarray, real_MD: np.ndarray) -> dict[str, float]:
    """The instruments of sets, over features of both: frechet, kernel, precision, recall. Six decimals."""
    precision, recall = distributions.precision_recall(real_MD, made_ND)
    found = {
        "frechet": distributions.frechet_distance(real_MD, made_ND),
        "kernel": distributions.kernel_distance(real_MD, made_ND),
        "precision": precision,
        "recall": recall,
    }
    return {name: round(value, 6) for name, value in found.items()}


def _of_pairs(clips: Clips) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {"psnr": [], "ssim": [], "excess_flicker": [], "change_error": []}
    for start in range(0, len(clips.videos), 32):
        made, true = (jnp.asarray(x[start : start + 32], jnp.float32) for x in (clips.videos, clips.originals))
        found["psnr"].append(np.minimum(np.asarray(metrics.psnr(made, true, data_range=255.0)), PSNR_OF_EQUALS))
        found["ssim"].append(np.asarray(metrics.ssim(made, true, data_range=255.0)))
        for name in ("excess_flicker", "change_error"):
            found[name].append(np.asarray(getattr(metrics, name)(made / 255, true / 255)))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _of_pixels(videos: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "frame_change": np.concatenate([np.asarray(metrics.flicker(video[None] / 255.0)) for video in videos]),
        "temporal_flickering": np.asarray([vbench.temporal_flickering(video) for video in videos]),
        "motion_smoothness": np.asarray([vbench.motion_smoothness(video, block_matching.between) for video in videos]),
        "dynamic_degree": np.asarray([vbench.dynamic_degree(block_matching.flow(video)) for video in videos]),
    }


def _consistency(videos: np.ndarray, features: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """VBench's consistency of each clip, over features of its frames, each as a clip of one frame."""
    N, T = videos.shape[:2]
    of_frames = features(videos.reshape(N * T, 1, *videos.shape[2:])).reshape(N, T, -1)
    return np.asarray([vbench.subject_consistency(one) for one in of_frames])
