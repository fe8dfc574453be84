"""Replies, edits, hyperparameters, the search's steps, when two programs are one: pytest tests/test_edits.py"""

import math
import random
import re
import time
from pathlib import Path

import pytest
from conftest import TOY, reply

import agent

TEXT = (TOY / "train.py").read_text()
TASK = agent.Task(Path(), "val_bpb", preset="cpu", required=tuple("build_model main load start finish".split()))
RATE_2 = agent.Edit("set", "RATE", "2.0")
STEP = "<<<<<<< SEARCH\n    step = 0\n=======\n    step = 7\n>>>>>>> REPLACE"


def block(old, new):
    return STEP.replace("    step = 0", old).replace("    step = 7", new)


def edited(edits, text=TEXT, preset="cpu"):
    return agent.apply_edits(text, agent.parse_reply(reply(edits)).edits, preset)


def problem(edits, text=TEXT):
    with pytest.raises(agent.EditError) as error:
        edited(edits, text)
    return str(error.value)


FIELDS = {
    "plain": "HYPOTHESIS: more\nrate.\nEXPECTED: -0.002 bpb\nDESCRIPTION: rate up\nSET RATE = 2.0",
    "bold": "**HYPOTHESIS:** more rate.\n**EXPECTED:** \u22120.002\n**DESCRIPTION:** rate up\n\n- `SET RATE = 2.0`",
    "small letters, Windows": "Hypothesis: more rate.\r\nExpected: -2e-3\r\nDescription: rate up\r\nSET RATE = 2.0\r\n",
    "headings": "## Hypothesis\nmore rate.\n\n## Expected\n-0.002\n\n## Description\nrate up\n\nSET RATE = 2.0",
    "bold headings": "**Hypothesis**\nmore rate.\n**Expected**\n-0.002\n## **Description**\nrate up\n\nSET RATE = 2.0",
    "a list": "1. HYPOTHESIS: more rate.\n2. **Expected**: -0.002\n- DESCRIPTION: rate up\n- SET RATE = 2.0",
    "a named file": "HYPOTHESIS: more rate.\nEXPECTED: -0.002\nDESCRIPTION: rate up\nFile: train.py\n\nSET RATE = 2.0",
}


@pytest.mark.parametrize("text", FIELDS.values(), ids=FIELDS)
def test_fields_are_read_in_whatever_dress(text):
    found = agent.parse_reply(text)
    assert (found.hypothesis, found.expected, found.description) == ("more rate.", -0.002, "rate up")
    assert found.edits == (RATE_2,)


def test_a_description_has_80_characters_no_file_name_and_is_made_of_the_edits_where_it_is_missing():
    assert agent.parse_reply("SET RATE = 2.0").description == "RATE = 2.0"
    assert len(agent.parse_reply(reply("SET RATE = 2.0", description="x" * 200)).description) == 80
    assert agent.parse_reply(f"DESCRIPTION: step 7\ntrain.py\n{STEP}").description == "step 7"
    found = agent.parse_reply("**DESCRIPTION:** more. SET RATE = 2.0\n")  # an edit on its line is one
    assert (found.description, found.edits) == ("more.", (RATE_2,))
    for told in "another RATE = 2.0", "RATE = 2.0.\n":  # also without the word, where nothing else is said
        found = agent.parse_reply(f"HYPOTHESIS: h\nDESCRIPTION: {told}")
        assert (found.description, found.edits) == (told.strip(".\n"), (RATE_2,))
    for told in "no RATE = 2.0", "RATE = 2.0, DECAY = 0.3", "use RATE = 2.0\n\n    x = f(x)":
        with pytest.raises(agent.EditError):
            agent.parse_reply(f"HYPOTHESIS: h\nDESCRIPTION: {told}")
    found = agent.parse_reply(f"DESCRIPTION: steps in place of SET RATE = 2.0\n{STEP}")  # beside another a mention
    assert [edit.kind for edit in found.edits] == ["block"] and found.description.endswith("RATE = 2.0")
    told = TEXT.replace("    step = 0", "    # DESCRIPTION: use SET RATE = 2.0\n    step = 0")
    assert edited(f"```python\n{told}```") == told


