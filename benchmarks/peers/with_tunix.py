"""google-tunix: its trainer with its GRPO loss, set up as by its GRPOLearner, and its Sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import work
from flax import nnx
from tunix.generate import sampler as tunix_sampler  # pyright: ignore[reportMissingImports]
from tunix.models.qwen3 import model as qwen3  # pyright: ignore[reportMissingImports]
from tunix.models.qwen3 import params as qwen3_params  # pyright: ignore[reportMissingImports]
from tunix.rl import common, function_registry  # pyright: ignore[reportMissingImports]
from tunix.rl import trainer as rl_trainer  # pyright: ignore[reportMissingImports]
from tunix.rl.grpo.grpo_learner import (  # pyright: ignore[reportMissingImports]
    GRPOConfig,
    TrainExample,
)
from tunix.sft.peft_trainer import TrainingConfig  # pyright: ignore[reportMissingImports]


def load(path: str):
    sizes = work.ARCHITECTURE
    config = qwen3.ModelConfig(
        num_layers=sizes["num_hidden_layers"],
        vocab_size=sizes["vocab_size"],
        embed_dim=sizes["hidden_size"],
        hidden_dim=sizes["intermediate_size"],
        num_heads=sizes["num_attention_heads"],
        head_dim=sizes["head_dim"],
        num_kv_heads=sizes["num_key_value_heads"],
        rope_theta=int(sizes["rope_theta"]),
        norm_eps=sizes["rms_norm_eps"],
        use_tied_embedding=True,
    )
    return qwen3_params.create_model_from_safe_tensors(path, config)


def examples() -> list[TrainExample]:
    batch = work.make_rollouts()
    parts = [slice(i, i + work.MICRO_BATCH) for i in range(0, work.SEQUENCES, work.MICRO_BATCH)]
    return [
        TrainExample(
            prompt_ids=jnp.asarray(batch.prompts[part]),
            prompt_mask=jnp.ones((work.MICRO_BATCH, work.PROMPT), bool),
            completion_ids=jnp.asarray(batch.responses[part]),
            completion_mask=jnp.ones((work.MICRO_BATCH, work.RESPONSE), bool),
            advantages=jnp.asarray(batch.advantages[part]),
            ref_per_token_logps=None,
            old_per_token_logps=None,
        )
        for part in parts
    ]


def sequence_logp(model, parts: list[TrainExample]) -> np.ndarray:
    graph, state = nnx.split(model)
    found = [
        common.compute_per_token_logps(
            graph, state, part.prompt_ids, part.completion_ids, work.PAD, work.STOP
        )
        for part in parts
    ]
    return np.concatenate([np.asarray(logp, np.float64).sum(1) for logp in found])


def learner(path: str, steps: int, check: bool) -> None:
    model, parts, adam = load(path), examples(), work.ADAM
    optimizer = optax.chain(
        optax.clip_by_global_norm(adam["max_grad_norm"]),
        optax.adamw(
            adam["learning_rate"], b1=adam["b1"], b2=adam["b2"], eps=adam["eps"], weight_decay=0.0
        ),
    )
    settings = TrainingConfig(
        eval_every_n_steps=1_000_000,
        gradient_accumulation_steps=len(parts),
        pbar_description=None,
    )
    trainer = rl_trainer.Trainer(model, optimizer, settings, custom_checkpoint_metadata_fn=dict)
    trainer.is_managed_externally = True  # as by GRPOLearner: train() may be called again
    config = GRPOConfig(num_generations=work.GROUP_SIZE, beta=0.0, epsilon=work.CLIP)
    config.temperature = 1.0
    loss = function_registry.get_policy_loss_fn(config.policy_loss_fn)
    trainer.with_loss_fn(
        lambda model, train_example, algo_config: loss(
            model, train_example, algo_config=config, pad_id=work.PAD, eos_id=work.STOP
        ),
        has_aux=True,
    )
    trainer.with_gen_model_input_fn(lambda x: {"train_example": x, "algo_config": config})
    trainer.with_rl_metrics_to_log({"kl": np.mean, "pg_clipfrac": np.mean})

    def step() -> None:
        trainer.train(parts)
        jax.block_until_ready(jax.tree.leaves(trainer.optimizer.opt_state))

    work.run_learner(step, steps, check and (lambda: sequence_logp(model, parts)))


class Numbers:
    """A tokenizer of numbers between spaces. No token stops a response, so all have full length."""

    def encode(self, text: str, **rest) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **rest) -> str:
        return ""

    def bos_id(self) -> int:
        return 0  # none

    def eos_id(self) -> int:
        return -1

    def pad_id(self) -> int:
        return -1


def sampler(path: str, steps: int, rollouts: str) -> None:
    sizes = work.ARCHITECTURE
    cache = tunix_sampler.CacheConfig(
        cache_size=work.PROMPT + work.RESPONSE,
        num_layers=sizes["num_hidden_layers"],
        num_kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
    )
    sampler = tunix_sampler.Sampler(load(path), Numbers(), cache)
    texts = [" ".join(map(str, prompt)) for prompt in work.make_rollouts().prompts]
    found = {}

    def sample() -> None:
        out = sampler(
            texts,
            max_generation_steps=work.RESPONSE,
            max_prompt_length=work.PROMPT,
            return_logprobs=True,
            temperature=1.0,
            top_p=1.0,
            top_k=None,
            seed=0,
        )
        found.update(tokens=np.stack(out.tokens), logp=np.array(out.logprobs))

    sample()
    taken = work.seconds(sample, steps)
    work.save_rollouts(rollouts, **found)
    work.report(seconds=taken)


if __name__ == "__main__":
    given = work.arguments()
    if given.part == "sampler":
        sampler(given.model, given.steps, given.rollouts)
    else:
        learner(given.model, given.steps, check=given.part == "check")
