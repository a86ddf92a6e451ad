"""The embedded sampler in plans: programs for a v5e, slots, bounds; and one GPU by count."""

import functools
from unittest import mock

import pytest
from small_runs import typed

from configs import arithmetic, gsm8k
from oapl_jax.errors import UserError
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.hf import parameter_count
from oapl_jax.model.published import published
from oapl_jax.model.sharding import open_meshes
from oapl_jax.plan import count_report, count_run, plan_run, programs_of, report
from oapl_jax.planning import estimate, hardware, programs
from oapl_jax.planning.count import saved_numbers
from oapl_jax.planning.programs import Compilation

LAYERS, HIDDEN, HEADS, KEYS, DIM, WIDE, VOCAB = 2, 512, 4, 4, 64, 1024, 2048
SIZES = dict(
    hidden_size=HIDDEN,
    intermediate_size=WIDE,
    vocab_size=VOCAB,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KEYS,
    head_dim=DIM,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)
PROMPT, RESPONSE, SLOTS, STEPS = 128, 128, 64, 16
GIB = 2**30


def settings(**changes):
    """The default run with a decoder of 512 units in bfloat16, sampled by the embedded sampler."""
    config = arithmetic.get_config().unlock()
    config.model.architecture.update(SIZES)
    config.model.dtype, config.data.max_prompt_tokens = "bfloat16", PROMPT
    config.group_size, config.groups_per_step, config.buffer.capacity = 4, 8, 0
    config.warmup.num_steps = config.evaluation.every = 0
    config.rollout.update(max_response_tokens=RESPONSE, max_sequences=SLOTS, prompt_multiple=PROMPT)
    config.rollout.update(tokens_per_round=STEPS, prompts_per_call=8)
    config.learner.update(row_length=PROMPT + RESPONSE, rows_multiple=0, logp_chunk=64)
    config.update_from_flattened_dict(changes)
    return config


def apart(devices):
    """Settings of a sampler beside the learner; 0: on shared devices."""
    return {"rollout.devices": devices, "rollout.overlap": True}


def model_of(config):
    return ModelConfig.from_hf(dict(config.model.architecture), source="this test")


def run_of(where, **changes):
    config = settings(**changes)
    make, given = functools.partial(hardware.make_mesh, where), typed(config)
    host = where.devices[0].process_index
    meshes = open_meshes(given.mesh, given.rollout, where.devices, host=host, make=make)
    given = given.derived(meshes[0].shape)
    return programs_of(given, model_of(config), *meshes, from_checkpoint=True)


@pytest.fixture(scope="module")
def where():
    return hardware.open_slice("v5e:2x2")


@functools.cache
def compiled(**changes):
    """Programs of the sampler on a v5e 2x2 by name, as compiled, and what they take at least."""
    where = hardware.open_slice("v5e:2x2")
    run, available = run_of(where, **changes), programs.available_hbm(where)
    found = {p.name: programs.compile_program(p, available) for p in run.sampling()}
    work = {
        name: estimate.measure(where, run.sampler.mesh, result.traced, result.module)[1]
        for name, result in found.items()
    }
    return run, found, work


LAYER = HIDDEN * (2 * HEADS * DIM + 2 * KEYS * DIM + 3 * WIDE)
WEIGHTS = LAYERS * LAYER + HIDDEN * VOCAB
PLACE = LAYERS * 2 * KEYS * DIM * 2  # bytes of a token's keys and values
MANY = 4096  # slots, whose cache a chip's VMEM can't hold
MESHES = [{}, {"rollout.mesh.data": 2, "rollout.mesh.tensor": 2, "rollout.max_sequences": MANY}]


@pytest.mark.parametrize("mesh", MESHES)
def test_hbm_of_decoding_has_version_and_cache(mesh):
    run, found, _ = compiled(**mesh)
    parts, slots = mesh.get("rollout.mesh.tensor", 1), mesh.get("rollout.max_sequences", SLOTS)
    assert all(result.fits and not result.replicated for result in found.values())
    hbm = found["decoding"].hbm
    assert 2 * WEIGHTS / parts < hbm["embedded sampler"] < 1.02 * 2 * WEIGHTS / parts
    cache = slots * (PROMPT + RESPONSE) * PLACE / 4  # over four chips
    assert cache < hbm["KV cache"] < 1.05 * cache
    assert hbm["parameters"] == programs.per_chip(run.state.params)  # the learner's, beside it
    assert hbm["optimizer"] > 0
    # The slots of the round before are reused.
    assert found["decoding"].donated["bytes"] >= hbm["KV cache"]
    assert found["placement"].donated["bytes"] >= hbm["KV cache"]
    for name in ("placement", "prefill"):
        assert found[name].hbm["KV cache"] == hbm["KV cache"], name
        assert found[name].hbm["embedded sampler"] == hbm["embedded sampler"], name
    said = found["decoding"].compiled.memory_analysis()
    own = said.argument_size_in_bytes + said.temp_size_in_bytes + said.generated_code_size_in_bytes
    beside = sum(hbm[kind] for kind in ("parameters", "optimizer", "prefilled prompts"))
    assert own <= sum(hbm.values()) - beside