NAMES = ("think", "THINK", "thinking", "thought", "reasoning", "seed:think")
THOUGHTS = [f"<{name}>Perhaps\nSET DECAY = 0.9\nDESCRIPTION: no\n</{name}>\n" for name in NAMES]
THOUGHTS += ["[THINK] SET DECAY = 0.9 [/THINK]\n", "[think]SET DECAY = 0.9[/think]\n", f"<think>\n{STEP}\n</think>\n"]
THOUGHTS += ["Perhaps\nSET DECAY = 0.9\n</think>\n", "Perhaps\nSET DECAY = 0.9\nno, better:</think>"]  # so a template
THOUGHTS += [f"{a}think{b}\nSET DECAY = 0.9\n{a}/think{b}\n" for a, b in (("\u25c1", "\u25b7"), ("&lt;", "&gt;"))]
THOUGHTS += ["<scratchpad>SET DECAY = 0.9</scratchpad>", "<|begin_of_thought|>SET DECAY = 0.9\n<|end_of_thought|>\n"]
THOUGHTS += ["<|channel|>analysis<|message|>SET DECAY = 0.9\n<|end|><|start|>assistant<|channel|>final<|message|>"]
THOUGHTS += ["<|channel>thought\nSET DECAY = 0.9\n<channel|>"]


@pytest.mark.parametrize("thought", THOUGHTS)
def test_thoughts_are_never_edits(thought):
    before = agent.parse_reply(thought + reply("SET RATE = 2.0"))
    within = agent.parse_reply("DESCRIPTION: an idea\n" * (thought[0] in "<[") + thought + "SET RATE = 2.0")
    assert before.edits == within.edits == (RATE_2,) and before.description == "an idea"
    assert within.description == ("an idea" if thought[0] in "<[" else "RATE = 2.0")


def test_a_mere_mention_of_a_thought_is_none_and_a_reply_of_thoughts_alone_is_empty():
    told = agent.parse_reply(reply("SET RATE = 2.0", hypothesis="The <think> mark that ends </think> a reply."))
    assert told.edits == (RATE_2,) and told.hypothesis.endswith("ends </think> a reply.")
    assert "TAG = '</think>'" in edited(block("    step = 0", "    step = 0\n    TAG = '</think>'"))
    lines = "    step = 0  # <think> opens\n    TAG = '<|bos|>'  # </think> ends"
    marked = TEXT.replace("    step = 0", lines)
    assert edited(f"```python\n{marked}```") == edited(block("    step = 0", lines)) == marked
    within = f"Well, <think>perhaps\nSET DECAY = 0.9\n{STEP}\n</think> so:\n{reply('SET RATE = 2.0')}"
    assert agent.parse_reply(within).edits == (RATE_2,)
    for text in ("", " \n", "<think>SET RATE = 2.0</think>", "<think>Perhaps\n" + reply("SET RATE = 2.0")):
        with pytest.raises(agent.EditError, match="The reply was empty"):
            agent.parse_reply(text)


def test_set_changes_the_value_and_nothing_else():
    assert edited("SET RATE = 2.5") == TEXT.replace("RATE = 1.0  ", "RATE = 2.5  ")
    assert edited("SET DEPTH = 6") == TEXT.replace('"cpu": dict(DEPTH=4', '"cpu": dict(DEPTH=6')
    assert edited("SET DEPTH = 6", preset="mac") == TEXT.replace("DEPTH=8", "DEPTH=6")
    text = TEXT.replace('"plain"', '"größer – ∞"').replace("DECAY = 0.2", "DECAY = 0.2  #\f")
    assert edited("SET ROWS = 128", text) == text.replace("ROWS = 64", "ROWS = 128")
    assert 'NOTE = "a # b"  #' in edited('SET NOTE = "a # b"  # why')


