# SPDX-License-Identifier: Apache-2.0
"""Collectives that were put into a program are found in it again: kind, mesh axes, how often, how many bytes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from stvdm import sharding
from stvdm.planning import collectives
from stvdm.planning.collectives import Collective, _axes_of, collectives_of


def program(body, mesh):
    spec = P(("data", "fsdp"))
    function = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    return function.lower(jnp.zeros((64, 16), jnp.float32)).compile().as_text()


def test_each_kind_with_its_axes_and_bytes():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    size = 64 * 16 * 4 / 8  # bytes of one device's part

    def body(x):
        x = jax.lax.psum(x, "fsdp")
        x = jax.lax.ppermute(x * 2, "data", [(0, 1), (1, 0)])
        return jax.lax.all_gather(x * 3, "fsdp", tiled=True)[:8]

    found = {(c.kind, c.axes): c for c in collectives_of(program(body, mesh), mesh)}
    assert found["all-reduce", ("fsdp",)][2:4] == (1, 2 * 3 / 4 * size)
    assert found["collective-permute", ("data",)][2:4] == (1, size)
    assert found["all-gather", ("fsdp",)][2:4] == (1, 3 / 4 * 4 * size)


def test_loops_are_multiplied_out():
    mesh = sharding.make_mesh(data=2, fsdp=4)

    def body(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(jax.lax.psum(c, "data")), None), x, length=7)[0]

    (found,) = collectives_of(program(body, mesh), mesh)
    assert found[:3] == ("all-reduce", ("data",), 7)
    assert found.bytes == 7 * 2 * 1 / 2 * 64 * 16 * 4 / 8


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("fsdp",), 4),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("replica_groups=[2,4]<=[8]", ("fsdp",), 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("replica_groups=[1,8]<=[8]", ("data", "fsdp"), 8),
        ("replica_groups={}", ("data", "fsdp"), 8),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}, use_global_device_ids=true", ("data", "fsdp"), 8),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x=1", ("fsdp",), 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ("data",), 2),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ("fsdp",), 4),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", ("data",), 2),
        ("replica_groups=mesh['a'=8] {'a':(4)2}", ("fsdp",), 2),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([8]<=[2,4]T(1,0)) {'b'}", ("data",), 2),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",), 2),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", ("fsdp",), 2),
    ],
)
def test_groups_of_devices_are_told_as_mesh_axes(groups, axes, size):
    assert _axes_of(f"x = f32[8] all-reduce(y), {groups}", sharding.make_mesh(data=2, fsdp=4)) == (axes, size)


def collective(line, body=""):
    """The collectives of a program of eight devices that holds one line, and perhaps another computation."""
    hlo = f"{body}ENTRY %main (p: f32[8]) -> f32[8] {{\n  {line}\n}}\n"
    return list(collectives_of(hlo, sharding.make_mesh(data=2, fsdp=4), num_slices=2))


FSDP = "replica_groups=[2,4]<=[8]"


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        (f"%x = (f32[8,2]{{1,0}}, bf16[16]{{0}}) all-reduce(%a, %b), {FSDP}, to_apply=%add", "all-reduce", 1.5 * 96),
        (f"%x = (f32[4]{{0}}, f32[16]{{0}}) all-gather-start(%a), {FSDP}", "all-gather", 0.75 * 64),
        (f"%x = ((f32[4], f32[2]), (f32[16], f32[8])) all-gather-start(%a, %b), {FSDP}", "all-gather", 0.75 * 96),
        (f"%x = f32[4]{{0}} reduce-scatter(%a), {FSDP}, to_apply=%add", "reduce-scatter", 0.75 * 64),
        (f"%x = ((f32[16]), f32[4]) reduce-scatter-start(%a), {FSDP}", "reduce-scatter", 0.75 * 64),
        (f"%x = (f32[4], f32[4], f32[4], f32[4]) all-to-all(%a, %b, %c, %d), {FSDP}", "all-to-all", 0.75 * 64),
        (
            "%x = (f32[16], f32[16], u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            64,
        ),
        ("%x = f8e4m3fn[16] collective-permute(%a), source_target_pairs={{0,1},{1,0}}", "collective-permute", 16),
    ],
)
def test_results_of_several_arrays_and_what_starts_are_counted_once(line, kind, sent):
    (found,) = collective(line)
    assert (found.kind, found.axes, found.num, found.exact) == (kind, ("fsdp",), 1, True)
    assert found.bytes == pytest.approx(sent)


def test_a_tpu_scatters_its_sums_in_a_fusion():
    body = (
        f"%all-reduce-scatter.3 (a: f32[16]) -> f32[4] {{\n  %s = f32[16] all-reduce(%a), {FSDP}, to_apply=%add\n}}\n\n"
    )
    (found,) = collective("%x = f32[4] fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3", body)
    assert found[:4] == ("reduce-scatter", ("fsdp",), 1, 0.75 * 64)


@pytest.mark.parametrize(
    ("array", "kind", "sent"),
    [
        ("bf16[512,8,128]{2,1,0:T(8,128)(2,1)}", "ALL_REDUCE", 2 * 2 / 3 * 2 * 512 * 8 * 128),
        ("f32[1,2,6144]{2,1,0:T(2,128)}", "ALL_GATHER", 2 * 4 * 2 * 6144),
        ("f32[9,8,128]{2,1,0:T(8,128)}", "REDUCE_SCATTER", 2 / 3 * 4 * 9 * 8 * 128),
        ("bf16[256,1024]{1,0:T(8,128)(2,1)}", "ONE_TO_ONE", 2 * 256 * 1024),
    ],
)
def test_what_goes_between_slices_is_counted(array, kind, sent):
    """Lines as the compiler writes them for several slices; of a REDUCE_SCATTER it has not been seen."""
    line = (
        f"  %send.15 = ({array}, u32[], token[]) send(%bitcast.28, %after-all.15), channel_id=28, "
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_host_transfer_rendezvous="all-reduce.454_0",_xla_megascale_reduce_operation="SUM",'
        f'_xla_megascale_target="{{1,2}}x{{0:3}}",_xla_megascale_transfer_type="{kind}"}}'
    )
    done = "  %send-done = token[] send-done(%send.15), channel_id=28, is_host_transfer=true"
    mesh = sharding.make_mesh()
    found = list(collectives_of(f"ENTRY %main () -> f32[] {{\n{line}\n{done}\n}}", mesh, num_slices=3))
    assert found == [Collective("between slices", ("data",), 1, pytest.approx(sent))]


def test_of_a_conditional_the_dearest_branch_counts():
    body = "".join(
        f"%{name} (a: f32[{n}]) -> f32[{n}] {{\n  %s = f32[{n}] all-reduce(%a), {FSDP}, to_apply=%add\n}}\n\n"
        for name, n in (("one", 4), ("two", 16))
    )
    (found,) = collective("%x = f32[16] conditional(%i, %a, %b), branch_computations={%one, %two}", body)
    assert found.bytes == 1.5 * 64
    (found,) = collective("%x = f32[16] conditional(%i, %a), true_computation=%two, false_computation=%one", body)
    assert found.bytes == 1.5 * 64


def test_a_loop_without_its_number_of_turns_is_said():
    body = f"%body (a: f32[16]) -> f32[16] {{\n  %s = f32[16] all-reduce(%a), {FSDP}, to_apply=%add\n}}\n\n"
    (found,) = collective("%x = f32[16] while(%a), condition=%c, body=%body", body)
    assert (found.num, found.exact) == (1, False)
    (found,) = collective(
        '%x = f32[16] while(%a), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}', body
    )
    assert (found.num, found.exact) == (5, True)


SUM = f"%s = f32[16] all-reduce(%a), {FSDP}, to_apply=%add"


def loop_of(condition, turn, first="%c0 = s32[] constant(0)", more="", around=""):
    """The one collective of a program with a loop over a number and an array, of which some lines are given."""
    hlo = f"""{more}%c (pc: (s32[], f32[16], s32[])) -> pred[] {{
  %pc = (s32[]{{:T(128)}}, f32[16], s32[]) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%pc), index=0
  {condition}
}}

