"""Trains a small language model on packed documents, checks it, and hands it to a C++ program.

    python examples/train_packed/demo.py                      # the Python standard library's sources
    python examples/train_packed/demo.py --data ~/notes --suffix .md .txt
    torchrun --nproc-per-node 2 examples/train_packed/demo.py # the same training on two ranks

Interrupt it with Ctrl-C and run it again: it goes on where it was. The last line says whether every check passed; the
exit status says it too.
"""

import os

# Threads that wait for others sleep: where another program wants a core too, spinning makes a step several times as
# long. It is read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import platform
import shutil
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import checkpoints
import torch
from checks import check_isolation, most_crowded
from documents import DEFAULT_FOLDER, DEFAULT_SUFFIXES, Corpus, entropy_of_bytes, load_corpus
from export import build_generator, export_torchscript, run_generator
from generation import ROUNDINGS, compare_runs, openings, prompt_difference, rounding_of
from model import LanguageModel
from packing import PackedRows, pack
from parallel import OneProcess, add_options, find_ranks
from presets import PRESETS, Preset
from report import plot_loss, write_record
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from side_by_side import Comparison, compare_steps
from torch import nn
from training import Plan, Trainer, interruptible

import selfattn

console = Console(highlight=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")
INSTALL_TREE = Path(__file__).parents[2] / "build" / "install"  # where `make demo` installs the library
INTERRUPTED = 130  # the status that shells give to a program stopped by Ctrl-C


def main() -> int:
    arguments = parse_arguments()
    started = time.perf_counter()
    preset = PRESETS[arguments.size or ("large" if torch.device(arguments.device).type == "cuda" else "small")]
    plan = make_plan(arguments, preset)
    ranks = find_ranks(arguments, plan.rows_per_step)
    device = ranks.device
    arguments.out.mkdir(parents=True, exist_ok=True)

    corpus = load_corpus(arguments.data, tuple(arguments.suffix))
    train_rows = pack(corpus.train, plan.row_length, plan.seed)
    held_out_rows = pack(corpus.held_out, plan.row_length, plan.seed)
    held_out = held_out_rows[: preset.held_out_rows]
    describe_data(arguments.data, corpus, train_rows)

    trainer = make_trainer(plan, train_rows, ranks)
    describe_model(trainer.model, plan, ranks)
    folder = arguments.out / "checkpoints"
    if arguments.fresh:
        ranks.on_first(lambda: shutil.rmtree(folder, ignore_errors=True))
    checkpoint = checkpoints.latest(folder)
    if checkpoint is not None:
        trainer.load(checkpoint)
        console.print(f"Going on from step {trainer.step}, where {checkpoint} was written.")
    if not train(trainer, held_out, preset.evaluate_every, folder, ranks):
        console.print(f"Interrupted. Run the same command to go on from step {trainer.step}, or give --fresh.")
        return INTERRUPTED

    isolation = check_isolation(trainer.model, most_crowded(held_out_rows, 2), ranks)
    weights = ranks.gather(trainer.model)
    ranks.close()
    if not ranks.is_first:
        return 0
    model = make_model(plan).to(device)
    model.load_state_dict(weights)
    bound = arguments.bound or stated_bound(arguments.data, preset, corpus)
    comparisons = compare(model, corpus, preset, plan, device)
    checks = {
        f"held-out loss {trainer.history.held_out[-1][1]:.3f} bits per byte is below {bound:.3f}":
            trainer.history.held_out[-1][1] < bound,
        f"changing one document left the logits of all others as they were, bit by bit "
        f"({isolation.documents_changed} documents tried)": isolation.holds,
        "the step with segment ids and the step with a dense mask compute the same loss":
            all(comparison.loss_difference < preset.loss_tolerance for comparison in comparisons),
    }  # fmt: skip

    model = model.to("cpu")
    model_path = arguments.out / "model.pt"
    export_torchscript(model, model_path)
    speeds: dict[str, float] = {}
    if arguments.install_tree.is_dir():
        cpp_checks, speeds = continue_in_cpp(model, model_path, corpus, arguments)
        checks |= cpp_checks
    else:
        console.print(f"No C++ program: the library is not installed in {arguments.install_tree}.")
    shutil.rmtree(folder)

    plot_loss(arguments.out / "loss.png", trainer.history, bound)
    record = {
        "plan": asdict(plan),
        "machine": describe_machine(device),
        "ranks": ranks.description,
        "seconds": time.perf_counter() - started,
        "tokens_per_second": tokens_per_second(trainer),
        "generated_tokens_per_second": speeds,
        "held_out_bits_per_byte": trainer.history.held_out[-1][1],
        "bound": bound,
        "checks": checks,
        "isolation": asdict(isolation),
        "side_by_side": [asdict(comparison) for comparison in comparisons],
        "history": asdict(trainer.history),
    }
    write_record(arguments.out / "record.json", record)
    return conclude(checks, arguments.out, record["seconds"])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=DEFAULT_FOLDER, help="folder of text files, read with its subfolders")
    add("--suffix", nargs="+", default=list(DEFAULT_SUFFIXES), help="which files to read")
    add("--out", type=Path, default=Path("demo_out"), help="folder for the checkpoints and the results")
    add("--size", choices=PRESETS, help="how much to train (default: small on a CPU, large on a GPU)")
    add("--steps", type=int, help="overrides the size's number of steps")
    add("--rows-per-step", type=int, help="overrides the size's number of rows")
    add("--bound", type=float, help="held-out bits per byte to fall below (default: stated by the size)")
    add("--backend", default="auto", choices=selfattn.AttentionBackend.names(), help="of the attention")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--fresh", action="store_true", help="drop the checkpoints of an interrupted run")
    add("--install-tree", type=Path, default=INSTALL_TREE, help="of the library: for the C++ program")
    add("--prompt", default="def read_file(path", help="what the C++ program continues")
    add_options(parser)
    return parser.parse_args()