def test_white_space_at_line_ends_and_common_indentation_do_not_matter():
    assert edited(block("    step = 0   ", "    step = 7")) == TEXT.replace("step = 0", "step = 7")
    assert "step = 7" in edited(STEP, TEXT.replace("step = 0", "step = 0  "))
    one, two = (f"while not data.expired():\n    step += {n}" for n in (1, 2))
    assert "    while not data.expired():\n        step += 2\n        print" in edited(block(one, two))
    froms = ((0, " " * 8), (5, " " * 8), (5, "  "))
    old, new, odd = (f"        step = {n}\n{blank}while not data.expired():" for n, blank in froms)
    assert edited(block(old, new)) == TEXT.replace("step = 0", "step = 5")
    assert "Copy the indentation exactly" in problem(block(old, odd))
    assert edited("<<<<<<< SEARCH\n    step = 0\n=======\n>>>>>>> REPLACE") == TEXT.replace("    step = 0\n", "")


def test_lines_that_are_missing_or_occur_twice_come_back_with_their_places_and_with_what_applied():
    message = problem("SET RATE = 2.0\n" + block("    step = 1\n    while not data.expired:", "    pass"))
    assert "edit 2 of 2" in message and "These did apply: SET RATE" in message
    line = int(re.search(r"nearest are lines (\d+) to", message)[1])
    assert "\n".join(TEXT.split("\n")[line - 1 : line + 1]) in message and "    while not data.expired():" in message
    places = TEXT[: TEXT.index("    step = 0")].count("\n") + 1, TEXT.count("\n") + 4
    twice = TEXT + "\n\ndef f():\n    step = 0\n"
    assert "occur 2 times, at lines {}, {}.".format(*places) in problem(STEP, twice)
    assert edited(STEP, TEXT + "\n\ndef f():\n  step = 0\n").count("step = 7") == 1  # an exact match is preferred


RATE_SET, STEP_SET = TEXT.replace("RATE = 1.0 ", "RATE = 2.0 "), TEXT.replace("step = 0", "step = 7")
LINE = 'NOTE = "plain"  # no number'
UNDERSTOOD = [
    *((line, RATE_SET) for line in ("1. SET RATE = 2.0", "SET RATE: 2.0", "2) `SET RATE = 2.0`", "**SET RATE = 2.0**")),
    *((line, RATE_SET) for line in ("SET `RATE` = `2.0`", "SET RATE = **2.0**", "SET RATE = 2")),
    ("SET RATE = 2_0e-1", RATE_SET.replace("2.0 ", "2_0e-1 ")),
    *((dress.format(STEP), STEP_SET) for dress in ("{}", "train.py\n{}", "```\n{}\n```", "```python:x.py\n{}\n```")),
    *((f"```{first}\n{STEP}\n```", STEP_SET) for first in ("diff", "python\n# more", "\nsrc/train.py", "\ntrain.py:")),
    *((f"```{more}\n{TEXT}#\n```", TEXT + "#\n") for more in ("", "python", " python train.py", "python:train.py")),
    *((f"{fence}\n{TEXT}#\n{fence}", TEXT + "#\n") for fence in ("````", "~~~")),
    (block(LINE, "PACE = 3  # y") + "\nSET PACE = 4", TEXT.replace(LINE, "PACE = 4  # y")),
]


@pytest.mark.parametrize("edits, text", UNDERSTOOD, ids=range(len(UNDERSTOOD)))
def test_edits_are_understood_in_other_dress_and_applied_in_their_order(edits, text):
    assert edited(edits) == text


