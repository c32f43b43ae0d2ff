# SPDX-License-Identifier: Apache-2.0
"""Wan's transformer and autoencoder here and in PyTorch diffusers, side by side: milliseconds, memory, and the ratios.

    pip install -e '.[parity]'
    python -m tests.benchmarks.wan                                      # every line of the table
    python -m tests.benchmarks.wan --only=transformer --sides ours eager

Both read the same folder of random weights, as they would a published one, and run on the same two CPUs with two
threads each, in float32 and in bfloat16 (weights too). Every line of every side is a process of its own, whose peak of
resident memory is told, libraries included, compiling not. The sides take turns, a run each, so that what else the
machine does falls on all of them; told are the least time of a side and, behind it, the median. Under load believe
ratios of the CPU time rather than of the wall's. What was compiled is kept, so a second run is the quicker one.

| side | what it is |
|---|---|
| ours | one jitted program; the autoencoder streams, a latent frame at a time, as the pipeline does |
| whole | ours, the autoencoder in one piece |
| eager | diffusers as it comes; its autoencoder streams by itself |
| compiled | its transformer under torch.compile; if asked for, the halves of its autoencoder too |

The last column says how far the output is from eager's, in parts of its size (root mean square): in bfloat16 the two
round at other places. The gradient is that of the mean square of the velocity, for all weights.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

THREADS = 2
TURNS = (3, 12)  # of a line, at least and at most
_PAUSE = 0.03  # between turns, in which idle threads of the other side go to sleep

TRANSFORMERS = {  # fields of a DiT, and the (t, h, w) of its latent; the text is 512 x 4096
    "tiny": (dict(width=32, num_layers=1, num_heads=2, mlp_width=48), (2, 4, 6)),
    "small": (dict(width=128, num_layers=2, num_heads=4, mlp_width=512), (5, 32, 32)),
    "middle": (dict(width=512, num_layers=3, num_heads=4, mlp_width=2304), (5, 32, 32)),
}
AUTOENCODERS = {  # fields of an Autoencoder of Wan 2.1, and the (T, H, W) of its video
    "tiny": (dict(width=4), (5, 16, 24)),
    "small": (dict(width=32), (9, 64, 64)),
    "middle": (dict(width=96), (5, 64, 64)),  # Wan's own size
}
OURS = ("ours", "whole")
SIDES = {"transformer": ("ours", "eager", "compiled"), "autoencoder": ("ours", "whole", "eager", "compiled")}
DEFAULT = {"transformer": SIDES["transformer"], "autoencoder": ("ours", "whole", "eager")}
WORKS = {"transformer": ("forward", "gradient"), "autoencoder": ("encode", "decode")}


class Case(NamedTuple):
    """A line of the table."""

    network: str
    size: str
    work: str
    dtype: str


class Seen(NamedTuple):
    """What a side did in a case."""

    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]
    peak_bytes: int
    output: np.ndarray  # some of its values


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SIDES, help="one of the networks")
    parser.add_argument("--sizes", nargs="+", default=["small", "middle"], choices=sorted(TRANSFORMERS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES["autoencoder"], help="default: all but the compiled autoencoder"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of each side of a line, beyond the least turns")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds until a side must be ready to run")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(args.serve)
        return
    cases = [
        Case(network, size, work, dtype)
        for network in ([args.only] if args.only else SIDES)
        for size in args.sizes
        for work in WORKS[network]
        for dtype in args.dtypes
    ]
    sides = DEFAULT
    if args.sides:
        sides = {network: tuple(side for side in args.sides if side in SIDES[network]) for network in SIDES}
    for line in report(cases, sides, seconds=args.seconds, patience=args.patience):
        print(line, flush=True)


def report(
    cases: list[Case], sides: Mapping[str, tuple[str, ...]], *, seconds: float, patience: float
) -> Iterator[str]:
    """The lines of the table, each as soon as it is measured."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])  # of this process and all that it starts
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        yield f"CPUs: {len(os.sched_getaffinity(0))}, threads: {THREADS}, load before: {os.getloadavg()[0]:.1f}"
        processes = {}
        for side in dict.fromkeys(side for case in cases for side in sides[case.network]):
            processes[side] = stack.enter_context(Side(side))
            yield f"import, {side}: {processes[side].import_s:.2f} s"
        titles = ("network", "work", "dtype", "side", "ms, least (median)", "CPU ms", "peak MiB", "eager / it", "apart")
        yield f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}"
        for case in cases:
            place = Path(folder) / case.network / case.size
            if not place.exists():
                write(case.network, case.size, place)
            taking_part = {side: processes[side] for side in sides[case.network]}
            yield from lines(case, measured(case, place, taking_part, seconds=seconds, patience=patience))


