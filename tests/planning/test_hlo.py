"""Reader of HLO text: trip counts, collectives in all their forms, memory traffic, unknown forms."""

import contextlib

import pytest

from oapl_jax.errors import RunError
from oapl_jax.planning import hlo

SUM = """\
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}
"""
# An outer loop of 3 turns; in it one of 5 turns, whose bound 10 the outer loop is handed and whose
# counter takes steps of 2; in that a product whose weights are gathered.
LOOPS = (
    """\
HloModule jit_f, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

SUM
%step (p: INT, two: INT) -> INT {
  %p = INT parameter(0)
  %two = INT parameter(1)
  ROOT %next = INT add(%p, %two)
}

%inner_condition (s.0: STATE) -> pred[] {
  %s.0 = STATE parameter(0)
  %i.0 = INT get-tuple-element(%s.0), index=0
  %limit.0 = INT get-tuple-element(%s.0), index=2
  ROOT %less.0 = pred[]{:T(512)} compare(%i.0, %limit.0), direction=LT
}

%inner (s.1: STATE) -> STATE {
  %s.1 = STATE parameter(0)
  %i.1 = INT get-tuple-element(%s.1), index=0
  %x.1 = bf16[64,32]{1,0} get-tuple-element(%s.1), index=1
  %limit.1 = INT get-tuple-element(%s.1), index=2
  %two.1 = s32[]{:T(128)S(6)} constant(2)
  %i.2 = s32[]{:T(128)S(6)} fusion(%i.1, %two.1), kind=kLoop, calls=%step
  %gathered = bf16[128,32]{1,0:T(8,128)(2,1)S(1)} all-gather(%x.1), channel_id=1, \
replica_groups=[2,2]<=[4], dimensions={0}, use_global_device_ids=true
  %reduced = bf16[64,32]{1,0:S(1)} all-reduce(%x.1), channel_id=2, \
replica_groups={{0,2},{1,3}}, to_apply=%sum
  ROOT %out.1 = STATE tuple(%i.2, %x.1, %limit.1)
}

%outer_condition (s.2: STATE) -> pred[] {
  %three = INT constant(3)
  %s.2 = STATE parameter(0)
  %i.3 = INT get-tuple-element(%s.2), index=0
  ROOT %less.2 = pred[]{:T(512)} compare(%i.3, %three), direction=LT
}

%outer (s.3: STATE) -> STATE {
  %s.3 = STATE parameter(0)
  %i.4 = INT get-tuple-element(%s.3), index=0
  %x.3 = bf16[64,32]{1,0} get-tuple-element(%s.3), index=1
  %limit.3 = INT get-tuple-element(%s.3), index=2
  %zero.3 = INT constant(0)
  %start.3 = STATE tuple(%zero.3, %x.3, %limit.3)
  %loop.3 = STATE while(%start.3), condition=%inner_condition, body=%inner
  %one = INT constant(1)
  %i.5 = INT add(%i.4, %one)
  ROOT %out.3 = STATE tuple(%i.5, %x.3, %limit.3)
}

ENTRY %main (x: bf16[64,32]) -> bf16[64,32] {
  %x = bf16[64,32]{1,0} parameter(0)
  %zero = INT constant(0)
  %ten = INT constant(10)
  %copied = INT copy(%ten)
  %start = STATE tuple(%zero, %x, %copied)
  %loop = STATE while(%start), condition=%outer_condition, body=%outer
  ROOT %result = bf16[64,32]{1,0} get-tuple-element(%loop), index=1
}
""".replace("SUM", SUM)
    .replace("STATE", "(INT, bf16[64,32]{1,0}, INT)")
    .replace("INT", "s32[]{:T(128)}")
)
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


CHAIN = (
    f"HloModule jit_f\n\n{SUM}"
    + """
%start (p: f32[4]) -> (f32[4], f32[8]) {
  %p = f32[4]{0} parameter(0)
  %g = f32[8]{0} all-gather(%p), channel_id=1, replica_groups={{0,1}}, dimensions={0}, \
frontend_attributes={chain_id="3"}
  ROOT %s = (f32[4]{0}, f32[8]{0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%middle (q: f32[4]) -> (f32[4], f32[8]) {
  %q = f32[4]{0} parameter(0)
  %h = f32[8]{0} all-gather(%q), channel_id=1, replica_groups={{0,1}}, dimensions={0}, \
frontend_attributes={chain_id="3"}
  ROOT %t = (f32[4]{0}, f32[8]{0}) tuple(%q, %h)
}

%scatter (r: f32[8]) -> f32[4] {
  %r = f32[8]{0} parameter(0)
  %total = f32[8]{0} all-reduce(%r), channel_id=2, replica_groups={{0,1}}, to_apply=%sum
  %view = f32[8]{0} bitcast(%total)
  %at = s32[] constant(0)
  ROOT %mine = f32[4]{0} dynamic-slice(%view, %at), dynamic_slice_sizes={4}
}

ENTRY %main (x: f32[4], y: f32[8]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %one = (f32[4]{0}, f32[8]{0}) fusion(%x), kind=kCustom, calls=%start
  %two = (f32[4]{0}, f32[8]{0}) fusion(%x), kind=kOutput, calls=%middle
  %moved = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=3, \
source_target_pairs={{0,1},{1,0}}
  %arrived = f32[4]{0} collective-permute-done(%moved)
  ROOT %out = f32[4]{0} fusion(%y), kind=kCustom, calls=%scatter
}
"""
)


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


