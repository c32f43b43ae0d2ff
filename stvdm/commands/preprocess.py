# SPDX-License-Identifier: Apache-2.0
"""`stvdm preprocess`: the latents of a data set, computed once."""

import argparse
import functools
import re
import signal
import sys
import time
from typing import Any, NoReturn

from stvdm.commands import parts

AUTO = "auto"
CONCERNED = ("seed", "data", "text.tower", "text.max_tokens", "image.tower", "model.extra", "model.image")
WAIT_SECONDS = 10.0  # between looks at whether the other hosts have made their shards


def add(commands: Any) -> None:
    command = parts.command_of(
        commands,
        "preprocess",
        run,
        "compute the latents of a data set once, and what towers make of its captions and first frames",
        "stvdm preprocess --config=configs/autoencoder_kinetic.py --checkpoint=runs/autoencoder --out=runs/latents",
        "Then train on them with --config.data.source=latents --config.data.path=DIR. With the config of a DiT whose "
        "text.tower names a published tower, its text is stored beside the latents, and with that of a network that "
        "begins with an image, what such a network is given of first frames. On the workers of a TPU slice, "
        "launch/README.md shows how.",
    )
    parts.add_config(command)
    command.add_argument(
        "--host",
        type=_host,
        default=(0, 1),
        metavar="I/N|auto",
        help="this is host I, from 0, of N that write to one folder, each its share of the shards; auto: I and N are "
        "those of the processes that `stvdm supervise` starts, on one machine or on every worker of a TPU slice",
    )
    command.add_argument("--checkpoint", metavar="DIR", help="the trained autoencoder (default: the config's)")
    command.add_argument("--out", required=True, metavar="DIR", help="folder of the latents")
    command.add_argument(
        "--split",
        choices=("train", "validation"),
        default="train",
        help="validation: the held-out clips of kinetic shapes, or those of data.validation_path (default: train)",
    )
    command.add_argument(
        "--batch",
        type=parts.count,
        default=16,
        metavar="B",
        help="clips encoded at once, a multiple of the devices of this host or rounded up to one (default 16)",
    )


def run(args: argparse.Namespace) -> None:
    from stvdm import config as config_lib

    config = config_lib.load(args.config, args.overrides)
    folder = args.checkpoint or (config.autoencoder if config.kind == "dit" else "")
    if not folder:
        raise ValueError(
            "--checkpoint='': expected the folder of a trained autoencoder, so name the one to encode with"
        )
    config_lib.validate(config, concerned=CONCERNED)
    from stvdm.train import supervisor

    if args.host == AUTO:
        supervisor.join()
        signal.signal(signal.SIGTERM, _leave)  # nothing is to be saved: what is lost is the shard in the making
    supervisor.beat()
    parts.keep_compiled_programs()
    import jax

    from stvdm import checkpoint, preprocess, sharding
    from stvdm.data import loader
    from stvdm.interop import towers
    from stvdm.sampling import first_frame, pipeline

    params, description = checkpoint.load_model(pipeline.model_folder(folder))
    autoencoder = pipeline.autoencoder_of(description["autoencoder"])
    made_by: dict[str, Any] = {"autoencoder": description["sha256"]}
    tower = pipeline.reader_of(config.to_dict()) if config.kind == "dit" else None
    if tower is not None:
        made_by["text"] = towers.identity(config.text.tower, max_tokens=config.text.max_tokens)
    takes = first_frame.parts_of(config.model) if config.kind == "dit" else {}
    if "image_latent" in takes:
        made_by["image_latent"] = True  # part of what tells this folder from another
    looker = pipeline.looker_of(config.to_dict()) if "image_tokens" in takes else None
    if looker is not None:
        made_by["image"] = towers.identity(config.image.tower)

    @functools.partial(jax.jit, static_argnames="begin")
    def encode(params: Any, video_BTHWC: Any, *, begin: bool) -> Any:
        video = pipeline.to_model_range(video_BTHWC)
        if begin:
            video = first_frame.followed_by_grey(video, video.shape[1])
        return autoencoder.apply({"params": params}, video, method="encode")[0]

    # Clips are split over the devices of this host, and so are a tower's weights; hosts have nothing to say to another.
    devices = jax.local_devices()
    mesh = sharding.make_mesh(data=1, fsdp=len(devices), devices=devices)
    params = jax.device_put(params["autoencoder"], sharding.replicated(mesh))
    data, done = config.data, 0

    def encode_here(video_BTHWC: Any, *, begin: bool = False) -> Any:
        supervisor.beat(done)
        return encode(params, jax.device_put(video_BTHWC, sharding.batch_sharding(mesh)), begin=begin)

    with parts.progress() as show, jax.set_mesh(mesh):

        def on_progress(now: int, total: int) -> None:
            nonlocal done
            done = now
            show(f"encoding {done}/{total}", over=done == total)

        def wait() -> None:
            supervisor.beat(done)
            show(f"waiting for the shards of the other hosts, which are to write to this one's {args.out}")
            time.sleep(WAIT_SECONDS)

        show("looking at the clips")
        about = preprocess.preprocess(
            encode_here,
            loader.configured_source(data, seed=config.seed, split=args.split),
            args.out,
            buckets=data.buckets,
            seed=config.seed,
            read=None if tower is None else tower.on(mesh).__call__,
            begin=functools.partial(encode_here, begin=True) if "image_latent" in takes else None,
            look=None if looker is None else looker.on(mesh).__call__,
            host=(jax.process_index(), jax.process_count()) if args.host == AUTO else args.host,
            batch_size=-(-args.batch // len(devices)) * len(devices),
            about=made_by,
            on_progress=on_progress,
            wait=wait if args.host == AUTO else None,
        )
    if not about:
        print(f"this host's part is in {args.out}; others are still at theirs")
        return
    print(f"{about['count']:,} latents in {args.out}")
    for name, reason in {**about["about"]["source_report"]["skipped"], **about["skipped"]}.items():
        print(f"  not among them: {name}: {reason}")


def _leave(*_: Any) -> NoReturn:
    from stvdm.train import supervisor

    supervisor.leave_at_once(supervisor.RESUME)
    sys.exit(supervisor.RESUME)


def _host(text: str) -> tuple[int, int] | str:
    if text == AUTO:
        return AUTO
    numbers = re.fullmatch(r"(\d+)/(\d+)", text)
    host = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if host[0] >= host[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I from 0 to N - 1, e.g. 0/4, or auto")
    return host
