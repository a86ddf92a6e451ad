"""The run report: what a run did, as an HTML page to look at and as a table in the terminal.

    python -m oapl_jax.report WORKDIR [WORKDIR ..] [--out=FILE] [--host=N] [--max_tokens=N]
    python -m oapl_jax.report WORKDIR [WORKDIR ..] --live [--port=N]
    python -m oapl_jax.report WORKDIR [WORKDIR ..] --json

The page is one file without any network: curves with intervals over seeds, lag, residuals, times,
the ledger, settings that differ, and a viewer of the kept rollouts (rollout.keep). It goes to
report.html in the first workdir, or to --out; the ledger report is printed beside it. --live
serves the page on 127.0.0.1 instead and follows the runs. --json prints the ledger report alone
and writes nothing. The runs may be under way.

The exit code is 1 if the sums of a ledger do not balance, 2 if a ledger is missing or damaged.
"""

import argparse
import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from oapl_jax import files, multihost
from oapl_jax.config import flatten, load_config
from oapl_jax.errors import RunError, UserError, exit_with_code
from oapl_jax.model.tokenizer import load_tokenizer
from oapl_jax.rollout.dataset import MANIFEST
from oapl_jax.rollout.kept import NOTES, fitted_points
from oapl_jax.rollout.ledger import FILE, LedgerReport, table
from oapl_jax.rollout.viewer import KeptRun, TokenTexts, viewer_columns
from oapl_jax.tracking import figures
from oapl_jax.tracking.live import make_server
from oapl_jax.tracking.metrics import read_lines
from oapl_jax.tracking.page import pack, page

MAX_TOKENS = 3_000_000  # of the viewer: a page of some 20 MB
SEEDS = ("seed", "data.seed")
PATHS = {"model.path", "rollout.dataset"}
LABEL = 24  # characters of a setting's value in a legend
FAULTS = 5  # of a ledger, in the sentence of an error
RUN_KEYS = {  # of the last line that has them, in the table of runs
    "step": "step",
    "rollout/reward": "reward",
    "eval/pass@1": "pass@1",
    "entropy": "entropy",
    "lag/mean": "lag",
    "skipped": "skipped steps",
    "rl_seconds": "seconds",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """The files of a run, read.

    Attributes:
      name: of the run, unique in the report.
      settings: full name -> value; {} if the workdir has no config.json.
      ledger: its report.
    """

    name: str
    workdir: epath.Path
    settings: Mapping[str, Any]
    ledger: LedgerReport
    summary: dict[str, Any]


def open_runs(workdirs: Sequence[epath.Path], host: int) -> list[Opened]:
    """Reads the configurations and ledgers; raises a UserError for a missing or damaged one."""
    runs = []
    for name, workdir in zip(short_names(workdirs), workdirs, strict=True):
        config = load_config(workdir)
        ledger = LedgerReport(workdir / multihost.per_host_path(FILE, host))
        runs.append(Opened(name, workdir, flatten(config or {}), ledger, ledger.summary()))
    return runs


def short_names(workdirs: Sequence[epath.Path]) -> list[str]:
    """The paths without the directories that all of them share."""
    # gs://bucket/run as /bucket/run, so that runs on disks and in buckets share a root.
    paths = [f"/{os.fspath(files.absolute(path)).split('://')[-1].strip('/')}" for path in workdirs]
    if len(set(paths)) < len(paths):
        raise UserError("a workdir is named twice; name each run once")
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, shared) for path in paths]


def differing(runs: Sequence[Opened]) -> dict[str, list[Any]]:
    """Full names of the settings that are not equal in all runs, with their values."""
    names = sorted({name for run in runs for name in run.settings})
    values = {name: [run.settings.get(name, "absent") for run in runs] for name in names}
    return {name: of for name, of in values.items() if any(value != of[0] for value in of)}


