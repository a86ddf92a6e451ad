"""oapl_jax: its learner with its GRPO objective, and its embedded sampler.

Also makes the shared model (`model`: weights and tokenizer) and the references (`score`: log-probs
of a sampler's tokens; `peak`: speed of this machine's matrix product).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import work

from oapl_jax.config import LearnerConfig
from oapl_jax.learner import packing, train_step
from oapl_jax.learner.optimizer import make_optimizer
from oapl_jax.model import hf
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.hf import save_params
from oapl_jax.model.sharding import make_mesh
from oapl_jax.model.transformer import Transformer
from oapl_jax.objectives import bind
from oapl_jax.rollout.local_sampler import LocalSampler
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Batch, Group, Prompt, Rollout

MICRO_BATCHES, CHUNK = 16, 64
GRPO: dict[str, Any] = dict(
    estimator="dr_grpo",
    clip_low=work.CLIP,
    clip_high=work.CLIP,
    dual_clip=1e30,
    proximal="learner",  # as in the others, which use the policy of the step itself
    correction="none",
    correction_cap=2.0,
    correction_floor=0.5,
)


def make_model(path: str) -> None:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    config = ModelConfig.from_hf(work.ARCHITECTURE, source="benchmarks/peers/work.py")
    model = Transformer(config, jnp.float32, "none")
    params = jax.jit(lambda key: train_step.init_params(model, key))(jax.random.key(0))
    save_params(params, config, path, dtype="float32", max_shard_bytes=1 << 30)
    words = {str(i): i for i in range(config.vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=str(work.PAD)))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=str(work.PAD), eos_token=str(work.STOP)
    ).save_pretrained(path)


OBJECTIVE = bind("grpo", {"policy_gradient": GRPO})
LAYOUT = LearnerConfig(
    micro_batches=MICRO_BATCHES,
    row_length=work.PROMPT + work.RESPONSE,
    rows_multiple=1,
    logp_chunk=CHUNK,
)


def make_batch(responses: np.ndarray) -> Batch:
    given = work.make_rollouts()
    groups = []
    for start in range(0, work.SEQUENCES, work.GROUP_SIZE):
        rows = slice(start, start + work.GROUP_SIZE)
        prompt = Prompt(str(start), start, given.prompts[start], "", "", "")
        blank = np.zeros(work.RESPONSE, np.float32)  # behavior log-probs: none are looked at
        rollouts = [Rollout(tokens, blank, 0, "length") for tokens in responses[rows]]
        groups.append(Group(prompt, tuple(rollouts), given.rewards[rows]))
    return packing.build_batch(
        groups,
        OBJECTIVE,
        LAYOUT,
        aggregation="token",
        step=0,
        max_prompt_tokens=work.PROMPT,
        max_response_tokens=work.RESPONSE,
    )


class Learner:
    def __init__(self, path: str):
        config = hf.load_config(path)
        self.mesh = make_mesh(data=1, fsdp=-1, context=1, tensor=1)
        self.model = Transformer(config, jnp.float32, "none")
        self.params = hf.load_params(path, config, mesh=self.mesh)
        self._logp = train_step.make_logp_step(
            self.model, self.mesh, temperature=1.0, logp_chunk=CHUNK
        )

    def place(self, responses: np.ndarray) -> Batch:
        return packing.to_mesh(make_batch(responses), train_step.batch_shardings(self.mesh))

    def logp(self, params: Any, responses: np.ndarray) -> np.ndarray:
        return np.asarray(self._logp(params, self.place(responses)))


def learn(path: str, steps: int, check: bool) -> None:
    mine, responses = Learner(path), work.make_rollouts().responses
    optimizer = make_optimizer(
        **work.ADAM,
        warmup_steps=0,
        final_fraction=1.0,
        num_steps=1000,
        weight_decay=0.0,
        mu_dtype="float32",
    )
    state = train_step.init_state(mine.model, optimizer, mine.mesh, mine.params)
    del mine.params
    step_fn = train_step.make_train_step(
        mine.model,
        OBJECTIVE,
        optimizer,
        mine.mesh,
        temperature=1.0,
        logp_chunk=CHUNK,
        kl_weight=0.0,
        ess_power=0.0,
        to_reference=False,
    )
    batch = mine.place(responses)

    def step() -> None:
        nonlocal state
        state, metrics = step_fn(state, batch)
        jax.block_until_ready((state, metrics))

    logp = lambda: mine.logp(state.params, responses).astype(np.float64).sum(1)
    work.run_learner(step, steps, check and logp)


def sample(path: str, steps: int, rollouts: str) -> None:
    config = hf.load_config(path)
    mesh = make_mesh(data=1, fsdp=-1, tensor=1)
    sampler = LocalSampler(
        config,
        mesh,
        dtype="float32",
        stop_ids=(config.vocab_size,),  # no token: every response has its full length
        seed=0,
        max_sequences=work.SEQUENCES,
        max_prompt_tokens=work.PROMPT,
        prompt_multiple=8,
        tokens_per_round=16,
    )
    sampler.set_params(0, hf.load_params(path, config, mesh=mesh))
    prompts = [
        Prompt(str(i), i, tokens, "", "", "")
        for i, tokens in enumerate(work.make_rollouts().prompts[:: work.GROUP_SIZE])
    ]
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=work.RESPONSE)
    found = {}

    def generate() -> None:
        groups = sampler.generate(prompts, n=work.GROUP_SIZE, sampling=sampling)
        made = [rollout for sampled in groups for rollout in sampled.rollouts]
        found.update(tokens=[r.tokens for r in made], logp=[r.behavior_logp for r in made])

    generate()
    taken = work.seconds(generate, steps)
    work.save_rollouts(rollouts, **found)
    work.report(seconds=taken)


def score(path: str, rollouts: str) -> None:
    """The largest difference between a sampler's log-probs and the learner's of the same tokens."""
    mine, saved = Learner(path), np.load(rollouts)
    work.report(gap=np.abs(mine.logp(mine.params, saved["tokens"]) - saved["logp"]).max())


def peak(steps: int) -> None:
    """GFLOP/s of the fastest of float32 products of 2048 x 2048 matrices."""
    product, a = jax.jit(lambda x: x @ x), jnp.ones((2048, 2048))
    run = lambda: product(a).block_until_ready()
    run()
    work.report(gflops=2 * 2048**3 / min(work.seconds(run, 10 * steps)) / 1e9)


if __name__ == "__main__":
    given = work.arguments()
    if given.part == "model":
        make_model(given.model)
        work.report()
    elif given.part in ("learner", "check"):
        learn(given.model, given.steps, check=given.part == "check")
    elif given.part == "sampler":
        sample(given.model, given.steps, given.rollouts)
    elif given.part == "score":
        score(given.model, given.rollouts)
    else:
        peak(given.steps)
