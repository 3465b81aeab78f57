"""The finished trials of one study, as they come in: in memory, or in a folder that no crash can spoil.

The folder holds

- `manifest.json`: the trial, the key, the float dtype, and the versions that began it;
- `part-….nc`: trials that were finished between two saves, in any order. A part is never changed. Its name carries the
  first number in it and the SHA-256 of its content, so that any damage shows, and several processes can add parts;
- `study.nc`: all trials up to the first that is missing, made from the parts (`archive.py`). The trials beyond it wait:
  those that end first are not a fair sample.
"""

import datetime
import hashlib
import io
import json
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import xarray as xr

from gradflow.archive import FILE, VARIABLES, UnreadableError, assembled, key_to_json, load, provenance, publish, write
from gradflow.record import Verdict
from gradflow.trial import Trial

MANIFEST = "manifest.json"
_SAME = ("trial", "key", "dtype")  # what the parts of a study have in common
_MISSING = -1

Columns = Mapping[str, np.ndarray]


class Part(NamedTuple):
    """Trials between the numbers `first` and `last`: in a file, or in memory; and where they come from."""

    first: int
    last: int
    count: int
    source: pathlib.Path | tuple[np.ndarray, Columns]
    run: str
    seconds: float
    lane_attempts: float


class Store:
    """The finished trials of a study.

    **Arguments** `trial`, `key`: which study; `folder`: where, made at the first save, or None for in memory; `trials`:
    how many are wanted.

    **Raises** `ValueError`, naming the file, if the folder holds another study or something that is none. A part that
    is damaged is renamed, with a warning, and its trials count as missing.
    """

    def __init__(self, trial: Trial, key, folder: pathlib.Path | None, trials: int):
        self.trial, self.key, self.folder = trial, key, folder
        self.stamp: dict[str, str] = provenance(trial, key)
        self.origin: dict[str, str] = {}  # of a study that is gone on with: it stays the study it was
        self.run = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self.codes = np.full(trials, _MISSING, np.int8)  # of the verdicts, by trial
        self.parts: list[Part] = []
        self.prefix = 0  # trials up to the first that is missing
        self.fresh: list[tuple[np.ndarray, Columns]] = []
        if folder is not None:
            self._open(folder)

    def missing(self, trials: int) -> np.ndarray:
        """The numbers below `trials` of those that are not there."""
        return np.flatnonzero(self.codes[:trials] == _MISSING)

    def done(self, trials: int) -> int:
        """How many of those below `trials` are there."""
        return int(np.sum(self.codes[:trials] != _MISSING))

    def verdicts(self, trials: int) -> dict[str, int]:
        """How many of those below `trials` that are there have each verdict."""
        return {verdict.name: int(np.sum(self.codes[:trials] == verdict.value)) for verdict in Verdict}

    def add(self, numbers: np.ndarray, columns: Columns) -> None:
        """Finished trials, to be saved with the next part."""
        self.fresh.append((numbers, columns))
        self._count(numbers, columns)

    def save(self, seconds: float, lane_attempts: float) -> None:
        """What was added since the last time becomes a part; `seconds`: the time that it took; `lane_attempts`: step
        attempts for which the lanes made time.
        """
        if not self.fresh:
            return
        numbers = np.concatenate([numbers for numbers, _ in self.fresh])
        columns = {name: np.concatenate([some[name] for _, some in self.fresh]) for name in VARIABLES}
        source = numbers, columns
        if self.folder is not None:
            stamp = self.stamp | {
                "title": "gradflow part",
                "run": self.run,
                "seconds": seconds,
                "lane_attempts": lane_attempts,
            }
            content = bytes(assembled(columns, numbers, stamp).to_netcdf(engine="scipy", format="NETCDF3_64BIT"))
            source = self.folder / f"part-{numbers.min():010d}-{_digest(content)}.nc"
            self._begin()
            publish(source, lambda partial: _put(partial, content))
        self.fresh = []
        line = f"on {self.stamp['backend']}, {self.stamp['versions']}"
        self._list(numbers, source, f"{self.run} {line}", seconds, lane_attempts)

    def dataset(self, trials: int) -> xr.Dataset:
        """The first `trials`, or all up to the first that is missing, if that comes earlier."""
        count = min(self.prefix, trials)
        if self.folder is None:
            return self.slice(0, count)
        return load(self.folder / FILE).isel(trial=slice(count))

    def write(self) -> None:
        """Make `study.nc` from the parts, unless it has all of them already."""
        if self.folder is None or not self.prefix:
            return
        file = self.folder / FILE
        if not (file.exists() and load(file).sizes["trial"] >= self.prefix):
            write(self.slice(0, 0), file, self.prefix, lambda _, first, last: self.rows(first, last))

    def slice(self, first: int, last: int) -> xr.Dataset:
        """These trials as a dataset in memory."""
        runs: dict[str, int] = {}
        for part in self.parts:
            runs[part.run] = runs.get(part.run, 0) + part.count
        history = "\n".join(f"{run.split(' ')[0]} {n} trials {run.split(' ', 1)[1]}" for run, n in sorted(runs.items()))
        spent = {name: sum(getattr(part, name) for part in self.parts) for name in ("seconds", "lane_attempts")}
        return assembled(
            self.rows(first, last),
            np.arange(first, last),
            self.stamp | self.origin | spent | {"history": history},
        )

    def rows(self, first: int, last: int) -> dict[str, np.ndarray]:
        """The columns of trials `first` up to but not including `last`, all of which must be there."""
        columns = {name: np.zeros(last - first, kind) for name, (kind, *_) in VARIABLES.items()}
        there = np.zeros(last - first, bool)
        for part in self.parts:
            if part.first < last and first <= part.last:
                numbers, some = self._read(part.source) if isinstance(part.source, pathlib.Path) else part.source
                inside = (first <= numbers) & (numbers < last)
                for name, column in columns.items():
                    column[numbers[inside] - first] = some[name][inside]
                there[numbers[inside] - first] = True
        if not there.all():
            raise RuntimeError(f"trial {first + int(np.argmin(there))} has ended and is in no part: a bug of gradflow")
        return columns

    # Files

    def _open(self, folder: pathlib.Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"path must be a directory, and {folder} is a file")
        manifest = folder / MANIFEST
        if not manifest.exists():
            found = [*folder.glob("part-*.nc"), *folder.glob(FILE)]
            if found:
                raise ValueError(f"{found[0]} lies there without the {MANIFEST} of its study; choose another path")
            return
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
            there = {name: content[name] for name in (*_SAME, "created", "versions")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{manifest} is damaged or something else: {error!r}; choose another path") from None
        self._check(manifest, there)
        self.origin = {name: there[name] for name in ("created", "versions")}
        for file in sorted(folder.glob("part-*.nc")):
            content = file.read_bytes()
            if _digest(content) != file.stem.rsplit("-", 1)[-1]:
                _set_aside(file, "its trials are run again")
                continue
            part = _dataset(content)
            self._check(file, part.attrs)
            numbers = part["trial"].values.astype(int)
            self._count(numbers, {"verdict": part["verdict"].values})
            run = f"{part.attrs['run']} on {part.attrs['backend']}, {part.attrs['versions']}"
            self._list(numbers, file, run, float(part.attrs["seconds"]), float(part.attrs["lane_attempts"]))
        if (whole := folder / FILE).exists():
            try:
                self._check(whole, load(whole).attrs)
            except UnreadableError:
                _set_aside(whole, "it is made anew")

    def _check(self, file: pathlib.Path, there: Mapping[str, str]) -> None:
        wanted = {"trial": self.trial.to_json(), "key": key_to_json(self.key), "dtype": str(jnp.result_type(float))}
        for name in _SAME:
            if there.get(name) != wanted[name]:
                raise ValueError(
                    f"{file} belongs to a study of another {name}; choose another path.\n"
                    f"  there: {there.get(name)}\n  asked: {wanted[name]}"
                )

    def _begin(self) -> None:
        assert self.folder is not None
        if not (manifest := self.folder / MANIFEST).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            content = json.dumps({name: self.stamp[name] for name in (*_SAME, "created", "versions")}, indent=1)
            publish(manifest, lambda partial: _put(partial, content.encode()))

    def _read(self, file: pathlib.Path) -> tuple[np.ndarray, Columns]:
        content = file.read_bytes()
        if _digest(content) != file.stem.rsplit("-", 1)[-1]:
            raise ValueError(
                f"{file} was damaged while the study ran; run the same again, and its trials are run again"
            )
        part = _dataset(content)
        return part["trial"].values.astype(int), {name: part[name].values for name in VARIABLES}

    # Counts

    def _list(self, numbers: np.ndarray, source, run: str, *spent: float) -> None:
        self.parts.append(Part(int(numbers.min()), int(numbers.max()), numbers.size, source, run, *spent))

    def _count(self, numbers: np.ndarray, columns: Columns) -> None:
        if (most := int(numbers.max(initial=-1)) + 1) > self.codes.size:
            self.codes = np.pad(self.codes, (0, most - self.codes.size), constant_values=_MISSING)
        self.codes[numbers] = columns["verdict"]
        while self.prefix < self.codes.size and self.codes[self.prefix] != _MISSING:
            self.prefix += 1


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _set_aside(file: pathlib.Path, consequence: str) -> None:
    torn = file.with_name(f"{file.name}.torn")
    os.replace(file, torn)
    warnings.warn(f"{file} is damaged: renamed to {torn.name}, and {consequence}", stacklevel=2)


def _put(file: pathlib.Path, content: bytes) -> None:
    file.write_bytes(content)


def _dataset(content: bytes) -> xr.Dataset:
    return xr.load_dataset(io.BytesIO(content), engine="scipy")
