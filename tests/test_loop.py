"""The loop on a real git repository with real processes, without torch: pytest tests/test_loop.py"""

import math
import os
import random
import re
import signal
import subprocess
import threading
import time

import pytest
from conftest import TOY, commit_all, make_checkout, reply

import agent


def llm(checkout, server, *script, **more):
    """A session whose model answers from a script."""
    server.script += script
    more = {"experiments": 1 + len(script), **more}
    return checkout.session(proposer="llm", base_url=server.url, **more)


def rewrite(old, new, **fields):
    return reply(f"<<<<<<< SEARCH\n{old}\n=======\n{new}\n>>>>>>> REPLACE", **fields)


MODEL_LINE = next(line for line in (TOY / "train.py").read_text().splitlines() if line.startswith("    return {"))


def scored(value, more=""):
    """A reply whose model gets this val_bpb."""
    return reply(f"SET BPB = {value}{more}", description=f"score {value}")


def slow(*values):
    """A case that only the long run takes."""
    return pytest.param(*values, marks=pytest.mark.slow)


def alive(pid):
    """Whether a process runs; a zombie that nobody has reaped does not."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(found) and not found.startswith("Z")


# Verdicts


def test_baseline_keep_tie_and_discard(checkout, server):
    start = checkout.git("rev-parse", "main")
    assert llm(checkout, server, scored(1.05), scored(1.05, "\nSET RATE = 2.0"), scored(1.2)) == 0
    base, keep, tie, worse = checkout.record()
    assert [r.status for r in (base, keep, tie, worse)] == ["keep", "keep", "discard", "discard"]
    assert (base.proposer, base.description, base.parent) == ("baseline", "baseline", start)
    assert checkout.git("rev-parse", f"{base.commit}^{{tree}}") == checkout.git("rev-parse", "main^{tree}")
    assert keep.parent == base.commit and tie.parent == worse.parent == keep.commit
    assert checkout.git("rev-parse", "HEAD") == keep.commit
    assert checkout.git("symbolic-ref", "--short", "HEAD") == f"autoresearch/{base.tag}"
    assert "BPB = 1.05" in checkout.text() and checkout.git("status", "--porcelain") == "M results.tsv"


def test_decide_is_strict():
    run = agent.Run("", "", 1.0, {}, "", "-")
    assert agent.decide(run, agent.Score(1.0), 1.0) == ("discard", "")
    assert agent.decide(run, agent.Score(math.nextafter(1.0, 0)), 1.0) == ("keep", "")
    assert agent.decide(run, agent.Score(1.0), None) == ("keep", "")
    assert agent.decide(run, agent.Score(status="invalid", reason="looks ahead"), 1.0) == ("invalid", "looks ahead")


def test_every_row_is_in_the_file_as_the_commit_has_it(checkout, server):
    llm(
        checkout,
        server,
        scored(1.05),
        rewrite("    step = 0", "    raise TypeError('no')", description="bad"),
        experiments=3,
    )
    record, rows = checkout.record(), checkout.rows()
    assert [row["commit"] for row in rows] == [r.commit[:7] for r in record]
    assert (
        rows[1]["val_bpb"] == "1.050000" and rows[1]["description"] == "score 1.05" and rows[1]["llm_tokens"] == "100"
    )
    assert rows[2]["val_bpb"] == "0.000000" and record[2].val_bpb is None
    assert rows[2]["status"] == "crash" and rows[2]["description"] == "bad (TypeError: no)"
    assert rows[1]["memory_gb"] == "0.5" and rows[1]["seed"] == "42" and rows[1]["role"] == "generalist"
    for row in rows:
        assert checkout.git("show", "-s", "--format=%s", row["commit"])
    assert "-Status" not in checkout.git("show", "-s", record[1].commit)
    assert "Val-Bpb: 1.05" in checkout.git("show", "-s", record[1].commit)


def test_invalid_is_never_best(checkout, server):
    llm(checkout, server, rewrite(MODEL_LINE, '    return {"invalid": "looks ahead", "bpb": 0.1}'))
    assert checkout.record()[1].status == "invalid" and checkout.rows()[1]["description"] == "an idea (looks ahead)"
    assert "looks ahead" not in checkout.text()


@pytest.mark.parametrize(
    "code, reason",
    [
        slow("    raise TypeError('no such argument')", "TypeError: no such argument"),
        ("    import os; os.kill(os.getpid(), 9)", "killed by signal 9, perhaps out of memory"),
        slow("    raise SystemExit('NaN loss at step 12')", "NaN loss at step 12"),
        slow("    raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')", "CUDA out of memory"),
        slow("    import os; os.kill(os.getpid(), 11)", "killed by signal 11"),
        slow("    import os; prepare.finish and os._exit(0)", "no checkpoint"),
        slow("    import sys; sys.exit(7)", "exit status 7"),
    ],
)
def test_crashes_say_why(checkout, server, code, reason):
    dead = ["no repair"] * 4
    llm(checkout, server, rewrite("    step = 0", code), *dead, experiments=2, rules=False)
    assert (checkout.record()[1].status, checkout.record()[1].reason) == ("crash", reason)


@pytest.mark.slow
def test_a_run_that_hangs_is_killed_with_its_children(checkout, server, monkeypatch):
    monkeypatch.setattr(agent, "KILL_S", 2.0)
    hang = (
        "    import subprocess, sys, time\n"
        f"    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', '{checkout.root}'])\n"
        "    print('hanging'); time.sleep(600)"
    )
    dead = ["no repair"] * 4
    llm(checkout, server, rewrite("    step = 0", hang), *dead, experiments=2, rules=False)
    crash = checkout.record()[1]
    assert crash.status == "crash" and crash.reason == "timeout after 2 s"
    assert "hanging" in (checkout.root / "runs" / crash.tag / "0002" / "run.log").read_text()
    assert subprocess.run(["pgrep", "-f", f"sleep.600. {checkout.root}$"]).returncode == 1


def test_a_run_that_never_asks_for_data_is_killed(checkout, server):
    dead = ["no repair"] * 4
    llm(
        checkout,
        server,
        rewrite("    data = prepare.load()", "    data = prepare.load()\n    import time; time.sleep(60)"),
        *dead,
        experiments=2,
        startup_s=1.0,
    )
    assert checkout.record()[1].reason == "timeout after 1 s" and checkout.record()[1].train_s is None


@pytest.mark.slow
def test_a_late_checkpoint_is_invalid(checkout, server, monkeypatch):
    monkeypatch.setattr(agent, "LATE_S", 0.5)
    late = rewrite("    step = 0", "    step = 0; import time; time.sleep(1.5)")
    llm(checkout, server, late)
    assert checkout.record()[1].status == "invalid" and "checkpoint 1 s late" in checkout.record()[1].reason


@pytest.mark.slow
def test_a_model_that_breaks_a_rule_at_the_start_is_invalid(checkout, server):
    llm(
        checkout,
        server,
        rewrite(
            "    data.start(model)",
            "    data.start; import sys; print('looks ahead'); sys.exit(3)\n    data.start(model)",
        ),
    )
    r = checkout.record()[1]
    assert (r.status, r.reason, r.val_bpb, len(server.requests)) == ("invalid", "looks ahead", None, 1)


STUMBLE = '    import time\n    return {"flaky_until": time.monotonic() + 1, "bpb": 1.01}'


def test_scoring_that_stumbles_is_repeated_without_training(checkout, server):
    llm(checkout, server, rewrite(MODEL_LINE, STUMBLE))
    r = checkout.record()[1]
    folder = checkout.root / "runs" / r.tag / r.id
    assert r.status == "keep" and (folder / "score1.log").read_text().count("RuntimeError: the scorer stumbled") == 1
    assert (folder / "run.log").read_text().count("step 1 ") == 1


@pytest.mark.slow
def test_scoring_that_always_fails_is_a_crash(checkout, server):
    dead = ["no repair"] * 4
    llm(checkout, server, rewrite(MODEL_LINE, '    return {"no": 1}'), *dead, experiments=2)
    assert checkout.record()[1].reason == "scoring: KeyError: 'rate'"


@pytest.mark.slow
@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "-1.0", "0.0"])
def test_an_absurd_score_is_no_score(checkout, server, value):
    dead = ["no repair"] * 4
    llm(checkout, server, rewrite(MODEL_LINE, f'    return {{"bpb": {value}}}'), *dead, experiments=2)
    assert checkout.record()[1].status == "crash" and checkout.record()[1].val_bpb is None


def test_a_run_sees_a_clean_environment(checkout, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    look = "    step = 0\n    import os; print('ENV', sorted(os.environ))"
    llm(checkout, server, rewrite("    step = 0", look), rules=False)
    r = checkout.record()[1]
    log = (checkout.root / "runs" / r.tag / r.id / "run.log").read_text()
    assert "AUTORESEARCH_SEED" in log and "OPENAI" not in log
    assert not any(
        "sk-secret" in p.read_text(errors="replace") for p in (checkout.root / "runs").rglob("*") if p.is_file()
    )


@pytest.mark.slow
def test_a_key_never_reaches_the_commits(checkout, server, monkeypatch):
    llm(checkout, server, scored(1.0), api_key="sk-secret")
    assert "sk-secret" not in checkout.git("log", "--all", "-p", "--glob=refs/autoresearch")


@pytest.mark.slow
def test_what_is_scored_and_committed_is_what_was_proposed(checkout, server):
    """A run that rewrites its own file changes nothing: not the score, not the commit, not the checkout."""
    sly = "    open('train.py', 'w').write('raise SystemExit'); step = 0"
    llm(checkout, server, rewrite("    step = 0", sly) + "SET BPB = 1.0\n", rules=False)
    keep = checkout.record()[1]
    assert keep.status == "keep" and sly in checkout.text() == agent.file_at(checkout.config(), keep.commit, "train.py")


def test_data_prepared_during_a_session_do_not_mix(checkout, server, monkeypatch):
    def prepare_others(body):
        env = checkout.env(TOY_NAME="other", TOY_FINGERPRINT="beef")
        subprocess.run(["python3", "prepare.py"], cwd=checkout.root, env=env, check=True)
        assert (checkout.cache / "current").read_text() == "other"
        return scored(1.05)

    llm(checkout, server, prepare_others, scored(1.04))
    assert [r.fingerprint for r in checkout.record()] == ["f00d"] * 3
    runs = checkout.root / "runs" / checkout.record()[0].tag
    assert all('"f00d"' in (runs / r.id / "score.json").read_text() for r in checkout.record())


@pytest.mark.slow
def test_the_same_data_made_anew_end_the_session(checkout, server):
    def prepare_again(body):
        subprocess.run(
            ["python3", "prepare.py"], cwd=checkout.root, env=checkout.env(TOY_FINGERPRINT="beef"), check=True
        )
        return scored(1.05)

    with pytest.raises(agent.UserError, match="prepared anew"):
        llm(checkout, server, reply("SET RATE = 0.9"), prepare_again, experiments=3)
    assert len(checkout.record()) == 2


# Repair


@pytest.mark.slow
def test_a_crash_goes_back_with_diff_and_log_and_is_one_row(checkout, server):
    broken = rewrite("    step = 0", "    print('before the fall')\n    step = None + 1", description="first try")
    mended = rewrite("    step = None + 1", "    step = 0 + 0", description="second try")
    llm(checkout, server, broken, mended, experiments=2)
    crash = server.asked(1)
    assert "TypeError" in crash and "+    step = None + 1" in crash and "> before the fall" in crash
    assert [(r.status, r.description, r.llm_tokens) for r in checkout.record()[1:]] == [("discard", "second try", 200)]
    folder = checkout.root / "runs" / checkout.record()[1].tag / "0002"
    assert "None + 1" in (folder / "crash1.py").read_text() and "TypeError" in (folder / "crash1.log").read_text()
    assert "None + 1" not in (folder / "train.py").read_text() and "second try" in (folder / "llm.md").read_text()


def test_after_two_repairs_the_crash_stands(checkout, server):
    def broken(n):
        return rewrite("    step = 0" if n == 1 else f"    raise ValueError({n - 1})", f"    raise ValueError({n})")

    llm(checkout, server, broken(1), broken(2), broken(3), experiments=2)
    assert checkout.record()[1].reason == "ValueError: 3" and len(server.requests) == 3


# Refusals before training


@pytest.mark.slow
def test_a_reply_that_does_not_apply_goes_back_and_makes_no_row(checkout, server):
    llm(checkout, server, reply("SET RATEX = 3"), reply("SET RATE = 3.0"), experiments=2)
    assert "Did you mean RATE" in server.asked(1) and "every edit of it" in server.asked(1)
    assert server.requests[1]["messages"][-2]["content"] == reply("SET RATEX = 3")
    assert [r.id for r in checkout.record()] == ["0001", "0002"] and checkout.record()[1].llm_tokens == 200


def test_after_three_lessons_the_conversation_begins_anew(checkout, server):
    llm(checkout, server, *["nothing"] * 4, reply("SET RATE = 3.0"), experiments=2)
    assert [len(r["messages"]) for r in server.requests] == [2, 4, 6, 8, 2]
    assert "Refused since then" in server.asked(4) and checkout.record()[1].proposer == "llm"


def test_a_repeat_is_refused_with_the_earlier_row(checkout, server):
    worse = reply("SET RATE = 0.5", description="slower")
    llm(checkout, server, worse, worse, reply("SET RATE = 2.0"), experiments=3)
    assert "repeats experiment 0002 (discard" in server.asked(2) and "slower" in server.asked(2)
    assert len(checkout.record()) == 3


@pytest.mark.slow
def test_a_model_that_never_makes_sense_is_replaced_by_the_search(checkout, server):
    llm(checkout, server, *["nothing"] * 20, experiments=2, outage_s=30.0)
    row = checkout.record()[1]
    assert len(server.requests) == 20 and row.proposer == "search" and row.llm_tokens == 2000


@pytest.mark.slow
def test_mix_alternates(checkout, server):
    server.script += [reply(f"SET RATE = {2 + i / 10}") for i in range(2)]
    checkout.session(proposer="mix", base_url=server.url, experiments=5)
    assert [r.proposer for r in checkout.record()] == ["baseline", "llm", "search", "llm", "search"]


# What the model is shown


def test_the_request_holds_brief_best_history_diffs_and_log(checkout, server):
    llm(checkout, server, scored(1.05), scored(1.3), lambda body: scored(1.2), experiments=4)
    first, third = server.requests[0]["messages"], server.requests[2]["messages"]
    assert first[0]["content"] == agent.REPLY_FORMAT and first[1]["content"].index("Lower the number.") < first[1][
        "content"
    ].index("def main")
    text = third[1]["content"]
    order = [
        text.index(part)
        for part in (
            "Lower the number.",
            "BPB = 1.05",
            "+BPB = 1.05",
            "  score 1.05\n",
            "  score 1.3\n",
            "Loss by share",
            "Propose experiment 0004",
        )
    ]
    assert order == sorted(order)
    assert re.search(r"/0003  discard +1.300000 +\+0.250000  score 1.3\n", text) and "> step 1 " in text


def test_a_changed_brief_is_in_the_next_request_and_in_the_commit(checkout, server):
    def change(body):
        (checkout.root / "program.md").write_text("Only the rate.\n")
        return scored(1.05)

    llm(checkout, server, change, scored(1.3))
    assert "Only the rate." in server.asked(1) and "Only the rate." not in server.asked(0)
    keep, worse = checkout.record()[1:]
    assert checkout.git("show", f"{keep.commit}:program.md") == "Lower the number."
    assert checkout.git("show", f"{worse.commit}:program.md") == "Only the rate."
    assert checkout.text("program.md") == "Only the rate.\n"


# The search


@pytest.mark.slow
def test_search_improves_the_toy_and_never_repeats(checkout):
    checkout.session(experiments=12)
    record = checkout.record()
    assert len({r.text_key for r in record}) == 12
    best = min(record, key=lambda r: r.val_bpb)
    assert best.val_bpb < record[0].val_bpb - 0.02 and checkout.git("rev-parse", "HEAD") == best.commit
    assert {r.proposer for r in record[1:]} == {"search"}


def test_search_stays_in_range_and_keeps_powers_of_two(checkout):
    text = checkout.text()
    for i in range(100):
        proposal, edited = agent.search_proposal(text, "cpu", f"k{i}", {})
        known = agent.knobs(edited, "cpu")
        assert edited == agent.apply_edits(text, proposal.edits, "cpu")
        assert 0.01 <= known["RATE"].value <= 100 and 0 <= known["DECAY"].value <= 1
        assert (
            known["ROWS"].value in (32, 64, 128) and 1 <= known["DEPTH"].value <= 12 and known["NOTE"].value == "plain"
        )
        assert isinstance(known["DEPTH"].value, int)


@pytest.mark.parametrize(
    "value, low, high",
    [
        (0.0, 0.0, 0.1),
        (1, 1.0, 3.0),
        (16, 16.0, 16.0),
        (0.95, 0.9, 0.99),
        (1e-8, None, None),
        (-0.5, -1.0, 0.0),
        (True, None, None),
    ],
)
def test_moves_keep_type_and_bounds(value, low, high):
    for i in range(200):
        new = agent.moved(agent.Knob("X", value, low, high, (0, 0)), random.Random(i))
        assert type(new) is type(value)
        assert (low is None or new >= low) and (high is None or new <= high)


def test_the_same_id_gives_the_same_search_proposal(checkout):
    a, b, c = (agent.search_proposal(checkout.text(), "cpu", key, {}) for key in ("t/1", "t/1", "t/2"))
    assert a == b != c


# Git and the user's files


def test_starts_from_a_detached_head(checkout):
    checkout.git("checkout", "-q", "--detach")
    assert checkout.session(experiments=2) == 0 and checkout.git("symbolic-ref", "--short", "HEAD").startswith(
        "autoresearch/"
    )


@pytest.mark.slow
def test_works_in_a_subdirectory_of_a_larger_repository(tmp_path, folder):
    big = tmp_path / "big"
    (big / "other").mkdir(parents=True)
    (big / "other" / "file").write_text("mine\n")
    part = make_checkout(big / "part", tmp_path / "cache")
    whole = make_checkout(big, tmp_path / "cache")
    commit_all(whole)
    (big / "other" / "file").write_text("changed\n")
    part.session(experiments=8)
    keep = [r for r in part.record() if r.status == "keep"][-1]
    assert keep.id != "0001" and part.git("rev-parse", "HEAD") == keep.commit
    assert part.git("diff", "--stat", "--name-only", "main", "HEAD") == "part/train.py"
    assert (big / "other" / "file").read_text() == "changed\n"


def test_what_the_user_staged_or_changed_stays(checkout):
    (checkout.root / "notes.txt").write_text("mine\n")
    checkout.git("add", "notes.txt")
    (checkout.root / "program.md").write_text("Only the rate.\n")
    checkout.session(experiments=8)
    assert "A  notes.txt" in checkout.git("status", "--porcelain") and checkout.text("program.md") == "Only the rate.\n"


def test_hooks_of_the_repository_do_not_run(checkout):
    for name in ("post-checkout", "reference-transaction", "post-commit", "pre-commit", "post-index-change"):
        hook = checkout.root / ".git" / "hooks" / name
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(f"#!/bin/sh\ntouch {checkout.root}/ran\n")
        hook.chmod(0o755)
    checkout.session(experiments=5)
    assert not (checkout.root / "ran").exists()


def test_a_ref_that_holds_no_experiment_is_named(checkout):
    checkout.git("update-ref", "refs/autoresearch/x/0001", "main")
    assert "git update-ref -d refs/autoresearch/x/0001" in error_of(checkout)


def test_odd_characters_of_a_reply_do_no_harm(checkout, server):
    odd = "t\tab \ud800 \x00 café ∞ " + "x" * 100
    llm(checkout, server, reply("SET NOTE = 'é∞'\nSET RATE = 1.5", description=odd))
    assert checkout.record()[1].what == checkout.rows()[1]["description"] and len(checkout.record()[1].what) <= 80
    assert "'é∞'" in agent.file_at(checkout.config(), checkout.record()[1].commit, "train.py")


def error_of(checkout, **more):
    with pytest.raises(agent.UserError) as error:
        checkout.session(**more)
    return str(error.value)


def test_no_repository(folder):
    assert "git init && git add -A" in error_of(folder)
    folder.git("init", "-q")
    assert "git add -A && git commit" in error_of(folder)


@pytest.mark.parametrize("name", ["train.py", "prepare.py"])
def test_uncommitted_changes_are_refused_and_stay(checkout, name):
    path = checkout.root / name
    path.write_text(path.read_text() + "# mine\n")
    assert f"{name} changed and not committed" in error_of(checkout)
    assert path.read_text().endswith("# mine\n") and not checkout.record()
    assert checkout.git("symbolic-ref", "--short", "HEAD") == "main"


def test_a_branch_that_is_not_checked_out_is_not_guessed(checkout):
    checkout.session(experiments=1, tag="one")
    checkout.git("checkout", "-q", "main")
    message = error_of(checkout, tag="one")
    assert "git checkout autoresearch/one" in message and "--tag" in message


@pytest.mark.parametrize("tag", ["a b", "../x", "x.lock", "a..b", "-x"])
def test_bad_tags(checkout, tag):
    assert "--tag" in error_of(checkout, tag=tag)


def test_a_baseline_that_crashes_ends_the_session(checkout):
    path = checkout.root / "train.py"
    path.write_text(path.read_text().replace("    step = 0", "    raise TypeError('x')"))
    checkout.git("-c", "user.name=u", "-c", "user.email=u@u", "commit", "-qam", "broken")
    assert "gets no score (TypeError: x)" in error_of(checkout) and checkout.record()[0].status == "crash"


def test_edits_of_the_user_during_a_session_stop_it(checkout, server):
    def meddle(body):
        path = checkout.root / "train.py"
        path.write_text(path.read_text() + "# mine\n")
        return scored(1.01)

    with pytest.raises(agent.UserError, match="changed and not committed"):
        llm(checkout, server, scored(1.05), meddle, scored(1.0), experiments=4)
    assert checkout.text().endswith("# mine\n")


@pytest.mark.slow
def test_a_keep_does_not_overwrite_an_edit_made_while_it_trained(checkout, server):
    def meddle():
        time.sleep(0.6)
        path = checkout.root / "train.py"
        path.write_text(path.read_text() + "# mine\n")

    thread = threading.Thread(target=meddle)

    def answer(body):
        thread.start()
        return scored(1.05)

    with pytest.raises(agent.UserError, match="changed and not committed"):
        llm(checkout, server, reply("SET RATE = 1.01"), answer, scored(1.0), experiments=4, budget_s=1.5)
    assert checkout.text().endswith("# mine\n") and checkout.record()[2].status == "keep"


def test_a_second_session_is_refused(checkout, server):
    def second(body):
        done = checkout.run("--proposer", "search")
        assert done.returncode == 2 and "running here already, process" in done.stderr
        return scored(1.05)

    llm(checkout, server, second)
    assert len(checkout.record()) == 2


def test_a_record_is_not_interrupted(checkout):
    """Ctrl-C in the middle waits for the end, also when another thread could take the signal, as numpy's do."""
    pytest.importorskip("numpy")
    signal.signal(signal.SIGINT, signal.default_int_handler)   # whatever started the tests may ignore it
    other = threading.Thread(target=time.sleep, args=(2,))
    other.start()
    done = []
    with pytest.raises(KeyboardInterrupt):
        with agent.uninterrupted(agent.opened(checkout.config(), agent.Screen())[0]):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            done.append(True)
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_locked_index_does_not_lose_a_keep(checkout, server, monkeypatch):
    monkeypatch.setattr(agent, "LOCK_S", 0.5)
    lock = checkout.root / ".git" / "index.lock"

    def locking(body):
        lock.touch()
        return scored(1.05)

    llm(checkout, server, locking)
    lock.unlink()
    keep = checkout.record()[1]
    assert checkout.git("rev-parse", "HEAD") == keep.commit and "BPB = 1.05" in checkout.text()
    llm(checkout, server, scored(1.2), experiments=1)
    assert checkout.git("status", "--porcelain") == "M results.tsv"


