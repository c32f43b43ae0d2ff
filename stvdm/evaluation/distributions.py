# SPDX-License-Identifier: Apache-2.0
"""How far two sets of clips lie apart, judged by features of them: one number for two sets.

    real_ND, made_MD = features(real), features(made)         # of any network; one row for each clip
    frechet_distance(real_ND, made_MD)                        # over I3D features: Frechet video distance, FVD
    kernel_distance(real_ND, made_MD)                         # over I3D features: kernel video distance, KVD
    precision_recall(real_ND, made_MD)

NumPy in float64: sets are small, and differences of large sums are not.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


def frechet_distance(real_ND: np.ndarray, made_MD: np.ndarray) -> float:
    """Squared Wasserstein-2 distance of the Gaussians with the means and covariances of two sets; at least 0.

        |m_r - m_g|² + tr(C_r + C_g - 2 (C_r C_g)^½)

    Dowson & Landau 1982; over Inception features FID (Heusel et al. 2017, arXiv:1706.08500), over I3D's FVD
    (Unterthiner et al. 2018, arXiv:1812.01717). Covariances divide by n - 1. Units: features squared.

    Cannot see: anything beyond means and covariances. Biased upwards, the more the fewer the clips (Chong & Forsyth
    2020, arXiv:1911.07023): compare only sets of equal size. Over I3D it hardly hears time: flicker and wrong motion
    cost less than a little blur (Ge et al. 2024, arXiv:2404.12391).

    Raises:
      ValueError: for sets that are not matrices of equally many features, or have fewer than 2 rows.
    """
    real, made = _checked(real_ND, made_MD, least=2)
    (mean_r, cov_r), (mean_g, cov_g) = (
        (x.mean(0), np.cov(x, rowvar=False, ddof=1).reshape(x.shape[1], -1)) for x in (real, made)
    )
    root_r = _root(cov_r)
    # tr (C_r C_g)^½ = tr (C_r^½ C_g C_r^½)^½, of a symmetric matrix.
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root_r @ cov_g @ root_r), 0, None)).sum()
    return float(max(0.0, np.square(mean_r - mean_g).sum() + np.trace(cov_r) + np.trace(cov_g) - 2 * cross))


def kernel_distance(real_ND: np.ndarray, made_MD: np.ndarray) -> float:
    """Squared maximum mean discrepancy with the kernel (x·y / D + 1)³, the unbiased estimate; may be below 0.

    KID (Binkowski et al. 2018, arXiv:1801.01401, equation 4); over I3D features KVD. Its expectation does not depend
    on the number of clips, its spread does.

    Cannot see: differences beyond the third moments. What the features do not tell apart.

    Raises:
      ValueError: as `frechet_distance`.
    """
    real, made = _checked(real_ND, made_MD, least=2)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def among(x: np.ndarray) -> float:
        values, n = kernel(x, x), len(x)
        return (values.sum() - np.trace(values)) / (n * (n - 1))

    return float(among(real) + among(made) - 2 * kernel(real, made).mean())


class PrecisionRecall(NamedTuple):
    """precision: the share of generated clips that lie among real ones. recall: that of real ones among generated."""

    precision: float
    recall: float


def precision_recall(real_ND: np.ndarray, made_MD: np.ndarray, *, neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991, equations 1 and 2).

    A clip lies among a set if it is no farther from one of its clips than that one's ``neighbours``-th nearest is.
    Low precision: bad clips. Low recall: little variety.

    Cannot see: how often each kind of clip is made. One real outlier has a wide reach.

    Raises:
      ValueError: as `frechet_distance`, and for sets of at most ``neighbours`` rows.
    """
    real, made = _checked(real_ND, made_MD, least=neighbours + 1)

    def covered(points: np.ndarray, by: np.ndarray) -> float:
        reach = np.sort(_distances(by, by), axis=1)[:, neighbours]  # the nearest is itself
        return float((_distances(points, by) <= reach * (1 + 1e-12)).any(axis=1).mean())

    return PrecisionRecall(precision=covered(made, real), recall=covered(real, made))


def _checked(real_ND: np.ndarray, made_MD: np.ndarray, *, least: int) -> tuple[np.ndarray, np.ndarray]:
    real, made = np.asarray(real_ND, np.float64), np.asarray(made_MD, np.float64)
    if real.ndim != 2 or made.ndim != 2 or real.shape[1] != made.shape[1]:
        raise ValueError(
            f"features of shapes {real.shape} and {made.shape}: expected (clips, features), with equally many "
            "features, so take both from one network."
        )
    if min(len(real), len(made)) < least:
        raise ValueError(f"{len(real)} and {len(made)} clips: expected at least {least} of each, so make more.")
    if not (np.isfinite(real).all() and np.isfinite(made).all()):
        raise ValueError("features that are not finite: look at the clips they come from.")
    return real, made


def _root(symmetric: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(symmetric)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """From each row of x to each of y; a row at a time, since all differences at once would not fit."""
    return np.stack([np.sqrt(np.square(y - row).sum(-1)) for row in x])
