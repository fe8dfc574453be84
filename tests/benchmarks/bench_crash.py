"""Kill real sessions and check what the next start makes of it: python tests/benchmarks/bench_crash.py --kills 200

--kills N: N sessions die by SIGKILL at a random moment, the agent alone or with all its processes, as in a power cut.
--every [STEP]: one session dies before and after its 1st, 2nd, 3rd ... git command (or every STEP-th), and then the same
with a commit of the user's between the kill and the restart. After each, the same command goes on; then nothing may be
lost or counted twice. Exits with 1 on a loss and leaves the checkouts. The audit reads by plain git, with nothing of agent.py.
"""

import argparse
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import USER, commit_all, make_checkout  # noqa: E402

ROUNDS = 10  # kills in one checkout
LATEST_S = 2.5  # from the start of a session to its kill
FORM = "%H%x01%P%x01%s%x01%(trailers:unfold,only)%x02"

# Scores fall with the clock, so that every experiment is a keep, but for some values of DECAY where the file `odd` is
MODEL = """    digit = round(1000 * DECAY) % 10 if (prepare.CACHE / "odd").exists() else 0
    if digit == 7:
        raise TypeError("seven")
    if digit == 5:
        return {"invalid": "five"}
    return {"bpb": 1.2 - 1e-4 * (time.time() - NOW) + (0.1 if digit in (1, 3) else 0)}
"""

# A git that counts its calls and kills the agent, whose child it is, before or after the one that it is told
FAKE_GIT = """#!/bin/sh
n=$(($(cat COUNT) + 1))
echo $n > COUNT
[ $n.before = "$KILL_AT" ] && kill -9 $PPID && exit 1
REAL "$@"
rc=$?
[ $n.after = "$KILL_AT" ] && kill -9 $PPID
exit $rc
"""


def new_checkout(folder, odd):
    """A checkout with a train.py as above, and with files of the user's that no session may touch."""
    made = make_checkout(folder / "checkout", folder / "cache")
    head, tail = made.text().split("    return {")
    text = f"{head}{MODEL}{tail.partition(chr(10))[2]}".replace("import prepare", "import time\n\nimport prepare", 1)
    (made.root / "train.py").write_text(text.replace("RATE =", f"NOW = {time.time():.0f}.0\nRATE =", 1))
    commit_all(made)
    (made.root / "notes.txt").write_text("mine\n")
    made.git("add", "notes.txt")
    (made.root / "program.md").write_text("Lower it.\n")
    if odd:
        made.cache.mkdir()
        (made.cache / "odd").touch()
    return made


def command(checkout, experiments):
    words = f"--proposer search --sandbox off --confirm never --tag t --experiments {experiments}"
    return checkout.command(*words.split())


def start(checkout, experiments, **env):
    """A session as a process, the beginning of a session of its own."""
    output = open(checkout.root.parent / "output", "ab")
    places = {"cwd": checkout.root, "stdout": output, "stderr": output, "start_new_session": True}
    return subprocess.Popen(command(checkout, experiments), env=checkout.env(**env), **places)


def kill(process, all_of_it):
    """Kill a session, and all its processes too if asked to. Returns what is left alive after a while."""
    agent, children = psutil.Process(process.pid), []
    try:
        children = agent.children(recursive=True)
    except psutil.Error:
        pass
    process.kill()
    for child in children if all_of_it else ():
        try:
            child.kill()
        except psutil.Error:
            pass
    process.wait()
    return psutil.wait_procs(children, timeout=10)[1]


def rows_of(checkout):
    """All rows by ref, oldest first, as dicts of their trailers, with commit, parent and subject."""
    found = {}
    for ref, commit in checkout.refs().items():
        name, parents, subject, trailers = checkout.git("log", "-1", f"--format={FORM}", commit)[:-1].split("\x01")
        values = dict(line.split(": ", 1) for line in trailers.rstrip("\x02").splitlines() if ": " in line)
        found[ref] = {**values, "commit": name, "parent": parents.split(" ")[0], "subject": subject}
    return found


def lost(before, now):
    """What of the rows seen before is gone or another one now."""
    return [f"lost: {ref}" for ref, row in before.items() if now.get(ref) != row]