OTHER_FORMS = {
    "small letters": STEP.replace("SEARCH", "search").replace("REPLACE", "replace"),
    "four signs": "<<<< SEARCH\n    step = 0\n====\n    step = 7\n>>>> REPLACE",
    "ten signs": f"{'<' * 10} SEARCH\n    step = 0\n{'=' * 10}\n    step = 7\n{'>' * 10} REPLACE",
    "original and updated": STEP.replace("SEARCH", "ORIGINAL").replace("REPLACE", "UPDATED"),
    "dashes and plusses": "------- SEARCH\n    step = 0\n=======\n    step = 7\n+++++++ REPLACE",
    "a unified diff": "```diff\n--- a/train.py\n+++ b/train.py\n@@ -1,2 +1,2 @@\n-    step = 0\n+    step = 7\n```",
    "a short diff": "```diff\n-    step = 0\n+    step = 7\n```",
    "quoted": "".join(f"> {line}\n" for line in STEP.splitlines()),
    "HTML": STEP.replace("<", "&lt;").replace(">", "&gt;"),
    "no end": "<<<<<<< SEARCH\n    step = 0\n=======\n    step = 7\n",
    "a patch": "*** Begin Patch\n-    step = 0\n+    step = 7\n*** End Patch",
    "a conflict": STEP.replace("SEARCH", "HEAD").replace("REPLACE", "mine"),
    "three signs": "<<<SEARCH\n    step = 0\n===",
    "bold labels": "**Before:**\n    x = 1\n\n**After:**\n    x = 2",
}
OTHER_FORMS |= {"no middle": STEP.replace("=======\n    step = 7\n", ""), "no start": STEP.partition("\n")[2]}
OTHER_FORMS |= {"tags": "<search>\n    step = 0\n</search>", "find": "FIND:\n    step = 0\nREPLACE WITH:\n    step = 7"}
OTHER_FORMS |= {"no SET": "DECAY = 0.3", "a list": "- DECAY: 0.2 -> 0.3", "bold": "**DECAY**: 0.3"}
OTHER_FORMS |= {"no value": "SET DECAY higher", "set in small letters": "set DECAY = 0.3"}
OTHER_FORMS |= {"a text": 'NOTE = "fancy"', "an arrow": "DECAY 0.2 \u2192 0.3", "signs": "```\n- step = 0\n```"}
OTHER_FORMS |= {"a snippet": "```python\nrows = 7\n```", "headings": "### Old\nx = 1\n### New\nx = 2"}
OTHER_FORMS |= {f"SET after {d!r}": f"{d}DECAY = 0.3" for d in ("**SET** ", "+ SET ", "\u2022 SET ", "Edit: SET ")}
OTHER_FORMS |= {f"after {words!r}": f"{words} SET DECAY = 0.3" for words in ("- **Edit 1:**", "(2)", "a)", "Also")}
OTHER_FORMS |= {"another arrow": "DECAY \u2190 0.3", "from to": "Change DECAY from 0.2 to 0.3", "small": "decay = 0.3"}
OTHER_FORMS |= {"bare labels": "SEARCH\n    x = f(1)\nREPLACE\n    x = f(2)", "a plus": "+    x = norm(x)"}
OTHER_FORMS |= {"a minus": "-    x = norm(x)", "a minus and a plus": "- DECAY = 0.2\n+ DECAY = 0.3"}
OTHER_FORMS |= {"a tool": "<tool_call>\nstep = 7\n</tool_call>", "labels": "OLD:\n    step = 0\nNEW:\n    step = 7"}
OTHER_FORMS |= {"a table": "| DECAY | 0.2 | 0.3 |"}
OTHER_FORMS |= {"in a list": "1. change:\n   ```python\n   rows = 7\n   ```", "bare": "-    step = 0\n+    step = 7"}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_an_edit_in_another_form_is_understood_or_goes_back_whole(form):
    second, plain = OTHER_FORMS[form], STEP if "step" in OTHER_FORMS[form] else "SET DECAY = 0.3"
    try:
        assert edited(f"SET RATE = 2.0\n{second}\n") == edited(f"SET RATE = 2.0\n{plain}")
    except agent.EditError as error:
        words = [" ".join(line.strip("> `").split())[:12] for line in second.splitlines()]
        assert any(word and word in str(error) for word in words), error  # it says what was not understood


