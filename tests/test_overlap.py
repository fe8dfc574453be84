"""The next proposal is asked for while an experiment trains: pytest tests/test_overlap.py"""

import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import TOY, completion, reply
from test_loop import llm, rewrite, scored, slow

import agent

HELD_S = 10  # that a reply is held back at most, so that a test that waits in vain fails and does not hang


def ahead(checkout, server, *script, **more):
    """A session that asks ahead, its model answering from a script."""
    return llm(checkout, server, *script, **{"prefetch": True, **more})


def sets(*lines, **fields):
    return reply("\n".join(f"SET {line}" for line in lines), **fields)


def whole(text):
    return reply(f"```python\n{text}```")


def costing(tokens, text):
    """A reply for which the server counts so many tokens."""
    return 200, completion(text, tokens)


def waiting(flag, **fields):
    """An experiment, a tie, that goes on when a file is there, or after four seconds."""
    lines = [
        "    import os, time",
        "    until = time.monotonic() + 4",
        f"    while not os.path.exists({str(flag)!r}) and time.monotonic() < until:",
        "        time.sleep(0.01)",
        "    step = 0",
    ]
    return rewrite("    step = 0", "\n".join(lines), **fields)


def wait_for(condition):
    limit = time.monotonic() + HELD_S
    while not condition() and time.monotonic() < limit:
        time.sleep(0.01)
    return condition()


def where_main_is():
    """The functions that the session is in just now, the innermost first."""
    frame, names = sys._current_frames()[threading.main_thread().ident], []
    while frame:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names


def ids(checkout):
    return [row["id"] for row in checkout.rows()]


def exchange(checkout, id):
    """What an experiment's llm.md holds; empty where there is none."""
    path = checkout.root / "runs" / checkout.record()[0].tag / id / "llm.md"
    return path.read_text() if path.exists() else ""


def text_of(checkout, result):
    return agent.file_at(checkout.config(), result.commit, "train.py")


def spent(checkout):
    """The tokens of each proposed row."""
    return [r.llm_tokens for r in checkout.record()[1:]]


def commit_of_user(checkout):
    """The user adds a line of their own to train.py and commits it on the branch."""
    path = checkout.root / "train.py"
    path.write_text(path.read_text().replace('NOTE = "plain"', 'NOTE = "mine"'))
    checkout.git("-c", "user.name=u", "-c", "user.email=u@u", "commit", "-qm", "mine", "train.py")


# When it is asked, and what


def test_the_next_request_comes_while_a_run_trains(checkout, server, tmp_path):
    """The run goes on only when the request has come."""
    flag, seen = tmp_path / "asked", []

    def second(body):
        seen.extend(ids(checkout))
        flag.touch()
        return sets("RATE = 0.5")

    assert ahead(checkout, server, waiting(flag), second, rules=False) == 0
    assert seen == ["0001"] and ids(checkout) == ["0001", "0002", "0003"] and len(server.requests) == 2


def test_the_request_names_the_running_experiment_and_a_repeat_of_it_goes_back(checkout, server):
    ahead(checkout, server, *[sets("RATE = 0.5", description="slower")] * 2, sets("RATE = 0.6"), experiments=3)
    text = server.asked(1)
    assert re.search(r"/0002  running +- +slower \(no result yet\)\n", text)
    assert "0002 running: slower\n" in text and "+RATE = 0.5 " in text
    assert "Experiment 0002 trains while you answer; its result is not known." in text
    assert "# The last run, 0001\n" in text and "Propose experiment 0003: edits" in text
    assert "\nRATE = 1.0 " in text and "Running now" not in server.asked(0)
    assert "This repeats experiment 0002 (running, no result yet): slower." in server.asked(2)
    assert len(server.requests[2]["messages"]) == 4 and spent(checkout) == [100, 200]
    assert "running" not in checkout.text("results.tsv")
    assert [r.status for r in checkout.record()] == ["keep", "discard", "discard"]


@pytest.mark.parametrize("budgets, asks", [(1.5, False), (30, True)])
def test_nothing_is_asked_where_no_time_is_left_for_its_run(checkout, server, budgets, asks):
    checkout.session(experiments=1)
    server.script.append(sets("RATE = 0.6"))
    config = checkout.config(proposer="llm", base_url=server.url, budget_s=10.0)
    s, _ = agent.opened(checkout.config(), agent.Screen())
    agent.read_branch(s)
    s.config, s.prefetch, s.llm.model, s.deadline = config, True, "tiny", time.monotonic() + budgets * config.budget_s
    agent.prefetch(s, agent.Proposal("slower"), s.text.replace("RATE = 1.0", "RATE = 0.5"))
    assert (s.asked is not None) == asks
    found = agent.arrived(s)
    assert (found.proposal.edits, found.id) == ((agent.Edit("set", "RATE", "0.6"),), "0003") if asks else found is None