def series_of(runs: Sequence[Opened]) -> list[str]:
    """A label for each run, equal for those whose settings differ in their seeds alone.

    In a sweep each seed starts from its own warm-up and replays its own recording: paths that end
    alike count as the same, unless one seed has several.
    """
    differences = differing(runs)
    seeds = list(zip(*(differences.pop(name, [0] * len(runs)) for name in SEEDS), strict=True))
    for name in PATHS & differences.keys():
        paths = differences[name]
        of_seed = dict(zip(seeds, paths, strict=True))
        alike = len({os.path.basename(path) for path in paths}) == 1
        if alike and [of_seed[seed] for seed in seeds] == paths:
            del differences[name]
    values = {name: list(map(str, of)) for name, of in differences.items()}
    whole = list(zip(*values.values(), strict=True)) if values else [()] * len(runs)
    for name, of in sorted(values.items(), key=lambda item: item[0] != "objective.name"):
        if len(set(of)) == len(set(whole)):  # this setting alone tells the series apart
            short = "" if name == "objective.name" else f"{name.rpartition('.')[2]}="
            if max(map(len, of)) <= LABEL:
                return [f"{short}{value}" for value in of]
    first = {key: run.name for key, run in reversed(list(zip(whole, runs, strict=True)))}
    return [first[key] for key in whole]


def report_data(runs: Sequence[Opened], host: int, max_tokens: int, stamp: str) -> bytes:
    """Everything that the page shows, packed."""
    series, logs, kept = series_of(runs), [], []
    for run, label in zip(runs, series, strict=True):
        path = run.workdir / multihost.per_host_path("metrics.jsonl", host)
        rollouts = run.workdir / "rollouts"
        logs.append(
            figures.RunLog(
                name=run.name,
                series=label,
                lines=read_lines(path),
                balance=run.summary["balance"],
                fitted=fitted_points(rollouts),
            )
        )
        ends = {group.stream_index: _end(group) for group in run.ledger.groups()}
        texts = TokenTexts(_tokenizer(run))
        kept.append(KeptRun(name=run.name, directory=rollouts, texts=texts, ends=ends))
    columns, arrays = viewer_columns(kept, max_tokens=max_tokens)
    differences = differing(runs)
    several = len(set(series)) < len(series)
    header = {
        **columns,
        "stamp": stamp,
        "about": f"{len(runs)} run{'s' * (len(runs) > 1)}: {', '.join(run.name for run in runs)}",
        "curves_note": (
            "Means over the runs that differ in their seeds alone; bands are 95 % intervals "
            "(Student's t), of two runs their range."
            if several
            else "One run a series, without intervals: name runs of several seeds to get them."
        ),
        "figures": figures.make_figures(logs),
        "runs": {
            "head": ["run", "series", *RUN_KEYS.values()],
            "rows": [[log.name, log.series, *_latest(log.lines)] for log in logs],
        },
        "ledgers": [_ledger_tables(run) for run in runs],
        "differences": {
            "head": ["setting", *(run.name for run in runs)],
            "rows": [[name, *map(_shown, values)] for name, values in differences.items()],
            "none": "One run." if len(runs) == 1 else "The runs have equal settings.",
        },
        "kept_note": _kept_note(columns["kept"], columns["shown"]),
    }
    return pack(header, arrays)


def _end(group: Any) -> tuple[str, int | None]:
    """State and gradient step as metrics.jsonl counts it: that of the ledger is the one before."""
    return group.state, None if group.step is None else group.step + 1


def _tokenizer(run: Opened) -> Any | None:
    directory = run.settings.get("model.path") or os.fspath(run.workdir / "model")
    with contextlib.suppress(UserError, OSError, ValueError):
        return load_tokenizer(directory)
    return None  # moved away: the page shows token ids


def _latest(lines: Sequence[Mapping[str, Any]]) -> list[Any]:
    newest: dict[str, Any] = {}
    for line in lines:
        newest |= {key: line[key] for key in RUN_KEYS if key in line}
    return [newest.get(key) for key in RUN_KEYS]


def _shown(value: Any) -> Any:
    return value if isinstance(value, int | float) and value is not True else str(value)


