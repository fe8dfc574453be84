"""Kill real sessions at random instants and check what is left: python tests/benchmarks/bench_crash.py [--kills 200]

Each round starts agent.py on a temporary repository with a torch-free train.py, kills it with SIGKILL (alone, or with
all its processes as a power cut would), restarts it with the same command, and reads git and results.tsv anew, with
plain git and nothing of agent.py. The seed fixes what each round does; how far a session has come by then is the
machine's affair. Where something is wrong the folder is kept: checkout/, and killed/ as the kill left it.
"""

import argparse
import contextlib
import functools
import itertools
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import Checkout, Server, commit_all, completion, make_checkout, reply  # noqa: E402

CHECKOUT_ROUNDS = 10   # kills in one checkout
AFTER_S = {   # at most, from the first sign to the kill
    "data": 0.15, "training": 0.4, "branch": 0.015, "scored": 0.15, "record": 0.06, "mend": 0.02, "lock": 0.002}
ANY_S, BEGIN_S = 2.5, 1.0   # at most, from the start to a kill that waits for no sign, and where it must come early
RECORD_AIMS = "record", "record", "record", "lock"
OTHER_AIMS = "tag", "tag", "tag", "training", "training", "scored", "any"
MENDING_AIMS = "mend", "mend", "lock", "lock", "any"   # where the last kill's traces are still there
LEAD_S, WITH_LEAD = 1.2, ("training", "scored", "record", "lock")   # a session may first live so long before these
SIGN_S, GONE_S, END_S = 15.0, 3.0, 60.0   # limits: for a sign, for what the kill has left alive, for a restart
COLUMNS = ("commit val_bpb memory_gb status description id time tag parent proposer role seed steps tokens_M train_s "
           "wall_s llm_tokens").split()
SAME = {"status": "Status", "id": "Id", "time": "Time", "tag": "Tag", "proposer": "Proposer", "seed": "Seed",
        "steps": "Steps", "llm_tokens": "Llm-Tokens"}   # columns that hold a trailer as it is
ORDINARY = re.compile(   # lines of a session that say nothing of a mending
    r"\d{4}  |      |NO SANDBOX|autoresearch/\S+: preset|[\d,]+ (rows|tokens) |val_bpb |rows: |to have it: |"
    r"Not verified|Nothing was kept|On \d seeds|noise of a seed ")
UNREADABLE = subprocess.CalledProcessError, KeyError, ValueError   # what reading odd refs, rows or texts raises
LOST, TWICE, HALF, OTHER = "lost", "counted twice", "half a line", "other"   # kinds of faults

Fault = tuple[str, str]   # kind, what is wrong

# A train.py whose score falls with the clock, so that most steps of the search are keeps, but for some values of DECAY,
# and while the file `worse` is there. Without its agent.py it trains on for a minute
MODEL = """\
    digit, worse = round(1000 * DECAY) % 10, os.path.exists(os.environ["AUTORESEARCH_CACHE"] + "/worse")
    if digit == 7:
        raise TypeError("seven")
    bpb = SCALE * (1.2 - 1e-4 * (time.time() - NOW)) + (0.1 if worse or digit in (1, 3) else 0)
    return {"bpb": bpb} | ({"invalid": "five"} if digit == 5 else {})
"""
REST = """\
        data.rest()
        if os.getppid() != PARENT:
            time.sleep(60)
"""
IMPORTS = """\
import os
import time

import prepare

PARENT = os.getppid()
SCALE = 1.0     # of the score
"""


# What a round does


@dataclass(frozen=True)
class Plan:
    """One round. aim: the sign that the kill waits for, or `any`. lead_s: before it looks; delay_s: from there on."""

    number: int
    begin: str         # checkout, tag, or empty: goes on where the round before ended
    user_files: bool   # in a new checkout: a staged notes.txt and a changed program.md
    model: bool        # proposals by the scripted model
    aim: str
    lead_s: float
    delay_s: float
    power_cut: bool    # all processes, not only agent.py
    torn: float        # the share that is left of a row which the round has written; 1: whole
    worse: bool        # the restart's experiment is no keep, which would hide what was not mended
    restart: bool      # and check; otherwise the next round meets what this one left