%body (pb: (s32[], f32[16], s32[])) -> (s32[], f32[16], s32[]) {{
  %pb = (s32[], f32[16], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%pb), index=0
  %a = f32[16] get-tuple-element(%pb), index=1
  %far = s32[] get-tuple-element(%pb), index=2
  {turn}
  {SUM}
  ROOT %t = (s32[]{{:T(128)}}, f32[16], /*index=2*/s32[]) tuple(%next, %s, /*index=2*/%far)
}}

"""
    lines = (
        f"{first}\n  %many = s32[] constant(12)\n  %t = (s32[], f32[16], s32[]) tuple(%c0, %p, %many)\n"
        "  %x = (s32[], f32[16], s32[]) while(%t), condition=%c, body=%body"
    )
    (found,) = collective(lines, hlo) if not around else collective(around, hlo + lines_of(lines))
    return found


def lines_of(lines):
    return f"%inside (p: f32[16]) -> f32[16] {{\n  {lines}\n}}\n\n"


def compare(last, direction, order="%i, %end"):
    return f"%end = s32[] constant({last})\n  ROOT %ok = pred[] compare({order}), direction={direction}, metadata={{}}"


def step(size, kind="add", order="%i, %by"):
    return f"%by = s32[]{{:T(128)}} constant({size})\n  %next = s32[]{{:T(128)}} {kind}({order}), metadata={{}}"


def start(first):
    return f"%zero = s32[]{{:T(128)}} constant({first})\n  %c0 = s32[] copy(%zero)"


@pytest.mark.parametrize(
    ("first", "turn", "condition", "num"),
    [
        (start(0), step(1), compare(30, "LT"), 30),
        (start(0), step(2), compare(8, "LT"), 4),
        (start(1), step(3), compare(8, "LT"), 3),
        (start(0), step(1), compare(30, "LE"), 31),
        (start(0), step(1), compare(30, "NE"), 30),
        (start(29), step(-1), compare(0, "GE"), 30),
        (start(30), step(1, "subtract"), compare(0, "GT"), 30),
        (start(0), step(1), compare(30, "GT", "%end, %i"), 30),
        (start(0), step(1, order="%by, %i"), compare(30, "LT"), 30),
        (start(0), step(1), compare(30, "GT"), 0),
    ],
)
def test_turns_are_those_that_the_loop_counts(first, turn, condition, num):
    found = loop_of(condition, turn, first)
    assert (found.num, found.exact) == (num, True)
    assert found.bytes == num * 1.5 * 64


ADDS = """%adds (pa: s32[]) -> s32[] {
  %pa = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %sum = s32[] add(%pa, %one)
}

