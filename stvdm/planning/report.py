# SPDX-License-Identifier: Apache-2.0
"""Plans as text, from their JSON alone: what is kept in the cache can be shown without tracing anything again.

print(as_text(with_cost(report, price=4.2)))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stvdm.planning.chips import DEVICES_PER_CHIP

Json = Mapping[str, Any]


def with_cost(report: Json, *, price: float | None = None) -> dict[str, Any]:
    """The plan, with the chip-hours that a thousand clips take at least, and what they cost if a chip-hour has a price.

    No price is built in: they differ by region, commitment and month.
    """
    fit = report.get("compiled")
    if not fit or not fit["fits"]:
        return dict(report)
    hours = chip_hours(fit, batch=report["clips"][0]["batch"])
    cost: Json = {} if price is None else {"price_of_chip_hour": price, "cost_of_1000_clips": hours * price}
    return {**report, "compiled": {**fit, "chip_hours_of_1000_clips": hours, **cost}}


def as_text(report: Json) -> str:
    """A plan for people."""
    lines = []
    for clip in report["clips"]:
        video, latent, grid = ("x".join(map(str, clip[name])) for name in ("video", "latent", "grid"))
        channels = report["latent_channels"]
        line = f"clips of {video} -> latents of {latent}x{channels}, {clip['compression']:.1f} times fewer values"
        if report["kind"] == "dit":
            pairs = clip["attention_pairs"]
            line += (
                f" -> {clip['tokens']:,} tokens ({grid}); attention pairs a layer: full {pairs['full']:,}, "
                f"factorised {pairs['factorised']:,} ({pairs['full'] / pairs['factorised']:.1f} times fewer)"
            )
        lines.append(f"{line}; batch {clip['batch']}")
        lines += [f"  {told}" for told in (*_patterns(clip), _other_grouping(clip, report["kind"]))]
    if len(report["clips"]) > 1:
        lines.append("of these the first, the largest, is what follows:")
    total, flops, blocks = (sum(report[name].values()) for name in ("parameters", "step_flops", "block_flops"))
    lines.append(f"parameters: {short(total)}: " + _shares(report["parameters"], total))
    if "state_bytes" in report:  # plans that were kept from before do not say
        lines.append(
            f"one copy of what is kept from step to step: {gib(report['state_bytes'])} GiB of weights that are "
            f"trained, their average and moments; {gib(report['frozen_bytes'])} of what stays as it is"
        )
    lines.append(
        f"a step: {short(flops)}FLOP, of these {short(report['model_flops'])} of the model: "
        + _shares(report["step_flops"], flops)
    )
    if report["block_flops"] != report["step_flops"]:
        lines.append(f"  with the whole blocks of attention that a TPU computes: {short(blocks)}FLOP")
    if report.get("compiled"):
        lines += _compiled(with_cost(report)["compiled"])
    return "\n".join(lines)


def _patterns(clip: Json) -> list[str]:
    """What the patterns of a clip's attention see, and what is computed for it; nothing of those where all see all."""
    return [
        f"'{pairs['pattern']}' attention sees {pairs['seen']:,} pairs a layer, {pairs['seen'] / pairs['all']:.2%} of "
        f"all; a TPU computes whole blocks, {pairs['computed']:,} pairs, {pairs['computed'] / pairs['all']:.1%} of all"
        for pairs in clip["patterns"]
        if pairs["pattern"] != "full"
    ]


def _other_grouping(clip: Json, kind: str) -> str:
    other = clip["other_grouping"]
    video, latent = ("x".join(map(str, other[name])) for name in ("video", "latent"))
    line = f"in the other grouping of time, {other['grouping']}: {video} -> {latent}"
    if kind != "dit":
        return line
    if other["grid"] is None:
        return f"{line}, no whole number of patches"
    return f"{line} -> {other['tokens']:,} tokens ({'x'.join(map(str, other['grid']))})"


