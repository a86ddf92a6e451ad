"""A language model as a judge, on SGLang servers whose weights never change.

The model is asked, in both orders, which of two responses is better. Its answer is not sampled: the
probabilities of the verdict tokens behind the question are read. So one forward pass stands for any
number of samples, nothing is parsed, and equal questions have equal answers. A model that must
think before it judges is not supported.
"""

import asyncio
import functools
import threading
from collections import Counter
from collections.abc import Sequence

import aiohttp
import numpy as np

from oapl_jax.config import LanguageModelJudgeConfig
from oapl_jax.errors import RunError, UserError
from oapl_jax.fleet.addresses import read_api_key, server_url
from oapl_jax.fleet.client import ServerError, SGLangClient, Unauthorized
from oapl_jax.model.tokenizer import load_tokenizer
from oapl_jax.preferences.judges import Response
from oapl_jax.structs import Prompt
from oapl_jax.tracking.progress import log

FIELDS = ("prompt", "first", "second", "question")  # of a template


class LanguageModelJudge:
    """P_j(y beats y') = (p_j(y, y') + 1 - p_j(y', y)) / 2, which cancels a bias for either order.

    p_j(first, second) = sum_k value_k p_k / sum_k p_k over the verdict tokens k. An order without a
    score is excluded: its question is too long, its verdicts together have less probability than
    `min_verdict_mass`, or no server answered.

    A failed request goes to the next server after `backoff` seconds, which double up to 64 times as
    long, until `group_deadline`.

    Raises:
      UserError: for unusable questions, verdicts or template.
    """

    def __init__(self, config: LanguageModelJudgeConfig):
        self._config, self._tokenizer = config, load_tokenizer(config.tokenizer)
        self._api_key = ""
        if config.api_key_file:
            of = "preferences.language_model.api_key_file"
            self._api_key, exposed = read_api_key(config.api_key_file, of=of)
            if exposed:
                log(exposed)
        verdicts = config.verdicts
        ids = {v: self._tokenizer.encode(v, add_special_tokens=False) for v in verdicts}
        fields = [f"{{{field}}}" for field in FIELDS]
        for name, wrong, remedy in (
            ("servers", not config.servers, "name at least one URL"),
            ("questions", not config.questions, "name at least one objective"),
            ("template", any(f not in config.template for f in fields), f"it needs {fields}"),
            ("verdicts", len(set(verdicts.values())) < 2, "name two different scores"),
            ("verdicts", not all(0 <= v <= 1 for v in verdicts.values()), "scores are in [0, 1]"),
            ("verdicts", any(len(i) != 1 for i in ids.values()), f"each is one token, not {ids}"),
        ):
            if wrong:
                raise UserError(f"preferences.language_model.{name} can't be used: {remedy}")
        self.objectives = tuple(config.questions)
        self._verdict_ids = [i for (i,) in ids.values()]
        self._values = np.array(list(verdicts.values()), np.float64)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter(asked=0, too_long=0, unclear=0, failed=0, retried=0)

    def compare(
        self, prompt: Prompt, responses: Sequence[Response], comparators: Sequence[Response]
    ) -> np.ndarray:
        """See Judge.

        Raises:
          RunError: if no server answered any of the questions.
          UserError: if they demand another API key.
        """
        shape = (2, len(self.objectives), len(responses), len(comparators))
        rows = {at: self._question(at, prompt, responses, comparators) for at in np.ndindex(shape)}
        asked = {at: row for at, row in rows.items() if len(row) <= self._config.max_prompt_tokens}
        first_wins = np.full(shape, np.nan)
        if asked:
            scores = asyncio.run(self._ask_all(list(asked.values())))
            for at, score in zip(asked, scores, strict=True):
                first_wins[at] = score
        self._count(asked=len(asked), too_long=len(rows) - len(asked))
        wins = np.ma.masked_invalid([first_wins[0], 1 - first_wins[1]])
        return wins.mean(axis=0).filled(np.nan)

    def metrics(self) -> dict[str, float]:
        """Counts since the process began, of questions and of retried requests."""
        with self._lock:
            return {f"questions/{name}": float(count) for name, count in self._counts.items()}

    def _count(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)

    def _question(
        self,
        at: tuple[int, ...],
        prompt: Prompt,
        responses: Sequence[Response],
        comparators: Sequence[Response],
    ) -> list[int]:
        """Token ids of one question; order 0 names the response first, order 1 the comparator."""
        order, objective, i, k = at
        pair = [responses[i].text, comparators[k].text]
        first, second = pair[::-1] if order else pair
        question = self._config.questions[self.objectives[objective]]
        text = self._config.template.format(
            prompt=prompt.text, first=first, second=second, question=question
        )
        return self._tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **self._config.chat,
        )

    async def _ask_all(self, rows: list[list[int]]) -> np.ndarray:
        """Scores of the first response in each question; nan without a score."""
        config, scores, failures = self._config, np.full(len(rows), np.nan), []
        room = asyncio.Semaphore(config.max_in_flight)
        deadline = asyncio.get_running_loop().time() + config.group_deadline
        requests = -(-len(rows) // config.questions_per_request)
        parts = np.array_split(np.arange(len(rows)), requests)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)  # no stale connections
        async with aiohttp.ClientSession(connector=connector) as session:
            deadlines = dict(
                connect_deadline=config.connect_deadline, deadline=config.request_deadline
            )
            client = functools.partial(SGLangClient, session, api_key=self._api_key, **deadlines)
            urls = [
                server_url(url, of="preferences.language_model.servers") for url in config.servers
            ]
            servers = [client(url) for url in urls]

            async def ask(part: np.ndarray, turn: int) -> None:
                try:
                    async with room:
                        found = await self._ask([rows[i] for i in part], servers, turn, deadline)
                    scores[part] = found
                except ServerError as error:
                    failures.append(error)
                    self._count(failed=len(part))

            await asyncio.gather(*(ask(part, turn) for turn, part in enumerate(parts)))
        if len(failures) == len(parts):
            kind = UserError if isinstance(failures[-1], Unauthorized) else RunError
            raise kind(
                "no judge answered within preferences.language_model.group_deadline="
                f"{config.group_deadline:g} seconds: {failures[-1]}"
            )
        return scores

    async def _ask(
        self, rows: list[list[int]], servers: list[SGLangClient], turn: int, deadline: float
    ) -> np.ndarray:
        """Scores of one request; retried on the next server until `deadline`."""
        failures = 0
        while True:
            server = servers[(turn + failures) % len(servers)]
            try:
                ends = [[*row, verdict] for row in rows for verdict in self._verdict_ids]
                logp, _ = await server.score(ends)
                break
            except Unauthorized:
                raise  # no retry mends it
            except ServerError:
                pause = self._config.backoff * 2 ** min(failures, 6)
                failures += 1
                if asyncio.get_running_loop().time() + pause > deadline:
                    raise
                self._count(retried=1)
                await asyncio.sleep(pause)
        last = np.array([of_row[-1] for of_row in logp], np.float64)
        chances = np.exp(last).reshape(len(rows), -1)
        mass = chances.sum(-1)
        clear = mass >= self._config.min_verdict_mass
        self._count(unclear=int((~clear).sum()))
        return np.where(clear, chances @ self._values / np.maximum(mass, 1e-30), np.nan)
