"""The table of plans: what is made again, what stops a chain, and what the page says."""

import json
from types import SimpleNamespace

import pytest

from experiments import plan_table
from experiments.plan_table import RUNS, SMALLEST, Table, chains, digest_of, layouts, smallest
from oapl_jax.errors import UserError
from oapl_jax.planning.hardware import SLICES

FITS = {
    "fits": True,
    "because": "train step: 9.00 GiB of 15.75 GiB",
    "layout": "fsdp 64, remat full, 4 micro-batches",
    "replicated": 0,
    "roofline": dict(compute=2, hbm=1, interconnect=0.5, host=0, tokens_per_second=1e6, mfu=0.5),
    "fleet": dict(tokens_per_second=9e5),
}
NOT = {
    "fits": False,
    "because": "train step: 99.00 GiB of 15.75 GiB",
    "layout": "fsdp 4, remat offload, 64 micro-batches",
}
MODEL = "qwen3-0.6b"


@pytest.fixture
def files(tmp_path, monkeypatch):
    page = tmp_path / "plan.md"
    page.write_text("above\n<!-- tables -->\nold\n<!-- end -->\nbelow\n")
    monkeypatch.setattr(plan_table, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(plan_table, "PAGE", page)
    return page


def chain(*shapes):
    return [("competition_math", MODEL, f"v5e:{shape}") for shape in shapes]


def test_a_chain_ends_at_its_first_fit_and_keeps_valid_lines(files):
    asked, digest = [], digest_of("competition_math", MODEL)

    def make(run, model, topology):
        asked.append(topology)
        return FITS if topology == "v5e:2x4" else NOT

    kept = {
        f"competition_math {MODEL} v5e:1x1": NOT | {"code": digest},
        f"competition_math {MODEL} v5e:2x2": FITS | {"code": "of other code"},
    }
    table = Table(kept, make)
    table.follow(chain("1x1", "2x2", "2x4", "4x4"))
    assert asked == ["v5e:2x2", "v5e:2x4"]
    assert list(smallest(table.lines, MODEL)) == ["v5e:2x4", "not tried", "not tried"]
    text = files.read_text()
    assert text.startswith("above\n<!-- tables -->\n")
    assert text.endswith("<!-- end -->\nbelow\n")
    assert "old" not in text
    assert any(f"{MODEL} | v5e:2x4" in row and "not tried" in row for row in text.splitlines())


def test_a_line_is_made_again_for_other_settings_sizes_or_code(monkeypatch):
    digests = {digest_of(run, model) for run in RUNS for model in (MODEL, "qwen3-8b")}
    monkeypatch.setattr(plan_table, "plan_digest", lambda: "other code")
    assert len(digests | {digest_of("competition_math", MODEL)}) == 5


def test_the_smallest_slice_is_one_of_those_tried():
    of = lambda made: {f"competition_math {MODEL} v6e:{shape}": m for shape, m in made.items()}
    said = lambda made: list(smallest(of(made), MODEL))[2]
    assert said({"1x1": NOT, "2x2": NOT}) == "not v6e:1x1, v6e:2x2 (others not tried)"
    assert said(dict.fromkeys(SLICES["v6e"].values(), NOT)).endswith("v6e:16x16")
    assert said({"1x1": NOT, "2x2": FITS, "8x8": FITS}) == "v6e:2x2"
    assert said({"1x1": NOT, "8x8": FITS}) == "v6e:8x8 (smaller ones not all tried)"


def test_all_lines_are_made_of_runs_and_smallest_slices():
    alone = list(chains(["code_contests"], ()))
    assert all(len(lines) == 1 for lines in alone)
    assert {lines[0][2].split(":")[0] for lines in alone} == set(SLICES)
    (first, *_) = chains([SMALLEST], [MODEL])
    assert first == [("competition_math", MODEL, f"v5e:{s}") for s in SLICES["v5e"].values()]


def test_rows_of_the_page():
    def cells(name, line):
        return [cell.strip() for cell in plan_table.row(name, line).strip("|").split("|")]

    sizes = ["v5e:8x8", FITS["layout"], "9.00 GiB of 15.75 GiB", "2, 1, 0.5, 0"]
    assert cells("v5e:8x8", FITS) == [*sizes, "1,000,000", "50%", "900,000"]
    recorded = {"fleet": FITS["fleet"] | {"tokens_per_second": 0.0}}
    *_, mfu, asked = cells("v5e:8x8", FITS | recorded)
    assert (mfu, asked.replace(",", "").replace(" ", "").isalpha()) == ("50%", True)
    assert "3 arrays" in cells("v5e:8x8", FITS | {"replicated": 3})[1].removeprefix(FITS["layout"])
    name, layout, memory, *rest = cells("v5e:2x2", NOT)
    assert (name, memory, set(rest)) == ("v5e:2x2", NOT["because"], {""})
    assert layout.removesuffix(NOT["layout"]) not in ("", layout)


def test_nothing_is_resharded_by_replication_on_any_slice_that_the_page_has():
    kept = json.loads(plan_table.TABLE.read_text())
    assert {key: made for key, made in kept.items() if made["fits"] and made["replicated"]} == {}
    assert sum(made["fits"] for made in kept.values()) > 40


SAMPLER = {
    "mesh": dict(data=8, fsdp=1, context=1, tensor=1),
    "slots": 256,
    "slots_that_fit": 1024,
    "tokens_per_second": 3e4,
    "share": 0.75,
}
HOST_LINE = {"fits": True, "used": 9 * 2**30, "room": 16 * 2**30, "learning": 2.5}
HOST_LINE |= {"sampler": SAMPLER}


def test_models_of_one_host(files):
    files.write_text("above\n<!-- hosts -->\nold\n<!-- end -->\nbelow\n")
    split = SAMPLER | {"mesh": SAMPLER["mesh"] | dict(data=2, tensor=4)}
    lines = {
        f"gsm8k {MODEL} v5e:2x4": HOST_LINE,
        f"gsm8k {MODEL} v6e:2x4": {**HOST_LINE, "fits": False, "because": "decoding: too large"},
        f"gsm8k:lora {MODEL} v5e:2x4": {**HOST_LINE, "sampler": split},
        f"gsm8k:lora {MODEL} v6e:2x4": {**HOST_LINE, "fits": False},
    }
    plan_table.write_page(lines)
    text = files.read_text()
    assert text.startswith("above\n<!-- hosts -->\n")
    assert text.endswith("<!-- end -->\nbelow\n")
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines()]
    first, *rows = [row for row in rows if row[0] == MODEL]
    assert first == [MODEL, "all weights, adapters", "nothing", "not tried"]
    figures = ["256, 1,024", "2.50", "30,000", "75%"]
    assert rows[0] == [MODEL, "all weights", "v5e:2x4", "9.0 of 16.0 GiB", "whole", *figures]
    assert "decoding: too large" in rows[1][3]
    assert rows[2][1:5] == ["adapters", "v5e:2x4", "9.0 of 16.0 GiB", "tensor 4"]
    assert "9.0 of 16.0 GiB" in rows[3][3]


