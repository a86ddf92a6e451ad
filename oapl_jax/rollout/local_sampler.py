"""The embedded sampler: continuous batching over this host's devices.

It has its own parameters, read from published versions, so its lag is as real as a fleet's. A fixed
number of slots is decoded together; a finished response frees its slot for the next one.
"""

import contextlib
import dataclasses
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from oapl_jax.errors import RunError, UserError
from oapl_jax.model import hf
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.sharding import parameter_shardings, smaller_axis, to_local_mesh
from oapl_jax.model.transformer import Transformer
from oapl_jax.rollout.decoding import Prefilled, Slots, decode, empty_slots, place, prefill
from oapl_jax.rollout.sampler import Sampled, Sampling
from oapl_jax.structs import Prompt, Rollout
from oapl_jax.weights.publisher import checked_version

GRACE = 0.02  # seconds: prompts that come as fast as this are begun together
PREFILL = 8192  # tokens of padded prompts that are computed at a time, at most
EARLY = 8  # a round ends early once 1/8 of the slots are free and responses wait for them


@dataclasses.dataclass(eq=False)
class _Group:
    """The responses to one prompt, sampled from one version."""

    prompt: Prompt
    version: int
    params: Any
    started: float
    tokens: list[list[np.ndarray]]  # of each response, by rounds of decoding
    logp: list[list[np.ndarray]]
    reasons: list[str]  # finish reason of each response; "" before its end

    def sampled(self) -> Sampled:
        rollouts = tuple(
            Rollout(np.concatenate(tokens), np.concatenate(logp), self.version, reason)
            for tokens, logp, reason in zip(self.tokens, self.logp, self.reasons, strict=True)
        )
        return Sampled(self.prompt, rollouts, "local", time.monotonic() - self.started)


class LocalSampler:
    """A Sampler on devices of this host. It yields groups in the order of their prompts, so that
    they depend neither on the number of slots nor on time.

    Args:
      config: sizes of the model; published versions must have the same.
      mesh: this host's devices; rows are split over `data` and `fsdp`, heads over `tensor`.
      dtype: of the parameters, of the KV cache and of the computation.
      seed: with a prompt's stream index and the sample's index it names the random numbers of a
        rollout, which depend neither on its neighbours nor on earlier samples.
      max_sequences: slots, rounded up to a multiple of the devices.
      max_prompt_tokens: of a prompt; the KV cache has room for it beside the longest response.
      prompt_multiple: prompts are padded to this or two, four, ... times as much, so that few
        shapes are compiled.
      tokens_per_round: tokens decoded between two exchanges with the host.
      turns: held while programs run, if other threads run programs with collectives on these
        devices: two of them could deadlock.

    Raises a UserError if the mesh can't divide the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        dtype: str,
        stop_ids: Sequence[int],
        seed: int,
        max_sequences: int,
        max_prompt_tokens: int,
        prompt_multiple: int,
        tokens_per_round: int,
        turns: AbstractContextManager[Any] | None = None,
    ):
        check_divides(config, mesh)
        self._model = Transformer(config, jnp.dtype(dtype), remat="none")
        self._mesh, self._turns = mesh, turns or contextlib.nullcontext()
        self._stop_ids, self._seed = tuple(sorted(stop_ids)), jax.random.key(seed)
        self._max_sequences, self._tokens_per_round = max_sequences, tokens_per_round
        self._widths = prompt_widths(max_prompt_tokens, prompt_multiple)
        self._policy: tuple[int, Any] = (-1, None)  # replaced as one, for another thread
        self._groups: deque[_Group] = deque()  # in order, until they are yielded
        self._closed = self._sampling = False

    @property
    def version(self) -> int:
        return self._policy[0]

    def refresh(self, version: int, path: epath.Path) -> None:
        """See Sampler. Unless responses go on, the version before is freed first."""
        config, dtype = self._model.config, self._model.dtype.name
        with checked_version(path) as directory:
            with contextlib.ExitStack() as stack:
                hf.open_stored(directory, config, stack)  # refuses tensors of another model
            if not self._sampling:
                self.drop_params()
            params = hf.load_params(directory, config, mesh=self._mesh, dtype=dtype)
            self._policy = version, params

    def set_params(self, version: int, params: Any) -> None:
        """Takes parameters from memory, on any mesh: the learner's own, to be evaluated.

        They are not copied if they are as the sampler needs them. All hosts of a run must call it.
        """
        self._policy = version, to_local_mesh(params, self._mesh, self._model.dtype)

    def drop_params(self) -> None:
        """Frees the parameters; it samples again after `set_params` or `refresh`."""
        self._policy = -1, None
        self._groups.clear()

    def versions(self) -> set[int]:
        return {self.version, *(group.version for group in list(self._groups))}

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Ends `generate` before its next round."""
        self._closed = True

    def generate(
        self, prompts: Iterable[Prompt], *, n: int, sampling: Sampling
    ) -> Iterator[Sampled]:
        """See Sampler. A sequence of few prompts gets no more slots than it needs.

        Raises a RunError if the sampler was closed before.
        """
        if self._closed:
            raise RunError("the embedded sampler is closed; open another one")
        return self._generate(prompts, n, sampling)

    def _generate(self, prompts: Iterable[Prompt], n: int, sampling: Sampling) -> Iterator[Sampled]:
        slots = self._max_sequences
        if isinstance(prompts, Sized):
            slots = min(slots, 1 << max(len(prompts) * n - 1, 0).bit_length())
        self._groups.clear()
        self._sampling = True
        feed = _Feed(prompts, lambda: self._policy)
        batch = _Batch(self, slots, n, sampling)
        try:
            while not self._closed:
                while batch.has_room() and (item := feed.take(wait=not batch.busy)):
                    prompt, (version, params) = item
                    tokens, logp = ([[] for _ in range(n)] for _ in range(2))
                    now = time.monotonic()
                    group = _Group(prompt, version, params, now, tokens, logp, [""] * n)
                    self._groups.append(group)
                    batch.add(group)
                if not batch.busy:
                    return
                with self._turns, jax.set_mesh(self._mesh):
                    batch.admit()
                    batch.decode()
                while self._groups and all(self._groups[0].reasons):
                    yield self._groups[0].sampled()
                    self._groups.popleft()
        finally:
            self._sampling = False
            feed.close()

    def _width(self, length: int) -> int:
        """The compiled width of a prompt's bucket."""
        return next(width for width in self._widths if width >= length)