# Resume


def test_resume_goes_on_from_the_best_at_the_next_id(checkout, server):
    llm(checkout, server, scored(1.05), scored(1.2))
    llm(checkout, server, scored(1.04), experiments=1)
    record = checkout.record()
    assert [r.id for r in record] == ["0001", "0002", "0003", "0004"] and record[3].parent == record[1].commit
    assert "score 1.2\n" in server.asked(2) and checkout.git("rev-parse", "HEAD") == record[3].commit


@pytest.mark.parametrize(
    "last",
    [
        slow(scored(1.05, "\nSET RATE = 2.0")),
        rewrite("    step = 0", "    raise TypeError('no')"),
        slow(rewrite("    step = 0", "    raise SystemExit(0)")),
    ],
    ids=["tie", "crash", "no checkpoint"],
)
def test_resume_after_every_verdict(checkout, server, last):
    dead = ["no repair"] * 4
    llm(checkout, server, scored(1.05), last, *dead, experiments=3)
    keep, other = checkout.record()[1:]
    assert other.status in ("discard", "crash", "invalid")
    server.script.clear()
    llm(checkout, server, scored(1.04), experiments=1)
    new = checkout.record()[3]
    assert new.parent == keep.commit and new.id == "0004" and new.status == "keep" and other.what in server.asked(-1)


