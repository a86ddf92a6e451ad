"""Benchmarks from the files of a configuration to numbers, with the embedded sampler; and a real
process that is killed on the way."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath
from flax.serialization import msgpack_restore
from small_runs import IN_PROCESS, ROOT, cached_programs, opened, small_arithmetic

from oapl_jax import build, rewards
from oapl_jax.config import save_config
from oapl_jax.errors import UserError
from oapl_jax.evaluate import (
    benchmark_prompts,
    check_flags,
    evaluate_benchmarks,
    show_responses,
)
from oapl_jax.learner import train_step
from oapl_jax.rewards.grader import Grade, Grader
from oapl_jax.rollout.dataset import Dataset
from oapl_jax.structs import decode_groups

SUMS = {"1+1=": "2", "2+3=": "5", "4+4=": "8", "9-8=": "1", "3+4-1=": "6", "8-5=": "3"}
PROBLEMS = list(SUMS.items())
LONG = ("+".join("123456789") + "=", "45")
SMALL = {
    "data.train_size": 20,
    "data.generator.min_terms": 2,
    "data.generator.max_terms": 2,
    "rollout.max_sequences": 24,  # portions of six requests
    "rollout.reward_threads": 2,
}
CONFIG = """
import json
from configs import arithmetic

def get_config(arg=None):
    config = arithmetic.get_config(arg)
    config.update_from_flattened_dict({settings!r})
    with config.unlocked():
        config.benchmarks = {benchmarks!r}
    return config
