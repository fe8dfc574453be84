"""What a run costs beside its budget, in seconds, on this machine: python tests/benchmarks/bench_cycle.py

The repository's train.py in a real session in a temporary clone: the baseline, with no compile cache, then steps of the
search, with one. Data: $AUTORESEARCH_CACHE, prepared first if need be, which is not counted.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import commit_all, make_checkout  # noqa: E402

PARTS = ("start, to the tokens", "checkpoint, end", "scoring", "in all")


def parts(checkout, id: str, budget_s: float) -> list[float]:
    """The seconds of PARTS of one row: by its trailers, and by when its two logs were closed."""
    row, folder = checkout.trailers(id, "cycle"), checkout.root / "runs" / "cycle" / id
    wall_s, train_s = float(row["Wall-S"]), float(row["Train-S"])
    scoring_s = (folder / "score.log").stat().st_mtime - (folder / "run.log").stat().st_mtime
    return [wall_s - train_s - scoring_s, train_s - budget_s, scoring_s, wall_s - budget_s]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--budget", type=float, default=10.0, metavar="S", help="seconds of training (10)")
    p.add_argument("--rows", type=int, default=4, metavar="N", help="runs after the first (4)")
    p.add_argument("--sandbox", default="auto", choices=("auto", "off"))
    args = p.parse_args()
    os.environ.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_SYSTEM=os.devnull)
    cache = Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")
    with tempfile.TemporaryDirectory() as folder:
        checkout = make_checkout(Path(folder) / "clone", cache, source=ROOT)
        commit_all(checkout)
        command = [sys.executable, "agent.py", "--time-budget", str(args.budget), "--experiments", str(1 + args.rows)]
        command += ["--proposer", "search", "--confirm", "never", "--sandbox", args.sandbox, "--tag", "cycle"]
        subprocess.run(command, cwd=checkout.root, env=checkout.env(), check=True)
        scored = [row["id"] for row in checkout.rows() if row["status"] in ("keep", "discard")]
        found = [parts(checkout, id, args.budget) for id in scored]
        print(f"\nseconds beside a budget of {args.budget:g} s, sandbox {args.sandbox}")
        print(f"{'':28}" + "".join(f"{name:>23}" for name in PARTS))
        for name, rows in (("the first run", found[:1]), (f"median of {len(found) - 1} after it", found[1:])):
            print(f"{name:28}" + "".join(f"{median(column):23.2f}" for column in zip(*rows)))


if __name__ == "__main__":
    main()
