"""Repeats, confirmation, drift and the final verification: pytest tests/test_belief.py"""

import math
import random
import re
import statistics
import time
from dataclasses import replace

import pytest
from conftest import DRAW
from test_loop import MODEL_LINE, llm, rewrite, scored

import agent

ROW = agent.Result(
    "c1", "c0", "an idea", "", "0001", "t", "keep", "", 1.0, 0.5, "2026-01-01T00:00:00Z", "llm", "-", "m", None, 42,
    100, 50.0, 300.0, 314.0, None, "datacenter", "f00d", "GPU", 300.0, "key", "-",
)


def row(number, val_bpb=1.0, **more):
    """A row of its own program, unless text_key says otherwise."""
    names = {"id": f"{number:04d}", "commit": f"c{number}", "text_key": f"key{number}", "val_bpb": val_bpb}
    return replace(ROW, **{**names, **more})


BASE = row(1, 1.0, proposer="baseline")


# What is known of a program


def test_a_program_is_worth_the_mean_of_its_runs():
    rows = [BASE, row(2, 0.9), row(3, 1.2, text_key="key1", status="verify", seed=43)]
    assert agent.value_of(rows, BASE) == pytest.approx(1.1) and agent.value_of(rows, rows[1]) == 0.9
    assert agent.next_seed(rows, BASE) == 44 and agent.next_seed(rows, rows[1]) == 43
    again = row(4, 0.7, text_key="key1", status="verify", seed=42)   # one a seed, the last
    assert agent.value_of([*rows, again], BASE) == pytest.approx(0.95)


def test_a_verification_tells_the_search_nothing():
    """Or it would not be one when the branch goes on, and the same runs are quoted again."""
    rows = [BASE, *(row(i, 1.5, text_key="key1", status="verify", seed=seed)
                    for i, seed in enumerate(agent.VERIFY_SEEDS, 2))]
    assert agent.value_of(rows, BASE) == 1.0 and agent.noise_of(rows, "datacenter").repeats == 3
    many = [row(i, text_key="key1", status="verify", seed=seed) for i, seed in enumerate(range(43, 101), 5)]
    assert agent.next_seed([*rows, *many], BASE) not in agent.VERIFY_SEEDS


@pytest.mark.parametrize("bad", [dict(status="invalid"), dict(status="crash"), dict(val_bpb=None)])
def test_a_run_without_an_honest_score_says_nothing(bad):
    rows = [BASE, replace(row(2, 1.2, text_key="key1", status="verify"), **bad)]
    assert agent.value_of(rows, BASE) == 1.0


def test_runs_of_another_speed_do_not_count():
    slow = dict(text_key="key1", status="verify", tokens_M=49.0)
    rows = [BASE, row(2, 1.02, seed=43, **slow), row(3, 1.04, seed=44, **slow)]
    assert agent.value_of(rows, BASE) == pytest.approx(1.03)
    assert agent.value_of([replace(r, preset="cpu") for r in rows], BASE) == pytest.approx(1.02)   # there it is usual
    assert agent.value_of([replace(r, tokens_M=None) for r in rows], BASE) == pytest.approx(1.02)   # nothing is known


def test_noise_is_the_prior_until_repeats_outweigh_it():
    prior = agent.NOISE["datacenter"][0]
    assert agent.noise_of([BASE], "datacenter") == agent.Noise(pytest.approx(prior), 0)
    assert "the preset's prior" in str(agent.noise_of([BASE], "datacenter"))
    rng, rows = random.Random(1), []
    for i in range(400):
        rows += [row(2 * i, 1 + rng.gauss(0, 0.003)),
                 row(2 * i + 1, 1 + rng.gauss(0, 0.003), text_key=f"key{2 * i}", seed=43, status="verify")]
    found = agent.noise_of(rows, "datacenter")
    assert found.repeats == 400 and found.sd == pytest.approx(0.003, rel=0.1)
    same_seed = [replace(r, seed=42) for r in rows]
    assert agent.noise_of(same_seed, "datacenter").repeats == 0


