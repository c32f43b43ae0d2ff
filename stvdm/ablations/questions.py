# SPDX-License-Identifier: Apache-2.0
"""The list of ablations: what each asks, its grid of config edits, and the claims it can confirm or refute.

A variant is a name and a function of `stvdm.ablations.edits`, or several, for a training in stages. A claim names a
better and a worse variant and a score, and is written down here before the grid is run: it is confirmed where the 95 %
interval of the difference over seeds lies on its side of zero, refuted where it lies on the other, and undecided
otherwise (`stvdm.ablations.verdicts`).

    Question(
        name="attention",
        variants={"frame": attend("frame"), "full": attend("full")},
        claims=(Claim("full", "frame", "persistence", "attention over time keeps a thing the same thing"),),
        ...
    )

"variant@sampling" is one way of sampling a variant; all ways of sampling share one training.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Mapping
from typing import Any, Literal

from stvdm.ablations.edits import (
    Edit,
    Stage,
    as_it_is,
    attend,
    channels,
    drop_captions,
    first_frame_apart,
    frame_by_frame,
    half_the_time_compression,
    in_equal_groups,
    mix_in,
    normalise,
    only,
    optimise,
    place_by,
    predict,
    read_beside,
    read_jointly,
    sized,
    tell_time,
    twice_the_space_compression,
    with_unet,
    without_average,
)
from stvdm.data.kinetic_scene import MOTIONS

Budget = Literal["steps", "parameters", "flops", "seconds"]  # what is equal between the variants


@dataclasses.dataclass(frozen=True)
class Sampling:
    """One way of sampling what was trained; what is None is as in the base config."""

    steps: int | None = None
    guidance: float | None = None
    times_length: int = 1  # clips so many times as long, in time, as in training
    world: tuple[tuple[str, Any], ...] = ()  # fields of `kinetic_shapes.World` that the prompts are restricted by


@dataclasses.dataclass(frozen=True)
class Claim:
    """``better`` has more (or, with higher=False, less) of ``score`` than ``worse``; both are "variant@sampling"."""

    better: str
    worse: str
    score: str
    says: str  # in words
    higher: bool = True


@dataclasses.dataclass(frozen=True)
class Question:
    """A named grid and what it is to decide."""

    name: str
    asks: str
    source: str  # who published what
    budget: Budget
    variants: Mapping[str, Edit | tuple[Stage, ...]]
    scores: tuple[str, ...]  # columns of the table: items of `physics`, or other scores of `cells.scores_of`
    claims: tuple[Claim, ...]
    samplings: Mapping[str, Sampling] = dataclasses.field(default_factory=lambda: {"default": Sampling()})
    trains_autoencoder: bool = False  # each cell trains its own, as the edits say
    plots_flops: bool = False  # the first score is drawn against the FLOPs of training, too
    limits: str = ""  # what this grid cannot tell

    def stages(self, variant: str) -> tuple[Stage, ...]:
        """The parts of a variant's training: one, where it is not said to have more."""
        found = self.variants[variant]
        return found if isinstance(found, tuple) else (Stage(1.0, found),)

    def split(self, name: str) -> tuple[str, str]:
        """("variant", "sampling") of "variant@sampling"; the first way of sampling is meant where none is named."""
        variant, _, sampling = name.partition("@")
        return variant, sampling or next(iter(self.samplings))


def find(name: str) -> Question:
    """The question of that name.

    Raises:
      ValueError: if there is none; near ones are named.
    """
    if name not in QUESTIONS:
        near = difflib.get_close_matches(name, QUESTIONS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(QUESTIONS)}."
        raise ValueError(f"ablation {name!r}: {hint}")
    return QUESTIONS[name]


# --- the list --------------------------------------------------------------------------------------------------------

