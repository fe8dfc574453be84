"""How far a number can be believed: doubt, verdicts, the best, the verified sentence: pytest tests/test_belief.py"""

import json
import random
from dataclasses import fields, replace
from pathlib import Path

import pytest

import agent

TASK = agent.Task(Path(), "val_bpb", noise=0.001)
HIGHER = replace(TASK, lower_is_better=False)
PLAIN = {f.name: {"str": "-", "int": 42, "float": 1.0}.get(f.type) for f in fields(agent.Row)}
PLAIN |= dict.fromkeys(("reason", "held", "conditions", "repeats"), "")
PLAIN |= {"tag": "t", "status": "discard", "proposer": "llm", "session": "tonight"}


def row(number, score=1.0, **more):
    """A row with a score, of a program of its own unless `text` says otherwise."""
    own = {"id": f"{number:04d}", "commit": f"c{number}", "text": f"t{number}", "score": score}
    return agent.Row(**{**PLAIN, **own, **more})


def again(of, number, score, seed=43, **more):
    """Another run of a row's program: a repeat, by its seed a verification, by its status a confirmation."""
    return row(number, score, **{"text": of.text, "seed": seed, "status": "verify", "repeats": of.id, **more})


def state(*rows, task=TASK):
    return agent.State(task, "tip", "root", rows, rows, rows)


def judged(st, score, confirm="never", of=None, shorter=False):
    return st.verdict(confirm, agent.Job("confirmation" if of else "candidate", of=of), score, shorter)


BASE = row(1, status="keep", proposer="baseline")


def test_a_program_is_worth_the_mean_of_its_honest_runs_without_the_verification_s():
    st = state(BASE, row(2, 0.9), again(BASE, 3, 1.2), again(BASE, 4, None, 44), again(BASE, 5, 2.0, 101))
    assert st.means == {"t1": pytest.approx(1.1), "t2": 0.9} and st.bar == st.means["t1"]
    assert st.noise.repeats == 2  # but its spread is as good as any


def test_noise_is_the_prior_until_repeats_outweigh_it():
    rng, rows = random.Random(1), []
    assert state(BASE, row(2, 0.9)).noise == (0.001, 0)
    assert 0.001 < state(BASE, again(BASE, 2, 1.003)).noise.sd < 0.002
    for i in range(2, 802, 2):
        rows += [first := row(i, rng.gauss(1, 0.003)), again(first, i + 1, rng.gauss(1, 0.003))]
    assert state(*rows).noise == (pytest.approx(0.003, rel=0.1), 400)


# When a run is in doubt


@pytest.mark.parametrize("confirm", ["always", "auto", "never"])
@pytest.mark.parametrize("task, score", [(TASK, 0.949), (HIGHER, 1.051)])
def test_a_gain_over_5_percent_is_in_doubt_under_every_confirm_where_there_is_noise(confirm, task, score):
    assert judged(state(BASE, task=task), score, confirm) == ("maybe", agent.TOO_GOOD)
    assert judged(state(BASE, task=task), 1 + (score - 1) * 0.97) == ("keep", "")
    exact = replace(task, noise=0.0)  # then nothing is in doubt
    found = [judged(state(*after(0), task=exact), s, confirm, shorter=True)[0] for s in (score, 1.0, 2 - score)]
    assert found == ["keep", "discard", "discard"]


def after(keeps, count=36):
    """A baseline and so many candidates, the first of them kept, without a gain."""
    return BASE, *(row(i, 1.0, status="keep" if i < 2 + keeps else "discard") for i in range(2, 2 + count))