def test_a_commit_of_the_user_gets_a_new_baseline(checkout, server):
    llm(checkout, server, scored(1.05))
    path = checkout.root / "train.py"
    path.write_text(path.read_text().replace("BPB = 1.05", "BPB = 1.5"))
    checkout.git("-c", "user.name=u", "-c", "user.email=u@u", "commit", "-qam", "my own idea")
    mine = checkout.git("rev-parse", "HEAD")
    llm(checkout, server, scored(1.45))
    base, keep = checkout.record()[2:]
    assert (base.proposer, base.parent, base.val_bpb) == ("baseline", mine, 1.5) and keep.status == "keep"
    assert checkout.git("rev-parse", "HEAD") == keep.commit


def test_a_keep_that_the_user_took_back_stays_back(checkout, server):
    llm(checkout, server, scored(1.05))
    base = checkout.record()[0]
    checkout.git("reset", "-q", "--hard", base.commit)
    (checkout.root / "results.tsv").unlink()
    llm(checkout, server, scored(1.06), experiments=1)
    assert checkout.record()[2].parent == base.commit


@pytest.mark.slow
def test_a_keep_that_the_user_takes_back_without_a_commit_is_the_users(checkout, server):
    llm(checkout, server, scored(1.05))
    checkout.git("checkout", "-q", "main", "--", "train.py")
    assert "changed and not committed" in error_of(checkout) and "BPB = None" in checkout.text()