"""


class Shop:
    """A workdir with a checkpoint step 3, benchmarks as files, and a compile cache."""

    def __init__(self, root: Path):
        self.root, self.workdir = root, root / "workdir"
        self.settings = {**IN_PROCESS, **SMALL, "data.data_dir": str(root / "data")}
        self.benchmarks = {
            "sums": self.table("sums", PROBLEMS),
            "more": self.table("more", [*PROBLEMS[:2], LONG]),
            "foreign": self.table("foreign", PROBLEMS[:1], task="countdown"),
            "gone": {**self.table("gone", PROBLEMS[:1]), "path": "/nowhere"},
            "short": {**self.table("short", PROBLEMS[:3]), "rows": 5},
        }
        content = CONFIG.format(settings=self.settings, benchmarks=self.benchmarks)
        (root / "config.py").write_text(content)
        job = self.job()
        state = train_step.init_state(job.model, job.optimizer, job.mesh, 0)
        save_config(job.workdir, job.config.to_dict())
        job.checkpoints.save(3, state, {}, b"", probe=job.versions.probe(state.params))
        job.close()

    def table(self, name, problems, task="chain_sum"):
        rows = [json.dumps({"question": q, "target": a}) for q, a in problems]
        (self.root / f"{name}.jsonl").write_text("\n".join(rows))
        options = dict(task=task, columns=dict(problem="question", answer="target"), max_tests=0)
        path = str(self.root / f"{name}.jsonl")
        table = dict(kind="table", path=path, files=(), rows=len(problems), part=(0, 100))
        return {**table, "options": options}

    def job(self, **settings):
        config = small_arithmetic(self.settings, **settings)
        with config.unlocked():
            config.benchmarks = self.benchmarks
        return opened(config, self.workdir)

    def run(self, to, *names, n=64, step=None, version_dir=None, **settings):
        said, job = [], self.job(**settings)
        what = dict(step=step, version_dir=version_dir, n=n, log=said.append)
        try:
            done = evaluate_benchmarks(job, names or ("sums",), epath.Path(to), **what)
        finally:
            job.close()
        return SimpleNamespace(directory=Path(done[0]), results=done[1], said=said)

    def start(self, *arguments):
        command = [sys.executable, "-m", "oapl_jax.evaluate", f"--workdir={self.workdir}"]
        command += [f"--config={self.root / 'config.py'}", *arguments]
        output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen(command, cwd=ROOT, env=cached_programs(), **output)


@pytest.fixture(scope="module")
def shop(tmp_path_factory, kept_programs):
    return Shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def unbroken(shop, tmp_path_factory):
    return shop.run(tmp_path_factory.mktemp("unbroken"))


def contents(directory, name="sums"):
    """(prompt, index) -> tokens, sum of log-probabilities, finish reason."""
    found, problems = {}, json.loads((directory / name / "result.json").read_text())["problems"]
    for group in Dataset(epath.Path(directory / name / "responses")):
        for index, rollout in enumerate(group.rollouts, group.prompt.stream_index // problems):
            assert (group.prompt.id, index) not in found
            logp = rollout.behavior_logp.sum(dtype=float)
            found[group.prompt.id, index] = rollout.tokens.tolist(), logp, rollout.finish_reason
    return found


def files(directory):
    return {path: path.stat().st_mtime_ns for path in (directory / "sums" / "responses").iterdir()}


def test_the_result_follows_from_the_responses(shop, unbroken):
    """Counted again from the token ids, by another verifier."""
    result, found = unbroken.results["sums"], contents(unbroken.directory)
    assert unbroken.directory.name == "v000003"
    assert len(found) == 6 * 64
    prompts = {p.id: p for p in benchmark_prompts(shop.job(), "sums")[0]}
    tokenizer = shop.job().policy.tokenizer
    right = dict.fromkeys(prompts, 0)
    for (prompt_id, _), (tokens, _, finish) in found.items():
        numbers = re.findall(r"\d+", tokenizer.decode(tokens, skip_special_tokens=True))
        answered = bool(numbers) and int(numbers[-1]) == int(prompts[prompt_id].answer)
        right[prompt_id] += answered and finish == "stop"
    assert 0 < sum(right.values()) < 384
    assert {p["id"]: p["correct"] for p in result["per_problem"]} == right
    assert [p["id"] for p in result["per_problem"]] == list(prompts)
    tokens = sum(len(tokens) for tokens, _, _ in found.values())
    assert result["length"]["value"] == pytest.approx(tokens / 384)
    nats = -sum(logp for _, logp, _ in found.values())
    assert result["entropy"]["value"] == pytest.approx(nats / tokens)
    cut = sum(finish == "length" for _, _, finish in found.values())
    assert 0 < result["truncated"]["value"] == pytest.approx(cut / 384)
    assert result["avg@n"]["value"] == pytest.approx(sum(right.values()) / 384)
    assert result["seconds"]["sampling"] > 0
    saved = json.loads((unbroken.directory / "sums" / "result.json").read_text())
    assert saved == json.loads(json.dumps(result))
    assert unbroken.said[-1] == "sums: responses graded: 384 of 384"


def test_text_stands_beside_the_ids(shop, unbroken):
    directory, decode = unbroken.directory / "sums", shop.job().response_text
    texts: dict[str, list[str]] = {}
    for shard in sorted((directory / "responses").glob("*.array_record")):
        for content in ArrayRecordDataSource([str(shard)]):
            (group,) = decode_groups(content)
            (stored,) = msgpack_restore(content)["groups"]
            assert stored["texts"] == [decode(rollout.tokens) for rollout in group.rollouts]
            texts.setdefault(group.prompt.id, []).extend(stored["texts"])
    lines = [json.loads(line) for line in (directory / "grades.jsonl").read_text().splitlines()[1:]]
    assert {line["question"] for line in lines} == set(SUMS)
    for prompt_id, expected in texts.items():
        found = [text for line in lines if line["prompt"] == prompt_id for text in line["response"]]
        assert sorted(found) == sorted(expected)
    assert {v for line in lines for v in line["verdict"]} == {"right", "wrong"}


@pytest.mark.parametrize("wrong", [False, True])
def test_responses_are_shown(shop, capsys, wrong):
    job, graded = shop.job(), {}

    def grade(prompt, rollout):
        right = prompt.stream_index % 2 == 0
        graded[prompt.stream_index] = job.response_text(rollout.tokens)
        return Grade(float(right), f"final {prompt.id}", "right" if right else "wrong", "as told")

    job.grader = SimpleNamespace(grade=grade, close=lambda: None)
    step, params = job.params_at(None)
    show_responses(job, step, params, "train", 4, wrong=wrong)
    job.close()
    said = capsys.readouterr().out
    prompts = job.prompts("train")
    shown = [prompts[i] for i in (range(1, 8, 2) if wrong else range(4))]
    assert re.findall(r"prompt (\w{16})", said) == [prompt.id for prompt in shown]
    for prompt in shown:
        block = said[said.index(f"prompt {prompt.id}") :].partition("[")[0]
        parts = (prompt.text, prompt.answer, f"final {prompt.id}", "as told")
        assert all(part in block for part in parts)
        assert graded[prompt.stream_index].splitlines()[0] in block
    assert f"4 responses shown of {8 if wrong else 4} sampled" in said


def test_killed_it_ends_with_the_same_samples(shop, unbroken, tmp_path):
    command = ("--benchmark=sums", "--n=64", f"--to={tmp_path}")
    process, directory = shop.start(*command), tmp_path / "v000003"
    responses = directory / "sums" / "responses"
    while process.poll() is None:
        if (responses / "manifest.json").exists():  # the first shard is whole
            process.kill()
            break
        time.sleep(0.002)
    output, _ = process.communicate()
    assert process.returncode == -9, output
    assert not (responses.parent / "result.json").exists()
    shard = (responses / "groups-00000.array_record").read_bytes()
    output, _ = (process := shop.start(*command)).communicate(timeout=300)
    assert process.returncode == 0, output
    assert (responses / "groups-00000.array_record").read_bytes() == shard
    mine, theirs = contents(directory), contents(unbroken.directory)
    assert mine.keys() == theirs.keys()
    for key, (tokens, logp, finish) in mine.items():
        assert (tokens, finish) == (theirs[key][0], theirs[key][2])
        assert logp == pytest.approx(theirs[key][1], abs=1e-4)
    result = json.loads((directory / "sums" / "result.json").read_text())
    assert all(result[name] == unbroken.results["sums"][name] for name in ("pass@k", "maj@n"))
    assert "pass@64" in output
    assert (directory / "results.md").read_text().strip() in output
    assert (directory / "pass_at_k.png").read_bytes().startswith(b"\x89PNG")


def test_a_changed_grader_regrades_without_sampling(shop, unbroken, monkeypatch, tmp_path):
    monkeypatch.setattr(build.Run, "open_sampler", None)
    (tmp_path / "__init__.py").write_text("other = 1")
    before = files(unbroken.directory)
    again = shop.run(unbroken.directory.parent)
    assert again.said == []  # not even graded
    with monkeypatch.context() as changed:
        changed.setattr(rewards, "__file__", str(tmp_path / "__init__.py"))
        changed.setattr(Grader, "grade", lambda *_: Grade(1.0, "", "right", "as told"))
        changed.setattr(build.Run, "check_grader", lambda run: None)
        again = shop.run(unbroken.directory.parent)
    assert again.results["sums"]["avg@n"]["value"] == 1
    assert again.said[-1] == "sums: responses graded: 384 of 384"
    assert files(unbroken.directory) == before
    again = shop.run(unbroken.directory.parent)
    assert again.results["sums"]["pass@k"] == unbroken.results["sums"]["pass@k"]


def test_a_published_version_serves_as_well_and_n_may_be_raised(shop, unbroken, tmp_path):
    weights = unbroken.directory.parent / "weights" / "v000003"
    first = shop.run(tmp_path, "sums", "more", n=8, version_dir=str(weights))
    theirs = contents(unbroken.directory)
    for key, (tokens, _, _) in contents(first.directory).items():
        assert tokens == theirs[key][0]
    assert not (tmp_path / "weights").exists()
    assert list(first.results) == ["sums", "more"]
    assert (first.results["more"]["problems"], first.results["more"]["left_out"]) == (2, 1)
    more = shop.run(tmp_path, n=12, version_dir=str(weights))
    assert len(contents(more.directory)) == 6 * more.results["sums"]["samples"] == 6 * 12


def test_benchmarks_may_have_longer_responses_than_training(shop, tmp_path):
    """The model's context is of 64 tokens, prompts of 12 at most."""
    found = shop.run(tmp_path, n=8, evaluation__max_response_tokens=40)
    lengths = [len(tokens) for tokens, _, _ in contents(found.directory).values()]
    assert 16 < max(lengths) <= 40
    assert found.results["sums"]["about"]["max_response_tokens"] == 40
    with pytest.raises(UserError, match=r"tokens=53 .* set evaluation\.max_response_tokens=52"):
        shop.run(tmp_path, n=8, evaluation__max_response_tokens=53)


