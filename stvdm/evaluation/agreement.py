# SPDX-License-Identifier: Apache-2.0
"""Which metrics agree with the known truth: each damage against each instrument, by a rule that was fixed beforehand.

    stvdm evaluate --damage --num=128 --output=results/damage

Real clips of the test split are damaged (`damage`), and judged with and without (`instruments`). The rule:

    worse(k)    how much worse the instrument judges strength k than strength 0: the mean over clips, with Student's
                95 % interval of the paired differences; for instruments of sets, the difference of two distances from
                other real clips, with the interval of a jackknife over ten groups of clips
    sees        at the middle strength the interval lies above 0; and from no strength to the next, none included, does
                the instrument turn better by more than noise, that is by an interval that lies below 0
    rewards     at the middle strength the interval lies below 0: damage counts as improvement
    misses      else: no change that noise does not make, or a change that turns back
    -           not applicable: fewer than 8 clips give it anything to judge, or it fails undamaged clips (an item that
                is right or wrong, on less than 0.95 of them)

What is expected of an instrument (`instruments`) was written down before. One that misses or rewards a damage that it
is there to see is marked so; and so is one that reacts, either way, to a damage it should be blind to.

Two controls, at which whatever sees gives a *false alarm*: *redrawn*, other real clips in place of damaged ones (for
instruments that need no original; about one in forty sees it by chance, the interval being one of 95 %); and
*symmetric reversal*, clips run backwards of things that leave the frame and return, which obey the same words and laws
both ways.

Cannot see: whether people would mind. The world is small, and its damage pure: each kind alone, evenly in all clips.
"""

from __future__ import annotations

import itertools
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from scipy import special

import stvdm
from stvdm.data.kinetic_shapes import World, sample_scene
from stvdm.evaluation import physics, result_file
from stvdm.evaluation.damage import DAMAGES, Damage, Shot
from stvdm.evaluation.instruments import FEATURES, Clips, Features, Instrument, distances, instruments, score
from stvdm.evaluation.physics import Row

LEAST = 8  # clips that an instrument must have something to say of
GROUPS = 10  # of the jackknife
DIGITS = 5  # of the numbers that a file keeps
CONTROLS = ("redrawn", "symmetric reversal")
SYMMETRIC = World(
    motions=("return_left", "return_right"), motion_weights=(1.0, 1.0), num_things=(1.0,), occluder=0.0, pan=0.0
)


