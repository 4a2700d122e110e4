"""python -m selfattn.cmake_prefix: what CMAKE_PREFIX_PATH needs for ``find_package(SelfAttn)`` to find this package."""

from pathlib import Path

PREFIX = Path(__file__).resolve().parent

if __name__ == "__main__":
    if not (PREFIX / "lib" / "cmake").is_dir():
        raise SystemExit(
            f"selfattn: {PREFIX} must be an installed package to hold the C++ headers and the CMake package; it is a "
            "source folder, whose install tree `make install` writes to build/install"
        )
    print(PREFIX)
