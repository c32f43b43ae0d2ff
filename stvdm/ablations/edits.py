# SPDX-License-Identifier: Apache-2.0
"""Config edits: what one variant of an ablation changes, each a plain function of a `Run`, or one that makes such.

    run = Run(dit=config.dit(), autoencoder=config.autoencoder())
    attend("frame", "time")(run)

Edits are relative to what they find, so that one list of ablations serves every size of model and clip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from stvdm import config as base


class Run(NamedTuple):
    """The configs of one cell, for an edit to change: a base of `config.dit` and one of `config.autoencoder`.

    The autoencoder's is read only by questions that train one; elsewhere all cells share the one that ``dit`` names.
    """

    dit: ConfigDict
    autoencoder: ConfigDict


Edit = Callable[[Run], None]


class Stage(NamedTuple):
    """A part of a training that is made in stages, each from the weights of the one before."""

    share: float  # of the budget
    edit: Edit


def as_it_is(run: Run) -> None:
    """The base."""


def attend(*cycle: str) -> Edit:
    """Patterns of self-attention, cycled over the layers, with positions that are added to the tokens.

    Turns within a frame do not tell which frame it is: with rotary positions a frame alone would not know its time.
    """

    def edit(run: Run) -> None:
        run.dit.model.attention, run.dit.model.positions = cycle, "sincos"
        if "window" in cycle:
            run.dit.model.window = (1, 1, 1)

    return edit


def predict(prediction: str, times: str) -> Edit:
    """What the network predicts, and the density of its training times: uniform, logit_normal, or that, stratified."""

    def edit(run: Run) -> None:
        flow = run.dit.flow
        flow.prediction = prediction
        flow.stratified = times == "stratified"
        if times == "uniform":
            flow.density, flow.mean, flow.std = "uniform", 0.0, 1.0
        else:
            flow.density = "logit_normal"

    return edit


def first_frame_apart(run: Run) -> None:
    """As it is, with so many fewer channels that a clip has about as many latent values as `frame_by_frame`."""
    model, ((T, *_), *_) = run.autoencoder.model, run.autoencoder.data.buckets
    temporal = 2 ** sum(model.temporal_down)
    values_a_place = T * max(1, model.latent_channels // temporal)
    model.latent_channels = round(values_a_place / (1 + (T - 1) / temporal))


def in_equal_groups(run: Run) -> None:
    """Time in equal groups, with no first frame apart; clips are a frame shorter, so that they divide."""
    run.autoencoder.model.grouping = "uniform"
    for config in run:
        config.data.buckets = tuple((T - 1, *rest) for T, *rest in config.data.buckets)


def frame_by_frame(run: Run) -> None:
    """Each frame alone, with so much fewer channels that a clip has about as many latent values."""
    model = run.autoencoder.model
    temporal = 2 ** sum(model.temporal_down)
    model.grouping, model.latent_channels = "frame", max(1, model.latent_channels // temporal)
    model.temporal_down = (False,) * len(model.temporal_down)


def read_jointly(run: Run) -> None:
    """Text in the sequence; the parameters of cross-attention, 4 D² a layer, go to the MLP, 2 D F."""
    model = run.dit.model
    model.text_path, model.mlp_width = "joint", model.mlp_width + 2 * model.width


def read_beside(run: Run) -> None:
    """Text in a stream of its own, whose weights are taken from the MLPs.

    In a layer the stream's projections, 4 D², stand for those of cross-attention, and two MLPs, 4 D F, for one; once
    for all layers, its modulation takes 6 D².
    """
    model = run.dit.model
    model.text_path = "dual"
    model.mlp_width = model.mlp_width // 2 - 3 * model.width // (2 * model.num_layers)


def tell_time(path: str) -> Edit:
    """A path of time; where it is a token, the 6 D² that would make its modulation go to the MLPs, 2 D F a layer."""

    def edit(run: Run) -> None:
        model = run.dit.model
        model.time_path = path
        if path in ("in_context", "cross_attention"):
            model.mlp_width += 3 * model.width // model.num_layers

    return edit


def sized(space: int, heads: float) -> Edit:
    """Patches of so many latent positions along height and width, and so many times the heads, of unchanged width."""

    def edit(run: Run) -> None:
        model = run.dit.model
        time, *_ = model.patch
        model.patch = (time, space, space)
        for name in ("width", "num_heads", "mlp_width"):
            model[name] = int(model[name] * heads)

    return edit


def place_by(positions: str) -> Edit:
    def edit(run: Run) -> None:
        run.dit.model.positions = positions

    return edit


def mix_in(*others: tuple[int, int], share: float) -> Edit:
    """Further buckets (n, m), with that share of all steps: 1 / n of the time (0: an image), 1 / m of each side."""

    def edit(run: Run) -> None:
        ((T, H, W, batch, _),) = run.dit.data.buckets
        added = tuple((1 + (T - 1) // n if n else 1, H // m, W // m, batch, share / len(others)) for n, m in others)
        run.dit.data.buckets = ((T, H, W, batch, 1.0 - share), *added)

    return edit


def only(time: int, space: int) -> Edit:
    """One bucket (n, m), with 1 / n of the time (0: an image) and 1 / m of each side."""

    def edit(run: Run) -> None:
        ((T, H, W, batch, weight),) = run.dit.data.buckets
        run.dit.data.buckets = ((1 + (T - 1) // time if time else 1, H // space, W // space, batch, weight),)

    return edit


def with_unet(*, temporal: bool, train_only: str = "") -> Edit:
    """A U-Net of two levels in place of the transformer, of about as many parameters; or of it some layers alone."""

    def edit(run: Run) -> None:
        dit, model = run.dit, base.unet().model
        heads = dit.model.num_heads
        model.update(
            width=dit.model.width // 4,
            num_heads=heads,
            patch=(1, 2, 2),
            temporal=temporal,
            dtype=dit.model.dtype,
        )
        with dit.unlocked():
            dit.model = model
        dit.train_only = train_only

    return edit


def half_the_time_compression(run: Run) -> None:
    """The first halving of time is left out: twice the latent frames."""
    run.autoencoder.model.temporal_down = _flipped(run.autoencoder.model.temporal_down, from_=True)


def twice_the_space_compression(run: Run) -> None:
    """One more halving of height and width; patches half as large, so that there are as many tokens."""
    run.autoencoder.model.spatial_down = _flipped(run.autoencoder.model.spatial_down, from_=False)
    time, height, width = run.dit.model.patch
    run.dit.model.patch = (time, max(1, height // 2), max(1, width // 2))


def _flipped(halvings: tuple[bool, ...], *, from_: bool) -> tuple[bool, ...]:
    first = list(halvings).index(from_)
    return tuple(not half if stage == first else half for stage, half in enumerate(halvings))


def channels(times: float) -> Edit:
    """So many times the latent channels."""

    def edit(run: Run) -> None:
        run.autoencoder.model.latent_channels = int(run.autoencoder.model.latent_channels * times)

    return edit


def drop_captions(share: float) -> Edit:
    def edit(run: Run) -> None:
        run.dit.flow.caption_dropout = share

    return edit


def without_average(run: Run) -> None:
    """What is evaluated is the weights themselves."""
    run.dit.ema_decay = 0.0


def optimise(name: str, rate: float = 1.0) -> Edit:
    """An optimiser, at so many times the base's rate."""

    def edit(run: Run) -> None:
        run.dit.optimizer.name = name
        run.dit.optimizer.learning_rate *= rate

    return edit


def normalise(queries_and_keys: bool, rate: float = 1.0) -> Edit:
    """Queries and keys normalised or not, at so many times the base's rate."""

    def edit(run: Run) -> None:
        run.dit.model.qk_norm = queries_and_keys
        run.dit.optimizer.learning_rate *= rate

    return edit