def test_length_is_of_the_program_alone():
    plain = "def f(a):\n    return a + 1\n"
    dressed = '"""What it is."""\n# why\n\ndef f(\n    a\n):\n    """Doc."""\n\n    return a + 1   # one more\n'
    assert agent.length_of(plain) == agent.length_of(dressed)
    assert agent.length_of(plain + "x = 'a string'\n") == agent.length_of(plain) + 3


# When a second run is worth it


def rare(keeps, count=agent.RARE_ROWS):
    return [BASE, *(row(i, 1.1, status="keep" if i <= 1 + keeps else "discard") for i in range(2, 2 + count))]


def test_when_keeps_are_rare():
    most = math.ceil(agent.RARE_SHARE * agent.RARE_ROWS) - 1
    assert agent.keeps_are_rare(rare(most)) and not agent.keeps_are_rare(rare(most + 1))
    assert not agent.keeps_are_rare(rare(0, agent.RARE_ROWS - 1))   # too early to tell
    repeats = [row(90 + i, status="verify") for i in range(9)]
    assert agent.keeps_are_rare([*rare(most), *repeats]) and not agent.keeps_are_rare([*rare(0, 30), *repeats])


@pytest.mark.parametrize(
    "mode, val_bpb, keeps, shorter, why",
    [
        ("auto", 0.999, 9, False, ""),
        ("auto", 0.999, 0, False, "keeps are rare"),
        ("auto", 1.0, 0, False, ""),   # a tie is a discard
        ("auto", 0.9, 9, False, "too good"),
        ("never", 0.9, 9, False, "too good"),
        ("never", 0.999, 0, False, ""),
        ("always", 0.999, 9, False, "--confirm"),
        ("auto", 1.0005, 9, True, "shorter"),
        ("auto", 1.0, 9, True, "shorter"),
        ("auto", 1.002, 9, True, ""),   # worse by more than the noise
        ("never", 1.0005, 9, True, ""),
    ],
)
def test_what_must_be_confirmed(mode, val_bpb, keeps, shorter, why):
    found = agent.doubt(mode, rare(keeps), BASE, val_bpb, shorter)
    assert why in found if why else found == ""


def test_the_best_runs_again_where_it_has_fewer_runs_or_the_machine_moved():
    first, again = row(8, 0.99), row(9, 0.99, text_key="key8", seed=43)
    assert agent.needs_repeat([BASE], BASE, [first, again])
    both = [BASE, row(2, 1.0, text_key="key1", seed=43, status="verify")]
    assert not agent.needs_repeat(both, BASE, [first, again])
    assert agent.needs_repeat(both, BASE, [first, replace(again, tokens_M=48.0)])


def test_a_candidate_is_worth_its_runs_of_the_speed_that_the_best_has_now():
    fast, slow = row(8, 0.99), row(9, 1.01, text_key="key8", seed=43, tokens_M=49.0)
    assert agent.after_repeat([fast, slow], 1.005)[0] == "discard"   # the mean is 1.0
    assert agent.after_repeat([fast, replace(slow, tokens_M=50.0)], 1.005)[0] == "keep"
    assert agent.after_repeat([row(8, 0.9), row(9, 1.0, text_key="key8", seed=43)], 1.0)[0] == "discard"   # too good


def test_a_best_that_fails_is_not_run_again_at_once():
    failed = row(2, None, text_key="key1", status="verify", seed=43, time="2026-01-01T03:00:00Z")
    assert agent.drift([BASE, failed], BASE, agent.seconds_of(failed.time) + 60) == ""
    assert agent.next_seed([BASE, failed], BASE) == 44
    slow = [replace(BASE, budget_s=7200.0)]   # an hour is nothing to runs of two
    assert agent.drift(slow, slow[0], agent.seconds_of(BASE.time) + 3 * 7200) == ""


