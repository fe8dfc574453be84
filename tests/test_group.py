"""Who proposes, what the model is asked for, and repeats in other words: pytest tests/test_group.py"""

import os
import random
import re
from dataclasses import replace

import pytest
from conftest import ROOT
from test_belief import BASE, ROW, row
from test_loop import MODEL_LINE, llm, rewrite, scored

import agent

BRIEF = """# Brief

Lower the number.

## Role: architecture

Look at the blocks.

## Hints

All may read this.

## Role: optimizer
Look at the rates.
### A detail
of the optimizer
"""


def test_a_brief_is_taken_apart_into_what_all_read_and_the_roles():
    common, roles = agent.roles_of(BRIEF)
    assert common == "# Brief\n\nLower the number.\n\n## Hints\n\nAll may read this.\n\n"
    assert list(roles) == ["architecture", "optimizer"] and roles["architecture"] == "Look at the blocks."
    assert roles["optimizer"] == "Look at the rates.\n### A detail\nof the optimizer"
    assert agent.roles_of("# Brief\n") == ("# Brief\n", {})
    fenced = "## Role: a long name of a role that is cut\n```\n# no heading\n## Role: none\n```\nmore\n## Rest\n"
    text = "```\n# no heading\n## Role: none\n```\nmore"
    assert agent.roles_of(fenced) == ("## Rest\n", {"a long name of a role that is": text})


def turns(gain_of, count=120):
    """The roles of so many experiments in a row; gain_of: role -> what each of its experiments gains."""
    results = []
    for _ in range(count):
        role = agent.next_role(gain_of, results, [])
        status = "keep" if gain_of[role] else "discard"
        results.append(row(len(results) + 2, 1 - gain_of[role], role=role, status=status, bar=1.0))
    return [r.role for r in results]


def test_roles_take_turns_until_one_earns_more_and_none_is_starved():
    assert turns(dict(a=0, b=0, c=0), 9) == ["a", "b", "c"] * 3
    assert turns(dict(a=0.01, b=0, c=0), 6) == ["a", "b", "c"] * 2  # one success is no reason yet
    lately = turns(dict(a=0, b=0.003, c=0, d=0.001))[-40:]
    assert lately.count("b") > lately.count("d") > lately.count("a") >= 4 and lately.count("c") >= 4
    assert agent.next_role({}, [], []) == "generalist"


def test_a_role_whose_keep_was_a_little_worse_is_not_starved():
    """Shorter code may be kept at a small loss."""
    assert set(turns(dict(a=0.001, b=-0.0003, c=0))[-20:]) == {"a", "b", "c"}


def test_a_role_whose_replies_are_no_use_loses_its_turn():
    roles = dict(a="", b="")
    assert agent.next_role(roles, [], []) == "a" and agent.next_role(roles, [], ["a"]) == "b"


def test_each_request_shows_one_role_and_the_row_says_which(checkout, server):
    (checkout.root / "program.md").write_text(BRIEF)
    assert llm(checkout, server, scored(1.05), scored(1.2), scored(1.3)) == 0
    assert [row["role"] for row in checkout.rows()] == ["-", "architecture", "optimizer", "architecture"]
    first, second = server.asked(0), server.asked(1)
    assert "role this time: architecture\n\nLook at the blocks." in first and "Look at the rates" not in first
    assert "role this time: optimizer\n\nLook at the rates." in second and "Look at the blocks" not in second
    assert first.split("# The best")[0] == second.split("# The best")[0]  # the same prefix


def test_without_roles_there_is_a_generalist(checkout, server):
    assert llm(checkout, server, scored(1.05)) == 0
    assert checkout.rows()[1]["role"] == "generalist" and "role this time" not in server.asked(0)


def named(name, number="1.5"):
    line = MODEL_LINE.replace("return", f"{name} = {number}\n    return")
    return rewrite(MODEL_LINE, line, description=f"a number called {name}")


def test_a_repeat_in_other_words_is_refused_with_the_earlier_row(checkout, server):
    assert llm(checkout, server, named("width"), named("breadth"), named("breadth", 2.5), experiments=3) == 0
    assert [r.description for r in checkout.record()[1:]] == ["a number called width", "a number called breadth"]
    assert server.requests[2]["messages"][-1]["content"].startswith("But for names, or numbers within 2%, this repeats")
    assert re.search(r"0002 discard 1\.\d+ \+0\.000000 a number called width", server.asked(2))