def plans(seed: int, kills: int, aimed: float = 0.5) -> list[Plan]:
    """What to do in each round; `aimed`: the share of kills that wait for the record of an experiment."""
    rng, made = random.Random(seed), []
    for number in range(kills):
        goes_on = bool(made) and not made[-1].restart   # from what a kill has left
        begin = "checkout" if number % CHECKOUT_ROUNDS == 0 else ""
        restart = rng.random() < 0.7 or number + 1 == kills or (number + 1) % CHECKOUT_ROUNDS == 0
        aim = rng.choice(RECORD_AIMS if rng.random() < aimed else OTHER_AIMS)
        if goes_on:
            aim = rng.choice(MENDING_AIMS)
        elif begin or aim == "tag":
            begin, aim = begin or "tag", rng.choice(("data" if begin else "branch", "branch", "branch", "any"))
        elif not restart:
            aim = "record"
        latest_s = BEGIN_S if goes_on or begin else ANY_S
        made.append(Plan(
            number, begin, aim=aim, user_files=rng.random() < 0.5, model=rng.random() < 0.1,
            lead_s=rng.choice((0, rng.uniform(0, LEAD_S))) if aim in WITH_LEAD and not goes_on else 0,
            delay_s=AFTER_S[aim] * rng.random() ** 2 if aim in AFTER_S else rng.uniform(0, latest_s),
            power_cut=aim == "lock" or aim != "training" and rng.random() < 0.5,   # git that lives on removes its lock
            torn=rng.choice((1, 1, 1, 1, 1, rng.random())), worse=rng.random() < 0.6, restart=restart))
    return made


# Where it is done


def git(root: Path, *args: str) -> str:
    """Output of plain git, unstripped; takes no lock. Raises CalledProcessError."""
    command = ["git", "--no-optional-locks", *args]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


@dataclass
class Ground:
    """A checkout, the tag that its sessions run under, and what was seen of it."""

    folder: Path
    checkout: Checkout
    user_files: dict[str, str]
    tag: str = ""
    start: str = ""                                            # the commit that the branch begins at
    seen: dict[str, str] = field(default_factory=dict)         # ref -> hash, of all tags

    @property
    def root(self) -> Path:
        return self.checkout.root

    @property
    def runs(self) -> Path:
        return self.root / "runs" / self.tag

    def git(self, *args: str) -> str:
        return git(self.root, *args)

    def refs(self, prefix: str = "refs/autoresearch/") -> dict[str, str]:
        """Ref -> hash."""
        return dict(line.split() for line in self.git("for-each-ref", "--format=%(refname) %(objectname)",
                                                      prefix).splitlines())

    def train_py(self, commit: str) -> str:
        return self.git("cat-file", "blob", f"{commit}:train.py")


def falling(text: str) -> str:
    """The toy's train.py with MODEL, REST and IMPORTS in it."""
    for old, new in ((r"    return {.*\n", MODEL.replace("NOW", str(int(time.time())))), (r" +data\.rest\(\)\n", REST),
                     (r"import prepare\n", IMPORTS)):
        text, times = re.subn(f"^{old}", lambda _, new=new: new, text, flags=re.M)
        assert times == 1, old
    return text


def new_ground(folder: Path, user_files: bool) -> Ground:
    """A fresh checkout without prepared data, on main."""
    checkout = make_checkout(folder / "checkout", folder / "cache")
    (checkout.root / "train.py").write_text(falling(checkout.text()))
    commit_all(checkout)
    files = {"notes.txt": "mine\n", "program.md": "Lower the number, please.\n"} if user_files else {}
    for name, content in files.items():
        (checkout.root / name).write_text(content)
    if files:
        checkout.git("add", "notes.txt")
    return Ground(folder, checkout, files)


