"""Share of bfloat16 weights that differ between the versions of a run, against their lag.

    python benchmarks/weight_changes.py WORKDIR [WORKDIR ...]

compares all pairs of published versions of each run, tensor by tensor: a delta of two versions
holds the changed weights, so the share bounds its size. Versions in float32 are rounded to
bfloat16, as servers load them. A run keeps the versions that its lag policy and its checkpoints
need: a larger `checkpoint.keep` and a smaller `lag.steps` give more lags.
"""

import argparse
import itertools
from collections import defaultdict
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from results import keep, show
from safetensors import safe_open

from oapl_jax.errors import UserError, exit_with_code
from oapl_jax.files import absolute
from oapl_jax.weights.publisher import checked_version, published_versions, version_path


def changed(one: epath.Path, other: epath.Path) -> tuple[int, int]:
    """Number of bfloat16 weights whose bits differ between two local versions, and of all."""
    differing = total = 0
    for file in sorted(one.glob("*.safetensors")):
        with (
            safe_open(file, framework="numpy") as mine,
            safe_open(other / file.name, framework="numpy") as theirs,
        ):
            for name in mine.keys():  # noqa: SIM118 (it is no mapping)
                bits = [
                    opened.get_tensor(name).astype(ml_dtypes.bfloat16).view(np.uint16)
                    for opened in (mine, theirs)
                ]
                differing += int(np.count_nonzero(bits[0] != bits[1]))
                total += bits[0].size
    return differing, total


def shares_by_lag(workdir: epath.Path) -> dict[int, list[float]]:
    """Lag -> share of changed weights, of each pair of versions that far apart."""
    directory, shares = workdir / "versions", defaultdict(list)
    versions = published_versions(directory)
    if len(versions) < 2:
        raise UserError(f"{workdir} has versions {versions}; name a run that keeps two or more")
    for older, newer in itertools.combinations(versions, 2):
        with (
            checked_version(version_path(directory, older)) as one,
            checked_version(version_path(directory, newer)) as other,
        ):
            differing, total = changed(one, other)
        shares[newer - older].append(differing / total)
    return dict(sorted(shares.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="of a run with versions")
    rows: list[dict[str, Any]] = []
    for workdir in parser.parse_args().workdirs:
        for lag, shares in shares_by_lag(absolute(workdir)).items():
            share = f"{np.mean(shares):.2%}"
            rows.append({"run": workdir, "lag": lag, "changed": share, "pairs": len(shares)})
    show(rows)
    keep(rows)


if __name__ == "__main__":
    exit_with_code(main)