def lines(case: Case, seen: Mapping[str, Seen | str]) -> Iterator[str]:
    """Of a case, one for each side; a side that failed says why."""
    eager = seen.get("eager")
    for side, found in seen.items():
        start = f"| {case.network} {case.size} | {case.work} | {case.dtype} | {side} |"
        if isinstance(found, str):
            yield f"{start} {found} | | | | |"
            continue
        wall, median, cpu = min(found.wall_s), statistics.median(found.wall_s), min(found.cpu_s)
        ratios = apart = ""
        if isinstance(eager, Seen) and side != "eager":
            ratios = f"{min(eager.wall_s) / wall:.2f} (CPU {min(eager.cpu_s) / cpu:.2f})"
            size = np.sqrt(np.square(eager.output).mean())
            apart = f"{np.abs(found.output - eager.output).max() / size:.1e}"
        times = f"{1e3 * wall:.1f} ({1e3 * median:.1f}) | {1e3 * cpu:.0f} | {found.peak_bytes / 2**20:.0f}"
        yield f"{start} {times} | {ratios} | {apart} |"


def measured(
    case: Case, place: Path, sides: Mapping[str, Side], *, seconds: float, patience: float
) -> dict[str, Seen | str]:
    """What each side did, or why it did nothing; they get ready one after the other, then take turns."""
    found: dict[str, Seen | str] = {}
    turns: dict[str, list[tuple[float, float]]] = {}
    for name, side in sides.items():
        try:
            side.begin(case, place, patience)
            turns[name] = []
        except RuntimeError as error:
            found[name] = str(error)
    while ready := [name for name, done in turns.items() if _goes_on(done, seconds)]:
        for name in ready:
            time.sleep(_PAUSE)
            turns[name].append(sides[name].turn())
    for name, done in turns.items():
        wall_s, cpu_s = zip(*done, strict=True)
        found[name] = Seen(wall_s, cpu_s, *sides[name].end())
    return {name: found[name] for name in sides}


def _goes_on(done: list[tuple[float, float]], seconds: float) -> bool:
    least, most = TURNS
    return len(done) < least or (len(done) < most and sum(wall for wall, _ in done) < seconds)


# ---- the processes --------------------------------------------------------------------------------------------------


class Side:
    """A process that has imported what a side needs, and forks itself for each case, so that peaks stand alone."""

    def __init__(self, name: str) -> None:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": str(THREADS),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else it forks workers of its own
            "HF_HUB_OFFLINE": "1",
        }
        environment.pop("XLA_FLAGS", None)  # under pytest there are eight devices in it
        command = [sys.executable, "-m", "tests.benchmarks.wan", f"--serve={name}"]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.there, self.back, self.rest = self.process.stdin, self.process.stdout.fileno(), b""
        self.import_s = self._hear(600)["import_s"]

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.there.close()  # with nothing more to read it ends
        self.process.wait()

    def begin(self, case: Case, place: Path, patience: float) -> None:
        """Has a process of its own get ready for a case.

        Raises:
          RuntimeError: that says why, if it does not.
        """
        self._say({"case": case, "place": str(place)})
        pid = self._hear(60)["pid"]
        told = self._hear(patience)
        if "ready" in told:
            return
        if not told:
            os.kill(pid, signal.SIGKILL)
            told = {"failed": f"not ready in {patience:.0f} s"}
            self._hear(60)
        elif "failed" in told:
            self._hear(60)
        raise RuntimeError(told.get("failed", f"died, status {told.get('status')}"))

    def turn(self) -> tuple[float, float]:
        """Seconds of a run on the wall, and of all CPUs."""
        self._say("turn")
        told = self._hear(600)
        return told["wall_s"], told["cpu_s"]

    def end(self) -> tuple[int, np.ndarray]:
        """The peak of the process's memory in bytes, and some values of its output."""
        self._say("end")
        told = self._hear(60)
        self._hear(60)
        return told["peak_bytes"], np.asarray(told["output"])

    def _say(self, message: Any) -> None:
        self.there.write(json.dumps(message).encode() + b"\n")
        self.there.flush()

    def _hear(self, seconds: float) -> dict[str, Any]:
        """What it says next; {} if that is nothing in so many seconds."""
        until = time.monotonic() + seconds
        while b"\n" not in self.rest:
            if not select.select([self.back], [], [], max(0.0, until - time.monotonic()))[0]:
                return {}
            more = os.read(self.back, 1 << 20)
            if not more:
                raise RuntimeError(f"a process ended with status {self.process.wait()}; what it said stands above")
            self.rest += more
        line, self.rest = self.rest.split(b"\n", 1)
        return json.loads(line)


