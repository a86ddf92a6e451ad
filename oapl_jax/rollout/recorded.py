"""Recorded groups as a stream, in place of a sampler or beside one."""

from collections import Counter
from dataclasses import replace
from typing import Any

from etils import epath

from oapl_jax.data.prompts import permutation
from oapl_jax.errors import RunError, UserError
from oapl_jax.files import checksum
from oapl_jax.rollout.dataset import MANIFEST, Dataset
from oapl_jax.rollout.ledger import Ledger
from oapl_jax.rollout.sampler import Sampled
from oapl_jax.structs import Group


class RecordedStream:
    """Streams groups from a dataset. Position p holds a pure function of (seed, p).

    Args:
      order: "shuffled": endless, each epoch a permutation drawn from [seed, epoch]. "recorded": in
        the order of the dataset, once.
      policy_version: the groups' version in this run, or None for the recorded one. Lag is the
        learner's step minus the version. An offline round starts from the weights that sampled the
        dataset and counts its steps from 0, so that these weights are its version 0.
      start: the checkpoint directory that this run starts from, if any; with `policy_version`, a
        published version must be the one that sampled the dataset.
      drop_zero_variance: whether groups with equal rewards are skipped.
      ledger: records each group, as sampled by the server "dataset".

    `counts` has the groups "taken" and those skipped, "zero_variance".

    Raises:
      UserError: for a dataset that contradicts `policy_version`.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        order: str,
        seed: int,
        policy_version: int | None,
        start: epath.Path | None,
        drop_zero_variance: bool,
        ledger: Ledger,
    ):
        if policy_version is not None:
            check_start(dataset, start)
        self._dataset, self._order, self._seed = dataset, order, seed
        self._policy_version, self._drop_zero_variance = policy_version, drop_zero_variance
        self._ledger, self._position = ledger, 0
        self.counts: Counter[str] = Counter()

    def at(self, position: int) -> Group:
        """Returns a group; its stream index becomes -1 - `position`, which no live one has.

        Raises:
          RunError: beyond the end of a dataset in recorded order.
        """
        epoch, index = divmod(position, len(self._dataset))
        if self._order == "shuffled":
            index = int(permutation(self._seed, epoch, len(self._dataset))[index])
        elif epoch:
            raise RunError(
                f"all {len(self._dataset)} groups of {self._dataset.directory} are used up; lower "
                "num_steps, or set rollout.dataset_order='shuffled'"
            )
        group, version = self._dataset[index], self._policy_version
        rollouts = group.rollouts
        if version is not None:
            rollouts = tuple(replace(rollout, policy_version=version) for rollout in rollouts)
        return Group(replace(group.prompt, stream_index=-1 - position), rollouts, group.reward)

    def take(self, count: int, step: int) -> list[Group]:
        """Takes the next `count` groups, for the gradient step at `step`.

        Raises:
          UserError: for a group of a version that the learner has yet to reach.
          RunError: if the dataset ends, or all its groups have equal rewards.
        """
        seen, taken, skipped = [], [], 0  # skipped since the last taken
        while len(taken) < count:
            group = self.at(self._position + len(seen))
            if group.policy_version > step:
                raise UserError(
                    f"{self._dataset.directory} has groups of version {group.policy_version}, "
                    f"newer than the learner at step {step}; set rollout.dataset_version=0, or "
                    "rollout.dataset_order='recorded' to replay a run"
                )
            drop = self._drop_zero_variance and group.zero_variance
            skipped = skipped + 1 if drop else 0
            if skipped == len(self._dataset):
                raise RunError(
                    f"every group of {self._dataset.directory} has equal rewards; record another "
                    "dataset, or keep them (buffer.zero_variance)"
                )
            seen.append((group, "zero_variance" if drop else "trained"))
            if not drop:
                taken.append(group)
        self._position += len(seen)
        self.counts.update(taken=count, zero_variance=len(seen) - count)
        for group, end in seen:
            sampled = Sampled(group.prompt, group.rollouts, "dataset", 0.0)
            self._ledger.request(group.prompt, len(group.rollouts))
            self._ledger.sampled(sampled, group.reward)
            self._ledger.end(group, end, step if end == "trained" else None)
        return taken

    def state(self) -> dict[str, Any]:
        """Returns the state that `restore` continues from, JSON-able."""
        return {
            "position": self._position,
            "seed": self._seed,
            "order": self._order,
            "manifest": checksum(self._dataset.directory / MANIFEST),
            "counts": dict(self.counts),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
          UserError: if the dataset, its order or the seed is another one.
        """
        mine = self.state() | {"position": state["position"], "counts": state["counts"]}
        if mine != state:
            raise UserError(
                f"the checkpoint's recorded stream ({state}) is not the configured one ({mine}); "
                "restore rollout.dataset, rollout.dataset_order and the seed, or start a new run"
            )
        self._position, self.counts = state["position"], Counter(state["counts"])


def check_start(dataset: Dataset, start: epath.Path | None) -> None:
    """Raises a UserError if a dataset was not sampled from the weights that this run starts from.

    A checkpoint without a publisher's manifest can't be told apart.
    """
    weights = dataset.manifest["weights"]
    if len(weights) > 1:
        raise UserError(
            f"{dataset.directory} was sampled from versions {dataset.versions}, so it can't be of "
            "one; set rollout.dataset_version=-1, to take the recorded versions"
        )
    published = start is not None and (start / MANIFEST).exists()
    if published and checksum(start / MANIFEST) not in weights.values():
        raise UserError(
            f"model.path={start} did not sample {dataset.directory}; start from the version that "
            "did (in its directory weights), or set rollout.dataset_version=-1"
        )
