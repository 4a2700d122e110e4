"""Runs the program of host_time.cpp, host times of calls from C++, and records what it prints.

    python benchmarks/host_time.py --out benchmarks/results/decode_h200.jsonl

``--program`` is where a build with the C++ tests and CUDA has put it. It is run with the libraries that Python loads,
the installed torch and SELFATTN_LIBRARY, wherever it was built.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path

import torch
from measure import ROOT, add_record_options, describe_run, parse_with_tiny, sm_clock

from selfattn._library import library_path

PROGRAM = ROOT.parent / "build" / "tests" / "cpp" / "selfattn_host_time"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", type=Path, default=PROGRAM)
    parser.add_argument("--repeats", type=int, default=300)
    add_record_options(parser, "decode_h200.jsonl")
    arguments = parse_with_tiny(parser)
    command = [arguments.program, str(1 if arguments.tiny else arguments.repeats)]
    package = Path(torch.__file__).parent
    cuda = sorted((package.parent / "nvidia").glob("*/lib"))
    libraries = [package / "lib", library_path().absolute().parent, *cuda]
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries))}
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    run = {**describe_run(arguments.commit), "clocks": sm_clock()}
    rows = [json.loads(line) for line in printed.splitlines()]
    with arguments.out.open("a") as out:
        out.writelines(json.dumps({**row, **run}) + "\n" for row in rows)
    for row in rows:
        print(f"{row['case']:46} {row['impl']:10} {row['host_us']:8.2f} us  in a row {row['host_us_in_a_row']:8.2f} us")


if __name__ == "__main__":
    main()