def test_drift():
    began = agent.seconds_of(BASE.time)
    assert agent.drift([BASE], BASE, began + 60) == ""
    assert "2.1 h after" in agent.drift([BASE], BASE, began + 7560)
    later = [row(i, 1.1, status="discard", parent="c1", tokens_M=49.0) for i in range(2, 2 + agent.DRIFT_ROWS)]
    assert "-2.0% tokens" in agent.drift([BASE, *later], BASE, began + 60)
    assert agent.drift([BASE, *later[1:]], BASE, began + 60) == ""
    assert agent.drift([BASE, *later[1:], row(9, parent="c1", tokens_M=50.1)], BASE, began + 60) == ""   # not all
    repeat = row(10, text_key="key1", status="verify", seed=43, parent="c1", tokens_M=49.0)
    assert agent.drift([BASE, *later, repeat], BASE, began + 60) == ""   # it has just run


def test_keeps_that_hindsight_calls_noise():
    sd = agent.NOISE["datacenter"][0]
    small, big = row(2, 1 - 0.5 * sd, parent="c1"), row(3, 1 - 9 * sd, parent="c2")
    assert agent.hindsight([BASE, small, big]) == [small]
    unlucky = row(4, 1.0, text_key="key3", seed=43, status="verify")   # the big one again
    assert agent.hindsight([BASE, small, big]) == [small] and big in agent.hindsight(
        [BASE, small, big, replace(unlucky, val_bpb=1 + 9 * sd)])


# The final sentence


