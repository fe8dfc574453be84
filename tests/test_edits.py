"""Replies, edits and the guard: pytest tests/test_edits.py"""

import time

import pytest
from conftest import TOY, reply

import agent

TEXT = (TOY / "train.py").read_text()
BLOCK = "<<<<<<< SEARCH\n{}\n=======\n{}\n>>>>>>> REPLACE"


def edited(answer, text=TEXT, preset="cpu"):
    return agent.apply_edits(text, agent.parse_reply(answer).edits, preset)


def problem(answer, text=TEXT, preset="cpu"):
    with pytest.raises(agent.EditError) as error:
        edited(answer, text, preset)
    return str(error.value)


def test_fields_are_read():
    p = agent.parse_reply(
        "HYPOTHESIS: a higher rate\nlearns faster.\nEXPECTED: -0.0021 bpb\nDESCRIPTION: rate up\nSET RATE = 2.0\n"
    )
    assert (p.hypothesis, p.expected, p.description) == ("a higher rate learns faster.", -0.0021, "rate up")
    assert p.edits == (agent.Edit("set", "RATE", "2.0"),)


def test_fields_in_markdown_and_after_thinking():
    p = agent.parse_reply(
        "<think>SET RATE = 9\nDESCRIPTION: no</think>\n**HYPOTHESIS:** more\n**EXPECTED:** \u22120.01\n"
        "**DESCRIPTION:** rate\tup\n\n- `SET RATE = 2.0`\n"
    )
    assert (p.hypothesis, p.expected, p.description, p.edits[0].new) == ("more", -0.01, "rate up", "2.0")
    assert len(p.edits) == 1


def test_a_missing_description_is_made_of_the_edits():
    assert agent.parse_reply("SET RATE = 2.0").description == "RATE = 2.0"


def test_set_changes_the_value_and_nothing_else():
    new = edited(reply("SET RATE = 2.5"))
    assert new == TEXT.replace("RATE = 1.0  ", "RATE = 2.5  ")


def test_set_changes_the_active_presets_size_only():
    assert edited(reply("SET DEPTH = 6")) == TEXT.replace('"cpu": dict(DEPTH=4', '"cpu": dict(DEPTH=6')
    assert edited(reply("SET DEPTH = 6"), preset="mac") == TEXT.replace("DEPTH=8", "DEPTH=6")


def test_set_counts_characters_not_bytes():
    text = TEXT.replace('NOTE = "plain"', 'NOTE = "größer – ∞"; RATE2 = 1.0')
    assert 'NOTE = "größer – ∞"; RATE2 = 7' in edited(reply("SET RATE2 = 7"), text)


def test_set_drops_a_comment_but_keeps_a_hash_in_a_string():
    assert "RATE = 2.5      #" in edited(reply("SET RATE = 2.5  # faster"))
    assert 'NOTE = "a # b"  #' in edited(reply('SET NOTE = "a # b"'))


def test_set_of_an_unknown_name_teaches_the_near_ones():
    assert "Did you mean RATE" in problem(reply("SET RATES = 1"))


@pytest.mark.parametrize("value", ["2 * 3", "open('x')", "1 +", "x"])
def test_set_takes_plain_literals_only(value):
    assert "plain Python literal" in problem(reply(f"SET RATE = {value}"))


def test_block_replaces_exact_lines():
    new = edited(
        reply(
            BLOCK.format("    step = 0\n    while not data.expired():", "    step = 7\n    while not data.expired():")
        )
    )
    assert new == TEXT.replace("step = 0", "step = 7")


def test_block_inside_a_fence():
    assert "step = 7" in edited(reply("```python\n" + BLOCK.format("    step = 0", "    step = 7") + "\n```"))


def test_block_can_delete_lines():
    assert edited(reply("<<<<<<< SEARCH\n    step = 0\n=======\n>>>>>>> REPLACE")) == TEXT.replace("    step = 0\n", "")


def test_block_tolerates_white_space_at_line_ends():
    assert "step = 7" in edited(reply(BLOCK.format("    step = 0   ", "    step = 7")))
    assert "step = 7" in edited(
        reply(BLOCK.format("    step = 0", "    step = 7")), TEXT.replace("step = 0", "step = 0  ")
    )


