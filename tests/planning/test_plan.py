"""Plans and small train steps by the TPU compiler for a v5e 2x2, without a TPU."""

import functools
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from small_runs import typed

from configs import arithmetic
from oapl_jax.errors import RunError, UserError
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.sharding import AXES
from oapl_jax.plan import programs_of
from oapl_jax.planning import hardware, programs
from oapl_jax.planning.estimate import step_times
from oapl_jax.planning.hlo import Module, collective_bytes

HIDDEN, LAYERS, ROWS = 512, 2, 8
GIB = 2**30
LARGE = dict(hidden_size=HIDDEN, intermediate_size=1024, vocab_size=2048)
SMALL = dict(hidden_size=256, intermediate_size=512, vocab_size=1024, tie_word_embeddings=False)
# Tokens of a row, of a prompt and of a chunk, and changes to the architecture.
SIZES = {"large": (512, 128, 128, LARGE), "small": (128, 32, 64, SMALL)}


@pytest.fixture(scope="module")
def where():
    return hardware.open_slice("v5e:2x2")


@functools.cache
def compiled(name, remat="full", micro_batches=2, **mesh):
    """A small run on a v5e 2x2 with micro-batches of 8 rows, its compiled train step, its times."""
    where, (length, prompt, chunk, sizes) = hardware.open_slice("v5e:2x2"), SIZES[name]
    config = arithmetic.get_config().unlock()
    config.group_size, config.groups_per_step = 4, 2 * micro_batches
    config.data.max_prompt_tokens, config.rollout.max_response_tokens = prompt, length - prompt
    config.model.update(dtype="bfloat16", remat=remat)
    config.mesh.update(dict(data=1, fsdp=1, context=1, tensor=1) | mesh)
    config.rollout.sampler, config.evaluation.every = "fleet", 0
    config.learner.update(micro_batches=micro_batches, row_length=length)
    config.learner.update(rows_multiple=ROWS, logp_chunk=chunk)
    decoder = dict(head_dim=64, num_hidden_layers=LAYERS, max_position_embeddings=length) | sizes
    model = ModelConfig.from_hf(dict(config.model.architecture) | decoder, source="this test")
    mesh = hardware.make_mesh(where, **config.mesh)
    run = programs_of(typed(config), model, mesh, mesh, from_checkpoint=False)
    assert run.longest.tokens.shape == (micro_batches, ROWS, length)
    result = programs.compile_program(run.gradient_step(), programs.available_hbm(where))
    return run, result, step_times(run, where, result.traced, result.module)


@pytest.mark.parametrize(
    ("name", "mesh", "axes"),
    [
        ("large", dict(fsdp=4), {"fsdp"}),
        ("small", dict(fsdp=2, context=2), {"fsdp", "context"}),
        ("small", dict(fsdp=2, tensor=2), {"fsdp", "tensor"}),
    ],
)
def test_a_train_step_copies_no_argument_and_replicates_nothing(name, mesh, axes):
    run, result, times = compiled(name, **mesh)
    assert run.mesh.axis_names == AXES
    assert result.fits
    assert result.replicated == 0
    assert result.donated["arrays"] == len(jax.tree.leaves(run.state))
    assert result.donated["bytes"] >= programs.per_chip(run.state)
    assert result.donated["results not in an argument's place"] < 64 * 1024  # the metrics
    rows = times["collectives"].values()
    assert {part for row in rows for group in row for part in group.split("+")} == axes
    assert min(times["roofline"][term] for term in ("compute", "hbm", "interconnect")) > 0


def test_hbm_is_the_compilers_own_figure():
    run, result, _ = compiled("large", fsdp=4)
    layer = HIDDEN * (2 * 256 + 2 * 128 + 3 * 2 * HIDDEN)
    parameters = 4 * (LAYERS * layer + 2048 * HIDDEN) / 4  # float32, over 4 chips
    kinds, said = result.hbm, result.compiled.memory_analysis()
    assert parameters < kinds["parameters"] < 1.01 * parameters  # and the norms
    assert abs(kinds["optimizer"] - 2 * kinds["parameters"]) < 100  # and the counts
    assert min(kinds.values()) > 0
    made = said.temp_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes
    made = max(made, said.peak_memory_in_bytes - said.argument_size_in_bytes)
    own = said.argument_size_in_bytes + made + said.generated_code_size_in_bytes
    unused = programs.per_chip(run.batch.reference_logp)  # an argument all the same
    assert own < sum(kinds.values()) <= own + unused + 1024


def test_accumulation_keeps_one_gradient_more_and_nothing_else():
    run, two, _ = compiled("small", fsdp=2, context=2)
    _, one, _ = compiled("small", fsdp=2, context=2, micro_batches=1)
    made = lambda result: result.hbm["temporaries"] + result.hbm.get("activations", 0)
    assert 0 < made(two) - made(one) <= programs.per_chip(run.state.params)


