"""Prints the ledger report of a run: rollouts by outcome, bias of dropping groups, throughput.

python -m oapl_jax.report WORKDIR [--host=N] [--json]

The exit code is 1 if the sums do not balance, 2 if the ledger is missing or damaged. The run may
be under way.
"""

import argparse
import json

from etils import epath

from oapl_jax import multihost
from oapl_jax.config import load_config
from oapl_jax.errors import RunError, exit_with_code
from oapl_jax.rollout.ledger import FILE, LedgerReport, table


def main() -> None:
    parser = argparse.ArgumentParser("oapl_jax.report", description="What became of rollouts")
    parser.add_argument("workdir", type=epath.Path, help="of a run, which may be under way")
    parser.add_argument("--host", type=int, default=0, help="each host of a run has its own ledger")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    arguments = parser.parse_args()
    load_config(arguments.workdir)
    report = LedgerReport(arguments.workdir / multihost.per_host_path(FILE, arguments.host))
    summary = report.summary()
    print(json.dumps(summary) if arguments.json else table(summary))
    if not summary["balanced"]:
        raise RunError(
            f"the sums do not balance: {report.requested} rollouts were requested, "
            f"{sum(summary['balance'].values())} are accounted for"
            + "".join(f"; {fault}" for fault in report.faults[:5])
        )


if __name__ == "__main__":
    exit_with_code(main)
