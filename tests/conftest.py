"""What the tests of the loop share: a temporary checkout with a torch-free train.py, a scripted model behind HTTP."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import agent

USER = ("-c", "user.name=u", "-c", "user.email=u@u")
ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "tests" / "toy"


class Checkout:
    """A git repository with agent.py in it, and ways to use it as a user would."""

    pictures = True

    def __init__(self, root, cache):
        self.root, self.cache = root, cache

    def git(self, *args):
        return subprocess.run(["git", *args], cwd=self.root, check=True, capture_output=True, text=True).stdout.strip()

    def config(self, **more):
        usual = {"root": self.root, "cache": self.cache, "time_budget": 0.03, "proposer": "search", "pictures": False}
        usual |= {"outage_s": 1.0, "startup_s": 5.0, "sandbox": "off"}  # test_tricks.py runs with it
        return agent.Config(**usual | more)

    def session(self, **more):
        return agent.session(self.config(**more))

    def command(self, *args):
        """agent.py's command line; without `pictures` it draws none."""
        quick = f"import sys; sys.path.insert(0, {str(self.root)!r}); import agent; agent.draw = lambda *_: None"
        start = [str(self.root / "agent.py")] if self.pictures else ["-Bc", f"{quick}; sys.exit(agent.main())"]
        return [sys.executable, *start, "--time-budget", "0.03", *args]

    def env(self, **more):
        clean = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")}
        return {**clean, "AUTORESEARCH_CACHE": str(self.cache), "COLUMNS": "100", **more}

    def run(self, *args, **env):
        """agent.py as a process, its output in a pipe."""
        options = {"cwd": self.root, "env": self.env(**env), "capture_output": True, "text": True, "timeout": 120}
        return subprocess.run(self.command(*args), **options)

    def started(self, *args, **env):
        """agent.py as a process in a session of its own, its output in a pipe."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        command = self.command("--sandbox", "off", *args)
        return subprocess.Popen(command, cwd=self.root, env=self.env(**env), **pipes)

    def trailers(self, id, tag=None):
        """The trailers of a row's commit as a dict."""
        tag = tag or self.rows()[-1]["tag"]
        lines = self.git("log", "-1", "--format=%(trailers:unfold,only)", f"refs/autoresearch/{tag}/{id}").splitlines()
        return dict(line.split(": ", 1) for line in lines if ": " in line)

    def refs(self):
        """Every row's ref, and the commit that it names."""
        lines = self.git("for-each-ref", "--format=%(refname) %(objectname)", "refs/autoresearch/").splitlines()
        return dict(line.split(" ") for line in lines)

    def commit(self, text, message="mine"):
        """Commit another train.py, as the user would."""
        (self.root / "train.py").write_text(text)
        self.git(*USER, "commit", "-qm", message, "train.py")

    def rows(self):
        """results.tsv as a list of dicts."""
        header, *lines = (self.root / "results.tsv").read_text().splitlines()
        return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]

    def left_over(self):
        """Processes of this checkout that are alive, but this one, by command line, environment or folder."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                told = [*process.cmdline(), *process.environ().values(), process.cwd()]
                if process.pid != os.getpid() and any(str(self.root) in part for part in told):
                    found.append(process)
        return found

    def text(self, name="train.py"):
        return (self.root / name).read_text()


def pytest_configure():
    """Two tests run at once: runs take one core each; and a picture, which takes a second, is drawn where it is tested."""
    os.environ["OMP_NUM_THREADS"], Checkout.pictures = "1", False


def make_checkout(folder, cache, source=TOY):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train.py", "prepare.py"):
        shutil.copy(source / name, folder)
    for name in ("agent.py", "results.tsv", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    (folder / "program.md").write_text("Lower the number.\n")
    return Checkout(folder, cache)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkout's files, not yet under git."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL", "GIT_AUTHOR_EMAIL", "GIT_AUTHOR_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    monkeypatch.setattr(agent, "POLL_S", 0.02)
    return make_checkout(tmp_path / "checkout", tmp_path / "cache")


@pytest.fixture
def patient(monkeypatch):
    """Real training may be late: a slow machine takes seconds for a step."""
    monkeypatch.setattr(agent, "LATE_S", 60.0)
    monkeypatch.setattr(agent, "KILL_S", 120.0)


def commit_all(checkout):
    checkout.git("init", "-q", "-b", "main")
    checkout.git("add", "-A")
    checkout.git(*USER, "commit", "-qm", "start")


@pytest.fixture
def checkout(folder):
    """A checkout with one commit on main and no git identity."""
    commit_all(folder)
    return folder


class Server:
    """A chat completions server that answers from a script: replies, or (status, body, headers), or functions of the
    request; models: what it lists, or such an answer, or a function from a path to it."""

    def __init__(self):
        self.script, self.requests, self.models = [], [], ["tiny"]
        self.heard, self.pause_s = [], 0.0  # of each request, when, and its headers; between the parts of a stream
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if callable(outer.models):
                    return self.answer(*outer.models(self.path))
                if not isinstance(outer.models, list):
                    return self.answer(*(outer.models or (200, "<html>welcome</html>")))
                self.answer(200, {"object": "list", "data": [{"id": m, "object": "model"} for m in outer.models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.heard.append((time.monotonic(), {k.lower(): v for k, v in self.headers.items()}))
                outer.requests.append(body)
                step = outer.script.pop(0) if outer.script else (500, {"error": {"message": "the script is over"}})
                step = step(body) if callable(step) else step
                self.answer(*(step if isinstance(step, tuple) else (200, completion(step))))

            def answer(self, status, body, headers=None):
                parts = body if isinstance(body, list) else [body if isinstance(body, str) else json.dumps(body)]
                usual = {"Content-Type": "application/json" if parts is not body else "text/event-stream"}
                self.send_response(status)
                for name, value in {**usual, **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()  # HTTP 1.0: what ends the connection ends the answer
                for part in parts:
                    self.wfile.write(part.encode())
                    time.sleep(outer.pause_s * (part is not parts[-1]))

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # a client that hung up
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def asked(self, i):
        """The text of the last message of the i-th request."""
        return self.requests[i]["messages"][-1]["content"]


def completion(text, tokens=100):
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "tiny",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"completion_tokens": 10, "total_tokens": tokens},
    }


def streamed(text, finish="stop", usage=None, end="[DONE]"):
    """A reply as it comes from a server that streams: its role, a sign of life, three parts of the text, its end."""
    n = len(text) // 3 + 1
    deltas = [{"role": "assistant", "content": ""}, *({"content": text[i : i + n]} for i in range(0, len(text), n))]
    events = [json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}) for delta in deltas]
    events += [json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})] if finish else []
    events += [json.dumps({"choices": [], "usage": usage})] if usage else []
    return 200, [": alive\n\n", *(f"data: {event}\n\n" for event in (*events, *filter(None, [end])))]


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def reply(edits, description="an idea", hypothesis="It should help."):
    return f"HYPOTHESIS: {hypothesis}\nEXPECTED: -0.002\nDESCRIPTION: {description}\n{edits}\n"


def rewrite(old, new, more="", **fields):
    return reply(f"<<<<<<< SEARCH\n{old}\n=======\n{new}\n>>>>>>> REPLACE\n{more}", **fields)


def scored(value, more="", note=""):
    """A reply whose program gets this score, or one by seed. NOTE tells it from another within a hair's breadth."""
    return reply(f"SET BPB = {value}\nSET NOTE = {note or str(value)!r}{more}", description=f"score {value}")