@pytest.mark.parametrize("task, sign", [(TASK, 1), (HIGHER, -1)])
def test_what_must_run_on_a_second_seed(task, sign):
    def doubt(confirm, keeps, gain, shorter=False):
        return state(*after(keeps), task=task).verdict(confirm, agent.Job("candidate"), 1 - sign * gain, shorter)[1]

    assert doubt("auto", 2, 0.0005) == "keeps are rare" and doubt("never", 2, 0.0005) == ""
    assert doubt("always", 9, 0.0005) and not doubt("always", 9, 0.0)  # a tie gains nothing
    for gain in (0.0, -0.0005):  # no worse than by the noise of a difference
        assert "shorter" in doubt("auto", 9, gain, True) and "shorter" in doubt("always", 9, gain, True)
        assert doubt("never", 9, gain, True) == doubt("auto", 9, gain) == doubt("auto", 9, -0.002, True) == ""


def test_keeps_are_rare_by_the_last_verdicts_of_36_candidates():
    def rare(*rows):
        return state(*rows).verdict("auto", agent.Job("candidate"), 0.96, False)[1] == "keeps are rare"

    maybe, repeat = row(38, status="maybe"), again(row(2), 39, 1.0)
    assert rare(*after(2)) and not rare(*after(3)) and not rare(*after(0, 35))
    assert not rare(*after(3), repeat) and not rare(*after(0, 35), repeat)  # it is no candidate
    assert rare(*after(2), maybe) and rare(*after(2), maybe, again(maybe, 39, 1.0, status="discard"))
    assert not rare(*after(2)[:-1], maybe, again(maybe, 39, 1.0, status="keep"))


@pytest.mark.parametrize("task, better", [(TASK, -1), (HIGHER, 1)])
def test_a_keep_is_strictly_better_than_the_mean_of_the_best(task, better):
    st = state(BASE, again(BASE, 2, 1.01), again(BASE, 3, 9.0, 102), task=task)
    assert judged(st, 1.005 + better * 1e-6) == ("keep", "")
    assert judged(st, 1.005) == ("discard", "") == judged(st, 1.005 - better * 1e-6)
    assert agent.State(task).verdict("always", agent.Job("baseline"), 5.0, False) == ("keep", "")
    for kind in ("repeat", "verification"):
        job = agent.Job(kind, row=agent.Row("again", reason="it is time"))
        assert st.verdict("always", job, 0.1, False) == ("verify", "it is time")


CONFIRMATIONS = [(0.01, -0.003, "keep"), (0.01, -0.01, "discard"), (-0.0005, 0.001, "keep")]  # then a tie; shorter
CONFIRMATIONS += [(0.1, 0.0, "discard"), (0.1, 0.1, "keep")]  # the first too good to count; the second believed


@pytest.mark.parametrize("task, sign", [(TASK, 1), (HIGHER, -1)])
@pytest.mark.parametrize("first, second, status", CONFIRMATIONS)
def test_a_confirmation_is_judged_by_means_and_alone_after_a_gain_too_good(task, sign, first, second, status):
    rows, first, second = (BASE, again(BASE, 2, 1.0)), 1 - sign * first, 1 - sign * second
    why = judged(state(*rows, task=task), first, "always", shorter=True)[1]
    doubtful = row(3, first, status="maybe", reason=why)
    mean = second if why == agent.TOO_GOOD else (first + second) / 2
    found, reason = judged(state(*rows, doubtful, task=task), second, "always", of=doubtful)
    assert found == status and "confirms 0003" in reason and f"{mean:.6f}, the best's 1.000000" in reason
    st = state(*rows, doubtful, again(doubtful, 4, second, status=status, reason=reason), task=task)
    assert st.means["t3"] == pytest.approx(mean) and st.best is (st.rows[-1] if status == "keep" else BASE)


@pytest.mark.parametrize("task, sign", [(TASK, 1), (HIGHER, -1)])
def test_the_best_is_the_keep_of_the_best_mean_of_equals_the_newest(task, sign):
    first, second = (row(i, 1 - sign * 0.01 * i, status="keep") for i in (2, 3))
    rows = BASE, first, second, row(4, 1 - sign * 0.02), row(5, 1 - sign * 0.04, status="maybe")
    assert state(task=task).best is None and state(*rows, task=task).best is second
    assert state(*rows, again(second, 6, 1 + sign * 0.03), task=task).best is first  # it was luck: back
    assert state(*rows, again(second, 6, 1 + sign * 0.03, 101), task=task).best is second
    assert state(*rows, equal := row(7, second.score, status="keep"), task=task).best is equal


