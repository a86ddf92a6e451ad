"""Golden checkpoints: tiny models of every supported architecture with transformers' logits.

    python tests/golden/make.py            writes them
    python tests/golden/make.py --check    compares transformers, the committed files and oapl_jax

adapters/ has LoRA adapters over some of the checkpoints, rounded to bfloat16, with the logits and
gradients of peft. edits.json has other spellings of rope settings, for the config.json of some of
the checkpoints, and edits.npz transformers' logits for these.

Needs torch, hence a separate environment (requirements/parity.txt, `make parity`); the tests read
the committed files and need only the package. The check compares both directions: our logits from
transformers' checkpoint, and transformers' logits from our export.
"""

import argparse
import json
import pathlib
import shutil
import sys
import tempfile
import zlib
from typing import Any

import jax
import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]  (not in the package's environment)
import transformers
from etils import epath
from flax.traverse_util import flatten_dict

HERE = pathlib.Path(__file__).parent
sys.path[:0] = map(str, HERE.parents[:2])  # checks the package without installing it

from small_models import forward, next_token_loss  # noqa: E402

from oapl_jax.model import hf  # noqa: E402
from oapl_jax.model.config import ModelConfig  # noqa: E402
from oapl_jax.model.lora import Lora, join  # noqa: E402

TOLERANCE = 1e-4  # on a logit, float32
ADAPTER_TOLERANCE = 1e-5  # on logits x (over 1 + |x|) and gradients with adapters, float32
BATCH, LENGTH = 2, 48

VOCABULARY = 64
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
# A small base rotates the slow dimensions far within 48 positions, and the constants put dimensions
# on every branch of the scaling: kept, interpolated and divided.
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
LLAMA3 = PLAIN | {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = PLAIN | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARN |= {"beta_fast": 1.0, "beta_slow": 0.1}
YARN_MSCALE = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}

# name (its first word is the architecture) -> changes to SIZES
CASES = {
    "qwen3": dict(head_dim=16, rope_parameters=PLAIN),
    "qwen3_tied": dict(head_dim=16, tie_word_embeddings=True, rope_parameters=PLAIN),
    "qwen3_yarn": dict(head_dim=16, rope_parameters=YARN),
    "qwen2": dict(rope_parameters=PLAIN),
    "qwen2_tied": dict(tie_word_embeddings=True, rope_parameters=PLAIN),
    "llama": dict(rope_parameters=PLAIN),
    "llama_tied": dict(tie_word_embeddings=True, rope_parameters=PLAIN),
    "llama_bias": dict(attention_bias=True, rope_parameters=PLAIN),
    "llama_llama3": dict(head_dim=16, rope_parameters=LLAMA3),
    "llama_yarn": dict(head_dim=16, rope_parameters=YARN_MSCALE),
}
SHARDED = "llama"  # saved in several files
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Checkpoint -> adapters over it.
ADAPTERS = {
    "qwen3": dict(r=4, lora_alpha=6, target_modules=ALL),
    "llama_bias": dict(r=3, lora_alpha=8, target_modules=["q_proj", "down_proj"]),
}
EDITS = json.loads((HERE / "edits.json").read_text())


def build(name: str) -> torch.nn.Module:
    """The float32 model of a case, with weights that use every term of the forward pass."""
    sizes = {**SIZES, "tie_word_embeddings": False, **CASES[name]}
    config = transformers.AutoConfig.for_model(name.partition("_")[0], **sizes)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            draw = rng.normal(size=parameter.shape)
            if "norm" in path:
                draw = 1 + 0.3 * draw
            elif path.endswith("bias"):
                draw = 0.5 * draw
            else:
                draw = draw * (1.5 / parameter.shape[-1] ** 0.5)
            parameter.copy_(torch.from_numpy(draw.astype(np.float32)))
    return model


def tokens_of(name: str) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()) + 1)
    return rng.integers(0, VOCABULARY, (BATCH, LENGTH)).astype(np.int32)


def torch_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def make(name: str) -> None:
    directory = HERE / name
    directory.mkdir(exist_ok=True)
    for stale in directory.iterdir():
        stale.unlink()
    model, tokens = build(name), tokens_of(name)
    model.save_pretrained(directory, max_shard_size="20KB" if name == SHARDED else "1GB")
    np.savez_compressed(directory / "golden.npz", tokens=tokens, logits=torch_logits(model, tokens))