def new_tag(ground: Ground) -> None:
    """The next sessions begin another branch where the checkout is."""
    ground.tag = f"t{int(ground.tag[1:] or 0) + 1}"
    ground.start = ground.git("rev-parse", "HEAD").strip()


def too_good(request: dict) -> tuple[int, dict]:
    """A reply whose score must be confirmed on another seed: a keep and `verify` rows at once."""
    asked = "".join(message["content"] for message in request["messages"])
    scale = float(re.findall(r"^SCALE = ([\d.]+)", asked, re.M)[0])
    return 200, completion(reply(f"SET SCALE = {0.93 * scale - random.random() / 1e4:.8f}"), len(asked) // 4)


def start(ground: Ground, server: Server, plan: Plan, experiments: int, name: str) -> subprocess.Popen:
    """agent.py as a process group of its own, what it prints in files."""
    server.script, server.requests = [too_good] * 1000, []
    command = ground.checkout.command("--sandbox", "off", "--tag", ground.tag, "--experiments", str(experiments))
    command += [] if plan.model else ["--proposer", "search"]
    env = ground.checkout.env(**({"OPENAI_BASE_URL": server.url} if plan.model else {}))
    with open(ground.folder / f"{name}.out", "w") as out, open(ground.folder / f"{name}.err", "w") as err:
        return subprocess.Popen(command, cwd=ground.root, env=env, stdout=out, stderr=err, start_new_session=True)


# The kill


def stamp(path: Path) -> int:
    """When a file or folder last changed; 0 where there is none."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def names(folder: Path) -> list[str]:
    """What a folder holds; nothing where there is none."""
    with contextlib.suppress(OSError):
        return os.listdir(folder)
    return []


def own_lock(ground: Ground) -> str:
    """The file by which a session keeps a second one away; it may stay."""
    return "autoresearch.lock"


def signs(ground: Ground, aim: str) -> list:
    """What changes when a session comes to what the kill waits for."""
    if aim == "lock":
        return [name for path in ("", f"refs/autoresearch/{ground.tag}", "refs/heads/autoresearch")
                for name in names(ground.root / ".git" / path) if name.endswith(".lock") and name != own_lock(ground)]
    if aim in ("training", "scored"):
        name = {"training": "work", "scored": "score.json"}[aim]
        return sorted((path, stamp(path)) for path in ground.runs.glob(f"*/{name}"))
    paths = {"data": ["../cache"], "branch": [".git/refs/heads/autoresearch", ".git/HEAD"],
             "record": [f".git/refs/autoresearch/{ground.tag}", "results.tsv"]}
    paths["mend"] = [*paths["branch"], *paths["record"], "train.py", ".git/index"]
    return [stamp(ground.root / path) for path in paths[aim]]


def wait_for_instant(ground: Ground, plan: Plan, process: subprocess.Popen) -> None:
    """Until the session is to be killed, or has ended."""
    time.sleep(plan.lead_s)
    if plan.aim != "any":
        before, limit = signs(ground, plan.aim), time.monotonic() + SIGN_S
        while signs(ground, plan.aim) == before and time.monotonic() < limit and process.poll() is None:
            time.sleep(0.0002)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(plan.delay_s)


def living(ground: Ground) -> list[int]:
    """The processes that work in the checkout, whosever children they are."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):   # ended meanwhile, or a zombie
            if Path(os.readlink(link)).is_relative_to(ground.root):
                found.append(int(link.parent.name))
    return found


def kill(ground: Ground, process: subprocess.Popen, power_cut: bool) -> None:
    """Kill agent.py, or at the same instant its git, and then its runs in their own sessions."""
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if power_cut else os.kill)(process.pid, signal.SIGKILL)
    for pid in living(ground) if power_cut else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def lives_on(ground: Ground) -> Iterator[Fault]:
    """Wait for the killed session's processes to be gone."""
    limit = time.monotonic() + GONE_S
    while (left := living(ground)) and time.monotonic() < limit:
        time.sleep(0.005)
    for pid in left:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            os.kill(pid, signal.SIGKILL)
            yield OTHER, f"lives on {GONE_S:g} s after the kill: {command}"