def llm(checkout, server, *script, **more):
    """A session whose model answers from a script: a row for each step, if nothing else is said."""
    server.script += script
    return checkout.session(**{"proposer": "llm", "base_url": server.url, "experiments": 1 + len(script), **more})


def wait_for(found, what, limit_s=60.0):
    limit = time.monotonic() + limit_s
    while not found():
        assert time.monotonic() < limit, what
        time.sleep(0.05)


@pytest.fixture
def table(request):
    """Rows (trick, property, verdict, caught where, where with the guard off) that the end of the output shows."""
    return SimpleNamespace(append=lambda row: request.node.user_properties.append(("trick", row)))


def pytest_terminal_summary(terminalreporter):
    reports = [one for reports in terminalreporter.stats.values() for one in reports]
    told = [one.user_properties for one in reports if getattr(one, "when", "") == "call"]
    rows = [row for properties in told for name, row in properties if name == "trick"]
    if rows:
        terminalreporter.section("tricks")
        for row in [("trick", "property", "caught by", "with the guard off", "verdict"), *rows]:
            terminalreporter.write_line("{:28}{:10}{:12}{:20}{}".format(*row))
        rows = [row for row in rows if row[1]]  # without figures
        honest = [row for row in rows if row[1] == "honest"]
        passed = sum(row[3] == "-" for row in honest)
        line = f"{len(rows) - len(honest)} tricks tried and stopped, {passed} of {len(honest)} honest twins passed"
        terminalreporter.write_line(line)