def check(name: str) -> dict[str, float]:
    """Largest differences of logits, by comparison; a checkpoint that does not load is infinite."""
    directory, model = HERE / name, build(name)
    golden = np.load(directory / "golden.npz")
    tokens, expected = golden["tokens"], golden["logits"]
    difference = lambda found: float(np.abs(found - expected).max())

    config = hf.load_config(directory)
    params = hf.load_params(directory, config)
    result = {
        "live": difference(torch_logits(model, tokens)),
        "committed": difference(torch_logits(reload(directory), tokens)),
        "oapl_jax": difference(np.asarray(forward(config, params, tokens))),
    }
    for dtype, shard_bytes in (("float32", 1 << 30), ("float32", 10_000), ("bfloat16", 10_000)):
        with tempfile.TemporaryDirectory() as export:
            hf.save_params(params, config, export, dtype=dtype, max_shard_bytes=shard_bytes)
            loaded = reload(export)
        if dtype == "float32":
            split = "in shards" if shard_bytes < 1 << 30 else "in one file"
            result[f"export {split}"] = difference(torch_logits(loaded, tokens))
        else:  # rounding must be the only change
            ours, theirs = loaded.state_dict(), model.to(torch.bfloat16).state_dict()
            same = ours.keys() == theirs.keys() and all(
                torch.equal(ours[k], theirs[k]) for k in ours
            )
            result["export in bf16"] = 0.0 if same else float("inf")
    return result


def adapted(name: str) -> torch.nn.Module:
    """peft's float32 model: a checkpoint in bfloat16, but for norms, under random adapters."""
    base = reload(HERE / name)
    with torch.no_grad():
        for path, parameter in base.named_parameters():
            if "norm" not in path:
                parameter.copy_(parameter.bfloat16().float())
    config = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **ADAPTERS[name])
    model = peft.get_peft_model(base, config).eval()
    rng = np.random.default_rng(zlib.crc32(name.encode()) + 2)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                draw = rng.normal(size=parameter.shape) * (0.4 / parameter.shape[-1] ** 0.5)
                parameter.copy_(torch.from_numpy(draw.astype(np.float32)))
    return model