def serve(side: str) -> None:
    """What the process of a side does."""
    warnings.filterwarnings("ignore", message=".*fork.*")  # nothing runs here but this thread
    started = time.perf_counter()
    if side in OURS:
        from stvdm.commands import parts
        from stvdm.interop import wan, wan_autoencoder  # noqa: F401

        parts.keep_compiled_programs()
    else:
        import torch  # noqa: F401
        from diffusers import AutoencoderKLWan, WanTransformer3DModel  # noqa: F401
    with os.fdopen(os.dup(1), "w", buffering=1) as back:
        os.dup2(2, 1)  # whatever else is printed
        print(json.dumps({"import_s": time.perf_counter() - started}), file=back)
        while line := sys.stdin.readline():
            told = json.loads(line)
            child = os.fork()
            if child == 0:
                print(json.dumps({"pid": os.getpid()}), file=back)
                take_turns(side, Case(*told["case"]), Path(told["place"]), back)
                os._exit(0)
            print(json.dumps({"status": os.waitpid(child, 0)[1]}), file=back)


def take_turns(side: str, case: Case, place: Path, back: TextIO) -> None:
    """What the process of a case does."""
    try:
        once = prepared(side, case, place)
        once()  # compiles
        _forget_peak()
    except Exception as error:
        traceback.print_exc()
        said = str(error).strip().splitlines() or [""]
        print(json.dumps({"failed": f"{type(error).__name__}: {said[0][:100]}"}), file=back)
        return
    print(json.dumps({"ready": True}), file=back)
    while json.loads(sys.stdin.readline()) == "turn":
        cpu, wall = time.process_time(), time.perf_counter()
        output = once()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall_s": wall, "cpu_s": cpu}), file=back)
    peak = _peak()
    flat = np.asarray(output(), np.float64).ravel()
    some = flat[np.unique(np.linspace(0, flat.size - 1, 4096).astype(int))]
    print(json.dumps({"peak_bytes": peak, "output": some.tolist()}), file=back)


