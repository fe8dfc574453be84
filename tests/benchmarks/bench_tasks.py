"""How far the example tasks come, beside what is published: python tests/benchmarks/bench_tasks.py

Of each: the first run by hand under five seeds, then a session of `--proposer search` in a temporary clone, one hour, by
the same command as a user's. Prints both beside the published value, and the rows that were kept. An hour
and five minutes each; with a name (circles, distances, images) that one alone, with `--hours 0` its first runs alone.
Images compute on two cores, the others on one.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import stdev

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import commit_all, make_checkout  # noqa: E402

PUBLISHED = {"circles": 2.635983, "distances": 12.88923, "images": "-"}
SEEDS = (42, 43, 44, 45, 46)


def first_run(task: Path, folder: Path, seed: int) -> float:
    """The score of the task's train.py as it is, run and scored by hand. Raises CalledProcessError."""
    folder.mkdir()
    shutil.copy(task / "train.py", folder)
    env = os.environ | {"AUTORESEARCH_SEED": str(seed), "PYTHONPATH": str(task)}
    for args in [task / "train.py"], [task / "prepare.py", "score", "."]:
        subprocess.run([sys.executable, *args], cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "score.json").read_text())["score"]


def session(task: Path, folder: Path, hours: float) -> tuple[list[dict], str]:
    """The rows of a session on the task in a new clone, and what --status says of them."""
    checkout = make_checkout(folder / "clone", folder / "cache")
    place = checkout.root / "tests" / "tasks" / task.name
    shutil.copytree(task, place, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    commit_all(checkout)
    command, how = [sys.executable, "agent.py", "--task", str(place)], {"cwd": checkout.root, "env": checkout.env()}
    subprocess.run([*command, "--proposer", "search", "--hours", str(hours)], check=True, **how)
    head, *lines = (place / "results.tsv").read_text().splitlines()
    rows = [dict(zip(head.split("\t"), line.split("\t"))) for line in lines]
    return rows, subprocess.run([*command, "--status"], check=True, text=True, stdout=subprocess.PIPE, **how).stdout


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("names", nargs="*", default=[*PUBLISHED][:2], metavar="NAME", help="(circles distances)")
    p.add_argument("--hours", type=float, default=1.0, metavar="H", help="of search (1)")
    args = p.parse_args()
    os.environ.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_SYSTEM=os.devnull)
    for name in args.names:
        os.environ["OMP_NUM_THREADS"] = "2" if name == "images" else "1"
        task = ROOT / "tests" / "tasks" / name
        with tempfile.TemporaryDirectory() as folder:
            os.environ["AUTORESEARCH_CACHE"] = str(Path(folder) / "data")
            subprocess.run([sys.executable, task / "prepare.py"], check=True, stdout=subprocess.DEVNULL)
            first = [first_run(task, Path(folder) / str(seed), seed) for seed in SEEDS]
            rows, status = session(task, Path(folder), args.hours) if args.hours else ([], "")
        print(f"\n{name}: published {PUBLISHED[name]}")
        print(f"  first runs, seeds {SEEDS}: {', '.join(f'{score:.6f}' for score in first)}; sd {stdev(first):.6f}")
        if not rows:
            continue
        metric, kept = list(rows[0])[1], [row for row in rows if row["status"] == "keep"]
        print(f"  after {args.hours:g} h of search, {len(rows)} runs: {status.splitlines()[1]}")
        for row in kept:
            print(f"    {row['id']}  {row[metric]}  {row['description']}")


if __name__ == "__main__":
    main()
