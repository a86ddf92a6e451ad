"""A language model as a judge, on real servers: its preferences are those of the model itself."""

import numpy as np
import pytest

from configs import common
from oapl_jax.config import LanguageModelJudgeConfig
from oapl_jax.preferences import Response
from oapl_jax.preferences.language_model import LanguageModelJudge
from oapl_jax.structs import Prompt

VERDICTS = {"1": 1.0, "0": 0.25}


@pytest.fixture
def judges(servers, published):
    """Both servers, on version 1."""
    body = {"model_path": str(published.path(1)), "weight_version": "1", "flush_cache": True}
    for server in servers.servers:
        assert server.ask("/update_weights_from_disk", body)["success"] is True
    return servers.urls


def test_preferences_are_those_of_the_learners_log_probs(judges, published):
    settings = {
        **common.preferences("prosper").language_model.to_dict(),
        "servers": tuple(judges),
        "tokenizer": str(published.path(1)),
        "template": "{prompt}={first},{second}-{question}",
        **dict(questions={"one": "7", "two": "88"}, verdicts=VERDICTS, questions_per_request=3),
        "min_verdict_mass": 1e-4,  # the weights are fresh ones
    }
    judge = LanguageModelJudge(LanguageModelJudgeConfig.from_dict(settings))
    prompt = Prompt("id0", 0, np.array([2], np.int32), "3+4", "7", "chain_sum")
    responses = [Response(text, lambda: 0.0) for text in ("07", "3,1")]
    comparators = [Response(text, lambda: 0.0) for text in ("07", "00", "1234,9")]
    found = judge.compare(prompt, responses, comparators)

    encode = lambda text: published.policy.tokenizer.encode(text, add_special_tokens=False)

    def first_wins(first, second, question):
        row = encode(f"3+4={first},{second}-{question}")
        logp = [published.logp(1, row, encode(verdict))[0] for verdict in VERDICTS]
        chances = np.exp(np.array(logp, np.float64))
        return chances @ np.array(list(VERDICTS.values())) / chances.sum()

    for j, question in enumerate(("7", "88")):
        for i, mine in enumerate(responses):
            for k, theirs in enumerate(comparators):
                first = first_wins(mine.text, theirs.text, question)
                second = 1 - first_wins(theirs.text, mine.text, question)
                assert found[j, i, k] == pytest.approx((first + second) / 2, abs=1e-4)
    assert found.std() > 1e-3
    metrics = judge.metrics()
    assert metrics["questions/asked"] == 24
    assert metrics["questions/unclear"] == metrics["questions/failed"] == 0