def check_divides(config: ModelConfig, mesh: Mesh) -> None:
    """Raises a UserError if the sampler's mesh can't divide the model's parameters and KV cache."""
    shapes = unflatten_dict(hf.parameter_shapes(config), sep="/")
    parameter_shardings(shapes, mesh, setting="rollout.mesh")
    heads, tensor = config.num_kv_heads, mesh.shape["tensor"]
    if heads % tensor:
        raise UserError(
            f"rollout.mesh.tensor={tensor} does not divide the model's {heads} key heads; "
            f"{smaller_axis(heads, mesh, 'tensor', 'rollout.mesh')}"
        )


def prompt_widths(longest: int, multiple: int) -> list[int]:
    """Compiled widths of prompts: `multiple` times 1, 2, 4, ..., and one for the longest."""
    widths = [multiple]
    while widths[-1] < longest:
        widths.append(2 * widths[-1])
    return [*widths[:-1], longest + -longest % multiple]


def prefill_sizes(slots: int, n: int, width: int, devices: int) -> tuple[int, int]:
    """Prompts per prefill: EARLY-th of the slots over n, or EARLY-th of the slots, padded to the
    devices."""
    early = -(-slots // EARLY)
    few = -(-early // n)
    many = min(-(-slots // n), early, PREFILL // width)
    few, many = (prompts + -prompts % devices for prompts in (few, many))
    return few, max(few, many)


class _Batch:
    """The slots of one `generate`, and the responses that wait for one.

    All active slots have the parameters of the first of them: a response of other ones waits, and
    those after it, until all slots are free.
    """

    def __init__(self, sampler: LocalSampler, slots: int, n: int, sampling: Sampling):
        self._sampler, self._n, self._sampling = sampler, n, sampling
        # The cache has room for the longest prompt that there may be: one program for all calls.
        self._places = sampler._widths[-1] + sampling.max_response_tokens
        rows = self._over_devices(slots)
        self._waiting: deque[tuple[_Group, int]] = deque()
        self._rows: list[tuple[_Group, int] | None] = [None] * rows
        self._counts = np.zeros(rows, int)
        self._params: Any = None
        self._slots: Slots | None = None
        self._kept: tuple[_Group, Prefilled, int] | None = None  # of responses that still wait

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(self._rows)

    def has_room(self) -> bool:
        """True if a slot is free, or no response waits for the next one to be."""
        return len(self._waiting) < max(self._rows.count(None), 1)

    def add(self, group: _Group) -> None:
        self._waiting.extend((group, sample) for sample in range(len(group.reasons)))

    def admit(self) -> None:
        """Gives free slots to responses that wait, in their order."""
        if self._waiting and not any(self._rows):
            self._params, self._kept = self._waiting[0][0].params, None
            self._slots = self._slots or self._empty_slots()
        free = deque(row for row, response in enumerate(self._rows) if response is None)
        newcomers: dict[_Group, list[int]] = {}  # their rows
        while free and self._waiting and self._waiting[0][0].params is self._params:
            row, response = free.popleft(), self._waiting.popleft()
            self._rows[row], self._counts[row] = response, 0
            newcomers.setdefault(response[0], []).append(row)
        if self._kept and (rows := newcomers.pop(self._kept[0], None)):
            self._place(self._kept[1], dict.fromkeys(rows, self._kept[2]))
        width_of = lambda group: self._sampler._width(len(group.prompt.tokens))
        for width, of_width in itertools.groupby(sorted(newcomers, key=width_of), width_of):
            groups = list(of_width)
            while groups:
                count = self._portion(len(groups), width)
                begun, groups = groups[:count], groups[count:]
                prefilled = self._prefill(begun, count, width)
                self._place(prefilled, {r: i for i, g in enumerate(begun) for r in newcomers[g]})
                if self._waiting and (group := self._waiting[0][0]) in begun:
                    self._kept = group, prefilled, begun.index(group)

    def decode(self) -> None:
        """Samples a round of tokens, and ends the responses that it finishes."""
        sampler, sampling, rows = self._sampler, self._sampling, len(self._rows)
        assert self._slots is not None
        early = rows - self._rows.count(None) - -(-rows // EARLY)
        enters = self._waiting and self._waiting[0][0].params is self._params
        slots, *out = decode(
            self._params,
            self._slots,
            np.int32(max(early, 0) if enters else 0),
            np.float32(sampling.temperature) if sampling.temperature else None,
            np.float32(sampling.top_p) if sampling.top_p < 1 else None,
            model=sampler._model,
            top_k=sampling.top_k,
            stop_ids=sampler._stop_ids,
            steps=min(sampler._tokens_per_round, sampling.max_response_tokens),
        )
        self._slots = slots
        of_rows = jax.device_get((*out, slots.counts, slots.active))
        for row, (tokens, logp, count, active) in enumerate(zip(*of_rows, strict=True)):
            if response := self._rows[row]:
                (group, sample), drawn = response, count - self._counts[row]
                group.tokens[sample].append(tokens[:drawn].copy())
                group.logp[sample].append(logp[:drawn].copy())
                self._counts[row] = count
                if not active:
                    stopped = int(tokens[drawn - 1]) in sampler._stop_ids
                    group.reasons[sample] = "stop" if stopped else "length"
                    self._rows[row] = None

    def _empty_slots(self) -> Slots:
        model = self._sampler._model
        return empty_slots(model.config, len(self._rows), self._places, model.dtype)

    def _portion(self, prompts: int, width: int) -> int:
        """Prompts of the next prefill, of those that wait."""
        devices = self._sampler._mesh.size
        few, many = prefill_sizes(len(self._rows), self._n, width, devices)
        return many if prompts > few else few

    def _prefill(self, groups: Sequence[_Group], count: int, width: int) -> Prefilled:
        tokens, segments = np.zeros((2, count, width), np.int32)
        for row, group in enumerate(groups):
            prompt = group.prompt.tokens
            tokens[row, width - len(prompt) :] = prompt
            segments[row, width - len(prompt) :] = 1
        return prefill(self._params, tokens, segments, model=self._sampler._model)

    def _place(self, prefilled: Prefilled, source: dict[int, int]) -> None:
        """Begins the responses of the rows in `source` from their rows of `prefilled`."""
        sources, indices, samples = np.full((3, len(self._rows)), -1, np.int32)
        limits = np.full(len(self._rows), self._sampling.max_response_tokens, np.int32)
        for row, of in source.items():
            group, sample = self._rows[row] or (None, 0)
            assert group
            sources[row], indices[row], samples[row] = of, group.prompt.stream_index, sample
        seed = self._sampler._seed
        self._slots = place(self._slots, prefilled, sources, indices, samples, limits, seed)

    def _over_devices(self, rows: int) -> int:
        return rows + -rows % self._sampler._mesh.size


class _Feed:
    """Prompts, each with the policy to sample it from, pulled when there is room for them.

    A pull may block until groups in flight are done, so an iterator is pulled in a thread.
    """

    def __init__(self, prompts: Iterable[Prompt], policy: Callable[[], tuple[int, Any]]):
        self._prompts, self._policy = iter(prompts), policy
        self._pulled: deque[tuple[Prompt, tuple[int, Any]]] = deque()
        self._wanted = self._ended = self._slow = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._threaded = not isinstance(prompts, Sized)
        if self._threaded:
            threading.Thread(target=self._run, name="prompts", daemon=True).start()

    def take(self, *, wait: bool) -> tuple[Prompt, tuple[int, Any]] | None:
        """The next prompt; None at the end, or if none is there soon enough and `wait` is false.

        Once none has come within GRACE, the next one is not waited for either. The owner of the
        prompts ends a pull that blocks.
        """
        if not self._threaded:
            prompt = next(self._prompts, None)
            return prompt and (prompt, self._policy())
        with self._changed:
            self._wanted = True
            self._changed.notify_all()
            grace = 0.0 if self._slow else GRACE
            ready = lambda: self._pulled or self._ended
            self._slow = not self._changed.wait_for(ready, None if wait else grace)
            if self._pulled:
                return self._pulled.popleft()
            if self._failure:
                raise self._failure
            return None

    def close(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._ended or self._wanted)
                    if self._ended:
                        return
                prompt = next(self._prompts, None)
                with self._changed:
                    if prompt is None:
                        return
                    self._pulled.append((prompt, self._policy()))
                    self._wanted = False
                    self._changed.notify_all()
        except BaseException as failure:
            self._failure = failure
        finally:
            self.close()