@pytest.mark.parametrize("fitting", [64, 1])
def test_a_host_is_planned_again_with_what_a_refusal_proposes(monkeypatch, fitting):
    asked = []

    def plan_run(config, *_, **__):
        asked.append((config.rollout.mesh.tensor, config.rollout.max_sequences))
        remedies = {1: ["rollout.mesh.data=2", "rollout.mesh.tensor=4"]}
        remedies = remedies.get(config.rollout.mesh.tensor, ["rollout.max_sequences=64"])
        fits = asked[-1] == (4, fitting)
        program = dict(program="decoding", fits=fits, because="so", hbm={"all": 7})
        return {
            "fits": fits,
            "remedies": [] if fits else remedies,
            "programs": [program | {"compile_seconds": 1.0, "resharded by replication": 0}],
            "hbm": {"available": 8},
            "roofline": {"seconds": 2.0},
            "sampler": SAMPLER,
        }

    monkeypatch.setattr(plan_table, "open_slice", lambda topology: None)
    monkeypatch.setattr(plan_table, "plan_run", plan_run)
    made = plan_table.line("gsm8k:lora", MODEL, "v5e:2x4")
    assert asked == [(1, 128), (4, 128), (4, 64)]
    assert (made["fits"], made["used"], made["room"]) == (fitting == 64, 7, 8)
    assert made["because"] == "decoding: so"