def audit(checkout, before, made):
    """What is wrong after a restart that was to make so many rows, as sentences; before: the rows that there were."""
    now, git = rows_of(checkout), checkout.git
    rows = list(now.values())
    faults = lost(before, now)
    if len(now) != len(before) + made:
        faults.append(f"lost or counted twice: {len(before)} rows, {made} more were to come, {len(now)} are there")
    if [r["Id"] for r in rows] != [f"{i:04d}" for i in range(1, len(rows) + 1)]:
        faults.append(f"lost or counted twice: the ids are {[r['Id'] for r in rows]}")
    wanted = [[r["commit"][:7], r["Status"], r["Id"], r["Tag"], r["Seed"]] for r in rows]
    if (shown := [[r[name] for name in "commit status id tag seed".split()] for r in checkout.rows()]) != wanted:
        faults.append(f"results.tsv is not what the refs are: {shown} for {wanted}")
    roots, best, programs = {}, {}, Counter()
    for r in rows:  # anew, what the loop has to have done
        root = roots[r["commit"]] = roots.get(r["parent"], r["parent"])
        top = best.get(root)
        programs[root, r["Program"], r["Seed"]] += 1
        if top is None and r["Proposer"] != "baseline" or top is not None and r["Proposer"] == "baseline":
            faults.append(f"counted twice: {r['Id']} is proposed by {r['Proposer']}, the best is {top and top['Id']}")
        if top is not None and r["parent"] != top["commit"] and r["Status"] != "verify":
            faults.append(f"{r['Id']} does not stand on {top['Id']}, the best of then")
        if r["Status"] == "keep":
            if top is not None and float(r["Score"]) >= float(top["Score"]):
                faults.append(f"{r['Id']} is a keep and no better")
            best[root] = r
    faults += [f"counted twice: {key}" for key, count in programs.items() if count > 1]
    tip = git("rev-parse", "refs/heads/autoresearch/t")
    top = best.get(roots.get(tip, tip))
    stand = top and (top["parent"] if top["Proposer"] == "baseline" else top["commit"])
    if tip != stand:
        faults.append(f"the branch is at {tip[:7]}, the best at {(stand or 'none')[:7]}")
    if git("symbolic-ref", "HEAD") != "refs/heads/autoresearch/t":
        faults.append("HEAD is elsewhere")
    if git("hash-object", "train.py") != git("rev-parse", f"{tip}:train.py"):
        faults.append("the checkout's train.py is not the best's")
    wanted = [
        "A  notes.txt",
        *[" M program.md"] * (tip not in roots),
        " M results.tsv",
    ]  # a row's commit has the new one
    if (status := git("status", "--porcelain").split("\n")) != wanted:
        faults.append(f"git status shows {status}")
    if checkout.text("notes.txt") + checkout.text("program.md") != "mine\nLower it.\n":
        faults.append("a file of the user's was changed")
    if said := git("fsck", "--strict", "--no-dangling"):
        faults.append(f"git fsck: {said}")
    left = [*checkout.root.glob("runs/t/*/work"), *checkout.root.glob("runs/t/*.new"), *checkout.root.glob(".*.new")]
    return faults + [f"left over: {path}" for path in left]


def go_on(checkout, before, experiments):
    """Start the same command again, to its end, and say what is wrong then."""
    for lock in checkout.root.glob(".git/**/*.lock"):  # as the line of agent.py tells the user to do
        lock.unlink()
    done = start(checkout, experiments)
    try:
        code = done.wait(120)
    except subprocess.TimeoutExpired:
        return [f"the restart does not end: {kill(done, True)}"]
    said = (checkout.root.parent / "output").read_text(errors="replace")[-600:]
    return [f"the restart ended with {code}: {said}"] * (code != 0) + audit(checkout, before, experiments)


def random_kills(folder, seed, kills):
    """The faults of each of so many kills at random moments."""
    rng, checkout, seen = random.Random(seed), None, {}
    for number in range(kills):
        if number % ROUNDS == 0:
            checkout, seen = new_checkout(folder / f"{number:04d}", odd=True), {}
        power_cut, delay_s = rng.random() < 0.5, rng.uniform(0, LATEST_S if seen else LATEST_S / 2)
        process = start(checkout, 99)
        time.sleep(delay_s)
        left = kill(process, power_cut)
        faults = [f"still alive: {p}" for p in left] + [f"ended by itself: {process.returncode}"] * (
            process.returncode != -9
        )
        faults += lost(seen, now := rows_of(checkout))
        faults += go_on(checkout, now, 1)
        seen = rows_of(checkout)
        yield f"kill {number}, {delay_s:.2f} s after the start{', a power cut' * power_cut}", faults


def kills_at_every_command(folder, step):
    """The faults of a kill before and after every step-th git command of a session with a keep, then with a commit."""
    checkout, count = new_checkout(folder, odd=False), folder / "count"
    tools = folder / "tools"
    tools.mkdir()
    fake = FAKE_GIT.replace("COUNT", str(count)).replace("REAL", shutil.which("git"))
    (tools / "git").write_text(fake)
    (tools / "git").chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    first = start(checkout, 2)
    assert first.wait(120) == 0 and rows_of(checkout)["refs/autoresearch/t/0002"]["Status"] == "keep"
    shutil.copytree(folder / "checkout", folder / "sound", symlinks=True)
    for commits in (False, True):
        for number in itertools.count(1, step):
            for when in ("before", "after"):
                shutil.rmtree(folder / "checkout")
                shutil.copytree(folder / "sound", folder / "checkout", symlinks=True)
                count.write_text("0")
                before = rows_of(checkout)
                code = start(checkout, 1, PATH=path, KILL_AT=f"{number}.{when}").wait(120)
                if code == 0:  # it has not so many
                    break
                faults = [f"ended with {code}"] * (code != -9) + lost(before, now := rows_of(checkout))
                if commits:
                    (checkout.root / "train.py").write_text(checkout.text() + "# mine\n")
                    checkout.git(*USER, "commit", "-qm", "mine", "train.py")
                faults += go_on(checkout, now, 2 if commits else 1)
                yield f"killed {when} git command {number}{', then a commit' * commits}", faults
            if code == 0:
                break


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=0, metavar="N")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--every", type=int, nargs="?", const=1, metavar="STEP")
    args = p.parse_args()
    os.environ |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    folder, total, bad = Path(tempfile.mkdtemp(prefix="bench_crash-")), 0, 0
    rounds = [random_kills(folder, args.seed, args.kills)]
    rounds += [kills_at_every_command(folder / "every", args.every)] if args.every else []
    for what, faults in itertools.chain(*rounds):
        total, bad = total + 1, bad + bool(faults)
        for fault in faults:
            print(f"{what}: {fault}", flush=True)
        if faults:
            shutil.copytree(
                folder / "every" / "checkout", folder / f"bad{total}", symlinks=True
            ) if args.every else None
    print(f"{total - bad} of {total} survived" + (f"; see {folder}" if bad else ""))
    if not bad:
        shutil.rmtree(folder)
    return 1 if bad or not total else 0


if __name__ == "__main__":
    sys.exit(main())