def test_mix_still_takes_turns(checkout, server):
    server.script += [sets("RATE = 0.5"), sets("RATE = 0.6")]
    checkout.session(proposer="mix", base_url=server.url, prefetch=True, experiments=5)
    assert [r.proposer for r in checkout.record()] == ["baseline", "llm", "search", "llm", "search"]
    assert "/0003  running" in server.asked(1)
    assert len(server.requests) == 2   # not a third one while the last trains, nor for the search's turns


# What becomes of it


def test_after_a_discard_it_runs_as_it_is(checkout, server):
    """Also a whole file, and without another request; while the last one trains nothing is asked."""
    other = whole(checkout.text().replace("DECAY = 0.2", "DECAY = 0.1"))
    ahead(checkout, server, sets("RATE = 0.5"), sets("RATE = 0.6"), other)
    base, *rows = checkout.record()
    assert [r.status for r in rows] == ["discard"] * 3 and {r.parent for r in rows} == {base.commit}
    assert "DECAY = 0.1" in text_of(checkout, rows[2]) and "RATE = 1.0" in text_of(checkout, rows[2])
    assert len(server.requests) == 3 and spent(checkout) == [100] * 3


def test_after_a_keep_its_edits_are_applied_to_the_new_best(checkout, server):
    ahead(checkout, server, sets("RATE = 2.0"), sets("DECAY = 0.1"))
    assert "\nRATE = 1.0 " in server.asked(1) and len(server.requests) == 2
    keep, worse = checkout.record()[1:]
    assert (keep.status, worse.status, worse.parent) == ("keep", "discard", keep.commit)
    text = text_of(checkout, worse)
    assert "RATE = 2.0" in text and "DECAY = 0.1" in text
    assert text == (checkout.root / "runs" / worse.tag / "0003" / "train.py").read_text()


NOTE_LINE = next(line for line in (TOY / "train.py").read_text().splitlines() if line.startswith("NOTE"))
NEW_FILE = (TOY / "train.py").read_text().replace("DECAY = 0.2", "DECAY = 0.1")


@pytest.mark.parametrize(
    "before, keep, late, why",
    [
        ([], rewrite(NOTE_LINE, "NOTE = 'kept'") + "SET BPB = 1.05\n", rewrite(NOTE_LINE, "NOTE = 'late'"),
         "the SEARCH lines are not in train.py"),
        slow([sets("RATE = 1.1", "ROWS = 16")], sets("RATE = 1.1"), sets("ROWS = 16"),
             "repeats experiment 0002 (discard"),
        slow([], scored(1.05), whole(NEW_FILE), "a whole file, made from an earlier best"),
    ],
    ids=["a block", "a repeat", "a whole file"],
)
def test_what_does_not_fit_after_a_keep_is_asked_anew(checkout, server, capsys, before, keep, late, why):
    script = [*before, keep, late, sets("DEPTH = 5")]
    ahead(checkout, server, *script, experiments=len(script))
    *_, kept, last = checkout.record()
    said = re.findall(r"dropped before training, as it was asked for ahead: (.*)", capsys.readouterr().out)
    assert len(said) == 1 and why in said[0]
    assert "# Refused since then" in server.asked(-1) and why in server.asked(-1)
    assert kept.status == "keep" and last.parent == kept.commit and last.description == "an idea"
    assert text_of(checkout, last) == text_of(checkout, kept).replace('"cpu": dict(DEPTH=4', '"cpu": dict(DEPTH=5')
    assert len(server.requests) == len(script) and spent(checkout) == [100] * len(before) + [100, 200]


@pytest.mark.slow
def test_what_changes_nothing_after_a_keep_is_dropped_and_its_tokens_are_counted(checkout, server, capsys):
    """Those of the whole conversation, in the next row and in the total."""
    script = [sets("RATE = 2.0", "DECAY = 0.5"), costing(30, "nothing"), costing(7, sets("RATE = 2.0")),
              costing(1000, sets("DEPTH = 5"))]
    ahead(checkout, server, *script, experiments=3)
    out = capsys.readouterr().out
    assert "dropped before training" in out and "changes nothing" in server.asked(3)
    assert spent(checkout) == [100, 1037] and "1,137 tokens spent on tiny" in out


# A crash while it is asked


def broken(**fields):
    return rewrite("    step = 0", "    step = None + 1", **fields)


def two_at_once(mended, next_):
    """Steps for the two requests that are under way at once: the repair, and the next proposal, held until then."""
    repairing = threading.Event()

    def step(body):
        if "crashed" in body["messages"][-1]["content"]:
            repairing.set()
            return mended
        assert repairing.wait(HELD_S), "nobody asked for a repair"
        return next_

    return [step, step]