"""
COMPARES = """%compares (pc0: s32[], pc1: s32[]) -> pred[] {
  %pc0 = s32[] parameter(0)
  %pc1 = s32[] parameter(1)
  ROOT %less = pred[] compare(%pc1, %pc0), direction=LT
}

"""


@pytest.mark.parametrize(
    ("turn", "condition", "more"),
    [
        ("%next = s32[] fusion(%i), kind=kLoop, calls=%adds", compare(12, "LT"), ADDS),
        ("%n = s32[] call(%i), to_apply=%adds\n  %next = s32[] copy(%n)", compare(12, "LT"), ADDS),
        (
            step(1),
            "%end = s32[] constant(12)\n  ROOT %ok = pred[] fusion(%end, %i), kind=kLoop, calls=%compares",
            COMPARES,
        ),
        (  # the limit goes along
            step(1),
            "%end = s32[] get-tuple-element(%pc), index=2\n  ROOT %ok = pred[] compare(%i, %end), direction=LT",
            "",
        ),
        (  # by way of another memory
            "%by = s32[] constant(1)\n  %n = s32[]{:S(6)} add(%i, %by)\n"
            "  %b = (s32[], s32[]{:S(6)}, u32[]) copy-start(%n)\n  %next = s32[] copy-done(%b)",
            compare(12, "LT"),
            "",
        ),
        (  # beside the arithmetic
            "%b = ((s32[]), s32[], s32[]) async-start(%i), calls=%adds\n  %next = s32[] async-done(%b)",
            compare(12, "LT"),
            ADDS,
        ),
        (
            step(1),
            "%end = s32[] constant(12)\n  %more = pred[] compare(%i, %end), direction=LT\n"
            "  %yes = pred[] constant(true)\n  ROOT %ok = pred[] and(%more, %yes)",
            "",
        ),
    ],
)
def test_what_a_loop_counts_may_be_written_in_many_ways(turn, condition, more):
    found = loop_of(condition, turn, more=more)
    assert (found.num, found.exact) == (12, True)


def test_a_loop_is_followed_into_what_calls_it():
    """Where it starts may be told to the computation that it stands in, or to a loop around it."""
    found = loop_of(
        compare(30, "LT"),
        step(1),
        "%p = (s32[], f32[16]) parameter(0)\n  %c0 = s32[] get-tuple-element(%p), index=0",
        around="%from = s32[] constant(10)\n  %both = (s32[], f32[16]) tuple(%from, %p)\n"
        "  %x = f32[16] call(%both), to_apply=%inside",
    )
    assert (found.num, found.exact) == (20, True)


def test_loops_within_loops_multiply_and_share_what_stays():
    inner = """%ci (pci: (s32[], s32[])) -> pred[] {
  %pci = (s32[], s32[], f32[16]) parameter(0)
  %j = s32[] get-tuple-element(%pci), index=0
  %end = s32[] get-tuple-element(%pci), index=1
  ROOT %less = pred[] compare(%j, %end), direction=LT
}

