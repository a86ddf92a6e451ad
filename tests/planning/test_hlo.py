"""Reader of HLO text: trip counts, all forms of collectives, memory traffic, unknown forms."""

import contextlib
import pathlib

import pytest

from oapl_jax.errors import RunError
from oapl_jax.planning import hlo

TEXTS = pathlib.Path(__file__).parent / "hlo"
# An outer loop of 3 turns; in it one of 5 turns, whose bound 10 the outer loop is handed and whose
# counter takes steps of 2; in that a product whose weights are gathered.
LOOPS = (TEXTS / "loops.hlo").read_text()
# An all-gather in two steps, an all-reduce whose sum is sliced, and a permutation.
CHAIN = (TEXTS / "chain.hlo").read_text()
MESH = {"data": 2, "fsdp": 2}


def test_a_body_runs_once_for_each_trip_of_its_loops():
    names = ("main", "outer", "outer_condition", "inner", "inner_condition")
    module = hlo.Module(LOOPS)
    assert module.entry.name == "main"
    counts = {c.name: c.executions for c in module.computations.values() if c.is_sequence}
    assert counts == dict(zip(names, (1, 3, 1, 15, 3), strict=True))
    assert module.computations["step"].executions == 15


@pytest.mark.parametrize(
    ("old", "new", "computation", "executions"),
    [
        # A computation of sparse cores ends with its thread.
        ("%two)\n}", '%two)\n}, execution_thread="sparsecore"', "step", 15),
        # A printed trip count is taken.
        ("body=%outer", 'body=%outer, backend_config={"known_trip_count":{"n":"7"}}', "inner", 35),
    ],
)
def test_executions_in_other_printed_forms(old, new, computation, executions):
    assert old in LOOPS
    module = hlo.Module(LOOPS.replace(old, new))
    assert list(module.computations) == list(hlo.Module(LOOPS).computations)
    assert module.computations[computation].executions == executions


def test_a_scope_bounds_a_loop_whose_end_depends_on_data():
    def trips(path):
        named = f'body=%inner, metadata={{op_name="jit(f)/while/body/{path}"}}'
        unknown = LOOPS.replace("constant(10)", "custom-call()").replace("body=%inner", named)
        return hlo.Module(unknown).computations["inner"].executions / 3

    for scope in ("at_most_34", "jvp(at_most_34)", "transpose(jvp(at_most_34))"):
        assert trips(f"{scope}/while") == 34
    with pytest.raises(RunError, match=r"loop\.3"):  # it is a loop within that one
        trips("at_most_34/while/body/while")


def test_collectives_are_counted_by_hand():
    # 15 times: an all-gather of 128 x 32 numbers of 2 bytes in pairs along fsdp, half of which is
    # another's; and an all-reduce of 64 x 32 of them in pairs along data, in and out.
    assert hlo.collective_bytes(hlo.Module(LOOPS), MESH) == {
        "all-gather": {"fsdp": 15 * 128 * 32 * 2 / 2},
        "all-reduce": {"data": 15 * 2 * 64 * 32 * 2 / 2},
    }


def test_a_collective_in_steps_counts_once_and_a_sliced_sum_is_a_reduce_scatter():
    assert hlo.collective_bytes(hlo.Module(CHAIN), {"fsdp": 2}) == {
        "all-gather": {"fsdp": 8 * 4 / 2},
        "reduce-scatter": {"fsdp": 8 * 4 / 2},
        "collective-permute": {"fsdp": 4 * 4},
    }
    never_started = hlo.Module(CHAIN.replace("AsyncCollectiveStart", "CollectiveBegin"))
    with pytest.raises(RunError, match="continues"):
        hlo.collective_bytes(never_started, {"fsdp": 2})


def gather_among(groups):
    text = f"""HloModule m

ENTRY %main (p: f32[4]) -> f32[8] {{
  %p = f32[4]{{0}} parameter(0)
  ROOT %g = f32[8]{{0}} all-gather(%p), channel_id=1, replica_groups={groups}, dimensions={{0}}
}}"""
    return hlo.Module(text).computations["main"].instructions["g"]


@pytest.mark.parametrize(
    ("groups", "group"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", (0, 4)),
        ("{}", tuple(range(8))),
        ("[4,2]<=[8]", (0, 1)),
        ("[2,4]<=[2,2,2]T(1,0,2)", (0, 1, 4, 5)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3)),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6)),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 1)),
        *((unknown, None) for unknown in ("mesh['a'=8] {'a':(1)2}", "mesh['a'=4] {'a'}")),
        *((unknown, None) for unknown in ("mesh['a'=8]", "groups_of_two")),
    ],
)
def test_groups_of_devices_are_read_in_every_form_and_never_guessed(groups, group):
    with pytest.raises(RunError, match="devices") if not group else contextlib.nullcontext():
        assert hlo.device_group(gather_among(groups), 8) == group


