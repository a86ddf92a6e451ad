"""Layouts that a sweep tries, in order; refused layouts; kept plans."""

import dataclasses
import functools
import itertools
import json
from unittest import mock

import numpy as np
import pytest
from etils import epath
from small_runs import typed

from configs import arithmetic
from oapl_jax.errors import RunError, UserError
from oapl_jax.model.published import published
from oapl_jax.plan import sweep_run, with_layout
from oapl_jax.planning import layouts
from oapl_jax.planning.hardware import CHIPS, Slice
from oapl_jax.planning.layouts import Layout, kept_plan, layouts_of, meshes, plan_digest, sweep

FITS = dict(fits=True, chip_fits=True)
NOT = dict(fits=False, chip_fits=False)


@pytest.fixture
def config():
    return typed(arithmetic.get_config())


def test_a_layout_becomes_settings(config):
    layout = Layout(dict(data=2, fsdp=4, context=2, tensor=1), "full", 4)
    new = with_layout(config, layout)
    assert dict(**new.mesh) == dict(data=2, fsdp=4, context=2, tensor=1)
    assert (new.model.remat, new.learner.micro_batches, new.learner.rows_multiple) == ("full", 4, 8)
    assert new.learner.row_length == 1024  # a multiple of 512 on each of two chips
    assert config.learner.row_length == 64
    assert str(layout) == "data 2 fsdp 4 context 2, remat full, 4 micro-batches"


def test_meshes_fill_the_slice_and_divide_sequences_and_model():
    sizes = published("qwen3-4b")
    found = meshes(256, sizes, 64)
    # The simplest first, and each axis before any two.
    assert found[0] == dict(data=1, fsdp=64, context=1, tensor=1)
    doubled = {axis for mesh in found[1:4] for axis in mesh if mesh[axis] == 2}
    assert doubled == {"data", "context", "tensor"}
    assert not any(a == b for a, b in itertools.combinations(found, 2))
    for mesh in found:
        assert np.prod(list(mesh.values())) == 64
        assert 8 % mesh["tensor"] == 2560 % mesh["fsdp"] == 0
        for layout in layouts_of(256, mesh, "none"):
            assert (layout.mesh, layout.remat) == (mesh, "none")
            assert 256 % (mesh["data"] * mesh["fsdp"] * layout.micro_batches) == 0
    assert [layout.micro_batches for layout in layouts_of(256, found[0], "full")] == [1, 2, 4]
    few = dataclasses.replace(sizes, num_kv_heads=2)
    assert {mesh["tensor"] for mesh in meshes(256, few, 64)} == {1, 2}


MESHES = [dict(data=1, fsdp=fsdp, context=8 // fsdp, tensor=1) for fsdp in (8, 4, 2, 1)]


def tried_and_found(results, enough):
    """Layouts tried and found; those that are not in `results` do not fit."""
    tried = []

    def plan(layout):
        tried.append((layout.mesh["fsdp"], layout.remat, layout.micro_batches))
        return results.get(tried[-1], NOT)

    of = lambda mesh, remat: [Layout(mesh, remat, m) for m in (1, 2)]
    found = sweep(MESHES, ["full", "offload", "none"], of, plan, enough=enough)
    return tried, [(x.mesh["fsdp"], x.remat, p["roofline"]["seconds"]) for x, p in found]


def fitting(seconds):
    return FITS | {"roofline": {"seconds": seconds}}


def test_a_sweep_tries_each_mesh_and_then_the_other_policies_on_the_fastest():
    results = {(8, "full", 2): fitting(4.0), (2, "full", 1): fitting(3.0)}
    results |= {(4, "full", 1): NOT | {"refused": "it"}, (2, "none", 2): fitting(2.0)}
    tried, found = tried_and_found(results, enough=2)
    assert tried == [
        *((8, "full", 1), (8, "full", 2), (4, "full", 1), (4, "full", 2), (2, "full", 1)),
        *((2, "offload", 1), (2, "offload", 2), (2, "none", 1), (2, "none", 2)),
    ]
    assert found == [(2, "none", 2.0), (2, "full", 3.0), (8, "full", 4.0)]


def test_if_nothing_fits_with_the_first_policy_all_meshes_get_the_others():
    tried, found = tried_and_found({(4, "offload", 2): fitting(1.0)}, enough=1)
    assert tried[:8] == [(fsdp, "full", m) for fsdp in (8, 4, 2, 1) for m in (1, 2)]
    assert tried[8:] == [(fsdp, "offload", m) for fsdp in (8, 4) for m in (1, 2)]
    assert found == [(4, "offload", 1.0)]
    # More micro-batches do not help a host that is too small.
    tried, found = tried_and_found({(8, "full", 1): FITS | {"fits": False}}, enough=6)
    assert (8, "full", 2) not in tried
    assert not found


def test_an_interrupted_sweep_keeps_its_plans(tmp_path):
    path = epath.Path(tmp_path) / "kept.json"
    assert kept_plan(path, "a", lambda: FITS) == FITS
    assert json.loads(path.read_text()) == {"a": FITS}
    assert kept_plan(path, "a", lambda: pytest.fail("made again")) == FITS
    assert kept_plan(path, "a, slower storage", lambda: NOT) == NOT


def test_kept_plans_depend_on_code_and_compiler_flags(monkeypatch):
    before = plan_digest()
    for name in layouts.SOURCES:
        assert list(layouts.PACKAGE.glob(f"{name}.py")), name
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_some_flag=1")
    assert plan_digest() != before


def swept(config, plan_of, path):
    where, keep = Slice(CHIPS["v5e"], (2, 2), range(4)), functools.partial(kept_plan, path)
    return sweep_run(config, published("qwen3-0.6b"), where, plan_of, keep, enough=1)


def test_a_refused_layout_is_kept_and_skipped(config, tmp_path):
    def plan_of(chosen):
        if chosen.mesh.fsdp == 4:
            raise RunError("the compiler gives up")
        if chosen.mesh.context == 2:
            raise UserError("a host needs a group")
        programs = [{"hbm": {"parameters": 1}}]
        bound = {"seconds": 1.0, "binds": "hbm", "mfu": 0.5}
        return FITS | {"mesh": dict(**chosen.mesh), "programs": programs, "roofline": bound}

    path = epath.Path(tmp_path) / "kept.json"
    for planner in (plan_of, lambda _: pytest.fail("made again")):
        assert swept(config, planner, path)["mesh"]["tensor"] == 2
    refused = {plan.get("refused") for plan in json.loads(path.read_text()).values()}
    assert {"the compiler gives up", "a host needs a group"} < refused
    no_layout = mock.Mock(side_effect=UserError("groups_per_step=32 can't be divided"))
    with pytest.raises(UserError, match="groups_per_step=32"):
        swept(config, no_layout, epath.Path(tmp_path) / "other.json")
