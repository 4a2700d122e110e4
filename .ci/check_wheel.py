"""Fails where a wheel of selfattn is not what it must be: python .ci/check_wheel.py WHEEL

For every Python 3 and one minor version of torch, by its name and by its metadata; with one library, which needs
nothing but torch's libraries, found beside it, and what manylinux promises; with the C++ headers and the CMake package.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PLATFORM = re.compile(r"manylinux_2_\d+_(x86_64|aarch64)$")
TORCH = ("libtorch", "libtorch_cpu", "libtorch_cuda", "libc10", "libc10_cuda", "libcudart")
MANYLINUX = ("libstdc++", "libgcc_s", "libm", "libc", "libdl", "libpthread", "librt")
MANYLINUX += ("ld-linux-x86-64", "ld-linux-aarch64")
LIBRARY = "selfattn/lib/libselfattn.so"
OTHERS = (
    "selfattn/lib/libselfattn.json",
    "selfattn/lib/cmake/SelfAttn/SelfAttnConfig.cmake",
    "selfattn/include/selfattn/selfattn.h",
)


def dynamic_section(library: bytes) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(library)
        file.flush()
        return subprocess.run(["readelf", "-d", file.name], check=True, capture_output=True, text=True).stdout


def complaints(wheel: Path) -> list[str]:
    name, version, python, abi, platforms = wheel.stem.split("-")
    found = []
    if (name, python, abi) != ("selfattn", "py3", "none") or not all(map(PLATFORM.match, platforms.split("."))):
        found.append(f"its name must be selfattn-<version>-py3-none-manylinux_2_<n>_<machine>.whl; got {wheel.name}")
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        metadata = archive.read(f"selfattn-{version}.dist-info/METADATA").decode()
        dynamic = dynamic_section(archive.read(LIBRARY))
    needed_torch = re.findall(r"^Requires-Dist: torch==(\d+\.\d+)\.\*$", metadata, re.MULTILINE)
    local = re.search(r"\+torch(\d+\.\d+)(\.cpu)?$", version)
    if len(needed_torch) != 1 or not local or local[1] != needed_torch[0]:
        found.append(f"its version and its Requires-Dist must name one torch; got {version} and {needed_torch}")
    libraries = {file for file in files if ".so" in Path(file).suffixes}
    if libraries != {LIBRARY}:
        found.append(f"its only library must be {LIBRARY}; got {sorted(libraries)}")
    found += [f"it must hold {file}" for file in OTHERS if file not in files]
    paths = re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", dynamic)
    if not paths or paths[0].split(":")[0] != "$ORIGIN/../../torch/lib":
        found.append(f"the library must look for torch's in $ORIGIN/../../torch/lib first; got {paths}")
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    others = [library for library in needed if library.split(".so")[0] not in TORCH + MANYLINUX]
    found += [f"the library must not need {library}" for library in others]
    return found


if __name__ == "__main__":
    found = complaints(Path(sys.argv[1]))
    for complaint in found:
        print(f"{sys.argv[1]}: {complaint}")
    sys.exit(bool(found))