@pytest.mark.slow
def test_another_branch_of_the_same_data_shows_its_history(checkout, server):
    llm(checkout, server, scored(1.05), tag="one")
    llm(checkout, server, scored(1.04), tag="two")
    assert "one/0002  keep " in server.asked(1) and [r.id for r in checkout.record() if r.tag == "two"] == [
        "0001",
        "0002",
    ]


@pytest.mark.parametrize("change", ["fingerprint", "budget"])
def test_other_conditions_are_not_mixed(checkout, monkeypatch, change):
    checkout.session(experiments=1)
    if change == "fingerprint":
        monkeypatch.setenv("TOY_FINGERPRINT", "beef")
        (checkout.cache / "current").unlink()
    message = error_of(checkout, **({"budget_s": 0.2} if change == "budget" else {}))
    assert "--tag NAME" in message and ("beef" in message or "0.2" in message) and len(checkout.record()) == 1


@pytest.mark.parametrize("harm", [slow("deleted"), slow("emptied"), "torn", slow("half a header"), slow("a row lost")])
def test_results_are_rebuilt_from_the_refs(checkout, harm):
    checkout.session(experiments=3)
    path = checkout.root / "results.tsv"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    {
        "deleted": path.unlink,
        "emptied": lambda: path.write_text(""),
        "torn": lambda: path.write_text(whole[:-30]),
        "half a header": lambda: path.write_text(whole[:20]),
        "a row lost": lambda: path.write_text("".join(lines[:-1])),
    }[harm]()
    checkout.session(experiments=1)
    assert path.read_text().startswith(whole) and len(checkout.rows()) == 4


