# SPDX-License-Identifier: Apache-2.0
"""Flags of the TPU compiler, one table per chip: `stvdm supervise --chip=v5p` gives them to libtpu.

    LIBTPU_INIT_ARGS = libtpu_init_args("v5p", os.environ.get("LIBTPU_INIT_ARGS", ""))

Most let transfers between chips run beside the arithmetic. The sets, but for `_WHOLE_GATHERS`, are those that public
training recipes use for the same chip (AI-Hypercomputer/maxtext `src/maxtext/configs/tpu/*` and
`benchmarks/xla_flags_library.py`, AI-Hypercomputer/maxdiffusion README, August 2026). That a libtpu knows each flag and
takes its value is checked with its compiler, which needs no TPU (`tests/train/test_compiler_flags.py`); that they make
our steps faster is unproven.
"""

# Weights gathered for a layer, while the layer before computes. Not with SparseCores that gather by themselves (tpu7x).
_OVERLAP_GATHERS = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
# Gradients summed over the data axis, between slices too, while the backward pass goes on.
_OVERLAP_GRADIENTS = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
# Keys and values passed around the ring of the context axis.
_OVERLAP_RING = {"xla_enable_async_collective_permute": "true"}

# Weights gathered whole, a layer at a time. By itself the compiler makes of each product with a weight that is split a
# loop over its pieces: many more transfers, a longer program, and a fifth more temporaries (configs/pod_dit.py:
# 1.3b-480p-81f-v5p: 11.4 GiB, so 9.6).
_WHOLE_GATHERS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

COMPILER_FLAGS: dict[str, dict[str, str]] = {
    "v5e": {**_WHOLE_GATHERS, **_OVERLAP_GATHERS, **_OVERLAP_GRADIENTS, **_OVERLAP_RING},
    "v5p": {
        **_WHOLE_GATHERS,
        **_OVERLAP_GATHERS,
        **_OVERLAP_GRADIENTS,
        **_OVERLAP_RING,
        "xla_tpu_enable_ag_backward_pipelining": "true",
        "xla_tpu_megacore_fusion_allow_ags": "false",
    },
    "v6e": {
        **_WHOLE_GATHERS,
        **_OVERLAP_GATHERS,
        **_OVERLAP_GRADIENTS,
        **_OVERLAP_RING,
        "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
        "xla_tpu_scoped_vmem_limit_kib": "98304",
        "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
    },
    "tpu7x": {**_WHOLE_GATHERS, **_OVERLAP_GRADIENTS, **_OVERLAP_RING},
}

# What is added where the compiler is to make little effort: it then ends with a failed check (in the
# offload_collective_strategies.cc of libtpu 0.0.42) if SparseCores gather and sum.
QUICK_FLAGS: dict[str, dict[str, str]] = {
    "tpu7x": {
        f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "false"
        for kind in ("all_gather", "all_reduce", "reduce_scatter")
    }
}


def libtpu_init_args(chip: str, given: str = "") -> str:
    """The value of LIBTPU_INIT_ARGS for a chip; flags that are ``given`` already come last, and so win.

    Raises:
      ValueError: for a chip without a table.
    """
    if chip not in COMPILER_FLAGS:
        raise ValueError(f"chip={chip!r}: there are flags for {', '.join(COMPILER_FLAGS)}, so name one of them.")
    return " ".join([*(f"--{flag}={value}" for flag, value in COMPILER_FLAGS[chip].items()), given]).strip()