def test_a_host_that_refuses_the_sizes_has_a_line_that_says_so(monkeypatch, files):
    def plan_run(*_, **__):
        raise UserError("rollout.mesh.tensor=8 does not divide")

    monkeypatch.setattr(plan_table, "open_slice", lambda topology: None)
    monkeypatch.setattr(plan_table, "plan_run", plan_run)
    made = plan_table.line("gsm8k", MODEL, "v5e:2x4")
    assert not made["fits"]
    files.write_text("<!-- hosts -->\nold\n<!-- end -->\n")
    plan_table.write_page({f"gsm8k {MODEL} v5e:2x4": made})
    assert "rollout.mesh.tensor=8 does not divide" in files.read_text()


def test_hosts_have_lines_of_all_weights_and_of_adapters():
    lines = [key for keys in chains([plan_table.ONE_HOST], [MODEL]) for key in keys]
    assert len(lines) == 6
    assert {run for run, _, _ in lines} == {"gsm8k", "gsm8k:lora"}
    assert len({digest_of(run, MODEL) for run, _, _ in lines}) == 2
    assert {topology for _, _, topology in lines} == set(plan_table.HOSTS)
    few = [key for keys in chains([plan_table.ONE_HOST], [MODEL], ["h200"]) for key in keys]
    assert {topology for _, _, topology in few} == {"h200"}


@pytest.mark.parametrize("most", [4, 2, 0])
def test_of_layouts_that_do_not_fit_the_one_that_splits_no_row_is_shown(monkeypatch, most):
    """Rows can be split over `most` chips; over more is refused, and with 0 all is."""

    def plan_run(config, *_, **__):
        if config.mesh.context > most:
            raise UserError("this mesh can't be")
        program = dict(program="train step", fits=False, because=f"{config.mesh.context} ways")
        numbers = {"hbm": {}, "compile_seconds": 1.0, "resharded by replication": 0}
        return {"fits": False, "programs": [program | numbers]}

    slice_of_4 = SimpleNamespace(hosts=1, devices=range(4))
    monkeypatch.setattr(plan_table, "open_slice", lambda topology: slice_of_4)
    monkeypatch.setattr(plan_table, "plan_run", plan_run)
    made = plan_table.line("competition_math", MODEL, "v5e:2x2")
    if not most:
        assert made == {"fits": False, "because": "refused: this mesh can't be"}
    else:
        assert made["layout"] == "fsdp 4, remat offload, 64 micro-batches"
        assert made["because"] == "train step: 1 ways"


def test_layouts_go_from_whole_rows_to_parts_and_then_to_the_hosts():
    meshes = {"fsdp 64": 4, "fsdp 32 context 2": 8, "fsdp 16 context 4": 16, "fsdp 8 context 8": 32}
    assert [str(layout) for layout in layouts(256, 2560, 64)] == [
        f"{mesh}, remat {remat}, {parts} micro-batches"
        for remat in ("full", "offload")
        for mesh, parts in meshes.items()
    ]
    assert str(next(layouts(256, 2560, 256))) == "fsdp 256, remat full, 1 micro-batches"
    assert str(next(layouts(256, 96, 64))) == "data 2 fsdp 32, remat full, 4 micro-batches"
    assert [layout.mesh["context"] for layout in layouts(256, 2560, 4)] == [1, 2, 4, 1, 2, 4]
