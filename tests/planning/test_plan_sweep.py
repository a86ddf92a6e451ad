"""Layouts that a sweep tries, in their order, and what becomes of those that are refused."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from configs import arithmetic
from oapl_jax.errors import RunError, UserError
from oapl_jax.model.published import published
from oapl_jax.plan import swept
from oapl_jax.planning import digest
from oapl_jax.planning.layouts import Choice, applied, family, layouts, meshes
from oapl_jax.planning.sweep import Record, sweep
from oapl_jax.planning.topology import Slice

CHOICE = Choice(data=2, fsdp=4, context=2, tensor=1, remat="full", micro_batches=4)


@pytest.fixture
def config():
    return arithmetic.get_config().unlock()


def test_a_choice_becomes_settings(config):
    new = applied(config, CHOICE)
    assert new.mesh.to_dict() == dict(data=2, fsdp=4, context=2, tensor=1)
    assert (new.model.remat, new.learner.micro_batches, new.learner.rows_multiple) == ("full", 4, 8)
    assert new.learner.row_length == 1024  # a multiple of 512 on each of two chips
    assert config.learner.row_length == 64
    assert str(CHOICE) == "data 2 fsdp 4 context 2, remat full, 4 micro-batches"


def test_meshes_fill_the_slice_and_split_whole_sequences(config):
    sizes = published("qwen3-4b")
    found = meshes(config, sizes, 64)
    # The simplest first, and each axis before any two.
    assert found[0] == dict(data=1, fsdp=64, context=1, tensor=1)
    assert {axis for mesh in found[1:4] for axis in mesh if mesh[axis] == 2} == {
        *("data", "context", "tensor")
    }
    assert not any(a == b for a, b in itertools.combinations(found, 2))
    for mesh in found:
        assert np.prod(list(mesh.values())) == 64
        assert 8 % mesh["tensor"] == 2560 % mesh["fsdp"] == 0
        for choice in family(config, mesh, "none"):
            assert (choice.mesh, choice.remat) == (mesh, "none")
            assert 256 % (choice.data * choice.fsdp * choice.micro_batches) == 0
    assert [c.micro_batches for c in family(config, found[0], "full")] == [1, 2, 4]
    few = dataclasses.replace(sizes, num_kv_heads=2)
    assert {mesh["tensor"] for mesh in meshes(config, few, 64)} == {1, 2}


def test_layouts_of_the_table_go_from_whole_rows_to_parts_and_then_to_the_hosts():
    assert [str(layout) for layout in layouts(256, 2560, 64)] == [
        "fsdp 64, remat full, 4 micro-batches",
        "fsdp 32 context 2, remat full, 8 micro-batches",
        "fsdp 16 context 4, remat full, 16 micro-batches",
        "fsdp 8 context 8, remat full, 32 micro-batches",
        "fsdp 64, remat offload, 4 micro-batches",
        "fsdp 32 context 2, remat offload, 8 micro-batches",
        "fsdp 16 context 4, remat offload, 16 micro-batches",
        "fsdp 8 context 8, remat offload, 32 micro-batches",
    ]
    assert str(next(layouts(256, 2560, 256))) == "fsdp 256, remat full, 1 micro-batches"
    assert str(next(layouts(256, 96, 64))) == "data 2 fsdp 32, remat full, 4 micro-batches"
    assert [layout.context for layout in layouts(256, 2560, 4)] == [1, 2, 4, 1, 2, 4]


MESHES = [dict(data=1, fsdp=fsdp, context=8 // fsdp, tensor=1) for fsdp in (8, 4, 2, 1)]
FITS = dict(fits=True, chip_fits=True)
NOT = dict(fits=False, chip_fits=False)


def tried_and_found(results, enough):
    """The layouts tried and found, of which `results` knows those that do not just not fit."""
    tried = []

    def plan(choice):
        tried.append((choice.fsdp, choice.remat, choice.micro_batches))
        return results.get(tried[-1], NOT)

    of = lambda mesh, remat: [Choice(**mesh, remat=remat, micro_batches=m) for m in (1, 2)]
    found = sweep(MESHES, ["full", "offload", "none"], of, plan, enough=enough)
    return tried, [(c.fsdp, c.remat, p["roofline"]["seconds"]) for c, p in found]


def fitting(seconds):
    return FITS | {"roofline": {"seconds": seconds}}


def test_a_sweep_tries_each_mesh_and_then_the_other_policies_on_the_fastest():
    results = {
        (8, "full", 2): fitting(4.0),
        (4, "full", 1): NOT | {"refused": "it does not compile"},
        (2, "full", 1): fitting(3.0),
        (2, "none", 2): fitting(2.0),
    }
    tried, found = tried_and_found(results, enough=2)
    assert tried == [
        *((8, "full", 1), (8, "full", 2), (4, "full", 1), (4, "full", 2), (2, "full", 1)),
        *((2, "offload", 1), (2, "offload", 2), (2, "none", 1), (2, "none", 2)),
    ]
    assert found == [(2, "none", 2.0), (2, "full", 3.0), (8, "full", 4.0)]


def test_where_nothing_fits_with_the_first_policy_all_meshes_get_the_others():
    tried, found = tried_and_found({(4, "offload", 2): fitting(1.0)}, enough=1)
    assert tried[:8] == [(fsdp, "full", m) for fsdp in (8, 4, 2, 1) for m in (1, 2)]
    assert tried[8:] == [(fsdp, "offload", m) for fsdp in (8, 4) for m in (1, 2)]
    assert found == [(4, "offload", 1.0)]


def test_more_micro_batches_are_not_tried_where_the_host_is_too_small():
    tried, found = tried_and_found({(8, "full", 1): FITS | {"fits": False}}, enough=6)
    assert (8, "full", 2) not in tried
    assert not found


def test_a_sweep_goes_on_where_it_stopped(tmp_path):
    path = epath.Path(tmp_path) / "record.json"
    assert Record(path).get("a", lambda: FITS) == FITS
    assert json.loads(path.read_text()) == {"a": FITS}
    assert Record(path).get("a", lambda: pytest.fail("made again")) == FITS
    assert Record(path, ", slower storage").get("a", lambda: {"fits": False}) == {"fits": False}


def test_kept_plans_depend_on_code_and_flags_and_not_on_words(monkeypatch):
    before = digest.code()
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_some_flag=1")
    assert digest.code() != before
    for name in digest.SHAPING:
        assert list(digest.PACKAGE.glob(f"{name}.py")), name


def swept_by_command(config, plan_of, path):
    where = Slice("v5e", (2, 2), range(4))
    return swept(config, published("qwen3-0.6b"), where, plan_of, Record(path), enough=1)


def test_a_refused_layout_is_recorded_and_passed_over(config, tmp_path, capsys):
    def plan_of(chosen, sizes, where):
        if chosen.mesh.fsdp == 4:
            raise RunError("the compiler gives up")
        if chosen.mesh.context == 2:
            raise UserError("a host needs a group")
        programs = [{"hbm": {"parameters": 1}}]
        bound = {"seconds": 1.0, "binds": "hbm", "mfu": 0.5}
        return FITS | {"mesh": chosen.mesh.to_dict(), "programs": programs, "roofline": bound}

    path = epath.Path(tmp_path) / "record.json"
    assert swept_by_command(config, plan_of, path)["mesh"]["tensor"] == 2
    assert "refused: the compiler gives up" in capsys.readouterr().out
    refused = [plan["refused"] for plan in Record(path).plans.values() if "refused" in plan]
    assert {"the compiler gives up", "a host needs a group"} == set(refused)
    again = lambda *_: pytest.fail("made again")
    assert swept_by_command(config, again, path)["mesh"]["tensor"] == 2


def test_where_all_is_refused_the_last_refusal_is_said(config, tmp_path):
    def plan_of(*_):
        raise UserError("groups_per_step=32 can't be divided over 64 hosts")

    with pytest.raises(UserError, match=r"nothing fits v5e:2x2.*the last refusal: groups_per_step"):
        swept_by_command(config, plan_of, epath.Path(tmp_path) / "record.json")


def test_the_command_sweeps(tmp_path):
    command = [
        *(sys.executable, "-m", "oapl_jax.plan", "--config=configs/arithmetic.py", "--sweep"),
        *("--topology=v5e:2x2", f"--workdir={tmp_path}", "--enough=1"),
        *("--config.rollout.sampler=fleet", "--config.evaluation.every=0"),
        *("--config.group_size=2", "--config.groups_per_step=4"),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    (kept,) = json.loads((tmp_path / "sweep-v5e-2x2.json").read_text()).items()
    assert kept[0].startswith("fsdp 4, remat full, 1 micro-batches; configuration ")
    assert json.loads((tmp_path / "v5e-2x2.json").read_text()) == kept[1]
    assert kept[1]["fits"]
    said = ("trying fsdp 4", "Fits, the least time of a step first:", "FITS", "tokens/s")
    assert all(words in done.stdout for words in said)