%bi (pbi: (s32[], s32[])) -> (s32[], s32[]) {
  %pbi = (s32[], s32[], f32[16]) parameter(0)
  %j = s32[] get-tuple-element(%pbi), index=0
  %end = s32[] get-tuple-element(%pbi), index=1
  %a = f32[16] get-tuple-element(%pbi), index=2
  %one = s32[] constant(1)
  %k = s32[] add(%j, %one)
  SUM
  ROOT %ti = (s32[], s32[], f32[16]) tuple(%k, %end, %s)
}

""".replace("SUM", SUM)
    within = (
        "\n  %zero = s32[] constant(0)\n  %ti = (s32[], s32[], f32[16]) tuple(%zero, {}, %a)\n"
        "  %w = (s32[], s32[], f32[16]) while(%ti), condition=%ci, body=%bi"
    )
    found = loop_of(compare(5, "LT"), step(1) + within.format("%far"), more=inner)
    assert (found.num, found.exact) == (5 * 12 + 5, True)
    found = loop_of(compare(5, "LT"), step(1) + within.format("%i"), more=inner)  # 0, 1, 2, ... turns: not followed
    assert (found.num, found.exact) == (5 * 1 + 5, False)


@pytest.mark.parametrize(
    "condition",
    [
        "%far = f32[] get-tuple-element(%pc), index=1\n  ROOT %ok = pred[] compare(%far, %far), direction=LT",
        compare(30, "LT").replace("constant(30)", "custom-call()"),
        compare(-1, "NE"),  # without an end
    ],
)
def test_a_loop_that_counts_nothing_known_is_said(condition, monkeypatch):
    monkeypatch.setattr(collectives, "MOST_TURNS", 100)
    found = loop_of(condition, step(1))
    assert (found.num, found.exact) == (1, False)


def test_a_gather_in_pieces_is_one_gather():
    gather = f"%g = f32[16] all-gather(%a), channel_id=7, {FSDP}"
    names = ("begins", "async_collective_fusion.1", "async_collective_fusion.2", "ends")
    body = "".join(f"%{name} (a: f32[4]) -> f32[16] {{\n  {gather}\n}}\n\n" for name in names)
    lines = (
        "%async-collective-start.1 = f32[16] fusion(%p), kind=kCustom, calls=%begins",
        "%f1 = f32[16] fusion(%async-collective-start.1), kind=kOutput, calls=%async_collective_fusion.1",
        "%f2 = f32[16] fusion(%f1), kind=kOutput, calls=%async_collective_fusion.2",
        "%async-collective-done.1 = f32[16] fusion(%f2), kind=kCustom, calls=%ends",
    )
    (found,) = collective("\n  ".join(lines), body)
    assert (found.kind, found.num, found.bytes) == ("all-gather", 1, 0.75 * 64)
    (alone,) = collective(lines[1], body)  # one that is begun and ended inside of a fusion
    assert (alone.kind, alone.num, alone.bytes) == ("all-gather", 1, 0.75 * 64)


def test_what_a_sparse_core_gathers_beside_the_arithmetic_is_counted():
    """As the compiler for tpu7x writes it."""
    groups = "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}"
    body = (
        "%called_computation.77 (p0: bf16[1,4], p1: token[]) -> bf16[4,4] {\n"
        f"  ROOT %all-gather.609 = bf16[4,4]{{1,0:T(2,128)(2,1)}} all-gather(%p0), channel_id=94, {groups}\n"
        '}, execution_thread="sparsecore"\n\n'
    )
    lines = (
        '%prepare_start = s32[]{:S(2)} custom-call(), custom_call_target="PrepareAsyncCallStart"',
        "%g.call-start = ((bf16[1,4]{1,0:T(2,128)(2,1)}, token[]), bf16[4,4]{1,0:T(2,128)(2,1)}) call-start("
        '%p, %prepare_done), async_execution_thread="sparsecore", to_apply=%called_computation.77',
        "%done = bf16[4,4]{1,0:T(2,128)(2,1)} call-done(%g.call-start)",
    )
    (found,) = collective("\n  ".join(lines), body)
    assert found == ("all-gather", ("fsdp",), 1, 0.75 * 4 * 4 * 2, True)


def test_a_device_alone_sends_nothing():
    assert (
        collective("%x = f32[4] all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add") == []
    )


def test_groups_told_in_an_unknown_way_are_refused():
    with pytest.raises(ValueError, match="not known here"):
        collective("%x = f32[16] all-reduce(%a), replica_groups=tuples(8)")
