"""Faults of the soak test: each is a generator that yields the seconds until it goes on.

What a fault breaks, it mends before it ends; the run recovers beside the faults that follow.
"""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from scene import Scene

HOUR, DAY = 3600, 86400
SECOND_DEADLINE = 120.0  # seconds in which a second trainer must have ended
Fault = Callable[[Scene], Iterator[float]]


def kill(find: Callable[[Scene], Any], when: Callable[[Scene], bool] = lambda scene: True) -> Fault:
    """SIGKILL of one part, as soon as it runs and a condition holds."""

    def fault(scene: Scene) -> Iterator[float]:
        part = find(scene)
        ready = lambda: part.process is not None and when(scene)
        scene.wait(ready, f"the moment to kill the {part.name}")
        part.kill()
        yield 0.0

    return fault


def fill_disk(scene: Scene) -> Iterator[float]:
    scene.disk.fill()
    yield scene.random.uniform(5, 20)
    scene.disk.free()


def set_clock(scene: Scene) -> Iterator[float]:
    """The wall clock jumps, and stays there.

    A save or a read that waits for a clock that was set back ends its process at a deadline.
    """
    before = scene.clock.ahead
    scene.clock.set(scene.random.choice((-DAY, -HOUR, 0, HOUR, DAY)))
    yield 0.0
    if scene.clock.ahead < before:
        scene.permit_late_ends()
        scene.wait_for_saves()


def cut_network(scene: Scene) -> Iterator[float]:
    """Packets of one server, or of both, are lost."""
    machines = scene.random.sample(scene.machines, scene.random.choice((1, 1, 2)))
    for machine in machines:
        machine.cut()
    yield scene.random.uniform(5, 30)
    for machine in machines:
        machine.mend()


def damage_version(scene: Scene) -> Iterator[float]:
    """Flips the high bit of a weight's exponent in the newest version, which a server and maybe the
    trainer must then read again."""
    version = max(v for v in scene.versions() if v in scene.copied)
    flip_bit(scene.version_path(version) / "model.safetensors", scene.random)
    scene.random.choice(scene.servers).kill()
    if scene.random.random() < 0.5:
        scene.trainer.kill()
    yield 0.0


def flip_bit(path: pathlib.Path, random: Any) -> None:
    with path.open("r+b") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
        weights = (path.stat().st_size - header) // 4
        file.seek(header + 4 * random.randrange(weights) + 3)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x40]))


def start_second_trainer(scene: Scene) -> Iterator[float]:
    """A second trainer on the workdir must end and name the first one."""
    scene.wait(scene.trainer_holds_workdir, "a trainer that holds the workdir")
    first, number = scene.trainer.process, scene.counts["second trainers"]
    scene.counts["second trainers"] += 1
    second, waited = scene.start_trainer(scene.logs / f"second.{number}.log"), 0.0
    while second.code is None and scene.trainer.process is first and waited < SECOND_DEADLINE:
        waited += 1.0
        yield 1.0
    code, said = second.code, second.log.read_text()
    second.kill()
    alone = scene.trainer.process is not first  # the first one has ended by itself
    if not alone and (code != 2 or f"is in use by process {first.group} " not in said):
        scene.wrong.append(f"a second trainer ended with code {code}: {said[-300:]}")


FAULTS: dict[str, Fault] = {
    "SIGKILL of the trainer": kill(lambda scene: scene.trainer),
    "SIGKILL of a server": kill(lambda scene: scene.random.choice(scene.servers)),
    "SIGKILL of the router": kill(lambda scene: scene.router),
    "SIGKILL of the evaluation": kill(lambda scene: scene.evaluation),
    "SIGKILL of the run without overlap": kill(
        lambda scene: scene.round, when=lambda scene: bool(scene.checkpoints(scene.alone))
    ),
    "full disk": fill_disk,
    "clock jump": set_clock,
    "cut network": cut_network,
    "damaged version": damage_version,
    "second trainer": start_second_trainer,
}
