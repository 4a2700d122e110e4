"""Documents from a folder of text files: each file's sections, as bytes, in a training and a held-out part."""

import hashlib
import math
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

DEFAULT_FOLDER = Path(sysconfig.get_paths()["stdlib"])
DEFAULT_SUFFIXES = (".py",)
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"}
HELD_OUT_PERCENT = 8
SECTION_BREAK = re.compile(rb"\n(?:[ \t]*\n){2,}|\n(?:[ \t]*\n)(?=[ \t]*(?:@|def |async def |class ))")


@dataclass(frozen=True)
class Corpus:
    """A document is a section of a file: in Python sources a function or a method, elsewhere what stands between two
    blank lines in a row."""

    train: list[bytes]
    held_out: list[bytes]
    num_files: int


def load_corpus(folder: Path = DEFAULT_FOLDER, suffixes: tuple[str, ...] = DEFAULT_SUFFIXES) -> Corpus:
    """Reads every file under ``folder`` with one of ``suffixes``; whole files are held out, so that no part of a
    held-out file is trained on."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in suffixes
        and path.is_file()
        and SKIPPED_FOLDERS.isdisjoint(path.relative_to(folder).parts[:-1])
    )
    corpus = Corpus(train=[], held_out=[], num_files=len(files))
    for path in files:
        part = corpus.held_out if _is_held_out(path.relative_to(folder)) else corpus.train
        part.extend(split_into_documents(path.read_bytes()))
    if not corpus.train or not corpus.held_out:
        raise SystemExit(
            f"{folder} has too little text for a training and a held-out part: {len(files)} files with the suffixes "
            f"{', '.join(suffixes)} were found"
        )
    return corpus


def split_into_documents(text: bytes) -> list[bytes]:
    text = text.replace(b"\r\n", b"\n")
    return [section + b"\n" for section in SECTION_BREAK.split(text) if section.strip()]


def entropy_of_bytes(documents: list[bytes]) -> float:
    """Bits per byte of a model that knows how often each byte occurs, and nothing more."""
    counts = Counter()
    for document in documents:
        counts.update(document)
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())


def _is_held_out(path: Path) -> bool:
    """Decided by the name alone, so that the split is the same on every machine and in every run."""
    return hashlib.sha256(path.as_posix().encode()).digest()[0] * 100 < HELD_OUT_PERCENT * 256
