"""A real session whose ideas are known to help, to do nothing, or to harm: python tests/benchmarks/bench_gains.py

The shipped train.py, spoiled in two constants, in a temporary clone; a scripted model behind HTTP proposes to put them
right, to change what changes nothing, and to spoil more. Prints every row, what was kept of which kind, the report, and
what the verified model writes. Data: $AUTORESEARCH_CACHE, prepared if need be. 15 runs of --budget seconds or more.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import agent  # noqa: E402
from conftest import Server, commit_all, make_checkout, reply  # noqa: E402

SPOILED = {"HEAD_LR": 0.001, "MATRIX_LR": 0.004}  # each costs over 0.1 bits per byte
IDEAS = (  # kind, edit
    ("harm", "SET HEAD_LR = 0.0003"),
    ("nothing", "SET ROPE_BASE = 11000.0"),
    ("help", "SET HEAD_LR = {HEAD_LR}"),
    ("nothing", "SET SOFTCAP = 31.0"),
    ("harm", "SET MATRIX_LR = 0.001"),
    ("help", "SET MATRIX_LR = {MATRIX_LR}"),
    ("nothing", "SET ADAM_BETA2 = 0.951"),
    ("harm", "SET HEAD_LR = 0.0015"),
)


def spoil(text: str, preset: str) -> tuple[str, dict]:
    """train.py with bad constants, and the good ones."""
    good = {name: knob.value for name, knob in agent.knobs(text, preset).items() if name in SPOILED}
    edits = tuple(agent.Edit("set", name, repr(value)) for name, value in SPOILED.items())
    return agent.apply_edits(text, edits, preset), good


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--budget", type=float, default=40.0, metavar="S", help="seconds of training (40)")
    p.add_argument("--confirm", default="auto", choices=("always", "auto", "never"))
    args = p.parse_args()
    os.environ.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_SYSTEM=os.devnull)
    cache = Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")
    with tempfile.TemporaryDirectory() as folder:
        checkout, server = make_checkout(Path(folder) / "clone", cache, source=ROOT), Server()
        subprocess.run([sys.executable, "prepare.py"], cwd=checkout.root, env=checkout.env(), check=True)
        meta = json.loads((cache / (cache / "current").read_text() / "meta.json").read_text())
        text, good = spoil(checkout.text(), meta["preset"])
        (checkout.root / "train.py").write_text(text)
        commit_all(checkout)
        edits = [(kind, edit.format(**good)) for kind, edit in IDEAS]
        server.script = [reply(edit, description=f"{kind}: {edit}") for kind, edit in edits]
        command = [sys.executable, "agent.py", "--time-budget", str(args.budget), "--experiments", str(1 + len(IDEAS))]
        command += ["--verify", "--confirm", args.confirm, "--model", "tiny", "--tag", "known"]
        subprocess.run(command, cwd=checkout.root, env=checkout.env(OPENAI_BASE_URL=server.url), check=True)
        rows = [(row["description"].split(":")[0], row["status"]) for row in checkout.rows()]
        for kind in ("help", "nothing", "harm"):
            found = Counter(status for which, status in rows if which == kind)
            print(f"ideas that {kind}: " + ", ".join(f"{count} {status}" for status, count in found.items()))
        print((checkout.root / "runs" / "known" / "report.md").read_text())
        sample = [sys.executable, "prepare.py", "sample", "runs/known/best", "--prompt", "def main"]
        subprocess.run(sample, cwd=checkout.root, env=checkout.env(), check=True)


if __name__ == "__main__":
    main()