def _compiled(fit: Json) -> list[str]:
    slices = "" if fit["num_slices"] == 1 else f"{fit['num_slices']} slices of "
    effort = "with little effort " if fit["quick"] else ""
    lines = [
        f"compiled {effort}for {slices}{fit['topology']} ({fit['num_devices']} devices: {mesh_text(fit['mesh'])}; "
        f"remat {fit['remat']}, {fit['accumulate']} micro-batches) in {fit['compile_seconds']:.0f} s, "
        f"{fit['compile_cpu_seconds']:.0f} CPU-seconds"
    ]
    if not fit["fits"]:
        said = [f"  {fit['refusal']}"] if fit["needed_bytes"] is None else []
        return [*lines, f"  does not fit: {room(fit)}", *said]
    chip = fit["chip"]
    lines.append(
        f"  fits: {room(fit)} a device at the peak, {fit['margin_bytes'] / fit['limit_bytes']:.0%} to spare "
        f"(arguments {gib(fit['argument_bytes'])}; all temporaries {gib(fit['temporary_bytes'])}, not all at once)"
    )
    for collective in fit["collectives"]:
        over = " and ".join(collective["axes"]) or "nothing"
        least = "" if collective["exact"] else "at least "
        lines.append(
            f"  {collective['kind']} over {over}: {least}{collective['num']} a step, "
            f"{short(collective['bytes'])}B sent by a device"
        )
    if not _is_exact(fit):
        lines.append("  'at least': in loops whose turns do not follow from the program, of which one turn counts here")
    bounds = ", ".join(f"{name} {duration(seconds)}" for name, seconds in fit["bounds"].items() if seconds)
    lines.append(
        f"  no step is shorter than {duration(fit['step_seconds'])} ({bounds}); at that, MFU {fit['utilisation']:.0%}"
        + (" of bfloat16's peak" if fit["matmul"] else "")
    )
    lines.append("  memory is there for the state and the batch, read and written once; activations are not in it")
    rounded = chip["eight_bit_flops"].get(fit["matmul"])
    eight_bit = f"{short(rounded)}op/s in {fit['matmul']}, " if rounded else ""
    lines.append(
        f"  at peaks of {short(chip['flops'])}FLOP/s, {eight_bit}memory {short(chip['memory_bandwidth'])}B/s, links "
        f"{short(chip['link_bandwidth'])}B/s, network {short(chip['network_bandwidth'])}B/s a device ({chip['source']})"
    )
    cost = ""
    if "cost_of_1000_clips" in fit:
        cost = f", {fit['cost_of_1000_clips']:.3g} at {fit['price_of_chip_hour']:g} a chip-hour"
    lines.append(f"  a thousand clips: at least {fit['chip_hours_of_1000_clips']:.3g} chip-hours{cost}")
    return lines


COLUMNS = (
    *("", "parameters", "clips", "tokens", "batch", "slice", "mesh", "remat"),
    *("GiB a device", "least step", "MFU at that", "chip-hours for 1000 clips"),
)


def as_table(reports: Mapping[str, Json]) -> str:
    """Compiled plans by name, as a Markdown table; times are bounds that no real step is below."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(_cells(name, report) for name, report in reports.items())]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if not all(_is_exact(report["compiled"]) for report in reports.values()):
        lines += [
            "",
            f"{INEXACT} Some transfers are in loops whose turns do not follow from the program: they count once.",
        ]
    return "\n".join(lines)


INEXACT = "(≥)"  # beside a least step that leaves out what is sent in some turns of loops


def _is_exact(fit: Json) -> bool:
    return all(collective["exact"] for collective in fit["collectives"])


def _cells(name: str, report: Json) -> tuple[str, ...]:
    clip, fit = report["clips"][0], report["compiled"]
    slices = "" if fit["num_slices"] == 1 else f"{fit['num_slices']} x "
    micro = "" if fit["accumulate"] == 1 else f", {fit['accumulate']} micro-batches"
    left = (
        f"`{name}`",
        short(sum(report["parameters"].values())).strip(),
        "x".join(map(str, clip["video"])),
        f"{clip['tokens']:,}" if report["kind"] == "dit" else "",
        str(clip["batch"]),
        slices + fit["topology"],
        mesh_text(fit["mesh"]),
        fit["remat"] + micro,
        room(fit).removesuffix(" GiB"),
    )
    if not fit["fits"]:
        return (*left, "does not fit", "", "")
    fit = with_cost(report)["compiled"]
    hours = f"{fit['chip_hours_of_1000_clips']:.3g}"
    if "cost_of_1000_clips" in fit:
        hours += f" ({fit['cost_of_1000_clips']:.3g} at {fit['price_of_chip_hour']:g})"
    least = f"{fit['step_seconds']:.3g} s" + ("" if _is_exact(fit) else f" {INEXACT}")
    return (*left, least, f"{fit['utilisation']:.0%}", hours)


def chip_hours(fit: Json, *, batch: int) -> float:
    """Of a thousand clips, if no step took longer than its bound."""
    chips = fit["num_devices"] / DEVICES_PER_CHIP.get(fit["topology"].partition(":")[0], 1)
    return 1000 / batch * fit["step_seconds"] / 3600 * chips


def room(fit: Json) -> str:
    """What is needed of what there is."""
    limit = gib(fit["limit_bytes"])
    return f"more than {limit} GiB" if fit["needed_bytes"] is None else f"{gib(fit['needed_bytes'])} of {limit} GiB"


def mesh_text(mesh: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"


def short(number: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} "


def duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def gib(number: float) -> str:
    return f"{number / 2**30:.2f}"


def _shares(parts: Mapping[str, float], total: float) -> str:
    return ", ".join(f"{name} {value / total:.0%}" for name, value in parts.items() if value / total >= 0.01)
