"""A night's faults within minutes: python tests/benchmarks/bench_storm.py [--seed 0] [--only PATTERN] [--keep]

A real session on a temporary repository, with a server that fails at socket level and stand-ins for the machine: a
small tmpfs that is filled and emptied, scripts called nvidia-smi and git, a clock and a sleep counter in files. The
faults come one after the other, in an order by seed; each must leave its trace, and experiments must go on after it. At
the end git and results.tsv are read anew, with plain git and nothing of agent.py. Exit status 1 if anything failed.
"""

import argparse
import contextlib
import email.utils
import hashlib
import itertools
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import Checkout, commit_all, completion, make_checkout, reply  # noqa: E402

OUTAGE_S, REPLY_S = 2.5, 3.0        # Config.outage_s, Config.reply_s of the sessions
FAR_S = 5                           # a Retry-After that is far beyond OUTAGE_S
DISK_MB, RESERVE_MB = 64, 4         # of the tmpfs; Config.reserve
SHORTER = {"WAIT_S": 0.5, "LOOK_S": 0.2, "KILL_S": 2.0, "OVERTIME_S": 2.0, "LOCK_S": 1.0, "SMI_S": 1.0, "DRAW_S": 30.0,
           "REFUSED_S": 2.5, "AGAIN_S": 0.5}        # constants of agent.py
STOOD_S = 12                        # SIGSTOP to SIGCONT
HOURS_S = 6.0                       # of the session during which the clock is set back
SEEN_S, WHOLE_S = 25.0, 360.0       # limits: of a wait for one trace, of everything
VOID_STEPS = 666                    # of runs that must leave no row
GPU_FREE, GPU_TAKEN = "300, 24576", "20000, 24576"   # used and total, in MB, as nvidia-smi prints them
IN_RECORD = (("before", "hash-object"), ("after", "hash-object"), ("before", "commit-tree"),
             ("before", "update-ref --stdin"), ("after", "update-ref --stdin"), ("before", "update-ref -m"),
             ("after", "update-ref refs/"))   # when, in the record of a keep, the disk fills up
COLUMNS = ("commit val_bpb memory_gb status description id time tag parent proposer role seed steps tokens_M train_s "
           "wall_s llm_tokens").split()

# agent.py with shorter waits and stand-ins for the machine
DRIVER = f'''\
import socket
import sys
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

checkout, stand_ins, *args = sys.argv[1:]
sys.dont_write_bytecode = True
sys.path.insert(0, checkout)
import agent


def number(name):
    path = Path(stand_ins, name)
    return float(path.read_text() or 0) if path.exists() else 0.0


class Clock(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) - timedelta(seconds=number("set_back"))


def look_up(*args, **kwargs):
    if Path(stand_ins, "no_dns").exists():
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    return found(*args, **kwargs)


def configured(args):
    return replace(made(args), outage_s={OUTAGE_S}, reply_s={REPLY_S}, reserve={RESERVE_MB} * 2**20,
                   asleep_s=lambda: number("asleep"))


found, socket.getaddrinfo, agent.datetime = socket.getaddrinfo, look_up, Clock
made, agent.configured = agent.configured, configured
for name, seconds in {SHORTER}.items():
    getattr(agent, name)   # must be there
    setattr(agent, name, seconds)
sys.exit(agent.main(args))
'''

# What a run goes through, by an edit of its NOTE or by a file; the guard lets pass what the base has
SUFFER = '''\
STAND_INS = prepare.CACHE / "stand_ins"


def suffer(note):
    """Die, hang, or wait for as long as a file called `held` is there; whether it did wait."""
    if note == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if note == "memory":
        Path((STAND_INS / "cgroup").read_text(), "cgroup.procs").write_text(str(os.getpid()))
        print(len(b"x" * 2**28))
    if note == "hang":
        time.sleep(60)
    if note == "crash" or (STAND_INS / "crash").exists():
        raise RuntimeError("CUDA error: the GPU has fallen off the bus")
    try:
        os.rename(STAND_INS / "hold", STAND_INS / "held")
    except FileNotFoundError:
        return False
    while (STAND_INS / "held").exists():
        time.sleep(0.005)
    return True


def enter(held):
    """Write down that this program has trained to its end, unless something came between that makes it void."""
    if not held:
        with open(STAND_INS / "trained", "a") as file:
            file.write(hashlib.sha256(Path("train.py").read_bytes()).hexdigest() + "\\n")


def main():
'''

NVIDIA_SMI = """\
#!/bin/sh
case "$*" in *query-gpu=name*) echo "A stand-in"; exit;; esac
read -r answer < STAND_INS/gpu
echo "$answer" >> STAND_INS/gpu_log
case "$answer" in hang) exec sleep 60;; fail) echo "Unable to determine the device handle"; exit 9;; esac
echo "$answer"
"""

GIT = """\
#!/bin/sh
fill() { mv STAND_INS/fill_at STAND_INS/filled; cat /dev/zero > FILLER 2> /dev/null; }
[ -f STAND_INS/fill_at ] || exec REAL "$@"
read -r when word < STAND_INS/fill_at
case "$*" in *" $word"*) ;; *) exec REAL "$@";; esac
[ $when = after ] || { fill; exec REAL "$@"; }
REAL "$@"
status=$?
fill
exit $status
"""


class Unseen(Exception):
    """A fault did not leave the trace that it must leave."""


# ----------------------------------------------------------------------------------------------------------------------
# A server that fails at socket level. A behaviour is a function of the call; it answers, or does not


@dataclass
class Call:
    """One request, its connection, and when it came by the monotonic clock."""

    server: "Server"
    conn: socket.socket
    headers: str
    body: dict
    at: float
    behaviour: "Behaviour"
    idea: int = 0      # the number of the reply's

    @property
    def chars(self) -> int:
        return sum(len(message["content"]) for message in self.body["messages"])

    @property
    def last(self) -> str:
        return self.body["messages"][-1]["content"]

    def send(self, status: int, body: object, headers: dict | None = None, kind: str = "application/json") -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        head = {"Content-Type": kind, "Content-Length": len(data), "Connection": "close", **(headers or {})}
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        self.conn.sendall(f"HTTP/1.1 {status} whatever\r\n{lines}\r\n".encode() + data)


Behaviour = Callable[[Call], None]


