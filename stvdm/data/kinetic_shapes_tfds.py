# SPDX-License-Identifier: Apache-2.0
"""Kinetic shapes on disk: a TFDS builder that writes ArrayRecord and needs no TensorFlow.

A record holds the clip (its change from frame to frame, zlib-compressed: a tenth of the raw bytes), the caption, the
index, and the scene as JSON, which is the whole ground truth. One directory per set of options, so that different
worlds never mix; writing again what is there costs nothing, and a run that was cut short is made anew.

    config = KineticShapesConfig(num_clips={"train": 1000, "validation": 100})
    directory = write("data", config)                    # data/kinetic_shapes/<name>-<digest>/1.0.0
    example = decode(read(directory, split="train")[0])  # {"video", "caption", "index", "scene"}
"""

import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from stvdm.data.kinetic_shapes import Scene, World, render, sample_scene


@dataclasses.dataclass(eq=False, kw_only=True, repr=False)
class KineticShapesConfig(tfds.core.BuilderConfig):
    """What to write: the world, the size and rate of its clips, and how many a split."""

    name: str = "default"
    world: World = dataclasses.field(default_factory=World)
    num_frames: int = 17
    height: int = 64
    width: int = 64
    fps: float = 8.0
    seed: int = 0
    num_clips: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"train": 20_000, "validation": 1_000, "test": 1_000}
    )

    def __post_init__(self) -> None:
        options = {key: getattr(self, key) for key in ("num_frames", "height", "width", "fps", "seed")}
        options |= {"num_clips": dict(self.num_clips), "world": dataclasses.asdict(self.world)}
        unknown = set(self.num_clips) - {"train", "validation", "test"}
        if unknown or not self.num_clips or min(self.num_clips.values()) < 1:
            raise ValueError(
                f"num_clips={dict(self.num_clips)}: expected at least one clip for some of train, validation, test."
            )
        if self.seed < 0 or not 0 < self.fps < math.inf:
            raise ValueError(f"seed={self.seed}, fps={self.fps}: expected a seed of at least 0, and fps above 0.")
        digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]
        self.name = f"{self.name}-{digest}"
        self.description = json.dumps(options)

    def __repr__(self) -> str:
        return f"KineticShapesConfig({self.name})"  # TFDS logs it; all of it is a page long


class KineticShapes(tfds.core.GeneratorBasedBuilder):
    """Captioned clips of moving shapes, with their ground truth."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # nothing is downloaded, so no checksums lie beside the code (and TFDS needs no further package)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {  # Text stores any bytes; Video would need TensorFlow
            "video": tfds.features.Text(),
            "shape": tfds.features.Tensor(shape=(4,), dtype=np.int64),
            "caption": tfds.features.Text(),
            "index": tfds.features.Scalar(np.int64),
            "scene": tfds.features.Text(),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, download_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: self._generate_examples(split, num) for split, num in self.builder_config.num_clips.items()}

    def _generate_examples(self, split: str, num_clips: int) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        for index in range(num_clips):
            scene = sample_scene(config.seed, index, split=split, world=config.world)  # type: ignore[arg-type]
            yield index, encode(render(scene, config.num_frames, config.height, config.width, config.fps), scene, index)


def write(directory: str | Path, config: KineticShapesConfig | None = None) -> Path:
    """Write the clips below `directory` unless they are there already; returns where they lie."""
    builder = KineticShapes(data_dir=str(directory), config=config or KineticShapesConfig(), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def read(directory: str | Path, *, split: str = "train") -> Any:
    """A split of what `write` returned: its records by random access, each for `decode`. It can be sent to workers."""
    if not (Path(directory) / "dataset_info.json").exists():
        raise ValueError(
            f"directory={str(directory)!r}: expected what write() returned, with a dataset_info.json in it; or none "
            "(--config.data.path=), and clips are rendered as they are read."
        )
    return tfds.builder_from_directory(str(directory)).as_data_source(split=split)


def encode(video_THWC: np.ndarray, scene: Scene, index: int) -> dict[str, Any]:
    """The record of a clip: still pixels become zeros, which compress well and fast."""
    change = np.diff(video_THWC, axis=0, prepend=np.zeros_like(video_THWC[:1]))  # modulo 256
    return {
        "video": zlib.compress(change.tobytes(), level=1),
        "shape": np.asarray(video_THWC.shape, np.int64),
        "caption": scene.caption,
        "index": index,
        "scene": scene.to_json(),
    }


def decode(record: Mapping[str, Any]) -> dict[str, Any]:
    """A stored record as {"video": uint8 (T, H, W, 3), "caption": str, "index": int, "scene": Scene}."""
    change = np.frombuffer(zlib.decompress(record["video"]), np.uint8).reshape(record["shape"])
    return {
        "video": np.cumsum(change, axis=0, dtype=np.uint8),
        "caption": bytes(record["caption"]).decode(),
        "index": int(record["index"]),
        "scene": Scene.from_json(bytes(record["scene"]).decode()),
    }