def test_block_tolerates_another_common_indentation():
    block = BLOCK.format(
        "while not data.expired():\n    step += 1",
        "while not data.expired():\n    if step:\n        pass\n    step += 2",
    )
    new = edited(reply(block))
    assert "    while not data.expired():\n        if step:\n            pass\n        step += 2\n        print" in new


def test_a_block_indented_too_far_is_shifted_back():
    new = edited(
        reply(
            BLOCK.format(
                "        step = 0\n        while not data.expired():",
                "        step = 5\n        while not data.expired():",
            )
        )
    )
    assert new == TEXT.replace("step = 0", "step = 5")


def test_block_that_occurs_twice_is_refused_with_its_places():
    twice = TEXT + "\n\ndef other():\n    step = 0\n"
    assert "occur 2 times, at lines 25, 38" in problem(reply(BLOCK.format("    step = 0", "    step = 7")), twice)


def test_an_exact_match_wins_over_a_looser_one():
    text = TEXT + "\n\ndef other():\n  step = 0\n"
    assert edited(reply(BLOCK.format("    step = 0", "    step = 7")), text).count("step = 7") == 1


def test_missing_lines_come_back_with_the_nearest_and_with_what_applied():
    message = problem(reply("SET RATE = 2.0\n" + BLOCK.format("    step = 1\n    while not data.expired:", "    pass")))
    assert "edit 2 of 2" in message and "lines 25 to 26" in message and "while not data.expired():" in message
    assert "These did apply: SET RATE" in message


@pytest.mark.parametrize(
    "bad",
    [
        "<<<<<<< SEARCH\n    step = 0\n=======\n    step = 7\n",
        "<<<<<<< SEARCH\n    step = 0\n>>>>>>> REPLACE",
        "    step = 0\n=======\n    step = 7\n>>>>>>> REPLACE",
    ],
)
def test_a_broken_block_is_refused(bad):
    assert "not well formed" in problem(reply(bad))


def test_an_empty_search_is_refused():
    assert "SEARCH part is empty" in problem(reply("<<<<<<< SEARCH\n=======\nx = 1\n>>>>>>> REPLACE"))


def test_whole_file_in_a_fence():
    assert edited(reply(f"```python\n{TEXT}# more\n```")) == TEXT + "# more\n"


def test_a_replacement_that_cannot_be_shifted_comes_back():
    block = BLOCK.format(
        "        step = 0\n        while not data.expired():", "        step = 5\n    while not data.expired():"
    )
    assert "Copy the indentation exactly" in problem(reply(block))


def test_thinking_without_an_opening_tag_is_left_out():
    assert edited("SET RATE = 9\n</think>\n" + reply("SET RATE = 2.0")) == edited(reply("SET RATE = 2.0"))


@pytest.mark.parametrize("line", ["1. SET RATE = 2.0", "SET RATE: 2.0", "2) `SET RATE = 2.0`", "**SET RATE = 2.0**"])
def test_set_lines_in_other_dress(line):
    assert "RATE = 2.0 " in edited(reply(line))


@pytest.mark.parametrize(
    "edits, word",
    [
        ("SET RATE = 2.0\nSET RATE = 3.0", "Two SET lines"),
        ("SET RATE = 2.0\nSET DECAY higher", "not of the form"),
        (f"SET RATE = 2.0\n```python\n{TEXT}```", "whole file and other edits"),
        (f"```python\n{TEXT}```\n```python\n{TEXT}```", "two files"),
    ],
)
def test_ambiguous_replies_come_back(edits, word):
    assert word in problem(reply(edits))


@pytest.mark.parametrize("value", ["{[1]: 2}", "-" * 20_000 + "1", "(" * 5000])
def test_hostile_literals_come_back(value):
    assert "plain Python literal" in problem(reply(f"SET RATE = {value}"))


def test_a_form_feed_ends_no_line():
    text = TEXT.replace("DECAY = 0.2", "DECAY = 0.2  #\f")
    assert edited(reply("SET ROWS = 128"), text) == text.replace("ROWS = 64", "ROWS = 128")