class Server:
    """Chat completions at a port that can be closed. `mode` answers everything while it is set, `plan` what comes next;
    else every reply is an idea with a number of its own."""

    def __init__(self):
        self.calls: list[Call] = []
        self.plan: list[Behaviour] = []
        self.mode: Behaviour | None = None
        self.number, self.port = 0, 0
        self.released = threading.Event()
        self.open()

    def open(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, args=(self.listener,), daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):   # closed
            while True:
                threading.Thread(target=self.handle, args=(listener.accept()[0],), daemon=True).start()

    def handle(self, conn: socket.socket) -> None:
        """Read one request and answer it."""
        with conn, contextlib.suppress(OSError, ValueError):   # the client hung up
            conn.settimeout(30)
            data = b""
            while b"\r\n\r\n" not in data:
                data += conn.recv(65536) or self.hung_up()
            head, _, body = data.partition(b"\r\n\r\n")
            length = int(re.findall(rb"(?i)content-length: (\d+)", head)[0])
            while len(body) < length:
                body += conn.recv(65536) or self.hung_up()
            behaviour = self.mode or (self.plan.pop(0) if self.plan else ordinary)
            call = Call(self, conn, head.decode(), json.loads(body), time.monotonic(), behaviour)
            self.calls.append(call)
            behaviour(call)

    def hung_up(self) -> bytes:
        raise ConnectionError("the client hung up")


def idea(call: Call, edits: str = "", keep: bool = False, description: str = "") -> str:
    """A reply that has not been given before: most are discards, some keeps."""
    call.server.number += 1
    call.idea = n = call.server.number
    bpb = 1.05 - n / 1e4 if keep or n % 3 == 0 else 1.2 + n / 1e4
    return reply(f'SET BPB = {bpb:.4f}\nSET RATE = {1 + n / 1e3:.3f}\n{edits or """SET NOTE = "plain" """}',
                 f"idea {n} {description}".strip())