PROSE = ["TOTAL_BATCH 2048 to 1024 gives more.", "RMS 1.0 scale", "MLP 4x is wide", "* RATE 0.03 was worse"]
PROSE += ["1. Plan A is too costly.\n2. Plan B is good.", "-    steps rise", "with", "Description of change: more"]
PROSE += ["RISK: 0.3", "CONFIDENCE: 70%", "Raising RATE from 1.0 to 2.0 gives faster progress."]
PROSE += ["- `RATE`: 1.0 \u2192 2.0", "Also SET RATE = 2.0 as said", "RATE = 2.0"]  # the same edit, in words
PROSE += ["| name | old | new |\n| --- | --- | --- |\n| RATE | 1.0 | 2.0 |", "We also set RATE to 2.0 (see above)."]
PROSE += [
    "x = (B, T, C) here",
    "Return to 0.75 if it is worse (see 0012)",
    "| Peak GPU memory | 4.1 GB |",
    "Or not, if this fails.",
]
PROSE += ["Best so far:\nval_bpb = 0.9812", "- costs memory\n+ faster", "SET RATE = 2.0"]  # the last: again the same


@pytest.mark.parametrize("line", PROSE)
def test_prose_that_looks_like_an_edit_is_none(line):
    assert edited(f"SET RATE = 2.0\n{line}\n") == RATE_SET
    wrapped = f"HYPOTHESIS: after\nDECAY = 0.3 and\nset too low, Change DECAY from 0.2 to 0.3\nit is\n- {line}\nDESCRIPTION: d\n"
    if "SET" not in line:  # which ends what is told
        assert agent.parse_reply(f"{wrapped}SET RATE = 2.0").edits == (RATE_2,)


@pytest.mark.parametrize("told", [": SET RATE = 2.0", ":\nRATE 1.0 -> 2.0", "\nRaise RATE from 1.0 to 2.0"])
def test_a_description_may_say_the_edit_in_words_but_no_other(told):
    begun = f"HYPOTHESIS: it is\nRATE = 1.0\n\nEXPECTED: -1\n## DESCRIPTION{told}\nSET RATE = "
    assert agent.parse_reply(f"{begun}2.0  # twice").edits[0][:2] == RATE_2[:2]
    with pytest.raises(agent.EditError):
        agent.parse_reply(f"{begun}3.0")


MORE = ["DECAY = 0.3  # goes with RATE 2.0", "- DECAY: 0.2 -> 0.3 (RATE is 2.0)", "RATE = 2.0, DECAY = 0.5"]
MORE += ["Also SET RATE = 2.0 and SET DECAY = 0.3", "RATE: 2.0 -> 3.0", "RATE = 3.0  # not 2.0"]
MORE += ["-    x = RATE * 2.0\n+    x = RATE * f(t)"]


@pytest.mark.parametrize("line", MORE)
def test_what_names_the_edit_and_changes_more_goes_back(line):
    assert "This is no edit" in problem(f"SET RATE = 2.0\n{line}\n")


HARD = ["small letters", "dashes and plusses", "HTML", "a unified diff", "a tool", "SET after '**SET** '", "bare"]
HARD += ["SET after 'Edit: SET '", "a minus and a plus"]


@pytest.mark.parametrize("form", HARD)
def test_an_edit_between_hypothesis_and_description_is_not_dropped(form):
    with pytest.raises(agent.EditError):
        agent.parse_reply(f"HYPOTHESIS: a\n{OTHER_FORMS[form]}\nEXPECTED: -1\nDESCRIPTION: x\nSET RATE = 2.0")


