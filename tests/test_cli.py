"""agent.py as a person uses it: a terminal, a pipe, Ctrl-C, a wrong command line: pytest tests/test_cli.py"""

import os
import pty
import re
import select
import signal
import subprocess
import time

import pytest
from conftest import DRAW, reply
from test_loop import slow

import agent


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def logs(checkout):
    return list((checkout.root / "runs").glob("*/*/run.log"))


def test_help_names_every_flag(checkout):
    shown = checkout.run("--help")
    assert shown.returncode == 0
    tasks = "--status", "--report", "--ask"
    for flag in ("--hours", "--experiments", "--tag", "--proposer", "--model", "--time-budget", *tasks):
        assert flag in shown.stdout


def test_a_pipe_gets_plain_lines(checkout):
    done = checkout.run("--proposer", "search", "--experiments", "3")
    assert done.returncode == 0 and "\x1b" not in done.stdout and done.stderr == ""
    assert re.search(r"^0001  keep      1\.056169 +baseline$", done.stdout, re.M)
    assert re.search(r"^val_bpb 1\.056169 -> 1\.\d{6} \(", done.stdout, re.M)
    assert (checkout.root / "runs").is_dir() and checkout.git("status", "--porcelain") == "M results.tsv"


def test_a_terminal_gets_live_lines(checkout):
    """Through a pseudo-terminal: phases are shown, each finished experiment stays as a line."""
    ours, theirs = pty.openpty()
    command = checkout.command("--proposer", "search", "--experiments", "3", "--hours", "1", "--time-budget", "1.5")
    process = subprocess.Popen(
        command, cwd=checkout.root, env=checkout.env(TERM="xterm"), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    while select.select([ours], [], [], 20)[0]:
        try:
            shown += os.read(ours, 65536)
        except OSError:
            break
    assert process.wait(10) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"0002  training +\d+%  loss \d\S+  [\d,]+ tok/s  [A-Z]+ \S+ -> ", text)
    assert re.search(r"0:59:\d\d left; best 1\.\d+ \(0001\), \+0\.000000 since the baseline; 0 kept, ", text)
    assert text.count("0001  keep") == 1


def test_no_model_is_explained(checkout):
    done = checkout.run()
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "--proposer search"))
    assert checkout.git("status", "--porcelain") == "" and not (checkout.root / "runs").exists()


@pytest.mark.parametrize(
    "args",
    [["--hours", "0"], ["--hours", "x"], ["--experiments", "0"], ["--time-budget", "-1"], ["--proposer", "magic"]],
)
def test_a_wrong_command_line_is_exit_2(checkout, args):
    done = checkout.run("--proposer", "search", *args)
    assert done.returncode == 2 and args[0] in done.stderr and "Traceback" not in done.stderr


def test_a_refused_key_or_model_ends_at_once_and_changes_nothing(checkout, server):
    server.script.append((401, {"error": {"message": "no such key or model"}}))
    began = time.monotonic()
    done = checkout.run(OPENAI_BASE_URL=server.url, OPENAI_API_KEY="sk-x", OPENAI_MODEL="m")
    assert done.returncode == 2 and "no such key or model" in done.stderr and len(done.stderr.splitlines()) == 1
    assert time.monotonic() - began < 10 and checkout.git("branch", "--format=%(refname:short)") == "main"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x"])
def test_a_url_without_http_is_explained(checkout, url):
    done = checkout.run("--model", "m", OPENAI_BASE_URL=url)
    assert done.returncode == 2 and "http://localhost:8000/v1" in done.stderr


@pytest.mark.slow
def test_a_page_instead_of_an_endpoint_is_exit_2(checkout, server):
    server.models = None
    done = checkout.run(OPENAI_BASE_URL=server.url.removesuffix("/v1"))
    assert done.returncode == 2 and "Traceback" not in done.stderr and "--proposer search" in done.stderr


@pytest.mark.slow
def test_the_only_model_of_an_endpoint_is_taken(checkout, server):
    server.script += [reply("SET RATE = 2.0")]
    assert checkout.run("--experiments", "2", OPENAI_BASE_URL=server.url).returncode == 0
    assert server.requests[0]["model"] == "tiny" and checkout.record()[1].model == "tiny"


def test_several_models_are_named(checkout, server):
    server.models = ["b", "a"]
    done = checkout.run(OPENAI_BASE_URL=server.url)
    assert done.returncode == 2 and "--model" in done.stderr and "a, b" in done.stderr