def tear(ground: Ground, share: float, before: str) -> bool:
    """Cut the last row short where it is new, as if the power had failed before it was on the disk."""
    path = ground.root / "results.tsv"
    text = path.read_text()
    whole, last = text[: text.rfind("\n", 0, -1) + 1], text[text.rfind("\n", 0, -1) + 1 :]
    if share == 1 or text == before or not text.startswith(before):
        return False
    path.write_text(whole + last[: int(share * len(last))])
    return True


# Reading what is there, with plain git


class Experiment(NamedTuple):
    """A commit under refs/autoresearch."""

    ref: str
    commit: str
    parent: str
    description: str
    trailers: dict[str, str]

    @property
    def tag(self) -> str:
        return self.ref.split("/")[2]

    @property
    def id(self) -> str:
        return self.ref.split("/")[3]

    @property
    def kept(self) -> bool:
        return self.trailers["Status"] == "keep"

    @property
    def baseline(self) -> bool:
        return self.trailers["Proposer"] == "baseline"


@functools.cache
def experiment(root: Path, ref: str, commit: str) -> Experiment:
    """What a commit holds, which never changes; fsck looks whether it can still be read."""
    head, _, message = git(root, "cat-file", "commit", commit).partition("\n\n")
    headers = dict(line.split(" ", 1) for line in head.splitlines())
    trailers = dict(re.findall(r"^([A-Z][\w-]*): (.*)$", message.rstrip().rpartition("\n\n")[2], re.M))
    return Experiment(ref, commit, headers["parent"], " ".join(message.partition("\n\n")[0].split()), trailers)


def experiments(ground: Ground, tag: str = "") -> list[Experiment]:
    """What the refs hold, of a tag or of all, by tag and id."""
    return [experiment(ground.root, *pair) for pair in sorted(ground.refs(f"refs/autoresearch/{tag}").items())]


def keeps_of(ground: Ground) -> list[Experiment]:
    return [e for e in experiments(ground, ground.tag) if e.kept]


def read(path: Path) -> str:
    return path.read_bytes().decode() if path.exists() else ""


def tip_of(ground: Ground, keeps: list[Experiment]) -> str:
    """The commit that the branch belongs on: the newest keep; the baseline moves nothing."""
    return keeps[-1].commit if len(keeps) > 1 else ground.start


def staged(ground: Ground) -> set[str]:
    """What the index has otherwise than HEAD, the user's own aside."""
    return set(ground.git("diff", "--cached", "--name-only").split()) - {"notes.txt"}


def locks(ground: Ground) -> list[str]:
    """Lock files of git's, but not those below objects/, where none is."""
    folder = ground.root / ".git"
    found = [*folder.glob("*.lock"), *(folder / "refs").rglob("*.lock")]
    return sorted(str(path.relative_to(folder)) for path in found if path.name != own_lock(ground))


# What must hold at any instant


def faults_at_any_instant(ground: Ground) -> Iterator[Fault]:
    """Directly after a kill."""
    keeps = keeps_of(ground)
    allowed = [ground.train_py(commit) for commit in (ground.start, *[e.commit for e in keeps[-2:]])]
    if read(ground.root / "train.py") not in allowed:
        yield OTHER, "train.py is neither the best's, nor the one's before, nor the user's"
    lines = read(ground.root / "results.tsv").split("\n")
    if any(len(line.split("\t")) != len(COLUMNS) for line in lines[:-1]):
        yield HALF, "results.tsv has a line before the last that is not whole"
    ground.git("log", "-1", "HEAD")
    yield from lost(ground)
    yield from user_faults(ground)


def lost(ground: Ground) -> Iterator[Fault]:
    """Refs that were seen before and are not as they were."""
    refs = ground.refs()
    for ref, commit in ground.seen.items():
        if refs.get(ref) != commit:
            yield LOST, f"{ref} was {commit[:7]} and is {refs.get(ref, 'gone')[:7]}"
    ground.seen |= refs


