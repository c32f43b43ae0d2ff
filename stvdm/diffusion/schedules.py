# SPDX-License-Identifier: Apache-2.0
"""The times at which a sampler stops between noise and data: float32 (num_steps + 1,), falling strictly to 0.

More of them should lie near noise the more tokens a clip has.

    times = uniform(50)
    times = shifted(50, shift=shift_for_tokens(32_760, base_tokens=4_096, base_shift=3.0))
    times = shifted(50, shift=3.0, start=0.6)        # video-to-video: the clock starts at a half-noised clip
"""

import math

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
    # In NumPy's float64, rather than by flow.shift_time, so that the two ends come out exact.
    clock = np.linspace(start / (shift - (shift - 1.0) * start), 0.0, num_steps + 1)
    times = shift * clock / (1.0 + (shift - 1.0) * clock)
    times[0] = start
    return jnp.asarray(times, jnp.float32)


def shift_for_tokens(num_tokens: int, *, base_tokens: int, base_shift: float = 1.0) -> float:
    """base_shift * sqrt(num_tokens / base_tokens): the shift for `num_tokens`, given a good one for `base_tokens`.

    More tokens show the same content in more samples, whose mean sees through more noise: the uncertainty falls with
    the square root of their number, and this shift keeps it equal at equal t. Esser et al. 2024 (2403.03206), 5.3.2.
    """
    if min(num_tokens, base_tokens) < 1 or base_shift <= 0:
        got = f"num_tokens={num_tokens}, base_tokens={base_tokens}, base_shift={base_shift}"
        raise ValueError(f"{got}: expected positive numbers.")
    return base_shift * math.sqrt(num_tokens / base_tokens)