FOLLOWS = ("all_right", "motion", "direction", "shape")  # what the prompt asks for
HOLDS = ("persistence", "smoothness", "flicker", "frame_change")  # what time does to it
DIAGONALS = tuple(name for name, motion in MOTIONS.items() if motion.kind == "slide" and motion.x and motion.y)
# Prompts of diagonals alone. They have no word for speed: it tells the scenes that are rendered to compare with.
ALONG_DIAGONALS = (("motions", DIAGONALS), ("motion_weights", (1.0,) * len(DIAGONALS)), ("speed", (0.27, 0.30)))

_ATTENTION = Question(
    name="attention",
    asks="Does attention over time remove flicker, and does it take attention over all of space and time at once?",
    source="CogVideoX (arXiv:2408.06072): full beats 2-D + 1-D; Latte (arXiv:2401.03048): interleaved blocks do well",
    budget="steps",
    variants={
        "frame": attend("frame"),
        "factorised": attend("frame", "time"),
        "window": attend("window"),
        "full": attend("full"),
    },
    samplings={"default": Sampling(), "diagonal": Sampling(world=ALONG_DIAGONALS)},
    scores=("all_right", "direction", *HOLDS, "kinetic_frechet"),
    claims=(
        Claim("full", "frame", "persistence", "attention over time keeps a thing the same thing"),
        Claim("full", "frame", "frame_change", "frames made each alone flicker", higher=False),
        Claim("factorised", "frame", "persistence", "factorised attention over time is enough for that"),
        Claim("full", "factorised", "all_right", "full attention beats factorised"),
        Claim("full@diagonal", "frame@diagonal", "direction", "attention over time helps to follow diagonals"),
        Claim("full@diagonal", "factorised@diagonal", "direction", "factorised attention follows diagonals worse"),
        Claim("full@diagonal", "window@diagonal", "direction", "windowed attention follows diagonals worse"),
    ),
    limits="All with positions added to the tokens, as a frame alone needs them; with rotary ones the others may do "
    "better. FLOPs are of the pairs that a pattern sees; a program may compute more and hide them. Things move by "
    "0.6 of a token from one latent frame to the next at the most, so that no diagonal here outruns a window of one "
    "token around, and frames alone, told their time and the text, follow most: this world has nothing faster. When "
    "the grid was run the claims on diagonals said more, by the same rules: that they take attention over time, and "
    "that fast ones take another place at another time, and outrun a window.",
)

_OBJECTIVE = Question(
    name="objective",
    asks="What should the network predict, at which training times, and how many denoising steps does it then take?",
    source="SD3 (arXiv:2403.03206): rectified flow with logit-normal times best; CogVideoX: stratified (uniform) times "
    "lower and smoother; Open-Sora 1.2: from noise prediction to rectified flow, a third of the steps",
    budget="steps",
    variants={
        f"{prediction}_{times}": predict(prediction, times)
        for prediction, times in itertools.product(
            ("velocity", "epsilon", "x0", "v"), ("uniform", "logit_normal", "stratified")
        )
    },
    samplings={"steps_20": Sampling(steps=20), "steps_10": Sampling(steps=10), "steps_5": Sampling(steps=5)},
    scores=(*FOLLOWS, "persistence", "flow_loss", "kinetic_frechet"),
    claims=(
        Claim("velocity_logit_normal", "velocity_uniform", "all_right", "logit-normal times beat uniform ones"),
        Claim(
            "velocity_stratified", "velocity_logit_normal", "flow_loss", "stratified times train better", higher=False
        ),
        Claim("velocity_logit_normal", "epsilon_logit_normal", "all_right", "the velocity beats the noise"),
        Claim("velocity_logit_normal", "x0_logit_normal", "all_right", "the velocity beats the data"),
        Claim("velocity_logit_normal", "v_logit_normal", "all_right", "the velocity beats v"),
        Claim(
            "velocity_logit_normal@steps_5",
            "epsilon_logit_normal@steps_20",
            "all_right",
            "the velocity in a quarter of the steps beats the noise",
        ),
        Claim("velocity_stratified@steps_20", "velocity_stratified@steps_5", "all_right", "more steps help"),
    ),
    limits="All on the rectified path, so that the loss of the velocity compares. How strongly logit-normal times lean "
    "to noise is the base's, and was chosen for the velocity. The stratified times are logit-normal ones.",
)

