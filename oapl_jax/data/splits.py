"""The splits of a configuration, whichever its section `data` describes."""

from collections.abc import Sequence

from oapl_jax.config import FileDataConfig, PublicDataConfig, SyntheticDataConfig
from oapl_jax.data import question_files
from oapl_jax.data.public import releases
from oapl_jax.data.records import Record
from oapl_jax.data.synthetic import tasks


def open_splits(
    data: SyntheticDataConfig | PublicDataConfig | FileDataConfig,
) -> dict[str, Sequence[Record]]:
    """Opens train, validation and test, prepared if needed."""
    match data:
        case PublicDataConfig():
            return releases.open_splits(data)
        case FileDataConfig():
            return question_files.open_splits(data)
    return dict(tasks.open_splits(data))