def make_plan(arguments: argparse.Namespace, preset: Preset) -> Plan:
    return Plan(
        seed=arguments.seed,
        steps=arguments.steps or preset.steps,
        rows_per_step=arguments.rows_per_step or preset.rows_per_step,
        row_length=preset.row_length,
        embedding_dim=preset.embedding_dim,
        num_layers=preset.num_layers,
        head_dim=preset.head_dim,
        learning_rate=preset.learning_rate,
        attention_backend=arguments.backend,
        data=str(arguments.data),
    )


def make_model(plan: Plan) -> LanguageModel:
    torch.manual_seed(plan.seed)
    config = selfattn.SelfAttentionConfig(
        head_dim=plan.head_dim, num_layers=plan.num_layers, attention_backend=plan.attention_backend
    )
    return LanguageModel(plan.embedding_dim, plan.hidden_dim, plan.num_layers, config)


def make_trainer(plan: Plan, rows: PackedRows, ranks: OneProcess) -> Trainer:
    return Trainer(plan, make_model(plan), rows, ranks)


def train(trainer: Trainer, held_out: PackedRows, evaluate_every: int, folder: Path, ranks: OneProcess) -> bool:
    """To the end of the plan, with a bar; False where the user interrupted it, and a checkpoint tells how far it is."""
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[bits]:.3f} bits/byte"),
        TextColumn("{task.fields[rate]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )

    def evaluate() -> None:
        bits = trainer.evaluate(held_out)
        progress.console.print(f"step {trainer.step}: {bits:.3f} bits per byte held out")

    with interruptible() as is_stop_asked, Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=trainer.plan.steps, completed=trainer.step, bits=float("nan"), rate=0.0)
        if not trainer.history.held_out:
            evaluate()
        while trainer.step < trainer.plan.steps and not ranks.any(torch.tensor(is_stop_asked())):
            trainer.train_one_step()
            bits = statistics.mean(trainer.history.bits_per_byte[-20:])  # one batch says little
            progress.update(task, completed=trainer.step, bits=bits, rate=tokens_per_second(trainer))
            if trainer.step % evaluate_every == 0 or trainer.step == trainer.plan.steps:
                evaluate()
                trainer.save(folder)
        if trainer.step < trainer.plan.steps:
            trainer.save(folder)
            return False
    return True


def tokens_per_second(trainer: Trainer) -> float:
    """Of the last steps: the first ones warm up."""
    recent = trainer.history.seconds[-20:]
    return trainer.plan.rows_per_step * trainer.plan.row_length * len(recent) / sum(recent)


def stated_bound(data: Path, preset: Preset, corpus: Corpus) -> float:
    """Known for the default data. For the user's own, what the frequencies of the bytes alone would give."""
    return preset.bound if data == DEFAULT_FOLDER else entropy_of_bytes(corpus.train)