def user_faults(ground: Ground) -> Iterator[Fault]:
    """Of the user's own files."""
    for name, text in ground.user_files.items():
        if read(ground.root / name) != text:
            yield OTHER, f"{name} is not as the user left it"
    if ground.user_files and ground.git("diff", "--cached", "--name-only", "--", "notes.txt") == "":
        yield OTHER, "notes.txt is no longer staged"


def undone(ground: Ground) -> list[str]:
    """What a kill has left unfinished, in the order in which a record is made."""
    all_, tag = experiments(ground), ground.tag
    text, keeps = read(ground.root / "results.tsv"), keeps_of(ground)
    there = {(cells[7], cells[5]) for line in text.splitlines() if len(cells := line.split("\t")) == len(COLUMNS)}
    branch = ground.refs(f"refs/heads/autoresearch/{tag}").get(f"refs/heads/autoresearch/{tag}")
    head = ground.git("rev-parse", "HEAD").strip()
    moved = ground.refs("refs/autoresearch-moved/").get(f"refs/autoresearch-moved/{tag}")
    state = {
        "no row": any((e.tag, e.id) not in there for e in all_),
        "half a row": not text.endswith("\n"),
        "best/ behind": keeps and read(ground.runs / "best" / "train.py") != ground.train_py(keeps[-1].commit),
        "branch behind": keeps and branch != tip_of(ground, keeps),
        "train.py behind": branch == head and read(ground.root / "train.py") != ground.train_py(head),
        "index behind": branch == head and staged(ground),
        "no sign of the move": len(keeps) > 1 and moved != keeps[-1].commit,
    }
    return [name for name, is_so in state.items() if is_so]


def begun(ground: Ground) -> list[str]:
    """What a kill has left otherwise: half a beginning, a lock."""
    branch = ground.refs(f"refs/heads/autoresearch/{ground.tag}")
    head = ground.git("symbolic-ref", "--short", "HEAD").strip()
    apart = bool(branch) and head != f"autoresearch/{ground.tag}"
    kinds = {re.sub(r"\d{4}|\bt\d+\b", "*", name) for name in locks(ground)}
    return ["branch not checked out"] * apart + sorted(f"lock {kind}" for kind in kinds)


# What must hold after a restart


def ref_faults(ground: Ground) -> Iterator[Fault]:
    """Ids without a gap, no program twice, nothing lost."""
    yield from lost(ground)
    for tag, group in itertools.groupby(experiments(ground), lambda e: e.tag):
        group = list(group)
        if [e.id for e in group] != [f"{i:04d}" for i in range(1, len(group) + 1)]:
            yield LOST, f"{tag} has the ids {' '.join(e.id for e in group)}"
        programs = Counter(e.trailers["Text-Key"] for e in group if e.trailers["Status"] != "verify")
        yield from ((TWICE, f"{tag} has the program {key} {n} times") for key, n in programs.items() if n > 1)


def row_faults(ground: Ground) -> Iterator[Fault]:
    """results.tsv has exactly one whole row for each ref, in order, and the cells say what the commit says."""
    text = read(ground.root / "results.tsv")
    header, *lines = text.splitlines() or [""]
    if not text.endswith("\n") or any(len(line.split("\t")) != len(COLUMNS) for line in lines):
        yield HALF, "results.tsv has a line that is not whole"
    if header.split("\t") != COLUMNS:
        yield OTHER, f"results.tsv begins with {header!r}"
    rows = [dict(zip(COLUMNS, line.split("\t"))) for line in lines]
    for key, n in Counter((row.get("tag"), row.get("id")) for row in rows).items():
        if n > 1:
            yield TWICE, f"results.tsv has {n} rows of {key}"
    for tag, group in itertools.groupby(experiments(ground), lambda e: e.tag):
        found, wanted = [row for row in rows if row.get("tag") == tag], list(group)
        if [row["id"] for row in found] != [e.id for e in wanted]:
            yield LOST, f"results.tsv has the rows {' '.join(row['id'] for row in found)} of {tag}, not {len(wanted)}"
        yield from (fault for row, e in zip(found, wanted) for fault in cell_faults(row, e))
    if len(rows) != len(ground.refs()):
        yield OTHER, f"results.tsv has {len(rows)} rows for {len(ground.refs())} experiments"