@pytest.mark.parametrize("mesh", MESHES)
def test_work_of_a_round_of_decoding(mesh):
    run, _, work = compiled(**mesh)
    slots, places = mesh.get("rollout.max_sequences", SLOTS), PROMPT + RESPONSE
    assert (run.sampler.slots, run.sampler.places, run.sampler.steps) == (slots, places, STEPS)
    # Each token attends to all places of its slot.
    token = 2 * WEIGHTS + LAYERS * 2 * 2 * HEADS * DIM * places
    assert work["decoding"]["flops"] == STEPS * slots * token
    received = work["decoding"]["received"]
    if mesh:
        cache = slots * places * PLACE / 4
        assert STEPS * cache < work["decoding"]["hbm_bytes"] < 4 * STEPS * cache
        results = 2 * LAYERS * STEPS * slots / 2 * HIDDEN * 2  # of attention and feed-forward
        assert results / 2 < received["tensor"] < 4 * results
    else:
        assert sum(received.values()) < 1024  # counts of active slots


def test_a_prefill_has_prompts_for_the_slots_that_a_round_ends_early_for():
    run, _, work = compiled()
    assert run.sampler.prompts == 8  # an eighth of 64 slots
    tokens = 8 * PROMPT
    attention = LAYERS * 2 * HEADS * DIM * PROMPT * tokens  # half of the pairs, twice
    least = 2 * LAYERS * LAYER * tokens + attention
    assert least <= work["prefill"]["flops"] < 1.2 * least
    assert work["placement"]["flops"] == 0
    assert work["placement"]["hbm_bytes"] > programs.per_chip(run.sampler.prefilled)


def test_devices_of_a_slice_are_split_as_a_run_splits_them():
    for name, each, hosts, data in (
        *(("v5e:2x4", 4, 1, 1), ("v6e:2x4", 6, 1, 1)),
        ("v5e:4x4", 1, 4, 3),
    ):
        where = hardware.open_slice(name)
        run = run_of(where, **apart(each), **{"mesh.data": data})
        learner, sampler = (set(m.devices.flat) for m in (run.mesh, run.sampler_mesh))
        assert len(sampler) == each, name
        assert len(learner) == len(where.devices) - hosts * each, name
        assert not learner & sampler, name
        assert {device.process_index for device in sampler} == {where.devices[0].process_index}
        # Neither has arrays of the other.
        assert "embedded sampler" not in run.gradient_step().hbm
        assert "parameters" not in run.sampling()[0].hbm


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (apart(4), r"rollout\.devices=4 .* 2\b"),
        ({"rollout.mesh.data": 3}, r"rollout\.mesh\.data=3 .* rollout\.mesh\.data=4"),
        ({"rollout.mesh.tensor": 3, "rollout.mesh.data": 1}, r"rollout\.mesh\.data=4"),
        ({"rollout.mesh.data": 1, "rollout.mesh.fsdp": 8}, r"rollout\.mesh\.fsdp=8"),
        (
            {"model.architecture.num_key_value_heads": 2, "rollout.mesh.data": 1}
            | {"rollout.mesh.tensor": 4},
            r"rollout\.mesh\.tensor=4 .* set rollout\.mesh\.tensor=2 and rollout\.mesh\.data=2",
        ),
    ],
)
def test_a_refusal_of_the_samplers_devices_proposes_values(where, changes, named):
    with pytest.raises(UserError, match=named):
        run_of(where, **changes)


def test_an_evaluation_has_a_version_beside_that_of_the_rollouts(where):
    kinds = lambda **changes: run_of(where, **changes).sampling()[0].hbm
    both = kinds(**{"evaluation.every": 5})
    assert both["evaluated parameters"] == both["embedded sampler"]
    overlap = kinds(**{"evaluation.every": 5, "rollout.overlap": True})
    assert overlap["KV cache of the evaluation"] == overlap["KV cache"]
    versions = ("embedded sampler", "sampler's version before", "evaluated parameters")
    assert len({overlap[kind] for kind in versions}) == 1
    fleet = {"rollout.sampler": "fleet"}
    assert "evaluated parameters" not in kinds(**fleet, **{"evaluation.every": 5})
    assert run_of(where, **fleet).sampling() == []


