"""A language model as a judge, on scripted servers."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from asking import PROMPT, responses

from configs import arithmetic
from oapl_jax.config import LanguageModelJudgeConfig
from oapl_jax.errors import RunError, UserError
from oapl_jax.model.tokenizer import make_character_tokenizer
from oapl_jax.preferences.language_model import LanguageModelJudge


class JudgeServer(HTTPServer):
    """SGLang's /generate for a prompt's log-probs: prefers the longer response, and the first."""

    def __init__(self, tokenizer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer, self.calls, self.fails, self.api_key = tokenizer, 0, 0, ""
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.calls += 1
        key = self.server.api_key
        if key and self.headers["Authorization"] != f"Bearer {key}":
            self.send_error(401, "on order")
            return
        if self.server.fails:
            self.server.fails -= 1
            self.send_error(500, "on order")
            return
        answers = []
        for row in request["input_ids"]:
            *question, verdict = [self.server.tokenizer.decode([token]) for token in row]
            logp = [[-9.0, token, None] for token in row]
            logp[-1][0] = float(np.log(probability("".join(question), verdict)))
            meta = {"input_token_logprobs": logp, "weight_version": "default"}
            answers.append({"meta_info": meta})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answers).encode())


def probability(question, verdict):
    """Probability of a verdict: A and B together have 0.9, or 0.1 for an unclear question."""
    _, first, second, objective = question.split("|")
    better = len(first) - len(second) + 1.5
    first_wins = 1 / (1 + np.exp(better if objective == "shorter?" else -better))
    mass = 0.1 if "?" in first + second else 0.9
    return mass * (first_wins if verdict == "A" else 1 - first_wins)


@pytest.fixture(scope="module")
def judge_tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("judge")
    characters = "ABabcdefghijklmnopqrstuvwxyz0123456789+=|?"
    return directory, make_character_tokenizer(characters, directory)


@pytest.fixture
def judge_servers(judge_tokenizer):
    servers = [JudgeServer(judge_tokenizer[1]) for _ in range(2)]
    yield servers
    for server in servers:
        server.shutdown()
        server.server_close()


def language_model(tokenizer, judges, **changes):
    section = arithmetic.get_config("objective=prosper").preferences.language_model.to_dict()
    settings = dict(
        servers=tuple(judge.url for judge in judges),
        tokenizer=str(tokenizer[0]),
        template="{prompt}|{first}|{second}|{question}",
        questions={"long": "longer?", "short": "shorter?"},
        questions_per_request=3,
        max_in_flight=2,
        backoff=0.01,
        group_deadline=20.0,
    )
    values = section | settings | changes
    path = "preferences.language_model"
    return LanguageModelJudge(LanguageModelJudgeConfig.from_dict(values, path))


def test_both_orders_cancel_a_bias_for_one(judge_tokenizer, judge_servers):
    judge = language_model(judge_tokenizer, judge_servers)
    found = judge.compare(PROMPT, responses("abc", "a"), responses("abc", "ab", "abcde"))
    p = lambda gap: (1 / (1 + np.exp(-gap - 1.5)) + 1 - 1 / (1 + np.exp(gap - 1.5))) / 2
    expected = p(np.array([[0.0, 1, -2], [-2, -1, -4]]))
    np.testing.assert_allclose(found, [expected, 1 - expected], atol=1e-6)
    assert found[0, 0, 0] == pytest.approx(0.5)
    assert judge.metrics()["questions/asked"] == 24
    assert [s.calls for s in judge_servers] == [4, 4]  # three questions a call, by turns


def test_missing_scores_are_counted_by_reason(judge_tokenizer, judge_servers):
    server = judge_servers[0]
    of_one = dict(questions={"long": "longer?"})
    judge = language_model(judge_tokenizer, [server], **of_one, max_prompt_tokens=25)
    (found,) = judge.compare(PROMPT, responses("abc", "a?"), responses("ab", "abcdefghijklm"))
    assert np.isnan(found).tolist() == [[False, True], [True, True]]
    assert judge.metrics().items() >= {
        ("questions/asked", 4),
        ("questions/too_long", 4),
        ("questions/unclear", 2),
    }
    # The score of one order stands for both.
    in_turn = dict(questions_per_request=1, max_in_flight=1, group_deadline=0.001)
    one = language_model(judge_tokenizer, [server], **of_one, **in_turn)
    server.fails = 1
    (found,) = one.compare(PROMPT, responses("abc"), responses("abc"))
    assert found[0, 0] == pytest.approx(1 - 1 / (1 + np.exp(-1.5)))
    assert one.metrics()["questions/failed"] == 1


def test_failed_requests_go_to_the_next_server(judge_tokenizer, judge_servers):
    good, bad = judge_servers
    bad.fails = 1000
    mine, nobody = responses("abc", "a"), SimpleNamespace(url="http://127.0.0.1:1")
    judge = language_model(judge_tokenizer, [bad, nobody, good])
    expected = language_model(judge_tokenizer, [good]).compare(PROMPT, mine, mine)
    np.testing.assert_array_equal(judge.compare(PROMPT, mine, mine), expected)
    metrics = judge.metrics()
    assert metrics["questions/retried"] > 0
    assert metrics["questions/failed"] == 0


def test_a_group_without_any_answer_ends_the_run_at_its_deadline(judge_tokenizer, judge_servers):
    for server in judge_servers:
        server.fails = 1000
    judge = language_model(judge_tokenizer, judge_servers, group_deadline=0.1)
    with pytest.raises(RunError, match="group_deadline"):
        judge.compare(PROMPT, responses("a"), responses("ab"))
    assert judge.metrics()["questions/failed"] == 4


def test_judges_that_demand_an_api_key(judge_tokenizer, judge_servers, tmp_path):
    key_file = tmp_path / "key"
    for server in judge_servers:
        server.api_key = "sk-1"
    mine = responses("abc", "a")
    for key in (None, "sk-2", "sk-1"):
        if key:
            key_file.write_text(key)
        path = str(key_file) if key else ""
        judge = language_model(judge_tokenizer, judge_servers, api_key_file=path)
        if key == "sk-1":
            assert np.isfinite(judge.compare(PROMPT, mine, mine)).all()
        else:
            with pytest.raises(UserError, match="api_key_file"):
                judge.compare(PROMPT, mine, mine)
    with pytest.raises(UserError, match=r"language_model\.api_key_file"):
        language_model(judge_tokenizer, judge_servers, api_key_file=str(tmp_path / "none"))


@pytest.mark.parametrize(
    "changes",
    [
        dict(servers=()),
        dict(questions={}),
        dict(template="{prompt}|{first}|{second}"),
        dict(verdicts={"A": 1.0, "B": 1.0}),
        dict(verdicts={"A": 2.0, "B": 0.0}),
        dict(verdicts={"AB": 1.0, "B": 0.0}),
        dict(min_verdict_mass=1.5),
        dict(questions_per_request=0),
        dict(max_in_flight=0),
        dict(group_deadline=0.0),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_rejects_settings_of_a_language_model(judge_tokenizer, changes):
    with pytest.raises(UserError, match=f"preferences.language_model.{next(iter(changes))}"):
        language_model(judge_tokenizer, [SimpleNamespace(url="http://127.0.0.1:1")], **changes)