def test_a_repeat_of_what_ran_while_it_was_asked_for_is_dropped(checkout, server):
    replies = named("width"), named("breadth"), named("depth", 2.5)
    assert llm(checkout, server, *replies, prefetch=True, experiments=3) == 0
    assert [r.description for r in checkout.record()[1:]] == ["a number called width", "a number called depth"]
    assert "this repeats an experiment on the same best" in server.asked(2)


BASE_TEXT = "import torch.nn.functional as F\nA = 0.9\ndef f(x):\n    return F.relu(x)\n"


@pytest.mark.parametrize("ours, theirs, near", [
    ("return F.relu(x)", "y = F.relu(x)\n    return y", False),
    ("y = F.relu(x)\n    return y", "z = F.relu(x)  # why\n    return z", True),
    ("return F.gelu(x)", "return F.silu(x)", False),
    ("return 0.05 * F.relu(x)", "return 0.0505 * F.relu(x)", True),
    ("return 0.05 * F.relu(x)", "return 0.06 * F.relu(x)", False),
    ("return 0.99 * F.relu(x)", "return 0.995 * F.relu(x)", False),
    ("return 100 * F.relu(x)", "return 101 * F.relu(x)", False),
    ("return 1e-3 * F.relu(x)", "return 0.001 * F.relu(x)", True),
    ("a = b = 2.0 * x\n    return F.relu(a)", "a = b = 2.0 * x\n    return F.relu(b)", False),
    ("eps = 0.5\n    return f(x, eps=eps)", "p = 0.5\n    return f(x, p=p)", False),
    ("return F.relu(x) + 1e309", "return F.relu(x) + 0.5", False),
])
def test_only_names_and_a_hairs_breadth_make_no_other_program(ours, theirs, near):
    texts = [BASE_TEXT.replace("return F.relu(x)", lines) for lines in (ours, theirs)]
    assert agent.is_near(*(agent.skeleton(text, BASE_TEXT) for text in texts)) == near


def night(*statuses):
    """A record: a baseline, then keeps and discards, each on the best before it; keep N gains N thousandths."""
    results, best = [BASE], BASE
    for i, status in enumerate(statuses, 2):
        val_bpb = best.val_bpb - 0.001 * i if status == "keep" else best.val_bpb + 0.0001 * i
        results.append(row(i, val_bpb, parent=best.commit, status=status, bar=best.val_bpb))
        best = results[-1] if status == "keep" else best
    return results, best


def test_the_lineage_is_the_keeps_that_led_to_the_best():
    results, best = night("keep", "discard", "keep", "discard")
    assert [r.id for r in agent.lineage(results, best)] == ["0004", "0002"]
    assert agent.lineage(results[:1], results[0]) == []


def test_tactics_come_in_turn_once_nothing_was_kept_for_long():
    enough = agent.STUCK_ROWS
    results, best = night("keep", "keep", "keep", *["discard"] * (enough - 1))
    assert agent.next_tactic(results, best) == ""
    for i in range(100, 105):
        results.append(row(i, 1.1, parent=best.commit, status="crash", tactic=agent.next_tactic(results, best) or None))
        results.append(row(200 + i, 1.1, parent=best.commit, status="discard", proposer="search"))  # as --proposer mix
    assert [r.tactic for r in results[-10::2]] == [None, "structure", "combine", "undo", "earlier"]
    far = [replace(r, val_bpb=r.bar + 0.1) if r.status == "discard" and r.bar else r for r in results]
    assert agent.near_misses(results, best) and not agent.near_misses(far, best)
    results, best = night(*["crash"] * (enough + 1))
    assert agent.next_tactic(results, best) == "structure"  # nothing else can be asked for
    assert agent.next_tactic([*results, row(99)], best) == ""


def test_a_stuck_session_asks_for_something_else_says_so_and_records_it(checkout, server, monkeypatch, capsys):
    monkeypatch.setattr(agent, "STUCK_ROWS", 2)
    script = [scored(v) for v in (1.05, 1.04, 1.03, 1.036, 1.037, 1.038, 1.039, 1.041, 1.042)]
    monkeypatch.setattr(agent, "notes_due", lambda s: False)  # tested below
    assert llm(checkout, server, *script) == 0
    assert [r.tactic for r in checkout.record()] == [None] * 6 + ["structure", "combine", "undo", "earlier"]
    out = capsys.readouterr().out
    assert "nothing was kept for 2 experiments: asking for a change of structure" in out
    assert "by blocks and not by SET lines alone" in server.asked(5)
    combine, undo, earlier = (server.asked(i).split("# Nothing was kept for long")[1] for i in (6, 7, 8))
    assert "score 1.036" in combine and "score 1.037" in combine and "score 1.038" not in combine
    assert "gained least" in undo and "score 1.05" in undo and "score 1.04" not in undo
    assert "Go back to experiment 0002" in earlier and "+BPB = 1.05" in earlier and "-BPB = 1.03" in earlier
    assert "Tactic: undo" in checkout.git("show", "-s", checkout.record()[8].commit)


