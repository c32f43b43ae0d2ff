# SPDX-License-Identifier: Apache-2.0
"""Flow matching: paths from data to noise, what a network may predict of them, and the loss.

    x_t = alpha(t) data + sigma(t) noise,      t in [0, 1],  t = 0 is data,  t = 1 is noise
    dx/dt = alpha'(t) data + sigma'(t) noise   the velocity; `noise - data` on the rectified path

Rectified path: Liu et al. 2022 (2209.03003), Lipman et al. 2022 (2210.02747). Cosine, variance-preserving path: Nichol
& Dhariwal 2021 (2102.09672), in the continuous form of Salimans & Ho 2022 (2202.00512): the published offset s = 0.008
is left out, since with it sigma'(0) is infinite. Every prediction is one linear mix of data and noise and x_t is
another, so two equations give back both, and a sampler always sees a velocity, whatever was trained.

    objective = Objective("epsilon", COSINE)
    losses_B, aux = flow_matching_loss(network, latent_Bthwz, noise, sample_times(key, (B,)), objective=objective)
    velocity = velocity_field(network, objective=objective)
"""

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Array = jax.Array
Velocity = Callable[[Array, Array], Array]  # (x, t) -> dx/dt, like x; a sampler passes a scalar t
Curve = Callable[[Array], Array]
Prediction = Literal["velocity", "epsilon", "x0", "v"]

# epsilon says nothing about the data at t = 1, and x0 nothing about the noise at t = 0: there they are 0 / 0. The
# divisor stops at this floor, so a network's error is magnified at most a hundredfold and a perfect prediction still
# gives the finite limit. (DDPM's linear schedule ends at alpha = 0.006 and magnifies by about as much.) Clamping t
# instead would take noise for data at t = 1.
DIVISOR_FLOOR = 0.01


@dataclasses.dataclass(frozen=True)
class Path:
    """How much data and how much noise there is in x_t, with the derivatives by t: elementwise functions of t."""

    name: str
    alpha: Curve
    sigma: Curve
    alpha_rate: Curve
    sigma_rate: Curve

    def log_snr(self, t: Array) -> Array:
        """log(alpha / sigma), the clock of exponential integrators: -inf at t = 1 and +inf at t = 0."""
        return jnp.log(self.alpha(t)) - jnp.log(self.sigma(t))


RECTIFIED = Path(
    name="rectified",
    alpha=lambda t: 1.0 - t,
    sigma=lambda t: t,
    alpha_rate=lambda t: -jnp.ones_like(t),
    sigma_rate=lambda t: jnp.ones_like(t),
)
COSINE = Path(  # alpha = cos(pi t / 2), as a sine that is exactly 0 at t = 1; float32 cos(pi / 2) is -4e-8
    name="cosine",
    alpha=lambda t: jnp.sin(math.pi / 2 * (1.0 - t)),
    sigma=lambda t: jnp.sin(math.pi / 2 * t),
    alpha_rate=lambda t: -math.pi / 2 * jnp.sin(math.pi / 2 * t),
    sigma_rate=lambda t: math.pi / 2 * jnp.sin(math.pi / 2 * (1.0 - t)),
)
PATHS = {path.name: path for path in (RECTIFIED, COSINE)}


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a network predicts, on which path.

    velocity: dx/dt. epsilon: the noise (DDPM; Ho et al. 2020). x0: the data. v: alpha noise - sigma data (Salimans & Ho
    2022), which on the cosine path is the velocity divided by pi / 2, and makes sense on every path.
    """

    prediction: Prediction = "velocity"
    path: Path = RECTIFIED

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction):
            raise ValueError(f"prediction={self.prediction!r}: expected one of {', '.join(get_args(Prediction))}.")
        if not isinstance(self.path, Path):
            raise ValueError(f"path={self.path!r}: expected a flow.Path, e.g. flow.PATHS['rectified'].")


class Estimate(NamedTuple):
    """What a prediction at x_t says, each of x's shape."""

    data: Array
    noise: Array
    velocity: Array


def expand(t: ArrayLike, x: Array) -> Array:
    """t with trailing axes of length 1, to broadcast against x. t is a scalar, (B,), (B, t), ... or (B, t, h, w, 1)."""
    t = jnp.asarray(t)
    expanded = t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
    if expanded.ndim != x.ndim or any(a not in (1, b) for a, b in zip(expanded.shape, x.shape, strict=True)):
        raise ValueError(f"t.shape={t.shape}: expected the leading axes of x.shape={x.shape} (or 1), so reshape t.")
    return expanded


def interpolate(data: Array, noise: Array, t: ArrayLike, *, path: Path = RECTIFIED) -> Array:
    """x_t = alpha(t) data + sigma(t) noise; exactly the data at t = 0. t is a scalar or the leading axes of data."""
    t = expand(t, data)
    return path.alpha(t) * data + path.sigma(t) * noise


def target(data: Array, noise: Array, t: ArrayLike, *, objective: Objective) -> Array:
    """What a perfect network answers at x_t, given the data and the noise that x_t was made of."""
    t = expand(t, data)
    path = objective.path
    if objective.prediction == "velocity":
        return path.alpha_rate(t) * data + path.sigma_rate(t) * noise
    if objective.prediction == "v":
        return path.alpha(t) * noise - path.sigma(t) * data
    return noise if objective.prediction == "epsilon" else data


