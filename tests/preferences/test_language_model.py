"""A language model as a judge, on scripted servers."""

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from asking import PROMPT, responses

from configs import arithmetic
from oapl_jax.config import LanguageModelJudgeConfig
from oapl_jax.errors import RunError, UserError
from oapl_jax.model.tokenizer import make_character_tokenizer
from oapl_jax.preferences.language_model import LanguageModelJudge


class JudgeServer:
    """SGLang's /generate for a prompt's log-probs: prefers the longer response, and the first."""

    def __init__(self, tokenizer):
        self._tokenizer, self.calls, self.fails = tokenizer, 0, 0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(20)

    async def _start(self):
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _generate(self, request):
        self.calls += 1
        if self.fails:
            self.fails -= 1
            raise web.HTTPInternalServerError(text="on order")
        answers = []
        for row in (await request.json())["input_ids"]:
            *question, verdict = [self._tokenizer.decode([token]) for token in row]
            logp = [[-9.0, token, None] for token in row]
            logp[-1][0] = float(np.log(probability("".join(question), verdict)))
            meta = {"input_token_logprobs": logp, "weight_version": "default"}
            answers.append({"meta_info": meta})
        return web.json_response(answers)

    def close(self):
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)


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
        server.close()


def language_model(tokenizer, urls, **changes):
    section = arithmetic.get_config("objective=prosper").preferences.language_model.to_dict()
    settings: dict[str, Any] = {
        **section,
        "servers": tuple(urls),
        "tokenizer": str(tokenizer[0]),
        "template": "{prompt}|{first}|{second}|{question}",
        "questions": {"long": "longer?", "short": "shorter?"},
        "questions_per_request": 3,
        "max_in_flight": 2,
        "backoff": 0.01,
        "group_deadline": 20.0,
    }
    path = "preferences.language_model"
    return LanguageModelJudge(LanguageModelJudgeConfig.from_dict(settings | changes, path))


def test_both_orders_cancel_a_bias_for_one(judge_tokenizer, judge_servers):
    judge = language_model(judge_tokenizer, [s.url for s in judge_servers])
    mine, theirs = responses("abc", "a"), responses("abc", "ab", "abcde")
    found = judge.compare(PROMPT, mine, theirs)
    assert found.shape == (2, 2, 3)
    p = lambda gap: (1 / (1 + np.exp(-gap - 1.5)) + 1 - 1 / (1 + np.exp(gap - 1.5))) / 2
    expected = p(np.array([[0.0, 1, -2], [-2, -1, -4]]))
    np.testing.assert_allclose(found[0], expected, atol=1e-6)
    np.testing.assert_allclose(found[1], 1 - expected, atol=1e-6)
    assert found[0, 0, 0] == pytest.approx(0.5)
    assert judge.metrics()["questions/asked"] == 24
    assert [s.calls for s in judge_servers] == [4, 4]  # three questions a call, by turns


def test_missing_scores_are_counted_by_reason(judge_tokenizer, judge_servers):
    judge = language_model(
        judge_tokenizer, [judge_servers[0].url], questions={"long": "longer?"}, max_prompt_tokens=25
    )
    mine, theirs = responses("abc", "a?"), responses("ab", "abcdefghijklm")
    (found,) = judge.compare(PROMPT, mine, theirs)
    assert np.isnan(found).tolist() == [[False, True], [True, True]]
    counts = {
        name: judge.metrics()[f"questions/{name}"] for name in ("asked", "too_long", "unclear")
    }
    assert counts == {"asked": 4, "too_long": 4, "unclear": 2}
    # The score of one order stands for both.
    one = language_model(
        judge_tokenizer,
        [judge_servers[0].url],
        questions={"long": "longer?"},
        questions_per_request=1,
        max_in_flight=1,
        group_deadline=0.001,
    )
    judge_servers[0].fails = 1
    (found,) = one.compare(PROMPT, responses("abc"), responses("abc"))
    assert found[0, 0] == pytest.approx(1 - 1 / (1 + np.exp(-1.5)))
    assert one.metrics()["questions/failed"] == 1


def test_failed_requests_go_to_the_next_server(judge_tokenizer, judge_servers):
    good, bad = judge_servers
    bad.fails = 1000
    urls = [bad.url, "http://127.0.0.1:1", good.url]
    judge = language_model(judge_tokenizer, urls)
    mine = responses("abc", "a")
    found = judge.compare(PROMPT, mine, mine)
    np.testing.assert_array_equal(
        found, language_model(judge_tokenizer, [good.url]).compare(PROMPT, mine, mine)
    )
    metrics = judge.metrics()
    assert metrics["questions/retried"] > 0
    assert metrics["questions/failed"] == 0


def test_a_group_without_any_answer_ends_the_run_at_its_deadline(judge_tokenizer, judge_servers):
    for server in judge_servers:
        server.fails = 1000
    judge = language_model(judge_tokenizer, [s.url for s in judge_servers], group_deadline=0.1)
    with pytest.raises(RunError, match="group_deadline"):
        judge.compare(PROMPT, responses("a"), responses("ab"))
    assert judge.metrics()["questions/failed"] == 4


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
        language_model(judge_tokenizer, ["http://127.0.0.1:1"], **changes)
