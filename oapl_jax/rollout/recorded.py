"""Recorded groups as a stream, in the place of a sampler or beside one."""

import dataclasses
from collections import Counter
from typing import Any

from etils import epath

from oapl_jax.data.prompts import permutation
from oapl_jax.errors import RunError, UserError
from oapl_jax.files import checksum
from oapl_jax.rollout.dataset import MANIFEST, Shards
from oapl_jax.rollout.ledger import Ledger
from oapl_jax.rollout.sampler import Sampled
from oapl_jax.structs import Group

ORDERS = ("shuffled", "recorded")


class Recorded:
    """Draws groups from a set. Draw d is a pure function of (seed, d).

    Args:
      shards: the set.
      order: "shuffled": endless, each epoch a permutation drawn from [seed, epoch]. "recorded": as
        they were recorded, once.
      seed: of the permutations.
      policy_version: what the groups' version is in this run, or None for what was recorded. Lag is
        the learner's step minus it. An offline round starts from the weights that sampled the set
        and counts its steps from 0: there they are version 0, whatever step they were of the run
        that published them. A replay of a run's own stream takes the versions as recorded.
      start: the checkpoint directory that this run starts from, if it has one; a published version
        must be the one that sampled the set if `policy_version` is given.
      drop_zero_variance: whether groups with equal rewards are passed over.
      ledger: hears of each group, as sampled by the server "shards".

    `counts` has the groups "taken" and those passed over, "zero_variance".

    Raises:
      UserError: for an unknown order, or a set that is not what `policy_version` says.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        order: str,
        seed: int,
        policy_version: int | None,
        start: epath.Path | None,
        drop_zero_variance: bool,
        ledger: Ledger,
    ):
        if order not in ORDERS:
            raise UserError(
                f"rollout.dataset_order={order!r} is unknown; choose one of {', '.join(ORDERS)}"
            )
        if policy_version is not None:
            check_start(shards, start)
        self._shards, self._order, self._seed = shards, order, seed
        self._policy_version, self._drop_zero_variance = policy_version, drop_zero_variance
        self._ledger = ledger
        self._draw = 0
        self.counts: Counter[str] = Counter()

    def at(self, draw: int) -> Group:
        """The group of one draw; its prompt's draw becomes -1 - `draw`, which no live one has.

        Raises:
          RunError: beyond the end of a set in recorded order.
        """
        epoch, place = divmod(draw, len(self._shards))
        if self._order == "shuffled":
            place = int(permutation(self._seed, epoch, len(self._shards))[place])
        elif epoch:
            raise RunError(
                f"all {len(self._shards)} groups of {self._shards.directory} are used up; end the "
                "run earlier (num_steps), or set rollout.dataset_order='shuffled'"
            )
        group = self._shards[place]
        version = self._policy_version
        rollouts = group.rollouts
        if version is not None:
            rollouts = tuple(dataclasses.replace(r, policy_version=version) for r in rollouts)
        return Group(
            dataclasses.replace(group.prompt, stream_index=-1 - draw), rollouts, group.reward
        )

    def take(self, count: int, step: int) -> list[Group]:
        """The next `count` groups, for the gradient step at `step`.

        Raises:
          UserError: for a group of a version that the learner has yet to reach.
          RunError: if the set ends, or every group of it has equal rewards.
        """
        seen, taken, passed = [], [], 0
        while len(taken) < count:
            group = self.at(self._draw + len(seen))
            if group.policy_version > step:
                raise UserError(
                    f"{self._shards.directory} has groups of version {group.policy_version}, newer "
                    f"than the learner at step {step}; set rollout.dataset_version=0 if this run "
                    "starts from the weights that sampled them, or "
                    "rollout.dataset_order='recorded' to replay a run"
                )
            drop = self._drop_zero_variance and group.zero_variance
            passed = passed + 1 if drop else 0
            if passed == len(self._shards):
                raise RunError(
                    f"every group of {self._shards.directory} has equal rewards; make another set, "
                    "or keep them (buffer.zero_variance)"
                )
            seen.append((group, "zero_variance" if drop else "trained"))
            if not drop:
                taken.append(group)
        self._draw += len(seen)
        self.counts.update(taken=count, zero_variance=len(seen) - count)
        for group, end in seen:
            self._ledger.request(group.prompt, len(group.rollouts))
            self._ledger.sampled(Sampled(group.prompt, group.rollouts, "shards", 0.0), group.reward)
            self._ledger.end(group, end, step if end == "trained" else None)
        return taken

    def state(self) -> dict[str, Any]:
        """What `restore` needs to continue exactly here, JSON-able."""
        return {
            "stream_index": self._draw,
            "seed": self._seed,
            "order": self._order,
            "manifest": checksum(self._shards.directory / MANIFEST),
            "counts": dict(self.counts),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
          UserError: if the set, its order or the seed is another one.
        """
        mine = self.state() | {"stream_index": state["stream_index"], "counts": state["counts"]}
        if mine != state:
            raise UserError(
                f"the checkpoint's recorded stream ({state}) is not the configured one ({mine}); "
                "restore rollout.dataset, rollout.dataset_order and the seed, or start a new run"
            )
        self._draw, self.counts = state["stream_index"], Counter(state["counts"])


def check_start(shards: Shards, start: epath.Path | None) -> None:
    """Refuses to call the set's weights the ones that this run starts from, if they are not.

    Raises:
      UserError: if the set is of several versions, or `start` is a published version that did not
        sample it. A checkpoint without a publisher's manifest can't be told apart.
    """
    weights = shards.manifest["weights"]
    if len(weights) > 1:
        raise UserError(
            f"{shards.directory} was sampled from versions {shards.versions}, so it can't be of "
            "one; set rollout.dataset_version=-1, to take them as they were recorded"
        )
    if start is None or not (start / MANIFEST).exists():
        return
    if checksum(start / MANIFEST) not in weights.values():
        raise UserError(
            f"model.path={start} did not sample {shards.directory}; start from the version that "
            "did (in its directory weights), or set rollout.dataset_version=-1"
        )