def words(count):
    """Random words, so that nothing is like anything else."""
    return " ".join(RANDOM.choice("rate width depth decay momentum window batch head".split()) + str(RANDOM.random())
                    for _ in range(count))


RANDOM = random.Random(0)


def long_record(checkout, count):
    """A session that stands on a record of so many experiments, one in fifteen kept, with train.py as shipped."""
    s, _ = agent.opened(checkout.config(proposer="search"), agent.Screen())
    s.best = replace(ROW, id="0001", proposer="baseline", commit="c1")
    s.results, s.diffs["c1"] = [s.best], ""
    for i in range(2, count + 1):
        status = "keep" if i % 15 == 0 else "crash" if i % 10 == 0 else "discard"
        val_bpb = {"keep": 1.0 - i / 1e5, "crash": None, "discard": 1.001}[status]
        r = row(i, val_bpb, status=status, tag=s.config.tag, parent=s.best.commit, bar=1.0, description=words(3)[:80],
                reason="" if status != "crash" else words(5))
        s.results.append(r)
        s.next_id = i + 1
        s.diffs[r.commit] = "\n".join(f"{'-+'[k % 2]}    {words(3)}" for k in range(16 if i % 40 else 3000))
        s.best = r if status == "keep" else s.best
        keeps = [keep.commit for keep in agent.lineage(s.results, s.best)]
        s.diffs[" to ".join(keeps[:3:2])] = s.diffs[r.commit]  # from the best to an earlier one
        s.skeletons[r.commit] = []
        yield s, r


def test_a_long_record_makes_a_bounded_request_with_a_stable_prefix(checkout):
    """24,000 tokens, at four characters each, of which the greater part is as it was in the request before."""
    (checkout.root / "train.py").write_text((ROOT / "train.py").read_text())
    program, shares, before = (ROOT / "program.md").read_text(), [], ""
    for s, r in long_record(checkout, 300):
        s.text = (ROOT / "train.py").read_text()
        if int(r.id) < 190:
            continue
        if int(r.id) % agent.NOTES_ROWS == 0:
            (s.runs / r.id).mkdir(parents=True)
            for folder in (s.runs, s.runs / r.id):
                (folder / "notes.md").write_text("## Works\n" + "".join(f"- {words(10)}\n" for _ in range(40)))
        text = "".join(part["content"] for part in agent.request(s, agent.chosen(s, program)))
        same = next((i for i, (a, b) in enumerate(zip(before, text)) if a != b), len(before))
        shares += [same / len(text)] if s.results[-2].status != "keep" and r.status != "keep" else []
        before = text
    assert len(text) < 4 * 24_000 and f"{s.config.tag}/0002 discard" in text and s.results[-1].description in text
    assert sum(shares[1:]) / len(shares[1:]) > 0.9


# Notes

NOTES = """Here they are:

## Works
- lower is better
## Failed
- 1.2 by much
## Untested
- the middle
## Ideas
1. score the middle. Why: nobody did. Refuted if: it is higher
2. score the low end. Why: it pays. Refuted if: it does not
   by much
3. score the high end
"""


def test_notes_are_taken_apart():
    assert agent.ideas_of(NOTES)[0].startswith("score the middle. Why") and len(agent.ideas_of(NOTES)) == 3
    assert agent.ideas_of("## My ideas\n* **first**\n- second\nno item\n") == ["**first**", "second"]
    assert agent.ideas_of("1. an item under no heading\n## Works\n- one\n") == []
    nested = "# Ranked ideas\n### Short\n1. **Lion**\n   - Why: cheap\n2. SOAP\n## Failed ideas\n1. Adam\n## Ideas that failed\n- Adam\n"
    assert agent.ideas_of(nested) == ["**Lion**", "SOAP"] == agent.ideas_of("\ufeff" + nested)