@pytest.mark.parametrize("devices", [0, 2])
def test_with_overlap_the_version_before_stays_until_its_responses_end(where, devices):
    """A refresh in turns frees it first."""
    before = "sampler's version before"
    run = run_of(where, **apart(devices))
    hbm = run.sampling()[0].hbm
    assert hbm[before] == hbm["embedded sampler"]
    assert (before in run.kept) == (before in run.gradient_step().hbm) == (devices == 0)
    if not devices:
        assert before not in run_of(where).kept
        assert before not in run_of(where).sampling()[0].hbm


def fake_compiler(temporaries, fixed=0):
    """Compiles to `temporaries` bytes for each slot and `fixed` ones."""

    def compile_program(program, available):
        slots = program.arguments["KV cache"].active.shape[0]
        hbm = program.hbm | {"temporaries": temporaries * slots + fixed}
        return Compilation(sum(hbm.values()) <= available, "", hbm)

    return compile_program


@pytest.mark.parametrize(
    ("room", "fixed", "least", "most"),  # room in slots
    [
        (200, 0, 140, 200),
        (40, 0, 28, 40),
        (200, 20 << 20, SLOTS, 200),  # what does not grow makes it search below the most
        (10**4, 0, 16 * SLOTS, 16 * SLOTS),  # enough for any use
        (2, 0, 0, 0),  # less than a slot a chip
    ],
)
def test_slots_that_fit_fill_a_chip(where, room, fixed, least, most):
    run, compile_program = run_of(where), fake_compiler(1 << 20, fixed)
    hbm = compile_program(run.sampling()[0], 0).hbm
    growing = sum(hbm[kind] for kind in ("KV cache", "prefilled prompts")) + SLOTS * (1 << 20)
    available = sum(hbm.values()) + int((room / SLOTS - 1) * growing)
    found = {p.name: compile_program(p, available) for p in run.sampling()[:2]}
    found["prefill"] = found["decoding"]
    with mock.patch.object(estimate, "compile_program", compile_program):
        slots = estimate.slots_that_fit(run, available, found, lambda line: None)
    assert least <= slots <= most
    assert slots % 4 == 0


def test_with_overlap_the_train_step_must_fit_beside_the_cache(where):
    run, compile_program = run_of(where, **{"rollout.overlap": True}), fake_compiler(0)
    cache = run.kept["KV cache"]
    step = Compilation(True, "", run.kept | {"temporaries": 10 * cache})
    available = sum(step.hbm.values()) + 2 * cache
    found = {p.name: compile_program(p, available) for p in run.sampling()[:2]}
    found |= {"prefill": found["decoding"], "train step": step}
    with mock.patch.object(estimate, "compile_program", compile_program):
        slots = estimate.slots_that_fit(run, available, found, lambda line: None)
    assert slots == 3 * SLOTS


def test_what_does_not_fit_comes_with_a_proposal(where):
    run, version = run_of(where), {"embedded sampler": 8 * GIB}
    propose = functools.partial(estimate.remedies, run)
    of = lambda hbm, fits=False: {"train step": Compilation(fits, "", hbm)}
    state = {"parameters": 10 * GIB}
    assert propose(20 * GIB, of(state | version, True), SLOTS) == []
    assert propose(16 * GIB, of({}), 0) == []  # the compiler refused, without figures
    assert propose(16 * GIB, of(state | version), 32) == ["rollout.max_sequences=32"]
    cache = {"KV cache": 4 * GIB}
    assert propose(20 * GIB, of(state | version | cache), 0) == ["rollout.max_sequences=32"]
    size = programs.per_chip(run.sampler.params)
    room = lambda share: sum(state.values()) + int(share * size)
    split = lambda share: propose(room(share), of(state | {"embedded sampler": size}), 0)
    sizes = lambda tensor: [f"rollout.mesh.data={4 // tensor}", "rollout.mesh.fsdp=1"]
    assert split(0.6) == [*sizes(2), "rollout.mesh.tensor=2"]
    assert split(0.3) == [*sizes(4), "rollout.mesh.tensor=4"]
    assert split(0.1) == []