def test_groups_and_permutations_reach_over_the_axes_along_which_their_places_differ():
    text = CHAIN.replace("{{0,1},{1,0}}", "{{0,1},{1,0},{2,3},{3,2}}")
    moved = hlo.Module(text).computations["main"].instructions["moved"]
    for shape in (MESH, {"data": 1, "fsdp": 4}, {"fsdp": 4, "tensor": 1}):
        assert hlo.permuted_axes(moved, shape) == ("fsdp",)
    shape = {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    reached = {(0, 1): ("tensor",), (0, 2): ("fsdp",), (0, 2, 4, 6): ("data", "fsdp"), (3,): ()}
    assert {group: hlo.axes_of(group, shape) for group in reached} == reached


def test_traffic_counts_reads_and_writes_of_hbm():
    # A layer of the stack is read (2048 bytes) into VMEM and doubled there; a row is fetched (2048)
    # and written into its place (2048). The other 35 layers stay where they are.
    text = (TEXTS / "traffic.hlo").read_text()
    assert hlo.traffic(hlo.Module(text)) == (3 * 2048, 0)
    new = text.replace("bitcast(%row)", "multiply-by-add(%row)")  # within a fusion it is free
    assert hlo.traffic(hlo.Module(new)) == (3 * 2048, 0)


def test_transfers_to_and_from_the_host_are_counted_apart():
    # A row leaves HBM and comes back: one read, one write, and twice over the link.
    text = (TEXTS / "offloading.hlo").read_text()
    assert hlo.traffic(hlo.Module(text)) == (2 * 2048, 2 * 2048)
    unknown = text.replace("dynamic-slice-done(%in)", "gather(%kept, %i)")
    with pytest.raises(RunError, match="gather"):
        hlo.traffic(hlo.Module(unknown))


def test_arrays_that_a_loop_leaves_to_a_later_loop_are_saved():
    text = (TEXTS / "saved.hlo").read_text()
    # Not the weights, which the loop hands on, nor what stays in VMEM.
    assert hlo.saved_bytes(hlo.Module(text)) == 8 * 64 * 4


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("to_apply=%sum", "applies=%sum", "applies"),
        ("to_apply=%sum", "to_apply=%gone", "gone"),
        ("condition=%outer_condition, ", "", "outer_condition"),
        ("get-tuple-element(%loop), index=1", "teleport(%loop)", "teleport"),
        ("copy(%ten)", "copy(%ten", "copied"),
        ("copy(%ten)", "copy(%eleven)", "eleven"),
        ("add(%a, %b)", "send(%a, %b), channel_id=9", "send"),
        ("%x.1 = bf16[64,32]{1,0}", "%x.1 = bf16[64,32]{1,0:T(128)U(3)}", "x.1"),
        ("%x.1 = bf16[64,32]{1,0}", "%x.1 = bf16[64,32]{1,0:T(128)S(9)}", "x.1"),
        ("%x.1 = bf16[64,32]", "%x.1 = posit[64,32]", "posit"),
        ("%x = bf16[64,32]{1,0}", "x = bf16[64,32]{1,0}", "x = bf16"),
        ("ROOT %result", "%result", "main"),
        ("ENTRY ", "", "ENTRY"),
        # A trip count is never guessed.
        ("constant(10)", "custom-call()", "count of loop"),  # a bound from outside
        ("tuple(%i.5, %x.3, %limit.3)", "tuple(%i.5, %x.3, %i.5)", "loop"),  # a bound that changes
        ("compare(%i.3, %three), direction=LT", "compare(%i.3, %three), direction=XX", "loop"),
        ("add(%p, %two)", "multiply(%p, %two)", "count of loop"),
    ],
)
def test_an_unknown_form_is_an_error_that_names_it(old, new, named):
    assert old in LOOPS
    figures = lambda module: (hlo.collective_bytes(module, MESH), hlo.traffic(module))
    with pytest.raises(RunError, match=named):
        figures(hlo.Module(LOOPS.replace(old, new)))


NESTED = """HloModule jit_f

%slice (stack: f32[8,4], at: s32[]) -> f32[1,4] {
  %stack = f32[8,4]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %cut = f32[1,4]{1,0} dynamic-slice(%stack, %at, %zero), dynamic_slice_sizes={1,4}
}

%double (weights: f32[8,4], layer: s32[]) -> f32[1,4] {
  %weights = f32[8,4]{1,0} parameter(0)
  %layer = s32[] parameter(1)
  %one = f32[1,4]{1,0} fusion(%weights, %layer), kind=kLoop, calls=%slice
  ROOT %sum = f32[1,4]{1,0} add(%one, %one)
}

ENTRY %main (x: f32[8,4], i: s32[]) -> f32[1,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %out = f32[1,4]{1,0} fusion(%x, %i), kind=kLoop, calls=%double
}
"""


def test_a_fusion_within_a_fusion_reads_the_slice_that_it_takes():
    """The index, one layer read and one written; not the eight layers."""
    assert hlo.traffic(hlo.Module(NESTED)) == (4 + 16 + 16, 0)


def test_a_later_step_of_a_collective_moves_nothing_that_it_passes_on():
    first, begun, rest = CHAIN.partition("%middle")
    alone = first + begun + rest.replace(', frontend_attributes={chain_id="3"}', "", 1)
    (counted, _), (found, _) = (hlo.traffic(hlo.Module(text)) for text in (alone, CHAIN))
    assert counted - found == 16 + 32  # four numbers read, eight written
