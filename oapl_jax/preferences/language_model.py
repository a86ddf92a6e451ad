"""A language model as a judge, on SGLang servers of its own: they keep their weights.

It is asked, in both orders, which of two responses is better, and its answer is not sampled: the
probabilities of the verdict tokens behind the question are read off. So one pass stands for any
number of samples, nothing has to be parsed, and the same question always has the same answer. A
model that must think before it can judge is beyond it.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import numpy as np

from oapl_jax.errors import RunError, UserError
from oapl_jax.fleet.client import ServerError, SGLangClient
from oapl_jax.model.tokenizer import load_tokenizer
from oapl_jax.preferences.judge import Response
from oapl_jax.structs import Prompt

FIELDS = ("prompt", "first", "second", "question")  # of a template


class LanguageModel:
    """P_j(y beats y') = (p_j(y, y') + 1 - p_j(y', y)) / 2, so that it has no favourite place.

    p_j(first, second) = sum_k value_k p_k / sum_k p_k over the verdict tokens k. An order without
    a score is left to the other one; it has none if the question is too long, the verdicts together
    are less than `least_mass`, or no server answered.

    Args:
      servers: URLs; requests go round, and what fails goes to the next one.
      tokenizer: directory of the judge's own, in Hugging Face format.
      chat: further arguments of its chat template.
      template: the question to the judge, with each of FIELDS in braces.
      questions: objective -> what fills {question}.
      verdicts: text of one token -> its value, how far the first response is better, within 0 and
        1. The model must be likely to begin its answer with one of them.
      least_mass: probability of the verdicts together from which one counts.
      max_prompt_tokens: of a templated question.
      questions_per_request: in one call.
      max_in_flight: calls at a time, of one group.
      connect_deadline, answer_deadline: seconds, of one call.
      backoff: seconds before a call that failed is made again; doubles up to 64 of them.
      patience: seconds after which a group's calls are not made again.

    Raises:
      UserError: for a value that can't work.
    """

    def __init__(
        self,
        *,
        servers: Sequence[str],
        tokenizer: str,
        chat: Mapping[str, Any],
        template: str,
        questions: Mapping[str, str],
        verdicts: Mapping[str, float],
        least_mass: float,
        max_prompt_tokens: int,
        questions_per_request: int,
        max_in_flight: int,
        connect_deadline: float,
        answer_deadline: float,
        backoff: float,
        patience: float,
    ):
        self._tokenizer = load_tokenizer(tokenizer)
        ids = {v: self._tokenizer.encode(v, add_special_tokens=False) for v in verdicts}
        for name, wrong, remedy in (
            ("servers", not servers, "name at least one URL"),
            ("questions", not questions, "name at least one objective"),
            ("template", any(f"{{{f}}}" not in template for f in FIELDS), f"it needs {FIELDS}"),
            ("verdicts", len(set(verdicts.values())) < 2, "they need two different values"),
            ("verdicts", not all(0 <= v <= 1 for v in verdicts.values()), "values are in [0, 1]"),
            ("verdicts", any(len(i) != 1 for i in ids.values()), f"each is one token, not {ids}"),
            ("least_mass", not 0 < least_mass <= 1, "it lies above 0 and at most at 1"),
            ("questions_per_request", questions_per_request < 1, "it is at least 1"),
            ("max_in_flight", max_in_flight < 1, "it is at least 1"),
            ("patience", patience <= 0, "it is above 0"),
        ):
            if wrong:
                raise UserError(f"preferences.language_model.{name} can't work: {remedy}")
        self.objectives = tuple(questions)
        self._urls = [url.rstrip("/") for url in servers]
        self._chat, self._template, self._questions = dict(chat), template, dict(questions)
        self._verdict_ids = [i for (i,) in ids.values()]
        self._values = np.array(list(verdicts.values()), np.float64)
        self._least_mass, self._max_prompt_tokens = least_mass, max_prompt_tokens
        self._questions_per_request, self._max_in_flight = questions_per_request, max_in_flight
        self._deadlines = dict(connect_deadline=connect_deadline, deadline=answer_deadline)
        self._backoff, self._patience = backoff, patience
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter(asked=0, too_long=0, unclear=0, failed=0, retried=0)

    def compare(
        self, prompt: Prompt, responses: Sequence[Response], comparators: Sequence[Response]
    ) -> np.ndarray:
        """See Judge.

        Raises:
          RunError: if no server answered any of the questions.
        """
        shape = (2, len(self.objectives), len(responses), len(comparators))
        rows = {
            place: self._question(place, prompt, responses, comparators)
            for place in np.ndindex(shape)
        }
        asked = {p: row for p, row in rows.items() if len(row) <= self._max_prompt_tokens}
        first_wins = np.full(shape, np.nan)
        if asked:
            scores = asyncio.run(self._ask_all(list(asked.values())))
            for place, score in zip(asked, scores, strict=True):
                first_wins[place] = score
        self._count(asked=len(asked), too_long=len(rows) - len(asked))
        wins = np.stack([first_wins[0], 1 - first_wins[1]])
        there = ~np.isnan(wins)
        total = np.where(there, wins, 0.0).sum(0)
        return np.where(there.any(0), total / np.maximum(there.sum(0), 1), np.nan)

    def metrics(self) -> dict[str, float]:
        """Questions since this process began: asked, or not because too long; without a clear
        verdict, or without an answer; and calls that were made again."""
        with self._lock:
            return {f"questions/{name}": float(count) for name, count in self._counts.items()}

    def _count(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)

    def _question(self, place, prompt, responses, comparators) -> list[int]:
        """Token ids of one question; order 0 names the response first, order 1 the comparator."""
        order, objective, i, k = place
        pair = [responses[i].text, comparators[k].text]
        first, second = pair[::-1] if order else pair
        text = self._template.format(
            prompt=prompt.text,
            first=first,
            second=second,
            question=self._questions[self.objectives[objective]],
        )
        return self._tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **self._chat,
        )

    async def _ask_all(self, rows: list[list[int]]) -> np.ndarray:
        """How far the first response is better, of each question; nan for no score."""
        scores, failures = np.full(len(rows), np.nan), []
        room = asyncio.Semaphore(self._max_in_flight)
        give_up = asyncio.get_running_loop().time() + self._patience
        parts = np.array_split(np.arange(len(rows)), -(-len(rows) // self._questions_per_request))
        connector = aiohttp.TCPConnector(limit=0, force_close=True)  # no stale connections
        async with aiohttp.ClientSession(connector=connector) as session:
            servers = [SGLangClient(session, url, **self._deadlines) for url in self._urls]

            async def ask(part: np.ndarray, turn: int) -> None:
                try:
                    async with room:
                        found = await self._ask([rows[i] for i in part], servers, turn, give_up)
                    scores[part] = found
                except ServerError as error:
                    failures.append(error)
                    self._count(failed=len(part))

            await asyncio.gather(*(ask(part, turn) for turn, part in enumerate(parts)))
        if len(failures) == len(parts):
            raise RunError(
                f"no judge answered in {self._patience:g} s (preferences.language_model.patience): "
                f"{failures[-1]}"
            )
        return scores

    async def _ask(
        self, rows: list[list[int]], servers: list[SGLangClient], turn: int, give_up: float
    ) -> np.ndarray:
        """The scores of one call, by the server whose turn it is or one that comes after it."""
        failures = 0
        while True:
            server = servers[(turn + failures) % len(servers)]
            try:
                ends = [[*row, verdict] for row in rows for verdict in self._verdict_ids]
                logp, _ = await server.score(ends)
                break
            except ServerError:
                pause = self._backoff * 2 ** min(failures, 6)
                failures += 1
                if asyncio.get_running_loop().time() + pause > give_up:
                    raise
                self._count(retried=1)
                await asyncio.sleep(pause)
        last = np.array([of_row[-1] for of_row in logp], np.float64)
        chances = np.exp(last).reshape(len(rows), -1)
        mass = chances.sum(-1)
        clear = mass >= self._least_mass
        self._count(unclear=int((~clear).sum()))
        return np.where(clear, chances @ self._values / np.maximum(mass, 1e-30), np.nan)