def cell_faults(row: dict[str, str], e: Experiment) -> Iterator[Fault]:
    """Where a row and its commit disagree."""
    value, reason = e.trailers["Val-Bpb"], e.trailers["Reason"]
    wanted = {column: e.trailers[trailer] for column, trailer in SAME.items()}
    wanted |= {"commit": e.commit[:7], "parent": e.parent[:7], "tag": e.tag, "id": e.id,
               "val_bpb": "0.000000" if value == "-" else f"{float(value):.6f}",
               "description": e.description + ("" if reason == "-" else f" ({reason})")}
    for column, cell in wanted.items():
        if row.get(column) != cell:
            yield OTHER, f"the row of {e.ref} has {column} {row.get(column)!r}, its commit {cell!r}"


def chain_faults(ground: Ground) -> Iterator[Fault]:
    """Each experiment stands upon the best of its time, a repeat upon what it repeats; keeps become better."""
    best, programs = None, {}
    for e in experiments(ground, ground.tag):
        if e.trailers["Status"] == "verify":
            if programs.get(e.parent) != e.trailers["Text-Key"]:
                yield OTHER, f"{e.ref} (verify) has the parent {e.parent[:7]}, which is not what it repeats"
            continue
        programs[e.commit] = e.trailers["Text-Key"]
        wanted = ground.start if best is None else best.commit
        if e.parent != wanted:
            yield OTHER, f"{e.ref} ({e.trailers['Status']}) has the parent {e.parent[:7]}, not {wanted[:7]}"
        if e.baseline != (best is None):
            yield TWICE, f"{e.ref} is proposed by {e.trailers['Proposer']}"
        if e.kept and best and float(e.trailers["Val-Bpb"]) >= float(best.trailers["Val-Bpb"]):
            yield OTHER, f"{e.ref} is a keep and no better than {best.id}"
        best = e if e.kept else best


def checkout_faults(ground: Ground) -> Iterator[Fault]:
    """The branch, the files, the index and git itself."""
    keeps, branch = keeps_of(ground), f"refs/heads/autoresearch/{ground.tag}"
    head = ground.git("symbolic-ref", "HEAD").strip()
    if head != branch:
        yield OTHER, f"HEAD is {head}"
    tip = ground.git("rev-parse", branch).strip()
    if tip != tip_of(ground, keeps):
        yield OTHER, f"{branch} is {tip[:7]}, not {tip_of(ground, keeps)[:7]}"
    for path in (ground.root / "train.py", ground.runs / "best" / "train.py"):
        if read(path) != ground.train_py(tip):
            yield OTHER, f"{path.relative_to(ground.root.parent)} is not the best's"
    status = set(ground.git("status", "--porcelain").splitlines())
    users = {"A  notes.txt", " M program.md"} if ground.user_files else set()
    if odd := status - {" M results.tsv"} - users:
        yield OTHER, f"git status shows {sorted(odd)}"
    if staged(ground):
        yield OTHER, f"the index differs from HEAD: {sorted(staged(ground))}"
    fsck = subprocess.run(["git", "fsck", "--full", "--no-dangling"], cwd=ground.root, capture_output=True, text=True)
    if fsck.returncode or fsck.stdout or fsck.stderr:
        yield OTHER, f"git fsck: {fsck.stdout}{fsck.stderr}"