def estimate(prediction: Array, x: Array, t: ArrayLike, *, objective: Objective) -> Estimate:
    """Data, noise and velocity that `prediction` at x_t amounts to: the inverse of `target`.

    Exact for all t where the objective is "velocity" or "v", whose two equations are never singular; for "epsilon"
    where alpha(t), and for "x0" where sigma(t), is at least DIVISOR_FLOOR.
    """
    t = expand(t, x)
    path = objective.path
    alpha, sigma, alpha_rate, sigma_rate = path.alpha(t), path.sigma(t), path.alpha_rate(t), path.sigma_rate(t)
    if objective.prediction == "velocity":
        determinant = alpha * sigma_rate - sigma * alpha_rate  # 1 on the rectified path, pi / 2 on the cosine path
        data = (sigma_rate * x - sigma * prediction) / determinant
        noise = (alpha * prediction - alpha_rate * x) / determinant
        return Estimate(data, noise, prediction)
    if objective.prediction == "v":
        determinant = alpha**2 + sigma**2  # at least 1 / 2 on the rectified path, 1 on the cosine path
        data, noise = (alpha * x - sigma * prediction) / determinant, (sigma * x + alpha * prediction) / determinant
    elif objective.prediction == "epsilon":
        data, noise = (x - sigma * prediction) / jnp.maximum(alpha, DIVISOR_FLOOR), prediction
    else:
        data, noise = prediction, (x - alpha * prediction) / jnp.maximum(sigma, DIVISOR_FLOOR)
    return Estimate(data, noise, alpha_rate * data + sigma_rate * noise)


def velocity_field(predict: Velocity, *, objective: Objective) -> Velocity:
    """The velocity that a network trained on `objective` amounts to; the network itself if it predicts the velocity."""
    if objective.prediction == "velocity":
        return predict
    return lambda x, t: estimate(predict(x, t), x, t, objective=objective).velocity


def flow_matching_loss(
    predict: Velocity,
    data: Array,
    noise: Array,
    time: Array,
    *,
    objective: Objective,
    mask: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Mean squared error of `predict(x_t, time)` for each example.

    Args:
      predict: the network, given x_t and `time` untouched.
      data: (B, ...); noise: standard normal, like data; time: (B,) or more leading axes of data.
      mask: true (broadcast against data) where the data is known: there x_t is the data itself, its time is 0, and the
        answer does not count. Whether the network is told so is `predict`'s affair.

    Returns:
      losses (B,) float32, 0 for an example that is known throughout; and, (B,) float32 each, "velocity_mse" (the same
      error as the sampler meets it, comparable between objectives) and "time" (the mean over what counts).
    """
    t = jnp.broadcast_to(expand(time, data), data.shape)
    counts = jnp.ones(data.shape, bool) if mask is None else jnp.broadcast_to(~jnp.asarray(mask, bool), data.shape)
    t = jnp.where(counts, t, 0.0)
    x = interpolate(data, noise, t, path=objective.path)
    prediction = predict(x, time).astype(jnp.float32)

    axes = tuple(range(1, data.ndim))
    num_counts = jnp.maximum(counts.sum(axes), 1)

    def mean(values: Array) -> Array:
        return jnp.sum(values.astype(jnp.float32), axes, where=counts) / num_counts

    velocity = target(data, noise, t, objective=Objective("velocity", objective.path))
    velocity_error = estimate(prediction, x, t, objective=objective).velocity - velocity
    losses = mean(jnp.square(prediction - target(data, noise, t, objective=objective)))
    return losses, jax.lax.stop_gradient({"velocity_mse": mean(jnp.square(velocity_error)), "time": mean(t)})


def sample_times(
    key: Array,
    shape: tuple[int, ...],
    *,
    density: Literal["uniform", "logit_normal"] = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
    stratified: bool = False,
    shift: float = 1.0,
    within: tuple[float, float] = (0.0, 1.0),
) -> Array:
    """Training times in [0, 1], float32.

    Args:
      density: "uniform", or "logit_normal": sigmoid(mean + std * normal), Esser et al. 2024 (2403.03206), section 3.1.
      mean, std: of the logit, where the density has one; mean > 0 leans towards noise.
      stratified: one draw in each of prod(shape) strata of equal probability, in random order: the same density for
        every element, far less variance in the mean of a batch.
      shift: see `shift_time`; applied last.
      within: of this density, shift and all, the part between two times alone.
    """
    count = math.prod(shape)
    key_uniform, key_order = jax.random.split(key)
    quantile = jax.random.uniform(key_uniform, (count,), jnp.float32)
    if stratified:
        quantile = (jax.random.permutation(key_order, count) + quantile) / count
    if within != (0.0, 1.0):
        low, high = (_share_below(t, density=density, mean=mean, std=std, shift=shift) for t in within)
        quantile = low + (high - low) * quantile
    if density == "logit_normal":
        quantile = jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(quantile))
    elif density != "uniform":
        raise ValueError(f"density={density!r}: expected uniform or logit_normal.")
    return jnp.clip(shift_time(quantile, shift), *within).reshape(shape)  # rounding may lead over the edge


def _share_below(t: float, *, density: str, mean: float, std: float, shift: float) -> float:
    """Of all times that `sample_times` draws."""
    if t in (0.0, 1.0):
        return t
    before = t / (shift + (1.0 - shift) * t)  # the shift undone
    if density == "uniform":
        return before
    return statistics.NormalDist(mean, std).cdf(math.log(before / (1.0 - before)))


def shift_time(t: ArrayLike, shift: float) -> Array:
    """s t / (1 + (s - 1) t): moves times towards noise where s > 1, and keeps 0 and 1. Its inverse has shift 1 / s.

    On the rectified path it multiplies sigma / alpha by s. Esser et al. 2024 (2403.03206), eq. 23.
    """
    if shift <= 0:
        raise ValueError(f"shift={shift}: expected a positive number; 1 leaves the times as they are.")
    t = jnp.asarray(t)
    return shift * t / (1.0 + (shift - 1.0) * t)
