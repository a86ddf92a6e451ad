"""A file of JSON lines that only grows, so that a killed evaluation goes on where it was."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from oapl_jax.errors import RunError, UserError
from oapl_jax.rollout.dataset import differences

BLOCK = 1 << 20  # bytes read at a time when looking for the last line


class Lines:
    """Appends to a file whose first line says what the others are about.

    A line is handed to the operating system at once; a last line that a kill has cut is removed
    when the file is opened. One process at a time has it open.

    Args:
      path: on a local disk.
      about: of the first line, JSON-able, with a "format".
      replace: whether a file that is about something else is begun anew.

    Attributes:
      path: as above.
      about: as above, in the types of JSON.

    Raises:
      UserError: if the file is about something else (without `replace`), if it is none of these
        files, or if another process has it open.
    """

    def __init__(self, path: epath.Path, about: Mapping[str, Any], *, replace: bool):
        if "://" in os.fspath(path):
            raise UserError(f"{path} can't be written line by line; name a local directory in --to")
        self.path, self.about = path, json.loads(json.dumps(about))  # as it is read again
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115
        try:
            self._lock()
            self._cut_after_last_line()
            found = self._first_line(self.about["format"])
            if found is not None and found != self.about:
                if not replace:
                    keys = [key for key in self.about if key in found]
                    differing = differences(self.about, found, keys)
                    raise UserError(
                        f"{path} is about something else ({differing}); set that back, or name "
                        "another directory in --to"
                    )
                self._file.truncate(0)
                found = None
            if found is None:
                self.append(self.about)
        except BaseException:
            self._file.close()
            raise

    def append(self, line: Mapping[str, Any]) -> None:
        try:
            text = json.dumps(line, separators=(",", ":"), allow_nan=False)
        except ValueError as error:
            raise RunError(f"a number for {self.path} is not finite: {line.keys()}") from error
        self._file.write(text.encode() + b"\n")
        self._file.flush()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Every line but the first, read from disk.

        Raises:
          UserError: for a line that is no JSON object.
        """
        with open(self.path, "rb") as file:
            for number, text in enumerate(file, 1):
                if number > 1:
                    yield self._parsed(text, number)

    def damaged(self, number: int | None, why: str) -> UserError:
        """An error about the file, or one line of it."""
        where = f"line {number} of {self.path}" if number else f"{self.path}"
        return UserError(
            f"{where} is damaged ({why}); delete it, or name another directory in --to"
        )

    def close(self) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is writing {self.path}; wait for it, or name another directory "
                "in --to"
            ) from error

    def _cut_after_last_line(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        while end:
            start = max(end - BLOCK, 0)
            self._file.seek(start)
            place = self._file.read(end - start).rfind(b"\n")
            if place >= 0:
                end = start + place + 1
                break
            end = start
        self._file.truncate(end)

    def _first_line(self, expected: str) -> dict[str, Any] | None:
        self._file.seek(0)
        text = self._file.readline()
        if not text:
            return None
        found = self._parsed(text, 1)
        if found.get("format") != expected:
            raise self.damaged(1, f"its format is {found.get('format')!r}, not {expected!r}")
        return found

    def _parsed(self, text: bytes, number: int) -> dict[str, Any]:
        try:
            line = json.loads(text)
        except ValueError as error:
            raise self.damaged(number, str(error)) from error
        if not isinstance(line, dict):
            raise self.damaged(number, "no object")
        return line