def test_offloaded_activations_are_in_the_hosts_memory():
    _, kept, _ = compiled("small", fsdp=2, context=2)
    assert kept.offloaded == 0
    _, result, times = compiled("small", fsdp=4, remat="offload")
    layer = ROWS // 4 * 128 * 256 * 2  # its input, in bfloat16
    assert 2 * layer < result.offloaded < 16 * layer
    # Out and back for each micro-batch and layer: its input, attention's results in 4 heads of 64,
    # and a float32 of each head's row.
    one = 2 * layer + ROWS // 4 * 128 * 4 * 4
    assert times["host_traffic"] == 2 * 2 * 2 * one
    assert times["roofline"]["host"] == times["host_traffic"] / 16e9
    assert result.replicated == 0


def test_arrays_resharded_by_replication_are_counted(where):
    """No exchange between two chips leads from rows over all of them to columns and planes."""
    mesh = hardware.make_mesh(where, data=2, fsdp=2)
    rows, rest = (NamedSharding(mesh, P(*axes)) for axes in ([AXES[:2]], [None, *AXES[:2]]))
    x = jax.ShapeDtypeStruct((8, 8, 128), jnp.float32, sharding=rows)
    turned = lambda x: jnp.cos(jax.lax.with_sharding_constraint(jnp.sin(x), rest))
    program = programs.Program("turning", lambda: jax.jit(turned).trace(x), {"numbers": x}, {})
    available = programs.available_hbm(where)
    assert programs.compile_program(program, available).replicated == 1


def test_collectives_and_flops_of_the_train_step():
    _, _, times = compiled("large", fsdp=4)
    table, flops = times["collectives"], times["flops"]
    assert {"all-gather", "reduce-scatter"} <= table.keys()
    # Weights in bfloat16, three quarters of them from other chips, at least once in each pass over
    # two micro-batches.
    kernels = LAYERS * HIDDEN * (2 * 256 + 2 * 128 + 3 * 2 * HIDDEN)
    assert 2 * 2 * 2 * kernels * 3 / 4 < table["all-gather"]["fsdp"] < 60 * kernels
    assert times["roofline"]["interconnect"] == sum(r["fsdp"] for r in table.values()) / 100e9

    # The formula has no logits of prompts, and no products that attention's backward pass repeats.
    assert 1.0 < (flops["program"] - flops["remat"]) / flops["formula"] < 1.35
    assert 0.6 < flops["remat"] / (flops["formula"] / 3) < 1.2


def test_bytes_of_each_collective_equal_a_hand_computation(where):
    """A loop of five trips with one collective of each kind, over a mesh of 2 x 2."""
    mesh = hardware.make_mesh(where, data=2, fsdp=2)
    rows, columns = 256, 512

    def body(x, _):
        gathered = jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)
        scattered = jax.lax.psum_scatter(jnp.sin(gathered), "fsdp", tiled=True)
        summed = jax.lax.psum(jnp.cos(scattered), "data")
        return jax.lax.ppermute(jnp.tanh(summed), "fsdp", [(0, 1), (1, 0)]), None

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False
    )
    def loop(x):
        return jax.lax.scan(body, x, None, length=5)[0]

    rows_of_all = NamedSharding(mesh, P("fsdp"))
    x = jax.ShapeDtypeStruct((2 * rows, columns), jnp.float32, sharding=rows_of_all)
    part = rows * columns * 4
    text = jax.jit(loop).lower(x).compile().as_text()
    assert collective_bytes(Module(text or ""), mesh.shape) == {
        "all-gather": {"fsdp": 5 * part},  # the other chip's part
        "reduce-scatter": {"fsdp": 5 * part},  # the other chip's summand of my part
        "all-reduce": {"data": 5 * 2 * part / 2},
        "collective-permute": {"fsdp": 5 * part},
    }