@pytest.mark.parametrize("name, number", [
    ("2", 1), ("2. score the low end", 1), ("#1", 0), ("score the high end", 2), ("SCORE THE HIGH END", 2),
    ("2.5 times as wide", None), ("Idea #2", 1), ("No. 3 (it pays)", 2), ("4", None), ("0", None), ("n", None), ("none", None), ("", None),
    (None, None), ("score", None), ("2 layers deeper", None),
])
def test_a_reply_names_an_idea_by_number_or_by_words(name, number):
    found = agent.idea_named(name, NOTES)
    assert found == (None if number is None else agent.ideas_of(NOTES)[number])


def test_an_idea_leaves_the_list_with_the_lines_below_it_and_nothing_else_changes():
    gone = {agent.ideas_of(NOTES)[1], "lower is better"}
    assert agent.without_ideas(NOTES, gone) == re.sub(r"2\. score.*\n.*\n", "", NOTES)
    assert agent.without_ideas("## Ideas\r\n- a\r\n\r\n  b\r\n", {"a"}) == "## Ideas\r\n\r\n  b\r\n"
    nested = "## Ideas\n#1 aside\n1. **Lion**\n   - Why: cheap\n2. SOAP\n"
    assert agent.without_ideas(nested, {"**Lion**", "Why: cheap"}) == "## Ideas\n#1 aside\n2. SOAP\n"


def test_a_request_shows_ideas_numbered_and_long_notes_cut_by_their_longest_section():
    assert agent.shown_notes("## Ideas\n- a\n- b\n## Works\n- c\n", 1000) == "## Ideas\n1. a\n2. b\n\n## Works\n- c\n"
    shown = agent.shown_notes("## Works\n" + "- much\n" * 500 + "## Ideas\n1. one\n", 300)
    assert len(shown) <= 300 and shown.endswith("## Ideas\n1. one\n") and shown.count("much") > 20
    assert len(agent.shown_notes("x" * 10_000, 300)) <= 300 and agent.shown_notes("", 300) == ""
    assert agent.shown_notes("caf\udce9\n", 300) == "caf?\n"  # odd bytes stay in the file


def test_what_the_user_wrote_stays_and_what_was_taken_out_stays_out():
    mine = NOTES.replace("- 1.2 by much\n", "- 1.2 by much, and I know why\n").replace("1. score", "1. mine\n2. score")
    mine += "## Plans\nfrom the owner\n## No more rates, please\n"
    versions = [("", ""), (NOTES, mine)]
    added, gone = agent.edits_of_user(versions)
    assert added == {"1.2 by much, and I know why", "mine", "from the owner", "## Plans",
                     "## No more rates, please"} and gone == {"1.2 by much"}
    reply = "junk\n## Failed\n- 1.2 by much\n- 1.3\n## Ideas\n1. new\n"
    new = agent.merged_notes(reply, mine, added, gone)
    assert new == ("## Failed\n- 1.2 by much, and I know why\n- 1.3\n\n## Ideas\n1. mine\n2. new\n\n"
                   "## Plans\nfrom the owner\n\n## No more rates, please\n")
    long = "- " + 100 * "long and mine "
    kept = agent.merged_notes(f"## Works\n{long[:302]}\n", f"## Works\n{long}", {agent.line_key(long)}, set())
    comment = agent.merged_notes("## Ideas\n1. SOAP\n", "## Ideas\n1. mine\n2. SOAP\n   as I said\n",
                                 {"mine", "as I said"}, set())
    assert comment == "## Ideas\n   as I said\n1. mine\n2. SOAP\n"  # not below another
    assert agent.line_key("a" * 299 + " b") == "a" * 299   # as a trailer keeps it
    assert kept == f"## Works\n{long.strip()}\n"   # whole, though the model has shortened it
    versions += [(new, new)]  # the model has seen it, the user has not touched it: it is the user's still
    assert agent.edits_of_user(versions) == (added, gone)
    versions += [(new, new.replace("1. mine\n", ""))]  # the user takes it out again
    assert "mine" in agent.edits_of_user(versions)[1] and "mine" not in agent.edits_of_user(versions)[0]


