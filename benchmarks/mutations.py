"""Damage the files that the product writes, one at a time, and see what its readers make of it.

    python benchmarks/mutations.py                     # 2,000 mutations, some minutes
    python benchmarks/mutations.py --count 300 --seed 1

A small dataset, a study of three trials and their checkpoints are made once. Each mutation works on
a copy: one file is cut, flipped, emptied, deleted, doubled, or filled with values of another type.
Then everything that reads this file is run. The outcome is

- same: the result is that of the undamaged file
- refused: one sentence
- told: another result, and a message about it
- edited: another result from a file that users edit, such as study.yaml
- absent: the file or its end was deleted, and what it held is missing in the result
- silent: another result without a word, which is a fault
- traceback: anything but a sentence, which is a fault
- hang: no end after 20 s, which is a fault

The exit code is 1 if there is a fault.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch

from amlp_ray import load_encoder
from amlp_ray.config import PrepareConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.manifest import SPLITS
from amlp_ray.data.phantoms import write_phantoms
from amlp_ray.data.prepare.pipeline import prepare
from amlp_ray.errors import AmlpError
from amlp_ray.study.report.comparison import compare_with_baselines, finished_baselines
from amlp_ray.study.report.report_data import collect
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.study import Study
from amlp_ray.training.checkpoint.restore import load_model, read_run_config
from amlp_ray.training.loggers.metrics_file import read_rows

LIMIT_S = 20.0
LONGEST_SENTENCE = 1200
FAULTS = ("silent", "traceback", "hang")
TRIAL = Path("runs/tiny/trials/0")
STUDY: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "pretrain": {
        "epochs": 2,
        "batch_size": 12,
        "model": {"width": 24, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_heads": 2},
    },
    "space": {"ratio.start": {"low": 0.2, "high": 0.5}},
    "probe": {"num_labeled": 12, "subsets": 2, "folds": 2},
    "pruner": {"name": "none", "rungs": 2},
    "budget": {"trials": 3},
    "baselines": ["scratch"],
    "baseline_seeds": 1,
}
# Files that nobody reads, or that only the time in them makes differ.
IGNORED = (".html", ".png", ".log", ".lock", "lock")
EDITED_BY_USERS = ("study.yaml",)


Reader = Callable[[Path], dict[str, Any]]


class Outcome(NamedTuple):
    """What a mutation led to."""

    file: str
    mutation: str
    outcome: str
    words: str  # the sentence, the messages or the last lines of the traceback


class _HangError(BaseException):
    """The time is over; no handler of errors catches it."""


def make_subject(root: Path) -> None:
    """Prepare a dataset and run a study, in a folder. Ray must be started, or is started."""
    source = write_phantoms(root / "source", count=40, size=32)
    config = PrepareConfig(layout="paired", size=32, group_by="image", fractions=(0.6, 0.2, 0.2))
    dataset = prepare(source, root / "dataset", config)
    shutil.rmtree(root / "source")
    Study.create(runs=root / "runs", data=dataset.path, **STUDY).run()


def read_dataset(root: Path) -> dict[str, Any]:
    """Read a dataset and every image of it."""
    dataset = PatchDataset.open(root / "dataset")
    result: dict[str, Any] = {"summary": dataset.summary()}
    for split in SPLITS:
        loaded = dataset.load(split)
        arrays = (loaded.images, loaded.masks, loaded.labeled, loaded.groups, loaded.keys)
        result[split] = [_digest(array) for array in arrays] + [loaded.ids]
    return result


def read_run(root: Path) -> dict[str, Any]:
    """Read config, checkpoint, metrics and encoder of a run."""
    folder = root / TRIAL
    config = read_run_config(folder)
    encoder = load_encoder(folder / "encoder.safetensors")
    spec = PatchDataset.open(root / "dataset").spec
    model, epoch = load_model(folder, config, spec)
    return {
        "config": config.model_dump(mode="json"),
        "metrics": read_rows(folder / "metrics.jsonl"),
        "encoder": _digest_of_model(encoder),
        "model": _digest_of_model(model),
        "epoch": epoch,
    }


def read_study(root: Path) -> dict[str, Any]:
    """Read all that status, table and report of a study show."""
    study = Study.open("tiny", runs=root / "runs")
    data = collect(StudyStore(root / "runs/tiny"))
    comparisons = compare_with_baselines(data, finished_baselines(data))
    return {
        "comparisons": [repr(comparison) for comparison in comparisons],
        "provenance": [study.trial(trial["number"]) for trial in study.trials()[:1]],
        "status": study.status(),
        "trials": study.trials(),
        "search": [repr(trial) for trial in data.search],
        "baselines": [repr(trial) for trial in data.baselines],
    }


READERS: dict[str, Reader] = {
    "dataset": read_dataset,
    "runs": read_study,
}


def readers_of(file: Path) -> list[Reader]:
    """Return what reads a file, given relative to the subject."""
    readers = [READERS[file.parts[0]]]
    if file.is_relative_to(TRIAL):
        readers.append(read_run)
    return readers


def files_of(root: Path) -> list[Path]:
    """List the files that are read, relative to the subject."""
    files = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        is_other_trial = "trials" in name.parts and not name.is_relative_to(TRIAL)
        is_ignored = path.name.endswith(IGNORED) or "tensorboard" in name.parts
        if path.is_file() and not is_other_trial and not is_ignored:
            files.append(name)
    return files


def mutate(content: bytes, rng: np.random.Generator) -> tuple[str, bytes | None]:
    """Draw a mutation of a file; return its name and the new content, None to delete the file."""
    choices = list(BINARY_MUTATIONS)
    if _is_text(content):
        choices += list(TEXT_MUTATIONS) * 2
    name = str(rng.choice(choices))
    change = BINARY_MUTATIONS.get(name) or TEXT_MUTATIONS[name]
    return name, change(content, rng)


def _is_text(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return bool(content)


def _position(content: bytes, rng: np.random.Generator) -> int:
    return int(rng.integers(0, max(len(content), 1)))


def _range(content: bytes, rng: np.random.Generator) -> slice:
    start = _position(content, rng)
    return slice(start, start + int(rng.integers(1, 65)))


def _flip_bit(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content or b"\0")
    changed[_position(content, rng)] ^= 1 << int(rng.integers(0, 8))
    return bytes(changed)


def _delete_range(content: bytes, rng: np.random.Generator) -> bytes:
    part = _range(content, rng)
    return content[: part.start] + content[part.stop :]


def _double_range(content: bytes, rng: np.random.Generator) -> bytes:
    part = _range(content, rng)
    return content[: part.stop] + content[part] + content[part.stop :]


def _insert_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    start = _position(content, rng)
    return content[:start] + rng.bytes(int(rng.integers(1, 33))) + content[start:]


def _zero_range(content: bytes, rng: np.random.Generator) -> bytes:
    part = _range(content, rng)
    return content[: part.start] + bytes(len(content[part])) + content[part.stop :]


BINARY_MUTATIONS: dict[str, Callable[[bytes, np.random.Generator], bytes | None]] = {
    "bit flipped": _flip_bit,
    "cut off": lambda content, rng: content[: _position(content, rng)],
    "emptied": lambda content, rng: b"",
    "deleted": lambda content, rng: None,
    "range deleted": _delete_range,
    "range doubled": _double_range,
    "bytes inserted": _insert_bytes,
    "range of zeros": _zero_range,
    "bytes appended": lambda content, rng: content + rng.bytes(40),
}


def _lines(content: bytes, rng: np.random.Generator) -> tuple[list[bytes], int]:
    lines = content.splitlines(keepends=True)
    return lines, int(rng.integers(0, len(lines)))


def _delete_line(content: bytes, rng: np.random.Generator) -> bytes:
    lines, number = _lines(content, rng)
    return b"".join(lines[:number] + lines[number + 1 :])


def _double_line(content: bytes, rng: np.random.Generator) -> bytes:
    lines, number = _lines(content, rng)
    return b"".join(lines[: number + 1] + lines[number:])


def _replace_token(content: bytes, rng: np.random.Generator) -> bytes:
    """Put a value of another type in the place of a number or a word."""
    import re

    tokens = list(re.finditer(rb"[A-Za-z_]+|-?\d+(\.\d+)?", content))
    if not tokens:
        return content + b"x"
    token = tokens[int(rng.integers(0, len(tokens)))]
    value = VALUES[int(rng.integers(0, len(VALUES)))]
    return content[: token.start()] + value + content[token.end() :]


VALUES = (b"null", b"true", b'"text"', b"[]", b"{}", b"-1", b"NaN", b"1e999", b"9" * 400, b"7")
TEXT_MUTATIONS: dict[str, Callable[[bytes, np.random.Generator], bytes | None]] = {
    "line deleted": _delete_line,
    "line doubled": _double_line,
    "token replaced": _replace_token,
    "UTF-16": lambda content, rng: content.decode().encode("utf-16"),
    "byte-order mark": lambda content, rng: b"\xef\xbb\xbf" + content,
    "Latin-1 letter": lambda content, rng: content.replace(b"a", b"\xe4", 1),
    "null": lambda content, rng: b"null\n",
    "a list": lambda content, rng: b"[1, 2]\n",
    "deep nesting": lambda content, rng: b'{"a":' * 20_000,
}


def try_mutation(
    scratch: Path, file: Path, rng: np.random.Generator, expected: dict[Reader, str]
) -> Outcome:
    """Mutate a file in a copy of the subject, and run its readers.

    Args:
        scratch: the copy.
        file: relative to it.
        rng: draws the mutation.
        expected: what the readers return of an undamaged copy.
    """
    original = (scratch / file).read_bytes()
    name, content = mutate(original, rng)
    if content is None:
        (scratch / file).unlink()
    else:
        (scratch / file).write_bytes(content)
    results = []
    for reader in readers_of(file):
        outcome, words = _run(reader, scratch, expected[reader])
        # Lines are appended: a file without its last ones is as a kill leaves it.
        is_shorter = content is None or original.startswith(content)
        if outcome == "silent" and is_shorter:
            outcome = "absent"
        if outcome == "silent" and file.name in EDITED_BY_USERS:
            outcome = "edited"
        results.append((outcome, words))
    worst = max(results, key=lambda result: SEVERITY.index(result[0]))
    return Outcome(_kind(file), name, *worst)


SEVERITY = ("same", "refused", "told", "edited", "absent", *FAULTS)


def _kind(file: Path) -> str:
    """Name a file without its numbers."""
    return "".join("N" if c.isdigit() else c for c in f"{file.parent.name}/{file.name}")[:40]


def _run(reader: Reader, scratch: Path, expected: str) -> tuple[str, str]:
    """Run a reader on the copy and compare with what it returns of an undamaged one."""
    with _messages() as messages:
        try:
            with _time_limit(LIMIT_S):
                result = _plain(reader(scratch), scratch)
        except AmlpError as error:
            return _check_sentences(error.messages)
        except _HangError:
            return "hang", ""
        except OSError as error:
            # The command line turns these into a sentence too, where they name a file.
            if error.filename is not None:
                return "refused", str(error)
            return "traceback", traceback.format_exc()
        except Exception:
            return "traceback", traceback.format_exc()
    if result == expected:
        return "same", ""
    if messages:
        return "told", messages[0]
    return "silent", _difference(expected, result)


def _check_sentences(messages: tuple[str, ...] | list[str]) -> tuple[str, str]:
    text = " ".join(messages)
    if "Traceback" in text or len(text) > LONGEST_SENTENCE:
        return "traceback", text
    return "refused", text


def _plain(result: dict[str, Any], scratch: Path) -> str:
    return json.dumps(result, default=str).replace(str(scratch), "COPY")


def _difference(expected: str, result: str) -> str:
    start = next(
        (i for i, (a, b) in enumerate(zip(expected, result, strict=False)) if a != b),
        min(len(expected), len(result)),
    )
    return f"{expected[max(start - 60, 0) : start + 60]} -> {result[start : start + 60]}"


@contextmanager
def _messages() -> Iterator[list[str]]:
    """Collect what the package logs."""
    collected: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: collected.append(record.getMessage())  # type: ignore[method-assign]
    package = logging.getLogger("amlp_ray")
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield collected
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise _HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def _digest_of_model(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def run_mutations(root: Path, count: int, seed: int) -> list[Outcome]:
    """Try mutations of all files in turn."""
    files = files_of(root)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        scratch = Path(folder) / "undamaged"
        shutil.copytree(root, scratch)
        readers = (*READERS.values(), read_run)
        expected = {reader: _plain(reader(scratch), scratch) for reader in readers}
        for number in range(count):
            rng = np.random.default_rng([seed, number])
            file = files[number % len(files)]
            # A folder each, since a warning about a file is given once.
            scratch = Path(folder) / f"copy {number}"
            shutil.copytree(root, scratch)
            outcomes.append(try_mutation(scratch, file, rng, expected))
            shutil.rmtree(scratch)
    return outcomes


def _print_table(outcomes: list[Outcome]) -> None:
    names = [*SEVERITY]
    print(f"{'file':<40} " + " ".join(f"{name:>9}" for name in names))
    for file in sorted({outcome.file for outcome in outcomes}):
        counts = Counter(outcome.outcome for outcome in outcomes if outcome.file == file)
        print(f"{file:<40} " + " ".join(f"{counts[name]:>9}" for name in names))
    counts = Counter(outcome.outcome for outcome in outcomes)
    print(f"{'all':<40} " + " ".join(f"{counts[name]:>9}" for name in names))


def main() -> int:
    """Make the subject, try the mutations and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="Folder of the subject; made if it is missing.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        root = arguments.keep or Path(folder) / "subject"
        if not root.exists():
            make_subject(root)
        outcomes = run_mutations(root, arguments.count, arguments.seed)
    _print_table(outcomes)
    faults = [outcome for outcome in outcomes if outcome.outcome in FAULTS]
    for fault in faults:
        print(f"\n{fault.outcome}: {fault.file}, {fault.mutation}\n{fault.words[-1500:]}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