@pytest.mark.slow
def test_the_users_own_lines_in_results_stay(checkout):
    checkout.session(experiments=2)
    path = checkout.root / "results.tsv"
    mine = path.read_text() + "# a note of mine\n"
    path.write_text(mine)
    checkout.session(experiments=1)
    assert path.read_text().startswith(mine) and len(path.read_text().splitlines()) == 5


@pytest.mark.parametrize("left", ["ref", slow("row"), slow("branch"), slow("file")])
def test_a_keep_that_a_crash_cut_short_is_finished(checkout, server, left):
    """Put the checkout back to each state between a keep's ref and its end, and start again."""
    llm(checkout, server, scored(1.05))
    base, keep = checkout.record()
    results = checkout.root / "results.tsv"
    after = results.read_text()
    checkout.git("update-ref", "-d", f"refs/autoresearch-moved/{base.tag}")
    if left in ("ref", "row"):
        checkout.git("reset", "-q", "--hard", "main")
        results.write_text(after if left == "row" else "".join(after.splitlines(keepends=True)[:-1]))
    else:
        checkout.git("reset", "-q", "--", "train.py")
        blob = checkout.git("rev-parse", "main:train.py")
        checkout.git("update-index", "--cacheinfo", f"100644,{blob},train.py")
        if left == "branch":
            (checkout.root / "train.py").write_text(checkout.git("show", "main:train.py") + "\n")
    llm(checkout, server, scored(1.2), experiments=1)
    assert checkout.git("rev-parse", "HEAD") == keep.commit and "BPB = 1.05" in checkout.text()
    assert checkout.git("status", "--porcelain") == "M results.tsv" and checkout.record()[2].parent == keep.commit
    assert results.read_text().startswith(after) and len(checkout.rows()) == 3


@pytest.mark.slow
def test_deadline(checkout):
    began = time.monotonic()
    assert checkout.session(hours=4 / 3600, experiments=None, budget_s=0.3) == 0
    assert time.monotonic() - began < 8


def test_a_session_without_time_for_one_run_says_so(checkout):
    assert "one run" in error_of(checkout, hours=1 / 3600, budget_s=5.0) and not checkout.record()
