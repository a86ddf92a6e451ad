"""A checkout of tpu_setup/ whose scripts find fake programs of the cloud."""

import json
import os
import pathlib
import shutil
import subprocess

ROOT = pathlib.Path(__file__).parents[2]


class Checkout:
    """A git checkout of tpu_setup/ with fake programs on its PATH.

    folder: of the checkout, the fake programs (bin/) and their state.
    as_someone: git in the checkout, with an author.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder, self.checkout = folder, folder / "checkout"
        shutil.copytree(ROOT / "tpu_setup", self.checkout / "tpu_setup")
        author = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
        self.as_someone = ["git", *author, "-C", os.fspath(self.checkout)]
        for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message=m"]):
            self.git(*words)

    def git(self, *words: str) -> str:
        done = subprocess.run(
            [*self.as_someone, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def play(self, fail: dict[str, int], **story) -> None:
        """Writes the story of the fake programs; `fail` counts failures, by command.

        A failure prints `says`, a line by default.
        """
        fail = {name.replace("_", " "): times for name, times in fail.items()}
        story = {"says": "ERROR: on order", **story, "fail": fail}
        (self.folder / "story.json").write_text(json.dumps(story))

    def all_calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        here = os.fspath(self.folder)
        return os.environ | dict(PATH=path, FAKE_CLOUD=here, TMPDIR=here)


def program(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