def test_a_directory_is_of_one_version_and_one_way_of_sampling(shop, unbroken):
    to = unbroken.directory.parent
    for name, value in dict(
        rollout__temperature=0.5, rollout__max_response_tokens=9, seed=5
    ).items():
        with pytest.raises(UserError, match=f"{name.removeprefix('rollout__')}: "):
            shop.run(to, **{name: value})
    with pytest.raises(UserError, match="step 4"):
        shop.run(to, step=4)
    (old := to / "old" / "v000003" / "sums").mkdir(parents=True)
    (old / "responses.jsonl").write_text("")
    with pytest.raises(UserError, match="older format"):
        shop.run(to / "old", version_dir=str(to / "weights" / "v000003"))


def test_the_date_of_a_chat_template_is_the_same_on_the_next_day(shop, tmp_path):
    shutil.copytree(shop.workdir / "model", tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d%m%y=') }}" + template.read_text())

    def prompts():
        settings = {**shop.settings, "data.max_prompt_tokens": 30}
        config = small_arithmetic(settings)
        with config.unlocked():
            config.benchmarks = shop.benchmarks
        run = opened(config, tmp_path)
        decode = run.policy.tokenizer.decode
        return [decode(prompt.tokens) for prompt in benchmark_prompts(run, "sums")[0]]

    today = prompts()
    (recorded,) = (tmp_path / "model").glob("*time*")
    assert prompts() == today
    recorded.write_text(json.dumps({"time": "2024-07-26"}))
    assert [prompt.removeprefix("260724=") for prompt in prompts()] == [p[7:] for p in today]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("aime25", "--benchmark=aime25"),
        ("foreign", r"data\.task"),
        ("gone", r"config\.benchmarks\.gone\.path"),
        ("short", r"config\.benchmarks\.short"),
    ],
)
def test_a_benchmark_that_does_not_fit_is_refused_before_any_work(shop, tmp_path, name, words):
    with pytest.raises(UserError, match=words):
        shop.run(tmp_path, "sums", name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("benchmarks", "given", "words"),
    [
        ([], ["n"], "--n"),
        ([], ["to", "step"], "--to"),
        ([], ["version_dir"], "--version_dir"),
        (["sums"], ["split", "n"], "--split"),
        (["sums"], ["step", "version_dir"], "--step"),
        (["sums"], ["show"], "--show"),
        ([], ["wrong"], "--wrong"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(benchmarks, given, words):
    with pytest.raises(UserError, match=words):
        check_flags(benchmarks, given)
    check_flags([], ["split", "step"])
    check_flags([], ["split", "step", "show", "wrong"])
    check_flags(["sums"], ["version_dir", "n", "to"])


def test_a_mistake_on_the_command_line_is_one_sentence(shop):
    output, _ = (process := shop.start("--to=x")).communicate(timeout=300)
    assert process.returncode == 2
    assert output.startswith("error: --to")
    assert output.count("\n") == 1