TRAFFIC = """\
HloModule jit_f

%one_layer (stack: bf16[36,1024], at: s32[]) -> bf16[1024] {
  %stack = bf16[36,1024]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %row = bf16[1,1024]{1,0} dynamic-slice(%stack, %at), dynamic_slice_sizes={1,1024}
  ROOT %flat = bf16[1024]{0} bitcast(%row)
}

%put (all: bf16[36,1024], new: bf16[1,1024], where: s32[]) -> bf16[36,1024] {
  %all = bf16[36,1024]{1,0} parameter(0)
  %new = bf16[1,1024]{1,0} parameter(1)
  %where = s32[] parameter(2)
  ROOT %updated = bf16[36,1024]{1,0} dynamic-update-slice(%all, %new, %where)
}

ENTRY %main (w: bf16[36,1024], i: s32[], v: bf16[1,1024]) -> bf16[36,1024] {
  %w = bf16[36,1024]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %v = bf16[1,1024]{1,0} parameter(2)
  %layer = bf16[1024]{0:T(1024)S(1)} fusion(%w, %i), kind=kLoop, calls=%one_layer
  %doubled = bf16[1024]{0:T(1024)S(1)} add(%layer, %layer), backend_config={"note":{
"a kernel":"prints its notes, a = b (c), on lines of their own"
}}, metadata={op_name="jit(f)/add"}
  %fetch = (bf16[1,1024]{1,0:S(1)}, bf16[1,1024]{1,0}, u32[]{:S(2)}) copy-start(%v)
  %near = bf16[1,1024]{1,0:S(1)} copy-done(%fetch)
  ROOT %out = bf16[36,1024]{1,0} fusion(%w, %near, %i), kind=kLoop, calls=%put
}
"""


def test_traffic_counts_reads_and_writes_of_hbm():
    # A layer of the stack is read (2048 bytes) into VMEM and doubled there; a row is fetched (2048)
    # and written into its place (2048). The other 35 layers stay where they are.
    assert hlo.traffic(hlo.Module(TRAFFIC)) == (3 * 2048, 0)
    new = TRAFFIC.replace("bitcast(%row)", "multiply-by-add(%row)")  # within a fusion it is free
    assert hlo.traffic(hlo.Module(new)) == (3 * 2048, 0)


OFFLOADING = """HloModule m, is_scheduled=true

ENTRY %main (v: bf16[1,1024], i: s32[]) -> bf16[1,1024] {
  %v = bf16[1,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %far = bf16[36,1024]{1,0:S(5)} custom-call(), custom_call_target="AllocateBuffer"
  %out = (bf16[36,1024]{1,0:S(5)}, bf16[1,1024]{1,0}, s32[], bf16[36,1024]{1,0:S(5)}, \
u32[]{:S(2)}) dynamic-update-slice-start(%far, %v, %i)
  %kept = bf16[36,1024]{1,0:S(5)} dynamic-update-slice-done(%out)
  %in = ((bf16[36,1024]{1,0:S(5)}, s32[]), bf16[1,1024]{1,0}, u32[]{:S(2)}) \
dynamic-slice-start(%kept, %i)
  ROOT %back = bf16[1,1024]{1,0} dynamic-slice-done(%in)
}
""".replace("\\\n", "")


def test_transfers_to_and_from_the_host_are_counted_apart():
    # A row leaves HBM and comes back: one read, one write, and twice over the link.
    assert hlo.traffic(hlo.Module(OFFLOADING)) == (2 * 2048, 2 * 2048)
    unknown = OFFLOADING.replace("dynamic-slice-done(%in)", "gather(%kept, %i)")
    with pytest.raises(RunError, match="gather"):
        hlo.traffic(hlo.Module(unknown))


def test_arrays_that_a_loop_leaves_to_a_later_loop_are_saved():
    text = """HloModule m

%condition (s: STATE) -> pred[] {
  %s = STATE parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(8)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (b: STATE) -> STATE {
  %b = STATE parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %stack = f32[8,64]{1,0} get-tuple-element(%b), index=1
  %weights = f32[4,4]{1,0} get-tuple-element(%b), index=2
  %near = f32[8,2]{1,0:S(1)} get-tuple-element(%b), index=3
  %one = s32[] constant(1)
  %k = s32[] add(%j, %one)
  %new = f32[8,64]{1,0} add(%stack, %stack)
  %nearer = f32[8,2]{1,0:S(1)} add(%near, %near)
  ROOT %g = STATE tuple(%k, %new, %weights, %nearer)
}

ENTRY %main (x: f32[8,64], w: f32[4,4], v: f32[8,2]) -> f32[8,64] {
  %x = f32[8,64]{1,0} parameter(0)
  %w = f32[4,4]{1,0} parameter(1)
  %v = f32[8,2]{1,0:S(1)} parameter(2)
  %zero = s32[] constant(0)
  %start = STATE tuple(%zero, %x, %w, %v)
  %first = STATE while(%start), condition=%condition, body=%body
  %stack = f32[8,64]{1,0} get-tuple-element(%first), index=1
  %weights = f32[4,4]{1,0} get-tuple-element(%first), index=2
  %near = f32[8,2]{1,0:S(1)} get-tuple-element(%first), index=3
  %again = STATE tuple(%zero, %stack, %weights, %near)
  %second = STATE while(%again), condition=%condition, body=%body
  ROOT %out = f32[8,64]{1,0} get-tuple-element(%second), index=1
}
"""
    # Not the weights, which the loop hands on, nor what stays in VMEM.
    state = "(s32[], f32[8,64]{1,0}, f32[4,4]{1,0}, f32[8,2]{1,0:S(1)})"
    assert hlo.saved_bytes(hlo.Module(text.replace("STATE", state))) == 8 * 64 * 4


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