def test_a_set_after_a_block_that_leaves_a_bracket_open_comes_back():
    assert "does not parse" in problem(reply(BLOCK.format("    step = 0", "    step = (0") + "\nSET RATE = 2.0"))


def test_long_replies_are_read_at_once():
    """A model stuck in a loop, and a long block that is nowhere."""
    began = time.monotonic()
    assert "not well formed" in problem(reply("<<<<<<< SEARCH\nx\n=======\ny\n" * 2000))
    problem(reply(BLOCK.format("\n".join(f"no such line {i}" for i in range(300)), "pass")), TEXT * 20)
    assert time.monotonic() - began < 20


def test_no_edit_is_refused():
    assert "no edit" in problem(reply("I would raise the rate."))


def test_edits_apply_in_the_order_of_the_reply():
    new = edited(
        reply(
            BLOCK.format("RATE = 1.0      # best at 3 [0.01, 100]", "RATE = 1.0      # x\nPACE = 3  # y")
            + "\nSET PACE = 4"
        )
    )
    assert "PACE = 4  # y" in new


def test_every_four_lines_can_be_replaced_and_put_back():
    """Any run of lines that occurs once can be replaced, and putting it back gives the file again."""
    lines = TEXT.split("\n")
    for i in range(len(lines) - 4):
        old = "\n".join(lines[i : i + 4])
        if TEXT.count(old) == 1 and old.strip("\n") == old:
            new = agent.apply_block(TEXT, old + "\n", "X = 1\n")
            assert new == TEXT.replace(old, "X = 1")
            assert agent.apply_block(new, "X = 1\n", old + "\n") == TEXT


# The guard


def refusal(text, base=TEXT, known=None):
    with pytest.raises(agent.EditError) as error:
        agent.guard(text, base, known or {})
    return str(error.value)


def test_guard_passes_a_change():
    agent.guard(TEXT.replace("RATE = 1.0", "RATE = 2.0"), TEXT, {})


def test_guard_refuses_a_change_of_docstrings_only():
    assert "changes nothing" in refusal(TEXT.replace('"""A torch-free', '"""Another torch-free'))


def test_guard_survives_an_endless_expression():
    assert "does not parse" in refusal(TEXT + "X = " + "(" * 3000 + "\n")


def test_guard_refuses_what_does_not_parse():
    assert "does not parse" in refusal(TEXT + "\ndef (:\n") and "line" in refusal(TEXT + "\ndef (:\n")
    assert "does not parse" in refusal(TEXT + "\0")


def test_guard_refuses_a_change_of_comments_only():
    assert "changes nothing" in refusal(TEXT.replace("# no number", "# still no number"))


def test_guard_quotes_the_experiment_that_a_text_repeats(checkout):
    checkout.session(experiments=2)
    first, second = checkout.record()
    known = {r.text_key: r for r in (first, second)}
    text = agent.file_at(checkout.config(), second.commit, "train.py")
    assert f"repeats experiment 0002 ({second.status}" in refusal(text + "# a comment\n", known=known)


@pytest.mark.parametrize(
    "old, new, word",
    [
        ("def build_model", "def build", "def build_model()"),
        ("prepare.finish(", "print(", ".finish()"),
        ("data.start(model)", "pass", ".start()"),
    ],
)
def test_guard_keeps_the_contract(old, new, word):
    assert word in refusal(TEXT.replace(old, new))


# Hyperparameter lines


def test_knobs_are_read_with_values_and_bounds():
    known = agent.knobs(TEXT, "cpu")
    assert {n: (k.value, k.low, k.high) for n, k in known.items()} == {
        "RATE": (1.0, 0.01, 100.0),
        "DECAY": (0.2, 0.0, 1.0),
        "ROWS": (64, 16.0, 1024.0),
        "NOTE": ("plain", None, None),
        "BPB": (None, None, None),
        "DEPTH": (4, 1.0, 12.0),
        "HEADS": (2, None, None),
    }
    for knob in known.values():
        assert repr(knob.value) in TEXT[slice(*knob.span)].replace('"', "'")