def test_a_repair_while_the_next_is_asked(checkout, server):
    mended = rewrite("    step = None + 1", "    step = 0 + 0", description="mended")
    steps = two_at_once(costing(30, mended), costing(7, sets("RATE = 0.5", description="the next")))
    ahead(checkout, server, broken(), *steps, experiments=3)
    _, second, third = checkout.record()
    assert [(r.status, r.description, r.llm_tokens) for r in (second, third)] == [
        ("discard", "mended", 130), ("discard", "the next", 7)]
    assert "step = 0 + 0" in text_of(checkout, second)
    assert "RATE = 0.5" in text_of(checkout, third) and "    step = 0\n" in text_of(checkout, third)
    first, later = exchange(checkout, "0002"), exchange(checkout, "0003")
    assert "TypeError" in first and "DESCRIPTION: mended" in first and "DESCRIPTION: the next" not in first
    assert "DESCRIPTION: the next" in later and "mended" not in later and later.count("<!-- user -->") == 1


@pytest.mark.slow
def test_what_a_repair_has_tried_meanwhile_is_dropped(checkout, server, capsys):
    mended = rewrite("    step = None + 1", "    step = 0") + "SET RATE = 0.5\n"
    ahead(checkout, server, broken(), *two_at_once(mended, sets("RATE = 0.5")), sets("RATE = 0.6"), experiments=3)
    assert "dropped before training" in capsys.readouterr().out
    assert "This repeats experiment 0002 (discard" in server.asked(3) and spent(checkout) == [200, 200]


# Other rows come before it


def test_a_confirmation_that_takes_its_id_moves_the_exchange(checkout, server):
    ahead(checkout, server, scored(0.5), sets("RATE = 0.5", description="the next"), sets("RATE = 0.6"))
    assert [(r.id, r.status, r.proposer) for r in checkout.record()] == [
        ("0001", "keep", "baseline"), ("0002", "keep", "llm"), ("0003", "verify", "llm"), ("0004", "verify", "baseline"),
        ("0005", "discard", "llm"), ("0006", "discard", "llm")]
    assert "Propose experiment 0003" in server.asked(1) and "Propose experiment 0006" in server.asked(2)
    assert not exchange(checkout, "0003") and "DESCRIPTION: the next" in exchange(checkout, "0005")
    assert [row["description"] for row in checkout.rows()][4] == "the next"
    assert spent(checkout) == [100, None, None, 100, 100]


def after_the_commit(checkout):
    """What must be true after a commit of the user while the next proposal was under way."""
    *_, base, last = checkout.record()
    assert [(r.id, r.proposer) for r in checkout.record()] == [
        ("0001", "baseline"), ("0002", "llm"), ("0003", "baseline"), ("0004", "llm")]
    assert 'NOTE = "mine"' in text_of(checkout, base) and last.parent == base.commit
    assert text_of(checkout, last) == text_of(checkout, base).replace("RATE = 1.0", "RATE = 0.5")
    assert not exchange(checkout, "0003") and "RATE = 0.5" in exchange(checkout, "0004")


def test_a_commit_of_the_user_while_it_is_waited_for(checkout, server, capsys):
    def second(body):
        assert wait_for(lambda: "arrived" in where_main_is())
        commit_of_user(checkout)
        return sets("RATE = 0.5")

    ahead(checkout, server, sets("RATE = 0.9"), second, experiments=4)
    assert "moved by hand" in capsys.readouterr().out and len(server.requests) == 2
    after_the_commit(checkout)


@pytest.mark.slow
def test_a_commit_of_the_user_while_a_run_trains(checkout, server):
    """With a sandbox, as without one the run would be taken for the one who moved the branch."""
    if not agent.bubblewraps():
        pytest.skip("no sandbox here")

    def second(body):
        found = []
        assert wait_for(lambda: found.extend(checkout.root.glob("runs/*/0002/work/train.py")) or found)
        commit_of_user(checkout)
        found[0].with_name("go").touch()
        return sets("RATE = 0.5")

    ahead(checkout, server, waiting("go"), second, experiments=4, sandbox="require", rules=False)
    assert len(server.requests) == 2
    after_the_commit(checkout)


# It does not come


@pytest.fixture
def hanging(server):
    """A step that answers when the test is over, to a client that has gone."""
    over = threading.Event()
    server.http.handle_error = lambda *_: None
    yield lambda body: over.wait(HELD_S) and ""
    over.set()