@pytest.mark.parametrize("freedom, quantile", [(2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (12, 2.179), (60, 2.0)])
def test_students_t(freedom, quantile):
    assert agent.t_95(freedom) == pytest.approx(quantile, rel=0.01)


def test_the_interval_is_students_for_seeds_alone():
    best, base = [0.98, 0.99, 1.0], [1.0, 1.01, 1.02]
    found = agent.gain_of(best, base, [], 0.0)
    half = 2.776 * 0.01 * math.sqrt(2 / 3)
    assert found == pytest.approx((0.02, 0.02 - half, 0.02 + half), rel=0.02)
    assert agent.gain_of(best, base, [[1.0, 1.0]] * 20, 0.0).high < found.high   # quiet repeats narrow it
    assert agent.gain_of(best, base, [], 0.05).high > found.high + 0.05   # little text widens it


def test_the_interval_covers_seeds_and_text():
    rng, covered, nights = random.Random(3), 0, 1000
    for _ in range(nights):
        text = [rng.gauss(0, 0.004) for _ in range(agent.BLOCKS)]   # what this text says of the difference
        best = [1 + statistics.mean(text) + rng.gauss(0, 0.001) for _ in range(3)]
        base = [1.02 + rng.gauss(0, 0.001) for _ in range(3)]
        rows = [[[(x + 0.1) * math.log(2) for x in text]], [[0.12 * math.log(2)] * agent.BLOCKS]]
        gain = agent.gain_of(best, base, [[1.0, 1 + rng.gauss(0, 0.001) * math.sqrt(2)]],
                             agent.text_sd(*rows, agent.BLOCKS))
        covered += gain.low <= 0.02 <= gain.high
    assert 0.93 <= covered / nights <= 0.97


def test_the_sentence():
    def says(val, test, seen):
        return str(agent.Verified(agent.Gain(*val), agent.Gain(*test), seen, [ROW] * 6))

    good = (0.0119, 0.0095, 0.0143)
    found = says((0.0123, 0.0101, 0.0145), good, 0.015)
    assert found == ("On 3 seeds and on test rows that the search never used, bits per byte are lower by 0.0119 (95 % "
                     "interval 0.0095 to 0.0143); on the rows that it used, by 0.0123 (95 % interval 0.0101 to 0.0145). "
                     "The search had seen 0.0150: 0.0027 of it (18 %) was luck.")
    assert "0.0100: none of it was luck" in says(good, good, 0.01) and "had seen none" in says(good, good, -0.001)
    none = says((0.0004, -0.001, 0.002), (0.0001, -0.001, 0.001), 0.004)
    assert "never used, no gain is shown: bits" in none and "seen 0.0040: 0.0036 of it (90 %)" in none
    assert "it is worse: bits" in says((-0.01, -0.02, -0.001), (-0.01, -0.02, -0.001), 0.004)
    assert "all of it was luck" in says((-0.01, -0.02, -0.001), (-0.01, -0.02, -0.001), 0.004)


# Sessions


def seeds(**values):
    """A table of BPB by seed, for the toy: seeds(s42=1.0, s43=1.1, s0=1.0 for any other)."""
    return repr({int(name[1:]): value for name, value in values.items()})


def test_every_keep_is_confirmed_if_asked_for(checkout, server, capsys):
    """The baseline's score is 1.0562 under every seed."""
    lucky, sound, worse = seeds(s42=1.03, s43=1.09), seeds(s42=1.04, s43=1.05), seeds(s42=1.042, s43=1.044)
    assert llm(checkout, server, scored(lucky), scored(sound), scored(worse), confirm="always") == 0
    found = [(r.status, r.seed, r.val_bpb) for r in checkout.record()]
    base = agent.value_of(checkout.record(), checkout.record()[0])
    assert found == [
        ("keep", 42, base), ("discard", 42, 1.03), ("verify", 43, 1.09), ("verify", 43, base),
        ("keep", 42, 1.04), ("verify", 43, 1.05),
        ("keep", 42, 1.042), ("verify", 43, 1.044),   # above the luckiest run of the best, below its mean
    ]
    first, _, its_repeat, base_again, *_, keep, _ = checkout.record()
    assert "not confirmed, mean of 2 runs: 1.06" in checkout.record()[1].reason
    assert (its_repeat.parent, base_again.parent) == (checkout.record()[1].commit, first.commit)
    trees = [checkout.git("rev-parse", f"{r.commit}^{{tree}}") for r in checkout.record()]
    assert trees[1] == trees[2] != trees[3] == trees[0]
    assert checkout.git("rev-parse", "HEAD") == keep.commit and keep.bar == pytest.approx(1.045)
    assert "best 1.043000 (0007, mean of 2 runs)" in checkout.run("--status").stdout


def test_a_repeat_that_crashes_confirms_nothing(checkout, server):
    fall = "    if __import__('os').environ['AUTORESEARCH_SEED'] == '43':\n        raise ValueError('odd')\n"
    edit = rewrite(MODEL_LINE, f"{fall}    return {{'bpb': 1.0}}", description="odd")
    llm(checkout, server, edit, confirm="always", rules=False)
    odd, repeat = checkout.record()[1:]
    assert odd.status == "discard" and "not confirmed, seed 43: ValueError: odd" in odd.reason
    assert (repeat.status, repeat.val_bpb) == ("verify", None)
    assert checkout.git("rev-parse", "HEAD") != odd.commit


PADDING = "def unused(a, b, c, d):\n" + "".join(f"    a = (a + b) * c - d * {i}\n" for i in range(4)) + "    return a\n"


def test_shorter_code_gets_a_second_chance(checkout, server):
    path = checkout.root / "train.py"
    path.write_text(path.read_text().replace("BPB = None", "BPB = 1.05").replace("def main", f"{PADDING}\n\ndef main"))
    checkout.git("-c", "user.name=u", "-c", "user.email=u@u", "commit", "-qam", "long")
    value = seeds(s42=1.051, s43=1.047)
    shorter = rewrite(PADDING, "", description="shorter") + f"SET BPB = {value}\n"
    llm(checkout, server, scored(value, "\nSET RATE = 2.0"), shorter)
    same, short, *repeats = checkout.record()[1:]
    assert (same.status, short.status, short.reason) == ("discard", "keep", "confirmed, mean of 2 runs: 1.049000")
    assert [(r.status, r.seed) for r in repeats] == [("verify", 43), ("verify", 43)] and "unused" not in checkout.text()


def test_the_best_is_run_again_when_the_machine_may_have_changed(checkout, server, monkeypatch, capsys):
    path = checkout.root / "train.py"
    path.write_text(path.read_text().replace("BPB = None", f"BPB = {seeds(s42=1.05, s43=1.06, s44=1.08)}"))
    checkout.git("-c", "user.name=u", "-c", "user.email=u@u", "commit", "-qam", "noisy")
    checkout.session(experiments=1)
    (checkout.cache / "speed").write_text("0.9")
    monkeypatch.setattr(agent, "DRIFT_S", -5.0)
    monkeypatch.setattr(agent, "DRIFT_RUNS", 0)
    llm(checkout, server, scored(1.055), experiments=1)
    found = [(r.status, r.seed, r.bar) for r in checkout.record()]
    assert found == [("keep", 42, None), ("verify", 43, 1.05), ("verify", 44, 1.06), ("keep", 42, pytest.approx(1.07))]
    assert "the best is worth 1.070000 now, mean of 2 runs; before, 1.050000" in capsys.readouterr().out


# Verification


BASE_SCORES = seeds(s42=1.05, s101=1.051, s102=1.049, s103=1.05, s0=1.05)
BEST_SCORES = seeds(s42=1.02, s101=1.031, s102=1.029, s103=1.03, s0=1.03)


@pytest.fixture
def noisy(checkout):
    path = checkout.root / "train.py"
    path.write_text(path.read_text().replace("BPB = None", f"BPB = {BASE_SCORES}"))
    checkout.git("-c", "user.name=u", "-c", "user.email=u@u", "commit", "-qam", "noisy")
    return checkout


def test_the_final_verification(noisy, server, capsys):
    assert llm(noisy, server, scored(BEST_SCORES), verify=True) == 0
    out, (base, best, *repeats) = capsys.readouterr().out, noisy.record()
    assert [(r.status, r.parent, r.seed) for r in repeats] == [
        ("verify", p.commit, seed) for seed in agent.VERIFY_SEEDS for p in (best, base)]
    assert all(r.test_bpb == r.val_bpb for r in repeats)   # the toy's splits are alike
    report = (noisy.root / "runs" / base.tag / "report.md").read_text()
    for text in (out, report, noisy.run("--status").stdout):
        assert "On 3 seeds and on test rows that the search never used, bits per byte are lower by 0.0200 (95 %" in text
        assert "The search had seen 0.0300: 0.0100 of it (33 %) was luck." in text
    assert [len(re.findall(rf"\| {name} \| 10[123] \|", report)) for name in ("best", "baseline")] == [3, 3]
    assert f"| {repeats[0].id} | best | 101 |" in report
    assert noisy.git("rev-parse", "HEAD") == best.commit
    DRAW(noisy.record(), noisy.root / "runs" / base.tag / "progress.png", best)


def test_what_is_verified_is_not_run_again(noisy, server):
    llm(noisy, server, scored(BEST_SCORES), verify=True)
    llm(noisy, server, scored(1.2), experiments=1, verify=True)
    assert len(noisy.record()) == 2 + 6 + 1
    (noisy.root / "runs" / noisy.record()[0].tag / "0004" / "test_rows.npy").write_bytes(b"half")   # the power went
    assert "On 2 seeds" in noisy.run("--status").stdout
    llm(noisy, server, scored(1.3), experiments=1, verify=True)
    assert [(r.seed, r.status) for r in noisy.record()[9:]] == [(42, "discard"), (101, "verify"), (101, "verify")]


def test_nothing_kept_is_said_and_costs_no_run(checkout, server, capsys):
    llm(checkout, server, scored(1.2), verify=True)
    assert len(checkout.record()) == 2 and "Nothing was kept: there is no gain." in capsys.readouterr().out
    report = checkout.root / "runs" / checkout.record()[0].tag / "report.md"
    assert "Nothing was kept" in report.read_text()


def test_time_is_kept_for_it(noisy, server, capsys):
    server.script += [scored(BEST_SCORES)]
    began = time.monotonic()
    assert noisy.session(proposer="mix", base_url=server.url, hours=12 / 3600, verify=True) == 0
    rows = noisy.record()
    assert sum(r.seed in agent.VERIFY_SEEDS for r in rows) == 6 and rows[-1].seed == 103
    assert len(rows) > 8 and time.monotonic() - began < 14
    assert "On 3 seeds" in capsys.readouterr().out


@pytest.mark.parametrize("hours, verify, budget_s, expected", [
    (8, None, 300, True), (4, None, 300, True), (3.9, None, 300, False), (8, False, 300, False), (1, True, 300, True),
    (None, None, 300, False), (4, None, 3600, False)])
def test_when_a_session_ends_with_it(checkout, hours, verify, budget_s, expected):
    config = checkout.config(hours=hours, verify=verify, budget_s=budget_s)
    assert agent.wants_verification(config, False) == expected


@pytest.mark.parametrize("words, said", [
    (["--hours", "0.1"], "--verify takes 6 runs at the end: give --hours 0.3 or more"),
    ([], "give --hours or --experiments too"),
])
def test_what_leaves_no_room_for_it_is_one_line(checkout, words, said):
    done = checkout.run("--proposer", "search", "--verify", "--time-budget", "100", *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr
    assert not checkout.record() and checkout.git("branch", "--list") == "* main"


def test_what_fails_in_it_leaves_the_rest(noisy, server, capsys):
    """The candidate crashes on one seed; the other two are enough."""
    fall = "    if __import__('os').environ['AUTORESEARCH_SEED'] == '102':\n        raise ValueError('odd')\n"
    edit = rewrite(MODEL_LINE, f"{fall}    return {{'bpb': 1.03}}", description="odd")
    llm(noisy, server, edit, verify=True, rules=False)
    assert [r.seed for r in noisy.record()[2:]] == [101, 101, 102, 102, 103, 103]
    assert "On 2 seeds" in capsys.readouterr().out


def test_a_run_that_breaks_out_confirms_nothing(checkout, server):
    """Without a sandbox, on the second seed only."""
    out = ("    import os\n    if os.environ['AUTORESEARCH_SEED'] == '43':\n"
           "        open(os.environ['PYTHONPATH'] + '/agent.py', 'a').write('#')\n")
    edit = rewrite(MODEL_LINE, f"{out}    return {{'bpb': 1.0}}", description="harm")
    with pytest.raises(agent.UserError, match="changed .*agent.py outside its folder"):
        llm(checkout, server, edit, confirm="always", rules=False)
    harm, again = checkout.record()[1:]
    assert harm.status == "discard" and (again.status, again.val_bpb) == ("verify", None)
    assert checkout.git("rev-parse", "HEAD") == checkout.git("rev-parse", "main")


def test_one_disturbed_run_of_the_best_changes_nothing(checkout, server, monkeypatch):
    path = checkout.root / "train.py"
    path.write_text(path.read_text().replace("BPB = None", f"BPB = {seeds(s42=1.05, s43=1.09, s44=1.05)}"))
    checkout.git("-c", "user.name=u", "-c", "user.email=u@u", "commit", "-qam", "noisy")
    checkout.session(experiments=1)
    speed, attempt = checkout.cache / "speed", agent.attempt

    def disturbed(s, text, id, number=0, seed=agent.SEED, test=False):
        speed.write_text("0.8" if seed == 43 else "1")
        return attempt(s, text, id, number, seed, test)

    monkeypatch.setattr(agent, "DRIFT_S", -5.0)
    monkeypatch.setattr(agent, "DRIFT_RUNS", 0)
    monkeypatch.setattr(agent, "attempt", disturbed)
    llm(checkout, server, scored(1.06), experiments=1)
    found = [(r.status, r.seed) for r in checkout.record()]
    assert found == [("keep", 42), ("verify", 43), ("verify", 44), ("discard", 42)]


def test_an_older_record_is_read(checkout, server):
    llm(checkout, server, scored(1.04))
    text = checkout.git("log", "-1", "--format=%B", checkout.record()[1].commit)
    older = "\n".join(line for line in text.splitlines() if not line.startswith(("Bar:", "Test-Bpb:")))
    assert older != text and agent.parse_message("c", "p", older).bar is None


def test_the_best_is_whole(noisy, server):
    noisy.session(experiments=1)
    data = noisy.cache / "toy"
    (data / "tokenizer.json").write_text('{"merges": []}')
    llm(noisy, server, scored(BEST_SCORES), experiments=1)
    best = noisy.root / "runs" / noisy.record()[0].tag / "best"
    assert (best / "tokenizer.json").read_text() == '{"merges": []}' and (best / "meta.json").exists()
    assert (best / "checkpoint.pt").exists() and "1.02" in (best / "train.py").read_text()
