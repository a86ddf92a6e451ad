"""The paper's two configurations: their values, and the whole path of each at the size `smoke`."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath
from small_runs import metrics, opened, typed

from configs import arithmetic, code_contests, competition_math, objectives
from oapl_jax import audit, train
from oapl_jax import record as generate
from oapl_jax.config import flatten
from oapl_jax.data import samples
from oapl_jax.evaluate import evaluate_benchmarks
from oapl_jax.publish import publish_step
from oapl_jax.rollout.dataset import Dataset

MATHS, CODE = competition_math.get_config, code_contests.get_config


# The values. What arXiv 2602.19362, its authors' code and its readers state is written out here
# again; where they state nothing, the configuration says [I].


BOTH = {
    "objective.name": "oapl",
    "objective.beta1": 1.0,
    "objective.beta2": 1e-3,
    "objective.aggregation": "sequence",
    "objective.kl_weight": 0.0,
    "optim.learning_rate": 1e-6,
    "model.dtype": "bfloat16",
    "mesh.fsdp": 64,
    "group_size": 8,  # [I] of the maths
    "groups_per_step": 256 // 8,  # likewise
}
OF_MATHS = BOTH | {
    "model.path": "/data/models/Qwen3-4B-Thinking-2507",
    "data.train": ("deepscaler",),
    "data.sets.deepscaler.kind": "deepscaler",
    "data.sets.deepscaler.rows": 40315,
    "data.task": "math",
    "rollout.max_response_tokens": 16384,
    "lag.mode": "window",
    "lag.steps": 50,
    "buffer.mode": "clear_on_sync",
    "rollout.source": "live",
    "rollout.overlap": True,
    "objective.denominator": "behavior",
    "optim.max_grad_norm": 1e-3,
    "evaluation.n": 10,
    "evaluation.ks": (1, 5, 10),
    # [I]
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "buffer.zero_variance": "keep",
    "data.max_prompt_tokens": 1024,
    "evaluation.max_response_tokens": 16384,
}
OF_CODE = BOTH | {
    "data.train": ("primeintellect", "taco", "lcbv5"),
    "data.task": "code",
    "data.sets.taco.options.max_tests": 0,
    "rewards.code.max_tests": 0,
    "rewards.code.seconds_per_test": 6.0,
    "rollout.max_response_tokens": 32000,
    "data.max_prompt_tokens": 4096,
    "evaluation.max_response_tokens": 65536,
    "rollout.source": "dataset",
    "objective.denominator": "learner",
    "optim.b1": 0.9,
    "optim.b2": 0.95,
    "optim.eps": 1e-10,
    "optim.weight_decay": 1e-8,
    "optim.final_fraction": 0.05,
    "optim.max_grad_norm": 1.0,
    "rollout.temperature": 0.6,
    "rollout.top_p": 0.95,
    "evaluation.n": 20,
    "buffer.zero_variance": "drop",  # [I]
}


def test_the_runs_are_the_papers():
    for config, expected in (
        (MATHS(), OF_MATHS),
        (CODE("round=1"), OF_CODE),
        (CODE("round=2"), OF_CODE),
    ):
        assert flat_config(config).items() >= expected.items()


def test_the_rounds_have_the_papers_lengths():
    """107,000 / 256 = 418 steps, all of them lag, 2 % warm-up; then 4 epochs of 4,000 prompts."""
    one, two = CODE(), CODE("round=2")
    assert (one.num_steps, one.lag.steps, one.optim.warmup_steps) == (418, 418, 8)
    assert two.num_steps == pytest.approx(4 * 4000 * 8 / 256 * 107 / 192, abs=1)
    low, high = two.data.sets.taco.part
    problems = sum(one.data.sets[name].rows for name in one.data.train)
    assert problems == 24_287
    assert (high - low) / 100 * problems == pytest.approx(4000, rel=0.04)
    assert one.data.sets.taco.part == (0, 100)
    assert one.rollout.dataset != two.rollout.dataset


def test_each_round_starts_where_the_one_before_ended():
    base, one, two = (CODE(f"round={number}") for number in "012")
    assert base.model.path == "/data/models/DeepSeek-R1-Distill-Qwen-14B"
    assert (base.num_steps, base.rollout.source) == (0, "live")
    assert one.model.path == f"runs/code_contests/versions/v{base.num_steps:06d}"
    assert two.model.path == f"runs/code_contests/versions/v{one.num_steps:06d}"
    two.rounds = "/elsewhere"
    assert two.model.path == "/elsewhere/versions/v000418"
    assert two.rollout.dataset == "/elsewhere/set2"


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_groups_of_equal_rewards_are_kept_for_those_who_learn_from_them(name):
    kept = arithmetic.get_config(f"objective={name}").buffer.zero_variance == "keep"
    assert kept == (name in ("sft", "mixed", "asymre"))


def test_the_baseline_is_at_a_lag_of_at_most_one():
    config = MATHS("grpo_is")
    assert (config.lag.mode, config.lag.steps, config.buffer.max_age) == ("fixed", 1, 1)
    assert config.objective.policy_gradient.correction == "token_truncate"
    assert config.objective.policy_gradient.correction_cap == 2.0
    assert MATHS("vespo").lag.steps == 50
    assert MATHS("a_star_po").objective.denominator == "reference"


def test_the_benchmarks_are_the_papers():
    maths, code = MATHS().benchmarks, CODE().benchmarks
    assert {"aime25", "hmmt25_feb", "hmmt25_nov", "brumo25"} <= set(maths)
    window = code.livecodebench.options.to_dict()
    assert window == dict(start="2024-08-01", end="2025-02-01", max_tests=0)


@pytest.mark.parametrize("make", [MATHS, CODE])
def test_the_audit_knows_every_set_by_one_name_and_one_setting_says_where_they_are(make):
    config = make()
    found = audit.sections(config.data.sets.to_dict(), config.benchmarks.to_dict())
    assert set(found) == {*config.data.sets, *config.benchmarks}
    config.releases = "gs://bucket/releases"
    for one in (*config.data.sets.values(), *config.benchmarks.values()):
        assert one.path.startswith("gs://bucket/releases/")


@pytest.mark.parametrize("make", [MATHS, CODE])
@pytest.mark.parametrize("arg", ["", "smoke"])
def test_the_settings_are_those_of_the_default(make, arg):
    own = re.compile(r"releases|rounds|(data|benchmarks|model\.architecture)\b.*")
    keys = lambda config: {key for key in flat_config(config) if not own.fullmatch(key)}
    assert keys(make(arg)) == keys(arithmetic.get_config())


def flat_config(config):
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in flatten(config.to_dict()).items()
    }


# The whole path, in this process


class Shop:
    """Runs the commands on made-up releases below one directory."""

    def __init__(self, root: Path):
        self.root = root
        samples.write(str(root / "samples"), rows=8)
        file = root / "samples/agentica-org/DeepScaleR-Preview-Dataset/deepscaler.json"
        long = {"problem": "Compute $1 + 2$. " * 20, "answer": "3"}  # fits no prompt
        file.write_text(json.dumps([*json.loads(file.read_text()), long]))

    def config(self, make, arg, **settings):
        config = make(arg)
        places = {"releases": str(self.root / "samples"), "data.data_dir": str(self.root / "data")}
        if "rounds" in config:
            places["rounds"] = str(self.root)
        settings = {name.replace("__", "."): value for name, value in settings.items()}
        config.update_from_flattened_dict({**places, "tracking.tensorboard": False, **settings})
        return config

    def train(self, name, make, arg, **settings):
        config, workdir = self.config(make, arg, **settings), epath.Path(self.root / name)
        workdir.mkdir()
        result = train.run(typed(config), workdir, SimpleNamespace(requested=""))
        assert result is not None
        train.report(typed(config), workdir, result)
        return result, metrics(workdir)

    def publish(self, name, step):
        to = epath.Path(self.root / "versions")
        publish_step(epath.Path(self.root / name), step, to, dtype=None)

    def generate(self, to, arg):
        """Tokenizer, groups and manifest of a recorded set."""
        run = opened(self.config(CODE, arg), self.root / "nobody")
        what = dict(step=None, version_dir=None, split="train", limit=None, groups_per_shard=8)
        generate.record_dataset(run, epath.Path(self.root / to), **what, progress=lambda done: None)
        run.close()
        shards = Dataset(epath.Path(self.root / to))
        return run.policy.tokenizer, list(shards), shards.versions

    def evaluate(self, name, make, arg, *benchmarks):
        """Tokenizer, results, and by benchmark the texts of the responses to each problem."""
        run = opened(self.config(make, arg), self.root / name)
        to = epath.Path(self.root / name / "evaluation")
        what = dict(step=None, version_dir=None, n=4, log=lambda text: None)
        directory, results = evaluate_benchmarks(run, benchmarks, to, **what)
        texts = {name: {} for name in benchmarks}
        for benchmark in benchmarks:
            for group in Dataset(directory / benchmark / "responses"):
                decoded = run.policy.tokenizer.batch_decode([r.tokens for r in group.rollouts])
                texts[benchmark].setdefault(group.prompt.id, []).extend(decoded)
        records = {record.id: record for record in run.splits["train"]}
        run.close()
        return results, texts, records


@pytest.fixture(scope="module")
def shop(tmp_path_factory, kept_programs):
    return Shop(tmp_path_factory.mktemp("shop"))


def test_the_maths_path(shop):
    result, lines = shop.train("maths", MATHS, "smoke")
    assert [line["lag/mean"] for line in lines] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert 0 < np.mean([line["rollout/reward"] for line in lines]) < 1
    assert all(np.isfinite(line["loss"]) for line in lines)
    sampled = 8 * 8 * 8 + 3 * 8 * (4 + 1)  # groups, and the splits with a greedy response
    verdicts = sum(v for k, v in lines[-1].items() if k.startswith("rewards/math/"))
    assert 0 < lines[-1]["rewards/math/right"] < verdicts <= sampled + 40  # self-check included
    assert lines[-1]["prompts/dropped"] == 8  # of 64 draws and more, one in nine
    assert {"eval/pass@1", "eval/pass@4"} <= lines[3].keys()
    assert result["after"]["version"] == 8
    assert (shop.root / "maths" / "learning.png").exists()

    results, texts, records = shop.evaluate("maths", MATHS, "smoke", "seen", "aime25")
    assert results["aime25"]["problems"] == results["seen"]["problems"] == 8
    assert results["seen"]["left_out"] == 1
    right = 0
    for problem in results["seen"]["per_problem"]:
        answer = rf"\boxed{{{records[problem['id']].answer}}}<eos>"
        assert problem["correct"] == texts["seen"][problem["id"]].count(answer)
        right += problem["correct"]
    assert 0 < right < 8 * 4
    assert results["seen"]["avg@n"]["value"] == right / 32


def test_the_code_path_in_two_offline_rounds(shop):
    result, lines = shop.train("base", CODE, "smoke,round=0", evaluation__every=0)
    assert result["before"] == result["after"] == {}
    assert lines == []
    shop.publish("base", 0)

    tokenizer, groups, versions = shop.generate("set1", "smoke")
    assert versions == [0]
    assert len({group.prompt.id for group in groups}) == len(groups) == 24
    for group in groups:
        texts = tokenizer.batch_decode([rollout.tokens for rollout in group.rollouts])
        assert group.reward.tolist() == [float(is_right(text, group.prompt)) for text in texts]
    mixed = sum(not group.zero_variance for group in groups)
    assert mixed > 2

    result, lines = shop.train("one", CODE, "smoke", evaluation__every=0)
    assert [line["lag/mean"] for line in lines] == [0, 1, 2, 3]
    assert [line["recorded/taken"] for line in lines] == [8, 16, 24, 32]
    assert lines[-1]["recorded/zero_variance"] > 0
    assert not any("rollout/groups" in line for line in lines)
    assert abs(lines[0]["log_ratio"]) < 1e-4 < abs(lines[3]["log_ratio"])
    shop.publish("one", 4)

    _, groups, versions = shop.generate("set2", "smoke,round=2")
    assert versions == [4]
    assert 0 < len(groups) < 24
    result, lines = shop.train("two", CODE, "smoke,round=2", evaluation__every=0)
    assert [line["lag/mean"] for line in lines] == [0, 1, 2, 3]
    assert abs(lines[0]["log_ratio"]) < 1e-4  # it starts from the weights that sampled
    assert not any(key.startswith("eval/") for line in lines for key in line)

    results, texts, records = shop.evaluate("two", CODE, "smoke,round=2", "seen", "livecodebench")
    assert results["seen"]["about"]["version"] == 4
    for problem in results["seen"]["per_problem"]:
        record = records[problem["id"]]
        of_problem = SimpleNamespace(text=record.question, answer=record.answer)
        told = [is_right(text, of_problem) for text in texts["seen"][problem["id"]]]
        assert problem["correct"] == sum(told)
    assert results["seen"]["avg@n"]["value"] > 0
    assert results["livecodebench"]["problems"] == 16


def is_right(text, prompt):
    """True if a program adds what its problem says; all that a tiny model writes looks alike."""
    number = re.search(r"add_(\d+)|and (\d+)\.", prompt.text)
    assert number
    n = number[1] or number[2]
    program = rf"def add_{n}\(x\):\n    return x \+ {n}"
    if json.loads(prompt.answer)["kind"] == "stdin":
        program = rf"print\(int\(input\(\)\) \+ {n}\)"
    return bool(re.fullmatch(rf"```python\n{program}\n```<eos>", text))