def test_every_ten_experiments_the_model_writes_notes_and_tried_ideas_leave_them(checkout, server, monkeypatch, capsys):
    monkeypatch.setattr(agent, "NOTES_ROWS", 2)
    edited = []

    def third(body):
        path = next((checkout.root / "runs").glob("*/notes.md"))
        edited.append(path.read_text())
        mine = edited[0].replace("## Failed\n", "## Failed\n- ask me about 1.2\n")
        path.write_text(mine.replace("- the middle\n", ""))
        return scored(1.2).replace("EXPECTED", "IDEA: 2\nEXPECTED")

    again = NOTES.replace("lower is better", "lower is still better").replace("1.2 by", "1.2 and 1.3 by")
    again = again.replace("- the middle\n", "- the middle\n- the middle again\n")
    script = scored(1.05), scored(1.3), NOTES, third, scored(1.4), again, scored(1.5)
    assert llm(checkout, server, *script, experiments=6, tag="n") == 0
    assert [r.idea for r in checkout.record()] == [None] * 3 + [agent.ideas_of(NOTES)[1]] + [None] * 2
    requests = [server.asked(i) for i in range(len(script))]
    assert "# The notes" not in requests[2] and "## Works\n- what is known" in requests[2]
    shown = requests[3].split("# The notes on this research\n\n")[1].split("\n\n# ")[0]
    assert shown.startswith("## Works\n- lower") and "2. score the low end" in shown and "Here they are" not in shown
    assert "Take the idea of the notes" in requests[3]
    since = requests[4].split("# The experiments since these notes\n\n")[1].split("\n\n# ")[0]
    assert re.match(r"n/0004 +discard +1.2", since) and "\n" not in since
    assert "score the low end" in edited[0] and "2. score the low end" not in requests[4]
    assert requests[5].endswith("keep each as it is:\n\n- ask me about 1.2\n\n"
                                "These lines are out; do not say again what they say:\n\nthe middle")
    notes = (checkout.root / "runs/n/notes.md").read_text()
    assert "lower is still better" in notes and "- ask me about 1.2\n- 1.2 and 1.3 by much\n" in notes
    assert "## Untested\n- the middle again\n" in notes
    assert "score the low end" not in notes and "score the middle" in notes
    assert "ask me" in (checkout.root / "runs/n/0005/notes.before.md").read_text()
    out = capsys.readouterr().out
    assert "notes after 0003: 3 ideas; runs/n/notes.md" in out and "notes after 0005: 2 ideas" in out


def test_notes_that_are_none_change_nothing_and_are_not_asked_for_at_once(checkout, server, monkeypatch, capsys):
    monkeypatch.setattr(agent, "NOTES_ROWS", 2)
    folder = checkout.root / "runs/n"
    folder.mkdir(parents=True)
    (folder / "notes.md").write_text("remember the middle\n")
    script = scored(1.05), scored(1.3), "I cannot do that.", scored(1.4), scored(1.5)
    assert llm(checkout, server, *script, experiments=5, tag="n") == 0
    assert [r.description for r in checkout.record()[1:]] == [f"score {v}" for v in (1.05, 1.3, 1.4, 1.5)]
    assert "## Works\n- what is known" in server.asked(2)
    assert (folder / "notes.md").read_text() == "remember the middle\n"
    assert "remember the middle" in server.asked(0) and "no list of ideas" in capsys.readouterr().out


@pytest.mark.slow
def test_when_nothing_is_kept_for_long_there_are_notes_once(checkout, server, monkeypatch):
    monkeypatch.setattr(agent, "STUCK_ROWS", 2)
    notes = "```markdown\n" + re.sub("## (.*)", r"**\1**:", NOTES) + "```\n"   # as many a model writes
    script = scored(1.05), scored(1.3), scored(1.31), notes, scored(1.32), scored(1.33)
    assert llm(checkout, server, *script, experiments=6, tag="n") == 0
    assert "## Works\n- what is known" in server.asked(3)
    assert (checkout.root / "runs/n/notes.md").read_text().endswith("by much\n3. score the high end\n")
    assert [r.description for r in checkout.record()[1:]] == [f"score {v}" for v in (1.05, 1.3, 1.31, 1.32, 1.33)]


def test_a_failing_request_for_notes_does_not_stand_between_the_model_and_its_proposals(checkout, server, monkeypatch):
    monkeypatch.setattr(agent, "NOTES_ROWS", 2)
    timeout = (400, {"error": {"message": "the gateway does not wait that long"}})
    script = scored(1.05), scored(1.3), timeout
    assert llm(checkout, server, *script, experiments=4, tag="n") == 0
    assert (checkout.root / "runs/n/0003/notes.md").read_text() == ""
    assert llm(checkout, server, scored(1.4), experiments=1, tag="n") == 0
    assert [r.proposer for r in checkout.record()] == ["baseline", "llm", "llm", "search", "llm"]