_AUTOENCODER = Question(
    name="autoencoder",
    asks="At equal latent size, is time better encoded jointly than frame by frame?",
    source="CogVideoX: a 3-D autoencoder removes jitter; every open causal one keeps the first frame alone",
    budget="steps",
    variants={"causal": first_frame_apart, "uniform": in_equal_groups, "frame": frame_by_frame},
    scores=("psnr_db", "change_error", "latent_flicker", "all_right", "shape", *HOLDS, "kinetic_frechet"),
    claims=(
        Claim("causal", "frame", "psnr_db", "joint encoding of time reconstructs better"),
        Claim("causal", "frame", "change_error", "joint encoding reconstructs what changes better", higher=False),
        Claim("causal", "frame", "latent_flicker", "joint encoding makes steadier latents", higher=False),
        Claim("causal", "frame", "persistence", "what is generated on top of it holds together better"),
        Claim("causal", "frame", "all_right", "what is generated on top of it is right more often"),
        Claim("uniform", "frame", "psnr_db", "in equal groups of frames, too, it reconstructs better"),
        Claim("causal", "uniform", "psnr_db", "a first frame that stands alone costs no quality, but brings some"),
        Claim("causal", "uniform", "all_right", "and what is generated on top of it is right more often"),
    ),
    trains_autoencoder=True,
    limits="Equal are the steps of both trainings and, to 3 %, the latent values a frame. Frame by frame the "
    "autoencoder has three quarters of the parameters, for want of layers over time, and makes more tokens, so that "
    "the transformer costs more. Uniform clips are a frame shorter. FLOPs are of the transformer's training alone. The "
    "claims on what is uniform, and on the error of change in place of excess flicker, whose best is 0, were written "
    "when one seed of each, the causal one with eighteen percent more values, had been seen.",
)

_TIME = Question(
    name="time",
    asks="Should the noise level modulate every layer, and from a start as nothing, or be a token among others?",
    source="DiT (arXiv:2212.09748), figure 5: adaLN-Zero beats tokens in context and cross-attention at all stages of "
    "training, and adaLN that does not start as nothing",
    budget="parameters",
    variants={path: tell_time(path) for path in ("adaln_zero", "adaln", "in_context", "cross_attention")},
    scores=(*FOLLOWS, "persistence", "flow_loss", "kinetic_frechet"),
    claims=(
        Claim("adaln_zero", "in_context", "flow_loss", "modulation beats a token in the sequence", higher=False),
        Claim("adaln_zero", "cross_attention", "flow_loss", "modulation beats a token beside the words", higher=False),
        Claim("adaln_zero", "adaln", "flow_loss", "starting as nothing trains better", higher=False),
        Claim("adaln_zero", "in_context", "all_right", "modulation is right more often than a token in the sequence"),
        Claim("adaln_zero", "adaln", "all_right", "starting as nothing is right more often"),
    ),
    limits="adaLN and adaLN-Zero are one function from two starts; DiT's adaLN has no gates. Only adaLN-Zero starts "
    "the layers at zero that the output and cross-attention end in. The rate is the base's, chosen for adaLN-Zero. The "
    "text is read by cross-attention, and a clip has one noise level: of several a token could not say whose they are.",
)

