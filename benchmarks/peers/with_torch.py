"""transformers with a GRPO step by hand, and its `generate`."""

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import work
from transformers import AutoModelForCausalLM


def load(path: str):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def response_logp(model, tokens):
    """[B, RESPONSE] log-probs of the responses in int64[B, PROMPT + RESPONSE]."""
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    # The head on the places that predict a response, and on no others.
    logits = model.lm_head(hidden[:, work.PROMPT - 1 : -1])
    flat, targets = logits.flatten(0, 1), tokens[:, work.PROMPT :].flatten()
    return -torch.nn.functional.cross_entropy(flat, targets, reduction="none").view(len(tokens), -1)


def batch_tokens():
    batch = work.make_rollouts()
    return torch.tensor(np.concatenate([batch.prompts, batch.responses], 1), dtype=torch.int64)


@torch.no_grad()
def sequence_logp(model, tokens) -> np.ndarray:
    parts = [response_logp(model, part).double().sum(1) for part in tokens.split(work.MICRO_BATCH)]
    return torch.cat(parts).numpy()


def learner(path: str, steps: int, check: bool) -> None:
    model, tokens = load(path).train(), batch_tokens()
    advantages = torch.tensor(work.make_rollouts().advantages)
    adam = work.ADAM
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=adam["learning_rate"],
        betas=(adam["b1"], adam["b2"]),
        eps=adam["eps"],
        weight_decay=0.0,
        foreach=True,
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for part, gain in zip(
            tokens.split(work.MICRO_BATCH), advantages.split(work.MICRO_BATCH), strict=True
        ):
            logp, gain = response_logp(model, part), gain[:, None]
            ratio = torch.exp(logp - logp.detach())
            clipped = ratio.clamp(1 - work.CLIP, 1 + work.CLIP)
            losses = torch.maximum(-gain * ratio, -gain * clipped).mean(1)
            (losses.sum() / work.SEQUENCES).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), adam["max_grad_norm"])
        optimizer.step()

    work.run_learner(step, steps, check and (lambda: sequence_logp(model, tokens)))


def sampler(path: str, steps: int, rollouts: str) -> None:
    model, prompts = load(path).eval(), torch.tensor(work.make_rollouts().prompts).long()
    found = {}

    @torch.no_grad()
    def sample() -> None:
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=work.RESPONSE,
            eos_token_id=None,
            pad_token_id=work.PAD,
            return_dict_in_generate=True,
            output_scores=True,
        )
        tokens = out.sequences[:, work.PROMPT :]
        # As in model.compute_transition_scores, which copies all scores (4 GB).
        logp = [
            scores.gather(1, chosen[:, None])[:, 0] - scores.logsumexp(1)
            for scores, chosen in zip(out.scores, tokens.T, strict=True)
        ]
        found.update(tokens=tokens.numpy(), logp=torch.stack(logp, 1).numpy())

    sample()
    taken = work.seconds(sample, steps)
    work.save_rollouts(rollouts, **found)
    work.report(seconds=taken)


if __name__ == "__main__":
    given = work.arguments()
    torch.manual_seed(0)
    if given.part == "sampler":
        sampler(given.model, given.steps, given.rollouts)
    else:
        learner(given.model, given.steps, check=given.part == "check")