# The verified sentence


def night(gain=0.02, seen=0.03, seeds=(101, 102, 103), sign=1, uneven=0.0):
    """A baseline, a best that the search saw `seen` better, and runs of both on fresh seeds, `gain` better."""
    rows = [BASE, row(2, 1 - sign * seen, status="keep")]
    for i, seed in enumerate(seeds):
        for of, value in ((rows[1], 1 - sign * gain + 0.001 * (i - 1)), (BASE, 1 + 0.001 * (i - 1))):
            blocks = [value / 20 + uneven * (i % 2 - 0.5) * (of is BASE) for i in range(20)]
            held = dict.fromkeys(("val", "test"), blocks)
            rows.append(again(of, len(rows) + 1, value, seed, held=json.dumps(held)))
    return rows


@pytest.mark.parametrize("task, sign", [(TASK, 1), (HIGHER, -1)])
def test_the_sentence_says_what_fresh_seeds_show_and_how_much_of_what_the_search_saw_was_luck(task, sign):
    def says(gain, seen):
        start = "On 3 fresh seeds and test data that the search never used, "
        return state(*night(gain, seen, sign=sign), task=task).verified()[1].removeprefix(start)

    shown = "0.0200 (95 % interval 0.0177 to 0.0223)"  # Student, 4 degrees of freedom
    whole = f"val_bpb is better by {shown}; on the data that it used, by {shown}. The search had seen 0.0300: 0.0100"
    assert says(0.02, 0.03) == f"{whole} of it was luck."
    assert says(0.02, 0.015).startswith("val_bpb is better") and says(0.02, 0.015).endswith(": 0.0000 of it was luck.")
    assert says(0.0001, 0.004).startswith("no gain is shown") and "0.0039 of it was luck." in says(0.0001, 0.004)
    assert says(-0.01, 0.004).startswith("it is worse") and "0.0040 of it was luck." in says(-0.01, 0.004)


def test_only_pairs_of_one_session_count_and_two_of_them_at_least():
    def says(*rows):
        return state(*rows).verified()[1][:16]

    *two, base = night(seeds=(101, 103))
    late = [replace(r, session="tomorrow") for r in (two[-1], base)]
    assert says(BASE) == says(*two[:-1]) == says(*two, late[1]) == ""
    assert says(*two, base, row(9, 0.9, status="keep")) == ""  # the best is another by now
    assert says(*two, base) == says(*two, *late) == says(*night()[:-1], again(BASE, 8, None, 103)) == "On 2 fresh seeds"


def test_quiet_repeats_narrow_the_interval_and_uneven_text_widens_it():
    def high(*rows):
        return state(*rows).verified()[0]["test"].high

    chosen = [again(row(i), 10 * i + seed, 1.0, seed) for i in range(10, 30) for seed in (42, 44)]
    quiet = [replace(r, seed=r.seed + 1) for r in chosen]
    assert high(*night(), *chosen) == high(*night())  # by what ran on seed 42 the search chose
    assert high(*night(), *quiet) < high(*night()) < high(*night(uneven=0.1)) - 0.005


def test_the_interval_covers_seeds_and_text_in_95_of_100_nights():
    rng, covered = random.Random(3), 0
    for _ in range(1000):
        text = [rng.gauss(0.001, 0.0002) for _ in range(20)]  # of a gain of 0.02, what each block of this text shows
        off = [[rng.gauss(0, 0.001) / 20 for _ in range(3)] for _ in range(2)]
        best, base = ([[0.05 - x * used + seed for x in text] for seed in off[used]] for used in (1, 0))
        gain = agent.gain_of(best, base, [])
        covered += gain.low <= 0.02 <= gain.high
    assert 930 <= covered <= 970
