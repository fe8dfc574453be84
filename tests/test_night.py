"""What may happen in a night: the machine, the power, the user, the deadline. pytest tests/test_night.py"""

import dataclasses
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import reply
from test_loop import error_of, llm, rewrite, scored, slow

import agent

DEAD = ["no repair"] * 4  # a conversation that mends nothing
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


def rate(value):
    return reply(f"SET RATE = {value}")


def as_user(checkout, *args):
    return checkout.git("-c", "user.name=u", "-c", "user.email=u@u", *args)


# The machine


def fill(path, size):
    """Take room from the disk; gives it back after a second."""
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    threading.Timer(1.0, path.unlink).start()


@linux
def test_a_full_disk_is_waited_for(checkout, server, monkeypatch, capsys):
    monkeypatch.setattr(agent, "WAIT_S", 0.2)
    reserve = shutil.disk_usage(checkout.root).free - 3 * 2**29  # a run needs one GB more

    def filling(body):
        fill(checkout.root.parent / "filler", 2**30)
        return rate(2.0)

    assert llm(checkout, server, rate(1.5), filling, rate(2.5), reserve=reserve) == 0
    out = capsys.readouterr().out
    assert "waiting: " in out and "GB of the disk are free" in out and "going on" in out
    assert [r.id for r in checkout.record()] == ["0001", "0002", "0003", "0004"]


DRIVER = """
import dataclasses, os, sys, threading, time
from pathlib import Path
sys.path.insert(0, {root!r})
import agent
agent.WAIT_S = 0.3
agent.DRAW_S = 1e9
agent.draw = lambda *_: None
root, filler = Path({root!r}), Path({root!r}) / "filler"

def meddle():
    for id, name in (("0002", "work"), ("0003", "score.json")):   # one in the run, one in the record
        while not list(root.glob(f"runs/*/{{id}}/{{name}}")):
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
config = agent.Config(root=root, cache=Path({cache!r}), proposer="search", budget_s=0.1, sandbox="off", experiments=5,
                      reserve=2**20)
sys.exit(agent.session(config))
"""