def leftover_faults(ground: Ground) -> Iterator[Fault]:
    """Files that a killed process has left and no one removed."""
    patterns = ".*-half", "runs/**/.*-half", "runs/*/*.new", f"runs/{ground.tag}/*/work", ".git/autoresearch*index*"
    found = {str(path.relative_to(ground.root)) for pattern in patterns for path in ground.root.glob(pattern)}
    yield from ((OTHER, f"left over: {name}") for name in sorted(found | {f".git/{name}" for name in locks(ground)}))


def audit(ground: Ground) -> list[Fault]:
    """Everything that must hold between two sessions."""
    checks = (ref_faults, row_faults, chain_faults, checkout_faults, leftover_faults, user_faults)
    return [fault for check in checks for fault in collected(check(ground))]


def collected(*checks: Iterator[Fault]) -> list[Fault]:
    """The faults of some checks; git that fails is one more."""
    found = []
    try:
        for check in checks:
            found.extend(check)
    except UNREADABLE as error:
        found.append((OTHER, f"cannot be read: {error!r} {essence(getattr(error, 'stderr', ''))}"))
    return found


# The rounds


@dataclass
class Tally:
    """What came of all rounds."""

    kills: int = 0
    survived: int = 0
    in_record: int = 0
    torn: int = 0
    restarts: int = 0
    rows: Counter = field(default_factory=Counter)     # new experiments, by status
    left: Counter = field(default_factory=Counter)     # what kills left unfinished
    said: Counter = field(default_factory=Counter)     # by restarts
    faults: Counter = field(default_factory=Counter)   # by kind
    wrong: Counter = field(default_factory=Counter)    # by sentence
    seconds: list[float] = field(default_factory=list)

    def report(self) -> str:
        """Everything on a few lines."""
        def table(counter: Counter) -> list[str]:
            return [f"{n:6}  {text}" for text, n in counter.most_common()] or ["     -"]
        seconds = self.seconds or [float("nan")]
        return "\n".join([
            f"kills survived: {self.survived} / {self.kills}; {self.in_record} of the kills fell into the record of an "
            f"experiment; rows torn besides: {self.torn}",
            f"restarts: {self.restarts}; experiments: {', '.join(f'{n} {status}' for status, n in self.rows.items())}",
            f"experiments lost: {self.faults[LOST]}, counted twice: {self.faults[TWICE]}, "
            f"half lines: {self.faults[HALF]}, other faults: {self.faults[OTHER]}",
            f"seconds from restart to the first new experiment: median {statistics.median(seconds):.2f}, "
            f"max {max(seconds):.2f}",
            "what the kills left unfinished:", *table(self.left), "what the restarts said they mended:",
            *table(self.said), *(["what was wrong:", *table(self.wrong)] if self.wrong else [])])


def plain(sentence: str) -> str:
    """A sentence without its ids, hashes and tags, to be counted."""
    return re.sub(r"/\S*/(?=checkout)|\b\d{4}\b|\b[0-9a-f]{7,40}\b|\bt\d+\b", "*", sentence)


def essence(stderr: str) -> str:
    """The line of an output that says what went wrong, else its end."""
    return (re.findall(r"^(?:fatal: |error: |agent\.py: ).*", stderr, re.M) or [stderr.strip()[-300:]])[-1]


def restart(ground: Ground, server: Server, plan: Plan, tally: Tally) -> Iterator[Fault]:
    """The same command once more, for one experiment; it must end well and say nothing on stderr."""
    def works():
        return {(path, stamp(path)) for path in ground.runs.glob("*/work")}
    if plan.worse and ground.checkout.cache.exists():
        (ground.checkout.cache / "worse").touch()
    before, old, began = ground.refs(), works(), time.monotonic()
    process, first_s = start(ground, server, plan, 1, "restart"), None
    while process.poll() is None and time.monotonic() - began < END_S:
        if first_s is None and works() - old:
            first_s = time.monotonic() - began
        time.sleep(0.003)
    if process.poll() is None:
        kill(ground, process, True)
        yield OTHER, f"the restart did not end in {END_S:g} s"
    out, err = (read(ground.folder / f"restart.{name}") for name in ("out", "err"))
    tally.restarts += 1
    tally.seconds += [first_s] if first_s else []
    tally.said.update(plain(line) for line in out.splitlines() if not ORDINARY.match(line))
    if process.returncode or err:
        yield OTHER, f"the restart ended with {process.returncode} and said: {essence(err)}"
        return
    new = [e for e in experiments(ground) if e.ref not in before]
    done = re.findall(r"^(\d{4})  ", out, re.M)
    if done != [e.id for e in new] or sum(e.trailers["Status"] != "verify" for e in new) != 1:
        yield (TWICE if len(new) > len(done) else LOST), f"the restart reported {done}, new are {[e.ref for e in new]}"