_TEXT = Question(
    name="text",
    asks="Should text be seen through cross-attention, join the sequence, or be a stream with weights of its own?",
    source="SD3 (arXiv:2403.03206): two streams beat cross-attention and one stream; HunyuanVideo: two streams, then "
    "one; CogVideoX: one, with a modulation of its own for text; Wan 2.1: cross-attention",
    budget="parameters",
    variants={"cross": as_it_is, "joint": read_jointly, "dual": read_beside},
    scores=(*FOLLOWS, "colour", "count", "flow_loss", "kinetic_frechet"),
    claims=(
        Claim("joint", "cross", "all_right", "text in the sequence is followed better"),
        Claim("joint", "cross", "flow_loss", "text in the sequence trains better", higher=False),
        Claim("dual", "cross", "all_right", "text in a stream of its own is followed better than by cross-attention"),
        Claim("dual", "cross", "flow_loss", "and trains better", higher=False),
        Claim("dual", "joint", "all_right", "weights of its own make text followed better"),
        Claim("dual", "joint", "flow_loss", "and train better", higher=False),
    ),
    limits="Joint is with shared weights and a modulation of its own for text. For a stream of its own the MLPs are "
    "less than half as wide, and what its weights make of the text in the last layer serves nobody. FLOPs differ.",
)

_PATCH = Question(
    name="patch",
    asks="Is it parameters or FLOPs that buy quality?",
    source="DiT (arXiv:2212.09748): quality follows FLOPs, by size or by smaller patches; parameters alone do not tell",
    budget="steps",
    variants={
        f"{size}_{space}": sized(space, heads)
        for (size, heads), space in itertools.product({"half": 0.5, "base": 1.0, "large": 1.5}.items(), (2, 4, 8))
    },
    scores=("all_right", *FOLLOWS[1:], "persistence", "flow_loss", "kinetic_frechet"),
    claims=(
        Claim("base_2", "base_4", "all_right", "smaller patches help at equal parameters"),
        Claim("base_4", "base_8", "all_right", "smaller patches help at equal parameters"),
        Claim("large_2", "half_2", "all_right", "larger models help at equal tokens"),
        Claim("half_2", "large_8", "all_right", "at about equal FLOPs, tokens beat parameters"),
    ),
    plots_flops=True,
    limits="Equal are the steps; what a variant costs is on the axis. Patches are in latent positions along height and "
    "width, one latent frame each: so small a latent leaves 8 one token a frame.",
)

_POSITIONS = Question(
    name="positions",
    asks="Rotary or added sincos positions, at the length of training and at twice it?",
    source="CogVideoX: rotary converges faster; Latte: no difference at fixed length",
    budget="steps",
    variants={"rotary": place_by("rotary"), "sincos": place_by("sincos")},
    samplings={"default": Sampling(), "twice": Sampling(times_length=2)},
    scores=(*FOLLOWS, "persistence", "smoothness", "flow_loss", "kinetic_frechet"),
    claims=(
        Claim("rotary", "sincos", "flow_loss", "rotary positions train faster", higher=False),
        Claim("rotary", "sincos", "all_right", "rotary positions are better at the length of training"),
        Claim("rotary@twice", "sincos@twice", "flow_loss", "rotary positions are better at twice it", higher=False),
        Claim("rotary@twice", "sincos@twice", "persistence", "at twice it things hold together better"),
    ),
    limits="Clips of twice the length show slower motion, so that things keep to the frame: another world than that of "
    "training, the same for both.",
)

_IMAGES = Question(
    name="images",
    asks="At equal FLOPs, do images, shorter clips or smaller clips help, beside the full ones or before them?",
    source="Latte: joint training on images helps; Open-Sora: buckets of lengths and resolutions, and from images and "
    "low resolution to long clips and high",
    budget="flops",
    variants={
        "video": as_it_is,
        "with_images": mix_in((0, 1), share=0.25),
        "with_lengths": mix_in((0, 1), (2, 1), share=0.5),
        "with_resolutions": mix_in((1, 2), share=0.5),
        "images_first": (Stage(0.25, only(0, 1)), Stage(0.75, as_it_is)),
        "short_to_long": (Stage(0.15, only(0, 1)), Stage(0.25, only(2, 1)), Stage(0.6, as_it_is)),
        "low_to_high": (Stage(0.3, only(1, 2)), Stage(0.7, as_it_is)),
    },
    scores=(*FOLLOWS, "persistence", "flow_loss", "kinetic_frechet"),
    claims=(
        Claim("with_images", "video", "all_right", "images beside video help"),
        Claim("with_lengths", "video", "all_right", "images and short clips beside long ones help"),
        Claim("with_resolutions", "video", "all_right", "small clips beside large ones help"),
        Claim("images_first", "video", "all_right", "images before clips help"),
        Claim("short_to_long", "video", "all_right", "images, then short clips, then long ones help"),
        Claim("low_to_high", "video", "all_right", "small clips before large ones help"),
        Claim("short_to_long", "with_lengths", "all_right", "one after the other is better than all at once"),
    ),
    limits="Each stage of a curriculum has a schedule of its own, whose rate falls to its end. The held-out loss "
    "during training is of what is trained on, and compares only within a variant.",
)

