"""Evaluation of a published version through real servers, against the embedded decoder."""

import json

import numpy as np
import pytest
from etils import epath
from small_runs import opened

from configs import arithmetic
from oapl_jax import build
from oapl_jax.evaluate import benchmark_prompts, evaluate_benchmarks
from oapl_jax.evaluation import pass_at_k
from oapl_jax.rewards.tasks import chain_sum
from oapl_jax.rollout.dataset import Dataset

PROBLEMS = [("1+1=", "2"), ("9-8=", "1"), ("3+4-1=", "6"), ("8-5=", "3"), ("2+2+2=", "6")]
N, VERSION = 8, 2
CLOSE = 2e-3  # nats between two sums of log-probs of a response
GREEDY = 1e-5  # a temperature at which sampling is greedy


@pytest.fixture
def evaluate(servers, published, tmp_path):
    """Evaluates version 2 of the servers' model; returns result, responses and prompts."""
    rows = [json.dumps({"question": q, "target": a}) for q, a in PROBLEMS]
    (tmp_path / "sums.jsonl").write_text("\n".join(rows))

    def evaluate(sampler, temperature):
        config = arithmetic.get_config()
        sizes = dict(train_size=20, validation_size=2, test_size=2)
        sizes |= {"generator.min_terms": 2, "generator.max_terms": 2}
        settings = {
            **{f"data.{name}": size for name, size in sizes.items()},
            "data.data_dir": str(tmp_path / "data"),
            "model.path": str(published.path(1)),
            "group_size": 4,
            "rollout.sampler": sampler,
            "rollout.temperature": temperature,
            "fleet.servers": tuple(servers.urls),
            "fleet.control_deadline": 60.0,
        }
        config.update_from_flattened_dict(settings)
        with config.unlocked():
            columns = dict(problem="question", answer="target")
            table = dict(kind="table", path=str(tmp_path / "sums.jsonl"), files=())
            options = {"task": "chain_sum", "columns": columns, "max_tests": 0}
            table |= dict(rows=len(PROBLEMS), part=(0, 100), options=options)
            config.benchmarks.sums = table
        run = opened(config, tmp_path / "workdir")
        source = dict(step=None, version_dir=str(published.path(VERSION)), n=N)
        to = epath.Path(tmp_path / f"{sampler}{temperature}")
        try:
            source |= dict(log=lambda text: None)
            directory, results = evaluate_benchmarks(run, ["sums"], to, **source)
            prompts = {p.id: p for p in benchmark_prompts(run, "sums")[0]}
        finally:
            run.close()
        responses = {}
        for group in Dataset(directory / "sums" / "responses"):
            start = group.prompt.stream_index // len(prompts)
            for index, rollout in enumerate(group.rollouts, start):
                assert (group.prompt.id, index) not in responses
                responses[group.prompt.id, index] = rollout
        return results["sums"], responses, prompts

    return evaluate


def test_results_follow_from_the_log_probs_of_the_version(evaluate, published, monkeypatch):
    result, responses, prompts = evaluate("fleet", 1.0)
    tokens, logp, correct = 0, 0.0, dict.fromkeys(prompts, 0)
    for (name, _), rollout in responses.items():
        prompt, response = prompts[name], rollout.tokens.tolist()
        expected = published.logp(VERSION, prompt.tokens, response)
        total = rollout.behavior_logp.sum()
        assert total == pytest.approx(expected.sum(), abs=CLOSE)
        assert abs(total - published.logp(1, prompt.tokens, response).sum()) > CLOSE
        text = published.policy.tokenizer.decode(response, skip_special_tokens=True)
        correct[name] += rollout.finish_reason == "stop" and chain_sum(text, prompt.answer) == 1
        tokens, logp = tokens + len(response), logp + expected.sum()
    assert set(responses) == {(p, i) for p in prompts for i in range(N)}
    assert {p["id"]: p["correct"] for p in result["per_problem"]} == correct
    assert result["entropy"]["value"] == pytest.approx(-logp / tokens, abs=1e-4)
    assert result["pass@k"]["value"][3] == pytest.approx(
        np.mean([pass_at_k(N, c, 4) for c in correct.values()])
    )
    assert (result["about"]["sampler"], result["about"]["version"]) == ("fleet", VERSION)

    monkeypatch.setattr(build.Run, "open_sampler", None)
    assert evaluate("fleet", 1.0)[0]["pass@k"] == result["pass@k"]  # nothing is sampled again


def test_greedy_responses_equal_those_of_the_embedded_decoder(evaluate):
    texts = {}
    for sampler in ("fleet", "local"):
        result, responses, _ = evaluate(sampler, GREEDY)
        texts[sampler] = {
            key: (rollout.tokens.tolist(), rollout.finish_reason)
            for key, rollout in responses.items()
        }
        texts[sampler]["measured"] = (result["avg@n"], result["length"], result["truncated"])
    assert texts["fleet"] == texts["local"]
    assert len(texts["local"]) == len(PROBLEMS) * N + 1