def adapter_figures(model: torch.nn.Module, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Logits, and the gradient of the next tokens' mean loss on each adapter."""
    logits = model(ids := torch.from_numpy(tokens).long()).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {
        path.replace(".default", ""): parameter.grad.numpy()
        for path, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"logits": logits.detach().numpy(), **gradients}


def make_adapters(name: str) -> None:
    directory, model = HERE / "adapters" / name, adapted(name)
    model.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / hf.ADAPTER_CONFIG
    config = json.loads(path.read_text()) | {"base_model_name_or_path": name}
    config["target_modules"].sort()  # a set of peft
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    figures: Any = adapter_figures(model, tokens_of(name))
    np.savez_compressed(directory / "golden.npz", **figures)


def check_adapters(name: str) -> dict[str, float]:
    """As `check`, for adapters; peft reads ours, and ours merged equal peft's."""
    directory, tokens = HERE / "adapters" / name, tokens_of(name)
    golden = np.load(directory / "golden.npz")
    lora, _ = hf.read_adapter_config(directory)
    config = hf.load_config(HERE / name)
    frozen = hf.load_params(HERE / name, config, dtype="bfloat16")
    params = hf.load_adapters(directory, config, lora)
    logits, gradients = adapter_figures_of(config, lora, frozen, params, tokens)
    expected = golden["logits"]
    difference = lambda found: float((np.abs(found - expected) / (1 + np.abs(expected))).max())
    differences = [difference(logits)]
    for tensor in hf.tensors_of(config, lora):
        gradient = gradients[tensor.path][tensor.layer]
        differences.append(float(np.abs(gradient - golden[tensor.name].T).max()))
    with tempfile.TemporaryDirectory() as export:
        base = str(HERE / name)
        hf.Adapters(lora, base, merged=True).save(
            params, config, epath.Path(export), dtype="float32", max_shard_bytes=1 << 30
        )
        merged = torch_logits(reload(export), tokens)
        below = pathlib.Path(export) / hf.MERGED_BELOW
        model = peft.PeftModel.from_pretrained(adapted(name).unload(), below).eval()
        read = torch_logits(model, tokens)
    live = adapter_figures(adapted(name), tokens)["logits"]
    found = {"live": live, "export to peft": read, "merged": merged}
    return {"oapl_jax": max(differences)} | {k: difference(v) for k, v in found.items()}


def adapter_figures_of(
    config: ModelConfig, lora: Lora, frozen: Any, params: Any, tokens: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Our logits, and gradients by path."""
    logits = forward(config, join(frozen, params), tokens, lora=lora)
    loss = lambda params: next_token_loss(config, join(frozen, params), tokens, lora=lora)
    gradients = flatten_dict(jax.grad(loss)(params), sep="/")
    return np.asarray(logits), {path: np.asarray(x) for path, x in gradients.items()}


def edited_logits(name: str) -> np.ndarray:
    """Logits of transformers for the first row of tokens, by an edited config.json."""
    checkpoint, tokens, config = edited(name)
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(checkpoint, directory, dirs_exist_ok=True)
        (pathlib.Path(directory) / "config.json").write_text(json.dumps(config))
        return torch_logits(reload(directory), tokens)


def edited(name: str) -> tuple[pathlib.Path, np.ndarray, dict]:
    checkpoint = HERE / EDITS[name]["checkpoint"]
    config = json.loads((checkpoint / "config.json").read_text()) | EDITS[name]["edit"]
    return checkpoint, np.load(checkpoint / "golden.npz")["tokens"][:1], config


def check_edited(name: str) -> dict[str, float]:
    """As `check`, for an edited config.json."""
    checkpoint, tokens, content = edited(name)
    expected = np.load(HERE / "edits.npz")[name]
    config = ModelConfig.from_hf(content, source=name)
    found = forward(config, hf.load_params(checkpoint, config), tokens)
    results = {"committed": edited_logits(name), "oapl_jax": np.asarray(found)}
    return {what: float(np.abs(logits - expected).max()) for what, logits in results.items()}


def reload(directory: pathlib.Path | str) -> torch.nn.Module:
    """Loads a checkpoint in its own dtype; raises unless names and shapes fit exactly."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    wrong = {key: sorted(names) for key, names in info.items() if names and key != "error_msgs"}
    if wrong or info.get("error_msgs"):
        raise ValueError(f"{directory} does not fit its model: {wrong} {info.get('error_msgs')}")
    return model.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    if not arguments.check:
        for name in CASES:
            make(name)
            logit = np.load(HERE / name / "golden.npz")["logits"]
            print(f"{name:14} logits {logit.min():.2f} to {logit.max():.2f}, std {logit.std():.2f}")
        for name in ADAPTERS:
            make_adapters(name)
        edits: dict[str, Any] = {name: edited_logits(name) for name in EDITS}
        np.savez_compressed(HERE / "edits.npz", **edits)
        return 0
    failed = []
    for i, name in enumerate(CASES):
        result = check(name)
        if i == 0:
            print(f"max |difference| of a logit, allowed {TOLERANCE:g}\n")
            print(" ".join([f"{'':14}", *(f"{what:>19}" for what in result)]))
        print(" ".join([f"{name:14}", *(f"{value:19.1e}" for value in result.values())]))
        failed += [f"{name}: {what}" for what, value in result.items() if not value <= TOLERANCE]
    print()
    for name in EDITS:
        result = check_edited(name)
        print(f"{name:40}", *(f"{what} {value:.1e}" for what, value in result.items()), sep="  ")
        failed += [f"{name}: {what}" for what, value in result.items() if not value <= TOLERANCE]
    for name in ADAPTERS:
        result = check_adapters(name)
        named = (f"{what} {value:.1e}" for what, value in result.items())
        print(f"{f'adapters over {name}':40}", *named, sep="  ")
        wrong = [what for what, value in result.items() if not value <= ADAPTER_TOLERANCE]
        failed += [f"adapters over {name}: {what}" for what in wrong]
    count = f"{len(CASES)} checkpoints, {len(EDITS)} edits, {len(ADAPTERS)} adapters"
    print(f"\n{count}, {len(failed)} mismatches", *failed, sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
