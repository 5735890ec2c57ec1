"""Proof, tuning and tables of this GPU.

    python -m benchmarks.gpu [--minutes 9] [--out DIR] [--parts NAME ...] [--again] [--dry] [--workers N]
    python -m benchmarks.gpu report DIR
    python -m benchmarks.gpu keep DIR
    python -m benchmarks.gpu one 'TASK' [--out DIR]

Measures in order of worth, each part in its box of time: ceilings (copy and product, of which floors are made),
correctness (every kernel and gradient against float64), operators (at the paper's shapes, beside other forms), compile
and tuning (block sizes; the table is DIR/<GPU>.json), tuned (again, with that
table), networks and compiled (images a second), training (a step of every family). A row of DIR/rows.jsonl for each
measurement as it is made, failures too. What DIR has of this code and GPU is not measured again, but with --again.

`report` makes DIR/report.md and its plots, on any machine. `keep` puts a run into the repository, to be committed: the
table into kernels/tuned/, where the package reads it, rows and report into benchmarks/results/. `one` repeats a task in
this process. --dry takes a CPU, tiny shapes and Triton's interpreter; so does a machine without a GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    verb = arguments[0] if arguments and arguments[0] in ("report", "keep", "one") else "run"
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if verb in ("report", "keep"):
        parser.add_argument("verb")
        parser.add_argument("folder", type=Path)
        args = parser.parse_args(arguments)
        from benchmarks.gpu import report
        from benchmarks.gpu.importable import ROOT, make_importable

        make_importable()
        if verb == "report":
            print(report.write(args.folder))
        else:
            print(*report.keep(args.folder, ROOT / "benchmarks" / "results", ROOT / "kernels" / "tuned"), sep="\n")
        return 0
    if verb == "one":
        parser.add_argument("verb")
        parser.add_argument("task")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/gpu"))
    parser.add_argument("--dry", action="store_true")
    if verb == "run":
        parser.add_argument("--minutes", type=float, default=9)
        parser.add_argument("--parts", nargs="+", metavar="NAME", help="default: all, in the order above")
        parser.add_argument("--again", action="store_true", help="measure also what is there already")
        parser.add_argument("--workers", type=int, help="processes; default one a core but one, 0: none, for dry runs")
    args = parser.parse_args(arguments)
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which PyTorch does at times
    from benchmarks.gpu.importable import make_importable

    make_importable()
    import torch

    if not args.dry and not torch.cuda.is_available():
        return subprocess.call([sys.executable, "-m", "benchmarks.gpu", *arguments, "--dry"])
    return one(args, args.dry) if verb == "one" else run(args, args.dry, parser)


def run(args: argparse.Namespace, dry: bool, parser: argparse.ArgumentParser) -> int:
    from benchmarks.gpu import report, rows
    from benchmarks.gpu.parts import PARTS
    from benchmarks.gpu.runner import Runner

    wanted = args.parts or list(PARTS)
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"--parts: {', '.join(unknown)} is none of {', '.join(PARTS)}")
    store = rows.Store(args.out.resolve())
    store.common = rows.machine(dry)
    workers = args.workers
    if workers is None:
        workers = 1 if dry else max(1, min(15, (os.cpu_count() or 2) - 1))
    if not workers and not dry:
        parser.error("--workers 0 is for dry runs: what fails would take the others with it")
    say = lambda line: print(line, flush=True)  # noqa: E731
    say("  ".join(f"{k} {v}" for k, v in store.common.items()))
    runner = Runner(store, dry, workers, say)
    try:
        runner.run([name for name in PARTS if name in wanted], args.minutes * 60, args.again)
    finally:
        runner.close()
    say(report.summary(store.rows))
    return 0


def one(args: argparse.Namespace, dry: bool) -> int:
    from benchmarks.gpu import rows, worker
    from benchmarks.gpu.parts import PARTS
    from benchmarks.gpu.runner import brief

    store = rows.Store(args.out.resolve())
    store.common = rows.machine(dry)
    part = args.task.split("/")[0]
    found = [t for t in (PARTS[part].tasks(dry, store) if part in PARTS else []) if t.name == args.task]
    if not found:
        print(f"no task is called {args.task!r}; names are those of rows.jsonl", file=sys.stderr)
        return 2
    failed = 0
    for row in worker.resolve(found[0]):
        if row is not None:
            failed += "error" in row
            print(brief(dict(row, task=args.task)), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