REFUSED = {f"SET RATE = {v}": "plain Python literal" for v in ("2 * 3", "open('x')", "x", "{[1]: 2}", "(" * 5000)}
REFUSED |= {f"SET RATE = {v}": "RATE is a number, 1.0" for v in ("65,536", "'2.0'", "None", "[2.0]", "True", "1e999")}
REFUSED |= {f"SET ROWS = {v}": "ROWS is a whole number, 64" for v in ("64.5", "128.0", "True")}
REFUSED |= {
    "SET NOTE = 5": "of another kind, 'plain'",
    "Variant A\nSET RATE = 2.0\nVariant B\nSET ROWS = 128": "alternatives",
    "First option: x\nSET RATE = 2.0\nSecond option: y\nSET ROWS = 128": "alternatives",
    "SET RATE = " + "-" * 20_000 + "1": "plain Python literal",
    "SET RATE = 2.0\nSET RATE = 3.0": "two values for one",
    f"SET RATE = 2.0\n```python\n{TEXT}```": "whole file beside other edits",
    f"```python\n{TEXT}```\n```python\n{TEXT}```": "whole file beside other edits",
    "Option A: slower\nSET RATE = 0.5\n\nOption B: less\nSET DECAY = 0.1": "alternatives",
    f"**Option 1**\n{STEP}\n\n### Alternative 2\nSET DECAY = 0.1": "alternatives",
    "<<<<<<< SEARCH\n=======\nx = 1\n>>>>>>> REPLACE": "SEARCH part is empty",
    "Proposal #1\nSET RATE = 0.5\nProposal #2\nSET DECAY = 0.1": "alternatives",
    "SET RATE = 0.5\n" + reply("SET DECAY = 0.1"): "alternatives",
    "<<<<<<< SEARCH\nexact lines of train.py\n=======\nnew lines\n>>>>>>> REPLACE": "the form, not an edit",
    "I would raise the rate.": "The reply has no edit",
    "SET RATES = 1": "Did you mean RATE",
    "SET NAME = value": "not an edit",
    "A LINE: SET RATE = 0.5": "should be: SET RATE = 0.5",
    "SET RATE = 2.0\nIf it diverges, instead:\nSET ROWS = 32": "opens another experiment",
    "SET RATE = 2.0\n**Alternative:**\nSET ROWS = 32": "opens another experiment",
    block("    step = 0", "    # ... rest unchanged ..."): "'# ... rest unchanged ...' stands for lines",
    f"```python\nimport torch\n# rest of the file as it is\n{TEXT[TEXT.index('def build') :]}```": "Write every line",
}


@pytest.mark.parametrize("edits", REFUSED, ids=range(len(REFUSED)))
def test_what_is_ambiguous_or_no_plain_literal_of_the_same_kind_goes_back(edits):
    assert REFUSED[edits] in problem(edits)


@pytest.mark.parametrize(
    "draft", ["SET DECAY = 0.3\nNo, 0012 was that.\n", f"{STEP}\nBetter:\n", "HYPOTHESIS: not\nSET DECAY = 0.3\n"]
)
def test_a_draft_before_the_reply_is_not_applied_with_it_and_a_block_may_be_told_in_words(draft):
    with pytest.raises(agent.EditError, match="before and after DESCRIPTION"):
        agent.parse_reply(f"{draft}\nDescription: faster\nSET RATE = 2.0")
    told = block("RATE = 1.0  # best at 3 [0.01, 100]", "RATE = 2.0  # more") + "\n\n- RATE: 1.0 \u2192 2.0\n"
    assert "RATE = 2.0  # more" in edited(told) and "This is no edit" in problem(told.replace("2.0\n", "3.0\n"))


def test_a_long_reply_is_read_at_once():
    began = time.monotonic()
    problem("<<<<<<< SEARCH\nx\n=======\ny\n" * 2000)  # a model stuck in a loop
    problem("<think>" * 5000 + "DESCRIPTION: " * 5000)
    assert "mostly blank" in problem("SET RATE = 2.0" + "\n" * 100_000 + "x")
    problem("\n\n> " * 6000)
    for cell in "| LLL ", "| A_LONG_NAME ", "also RATE to ", "or if ", "# rest ":
        problem(cell * 8000)
        agent.parse_reply(f"SET RATE = 2.0\n{cell.strip('|') * 8000}")
    problem(block("\n".join(f"no such line {i}" for i in range(300)), "pass"), TEXT * 20)
    assert time.monotonic() - began < 20


def test_hyperparameters_are_read_with_values_and_bounds():
    found = agent.knobs(TEXT, "cpu")
    assert list(found) == ["RATE", "DECAY", "ROWS", "NOTE", "BPB", "DEPTH", "HEADS"]
    assert found["DEPTH"][1:4] == (4, 1, 12) and found["NOTE"][1:4] == ("plain", None, None)
    assert all(TEXT[slice(*k.span)].replace('"', "'") == repr(k.value) for k in found.values())
    assert agent.knobs(TEXT, "mac")["DEPTH"].value == 8 and "DEPTH" not in agent.knobs(TEXT, "datacenter")