def killed(ground: Ground, server: Server, plan: Plan, tally: Tally) -> list[Fault]:
    """Start a session and kill it as planned; what is wrong with what it leaves."""
    before = read(ground.root / "results.tsv")
    (ground.checkout.cache / "worse").unlink(missing_ok=True)
    process = start(ground, server, plan, 10_000, "killed")
    wait_for_instant(ground, plan, process)
    ended = process.poll()
    kill(ground, process, plan.power_cut)
    found = collected(faults_at_any_instant(ground), lives_on(ground), lost(ground))
    if ended is not None or read(ground.folder / "killed.err"):
        said = essence(read(ground.folder / "killed.err"))
        found.append((OTHER, f"the session to be killed ended with {ended} and said: {said}"))
    with contextlib.suppress(*UNREADABLE):
        left = undone(ground)
        tally.in_record += bool(left)
        tally.left.update([" + ".join([*left, *begun(ground)]) or "nothing"])
    tally.torn += tear(ground, plan.torn, before)
    shutil.rmtree(ground.folder / "killed", ignore_errors=True)
    shutil.copytree(ground.root, ground.folder / "killed", symlinks=True)
    return found


def round_(ground: Ground, server: Server, plan: Plan, tally: Tally) -> list[Fault]:
    """Kill, look, restart, look again."""
    before = set(ground.seen)
    found = killed(ground, server, plan, tally)
    if plan.restart and not found:
        found = collected(restart(ground, server, plan, tally))
        found += collected(lost(ground), lives_on(ground)) if found else audit(ground) + collected(lives_on(ground))
    tally.kills += 1
    tally.survived += not found
    tally.faults.update(kind for kind, _ in found)
    tally.wrong.update(plain(what) for _, what in found)
    with contextlib.suppress(*UNREADABLE):
        tally.rows.update(e.trailers["Status"] for e in experiments(ground) if e.ref not in before)
    return found


def crash_test(folder: Path, seed: int, kills: int, aimed: float = 0.5) -> Tally:
    """All rounds; prints what is wrong. A round with a fault ends its checkout, which stays in the folder."""
    server, tally, ground, sound = Server(), Tally(), None, True
    server.http.handle_error = lambda *_: None   # a killed session hangs up
    for plan in plans(seed, kills, aimed):
        if plan.begin == "checkout" or not sound:
            if ground and sound:
                shutil.rmtree(ground.folder)
            ground = new_ground(folder / f"round{plan.number}", plan.user_files)
        if plan.begin or not ground.tag:
            new_tag(ground)
        found = round_(ground, server, plan, tally)
        sound = not found
        if found:
            print(f"seed {seed}, {plan}", *(f"    {kind}: {what}" for kind, what in found), sep="\n")
            print(f"    kept: {ground.folder}", flush=True)
    server.http.shutdown()
    server.http.server_close()
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    os.environ.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_SYSTEM=os.devnull)
    folder, began = Path(tempfile.mkdtemp(prefix="crash-")), time.monotonic()
    print(f"seed {args.seed}, {args.kills} kills", flush=True)
    tally = crash_test(folder, args.seed, args.kills)
    print(tally.report(), f"{time.monotonic() - began:.0f} s in all", sep="\n")
    if not tally.faults:
        shutil.rmtree(folder)
    return bool(tally.faults)


if __name__ == "__main__":
    sys.exit(main())