@pytest.mark.slow
def test_an_outage_while_a_run_trains(checkout, server, tmp_path, capsys):
    """The background waits a second and a half; that is no part of the running row's time, nor taken from it."""
    flag, failures = tmp_path / "over", []

    def fails(body):
        failures.append(ids(checkout))
        if len(failures) == 3:
            flag.touch()
        return 500, {"error": {"message": "down"}}

    more = {"outage_s": 2.0, "hours": 0.01, "rules": False}   # not for ever, should no answer ever come
    ahead(checkout, server, waiting(flag), "nothing", fails, fails, fails, experiments=3, **more)
    _, second, third = checkout.record()
    assert failures == [["0001"]] * 3 and second.train_s >= 1.5
    assert second.train_s < second.wall_s < second.train_s + 3
    assert (third.proposer, third.llm_tokens) == ("search", 100)   # of the reply that could not be used
    assert capsys.readouterr().out.count("the search proposes until it answers again") == 1


@pytest.mark.slow
def test_the_deadline_while_it_is_waited_for(checkout, server, hanging, capsys):
    checkout.session(experiments=1, budget_s=0.7)
    began, more = time.monotonic(), {"prefetch": True, "hours": 3.5 / 3600, "outage_s": 60.0, "budget_s": 0.7}
    server.script += [sets("RATE = 0.5"), hanging]
    assert checkout.session(proposer="llm", base_url=server.url, **more) == 0
    out = capsys.readouterr().out
    assert time.monotonic() - began < 4 and "no time is left for what tiny is asked; no row" in out
    assert "val_bpb 1.056169 -> 1.056169" in out
    assert ids(checkout) == ["0001", "0002"] and len(server.requests) == 2


@pytest.mark.parametrize("when", [slow("training"), "waiting"])
def test_ctrl_c_while_it_is_asked(checkout, server, hanging, when):
    server.script += [sets("RATE = 0.5"), hanging]
    args = ["--prefetch", "--sandbox", "off", "--time-budget", "3" if when == "training" else "0.1"]
    process = subprocess.Popen(checkout.command(*args), cwd=checkout.root, env=checkout.env(OPENAI_BASE_URL=server.url),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert wait_for(lambda: len(server.requests) == 2)
    assert when == "training" or wait_for(lambda: "0002" in ids(checkout))
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=HELD_S)
    assert process.returncode == 130 and errors == "" and "proposals by tiny, one ahead\n" in out
    assert time.monotonic() - began < 3   # of which the picture is one
    assert "stopped; an experiment that was under way leaves no row" in out
    assert ids(checkout) == ["0001", "0002"][:1 + (when == "waiting")]


# By default


def own_addresses():
    """This host by its name and by its addresses, where they lead here."""
    name = socket.gethostname()
    try:
        return [name, *{found[4][0] for found in socket.getaddrinfo(name, 0, socket.AF_INET)}]
    except OSError:
        return []


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.2", "0.0.0.0", *own_addresses()])
def test_a_server_on_this_machine_is_local(host):
    assert agent.is_local(f"http://{host}:8000/v1")


def test_a_server_on_this_machine_is_local_by_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("no IPv6 here")
    assert agent.is_local("http://[::1]:8000/v1")


@pytest.mark.parametrize("url", ["https://192.0.2.1/v1", "https://[2001:db8::1]/v1", "https://models.invalid/v1",
                                 f"http://{'x' * 70}.invalid/", "http://[::1", "http://\x00/"])
def test_any_other_server_is_not(url):
    assert not agent.is_local(url)


@pytest.mark.parametrize("base_url, on", [slow("", False), ("http://models.invalid/v1", True)], ids=["local", "remote"])
def test_the_default_goes_by_the_url(checkout, server, monkeypatch, capsys, base_url, on):
    """A server elsewhere is reached through a proxy, which here answers itself."""
    monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    seen = []

    def second(body):
        seen.extend(ids(checkout))
        return sets("RATE = 0.6")

    server.script += [sets("RATE = 0.5"), second]
    checkout.session(proposer="llm", base_url=base_url or server.url, experiments=3)
    assert ("# Running now" in server.asked(1)) == (", one ahead\n" in capsys.readouterr().out) == on
    assert on or seen == ["0001", "0002"]
    assert ids(checkout) == ["0001", "0002", "0003"]


@pytest.mark.parametrize("args, on", [([], None), (["--prefetch"], True), (["--no-prefetch"], False)])
def test_the_command_line_decides(monkeypatch, args, on):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    assert agent.configured(agent.parser().parse_args(args)).prefetch is on


@pytest.mark.slow
def test_a_failure_to_ask_ahead_costs_neither_the_experiment_nor_the_session(checkout, server, monkeypatch):
    """git cannot be started for a moment, just when the request is made."""
    plain, failed = agent.request, []

    def request(s, asked):
        if s.results and s.results[-1].status == agent.RUNNING and not failed:
            failed.append(True)
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return plain(s, asked)

    monkeypatch.setattr(agent, "request", request)
    assert ahead(checkout, server, sets("RATE = 0.5"), sets("RATE = 0.6"), sets("RATE = 0.7"), experiments=4) == 0
    assert failed and ids(checkout) == ["0001", "0002", "0003", "0004"] and len(server.requests) == 3
