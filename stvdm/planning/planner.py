# SPDX-License-Identifier: Apache-2.0
"""Plans of one config and of its edits, made or from the cache: what `stvdm plan` asks.

planner = Planner(config, topology="v5p:4x4x4")
print(report.as_text(planner.compiled()))
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from stvdm import config as base
from stvdm import shapes
from stvdm.planning import cache, chips
from stvdm.planning import search as search_lib
from stvdm.tensor_files import told_in


class Planner:
    """Asks for plans.

    Args:
      config: of a training.
      autoencoder: a config file, a run or an exported model of its autoencoder; None: the config's own.
      topology: the slice to compile for, e.g. "v5p:4x4x4"; None: the config's.
      num_slices: equal slices; None: the config's.

    Raises:
      FileNotFoundError: no such autoencoder.
    """

    def __init__(
        self,
        config: ConfigDict,
        *,
        autoencoder: str | None = None,
        topology: str | None = None,
        num_slices: int | None = None,
    ) -> None:
        self.topology, self.num_slices = topology or config.topology, num_slices or config.num_slices
        self._autoencoder = _autoencoder_settings(config, autoencoder)
        self.config = _largest_first(config, base.compression(self._autoencoder))

    def outline(self, config: ConfigDict | None = None) -> dict[str, Any]:
        """The plan of the config, or of this edit of it, from shapes alone: JSON, which `report.as_text` reads."""
        return self._ask(config or self.config, None, 1, quick=False)

    def compiled(self, config: ConfigDict | None = None, *, quick: bool = False) -> dict[str, Any]:
        """The plan of the config, or of this edit of it, compiled for the slice; see `plan.compiled`.

        Raises:
          ValueError: no slice is named, or the config cannot run on it.
        """
        return self._ask(config or self.config, self._slice(), self.num_slices, quick=quick)

    def search(self, *, tries: int, say: Callable[[str], None]) -> search_lib.Found:
        """Looks for the mesh, remat policy and micro-batches of the least time; see `search.search`.

        Programs are compiled quickly: what is found is to be compiled once more, in earnest.

        Raises:
          ValueError: for a network that is no transformer, and as `search.search`.
        """
        if self.config.kind == "dit" and self.config.model.network != "dit":
            raise ValueError(
                f"model.network={self.config.model.network!r}: expected a transformer, 'dit', or an autoencoder; the "
                "search knows no other split, so plan the mesh at hand, with --compile, e.g. --config.mesh.fsdp=8"
            )
        where = self._slice()
        chips.topology(
            where, num_slices=self.num_slices
        )  # raises here, not for every mesh, if it cannot be compiled for

        chip = chips.chip_of(where)
        matmul = self.config.model.matmul if self.config.kind == "dit" else ""

        def arithmetic(remat: str) -> float:
            edited = self.config.copy_and_resolve_references()
            edited.model.remat = remat
            return chips.arithmetic_seconds(self.outline(edited)["block_flops"], chips.CHIPS[chip], matmul)

        return search_lib.search(
            self.config,
            self.outline(),
            chip=chip,
            num_devices=chips.num_devices(where, num_slices=self.num_slices),
            num_slices=self.num_slices,
            ask=lambda edited: self.compiled(edited, quick=True)["compiled"],
            arithmetic=arithmetic,
            tries=tries,
            say=say,
        )

    def _slice(self) -> str:
        if not self.topology:
            raise ValueError(
                "the config's topology is '': expected a slice to compile for, so add one, e.g. --topology=v5p:4x4x4"
            )
        return self.topology

    def _ask(self, config: ConfigDict, topology: str | None, num_slices: int, *, quick: bool) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            from stvdm.planning import plan  # the trainers and their libraries: seconds, which a kept answer has not

            return plan.make(config, self._autoencoder, topology=topology, num_slices=num_slices, quick=quick)

        where = (topology, num_slices, quick)
        question = {"config": config.to_dict(), "autoencoder": self._autoencoder, "where": where}
        return cache.answer(question, make)


def _largest_first(config: ConfigDict, compression: Mapping[str, Any]) -> ConfigDict:
    """The config with its buckets by falling size, the first is compiled: for a transformer that of the latents."""

    def size(bucket: tuple[Any, ...]) -> int:
        frames, height, width, batch, _ = bucket
        clip = (frames, height, width)
        with contextlib.suppress(ValueError):  # what does not divide is told by whoever makes the plan
            clip = shapes.latent_shape(clip, **compression) if config.kind == "dit" else clip
        return batch * math.prod(clip)

    config = config.copy_and_resolve_references()
    config.data.buckets = tuple(sorted(config.data.buckets, key=size, reverse=True))
    return config


def _autoencoder_settings(config: ConfigDict, named: str | None) -> dict[str, Any]:
    """The settings of a run's autoencoder: its own, or those of a config file, a run or an exported model."""
    if config.kind == "autoencoder":
        return config.model.to_dict()
    named = named or config.autoencoder
    if named.partition(":")[0].endswith(".py"):
        return base.load(named).model.to_dict()
    folder = epath.Path(named).expanduser()
    described = [path for path in (folder / "model" / "model.json", folder / "model.json") if path.exists()]
    if not described:
        raise FileNotFoundError(
            f"autoencoder={named!r}: expected a run or a model there, or a config file; name one with --autoencoder, "
            "e.g. --autoencoder=configs/autoencoder_kinetic.py"
        )
    return told_in(described[0])["autoencoder"]
