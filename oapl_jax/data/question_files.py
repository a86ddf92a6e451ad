"""Questions in files of one's own: `data.sets.train` and, if named, `validation` and `test`.

Each row of a file is a record, with all columns as its metadata. A split without a file is drawn
from the training questions.
"""

import string
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from oapl_jax.config import FileDataConfig, ReleaseConfig
from oapl_jax.data.public.releases import open_set
from oapl_jax.data.records import Record, Subset
from oapl_jax.data.synthetic.demonstrations import solution
from oapl_jax.errors import UserError
from oapl_jax.tracking.progress import log

SPLITS = ("train", "validation", "test")
DRAWN = SPLITS[1:]


def open_splits(config: FileDataConfig) -> dict[str, Sequence[Record]]:
    """Opens train, validation and test, which have no question in common.

    A question of a named validation or test file is left out of training. A split without a file
    takes random questions of the training file, chosen by `data.seed`. Both are logged.

    Raises:
      UserError: for a file that is missing, damaged or without the columns, or with too few
        questions to draw from.
    """
    sets = {split: _release(config, split) for split in SPLITS if config.sets[split]}
    opened: dict[str, Sequence[Record]] = {
        split: open_set(split, sets, section="data.sets", data_dir=config.data_dir)
        for split in sets
    }
    whole = opened["train"]
    held = {record.id for split in DRAWN if split in opened for record in opened[split]}
    kept = [i for i in range(len(whole)) if not held or whole[i].id not in held]
    if len(kept) < len(whole):
        repeated = len(whole) - len(kept)
        log(f"{repeated} training questions are in the validation or test file too: left out")
    left = np.random.default_rng(config.seed).permutation(kept).tolist()
    for split in DRAWN:
        if split in opened:
            continue
        count = min(max(round(config[f"{split}_share"] * len(whole)), 1), config.most_drawn)
        drawn, left = left[:count], left[count:]
        opened[split] = Subset(whole, sorted(drawn))
        log(
            f"{split}: {len(drawn)} of the {len(whole)} questions of {config.sets.train}, drawn "
            f"with data.seed={config.seed}, not trained on; data.sets.{split} names a file instead"
        )
    if not left:
        raise UserError(
            f"no question of data.sets.train={config.sets.train} is left to train on: validation "
            f"and test take all {len(whole)}; give more, or name files of other questions in "
            "data.sets.validation and data.sets.test"
        )
    opened["train"] = Subset(whole, sorted(left))
    return opened


def _release(config: FileDataConfig, split: str) -> ReleaseConfig:
    """The settings of a file for the readers of releases."""
    path = config.sets[split]
    if not epath.Path(path).exists():
        raise UserError(
            f"data.sets.{split}={path} does not exist; name a .jsonl, .json or .parquet file"
        )
    options = {"task": config.task, **config.columns}
    return ReleaseConfig(
        kind="questions", path=path, files=(), rows=0, part=(0, 100), options=options
    )


def characters(splits: Mapping[str, Sequence[Record]], instruction: str) -> str:
    """Printable ASCII and all other characters of questions and demonstrations, for the tokenizer
    of a fresh model."""
    found = set(instruction)
    for split in splits.values():
        for record in split:
            found.update(solution(record), *(message["content"] for message in record.messages))
    return string.printable + "".join(sorted(found - set(string.printable)))
