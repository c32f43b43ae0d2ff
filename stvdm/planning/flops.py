# SPDX-License-Identifier: Apache-2.0
"""FLOPs, counted in the traced program: every product of matrices and every convolution, loops multiplied out.

A multiplication and an addition are two. Each product counts for the module that it stands in, forward and backward.
The arguments may be shapes alone, so that the largest models are counted in seconds on a laptop.

What is counted is the program for one device of no platform: the products inside the kernels of TPUs and GPUs can't be
counted, what a CPU does more of to be quick would count, and what several devices do alike would count several times.
Of attention the pairs count that its pattern sees; a kernel that skips whole blocks computes more (``computed``).

    count_flops(step, state, batch)            # Counter({"MLP": 2.9e10, "projections of attention": 2.4e10, ...})
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from stvdm.sharding import MESH_AXES

_ONE_DEVICE = AbstractMesh(
    (1,) * len(MESH_AXES),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
    abstract_device=AbstractDevice(device_kind="any", num_cores=None, platform="any"),
)

_PARTS = (  # where in a program -> part; the first that fits
    (r"/(self_attention|cross_attention)(\.\w+)?/(query|key|value|out)\b", "projections of attention"),
    (r"/self_attention\b", "self-attention"),
    (r"/cross_attention\b", "cross-attention"),
    (r"/mlp_(in|out)\b", "MLP"),
    (r"TextEncoder", "text encoder"),
    (r"/encoder\b", "encoder"),
    (r"/decoder\b", "decoder"),
    (r"Discriminator|FeatureNet", "critics"),
    (r"DiT", "patches, text and time"),
    (r"UNet", "convolutions, text and time"),
)


def count_flops(function: Any, *arguments: Any, computed: Mapping[str, float] | None = None) -> dict[str, float]:
    """FLOPs of a function of these (perhaps abstract) arguments by part, the largest first.

    Of the branches of a `cond` the dearest counts; of a `while`, whose trips are not in the program, one trip.

    Args:
      function: what is counted.
      arguments: its own.
      computed: of all pairs of tokens those that a kernel computes, by the share that is seen, as the scope around
        a kernel tells it ("0.006405"); the seen ones count where this does not say.
    """
    shapes_alone = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)  # of no other mesh
    # A mesh can be left for one of another size only by way of none.
    with use_abstract_mesh(AbstractMesh((), ())), use_abstract_mesh(_ONE_DEVICE):
        program = jax.make_jaxpr(function)(*shapes_alone)
    counts = _count(program.jaxpr, 1.0, "", computed or {})
    return dict(sorted(counts.items(), key=lambda part: -part[1]))


def model_flops(loss: Any, params: Any, batch: Any, *, gradient: Any = None) -> float:
    """What utilisation is measured by: three times the FLOPs of the forward pass (PaLM, arXiv:2204.02311, appendix B).

    Args:
      loss: (params, batch, key) -> ...
      params, batch: arrays, or shapes alone.
      gradient: of a training that leaves weights as they are, which takes less: (params, batch, key) -> ...; its own
        FLOPs are counted, with what it computes again.
    """
    if gradient is not None:
        return sum(count_flops(gradient, params, batch, jax.random.key(0)).values())
    return 3.0 * sum(count_flops(loss, params, batch, jax.random.key(0)).values())


def _count(jaxpr: Any, times: float, where: str, computed: Mapping[str, float]) -> dict[str, float]:
    counts: dict[str, float] = collections.defaultdict(float)
    for equation in jaxpr.eqns:
        place = f"{where}/{equation.source_info.name_stack}"
        name, params = equation.primitive.name, equation.params
        if name in _FLOPS:
            part = next((part for pattern, part in _PARTS if re.search(pattern, place)), "optimiser and the rest")
            seen = re.search(r"sees_([\d.]+)_of_all", place)  # the pairs traced here that an attention pattern sees
            counts[part] += times * _FLOPS[name](equation) * (computed.get(seen[1], float(seen[1])) if seen else 1.0)
        inside = times
        if name == "scan":
            inside *= params["length"]
        inner = [_count(body, inside, place, computed) for body in jaxprs_in_params(params)]
        if name == "cond":
            inner = [max(inner, key=lambda branch: sum(branch.values()))]
        for branch in inner:
            for part, value in branch.items():
                counts[part] += value
    return counts


def _dot_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)


def _convolution_flops(equation: Any) -> float:
    kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
    taps = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
    zeros = math.prod(equation.params["lhs_dilation"])  # the zeros between inputs are not multiplied
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * taps / zeros


_FLOPS = {"dot_general": _dot_flops, "conv_general_dilated": _convolution_flops}