@pytest.mark.parametrize(
    "number, when", [(signal.SIGINT, "training"), slow(signal.SIGTERM, "training"), slow(signal.SIGINT, "asking")]
)
def test_ctrl_c_ends_cleanly(checkout, server, number, when):
    """Exit 130 within ten seconds, the children gone, every row whole."""
    server.script += [
        reply("SET RATE = 2.0"),
        lambda body: time.sleep(30) if when == "asking" else reply("SET RATE = 2.5"),
    ]
    process = subprocess.Popen(
        checkout.command("--time-budget", "0.3"),
        cwd=checkout.root,
        stdout=subprocess.PIPE,
        text=True,
        env=checkout.env(OPENAI_BASE_URL=server.url),
    )
    wait_for(lambda: len(server.requests) == 2)
    time.sleep(0.2)
    began = time.monotonic()
    process.send_signal(number)
    out, _ = process.communicate(timeout=15)
    assert process.returncode == 130 and time.monotonic() - began < 10
    assert "an experiment that was under way leaves no row" in out
    assert not children_in(checkout.root / "runs")
    rows, record = checkout.rows(), checkout.record()
    assert [r["id"] for r in rows] == [r.id for r in record] and checkout.git(
        "status", "--porcelain"
    ) == "M results.tsv"
    assert checkout.run("--proposer", "search", "--experiments", "1", "--time-budget", "0.3").returncode == 0
    assert checkout.record()[len(record)].id == f"{len(record) + 1:04d}"


def children_in(folder):
    """Processes whose working directory is below a folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            found += [pid] if os.readlink(f"/proc/{pid}/cwd").startswith(str(folder)) else []
        except OSError:
            pass
    return found


def test_ctrl_c_while_training_leaves_no_row(checkout):
    process = subprocess.Popen(
        checkout.command("--proposer", "search", "--time-budget", "20"),
        cwd=checkout.root,
        stdout=subprocess.PIPE,
        text=True,
        env=checkout.env(),
    )
    wait_for(lambda: logs(checkout) and b"step 3" in logs(checkout)[0].read_bytes())
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 130 and "leaves no row" in out and not children_in(checkout.root / "runs")
    assert checkout.record() == [] and checkout.rows() == []


def test_status_works_any_time(checkout):
    assert "no experiments yet" in checkout.run("--status").stdout
    process = subprocess.Popen(
        checkout.command("--proposer", "search", "--time-budget", "0.5"),
        cwd=checkout.root,
        stdout=subprocess.DEVNULL,
        env=checkout.env(),
    )
    try:
        wait_for(lambda: len(checkout.record()) >= 2)
        shown = checkout.run("--status")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(10)
    assert shown.returncode == 0 and "best" in shown.stdout and re.search(r"^0001  keep", shown.stdout, re.M)
    assert "best" in checkout.run("--status", "--tag", checkout.record()[0].tag).stdout
    checkout.git("checkout", "-q", "main")
    assert "0001  keep" in checkout.run("--status").stdout


@pytest.mark.slow
def test_ask_prints_request_and_reply_and_changes_nothing(checkout, server):
    server.script += [reply("SET RATE = 2.0", description="faster"), reply("SET NO = 1")]
    shown = checkout.run("--ask", OPENAI_BASE_URL=server.url)
    assert shown.returncode == 0 and "Lower the number." in shown.stdout and "def build_model" in shown.stdout
    assert "The reply applies: faster" in shown.stdout and "100 tokens" in shown.stdout
    assert "The reply does not apply" in checkout.run("--ask", OPENAI_BASE_URL=server.url).stdout
    assert (
        checkout.git("status", "--porcelain") == "" and not checkout.record() and not (checkout.root / "runs").exists()
    )


@pytest.mark.slow
def test_a_closed_pipe_does_not_end_the_session(checkout):
    process = subprocess.Popen(
        checkout.command("--proposer", "search", "--experiments", "4"),
        cwd=checkout.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=checkout.env(),
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) in (0, 120)  # 120: Python's word for a closed pipe at its exit
    assert len(checkout.record()) == 4


def test_importing_does_nothing():
    code = "import sys, agent; print([m for m in ('torch', 'openai', 'git', 'rich', 'matplotlib') if m in sys.modules])"
    done = subprocess.run(
        [os.sys.executable, "-c", code], capture_output=True, text=True, cwd=os.path.dirname(agent.__file__)
    )
    assert done.stdout == "[]\n"


def test_the_picture_is_drawn(checkout, monkeypatch):
    monkeypatch.setattr(agent, "draw", DRAW)
    checkout.session(experiments=6)
    data = (checkout.root / "runs" / checkout.record()[0].tag / "progress.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000