def compare(model: LanguageModel, corpus: Corpus, preset: Preset, plan: Plan, device: torch.device) -> list[Comparison]:
    comparisons = []
    for rows, length in ((plan.rows_per_step, plan.row_length), preset.long_rows):
        # As much text as a few rows take: packing all of it would take longer than the steps.
        packed = pack(corpus.held_out[: 64 + rows * length // 100], length, plan.seed)
        comparison = compare_steps(model, packed[:rows].to(device), preset.comparison_repeats)
        ratio = comparison.dense_mask_seconds / comparison.segment_ids_seconds
        console.print(
            f"A step of {rows} x {length} tokens: {comparison.segment_ids_seconds * 1e3:.1f} ms with segment ids, "
            f"{comparison.dense_mask_seconds * 1e3:.1f} ms with a dense mask of "
            f"{comparison.dense_mask_bytes / 2**20:.1f} MiB ({ratio:.2f} times as long)"
        )
        comparisons.append(comparison)
    return comparisons


def continue_in_cpp(
    model: LanguageModel, model_path: Path, corpus: Corpus, arguments: argparse.Namespace
) -> tuple[dict[str, bool], dict[str, float]]:
    """The checks, and the tokens a second of each way to generate."""
    program = build_generator(arguments.install_tree, arguments.out / "build")
    prompt = arguments.prompt.encode()
    shown = run_generator(program, model_path, [prompt], "--device", arguments.device)
    console.rule("continued by the C++ program", align="left")
    console.print(arguments.prompt + shown.output, markup=False)
    console.rule()
    difference = prompt_difference(program, model, model_path, prompt)

    prompts = [prompt, *openings(corpus, 7)]
    likeliest = ("--temperature", "0", "--device", arguments.device)
    uncached = run_generator(program, model_path, prompts, "--uncached", *likeliest)
    speeds, agreements = {"without a cache": uncached.tokens_per_second}, []
    for rows in (1, 4, 8):
        cached = run_generator(program, model_path, prompts, "--rows", str(rows), *likeliest)
        speeds[f"cached, {rows} at once"] = cached.tokens_per_second
        agreements.append(compare_runs(cached, uncached, rounding_of(arguments.device)))
    console.print(
        f"The C++ program continues {len(prompts)} prompts, tokens/s: "
        + "; ".join(f"{way} {speed:,.0f}" for way, speed in speeds.items())
    )
    worst = max(agreement.largest_error for agreement in agreements)
    checks = {
        f"the logits of the C++ program are {f'up to {difference:.2g} away from' if difference else 'equal to'} "
        "Python's, bit by bit": difference == 0.0,
        f"the logits with a KV cache are those without, within {ROUNDINGS} roundings of the largest ({worst:.1f})":
            worst <= ROUNDINGS,
        f"the likeliest text with a KV cache is that without, until the two best logits lie within {ROUNDINGS} "
        f"roundings ({min(agreement.compared for agreement in agreements)} tokens compared)":
            all(agreement.texts_agree for agreement in agreements),
    }  # fmt: skip
    return checks, speeds


def describe_data(folder: Path, corpus: Corpus, rows: PackedRows) -> None:
    size = sum(map(len, corpus.train)) + sum(map(len, corpus.held_out))
    console.print(
        f"{size / 2**20:.1f} MiB of text in {len(corpus.train) + len(corpus.held_out):,} documents, the sections of "
        f"{corpus.num_files:,} files under {folder}"
    )
    console.print(
        f"Packed into {len(rows):,} rows of {rows.tokens.shape[1]} tokens: {rows.documents_per_row():.1f} documents "
        f"a row, {rows.fill():.1%} of the tokens are text"
    )


def describe_model(model: nn.Module, plan: Plan, ranks: OneProcess) -> None:
    device = ranks.device
    count = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{count:,} parameters, {plan.num_layers} layers, on {describe_machine(device)['device']}")
    if ranks.description:
        console.print(f"Spread over {ranks.description}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = plan.embedding_dim // plan.head_dim
    q = torch.zeros(plan.rows_per_step, plan.row_length, heads, plan.head_dim, dtype=dtype, device=device)
    ids = torch.zeros(q.shape[:2], dtype=torch.int32, device=device)
    console.print("Attention backends, for this model:")
    for line in selfattn.explain_backend(q, q, q, ids, backend=plan.attention_backend).splitlines():
        console.print(f"  {line}", markup=False)


def describe_machine(device: torch.device) -> dict[str, str | int]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def conclude(checks: dict[str, bool], out: Path, seconds: float) -> int:
    for promise, holds in checks.items():
        console.print(f"[green]ok[/green]      {promise}" if holds else f"[red]FAILED[/red]  {promise}")
    console.print(f"{out}: model.pt (TorchScript), loss.png, record.json. {seconds:.0f} seconds in all.")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
