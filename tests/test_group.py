"""Who proposes, what the model is asked for, and repeats in other words: pytest tests/test_group.py"""

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
        r = row(i, val_bpb, status=status, tag="one", parent=s.best.commit, bar=1.0, description=words(3)[:80],
                reason="" if status != "crash" else words(5))
        s.results.append(r)
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
        text = "".join(part["content"] for part in agent.request(s, agent.chosen(s, program)))
        same = next((i for i, (a, b) in enumerate(zip(before, text)) if a != b), len(before))
        shares += [same / len(text)] if s.results[-2].status != "keep" and r.status != "keep" else []
        before = text
    assert len(text) < 4 * 24_000 and "one/0002 discard" in text and s.results[-1].description in text
    assert sum(shares[1:]) / len(shares[1:]) > 0.9