_COMPRESSION = Question(
    name="compression",
    asks="How much should the autoencoder compress time and space, and into how many channels?",
    source="CogVideoX: more channels better; LTX-Video (arXiv:2501.00103): strong compression, many channels",
    budget="steps",
    variants={
        "base": as_it_is,
        "half_time": half_the_time_compression,
        "twice_space": twice_the_space_compression,
        "half_channels": channels(0.5),
        "twice_channels": channels(2),
    },
    scores=("psnr_db", "change_error", "all_right", "shape", "motion", "persistence", "kinetic_frechet"),
    claims=(
        Claim("twice_channels", "half_channels", "psnr_db", "more channels reconstruct better"),
        Claim("twice_channels", "half_channels", "all_right", "more channels generate better"),
        Claim("half_time", "base", "psnr_db", "less compression of time reconstructs better"),
        Claim("base", "twice_space", "psnr_db", "less compression of space reconstructs better"),
        Claim("base", "twice_space", "all_right", "less compression of space generates better"),
    ),
    trains_autoencoder=True,
    limits="One factor at a time, around the base. half_time has nearly twice the tokens, twice_space as many.",
)

_GUIDANCE = Question(
    name="guidance",
    asks="How many captions should training drop, and how strongly should sampling lean on them?",
    source="Classifier-free guidance (arXiv:2207.12598): a tenth or two dropped; scale trades variety for fidelity",
    budget="steps",
    variants={f"dropped_{percent}": drop_captions(percent / 100) for percent in (0, 10, 30)},
    samplings={f"scale_{scale}": Sampling(guidance=scale) for scale in (3, 1, 2, 6, 12)},
    scores=(*FOLLOWS, "colour_constancy", "persistence", "kinetic_frechet", "kinetic_recall"),
    claims=(
        Claim("dropped_10@scale_3", "dropped_10@scale_1", "all_right", "guidance helps"),
        Claim("dropped_10@scale_3", "dropped_10@scale_12", "all_right", "too much guidance harms"),
        Claim("dropped_10@scale_3", "dropped_0@scale_3", "all_right", "guidance needs dropped captions"),
        Claim("dropped_10@scale_3", "dropped_30@scale_3", "all_right", "a tenth dropped is better than a third"),
        Claim("dropped_10@scale_1", "dropped_10@scale_12", "kinetic_recall", "variety falls with the scale"),
    ),
    limits="That colours are too strong at a high scale is not measured.",
)

_AVERAGE = Question(
    name="average",
    asks="Do averaged weights sample better than the last ones?",
    source="Common to all diffusion models since DDPM (arXiv:2006.11239)",
    budget="steps",
    variants={"averaged": as_it_is, "last": without_average},
    scores=(*FOLLOWS, "persistence", "flow_loss", "kinetic_frechet"),
    claims=(
        Claim("averaged", "last", "all_right", "averaged weights are right more often"),
        Claim("averaged", "last", "flow_loss", "averaged weights have the lower loss", higher=False),
    ),
    limits="With the base's schedule: where the rate falls to zero, it averages too.",
)

