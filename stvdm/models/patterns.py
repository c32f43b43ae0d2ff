# SPDX-License-Identifier: Apache-2.0
"""Which token of a clip may look at which.

Tokens lie on a grid (time, height, width) and are numbered in that order. A pattern says what a query sees:

    full          every token of the clip
    frame         the tokens of its own latent frame      (images side by side: the control without time)
    time          the tokens at its own place, at all times
    window        the tokens within reach along time, height and width
    block_causal  the tokens of its own and of earlier latent frames

Numbers beyond the last token are padding, which nobody sees.

    pattern = Pattern("window", grid=(21, 30, 52), window=(1, 4, 4))
    pattern.sees(query, key)                          # number by number, NumPy or JAX
    pattern.touches(0, 511, 1024, 1535)               # whether a block of queries sees anything in a block of keys
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from stvdm import shapes

PATTERNS = ("full", "frame", "time", "window", "block_causal")

Size3 = tuple[int, int, int]
Place = tuple[Any, Any, Any]  # frame, row and column of tokens


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A rule of looking, over the tokens of a grid.

    Args:
      kind: one of `PATTERNS`.
      grid: tokens along (time, height, width).
      window: of "window": how far a query sees along each, in tokens; (0, 0, 0) is itself alone.

    Raises:
      ValueError: for an unknown kind (with near matches), or a missing window.
    """

    kind: str
    grid: Size3
    window: Size3 | None = None

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if self.kind == "window" and (self.window is None or len(self.window) != 3 or min(self.window) < 0):
            raise ValueError(
                f"window={self.window}: pattern 'window' needs its reach along (time, height, width), "
                "three numbers of at least 0, e.g. (1, 4, 4)."
            )

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[1] * self.grid[2]

    @property
    def share(self) -> float:
        """Of all pairs of tokens, those that are seen."""
        return shapes.attention_pairs(self.grid, self.kind, window=self.window) / self.num_tokens**2

    def computed(self, block: int) -> float:
        """Of all pairs of tokens, those in blocks that `touches` keeps: what a kernel computes that skips the others.

        Args:
          block: tokens of a block, of queries as of keys, in the order of their numbers. What the last one is filled
            up with is not counted.
        """
        first = np.arange(0, self.num_tokens, block)
        sizes = np.minimum(block, self.num_tokens - first)
        q_first, k_first = first[:, None], first[None, :]
        touched = self.touches(q_first, q_first + block - 1, k_first, k_first + block - 1)
        return float((touched * sizes[:, None] * sizes[None, :]).sum()) / self.num_tokens**2

    def sees(self, query: Any, key: Any) -> Any:
        """True where the query of one number may look at the key of the other; the two broadcast."""
        return self.place_sees(self.place(query), self.place(key))

    def place(self, number: Any, divide: Callable[[Any, int], Any] = operator.floordiv) -> Place:
        """(frame, row, column) of a token."""
        frame = divide(number, self.tokens_per_frame)
        rest = number - frame * self.tokens_per_frame
        row = divide(rest, self.grid[2])
        return frame, row, rest - row * self.grid[2]

    def place_sees(self, query: Place, key: Place) -> Any:
        """`sees`, of places."""
        (q_frame, q_row, q_column), (k_frame, k_row, k_column) = query, key
        real = k_frame < self.grid[0]
        if self.kind == "full":
            return real & (q_frame == q_frame)  # of the shape of both
        if self.kind == "block_causal":
            return real & (k_frame <= q_frame)
        if self.kind == "frame":
            return real & (k_frame == q_frame)
        if self.kind == "time":
            return real & (k_row == q_row) & (k_column == q_column)
        assert self.window is not None
        return (
            real
            & (abs(q_frame - k_frame) <= self.window[0])
            & (abs(q_row - k_row) <= self.window[1])
            & (abs(q_column - k_column) <= self.window[2])
        )

    def touches(self, q_first: Any, q_last: Any, k_first: Any, k_last: Any) -> Any:
        """Whether any query of a run of numbers may see any key of another; True where that is not plain to tell."""
        real = k_first < self.num_tokens
        if self.kind in ("full", "time"):
            return real
        q_from, q_to = q_first // self.tokens_per_frame, q_last // self.tokens_per_frame
        k_from, k_to = k_first // self.tokens_per_frame, k_last // self.tokens_per_frame
        if self.kind == "block_causal":
            return real & (k_from <= q_to)
        if self.kind == "frame":
            return real & (k_from <= q_to) & (q_from <= k_to)
        assert self.window is not None
        (q_top, q_bottom), (k_top, k_bottom) = self._rows(q_first, q_last), self._rows(k_first, k_last)
        frames = (k_from - q_to <= self.window[0]) & (q_from - k_to <= self.window[0])
        return real & frames & (k_top - q_bottom <= self.window[1]) & (q_top - k_bottom <= self.window[1])

    def _rows(self, first: Any, last: Any) -> tuple[Any, Any]:
        """The first and last row that a run of numbers lies in: all rows where it goes from one frame to the next."""
        _, height, width = self.grid
        whole = first // self.tokens_per_frame != last // self.tokens_per_frame
        return (
            (first // width % height) * (1 - whole),
            (last // width % height) * (1 - whole) + (height - 1) * whole,
        )

    @property
    def falls_apart(self) -> bool:
        """Whether the tokens are groups that never meet: the frames, or the places."""
        return self.kind in ("frame", "time")

    def split(self, x_BN: Any) -> Any:
        """(B, N, ...) to (B groups, N / groups, ...): each group a clip of its own, in which all see all."""
        frames, _, _ = self.grid
        x = x_BN.reshape(-1, frames, self.tokens_per_frame, *x_BN.shape[2:])
        x = x.swapaxes(1, 2) if self.kind == "time" else x
        return x.reshape(-1, *x.shape[2:])

    def join(self, x: Any) -> Any:
        """The inverse of `split`."""
        rest = x.shape[2:]
        if self.kind == "time":
            x = x.reshape(-1, self.tokens_per_frame, self.grid[0], *rest).swapaxes(1, 2)
        return x.reshape(-1, self.num_tokens, *rest)


def check_kind(kind: str) -> None:
    """Raises a ValueError that names near matches if this is not one of `PATTERNS`."""
    if kind not in PATTERNS:
        near = difflib.get_close_matches(kind, PATTERNS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(PATTERNS)}."
        if kind == "factorised":
            hint = 'factorised attention is the cycle of layers attention=("frame", "time").'
        raise ValueError(f"attention pattern={kind!r}: {hint}")