def test_times_of_the_sampler_are_arithmetic(where):
    bounds = {"decoding": 1.6, "prefill": 2.0, "placement": 0.5}
    bounds = {name: {"seconds": seconds} for name, seconds in bounds.items()}
    times = lambda hosts=1, **changes: estimate.sampler_times(
        run_of(where, **changes), hosts, bounds, 20.0
    )
    # 64 slots need 16 prompts, 8 at a time; 128 tokens of 0.1 s.
    full = 2 * 2.5 + 12.8
    found = times()
    assert found["seconds_per_token"] == pytest.approx(0.1)
    assert found["tokens_per_second"] == pytest.approx(64 * 128 / full)
    assert found["seconds"] == pytest.approx(2.5 + 12.8)  # 32 sequences of 8 prompts
    assert found["step_seconds"] == pytest.approx(20 + 15.3)
    assert found["share"] == pytest.approx(15.3 / 35.3)
    many = times(groups_per_step=40)  # 160 sequences take the slots three times
    assert many["seconds"] == pytest.approx(5 * 2.5 + 3 * 12.8)
    assert times(2)["tokens_per_second"] == pytest.approx(2 * 64 * 128 / full)
    beside = times(**apart(2))
    assert beside["step_seconds"] == 20
    assert beside["share"] == pytest.approx(beside["seconds"] / 20)
    assert "share" not in times(**{"rollout.sampler": "fleet", "evaluation.every": 5})


def test_a_plan_has_the_sampler(where):
    config = settings(**apart(2), num_steps=1)
    plan = plan_run(typed(config), model_of(config), where, from_checkpoint=True, storage=1e9)
    assert plan["fits"]
    assert plan["mesh"]["fsdp"] == 2
    sampler, parameters = plan["sampler"], plan["programs"][0]["hbm"]["parameters"]
    assert parameters == pytest.approx(4 * plan["model"]["parameters"] / 2, rel=0.01)
    assert sampler["mesh"]["data"] == 2
    assert sampler["slots_that_fit"] == 16 * SLOTS
    assert sampler["step_seconds"] == max(sampler["seconds"], plan["roofline"]["seconds"])
    slowest = sampler["bounds"]["decoding"]
    assert slowest["seconds"] == slowest[slowest["binds"]] > 0
    # A round reads the version once: this small one stays in VMEM.
    assert slowest["seconds"] > 2 * WEIGHTS / 819e9
    for word in ("slots", "generated tokens/s", f"{sampler['share']:.0%}"):
        assert word in report(plan)


def counted(name, **changes):
    config = gsm8k.get_config("lora" if changes.pop("lora", False) else None)
    config.update_from_flattened_dict(changes)
    return count_run(typed(config), published(name), "h200", from_checkpoint=True)


@pytest.mark.parametrize(
    ("name", "lora", "fits"),
    [("qwen3-4b", False, True), ("qwen3-8b", False, False), ("qwen3-8b", True, True)],
)
def test_one_gpu_by_count(name, lora, fits):
    plan = counted(name, lora=lora)
    learning, sampling = plan["memory"]["learning"], plan["memory"]["sampling"]
    count = parameter_count(published(name))
    assert plan["fits"] == fits
    assert plan["usable"] == pytest.approx(0.9 * 141e9)
    assert learning["embedded sampler"] == pytest.approx(2 * count, rel=1e-3)
    if lora:
        assert learning["frozen parameters"] == pytest.approx(2 * count, rel=1e-3)
        assert learning["gradients"] < 0.1 * count
    else:
        assert learning["parameters"] == 4 * count
        assert learning["gradients"] == 2 * 4 * count  # a sum over micro-batches, and the newest
    # 128 slots of 768 places; keys and values of 36 layers, 8 heads of 128, in bfloat16.
    cache = 128 * 768 * 36 * 2 * 8 * 128 * 2
    assert cache < sampling["KV cache"] < 1.05 * cache
    assert sampling["evaluated parameters"] == sampling["embedded sampler"]
    token = (2 * count + cache) / 4.8e12
    assert plan["sampler"]["seconds_per_token"] == pytest.approx(token, rel=0.02)
    passes = (2 + 1) if lora else (3 + 1)
    products = 2 * passes * count * 256 * 768 / 989e12
    assert 0.8 * products < plan["learning_seconds"] < 1.2 * products
    assert ("NOT FIT" in count_report(plan)) != fits


def test_slots_of_one_gpu_take_the_room_that_is_left():
    plan = counted("qwen3-0.6b")
    slots, room = plan["sampler"]["slots_that_fit"], plan["usable"]
    assert slots > 256
    used = counted("qwen3-0.6b", **{"rollout.max_sequences": slots})["memory"]["sampling"]
    assert 0.93 * room < sum(used.values()) <= room


def test_one_gpu_has_no_devices_to_split():
    with pytest.raises(UserError, match=r"rollout\.devices=1 .* 0\b"):
        counted("qwen3-0.6b", **apart(1))


def test_numbers_that_a_layer_saves_are_those_of_the_page():
    """Bytes of Qwen3-4B in bfloat16, from the table of docs/architecture.md."""
    saved = {policy: 2 * count for policy, count in saved_numbers(published("qwen3-4b")).items()}
    assert saved.pop("none") > 61440
    assert saved == {"offload": 0, "full": 5120, "attention": 13440, "dots": 61440}
