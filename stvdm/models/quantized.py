# SPDX-License-Identifier: Apache-2.0
"""Matrix products of the layers in eight bits, at twice the rate of bfloat16 on chips that have them.

x W  ~  s_x s_W (x / s_x) (W / s_W)        both rounded, with a scale for each row of x and each column of W

By Qwix (https://github.com/google/qwix), forward and backward; attention itself, weights and what is summed keep their
precision. Parameters are those of the network as it was.

dit = quantized(DiT(...), "int8")
"""

from __future__ import annotations

from typing import Any

PRODUCTS = r".*/((image_)?(key|value)|query|out|mlp_in|mlp_out)"  # the linear layers of `models.block.Block`
TYPES = {"int8": ("int8", "int8"), "fp8": ("float8_e4m3fn", "float8_e5m2")}  # of what is multiplied, and of cotangents


def quantized(model: Any, kind: str) -> Any:
    """The module with products of this kind; "" gives it back as it is.

    Raises:
      ValueError: for a kind not in `TYPES`, or if Qwix is not installed.
    """
    if not kind:
        return model
    if kind not in TYPES:
        raise ValueError(f"model.matmul={kind!r}: expected '', {' or '.join(map(repr, TYPES))}.")
    try:
        import qwix
    except ImportError as error:
        raise ValueError(f"model.matmul={kind!r}: needs Qwix: pip install -e '.[quantized]'") from error
    forward, backward = TYPES[kind]
    rule = qwix.QtRule(module_path=PRODUCTS, weight_qtype=forward, act_qtype=forward, bwd_qtype=backward)
    return qwix.quantize_model(model, qwix.QtProvider([rule]))