_OPTIMIZER = Question(
    name="optimizer",
    asks="Muon or AdamW, in equal time?",
    source="Jordan 2024 (kellerjordan.github.io/posts/muon); Liu 2025 (arXiv:2502.16982), for language models",
    budget="seconds",
    variants={
        "muon": optimise("muon"),
        "muon_quarter_rate": optimise("muon", 0.25),
        "adamw": optimise("adamw"),
        "adamw_quarter_rate": optimise("adamw", 0.25),
    },
    scores=(*FOLLOWS, "flow_loss", "kinetic_frechet"),
    claims=(
        Claim("muon", "adamw", "flow_loss", "Muon beats AdamW at one rate", higher=False),
        Claim("muon", "adamw_quarter_rate", "flow_loss", "Muon beats AdamW at a quarter of its rate", higher=False),
        Claim("muon", "adamw_quarter_rate", "all_right", "and is right more often"),
    ),
    limits="Two rates each is no search. Seconds are of this machine, measured once.",
)

_QK_NORM = Question(
    name="qk_norm",
    asks="Does normalising queries and keys make a high learning rate bearable?",
    source="ViT-22B (arXiv:2302.05442); SD3: attention grows without bound in long training",
    budget="steps",
    variants={
        "with": normalise(True),
        "without": normalise(False),
        "with_high_rate": normalise(True, 4.0),
        "without_high_rate": normalise(False, 4.0),
    },
    scores=(*FOLLOWS, "flow_loss", "kinetic_frechet"),
    claims=(
        Claim("with_high_rate", "without_high_rate", "flow_loss", "at four times the rate it helps", higher=False),
        Claim("with", "without", "flow_loss", "at the usual rate it helps", higher=False),
    ),
    limits="Short trainings in float32: growth over many steps, and bfloat16, are not seen.",
)

_BOLTED_ON = Question(
    name="bolted_on",
    asks="Is video made as one object in space and time better than an image model with time bolted on?",
    source="Video LDM (arXiv:2304.08818), AnimateDiff (arXiv:2307.04725): layers over time in a U-Net of images, the "
    "rest left as it is; Sora and all since: one transformer over space and time",
    budget="flops",
    variants={
        "dit": place_by("rotary"),
        "dit_sincos": place_by("sincos"),
        "bolted_on": (
            Stage(0.5, with_unet(temporal=False)),
            Stage(0.5, with_unet(temporal=True, train_only="temporal")),
        ),
        "unet": with_unet(temporal=True),
        "images_alone": with_unet(temporal=False),
    },
    scores=("all_right", *FOLLOWS[1:], *HOLDS, "flow_loss", "kinetic_frechet"),
    claims=(
        Claim("dit", "bolted_on", "all_right", "one transformer over space and time is right more often"),
        Claim("dit", "bolted_on", "persistence", "one transformer keeps a thing the same thing"),
        Claim("bolted_on", "images_alone", "persistence", "layers over time, bolted on, keep a thing the same thing"),
        Claim("unet", "bolted_on", "all_right", "trained as a whole, the same U-Net is better"),
        Claim("dit", "unet", "all_right", "and the transformer is better than that"),
    ),
    limits="One small U-Net, of about the transformer's parameters. Its images are the frames of the latent, each of "
    "which but the first stands for several frames of the clip. The schedule of each half falls to its end. "
    "The images' half of the bolted-on training is paid from the same budget, where those who publish such models "
    "start from image models trained to the end; and one rate, chosen for the transformer, serves all. `dit_sincos`, "
    "whose positions are added and not rotary, was put beside the rest after these had run, for at this size it learns "
    "faster (`positions`); no claim is about it.",
)

QUESTIONS: dict[str, Question] = {
    question.name: question
    for question in (
        _ATTENTION,
        _OBJECTIVE,
        _AUTOENCODER,
        _TIME,
        _TEXT,
        _PATCH,
        _POSITIONS,
        _IMAGES,
        _COMPRESSION,
        _GUIDANCE,
        _AVERAGE,
        _OPTIMIZER,
        _QK_NORM,
        _BOLTED_ON,
    )
}