def _forget_peak() -> None:
    """What compiling took is given back, and no part of the peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # see proc(5)


def _peak() -> int:
    """The most memory, in bytes, that lay in RAM since `_forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


# ---- what is run ----------------------------------------------------------------------------------------------------

Once = Callable[[], Callable[[], np.ndarray]]  # does the work; what it returns gives the output, channels last


def prepared(side: str, case: Case, place: Path) -> Once:
    """The work of a case, as a side does it."""
    if case.network == "transformer":
        return (_our_transformer if side in OURS else _their_transformer)(side, case, place)
    return (_our_autoencoder if side in OURS else _their_autoencoder)(side, case, place)


def _our_transformer(side: str, case: Case, place: Path) -> Once:
    import jax
    import jax.numpy as jnp

    from stvdm.interop import wan

    dit, params = wan.load(place, dtype=case.dtype)
    dit, params = dit.copy(dtype=case.dtype), jax.device_put(params)
    given = jax.device_put(transformer_inputs(case.size))

    def velocity(params: Any, latent: jax.Array, text: jax.Array) -> jax.Array:
        return dit.apply({"params": params}, latent, jnp.full((1, 1), 0.5), None, text)

    if case.work == "forward":
        forward = jax.jit(velocity)
        return lambda: functools.partial(np.asarray, jax.block_until_ready(forward(params, *given)))
    gradient = jax.jit(jax.grad(lambda params, *given: jnp.square(velocity(params, *given)).mean()))

    def once() -> Callable[[], np.ndarray]:
        gradients = jax.block_until_ready(gradient(params, *given))
        return lambda: np.asarray(gradients["patch"]["linear"]["bias"], np.float32)

    return once


def _their_transformer(side: str, case: Case, place: Path) -> Once:
    import torch
    from diffusers import WanTransformer3DModel

    torch.set_num_threads(THREADS)
    kind = getattr(torch, case.dtype)
    model = WanTransformer3DModel.from_pretrained(place, torch_dtype=kind)
    latent, text = (torch.from_numpy(array).to(kind) for array in transformer_inputs(case.size))
    latent, time_B = latent.permute(0, 4, 1, 2, 3).contiguous(), torch.tensor([500.0])
    called = torch.compile(model) if side == "compiled" else model

    def velocity() -> Any:
        return called(hidden_states=latent, timestep=time_B, encoder_hidden_states=text, return_dict=False)[0]

    def forward() -> Callable[[], np.ndarray]:
        with torch.no_grad():
            made = velocity()
        return lambda: made.float().permute(0, 2, 3, 4, 1).numpy()

    def gradient() -> Callable[[], np.ndarray]:
        model.zero_grad(set_to_none=True)
        velocity().float().square().mean().backward()
        return lambda: model.patch_embedding.bias.grad.float().numpy()

    return forward if case.work == "forward" else gradient


def _our_autoencoder(side: str, case: Case, place: Path) -> Once:
    import jax
    import jax.numpy as jnp

    from stvdm.interop import wan_autoencoder
    from stvdm.models import autoencoder3d

    model, params, _ = wan_autoencoder.load(place)
    model = model.copy(dtype=case.dtype)
    params = jax.device_put(jax.tree.map(lambda leaf: leaf.astype(case.dtype), params))
    video, latent = (jnp.asarray(array) for array in autoencoder_inputs(case.size))
    given = video if case.work == "encode" else latent

    def shown(made: Any) -> np.ndarray:
        return np.clip(made, -1, 1) if case.work == "decode" else np.asarray(made)  # diffusers clips as well

    if side == "whole":
        whole = jax.jit(lambda params, x: model.apply({"params": params}, x, method=case.work))

        def once() -> Callable[[], np.ndarray]:
            made = jax.block_until_ready(whole(params, given))
            return lambda: shown(made[0] if case.work == "encode" else made)

        return once

    def streamed() -> Callable[[], np.ndarray]:
        if case.work == "encode":
            chunks = [mean for mean, _ in autoencoder3d.stream_encode(model, params, given)]
        else:
            chunks = list(autoencoder3d.stream_decode(model, params, given))
        jax.block_until_ready(chunks)
        return lambda: shown(np.concatenate(chunks, axis=1))

    return streamed


def _their_autoencoder(side: str, case: Case, place: Path) -> Once:
    import torch
    from diffusers import AutoencoderKLWan

    torch.set_num_threads(THREADS)
    kind = getattr(torch, case.dtype)
    model = AutoencoderKLWan.from_pretrained(place, torch_dtype=kind)
    video, latent = (
        torch.from_numpy(array).to(kind).permute(0, 4, 1, 2, 3).contiguous() for array in autoencoder_inputs(case.size)
    )
    if side == "compiled":
        model.encoder, model.decoder = torch.compile(model.encoder), torch.compile(model.decoder)

    def once() -> Callable[[], np.ndarray]:
        with torch.no_grad():
            made = model.encode(video).latent_dist.mode() if case.work == "encode" else model.decode(latent).sample
        return lambda: made.float().permute(0, 2, 3, 4, 1).numpy()

    return once


# ---- weights and inputs ---------------------------------------------------------------------------------------------


def write(network: str, size: str, place: Path) -> None:
    """A folder as diffusers keeps it, with config.json and random weights of the scale of trained ones."""
    import flax.linen as nn
    from flax import traverse_util

    from stvdm.interop import wan, wan_autoencoder
    from stvdm.models.autoencoder3d import Autoencoder
    from stvdm.models.dit import DiT

    def drawn(path: str, shape: tuple[int, ...]) -> np.ndarray:
        random = np.random.default_rng(zlib.crc32(path.encode()))
        values = random.standard_normal(shape, np.float32)
        if path.endswith("kernel"):
            return values / np.float32(np.sqrt(np.prod(shape[:-1])))
        return 1 + values / 10 if path.endswith(("scale", "gamma")) else values / 10

    if network == "transformer":
        dit = DiT(latent_channels=16, text_width=4096, **TRANSFORMERS[size][0])
        shapes = traverse_util.flatten_dict(nn.unbox(wan.shapes_of(dit)), sep="/")

        def part(path: str, layer: int | None) -> np.ndarray:
            shape = shapes[path].shape
            return drawn(path, shape) if layer is None else drawn(f"{layer} {path}", shape[1:])

        wan.save(place, dit, part, "diffusers")
        return
    from safetensors.numpy import save_file

    model = Autoencoder(**AUTOENCODERS[size][0])
    flat = traverse_util.flatten_dict(wan_autoencoder.shapes(model), sep="/")
    params = traverse_util.unflatten_dict({path: drawn(path, leaf.shape) for path, leaf in flat.items()}, sep="/")
    place.mkdir(parents=True)
    save_file(
        wan_autoencoder.exported(model, params, "diffusers"),
        place / "diffusion_pytorch_model.safetensors",
        {"format": "pt"},
    )
    config = wan_autoencoder.config_of(model, wan_autoencoder.statistics_of({}, model.latent_channels))
    (place / "config.json").write_text(json.dumps(config))


def transformer_inputs(size: str) -> tuple[np.ndarray, np.ndarray]:
    """latent_Bthwz and text_BSE."""
    random = np.random.default_rng(0)
    latent = random.standard_normal((1, *TRANSFORMERS[size][1], 16), np.float32)
    return latent, random.standard_normal((1, 512, 4096), np.float32)


def autoencoder_inputs(size: str) -> tuple[np.ndarray, np.ndarray]:
    """video_BTHWC and latent_Bthwz."""
    random = np.random.default_rng(0)
    T, H, W = AUTOENCODERS[size][1]
    video = random.uniform(-1, 1, (1, T, H, W, 3)).astype(np.float32)
    return video, random.standard_normal((1, 1 + (T - 1) // 4, H // 8, W // 8, 16), np.float32)


if __name__ == "__main__":
    main()