def searched(text, key, tried=None, rows=(), task=TASK):
    found = agent.search_proposal(text, key, tried or {}, task, rows)
    return found, agent.apply_edits(text, found.edits, "cpu")


def test_the_same_key_gives_the_same_step_in_every_version():
    assert searched(TEXT, "nov21/0002")[0].description == "DECAY 0.2 -> 0.289"
    assert searched(TEXT, "t/0003")[0].description == "DECAY 0.2 -> 0.133, RATE 1.0 -> 0.616"


BOUNDS = {"0.999": (0.9, 0.9999), "1e-10": (1e-12, 1e-6), "0.0": (0, 0.1), "1": (1, 3), "0.95": (0.9, 0.99)}
BOUNDS |= {"-0.5": (-1, 0), "2": (1, 4), "1.0": (0.01, 100), "1.00": (0, 1)}


@pytest.mark.parametrize("old", BOUNDS)
def test_the_search_moves_one_to_three_bounded_numbers_within_their_bounds_and_types(old):
    rates, (low, high) = set(), BOUNDS[old]
    text = TEXT.replace("RATE = 1.0  # best at 3 [0.01, 100]", f"RATE = {old}  # [{low}, {high}]")
    for i in range(60):
        found, changed = searched(text, f"k{i}")
        new = agent.knobs(changed, "cpu")
        assert 1 <= len(found.edits) <= 3 and {e.old for e in found.edits} <= {"RATE", "DECAY", "ROWS", "DEPTH"}
        assert low <= new["RATE"].value <= high and type(new["RATE"].value) is type(eval(old)) and changed != text
        decay, rows, depth = (new[name].value for name in ("DECAY", "ROWS", "DEPTH"))
        assert 0 <= decay <= 1 and rows in (32, 64, 128) and depth in range(1, 13)
        rates.add(new["RATE"].value)
    assert len(rates) > 1


def of_search(moves, score, **changes):
    """A row of the search's, which had to beat 1.0; no score: a crash."""
    return agent.Row("", f"Local search: {moves}", bar=1.0, score=score, **changes)


def share_moved(*rows, task=TASK, old="1.0", bounds="[0.01, 100]"):
    """How many of 100 proposals after these rows lower RATE by more than a tenth of its odds, and how many raise it."""
    text = TEXT.replace("RATE = 1.0  # best at 3 [0.01, 100]", f"RATE = {old}  # {bounds}")
    rates = [agent.knobs(searched(text, f"k{i}", {}, rows, task)[1], "cpu")["RATE"] for i in range(100)]
    moves = [agent.position(rate, rate.value) - agent.position(rate, float(old)) for rate in rates]
    return sum(move < -0.15 for move in moves), sum(move > 0.15 for move in moves)


def test_the_search_goes_on_where_it_gained_turns_where_it_lost_and_stays_where_both_ways_lose():
    other = of_search("DECAY 0.2 -> 0.21, DEPTH 4 -> 5", 0.9999)
    down, up = share_moved(of_search("RATE 1.0 -> 1.5", 0.99), other)
    assert up > 80 and down < 5
    down, up = share_moved(of_search("RATE 1.0 -> 1.5", 1.01), other)
    assert down > 60 and up < 5
    higher = agent.replace(TASK, lower_is_better=False)
    down, up = share_moved(of_search("RATE 1.0 -> 1.5", 1.01), agent.replace(other, score=1.0001), task=higher)
    assert up > 80 and down < 5
    down, up = share_moved(of_search("RATE 0.998 -> 0.999", 0.99), other, old="0.999", bounds="[0, 1]")
    assert up > 40 and down < 5
    both = of_search("RATE 1.0 -> 1.5", 1.01), of_search("RATE 1.0 -> 0.7", 1.01)
    assert sum(share_moved(*both, other)) < 20 < sum(share_moved(other))


