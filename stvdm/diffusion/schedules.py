# SPDX-License-Identifier: Apache-2.0
"""The times at which a sampler stops between noise and data: float32 (num_steps + 1,), falling strictly to 0.

More of them should lie near noise the more tokens a clip has.

    times = uniform(50)
    times = shifted(50, shift=shift_for_tokens(32_760, base_tokens=4_096, base_shift=3.0))
    times = shifted(50, shift=3.0, start=0.6)        # video-to-video: the clock starts at a half-noised clip
    times, told = stops(50, shift=5.0, spacing="unipc")                       # as Wan is sampled by diffusers
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def uniform(num_steps: int, *, start: float = 1.0) -> Array:
    """Equal steps from `start` to 0."""
    return shifted(num_steps, shift=1.0, start=start)


def shifted(num_steps: int, *, shift: float, start: float = 1.0) -> Array:
    """Steps from `start` to 0, equal before `flow.shift_time`: with shift > 1 short near noise and long near data.

    Esser et al. 2024 (2403.03206), eq. 23. Wan 2.1 samples with shift 5, HunyuanVideo with 7. For start < 1 these are
    the times of the same curve below `start`.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: expected at least 1.")
    if not 0.0 < start <= 1.0:
        raise ValueError(f"start={start}: expected a time in (0, 1]; 1 starts from pure noise.")
    if shift <= 0:
        raise ValueError(f"shift={shift}: expected a positive number; 1 gives equal steps.")
    times = _shift(np.linspace(start / (shift - (shift - 1.0) * start), 0.0, num_steps + 1), shift)
    times[0] = start
    return jnp.asarray(times, jnp.float32)


class Stops(NamedTuple):
    """Where a sampler stops, and what the network is told there; both float32 (num_steps + 1,)."""

    times: Array
    told: Array


SPACINGS = ("even", "unipc", "euler")


def stops(num_steps: int, *, shift: float, spacing: str = "even") -> Stops:
    """`shifted`, or the list by which a scheduler of diffusers samples published models.

    | spacing | before the shift                          | what the network is told                             |
    |---------|-------------------------------------------|------------------------------------------------------|
    | even    | n + 1 equally spaced, 1 to 0              | the time                                             |
    | unipc   | n + 1 equally spaced, 1 to 1/1000, of     | the thousandths that are full, 999 of them at first: |
    |         | which the last is 0 instead; after the    | those schedulers count times as whole numbers        |
    |         | shift the first is a millionth less       |                                                      |
    | euler   | n equally spaced, 1 to the shifted        | the time                                             |
    |         | 1/1000, then 0                            |                                                      |

    unipc is UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=shift), as Wan's folders have it; euler is
    FlowMatchEulerDiscreteScheduler(shift=shift). The spacing says nothing of the sampler, and each goes with any.

    Raises:
      ValueError: for another spacing, fewer than 1 step, or a shift that is not positive.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing={spacing!r}: expected one of {', '.join(SPACINGS)}.")
    times = shifted(num_steps, shift=shift)
    if spacing == "even":
        return Stops(times, times)
    if spacing == "euler":
        last = float(_shift(np.asarray(1e-3), shift))
        times = jnp.asarray([*_shift(np.linspace(1.0, last, num_steps), shift), 0.0], jnp.float32)
        return Stops(times, times)
    exact = _shift(np.linspace(1.0, 1e-3, num_steps + 1)[:-1], shift)
    exact[0] -= 1e-6  # at 1 itself log-SNR is infinite
    told = np.trunc(1000 * exact) / 1000  # in float64, as there: 500 may be 499.99...
    return Stops(jnp.asarray([*exact, 0.0], jnp.float32), jnp.asarray([*told, 0.0], jnp.float32))


def shift_for_tokens(num_tokens: int, *, base_tokens: int, base_shift: float = 1.0) -> float:
    """base_shift * sqrt(num_tokens / base_tokens): the shift for `num_tokens`, given a good one for `base_tokens`.

    More tokens show the same content in more samples, whose mean sees through more noise: the uncertainty falls with
    the square root of their number, and this shift keeps it equal at equal t. Esser et al. 2024 (2403.03206), 5.3.2.
    """
    if min(num_tokens, base_tokens) < 1 or base_shift <= 0:
        got = f"num_tokens={num_tokens}, base_tokens={base_tokens}, base_shift={base_shift}"
        raise ValueError(f"{got}: expected positive numbers.")
    return base_shift * math.sqrt(num_tokens / base_tokens)


def _shift(clock: np.ndarray, shift: float) -> np.ndarray:
    """`flow.shift_time` in NumPy's float64, in which both ends come out exact."""
    return np.asarray(shift * clock / (1.0 + (shift - 1.0) * clock))
