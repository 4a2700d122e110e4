"""Where the library is found, and what a user reads where it is not or does not fit the installed torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import selfattn

PACKAGE = Path(selfattn.__file__).parent


def run(program: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    """A fresh process with a copy of the package that has no library of its own."""
    copy = tmp_path / "selfattn"
    if not copy.exists():
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    clean = {k: v for k, v in os.environ.items() if k not in ("SELFATTN_LIBRARY", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**clean, **environment}, capture_output=True, text=True
    )


def used_library() -> str:
    return os.environ.get("SELFATTN_LIBRARY") or str(PACKAGE / "lib" / "libselfattn.so")


def test_missing_library_says_how_to_get_one(tmp_path: Path) -> None:
    done = run("import selfattn", tmp_path)
    assert done.returncode != 0
    assert "ImportError: selfattn: the package expects" in done.stderr and "pip install ." in done.stderr


def test_environment_that_names_no_file_is_named(tmp_path: Path) -> None:
    done = run("import selfattn", tmp_path, SELFATTN_LIBRARY="/nowhere/libselfattn.so")
    assert "ImportError: selfattn: the environment variable SELFATTN_LIBRARY names /nowhere" in done.stderr


def test_environment_names_the_library(tmp_path: Path) -> None:
    done = run("import selfattn; print(selfattn.__file__)", tmp_path, SELFATTN_LIBRARY=used_library())
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout


def test_library_that_was_loaded_before_is_kept(tmp_path: Path) -> None:
    done = run(f"import torch; torch.ops.load_library({used_library()!r}); import selfattn", tmp_path)
    assert done.returncode == 0, done.stderr


def second_copy(tmp_path: Path, name: str) -> str:
    """The same library as another file, which would define every operator a second time."""
    copy = tmp_path / name
    copy.write_bytes(Path(used_library()).read_bytes())
    return str(copy)


@pytest.mark.parametrize("name", ["libselfattn.so", "operators.so"])
def test_second_copy_of_the_library_is_refused_with_both_files(name: str, tmp_path: Path) -> None:
    copy = second_copy(tmp_path, name)
    program = f"import torch; torch.ops.load_library({copy!r}); import selfattn"
    done = run(program, tmp_path, SELFATTN_LIBRARY=used_library())
    assert done.returncode == 1, done.stderr  # an exception, no abort
    assert "ImportError: selfattn: " in done.stderr
    assert os.path.realpath(copy) in done.stderr and used_library() in done.stderr


def test_second_copy_that_no_python_loaded_is_refused(tmp_path: Path) -> None:
    copy = second_copy(tmp_path, "libselfattn.so")
    program = f"import ctypes, torch; ctypes.CDLL({copy!r}); import selfattn"
    done = run(program, tmp_path, SELFATTN_LIBRARY=used_library())
    assert done.returncode == 1 and "ImportError: selfattn: " in done.stderr, done.stderr


def test_same_library_under_another_path_is_kept(tmp_path: Path) -> None:
    link = tmp_path / "linked.so"
    link.symlink_to(used_library())
    program = f"import torch; torch.ops.load_library({used_library()!r}); import selfattn"
    done = run(program, tmp_path, SELFATTN_LIBRARY=str(link))
    assert done.returncode == 0, done.stderr


def test_same_library_is_loaded_twice(tmp_path: Path) -> None:
    program = f"import selfattn, torch; torch.ops.load_library({used_library()!r}); import selfattn"
    done = run(program, tmp_path, SELFATTN_LIBRARY=used_library())
    assert done.returncode == 0, done.stderr


def test_package_is_imported_twice(tmp_path: Path) -> None:
    program = "import sys, selfattn; [sys.modules.pop(m) for m in list(sys.modules) if m.startswith('selfattn')]"
    done = run(f"{program}; import selfattn", tmp_path, SELFATTN_LIBRARY=used_library())
    assert done.returncode == 0, done.stderr


def test_library_of_another_torch_is_refused_with_both_versions(tmp_path: Path) -> None:
    run("", tmp_path)
    (tmp_path / "selfattn" / "lib").mkdir()
    (tmp_path / "selfattn" / "lib" / "libselfattn.json").write_text('{"torch": "1.13.1"}')
    (tmp_path / "selfattn" / "lib" / "libselfattn.so").write_bytes(b"")
    done = run("import selfattn", tmp_path)
    for part in (
        "ImportError",
        "built for torch 1.13.1",
        f"installed torch is {torch.__version__}",
        "install torch 1.13.1",
    ):
        assert part in done.stderr


def test_file_that_is_no_library_gives_the_reason_of_the_loader(tmp_path: Path) -> None:
    path = tmp_path / "libselfattn.so"
    path.write_bytes(b"not a library")
    done = run("import selfattn", tmp_path, SELFATTN_LIBRARY=str(path))
    assert "ImportError: selfattn: " in done.stderr and "The loader said: " in done.stderr


@pytest.mark.parametrize("name", ["multihead_attention", "self_attention"])
def test_operators_work_without_the_package(name: str, tmp_path: Path) -> None:
    done = run(
        f"import torch; torch.ops.load_library({used_library()!r}); print(torch.ops.selfattn.{name}.default._schema)",
        tmp_path,
    )
    assert done.returncode == 0 and name in done.stdout, done.stderr