def test_the_search_learns_from_what_it_moved_itself_and_odd_rows_harm_nothing():
    blind = share_moved()
    for changes in ({"proposer": "peer"}, {"proposer": "llm"}, {"hypothesis": "RATE 1.0 -> 1.5"}):
        assert share_moved(agent.replace(of_search("RATE 1.0 -> 1.5", 0.9), **changes)) == blind
    odd = ["", "RATE", "RATE 1.0 -> x", "GONE 1 -> 2", "RATE - -> e", "RATE 1.7e308+1.7e308j -> 1"]
    odd += ["RATE 1e-999 -> 1e999", "RATE 1 -> " + "9" * 400]
    rows = [of_search(text, score) for text in odd for score in (0.9, 1e99, None)]
    assert searched(TEXT, "k", {}, rows)[0].edits
    crashed = share_moved(of_search("RATE 1.0 -> 1.5, DECAY 0.2 -> 0.3", None), of_search("DEPTH 4 -> 5", 1.001))
    assert 0 < crashed[1] < crashed[0] < 60  # an innocent one is not nailed to the other side


def test_the_search_does_not_run_dry_where_there_is_more_to_try():
    for left, least in ({"RATE"}, 60), ({"DEPTH"}, 8), ({"RATE", "DEPTH"}, 120):
        text, rows, tried = re.sub(r"^(RATE|DECAY|ROWS) = (\S+) .*", r"\1 = \2", TEXT, flags=re.M), [], {}
        text = text.replace("RATE = 1.0", "RATE = 1.0  # [0.01, 100]") if "RATE" in left else text
        text = text if "DEPTH" in left else text.replace("# DEPTH: best at 6 [1, 12]", "# DEPTH: no bounds")
        for i in range(least):  # everything loses
            row, new = searched(text, f"k{i}", tried, tuple(rows), agent.replace(TASK, noise=0.0))
            assert {edit.old for edit in row.edits} <= left
            assert agent.program_key(new) not in tried
            tried[agent.program_key(new)] = row
            rows.append(agent.replace(row, score=1.0 + len(row.edits) * 0.01, bar=1.0))
    with pytest.raises(agent.UserError, match="no untried step"):
        searched("def build_model(): prepare.load\ndef main(): start, finish\n", "t/1")


def test_the_search_finds_what_is_wrong_among_many():
    task, idle = agent.replace(TASK, noise=0.05), "".join(f"IDLE_{i} = 1.0  # nothing [0.1, 10]\n" for i in range(20))
    for trial in range(5):
        text, rows, best = TEXT.replace("RATE = 1.0", f"{idle}RATE = 1.0"), [], math.log2(3)
        for i in range(40):
            row, new = searched(text, f"{trial}/{i}", {}, rows, task)
            score = abs(math.log2(agent.knobs(new, "cpu")["RATE"].value / 3)) + random.Random(i).gauss(0, task.noise)
            rows.append(agent.replace(row, score=score, bar=best))
            text, best = (new, score) if score < best else (text, best)
        assert 2 < agent.knobs(text, "cpu")["RATE"].value < 4.5, trial


SAME = {"RATE = 1.0 ": "RATE = 1.01 ", "DECAY = 0.2 ": "DECAY = 0.2  # more ", '"""A torch-free': '"""Another'}
SAME |= {"step = 0": "step  =  (0)", '"plain"': "'plain'"}
OTHER = {"RATE = 1.0 ": "RATE = 1.1 ", "RATE = 1.0": "RATE = 0.99", "ROWS = 64": "ROWS = 65", '"plain"': "'fancy'"}


def test_a_program_is_the_same_but_for_comments_layout_and_a_hairs_breadth():
    for old, new in [*SAME.items(), *OTHER.items()]:
        is_same = agent.program_key(TEXT) == agent.program_key(TEXT.replace(old, new))
        assert TEXT.count(old) == 1 and is_same == (SAME.get(old) == new), new
    keys = [agent.program_key(f"A = {a}") for a in (0.95, 0.9501, 0.99, 0.995, 0.999)]  # near 1, what it lacks
    assert keys[0] == keys[1] and len(set(keys)) == 4