@pytest.mark.slow
@linux
def test_no_space_left_loses_no_experiment(checkout, tmp_path):
    """The checkout on a tmpfs of 16 MB that fills up in a run, and in a record."""
    small, driver = tmp_path / "small", tmp_path / "driver.py"
    small.mkdir()
    driver.write_text(DRIVER.format(root=str(small), cache=str(checkout.cache)))
    after = f"cp -a {small}/. {tmp_path}/after"
    script = (f"mount -t tmpfs -o size=16m tmpfs {small} && cp -a {checkout.root}/. {small} && "
              f"{sys.executable} {driver}; code=$?; mkdir {tmp_path}/after; {after}; exit $code")
    rights = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    if subprocess.run([*rights, "mount", "-t", "tmpfs", "x", str(small)], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    done = subprocess.run([*rights, "sh", "-c", script], env=checkout.env(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    checkout.root = tmp_path / "after"
    record = checkout.record()
    assert [r.id for r in record] == [row["id"] for row in checkout.rows()] == [f"{i:04d}" for i in range(1, 6)]
    assert {r.status for r in record} <= {"keep", "discard"}
    best = [r for r in record if r.status == "keep"][-1]
    tip = record[0].parent if best.proposer == "baseline" else best.commit
    assert checkout.git("rev-parse", "HEAD") == tip and checkout.git("status", "--porcelain") == "M results.tsv"
    assert "the disk" in done.stdout and "waiting" in done.stdout, done.stdout


@pytest.fixture
def gpu(checkout, tmp_path, monkeypatch):
    """A stand-in for nvidia-smi that prints a file: (used, total) in MB."""
    state, tool = tmp_path / "gpu", tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\ncase $1 in *name*) echo Stand-in;; *) cat {state};; esac\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("TOY_PRESET", "consumer")
    monkeypatch.setattr(agent, "WAIT_S", 0.2)
    state.write_text("300, 24000\n")
    return state


@pytest.mark.slow
def test_a_gpu_in_use_is_waited_for(checkout, server, gpu, capsys):
    def busy(body):
        gpu.write_text("9000, 24000\n")
        threading.Timer(1.0, gpu.write_text, ["300, 24000\n"]).start()
        return rate(2.0)

    llm(checkout, server, rate(1.5), busy)
    assert "waiting: another program uses 8.8 of the GPU's 23 GB" in capsys.readouterr().out
    assert len(checkout.record()) == 3 and checkout.record()[2].device == "Stand-in"


def test_a_gpu_in_use_after_a_run_voids_it(checkout, server, gpu, capsys):
    done = []

    def quiet():   # the stand-in is free again once the run is void
        while not done:
            if "9000" in gpu.read_text():
                time.sleep(1.2)
                gpu.write_text("300, 24000\n")
                done.append(True)
            time.sleep(0.05)

    threading.Thread(target=quiet, daemon=True).start()
    once = f"    step = 0; import os; p = {str(gpu) + '.once'!r}\n    if not os.path.exists(p):\n"
    once += f"        open(p, 'w').close(); open({str(gpu)!r}, 'w').write('9000, 24000')"
    llm(checkout, server, rewrite("    step = 0", once), rules=False)
    out = capsys.readouterr().out
    assert "0002 does not count (another program uses 8.8" in out and len(checkout.record()) == 2


@pytest.mark.parametrize("tool", ["sleep 60", slow("exit 9"), slow("echo '[N/A], [N/A]'"), slow("printf '\\377'")])
def test_a_driver_that_does_not_tell_holds_nothing_up(checkout, gpu, monkeypatch, tool):
    (gpu.parent / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\n{tool}\n")
    monkeypatch.setattr(agent, "SMI_S", 0.2)
    assert checkout.session(experiments=1) == 0


def crashing_when(checkout, flag):
    """Make the committed train.py crash while a file is there."""
    path = checkout.root / "train.py"
    text = path.read_text().replace("import prepare\n", "import os\n\nimport prepare\n", 1)
    fall = f"    if os.path.exists({str(flag)!r}):\n        raise RuntimeError('CUDA error: device lost')\n    step = 0"
    path.write_text(text.replace("    step = 0", fall))
    as_user(checkout, "commit", "-qam", "mine")


@pytest.mark.slow
def test_after_three_crashes_the_best_tells_the_machine_from_the_ideas(checkout, server, tmp_path, capsys):
    bad = [part for i in range(3) for part in (rewrite("    step = 0", f"    raise ValueError({i})"), *DEAD)]
    llm(checkout, server, scored(1.05), *bad, scored(1.04), experiments=6)
    record = checkout.record()
    assert [r.status for r in record] == ["keep", "keep", "crash", "crash", "crash", "verify", "keep"]
    repeat = record[5]
    assert (repeat.parent, repeat.val_bpb, repeat.id) == (record[1].commit, 1.05, "0006")
    assert len({checkout.git("rev-parse", f"{commit}^{{tree}}") for commit in (repeat.commit, repeat.parent)}) == 1
    assert "it was the ideas" in capsys.readouterr().out and checkout.rows()[5]["status"] == "verify"


def test_a_lost_gpu_ends_the_session_with_one_line_and_the_same_command_goes_on(checkout, server, tmp_path):
    flag = tmp_path / "lost"
    crashing_when(checkout, flag)

    def lost(body):
        flag.touch()
        return rate(1.5)

    with pytest.raises(agent.UserError, match=r"crashed in a row, and now the best fails too \(RuntimeError: CUDA error"):
        llm(checkout, server, rate(1.4), lost, *DEAD, rate(1.6), *DEAD, rate(1.7), *DEAD, experiments=9, rules=False)
    assert [r.status for r in checkout.record()] == ["keep", "keep", "crash", "crash", "crash", "verify"]
    flag.unlink()
    server.script.clear()
    llm(checkout, server, rate(2.0), experiments=1, rules=False)
    assert checkout.record()[-1].status == "keep"


@pytest.mark.parametrize("seen, asleep_s, why", [
    (agent.Watched(1.0, "", 11.0), 0.0, "stood still for 11 s"),
    (agent.Watched(1.0, "", 0.2), 30.0, "the machine slept"),
    (agent.Watched(1.0, "timeout after 9 s", 0.2), 0.0, ""),
])
def test_what_is_the_machines_fault(checkout, seen, asleep_s, why):
    s, _ = agent.opened(checkout.config(), agent.Screen())
    s.runs.mkdir(parents=True)
    found = agent.machine_fault(s, seen, asleep_s, seen.killed)
    assert why in found if why else not found


@pytest.mark.slow
def test_an_agent_that_stood_still_runs_the_experiment_again(checkout):
    """Ctrl-Z, or a paused virtual machine, while an experiment trains."""
    process = subprocess.Popen(checkout.command("--proposer", "search", "--experiments", "2", "--time-budget", "2",
                                                "--sandbox", "off"), cwd=checkout.root, env=checkout.env(),
                               stdout=subprocess.PIPE, text=True)
    while not any("step" in path.read_text() for path in checkout.root.glob("runs/*/0002/run.log")):
        time.sleep(0.05)
    process.send_signal(signal.SIGSTOP)
    time.sleep(agent.PAUSED_S + 2)
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=60)
    assert "0002 does not count (agent.py stood still for" in out and len(checkout.record()) == 2


def test_a_clock_set_back_changes_no_order(checkout):
    checkout.session(experiments=3)
    record = checkout.record()
    back = [dataclasses.replace(r, time=f"2026-01-0{9 - i}T00:00:00Z") for i, r in enumerate(record)]
    assert [r.id for r in agent.in_order(back)] == ["0001", "0002", "0003"]
    lines = agent.mended_results(None, back).splitlines()[1:]
    assert [line.split("\t")[5] for line in lines] == ["0001", "0002", "0003"]


# The power


def test_a_branch_that_was_made_but_not_checked_out_is_taken_up(checkout):
    checkout.git("branch", "autoresearch/x")
    assert checkout.session(experiments=1, tag="x") == 0
    assert checkout.git("symbolic-ref", "--short", "HEAD") == "autoresearch/x" and len(checkout.record()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("lock", ["index.lock", "refs/heads/autoresearch/x.lock", "refs/autoresearch/x/0003.lock"])
def test_locks_that_a_dead_session_left_are_removed(checkout, monkeypatch, lock, capsys):
    monkeypatch.setattr(agent, "LOCK_S", 0.5)
    checkout.session(experiments=2, tag="x")
    (checkout.root / ".git" / "autoresearch.writing").touch()
    (checkout.root / ".git" / lock).touch()
    checkout.session(experiments=2, tag="x")
    assert f"removed {Path(lock).name}, which the last session left" in capsys.readouterr().out
    assert len(checkout.record()) == 4 and not list((checkout.root / ".git").rglob("*.lock.lock"))


def test_a_lock_of_somebody_else_is_named_and_stays(checkout, monkeypatch):
    monkeypatch.setattr(agent, "LOCK_S", 0.3)
    checkout.session(experiments=1, tag="x")
    lock = checkout.root / ".git" / "index.lock"
    lock.touch()
    assert f"rm {lock}" in error_of(checkout, tag="x") and lock.exists()


def test_an_empty_object_is_removed_and_written_anew(checkout, server, capsys):
    """As a power cut leaves it: git itself would take it for the object and never write it."""
    text = checkout.text().replace("BPB = None", "BPB = 1.05")
    (checkout.root.parent / "text").write_text(text)
    name = checkout.git("hash-object", "../text")
    path = checkout.root / ".git" / "objects" / name[:2] / name[2:]
    path.parent.mkdir(exist_ok=True)
    path.touch()
    llm(checkout, server, reply("SET BPB = 1.05"))
    assert "an empty object" in capsys.readouterr().out and checkout.record()[1].status == "keep"
    assert checkout.git("show", "HEAD:train.py") + "\n" == text


@pytest.mark.parametrize("last, says", [(1.2, "the commit of refs/autoresearch/x/0002 is damaged"),
                                        slow(1.0, "git fsck")])
def test_an_experiment_whose_commit_is_damaged_is_named(checkout, server, last, says):
    llm(checkout, server, scored(last), tag="x")
    lost = checkout.record()[1]
    path = checkout.root / ".git" / "objects" / lost.commit[:2] / lost.commit[2:]
    path.chmod(0o644)
    path.write_bytes(b"")
    assert says in error_of(checkout, tag="x")
    if last > 1.1:
        checkout.git("update-ref", "-d", "refs/autoresearch/x/0002")   # as the line says
        assert checkout.session(experiments=1, tag="x") == 0


def test_an_edited_row_is_said_and_left(checkout, capsys):
    checkout.session(experiments=2)
    path = checkout.root / "results.tsv"
    path.write_text(path.read_text().replace("\tbaseline\t0001", "\tmy own words\t0001"))
    checkout.session(experiments=1)
    tag = checkout.record()[0].tag
    assert f"something else than git of {tag}/0001" in capsys.readouterr().out and "my own words" in path.read_text()


@pytest.mark.slow
def test_a_best_folder_that_lags_is_made_anew(checkout, server):
    llm(checkout, server, scored(1.05), tag="x")
    runs = checkout.root / "runs" / "x"
    shutil.copytree(runs / "best", runs / "0002", dirs_exist_ok=True)   # as before it became the best
    (runs / "best" / "train.py").write_text("old")
    (runs / "best.new").mkdir()
    llm(checkout, server, scored(1.2), experiments=1)
    assert "BPB = 1.05" in (runs / "best" / "train.py").read_text() and (runs / "best" / "checkpoint.pt").exists()
    assert sorted(path.name for path in runs.iterdir() if path.is_dir()) == ["0001", "0002", "0003", "best"]
    assert not (runs / "0002" / "checkpoint.pt").exists()


def test_a_lock_of_a_dead_session_does_not_matter(checkout):
    lock = checkout.root / ".git" / "autoresearch.lock"
    lock.write_text("99999999")
    assert checkout.session(experiments=1) == 0


@pytest.mark.parametrize("model", [slow("tiny"), ""], ids=["named", "not named"])
def test_a_restart_before_the_network_is_back_goes_on_with_the_search(checkout, server, model):
    llm(checkout, server, scored(1.05), model=model)
    server.http.server_close()
    gone = "http://127.0.0.1:9/v1"
    assert checkout.session(proposer="llm", base_url=gone, model=model, experiments=1, outage_s=0.5) == 0
    assert checkout.record()[2].proposer == "search"


# The user


def test_a_commit_of_the_user_in_mid_session_is_gone_on_from(checkout, server, capsys):
    def meddle(body):
        (checkout.root / "program.md").write_text("Only the rate.\n")
        as_user(checkout, "commit", "-qm", "a better brief", "program.md")
        return scored(1.04)

    llm(checkout, server, scored(1.05), meddle, scored(1.03), experiments=4)
    record = checkout.record()
    assert [(r.proposer, r.status) for r in record[2:]] == [("baseline", "keep"), ("llm", "keep")]
    assert "moved by hand" in capsys.readouterr().out and record[2].val_bpb == 1.05
    assert "a better brief" in checkout.git("log", "--format=%s").splitlines()
    assert checkout.git("rev-parse", "HEAD") == record[3].commit


@pytest.mark.slow
def test_a_branch_moved_while_a_keep_trained_stays_moved(checkout, server, capsys):
    def meddle():
        time.sleep(0.7)
        as_user(checkout, "commit", "-q", "--allow-empty", "-m", "mine")

    def answer(body):
        threading.Thread(target=meddle).start()
        return scored(1.04)

    if not agent.bubblewraps():
        pytest.skip("without a sandbox, the run is taken for the one who moved it")
    llm(checkout, server, scored(1.05), answer, scored(1.03), budget_s=1.5, experiments=5, sandbox="require")
    record = checkout.record()
    assert "moved by hand meanwhile, and stays so: experiment 0003 is a keep" in capsys.readouterr().out
    assert [r.proposer for r in record] == ["baseline", "llm", "llm", "baseline", "llm"]
    assert "mine" in checkout.git("log", "--format=%s").splitlines() and record[4].parent == record[3].commit


def test_a_branch_switched_in_mid_session_stops_it_and_stays(checkout, server):
    def meddle(body):
        as_user(checkout, "stash", "-q")
        as_user(checkout, "checkout", "-q", "main")
        return scored(1.04)

    with pytest.raises(agent.UserError, match="the checkout is on main now, not on autoresearch/"):
        llm(checkout, server, scored(1.05), meddle, scored(1.03), experiments=4)
    assert checkout.git("symbolic-ref", "--short", "HEAD") == "main" and "BPB = None" in checkout.text()


@pytest.mark.slow
def test_a_deleted_results_file_is_made_anew(checkout, server):
    def meddle(body):
        (checkout.root / "results.tsv").unlink()
        return scored(1.04)

    llm(checkout, server, scored(1.05), meddle)
    assert [row["id"] for row in checkout.rows()] == ["0001", "0002", "0003"]


@pytest.mark.slow
def test_a_line_that_the_user_left_open_is_ended_first(checkout, server):
    def meddle(body):
        with open(checkout.root / "results.tsv", "a") as file:
            file.write("# a note of mine")
        return scored(1.04)

    llm(checkout, server, scored(1.05), meddle)
    lines = checkout.text("results.tsv").splitlines()
    assert lines[3] == "# a note of mine" and lines[4].split("\t")[5] == "0003"


@pytest.mark.slow
def test_gc_in_mid_session_takes_nothing(checkout, server):
    def meddle(body):
        checkout.git("gc", "-q", "--prune=now")
        return scored(1.04)

    llm(checkout, server, scored(1.05), scored(1.2), meddle, scored(1.03))
    assert [r.status for r in checkout.record()] == ["keep", "keep", "discard", "keep", "keep"]
    assert checkout.git("fsck", "--full", "--no-dangling") == ""


@pytest.mark.slow
def test_what_nobody_expected_is_kept_and_gone_on_from(checkout, server, capsys):
    """The user deletes the folder of the runs while one is under way."""
    gone = []

    def meddle():
        time.sleep(0.5)
        shutil.rmtree(checkout.root / "runs")
        gone.append(True)

    def answer(body):
        threading.Thread(target=meddle).start()
        return scored(1.04)

    llm(checkout, server, scored(1.05), answer, scored(1.03), budget_s=1.0, experiments=3)
    assert gone and "unexpected, in runs/" in capsys.readouterr().out
    assert [r.val_bpb for r in checkout.record()][1:] == [1.05, 1.03]


# The deadline


@pytest.mark.slow
def test_a_run_that_passes_the_deadline_is_cut_off_without_a_row(checkout, server, monkeypatch, capsys):
    monkeypatch.setattr(agent, "OVERTIME_S", 0.5)
    monkeypatch.setattr(agent, "KILL_S", 60.0)
    began = time.monotonic()
    slow = rewrite("    step = 0", "    step = 0; import time; time.sleep(50)")
    assert llm(checkout, server, slow, experiments=None, hours=4 / 3600) == 0
    assert time.monotonic() - began < 8 and "did not end before the deadline; no row" in capsys.readouterr().out
    assert len(checkout.record()) == 1 and not list(checkout.root.glob("runs/*/*/work"))


def test_a_closed_terminal_does_not_end_the_session(checkout):
    parent, child = pty.openpty()
    process = subprocess.Popen(checkout.command("--proposer", "search", "--experiments", "3", "--sandbox", "off"),
                               cwd=checkout.root, env=checkout.env(TERM="xterm"), start_new_session=True,
                               stdin=child, stdout=child, stderr=child)
    os.close(child)
    while not list(checkout.root.glob("runs/*/0001")):
        time.sleep(0.05)
        os.read(parent, 4096)
    os.close(parent)
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 0 and len(checkout.record()) == 3
