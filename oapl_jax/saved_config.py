"""The configuration that a workdir belongs to, and what of it may change."""

from typing import Any

from etils import epath

from oapl_jax.errors import UserError
from oapl_jax.weights.checkpoint import load_config, save_config

# Sections that shape what is saved or what it means; a workdir belongs to one choice of them.
# (After a change of lag.steps, the version that is due may never have been published.)
STRUCTURAL = (
    "seed",
    "group_size",
    "groups_per_step",
    "model",
    "data",
    "warmup",
    "buffer.mode",
    "curriculum.name",
    "curriculum.curator.path",
    "curriculum.curator.architecture",
    "lag",
    "rollout.source",
    "rollout.shards",
    "rollout.recorded_share",
    "rollout.recorded_order",
    "rollout.recorded_version",
    "rollout.record",
    "evaluation.n",
    "evaluation.ks",
)


def check_config(path: epath.Path, config: dict[str, Any]) -> list[str]:
    """Compares a configuration with the one saved in a workdir, saving it if there is none.

    Returns:
      A line for each setting that differs but may (a longer run, another mesh, another learning
      rate).

    Raises:
      UserError: listing the settings that differ and may not.
    """
    new = flat(config)
    saved = load_config(path.parent)
    old = new if saved is None else flat(saved)
    value = lambda config, key: config.get(key, "absent")
    differing = sorted(key for key in old.keys() | new.keys() if value(old, key) != value(new, key))
    structural = lambda key: any(key == s or key.startswith(s + ".") for s in STRUCTURAL)
    refused = [key for key in differing if structural(key) or key not in old or key not in new]
    describe = lambda key: f"{key}: {value(old, key)} -> {value(new, key)}"
    if refused:
        raise UserError(
            f"{path} was saved by a run with other settings ({'; '.join(map(describe, refused))}); "
            "set them back, or give another --workdir"
        )
    save_config(path.parent, config)
    return [describe(key) for key in differing]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = list(value) if isinstance(value, tuple) else value
    return out