def whole(call: Call, text: str) -> dict:
    """A completion with the tokens that the request has."""
    return {**completion(text), "usage": {"prompt_tokens": call.chars // 4, "completion_tokens": 40}}


def ordinary(call: Call, **more) -> None:
    """A good reply; yes to the question whether it answers."""
    call.send(200, whole(call, "yes" if "the word yes" in call.last else idea(call, **more)))


def with_idea(**more) -> Behaviour:
    return lambda call: ordinary(call, **more)


def when_released(**more) -> Behaviour:
    """A good reply, as soon as the storm says so."""
    def answer(call: Call) -> None:
        call.server.released.wait(SEEN_S)
        ordinary(call, **more)
    return answer


def fails(status: int, message: str = "no", headers: dict | None = None, **more) -> Behaviour:
    """An HTTP error as OpenAI words it."""
    return lambda call: call.send(status, {"error": {"message": message, **more}}, headers)


def retry_on_a_date(call: Call) -> None:
    """Retry-After two seconds from now, by a clock that is an hour wrong."""
    clock = int(time.time()) - 3600
    date, then = (email.utils.formatdate(clock + s, usegmt=True) for s in (0, 2))
    call.send(429, {"error": {"message": "slow down"}}, {"Date": date, "Retry-After": then})


def never(call: Call) -> None:
    call.conn.recv(1)   # returns when the client hangs up


def drips(call: Call) -> None:
    """A byte every tenth of a second, for ever."""
    call.conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    while True:
        call.conn.sendall(b" ")
        time.sleep(0.1)


def resets(call: Call) -> None:
    """The connection breaks in the middle of the body."""
    call.conn.sendall(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"id": "x", ')
    time.sleep(0.05)
    call.conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def html(call: Call) -> None:
    call.send(200, "<html><body>Sign in to the network</body></html>", kind="text/html")


def error_in_200(call: Call) -> None:
    call.send(200, {"error": {"message": "upstream is overloaded", "code": 502}})


def no_choices(call: Call) -> None:
    call.send(200, {**completion(""), "choices": []})


def changed(change: Callable[[dict, str], None], **more) -> Behaviour:
    """A good reply with something about it changed."""
    def answer(call: Call) -> None:
        text = idea(call, **more)
        body = whole(call, text)
        change(body, text)
        call.send(200, body)
    return answer


def as_reasoning(body: dict, text: str) -> None:
    body["choices"][0]["message"] = {"role": "assistant", "content": "", "reasoning_content": text}


def after_thinking(body: dict, text: str) -> None:
    body["choices"][0]["message"]["content"] = f"<think>Or rather\nSET RATE = 77.0\n?</think>\n{text}"


def cut_off(body: dict, text: str) -> None:
    body["choices"][0] |= {"finish_reason": "length"}


def without_usage(body: dict, text: str) -> None:
    del body["usage"]


def reads_little(call: Call) -> None:
    """A server that reads the first hundred tokens of a request only."""
    call.send(200, {**whole(call, idea(call)), "usage": {"prompt_tokens": 100, "completion_tokens": 10}})


# ----------------------------------------------------------------------------------------------------------------------
# The storm: a checkout, its session, what it says


class Line(NamedTuple):
    at: float
    text: str


@dataclass
class Storm:
    """What the faults work with. filler: the file that fills the disk; None where there is no tmpfs."""

    checkout: Checkout
    stand_ins: Path
    filler: Path | None
    key: str
    server: Server = field(default_factory=Server)
    lines: list[Line] = field(default_factory=list)   # of all sessions, stderr too
    sessions: int = 0
    worn: bool = False       # the present session sends shorter requests, or no limit of the reply
    process: subprocess.Popen | None = None

    @property
    def runs(self) -> Path:
        return self.checkout.root / "runs" / "storm"

    def start(self, *args: str) -> None:
        """The same command as ever, with or without --hours."""
        command = [sys.executable, str(self.stand_ins / "driver.py"), str(self.checkout.root), str(self.stand_ins)]
        command += ["--tag", "storm", "--model", "tiny", "--sandbox", "off", "--time-budget", "0.1", *args]
        env = self.checkout.env(OPENAI_BASE_URL=f"http://127.0.0.1:{self.server.port}/v1", OPENAI_API_KEY=self.key,
                                PATH=f"{self.stand_ins}:{os.environ['PATH']}", TOY_PRESET="consumer")
        self.process = subprocess.Popen(command, cwd=self.checkout.root, env=env, stdout=subprocess.PIPE, text=True,
                                        stderr=subprocess.STDOUT, start_new_session=True)
        self.sessions, self.worn = self.sessions + 1, False
        self.reader = threading.Thread(target=self.listen, args=(self.process,), daemon=True)
        self.reader.start()

    def listen(self, process: subprocess.Popen) -> None:
        for text in process.stdout:
            self.lines.append(Line(time.monotonic(), text.rstrip("\n")))

    def signal(self, number: int) -> None:
        """A signal to agent.py and its git, as from a terminal."""
        os.killpg(self.process.pid, number)

    def ended(self, code: int, limit_s: float = SEEN_S) -> None:
        """Wait for the end of the session, which must have this exit status and leave no process. Raises Unseen."""
        try:
            found = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise Unseen(f"the session did not end within {limit_s:.0f} s") from None
        self.reader.join(5)
        if found != code:
            raise Unseen(f"exit status {found}, not {code}: {self.lines[-1].text[:150]}")
        limit = time.monotonic() + 3
        while left := living(self):
            if time.monotonic() > limit:
                raise Unseen(f"still runs: {left[0][:100]}")
            time.sleep(0.01)

    def stop(self, number: int) -> None:
        """End the session by Ctrl-C or SIGTERM, in the middle of a run."""
        with self.held():
            self.signal(number)
            self.ended(130)

    def wait(self, found: Callable[[], object], what: str, limit_s: float = SEEN_S) -> object:
        """What found() returns, as soon as it is something. Raises Unseen, and where the session ends before."""
        limit = time.monotonic() + limit_s
        while not (result := found()):
            if time.monotonic() > limit:
                raise Unseen(f"waited {limit_s:.0f} s for {what}")
            if self.process.poll() is not None and not self.reader.is_alive() and not found():
                raise Unseen(f"waited for {what}")
            time.sleep(0.01)
        return result

    def said(self, pattern: str, since: int) -> str:
        """Wait for a line of the screen that comes after the first `since`; the part that matches."""
        def found() -> str:
            return next((m[0] for line in self.lines[since:] if (m := re.search(pattern, line.text))), "")
        return self.wait(found, f"the line {pattern!r}")

    def plan(self, *behaviours: Behaviour) -> int:
        """Have the next requests answered so; where in `calls` the first of them is, once all have come."""
        since = len(self.server.calls)
        self.server.plan = list(behaviours)
        self.wait(lambda: not self.server.plan, "requests")
        return self.wait(lambda: [i for i, call in enumerate(self.server.calls)
                                  if i >= since and call.behaviour is behaviours[0]], "a request")[0]

    def idea_of(self, call: int) -> int:
        """Wait for the number of the idea that a call is answered with."""
        return self.wait(lambda: len(self.server.calls) > call and self.server.calls[call].idea, "a reply")

    def row_of(self, number: int) -> dict[str, str]:
        """Wait for the row of an idea with this number or a later one."""
        def found() -> list[dict[str, str]]:
            return [row for row in self.rows() if (m := re.match(r"idea (\d+)", row["description"]))
                    and int(m[1]) >= number and row["status"] in ("keep", "discard")]
        return self.wait(found, f"a row of idea {number} or later")[0]

    def rows(self) -> list[dict[str, str]]:
        """The whole lines of results.tsv."""
        with contextlib.suppress(OSError, UnicodeError):
            lines = (self.checkout.root / "results.tsv").read_text().rpartition("\n")[0].splitlines()[1:]
            return [dict(zip(COLUMNS, line.split("\t"))) for line in lines if line.count("\t") == len(COLUMNS) - 1]
        return []

    def searched(self, since: int) -> None:
        """Wait for a row of the search after the first `since` rows."""
        self.wait(lambda: any(row["proposer"] == "search" for row in self.rows()[since:]), "a row by the search")

    def set(self, name: str, text: str = "") -> None:
        """Write a stand-in's file, so that nobody reads half of it."""
        new = self.stand_ins / f"{name}.new"
        new.write_text(text)
        new.rename(self.stand_ins / name)

    def unset(self, *names: str) -> None:
        for name in names:
            (self.stand_ins / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def held(self) -> Iterator[str]:
        """While the next run waits in the middle of its training; its id."""
        self.set("hold")
        self.wait((self.stand_ins / "held").exists, "a run")
        try:
            yield sorted(path.parent.name for path in self.runs.glob("[0-9]*/work"))[-1]
        finally:
            self.unset("hold", "held")

    @contextlib.contextmanager
    def asking(self, **more) -> Iterator[None]:
        """While the session waits for a reply, which it then gets."""
        self.server.released.clear()
        self.plan(when_released(**more))
        try:
            yield
        finally:
            self.server.released.set()

    def fill(self, leave_mb: float) -> None:
        """Take the disk's room away but for so many MB; for 0, to the last byte."""
        with open(self.filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            disk = os.statvfs(self.filler.parent)
            os.posix_fallocate(file.fileno(), 0, int(disk.f_bavail * disk.f_frsize - leave_mb * 2**20))
            file.seek(0, os.SEEK_END)
            while not leave_mb:
                file.write(b"x" * 4096)

    def calm(self) -> None:
        """Take every fault away."""
        self.server.mode, self.server.plan = None, []
        self.server.released.set()
        self.unset("hold", "held", "crash", "no_dns", "fill_at", "filled")
        self.set("gpu", GPU_FREE)
        if self.filler:
            self.filler.unlink(missing_ok=True)
        if self.server.listener.fileno() < 0:
            self.server.open()


def living(storm: Storm) -> list[str]:
    """The command lines of processes that work in the checkout, whosever children they are."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):   # ended meanwhile, or a zombie
            if Path(os.readlink(link)).is_relative_to(storm.checkout.root):
                found.append((link.parent / "cmdline").read_text().replace("\0", " "))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The faults: each brings one about, waits for its trace, and returns in words what was seen. Raises Unseen


@dataclass(frozen=True)
class Fault:
    """fresh: needs a session that sends whole requests. new_sessions: that it starts. needs: tmpfs or cgroup."""

    name: str
    bring: Callable[[Storm], str]
    fresh: bool = False
    new_sessions: int = 0
    needs: str = ""


def once(*behaviours: Behaviour, gap_s: float, trace: str) -> Callable[[Storm], str]:
    """Some bad answers, after which the same proposal is asked for again, not sooner than gap_s; no search."""
    def bring(storm: Storm) -> str:
        rows = len(storm.rows())
        calls = storm.plan(*behaviours)
        row = storm.row_of(storm.idea_of(calls + len(behaviours)))
        times = [call.at for call in storm.server.calls[calls:calls + len(behaviours) + 1]]
        gaps = [after - before for before, after in itertools.pairwise(times)]
        if min(gaps) < gap_s:
            raise Unseen(f"asked again after {min(gaps):.1f} s")
        if any(row["proposer"] == "search" for row in storm.rows()[rows:]):
            raise Unseen("the search proposed meanwhile")
        if not re.search(f"no reply of tiny -->\n\n.*{trace}", (storm.runs / row["id"] / "llm.md").read_text()):
            raise Unseen(f"no {trace!r} in runs/storm/{row['id']}/llm.md")
        return f"asked again after {', '.join(f'{gap:.1f}' for gap in gaps)} s; in llm.md"
    return bring


def outage(begin: Callable[[Storm], None], trace: str) -> Callable[[Storm], str]:
    """A failure that lasts until the search has proposed an experiment; then the model is asked again."""
    def bring(storm: Storm) -> str:
        since, rows, start = len(storm.lines), len(storm.rows()), time.monotonic()
        begin(storm)
        storm.said(rf"no answer from tiny \(.*{trace}.*\); the search proposes until it answers again", since)
        told_s = time.monotonic() - start
        storm.searched(rows)
        storm.calm()
        storm.said("tiny answers again", since)
        return f"told after {told_s:.1f} s; {len(storm.rows()) - rows} rows by the search; asked again"
    return bring


def mode(behaviour: Behaviour) -> Callable[[Storm], None]:
    return lambda storm: setattr(storm.server, "mode", behaviour)


def with_key(storm: Storm) -> None:
    """A refusal that repeats the key, on a reply that does so too."""
    if f"Bearer {storm.key}" not in storm.server.calls[-1].headers:
        raise Unseen("the key was not sent")
    storm.server.mode = fails(401, f"Incorrect API key provided: {storm.key}")


def key_echoed(storm: Storm) -> str:
    row = storm.row_of(storm.idea_of(storm.plan(changed(without_usage, description=f"by {storm.key}"))))
    if "by ***" not in row["description"]:
        raise Unseen(f"a row that says {row['description']}")
    return outage(with_key, r"401: Incorrect API key provided: \*\*\*")(storm) + "; *** in its place"


def far_retry_after(storm: Storm) -> str:
    """The server asks to be left alone for longer than an outage: nothing is sent meanwhile."""
    since, rows = len(storm.lines), len(storm.rows())
    calls = storm.plan(fails(429, "slow down", {"Retry-After": str(FAR_S)}))
    storm.said(r"no answer from tiny \(429: slow down\); the search proposes", since)
    storm.said("tiny answers again", since)
    first, second = (call.at for call in storm.server.calls[calls:calls + 2])
    searched = sum(row["proposer"] == "search" for row in storm.rows()[rows:])
    if second - first < FAR_S or searched < 2:
        raise Unseen(f"asked again after {second - first:.1f} s, {searched} rows by the search")
    return f"left alone for {second - first:.1f} s; {searched} rows by the search"


def reshaped(change: Callable[[dict, str], None]) -> Callable[[Storm], str]:
    """A reply in an odd shape that can be used as it is."""
    def bring(storm: Storm) -> str:
        calls = storm.plan(changed(change))
        number = storm.idea_of(calls)
        row = storm.row_of(number)
        chars = storm.server.calls[calls].chars
        counted = change is not without_usage or abs(int(row["llm_tokens"]) - chars / 4) < 100
        text = storm.checkout.git("show", f"{row['commit']}:train.py")
        if row["description"] != f"idea {number}" or "RATE = 77" in text or not counted:
            raise Unseen(f"{row['description']!r}, {row['llm_tokens']} tokens")
        return f"used as it is, {row['llm_tokens']} tokens"
    return bring


def cut_short(storm: Storm) -> str:
    since = len(storm.lines)
    number = storm.idea_of(storm.plan(changed(cut_off)))
    storm.said("refused before training: The reply was cut off", since)
    storm.row_of(number + 1)
    return "refused, taught, the next one used"


def refuses_limits(storm: Storm) -> str:
    """max_tokens is refused by name, and then its other name too."""
    calls = len(storm.server.calls)

    def answer(call: Call) -> None:
        named = [name for name in ("max_tokens", "max_completion_tokens") if name in call.body]
        if not named:
            return ordinary(call)
        call.send(400, {"error": {"message": f"Unsupported parameter: '{named[0]}'", "param": named[0]}})
    storm.worn, storm.server.mode = True, answer
    storm.wait(lambda: len(storm.server.calls) > calls + 3, "requests")
    sent = [[name for name in call.body if name.startswith("max_")] for call in storm.server.calls[calls:calls + 4]]
    if sent != [["max_tokens"], ["max_completion_tokens"], [], []]:
        raise Unseen(f"sent {sent}")
    return "renamed, then left out, then not sent again"


def too_long(behaviour: Behaviour, trace: str) -> Callable[[Storm], str]:
    """The request does not fit the model's context: it is shortened."""
    def bring(storm: Storm) -> str:
        since, calls = len(storm.lines), len(storm.server.calls)
        storm.worn, storm.server.mode = True, behaviour
        storm.said(rf"the request is too long for tiny \(.*{trace}", since)
        storm.calm()
        storm.row_of(storm.server.number + 1)
        chars = storm.server.calls[calls].chars, storm.server.calls[-1].chars
        if chars[1] >= chars[0]:
            raise Unseen(f"{chars[0]} characters before, {chars[1]} after")
        return f"shortened from {chars[0]} to {chars[1]} characters"
    return bring


def unusable(storm: Storm) -> str:
    """Twenty replies in a row without an edit."""
    since, rows, calls = len(storm.lines), len(storm.rows()), len(storm.server.calls)
    storm.server.mode = lambda call: call.send(200, completion("I would rather not."))
    count = int(storm.said(r"\d+ unusable replies in a row from tiny; the search proposes", since).split()[0])
    seconds = storm.server.calls[-1].at - storm.server.calls[calls].at
    storm.searched(rows)
    storm.calm()
    if count < 20:
        raise Unseen(f"the search proposed after {count} unusable replies, {seconds:.1f} s")
    return f"the search proposed after {count} replies, {seconds:.1f} s"


def disk_before(storm: Storm) -> str:
    since = len(storm.lines)
    with storm.asking():
        storm.fill(1.5 * RESERVE_MB)
    seen = storm.said(r"waiting: \S+ GB of the disk are free", since)
    time.sleep(1)
    storm.filler.unlink()
    storm.said("going on", since)
    return seen


def disk_in_run(leave_mb: float) -> Callable[[Storm], str]:
    """The disk fills up while a run trains; at 0 it cannot write its checkpoint."""
    def bring(storm: Storm) -> str:
        since = len(storm.lines)
        with storm.held() as id:
            storm.fill(leave_mb)
            time.sleep(0.5 if leave_mb else 0)
        seen = storm.said(rf"{id} does not count \(the disk is nearly full\)|the disk is full \(.*\)", since)
        time.sleep(1)
        storm.filler.unlink()
        return seen[:70]
    return bring


def disk_while_asking(storm: Storm) -> str:
    """The reply comes when there is no room to write it down."""
    since = len(storm.lines)
    with storm.asking(edits='SET NOTE = "plain"\n\n' + "And so on. " * 2000):
        storm.fill(0)
    seen = storm.said(r"the disk is full \(.*\)", since)
    time.sleep(1)
    storm.filler.unlink()
    return seen[:70]


def disk_in_record(when: str, word: str) -> Callable[[Storm], str]:
    """The disk fills up before or after one of the git commands that write a keep down."""
    def bring(storm: Storm) -> str:
        since = len(storm.lines)
        number = storm.idea_of(storm.plan(with_idea(keep=True)))
        storm.set("fill_at", f"{when} {word}\n")
        storm.wait((storm.stand_ins / "filled").exists, f"git {word}")
        seen = storm.said(r"the disk is full \(.*\)", since)
        time.sleep(1)
        storm.filler.unlink()
        row = storm.row_of(number)
        if row["description"] != f"idea {number}" or row["status"] != "keep":
            raise Unseen(f"idea {number} was to be kept: {row['description']}, {row['status']}")
        return seen[:70] + "; the keep is whole"
    return bring


def disk_in_row(storm: Storm) -> str:
    """Half of a row still fits: on a tmpfs, up to the end of a page of the file."""
    path = storm.checkout.root / "results.tsv"
    storm.wait(lambda: -path.stat().st_size % 4096 < 100, "a file that ends near the end of a page", 2 * SEEN_S)
    since, rows = len(storm.lines), len(storm.rows())
    storm.set("fill_at", "after update-ref --stdin\n")
    seen = storm.said(r"the disk is full \(.*\)", since)
    time.sleep(1)
    storm.filler.unlink()
    storm.wait(lambda: len(storm.rows()) > rows + 1, "two rows")
    odd = [line for line in path.read_text().splitlines() if line.count("\t") != len(COLUMNS) - 1]
    if odd:
        raise Unseen(f"results.tsv keeps half a line: {odd[0]!r}")
    return f"{seen[:70]}; the row is whole"


def killed(note: str) -> Callable[[Storm], str]:
    """A run that is killed as for memory, and then mended by the model."""
    def bring(storm: Storm) -> str:
        since = len(storm.lines)
        number = storm.idea_of(storm.plan(with_idea(edits=f'SET NOTE = "{note}"')))
        seen = storm.said(r"crashed \(.*\); asking for a repair", since)
        row = storm.row_of(number + 1)
        if "killed by signal 9, perhaps out of memory" not in seen or not list(storm.runs.glob(f"{row['id']}/crash*")):
            raise Unseen(seen)
        return f"{seen}; mended"
    return bring


def hangs(storm: Storm) -> str:
    number = storm.idea_of(storm.plan(with_idea(edits='SET NOTE = "hang"')))
    row = storm.wait(lambda: [row for row in storm.rows() if row["description"].startswith(f"idea {number} (")],
                     "the row of the run that hangs")[0]
    if not re.fullmatch(rf"idea {number} \(timeout after \d+ s\)", row["description"]) or row["status"] != "crash":
        raise Unseen(f"{row['status']}: {row['description']}")
    return f"{row['status']}: {row['description']}"


def bad_ideas(storm: Storm) -> str:
    """Three crashes in a row that the ideas are to blame for."""
    since, rows = len(storm.lines), len(storm.rows())
    storm.server.mode = with_idea(edits='SET NOTE = "crash"')
    storm.said("3 crashes in a row: the best is run again", since)
    storm.server.mode = None
    storm.said("the best runs as before: it was the ideas", since)
    found = [row["status"] for row in storm.rows()[rows:]]
    if found[:4] != ["crash"] * 3 + ["verify"]:
        raise Unseen(f"rows {found}")
    return "three crash rows, then the best ran: goes on"


def gpu_lost(storm: Storm) -> str:
    """Everything crashes, the best too: the session ends with one line. Without the fault the same command goes on."""
    since = len(storm.lines)
    storm.set("crash")
    storm.ended(2)
    usual = r"\d{4}  |      |\d+ rows|[\d,]+ tokens|val_bpb|rows:|to have"
    last = [line.text for line in storm.lines[since:] if not re.match(usual, line.text)]
    if len(last) != 1 or not re.match(r"agent\.py: 3 experiments crashed in a row, and now the best fails too", last[0]):
        raise Unseen(f"said {last}")
    storm.calm()
    storm.start()
    return "exit 2 with one line; the same command went on"


def gpu_query(answer: str) -> Callable[[Storm], str]:
    """The GPU query hangs, or fails: nothing is known of foreign memory, and experiments go on."""
    def bring(storm: Storm) -> str:
        with storm.asking():
            number = storm.server.number
            storm.set("gpu", answer)
            storm.unset("gpu_log")
        storm.row_of(number + 1)
        asked = (storm.stand_ins / "gpu_log").read_text().split().count(answer)
        if asked < 2:
            raise Unseen(f"asked {asked} times")
        return f"asked {asked} times in one experiment, which counts"
    return bring


def gpu_taken_before(storm: Storm) -> str:
    since = len(storm.lines)
    with storm.asking():
        storm.set("gpu", GPU_TAKEN)
    seen = storm.said("waiting: another program uses .* GB", since)
    time.sleep(1)
    storm.set("gpu", GPU_FREE)
    storm.said("going on", since)
    return seen


def void(during: Callable[[Storm], None], trace: str) -> Callable[[Storm], str]:
    """Something happens while a run trains that makes it count for nothing; it is run again."""
    def bring(storm: Storm) -> str:
        since = len(storm.lines)
        with storm.held() as id:
            during(storm)
        seen = storm.said(rf"{id} does not count \({trace}\); it is run again", since)
        storm.set("gpu", GPU_FREE)
        storm.wait(lambda: any(row["id"] == id for row in storm.rows()), f"the row of {id}")
        return seen
    return bring


def sleeps(storm: Storm) -> None:
    storm.set("asleep", str(time.monotonic()))   # always more than before


def stops(storm: Storm) -> None:
    """agent.py alone stands still; its run ends meanwhile."""
    os.kill(storm.process.pid, signal.SIGSTOP)
    storm.unset("held")
    time.sleep(STOOD_S)
    os.kill(storm.process.pid, signal.SIGCONT)


def set_back(storm: Storm) -> str:
    """The clock is set back by two hours in a session with a deadline, which it must meet all the same."""
    storm.stop(signal.SIGTERM)
    start, rows = time.monotonic(), len(storm.rows())
    storm.start("--hours", str(HOURS_S / 3600))
    storm.wait(lambda: len(storm.rows()) > rows, "a row")
    storm.set("set_back", "7200")
    storm.ended(0)
    seconds, times = time.monotonic() - start, [row["time"] for row in storm.rows()[rows:]]
    if seconds > HOURS_S + 3 or times == sorted(times):
        raise Unseen(f"ended after {seconds:.1f} s of {HOURS_S:.0f}; times {times}")
    storm.start()
    return f"{len(times)} rows; ended after {seconds:.1f} s of {HOURS_S:.0f}, exit 0"


def ended_by(number: int, code: int) -> Callable[[Storm], str]:
    """The session is ended in the middle of a run, and the same command goes on with the same id."""
    def bring(storm: Storm) -> str:
        with storm.held() as id:
            start = time.monotonic()
            os.kill(storm.process.pid, number) if number == signal.SIGKILL else storm.signal(number)
            storm.ended(code)
            seconds, since = time.monotonic() - start, len(storm.lines)
            if any(row["id"] == id for row in storm.rows()):
                raise Unseen(f"a row of {id}, which was cut off")
        storm.start()
        storm.said(f"going on after {int(id) - 1:04d}", since)
        return f"gone after {seconds:.1f} s, exit {code}; went on as {id}"
    return bring


def hung_up(storm: Storm) -> str:
    """A closed terminal, in the middle of a run."""
    id = storm.wait(lambda: [path.parent.name for path in storm.runs.glob("[0-9]*/work")], "a run")[0]
    storm.signal(signal.SIGHUP)
    storm.wait(lambda: any(row["id"] == id for row in storm.rows()), f"the row of {id}")
    return f"{id} ran on"


def refused_port(storm: Storm) -> None:
    storm.server.close()


def endpoint_faults() -> list[Fault]:
    """Of the model's server."""
    quota = fails(429, "You exceeded your current quota", code="insufficient_quota")
    long = fails(400, "This model's maximum context length is 8192 tokens", code="context_length_exceeded")
    return [
        Fault("429, Retry-After in seconds", once(fails(429, "slow", {"Retry-After": "1"}), gap_s=1, trace="429")),
        Fault("429, Retry-After as a date", once(retry_on_a_date, gap_s=1.9, trace="429")),
        Fault("429, Retry-After far beyond", far_retry_after),
        Fault("500, twice", once(fails(500), fails(500), gap_s=0.4, trace="500")),
        Fault("503", outage(mode(fails(503, "overloaded")), "503: overloaded")),
        Fault("connection refused", outage(refused_port, "refused")),
        Fault("no name server", outage(lambda storm: storm.set("no_dns"), "name resolution")),
        Fault("reset in mid-body", once(resets, gap_s=0.4, trace="")),
        Fault("a reply that never comes", outage(mode(never), "no answer within")),
        Fault("a dripping reply", outage(mode(drips), "no answer within")),
        Fault("HTML instead of JSON", outage(mode(html), "no JSON")),
        Fault("200 with error", once(error_in_200, gap_s=0.4, trace="502: upstream is overloaded")),
        Fault("empty choices", once(no_choices, gap_s=0.4, trace="an answer without a reply")),
        Fault("reasoning without content", reshaped(as_reasoning)),
        Fault("<think> blocks", reshaped(after_thinking)),
        Fault("missing usage", reshaped(without_usage)),
        Fault("cut-off reply", cut_short),
        Fault("max_tokens refused by name", refuses_limits, fresh=True),
        Fault("context too long", too_long(long, "400: This model's maximum"), fresh=True),
        Fault("a server that truncates", too_long(reads_little, "cut the prompt"), fresh=True),
        Fault("twenty unusable replies", unusable),
        Fault("401 in mid-session", outage(mode(fails(401, "key expired")), "401: key expired")),
        Fault("exhausted quota", outage(mode(quota), "429: You exceeded your current quota")),
        Fault("the key in an error and a reply", key_echoed),
    ]


def machine_faults() -> list[Fault]:
    """Of disk, memory, GPU, clocks and processes."""
    fill = [Fault(f"disk full in a record, {when} git {word}", disk_in_record(when, word), needs="tmpfs")
            for when, word in IN_RECORD]
    return [
        Fault("disk low before an experiment", disk_before, needs="tmpfs"),
        Fault("disk low during a run", disk_in_run(RESERVE_MB / 2), needs="tmpfs"),
        Fault("disk full during a run", disk_in_run(0), needs="tmpfs"),
        Fault("disk full during a request", disk_while_asking, needs="tmpfs"),
        *fill,
        Fault("disk full in the middle of a row", disk_in_row, needs="tmpfs"),
        Fault("a run killed by SIGKILL", killed("kill")),
        Fault("a run killed for memory", killed("memory"), needs="cgroup"),
        Fault("a run that hangs", hangs),
        Fault("three crashes, by the ideas", bad_ideas),
        Fault("three crashes, by the GPU", gpu_lost, new_sessions=1),
        Fault("GPU query hangs", gpu_query("hang")),
        Fault("GPU query fails", gpu_query("fail")),
        Fault("GPU memory taken before a run", gpu_taken_before),
        Fault("GPU memory taken during a run", void(lambda storm: storm.set("gpu", GPU_TAKEN), "another program .*")),
        Fault("machine slept during a run", void(sleeps, "the machine slept")),
        Fault("agent.py stopped during a run", void(stops, r"agent\.py stood still for 1\d s")),
        Fault("clock set back", set_back, new_sessions=2),
        Fault("Ctrl-C", ended_by(signal.SIGINT, 130), new_sessions=1),
        Fault("SIGKILL", ended_by(signal.SIGKILL, -signal.SIGKILL), new_sessions=1),
        Fault("SIGHUP", hung_up),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Afterwards: git and the files, read with plain git


def experiments(storm: Storm) -> list[dict[str, str]]:
    """What the refs hold, by id: the trailers, and id, commit, parent, description."""
    found = []
    refs = storm.checkout.git("for-each-ref", "--format=%(refname) %(objectname)", "refs/autoresearch/")
    for ref, commit in map(str.split, refs.splitlines()):
        head, _, message = storm.checkout.git("cat-file", "commit", commit).partition("\n\n")
        trailers = dict(re.findall(r"^([A-Z][\w-]*): (.*)$", message.rstrip().rpartition("\n\n")[2], re.M))
        parent = re.findall(r"^parent (\w+)$", head, re.M)[0]
        found.append({**trailers, "ref": ref, "commit": commit, "parent": parent,
                      "description": message.partition("\n\n")[0]})
    return sorted(found, key=lambda e: e["ref"])


def row_faults(storm: Storm, found: list[dict[str, str]]) -> Iterator[str]:
    """Every ref has one row, every row one ref, in order and without a gap; both say the same."""
    text, rows = storm.checkout.text("results.tsv"), storm.rows()
    header, *lines = text.splitlines()
    if header.split("\t") != COLUMNS or not text.endswith("\n") or {line.count("\t") for line in lines} != {16}:
        yield "results.tsv has a line that is not whole"
    wanted = [f"refs/autoresearch/storm/{number:04d}" for number in range(1, len(found) + 1)]
    if [e["ref"] for e in found] != wanted:
        yield f"lost: the refs are {[e['ref'][-4:] for e in found]}"
    if [f"refs/autoresearch/{row['tag']}/{row['id']}" for row in rows] != wanted:
        yield f"lost: the rows are {[row['id'] for row in rows]}, the refs {len(found)}"
    for row, e in zip(rows, found):
        reason = "" if e["Reason"] == "-" else f" ({e['Reason']})"
        value = "0.000000" if e["Val-Bpb"] == "-" else f"{float(e['Val-Bpb']):.6f}"
        said = (e["commit"][:7], e["parent"][:7], e["Status"], value, e["Proposer"], e["description"] + reason)
        if said != tuple(row[name] for name in ("commit", "parent", "status", "val_bpb", "proposer", "description")):
            yield f"the row of {e['ref']} is {row}, its commit says {said}"


def verdict_faults(storm: Storm, found: list[dict[str, str]]) -> Iterator[str]:
    """Only known statuses; crashes only where they were ordered; nothing of a void run; every screen line has a row,
    and every program that has trained to its end a commit."""
    for e in found:
        what = f"{e['ref']}: {e['Status']} ({e['Reason']})"
        if e["Status"] not in ("keep", "discard", "crash", "verify"):
            yield what   # no run here broke a rule
        if e["Status"] == "crash" and not re.match(r"killed by signal 9, perhaps|RuntimeError: CUDA error|timeout",
                                                   e["Reason"]):
            yield what
        if e["Steps"] == str(VOID_STEPS):
            yield f"{what} is a row of a void run"
    ids = {row["id"] for row in storm.rows()}
    said = [m[1] for line in storm.lines if (m := re.match(r"(\d{4})  \w", line.text))]
    yield from (f"{id} was reported {said.count(id)} times" for id in ids if said.count(id) != 1)
    yield from (f"lost: {id} was reported and has no row" for id in said if id not in ids)
    programs = (storm.checkout.git("cat-file", "blob", f"{e['commit']}:train.py") for e in found)
    known = {hashlib.sha256(f"{text}\n".encode()).hexdigest() for text in programs}   # Checkout.git strips it
    trained = (storm.stand_ins / "trained").read_text().split()
    yield from (f"lost: a program was trained to its end, and is in no commit: {sha}" for sha in set(trained) - known)


def chain_faults(storm: Storm, found: list[dict[str, str]]) -> Iterator[str]:
    """Each experiment stands upon the best of its time; keeps fall; branch, checkout, best/ are the newest keep."""
    best = None
    for e in found:
        if best and e["parent"] != best["commit"]:
            yield f"{e['ref']} stands upon {e['parent'][:7]}, not {best['commit'][:7]}"
        if best and e["Status"] == "keep" and float(e["Val-Bpb"]) >= float(best["Val-Bpb"]):
            yield f"{e['ref']} is a keep and no better"
        best = e if e["Status"] == "keep" else best
    git, root = storm.checkout.git, storm.checkout.root
    if git("symbolic-ref", "HEAD") != "refs/heads/autoresearch/storm" or git("rev-parse", "HEAD") != best["commit"]:
        yield "the branch is not on the newest keep"
    if changed := set(git("status", "--porcelain").split("\n")) - {"M results.tsv", " M results.tsv"}:
        yield f"git status shows {changed}"
    if (storm.runs / "best" / "train.py").read_text() != storm.checkout.text():
        yield "best/ is not the newest keep"
    if fsck := subprocess.run(["git", "fsck", "--no-dangling"], cwd=root, capture_output=True, text=True).stdout:
        yield f"git fsck: {fsck}"


def leftover_faults(storm: Storm, found: list[dict[str, str]]) -> Iterator[str]:
    """No process, no lock, no half file, nothing large but of the best, no unexpected error, the key nowhere."""
    root, git_dir = storm.checkout.root, storm.checkout.root / ".git"
    yield from (f"still runs: {command}" for command in living(storm))
    locks = [*git_dir.glob("*.lock"), *(git_dir / "refs").rglob("*.lock"), *git_dir.glob("*.writing")]
    patterns = ".*-half", "runs/**/.*-half", "runs/*/*.new", "runs/*/*/work", "runs/*/[0-9]*/checkpoint.pt", "runs/*/errors.log"
    left = [path for pattern in patterns for path in root.glob(pattern)]
    left += [path for path in locks if path.name != "autoresearch.lock"]
    yield from (f"left over: {path.relative_to(root)}" for path in left)
    objects = subprocess.run(["git", "cat-file", "--batch-all-objects", "--batch"], cwd=root, capture_output=True)
    places = {"git's objects": objects.stdout, "the screen": "\n".join(line.text for line in storm.lines).encode()}
    places |= {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    yield from (f"the key is in {place}" for place, data in places.items() if storm.key.encode() in data)


def audit(storm: Storm) -> list[str]:
    """Everything that must hold after the last session."""
    checks = row_faults, verdict_faults, chain_faults, leftover_faults
    found = experiments(storm)
    return [fault for check in checks for fault in check(storm, found)]


# ----------------------------------------------------------------------------------------------------------------------
# Its course


class Outcome(NamedTuple):
    """survived: None where it was not tried. rows: from `start` to the first good one afterwards, at `end`."""

    name: str
    seen: str
    survived: bool | None
    start: float = 0.0
    end: float = 0.0
    rows: int = 0

    def lost_s(self, usual_s: float) -> float:
        return max(0.0, self.end - self.start - self.rows * usual_s)


def suffer(storm: Storm, fault: Fault) -> Outcome:
    """One fault, and the first good experiment after it."""
    if fault.fresh and storm.worn:
        storm.stop(signal.SIGTERM)
        storm.start()
        storm.row_of(storm.server.number + 1)
    start, rows, lines, sessions = time.monotonic(), len(storm.rows()), len(storm.lines), storm.sessions
    try:
        seen, survived = fault.bring(storm), True
    except Unseen as error:
        seen, survived = f"FAILED: {error}", False
    storm.calm()
    if storm.process.poll() is not None:
        seen, survived = f"{seen}; the session ended: {storm.lines[-1].text[:150]}", False
        storm.start()
    try:
        storm.row_of(storm.server.number + 1)
    except Unseen:
        seen, survived = f"{seen}; no experiment after it", False
        storm.process.kill()
        storm.start()
    odd = [line.text for line in storm.lines[lines:] if re.search("unexpected|Traceback|mended from git", line.text)]
    if odd:
        seen, survived = f"{seen}; said: {odd[0].strip()[:100]}", False
    elif survived and storm.sessions - sessions != fault.new_sessions:
        seen, survived = f"{seen}; {storm.sessions - sessions} new sessions", False
    return Outcome(fault.name, seen, survived, start, time.monotonic(), len(storm.rows()) - rows)


def shuffled(seed: int) -> list[Fault]:
    """All faults in an order by seed; but requests can be shortened only when there are many rows."""
    found = endpoint_faults() + machine_faults()
    random.Random(seed).shuffle(found)
    late = [fault for fault in found if fault.bring.__qualname__.startswith("too_long")]
    rest = [fault for fault in found if fault not in late]
    return rest[:len(rest) // 2] + late[:1] + rest[len(rest) // 2:] + late[1:]


def checkout_in(folder: Path, disk: Path, own_disk: bool, cgroup: Path | None) -> Storm:
    """A checkout on the small disk, and the stand-ins beside it."""
    checkout = make_checkout(disk / "checkout", folder / "cache")
    imports = "import hashlib\nimport os\nimport signal\nimport time\nfrom pathlib import Path\n\nimport prepare"
    text = checkout.text().replace("import prepare", imports).replace("def main():\n", SUFFER)
    text = text.replace("data.start(model)", "data.start(model)\n    held = suffer(NOTE)")
    text = text.replace("steps=step, tokens=1_000_000)", f"steps={VOID_STEPS} if held else step)\n    enter(held)")
    (checkout.root / "train.py").write_text(text)
    (checkout.root / "program.md").write_text("Lower the number.\n" * 600)
    commit_all(checkout)
    stand_ins = checkout.cache / "stand_ins"
    stand_ins.mkdir(parents=True)
    filler = disk / "filler" if own_disk else None
    storm = Storm(checkout, stand_ins, filler, "sk-storm-" + secrets.token_hex(8))
    for name, script in (("nvidia-smi", NVIDIA_SMI), ("git", GIT), ("driver.py", DRIVER)):
        script = script.replace("STAND_INS", str(stand_ins)).replace("REAL", shutil.which("git"))
        (stand_ins / name).write_text(script.replace("FILLER", str(filler)))
        (stand_ins / name).chmod(0o755)
    if cgroup:
        storm.set("cgroup", str(cgroup))
    storm.calm()
    return storm


def weather(storm: Storm, chosen: list[Fault], missing: dict[str, str]) -> list[Outcome]:
    """One session, the faults one after the other, its end."""
    outcomes, began = [], time.monotonic()
    storm.start()
    try:
        storm.row_of(3)
    except Unseen as error:
        sys.exit("\n".join([line.text for line in storm.lines[-20:]] + [f"no session to begin with: {error}"]))
    for fault in chosen:
        if fault.needs in missing or time.monotonic() - began > WHOLE_S - SEEN_S:
            outcome = Outcome(fault.name, f"skipped: {missing.get(fault.needs, 'no time left')}",
                              None if fault.needs in missing else False)
        else:
            outcome = suffer(storm, fault)
        outcomes.append(outcome)
        print(f"{outcome.name:44} {outcome.seen}", flush=True)
    storm.stop(signal.SIGINT)
    return outcomes


def usual_s(storm: Storm) -> float:
    """Seconds from one row to the next when nothing happens: the median of all."""
    times = [line.at for line in storm.lines if re.match(r"\d{4}  \w", line.text)]
    return statistics.median(after - before for before, after in itertools.pairwise(times))


def report(storm: Storm, outcomes: list[Outcome], wrong: list[str], seconds: float) -> str:
    """The table and the figures."""
    usual, answer = usual_s(storm), {True: "yes", False: "NO", None: "-"}
    lines = [f"\n{'fault':44} survived  lost s  seen"]
    lines += [f"{o.name:44} {answer[o.survived]:8} {o.lost_s(usual):7.1f}  {o.seen}" for o in outcomes]
    tried = [o for o in outcomes if o.survived is not None]
    lost = sum(fault.startswith("lost: ") for fault in wrong)
    lines += [f"wrong at the end: {fault[:150]}" for fault in wrong[:20]]
    return "\n".join([
        *lines, f"faults survived / tried: {sum(o.survived for o in tried)} / {len(tried)}, "
        f"{len(outcomes) - len(tried)} skipped; experiments lost: {lost}; other faults at the end: {len(wrong) - lost}",
        f"rows: {len(storm.rows())} of {storm.sessions} sessions, {usual:.2f} s each when nothing happens",
        f"seconds: {seconds:.0f}, of which the faults cost {sum(o.lost_s(usual) for o in tried):.0f}"])


def small_cgroup() -> Path | None:
    """A control group of 64 MB of memory; None where one cannot be had."""
    for parent, limits in ((Path("/sys/fs/cgroup/memory"), {"memory.limit_in_bytes": 2**26}),
                           (Path("/sys/fs/cgroup"), {"memory.max": 2**26, "memory.swap.max": 0})):
        folder = parent / f"storm-{os.getpid()}"
        try:
            folder.mkdir()
            for name, value in limits.items():
                (folder / name).write_text(str(value))
            return folder
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir()
    return None


def alone() -> bool:
    """Whether mounts are this process's own; starts it over where that can be had."""
    if "STORM_ALONE" in os.environ:
        return True
    for flags in ("-m", "-rm"):
        if shutil.which("unshare") and not subprocess.run(["unshare", flags, "true"], capture_output=True).returncode:
            os.environ["STORM_ALONE"] = "1"
            os.execvp("unshare", ["unshare", flags, sys.executable, *sys.argv])
    return False


def keep(storm: Storm, began: float) -> str:
    """Copy the checkout and the screen to a folder that stays."""
    kept = tempfile.mkdtemp(prefix="storm-kept-")
    shutil.copytree(storm.checkout.root, Path(kept, "checkout"))
    Path(kept, "screen").write_text("".join(f"{line.at - began:7.2f} {line.text}\n" for line in storm.lines))
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="chooses the order of the faults")
    parser.add_argument("--only", default="", help="faults whose name matches this pattern")
    parser.add_argument("--keep", action="store_true", help="keep a copy of the checkout, as after a failure")
    args, own_mounts, missing = parser.parse_args(), alone(), {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))   # through `finally`
    os.environ.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_SYSTEM=os.devnull)
    with contextlib.ExitStack() as afterwards:
        folder, began = Path(tempfile.mkdtemp(prefix="storm-")), time.monotonic()
        afterwards.callback(shutil.rmtree, folder, ignore_errors=True)
        disk = folder / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "storm", str(disk)]
        if own_mounts and not subprocess.run(mount, capture_output=True).returncode:
            afterwards.callback(subprocess.run, ["umount", "-l", str(disk)])
        else:
            missing["tmpfs"] = "no right to mount a tmpfs here"
        if cgroup := small_cgroup():
            afterwards.callback(cgroup.rmdir)
        else:
            missing["cgroup"] = "no right to make a control group here"
        storm = checkout_in(folder, disk, "tmpfs" not in missing, cgroup)
        afterwards.callback(lambda: storm.process and (storm.process.kill(), storm.process.wait()))
        outcomes = weather(storm, [fault for fault in shuffled(args.seed) if re.search(args.only, fault.name)], missing)
        wrong = audit(storm)
        print(report(storm, outcomes, wrong, time.monotonic() - began))
        failed = bool(wrong) or any(outcome.survived is False for outcome in outcomes)
        if failed or args.keep:
            print(f"kept: {keep(storm, began)}")
        return int(failed)


if __name__ == "__main__":
    sys.exit(main())