def _ledger_tables(run: Opened) -> dict[str, Any]:
    """The summary of a ledger as tables: balance, bias of dropping groups, servers."""
    summary, requested = run.summary, run.summary["requested"]
    balance = [[k, n, f"{n / requested:.2%}"] for k, n in summary["balance"].items() if n]
    parts = [{"head": ["state", "rollouts", "share"], "rows": balance}]
    for kind, rows in (("sampled", summary["bias"]), ("server", summary["servers"])):
        if rows:
            columns = [name.replace("_", " ") for name in next(iter(rows.values()))]
            body = [[name, *of.values()] for name, of in rows.items()]
            parts.append({"head": [kind, *columns], "rows": body})
    sentence = "; ".join(summary["faults"][:FAULTS]) or f"{requested:,} rollouts requested"
    balanced = summary["balanced"]
    return {
        "title": run.name,
        "balanced": balanced,
        "sentence": f"{'Balanced' if balanced else 'NOT balanced'}: {sentence}.",
        "tables": parts,
    }


def _kept_note(kept: Mapping[str, int], shown: Mapping[str, int]) -> str:
    if not kept["groups"]:
        return (
            "No rollouts were kept: the run has just begun, samples nothing, or has rollout.keep=0."
        )
    every = f"{kept['responses']:,} responses of {kept['groups']:,} kept groups"
    if shown["groups"] == kept["groups"]:
        return f"All {every} are here, in pages. rollout.keep is the share of groups that is kept."
    return (
        f"An even sample of {shown['responses']:,} from {every}, in pages; --max_tokens takes more."
    )


def stamp_of(workdirs: Sequence[epath.Path], host: int) -> str:
    """Changes when a file that the report reads does."""
    names = [multihost.per_host_path(name, host) for name in ("metrics.jsonl", FILE)]
    names += [f"rollouts/{MANIFEST}", f"rollouts/{NOTES}", "config.json"]
    return " ".join(files.log_state(workdir / name) for workdir in workdirs for name in names)


def print_ledgers(runs: Sequence[Opened], *, as_json: bool) -> None:
    """Prints the ledger reports; of several runs as one JSON object by their names."""
    if as_json:
        whole = {run.name: run.summary for run in runs}
        print(json.dumps(whole if len(runs) > 1 else runs[0].summary))
        return
    for run in runs:
        print(f"\n{run.name}" if len(runs) > 1 else "", end="\n" * (len(runs) > 1))
        print(table(run.summary))


def check_balance(runs: Sequence[Opened]) -> None:
    for run in runs:
        if not run.summary["balanced"]:
            raise RunError(
                f"the sums of {run.workdir} do not balance: {run.ledger.requested} rollouts were "
                f"requested, {sum(run.summary['balance'].values())} are accounted for"
                + "".join(f"; {fault}" for fault in run.ledger.faults[:FAULTS])
            )


def serve(workdirs: Sequence[epath.Path], host: int, max_tokens: int, port: int) -> None:
    """Serves the page until Ctrl-C."""
    build = lambda stamp: report_data(open_runs(workdirs, host), host, max_tokens, stamp)
    with make_server(port, lambda: stamp_of(workdirs, host), build) as server:
        address, port = server.server_address[:2]
        print(f"http://{address}:{port}/ follows {len(workdirs)} runs; Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(
        "oapl_jax.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", type=epath.Path, nargs="+", metavar="WORKDIR", help="of a run")
    parser.add_argument("--out", type=epath.Path, help="file of the page")
    parser.add_argument("--host", type=int, default=0, help="each host of a run has its own ledger")
    parser.add_argument("--max_tokens", type=int, default=MAX_TOKENS, help="of the rollout viewer")
    parser.add_argument("--json", action="store_true", help="the ledger report as a JSON object")
    parser.add_argument("--live", action="store_true", help="serve the page and follow the runs")
    parser.add_argument("--port", type=int, default=8600, help="of --live; 0: any that is free")
    arguments = parser.parse_args()
    workdirs, host, max_tokens = arguments.workdirs, arguments.host, arguments.max_tokens
    runs = open_runs(workdirs, host)
    if arguments.live:
        serve(workdirs, host, max_tokens, arguments.port)
        return
    print_ledgers(runs, as_json=arguments.json)
    if arguments.out or not arguments.json:
        path = arguments.out or workdirs[0] / "report.html"
        html = page(report_data(runs, host, max_tokens, ""))
        files.write_atomically(path, [html.encode()])
        if not arguments.json:
            print(f"\n{path}")
    check_balance(runs)


if __name__ == "__main__":
    exit_with_code(main)
