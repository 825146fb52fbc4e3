"""Time from image file to mask file: medseg compared with MONAI and nnU-Net.

    python benchmarks/inference.py --case phantom --network light --rounds 5
    python benchmarks/inference.py --case memory
    python benchmarks/inference.py --table docs/explanation/benchmarks.md

Each sample is a process of its own; a round runs every contestant once, and the order moves on by one each round. All
have the same threads, the same allocator, the same image, network, weights and windows. `benchmarks/README.md` says
what is measured and how each contestant is set up. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from side_by_side import memory, table
from side_by_side.contest import contest
from side_by_side.settings import CASES, CONTESTANTS, FAST, FEATURES, RESULTS
from side_by_side.work import Setup, default_work, prepare, say, threads_here


def main() -> None:
    """Run the selected contestants and write the record."""
    options = _arguments()
    if options.table is not None:
        table.render(RESULTS, options.table)
        return
    if options.case == "memory":
        setup = Setup(options.work, "phantom800", "light", options.threads, not options.plain_memory)
        record, name = memory.measure(setup), "inference_memory"
    else:
        network = options.network or CASES[options.case][0]
        tuned = not options.plain_memory
        setup = Setup(options.work, options.case, network, options.threads, tuned, overlap=options.overlap)
        prepare(setup, options.contestants)
        record, name = contest(setup, options.contestants, options.rounds), _name(options, network)
    _write(record, options.output or RESULTS / f"{name}.json")


def _name(options: argparse.Namespace, network: str) -> str:
    overlap = f"_overlap{round(options.overlap * 100)}" if options.overlap is not None else ""
    return f"inference_{options.case}_{network}{overlap}{'_plain' if options.plain_memory else ''}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CASES, "memory"], default="phantom")
    parser.add_argument("--network", choices=[*FEATURES], help="network of the CT cases (default light)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--contestants", type=_names, default=list(CONTESTANTS), help=f"contestants, from {','.join(CONTESTANTS)}"
    )
    parser.add_argument(
        "--threads", type=int, default=threads_here(), help="threads of every process (default: all cores)"
    )
    parser.add_argument("--overlap", type=float, help="overlap of the windows (default: that of the bundle)")
    parser.add_argument(
        "--plain-memory", action="store_true", help="use the memory settings of the C library for all contestants"
    )
    parser.add_argument("--work", type=Path, default=default_work(), help="folder of images, bundles and masks")
    parser.add_argument("--output", type=Path, metavar="FILE", help="record (default: under benchmarks/results)")
    parser.add_argument(
        "--table",
        nargs="?",
        type=Path,
        const=Path("-"),
        metavar="FILE",
        help="print the tables of all records, or insert them between the markers of a page",
    )
    options = parser.parse_args()
    options.work = options.work.absolute()
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.network and options.network not in CASES.get(options.case, FEATURES):
        parser.error(f"case {options.case} runs with its own network; leave --network out")
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads are at least 1")
    if "medseg-fast" in options.contestants and not FAST:
        say("medseg-fast is left out: settings.FAST is empty")
        options.contestants.remove("medseg-fast")


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in CONTESTANTS]
    if unknown or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{unknown or names}: choose each at most once from {', '.join(CONTESTANTS)}")
    return names


def _write(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": _command(), **_rounded(record)}, indent=1) + "\n", encoding="utf-8")
    say(f"record: {path}")


def _command() -> str:
    """Return the command line without paths of this machine."""
    words, places = sys.argv[1:], ("--work", "--output")
    kept = [
        word for i, word in enumerate(words) if word not in places and words[i - 1 : i] not in ([p] for p in places)
    ]
    return shlex.join(["python", "benchmarks/inference.py", *kept])


def _rounded(value: Any) -> Any:
    """Return the record rounded to six significant digits, beyond the precision of any measurement."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    main()