def main(
    *,
    num: int = 128,
    seed: int = 0,
    output: epath.PathLike = "outputs/damage",
    command: str = "",
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Measures everything, and writes damage.json, damage.md and contact.png to a folder; returns the result.

    Raises:
      ValueError: for fewer clips than the distances of sets need.
    """
    result = measure(num, seed=seed, say=say)
    result["conditions"]["command"] = command
    result = result_file.kept(result, DIGITS)
    folder = epath.Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    result_file.write(folder / "damage.json", result)
    (folder / "damage.md").write_text(as_markdown(result), encoding="utf-8")
    from stvdm.data import video

    shown = [(shot, n) for n, shot in enumerate(_shots(2, seed, 0))]
    rows = [(shot.render(), shot.scene.caption) for shot, _ in shown]
    for damage in DAMAGES.values():
        for shot, n in shown:
            rows += [(damage(shot, s, seed=n), f"{damage.name} {s:g} ({damage.unit})") for s in damage.strengths]
    with result_file.whole(folder / "contact.png") as file:
        video.contact_sheet(*zip(*rows, strict=True)).save(file, "PNG")
    print(as_markdown(result))
    say(f"in {', '.join(str(folder / name) for name in ('damage.json', 'damage.md', 'contact.png'))}")
    return result


def measure(
    num: int,
    *,
    seed: int = 0,
    shot: Shot | None = None,
    features: Sequence[Features] = FEATURES,
    damages: Mapping[str, Damage] = DAMAGES,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """All that the table says as one mapping: "conditions", "damages", "instruments".

    Args:
      num: clips that are damaged; as many others are the real ones that sets are held against, and as many again are
        the control. Scenes 0 to 3 num - 1 of the test split of ``seed``.
      shot: how scenes are filmed, whose own scene is not looked at; None: 17 frames of 64 x 64, 8 a second.
      features: rows of features; distances and consistencies are taken over each.

    Raises:
      ValueError: if ``num`` is below 2 LEAST.
    """
    if num < 2 * LEAST:
        raise ValueError(f"num={num}: expected at least {2 * LEAST} clips, as intervals are taken over them.")
    began = time.monotonic()
    asked = instruments(features)

    def read(label: str, shots: Sequence[Shot], videos: np.ndarray, originals: np.ndarray) -> Reading:
        say(f"judging {len(videos)} clips: {label}")
        clips = Clips(videos, originals, [one.scene for one in shots], shots[0].fps)
        return Reading(score(clips, features), {row.name: row.of(videos) for row in features})

    ours, others, third = (_shots(num, seed, start * num, shot) for start in range(3))
    originals = np.stack([one.render() for one in ours])
    real = {row.name: row.of(np.stack([one.render() for one in others])) for row in features}
    undamaged = read("undamaged", ours, originals, originals)
    base = values(undamaged, real)

    found: dict[str, Any] = {
        one.name: {
            "reads": one.reads,
            "better": one.better,
            "undamaged": _summary(one, base[one.name]),
            "damages": {},
            "controls": {},
        }
        for one in asked
    }
    for damage in damages.values():
        strengths = []
        for strength in damage.strengths:
            videos = np.stack([damage(one, strength, seed=n) for n, one in enumerate(ours)])
            strengths.append(values(read(f"{damage.name} {strength:g}", ours, videos, originals), real))
        for one in asked:
            series = [base[one.name], *(strength[one.name] for strength in strengths)]
            cell = _cell(one, series, damage.middle)
            found[one.name]["damages"][damage.name] = {"expected": one.expected(damage.name), **cell}

    redrawn = np.stack([one.render() for one in third])
    controls = {"redrawn": (base, values(read("redrawn", third, redrawn, redrawn), real))}
    symmetric = _shots(max(2 * LEAST, num // 2), seed, 0, shot, SYMMETRIC)
    forwards = np.stack([one.render() for one in symmetric])
    controls["symmetric reversal"] = (
        values(read("symmetric", symmetric, forwards, forwards), real),
        values(read("symmetric, reversed", symmetric, forwards[:, ::-1], forwards), real),
    )
    for control, (before, after) in controls.items():
        for one in asked:
            if control == "redrawn" and one.reads == "pair":
                continue
            found[one.name]["controls"][control] = _cell(one, [before[one.name], after[one.name]], 0)
    filmed = ours[0]
    return {
        "conditions": {
            "clips": f"kinetic shapes, test split, seed {seed}, scenes 0 to {num - 1} damaged, {num} to {2 * num - 1} "
            f"for sets to be held against, {2 * num} to {3 * num - 1} redrawn",
            "num": num,
            "seed": seed,
            "num_frames": filmed.num_frames,
            "height": filmed.height,
            "width": filmed.width,
            "fps": filmed.fps,
            "damage_seeds": "the number of the clip",
            "versions": {"stvdm": stvdm.__version__, "jax": jax.__version__, "numpy": np.__version__},
            "device": jax.devices()[0].device_kind,
            "machine": machine(),
            "seconds": round(time.monotonic() - began),
        },
        "damages": {one.name: {"unit": one.unit, "strengths": list(one.strengths)} for one in damages.values()},
        "instruments": found,
    }


class Reading(NamedTuple):
    """What instruments say of some clips: scores (N,) by name, features (N, D) by row."""

    scores: dict[str, np.ndarray]
    features: dict[str, np.ndarray]


def values(reading: Reading, real: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By instrument: of clips (N,), one for each; of sets (1 + GROUPS,), of all clips, and of all but a group."""
    found = dict(reading.scores)
    for name, made_ND in reading.features.items():
        parts = [distances(made_ND, real[name])]
        for group in range(GROUPS):
            kept, others = (np.arange(len(x)) % GROUPS != group for x in (made_ND, real[name]))
            parts.append(distances(made_ND[kept], real[name][others]))
        found |= {f"{kind} ({name})": np.asarray([part[kind] for part in parts]) for kind in parts[0]}
    return found


# --- the rule --------------------------------------------------------------------------------------------------------


def over_clips(differences_N: np.ndarray) -> Row:
    """Mean of the differences that are not nan, with Student's 95 % interval."""
    return physics.students(differences_N[~np.isnan(differences_N)])


def over_groups(differences: np.ndarray) -> Row:
    """The difference of all clips, (1 + G,)'s first, with the 95 % interval of the delete-a-group jackknife.

    se² = (G - 1) / G · sum over groups of (d_without_g - mean)², Student's t with G - 1 degrees of freedom (Efron &
    Stein 1981, https://doi.org/10.1214/aos/1176345462).
    """
    whole, without = float(differences[0]), differences[1:]
    G = len(without)
    error = np.sqrt((G - 1) / G * np.square(without - without.mean()).sum())
    half = float(special.stdtrit(G - 1, 0.975) * error)
    return Row(whole, whole - half, whole + half, G)


def verdict(worse: Sequence[Row], steps: Sequence[Row], middle: int) -> str:
    """ "sees", "rewards", "misses", or "-" where too few clips tell: the rule of this module.

    Args:
      worse: how much worse each strength is than none.
      steps: how much worse each strength is than the one before it.
      middle: which strength decides.
    """
    if worse[middle].num < LEAST:
        return "-"
    if worse[middle].high < 0:
        return "rewards"
    return "sees" if worse[middle].low > 0 and not any(step.high < 0 for step in steps) else "misses"


def mark(expected: str, found: str) -> str:
    """What the table says: in capitals where an instrument fails what is expected of it."""
    if found == "-" or (expected == "" and found != "misses") or (expected, found) == ("sees", "sees"):
        return found
    if expected == "sees":
        return found.upper()
    if expected == "blind":
        return "blind" if found == "misses" else "REACTS"
    return ""


def _cell(instrument: Instrument, series: Sequence[np.ndarray], middle: int) -> dict[str, Any]:
    """The verdict and what it rests on, of an instrument's values at no damage and at each strength."""
    interval = over_groups if instrument.reads == "set" else over_clips
    faults = [instrument.fault(at) for at in series]
    worse = [interval(at - faults[0]) for at in faults[1:]]
    steps = [interval(at - before) for before, at in itertools.pairwise(faults)]
    fails = _fails(instrument, series[0])
    return {
        "verdict": "-" if fails else verdict(worse, steps, middle),
        "num": worse[middle].num,
        "means": [_mean(instrument, at) for at in series[1:]],
        "worse": [list(row[:3]) for row in worse],
        "steps": [list(row[:3]) for row in steps],
    }


def _fails(instrument: Instrument, undamaged: np.ndarray) -> bool:
    """Is it one of right or wrong, that undamaged clips often fail?"""
    item = instrument.name.removeprefix("physics ")
    return item in (*physics.RIGHT_OR_WRONG, "all_right") and bool(_mean(instrument, undamaged) < physics.CEILING)


def _mean(instrument: Instrument, at: np.ndarray) -> float:
    known = at[:1] if instrument.reads == "set" else at[~np.isnan(at)]
    return float(known.mean()) if len(known) else float("nan")


def _summary(instrument: Instrument, at: np.ndarray) -> dict[str, float]:
    """Of undamaged clips: their mean, and for instruments of clips its deviation over them."""
    mean, known = {"mean": _mean(instrument, at)}, at[~np.isnan(at)]
    return {**mean, "deviation": float(known.std())} if instrument.reads != "set" and len(known) else mean


# --- what is written -------------------------------------------------------------------------------------------------


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table for people, of a result as its file keeps it."""
    conditions, damages = result["conditions"], result["damages"]
    found = result["instruments"]
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    middle = {name: one["strengths"][len(one["strengths"]) // 2] for name, one in damages.items()}
    parts = [
        "# What metrics see of known damage",
        "Each column is a kind of damage that was done to real clips, each row a metric. **sees**: clips score worse, "
        "more so the stronger the damage, by more than noise; rewards: they score better. In capitals what goes "
        "against what was expected, as written in `stvdm/evaluation/instruments.py` before the run: MISSES or REWARDS "
        "of a metric that is there to see that damage, REACTS of one that should be blind to it; *blind* is as it "
        "should be. Empty: misses, and nobody said otherwise. -: nothing to judge. The rule stands in "
        "`stvdm/evaluation/agreement.py`.",
        _table(
            ["", *damages, *CONTROLS],
            [
                [name, *(_shown(one["damages"].get(damage)) for damage in damages), *map(_alarm, _controls(one))]
                for name, one in found.items()
            ],
        ),
        "## Misses its own damage",
        "With the mean of undamaged clips, then at each strength.",
        _listed(_failures(found)),
        "## False alarms",
        "*Redrawn*: other real clips in place of damaged ones. *Symmetric reversal*: clips run backwards that obey the "
        "same words and laws either way. About one metric in forty would see *redrawn* by chance.",
        _listed(_alarms(found)),
        "## How much",
        "Undamaged: the mean, and its deviation over clips. Then the mean at the middle strength.",
        _table(
            ["", "better", "undamaged", *(f"{damage} {middle[damage]:g}" for damage in damages)],
            [
                [
                    name,
                    one["better"],
                    _number(one["undamaged"]["mean"])
                    + (f" ± {_number(one['undamaged']['deviation'])}" if "deviation" in one["undamaged"] else ""),
                    *(_middle(one["damages"].get(damage)) for damage in damages),
                ]
                for name, one in found.items()
            ],
        ),
        "## The damage",
        _table(
            ["", "strengths", "unit"],
            [[name, ", ".join(f"{s:g}" for s in one["strengths"]), one["unit"]] for name, one in damages.items()],
        ),
        "## Conditions",
        f"{conditions['clips'][0].upper()}{conditions['clips'][1:]}. {conditions['num_frames']} frames of "
        f"{conditions['height']}x{conditions['width']} at {conditions['fps']:g} a second; damage seeded by "
        f"{conditions['damage_seeds']}. {versions}; {conditions['machine']}; {conditions['seconds']} s.",
        f"```bash\n{conditions['command']}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _failures(found: Mapping[str, Any]) -> list[str]:
    """A line for each damage that a metric is there to see and does not."""
    return [
        f"{name} {cell['verdict']} {damage}: {_number(one['undamaged']['mean'])}, then "
        + ", ".join(map(_number, cell["means"]))
        for name, one in found.items()
        for damage, cell in one["damages"].items()
        if cell["expected"] == "sees" and cell["verdict"] in ("misses", "rewards")
    ]


def _alarms(found: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {control}"
        for name, one in found.items()
        for control, cell in one["controls"].items()
        if cell["verdict"] == "sees"
    ]


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) or "None."


def _controls(one: Mapping[str, Any]) -> list[Mapping[str, Any] | None]:
    return [one["controls"].get(control) for control in CONTROLS]


def _shown(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "-"
    text = mark(cell["expected"], cell["verdict"])
    return f"**{text}**" if text == "sees" or text.isupper() else f"*{text}*" if text == "blind" else text


def _alarm(cell: Mapping[str, Any] | None) -> str:
    if cell is None or cell["verdict"] == "-":
        return "-"
    return "FALSE ALARM" if cell["verdict"] == "sees" else ""


def _middle(cell: Mapping[str, Any] | None) -> str:
    return "-" if cell is None else _number(cell["means"][len(cell["means"]) // 2])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [titles, ["---"] * len(titles), *rows])


def _shots(num: int, seed: int, start: int, like: Shot | None = None, world: World | None = None) -> list[Shot]:
    """Shots of scenes of the test split, from a number on."""
    filmed = Shot(sample_scene(seed, 0, split="test")) if like is None else like
    place = physics.DEFAULT_WORLD if world is None else world
    return [filmed._replace(scene=sample_scene(seed, start + n, split="test", world=place)) for n in range(num)]


def machine() -> str:
    """What this runs on, in words: cores, processor, system."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{os.cpu_count()} cores, {name}, {platform.system()}"