def test_an_idea_that_runs_or_was_tried_under_another_name_is_not_offered_again(checkout, server):
    notes = checkout.root / "runs/n/notes.md"
    notes.parent.mkdir(parents=True)
    notes.write_text("## Ideas\n1. score 1.05\n2. score that again\n3. the third\n")
    replies = scored(1.05), scored(1.05), scored(1.3)
    script = [text.replace("EXPECTED", f"IDEA: {i}\nEXPECTED") for i, text in zip((1, 1, 1), replies)]
    assert llm(checkout, server, *script, experiments=3, prefetch=True, tag="n") == 0
    assert "1. score 1.05" in server.asked(0) and "1. score that again\n2. the third" in server.asked(1)
    assert [r.idea for r in checkout.record()] == [None, "score 1.05", "score that again"]
    assert notes.read_text() == "## Ideas\n3. the third\n"


@pytest.mark.slow
def test_odd_notes_do_not_end_a_night(checkout, server, monkeypatch):
    monkeypatch.setattr(agent, "NOTES_ROWS", 2)
    (checkout.root / "runs/n/notes.md").mkdir(parents=True)
    (checkout.root / "runs/n/0002.bak").mkdir()
    (checkout.root / "runs/n/0002.bak/notes.md").write_text("a copy\n")
    script = scored(1.05).replace("EXPECTED", "IDEA: 1\nEXPECTED"), scored(1.3), NOTES, scored(1.4)
    assert llm(checkout, server, *script, experiments=4, tag="n") == 0
    assert [r.status for r in checkout.record()] == ["keep", "keep", "discard", "discard"]
    assert (checkout.root / "runs/n/notes.md").is_dir() and (checkout.root / "runs/n/0003/notes.md").read_text() == ""


@pytest.mark.slow
def test_an_emptied_file_of_notes_is_a_word_of_the_user(checkout, server, monkeypatch):
    monkeypatch.setattr(agent, "NOTES_ROWS", 2)
    path = checkout.root / "runs/n/notes.md"

    def emptied(body):
        path.write_text("")
        return scored(1.4)

    again = NOTES.replace("the low end", "the very low end")
    script = scored(1.05), scored(1.3), NOTES, emptied, scored(1.5), again, scored(1.6)
    assert llm(checkout, server, *script, experiments=6, tag="n") == 0
    assert agent.ideas_of(path.read_text()) == ["score the very low end. Why: it pays. Refuted if: it does not"]
    assert "lower is better" not in path.read_text() and "lower is better" in server.asked(5)  # to be left out


@pytest.mark.slow
def test_notes_that_were_cut_off_between_their_two_files_are_finished(checkout, server, monkeypatch):
    monkeypatch.setattr(agent, "NOTES_ROWS", 2)
    folder = checkout.root / "runs/n"
    folder.mkdir(parents=True)
    (folder / "notes.md").write_text("mine\n")
    assert llm(checkout, server, scored(1.05), scored(1.3), NOTES, scored(1.4), experiments=4, tag="n") == 0
    whole = (folder / "notes.md").read_text()
    (folder / "notes.md").write_text("mine\n")  # by the user
    assert llm(checkout, server, scored(1.5), experiments=1, tag="n") == 0
    assert (folder / "notes.md").read_text() == "mine\n"
    os.utime(folder / "notes.md", (0, 0))  # the power went before it was written
    assert llm(checkout, server, "no notes", scored(1.6), experiments=1, tag="n") == 0
    assert (folder / "notes.md").read_text() == whole and whole.startswith("mine\n\n## Works\n- lower")


def test_notes_are_written_beside_a_run_where_proposals_are_asked_ahead(checkout, server, monkeypatch):
    monkeypatch.setattr(agent, "NOTES_ROWS", 2)
    script = scored(1.05), scored(1.3), scored(1.31), NOTES, scored(1.32), scored(1.33)
    assert llm(checkout, server, *script, experiments=6, prefetch=True, tag="n") == 0
    assert "score the middle" in server.asked(4) and (checkout.root / "runs/n/0003/notes.md").exists()
    assert [r.llm_tokens for r in checkout.record()] == [None, 100, 100, 100, 200, 100]