def test_a_program_that_is_too_large_does_not_fit(where):
    available, device = programs.available_hbm(where), where.devices[0]
    assert available == 15.75 * GIB

    def found(size, beside, donated=True):
        sharding = jax.sharding.SingleDeviceSharding(device)
        x = jax.ShapeDtypeStruct((size // 4,), jnp.float32, sharding=sharding)
        traced = jax.jit(lambda x: x * 2, donate_argnums=(0,) if donated else ()).trace(x)
        program = programs.Program("doubling", lambda: traced, {"numbers": x}, beside)
        return programs.compile_program(program, available)

    assert found(15 * GIB, {}).fits
    refused = found(9 * GIB, {}, False)  # argument and result
    assert not refused.fits
    assert "15.75G" in refused.because
    not_compiled = found(9 * GIB, {"another copy": 9 * GIB})
    assert (not_compiled.fits, not_compiled.traced) == (False, None)
    assert "18.00 GiB of 15.75 GiB" in not_compiled.because
    crowded = found(7 * GIB, {"another copy": 2 * GIB}, False)
    assert not crowded.fits
    assert crowded.hbm["another copy"] == 2 * GIB
    assert crowded.because == "16.00 GiB of 15.75 GiB"


def analyzed(**figures):
    """A program with the memory analysis of a donated array of 16 bytes, but for these figures."""
    sizes = dict(argument_size=16, output_size=16, alias_size=16, temp_size=10, host_temp_size=0)
    sizes |= dict(peak_memory=16, generated_code_size=0) | figures
    said = {f"{name}_in_bytes": size for name, size in sizes.items() if size is not None}
    return types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(**said))


@pytest.mark.parametrize("figures", [dict(peak_memory=None), dict(temp_size=-1)])
def test_an_unknown_memory_analysis_is_an_error_that_names_the_figure(figures):
    with pytest.raises(RunError, match=next(iter(figures))):
        programs.memory_analysis(analyzed(**figures))


@pytest.mark.parametrize(("peak", "temporaries"), [(16 + 17, 10), (16 + 17 + 11, 11)])
def test_memory_of_the_host_is_no_hbm(peak, temporaries):
    """The compiler's peak includes what a step offloads; the greater of its two figures counts."""
    figures = programs.memory_analysis(analyzed(host_temp_size=17, peak_memory=peak))
    text = "HloModule m\n\nENTRY %main (p: bf16[8]) -> bf16[8] {\n"
    module = Module(text + "  ROOT %p = bf16[8]{0} parameter(0)\n}\n")
    given = jax.ShapeDtypeStruct(
        (8,), jnp.bfloat16, sharding=SingleDeviceSharding(jax.devices()[0])
    )
    program = programs.Program("", lambda: None, {"parameters": given}, {})
    found = programs.by_kind(program, figures, module)
    assert found == {"parameters": 16, "temporaries": temporaries}


def test_slices_and_meshes_that_do_not_exist_are_refused(where):
    for name in ("v9:2x2", "v5e", "v5e:2x2x2", "v5e:3x3", "v5p:4x4"):
        with pytest.raises(UserError, match=f"--topology={name}"):
            hardware.open_slice(name)
    for sizes in (dict(data=3, fsdp=-1), dict(data=-1, fsdp=-1), dict(data=1, fsdp=2)):
        with pytest.raises(UserError, match=r"mesh\.fsdp"):
            hardware.make_mesh(where, **sizes)
    with pytest.raises(UserError, match="v6e:8x8"):
        hardware.make_mesh(hardware.open_slice("v6e:8x8"), data=4, fsdp=16)


@pytest.mark.parametrize(
    ("name", "sizes", "links"),
    [
        ("v5e:8x8", dict(data=8, fsdp=8), dict(data=1, fsdp=1)),  # lines: one link at their ends
        ("v5e:8x16", dict(data=8, fsdp=16), dict(data=1, fsdp=2)),  # sixteen chips are a ring
        ("v5p:4x4x4", dict(data=4, fsdp=16), dict(data=2, fsdp=4)),
        ("v5p:2x4x4", dict(data=2, fsdp=16), dict(data=1, fsdp=2)),  # not made of whole cubes
    ],
)
def test_an_axis_has_the_links_of_its_part_of_the_torus(name, sizes, links):
    where = hardware.open_slice(name)
    mesh, link = hardware.make_mesh(where, **sizes), where.chip.link_bandwidth
    assert {a: hardware.axis_bandwidth(where, mesh, [a]) / link for a in links} == links


def test_the_command_sweeps_and_prints_and_writes_a_plan(tmp_path):
    command = [
        *(sys.executable, "-m", "oapl_jax.plan", "--config=configs/arithmetic.py", "--sweep"),
        *("--topology=v5e:2x2", f"--workdir={tmp_path}", "--enough=1"),
        *("--config.rollout.sampler=fleet", "--config.objective.denominator=learner"),
        *("--config.group_size=2", "--config.groups_per_step=4"),
    ]
    # The flag of docs/plan.md and tpu_setup/train.sh; an unknown one ends the compiler.
    flag = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000000"
    environment = os.environ | {"LIBTPU_INIT_ARGS": flag, "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    (kept,) = json.loads((tmp_path / "sweep-v5e-2x2.json").read_text()).items()
    assert kept[0].startswith("fsdp 4, remat full, 1 micro-batches")
    assert kept[0].endswith("1e+09 bytes/s")  # plans depend on more than the layout
    plan = json.loads((tmp_path / "v5e-2x2.json").read_text())
    assert plan == kept[1]
    assert plan["compiler_flags"] == flag
    assert plan["fits"]
    names = ["train step", "initialisation", "recomputed log-probs", "probe"]
    names += ["decoding", "placement", "prefill"]  # of the run's evaluation
    assert [p["program"] for p in plan["programs"]] == names
    for word in (flag, "FITS", "warmup.num_steps", "FLOPs", "all-gather", "MFU", "RAM", "slots"):
        assert word in done.stdout
    for number in ("host_memory", "publish_seconds", "fleet", "roofline", "flops", "hbm_traffic"):
        assert plan[number]
    held = dict(plan["host_memory"])
    del held["ram"]
    assert held.pop("total") == sum(held.values())
