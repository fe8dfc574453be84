"""The example tasks, and what else is no language model, through real sessions: pytest tests/test_tasks.py"""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, commit_all, llm, make_checkout, rewrite
from matplotlib.figure import Figure

import agent

TASKS = ROOT / "tests" / "tasks"
LAST = "    prepare.finish(best, steps=rounds)"
GRID = """    xy = [((i % 6 + 0.5) / 6, (i // 6 + 0.5) / 6) for i in range(26)]
    best, rounds = np.array([(x, y, {}) for x, y in xy]), 1"""
POINTS = """    best, rounds = np.array([(i % 4 * {}, i // 4) for i in range(16)]), 1"""


def of_task(name, tmp_path, folder):
    """A checkout of one of the tasks."""
    made = make_checkout(tmp_path / "task", folder.cache, TASKS / name)
    shutil.copy(TASKS / name / "program.md", made.root)
    commit_all(made)
    return made


CIRCLES = {  # never three in a row without a score, after which the best would run again
    "a grid of 26": (GRID.format("1 / 12"), "keep"),
    "overlapping": (GRID.format("1 / 11"), "invalid (circles overlap"),
    "not a number": (GRID.format("float('nan')"), "invalid (not finite"),
    "smaller ones": (GRID.format("1 / 13"), "discard"),
    "too few": (GRID.format("1 / 12").replace("(26)", "(25)"), "invalid (26 circles are asked for, not 25"),
    "no radius": (GRID.format("1 / 12").replace("(x, y, 1 / 12)", "(x, y)"), "invalid (wrong shape"),
    "smaller still": (GRID.format("1 / 14"), "discard"),
    "outside": (GRID.format("1 / 12").replace("(x, y,", "(x + 1, y,"), "invalid (a centre is outside"),
    "crash": ("    raise RuntimeError('no packing')", "crash (RuntimeError: no packing"),
}
DISTANCES = {
    "a grid": (POINTS.format("1.0"), "keep"),
    "one point twice": (POINTS.format("0.0"), "invalid (two points are equal"),
    "not a number": (POINTS.format("float('nan')"), "invalid (not finite"),
    "wider": (POINTS.format("1.5"), "discard"),
    "too few": (POINTS.format("1.0").replace("(16)", "(15)"), "invalid (16 points are asked for, not 15"),
    "three numbers": (POINTS.format("1.0").replace("// 4)", "// 4, 0)"), "invalid (wrong shape"),
    "wider still": (POINTS.format("1.6"), "discard"),
    "crash": ("    raise RuntimeError('no points')", "crash (RuntimeError: no points"),
}


@pytest.mark.parametrize("name, results, score", [("circles", CIRCLES, 26 / 12), ("distances", DISTANCES, 18.0)])
def test_a_geometric_task_is_judged_in_fractions_and_in_its_own_words(tmp_path, folder, server, name, results, score):
    checkout = of_task(name, tmp_path, folder)
    spoiled = re.sub(r"^(RATE|KICKED) = [\d.]+", r"\1 = 0.0", checkout.text(), flags=re.M)
    checkout.commit(spoiled)  # so that the first run finds little
    script = [rewrite(LAST, f"{new}\n{LAST}", description=what) for what, (new, _) in results.items()]
    assert llm(checkout, server, *script, tag="t", time_budget=0.05) == 0
    rows, metric = checkout.rows(), {"circles": "sum_of_radii", "distances": "squared_ratio"}[name]
    for row, (what, (_, outcome)) in zip(rows[1:], results.items(), strict=True):
        assert f"{row['status']} {row['description'].removeprefix(what).strip()}".startswith(outcome), row
    assert rows[0]["status"] == "keep" and float(rows[1][metric]) == pytest.approx(score, abs=1e-6)
    assert len(re.findall("i % [46]", checkout.text())) == 1
    assert metric in server.asked(0) and "bits per byte" not in server.asked(0)


def test_the_search_moves_a_tasks_constants_and_the_session_goes_on(tmp_path, folder):
    checkout = of_task("distances", tmp_path, folder)
    for rows in (3, 5):
        assert checkout.session(experiments=rows - (rows == 5) * 3, time_budget=0.05, tag="t") == 0
        assert [row["id"] for row in checkout.rows()] == [f"{i + 1:04d}" for i in range(rows)]
    for row in checkout.rows()[1:]:  # a commit says all moves, which the search reads again
        hypothesis = checkout.git("show", "-s", "--format=%B", row["commit"]).split("\n\n")[1]
        described = row["description"].partition(" (")[0].removesuffix(" [...]")
        assert " ".join(hypothesis.split()).startswith(f"Local search: {described}")
    knobs = agent.knobs(checkout.text(), "-")
    assert {row["description"].split()[0] for row in checkout.rows()[1:]} <= set(knobs) and len(knobs) > 6
    assert "counts no noise" in (report := (checkout.root / "runs" / "t" / "report.md").read_text())
    assert re.search(r"\| search \| 4 \|", report) and "better than the baseline" in report


EDGES = """class Edges(nn.Module):
    def forward(self, x):
        return (x[:, :, 1:] - x[:, :, :-1]).abs().mean(1).flatten(1)


def build_model():
    return nn.Sequential(Edges(), nn.Linear(prepare.SIZE * (prepare.SIZE - 1), prepare.CLASSES, bias=False))"""
SOLVE = """    steps, x = 1, model[0](data.images)
    wanted = x.T @ F.one_hot(data.labels, prepare.CLASSES).float()
    model[1].weight.data = torch.linalg.solve(x.T @ x + 100 * torch.eye(x.shape[1]), wanted).T.contiguous()"""


@pytest.fixture
def images(tmp_path, folder, patient):
    """A checkout of the task, with a fifth of the images."""
    checkout = of_task("images", tmp_path, folder)
    prepare = checkout.text("prepare.py").replace("zip((8000, 4000, 4000)", "zip((1600, 800, 800)")
    (checkout.root / "prepare.py").write_text(prepare)
    return checkout


OUTPUT = "self.head(x.amax((2, 3)))"


def test_images_are_scored_and_what_tells_them_by_their_place_is_invalid(images, server):
    line = next(line for line in images.text().splitlines() if OUTPUT in line)
    by_place = line.replace(OUTPUT, f"{OUTPUT} + torch.arange(len(x))[:, None] * torch.arange(10)")
    llm(images, server, rewrite(line, by_place), tag="t", time_budget=0.3, startup_s=60.0)
    found = [f"{row['status']} {row['description']}" for row in images.rows()]
    assert found[0] == "keep baseline" and float(images.rows()[0]["accuracy"]) > 0.05
    assert found[1].startswith("invalid an idea (log probabilities are not finite, or change by")


@pytest.mark.slow
def test_where_higher_is_better_a_noisy_gain_is_doubted_confirmed_and_drawn(images, server, monkeypatch):
    """The baseline always says 0; what learns is at once too good to be believed."""
    checkout = images
    checkout.commit(checkout.text().replace(OUTPUT, f"{OUTPUT} * 0"))
    learns = rewrite("def build_model():\n    return Net()", EDGES, description="learns")
    learns += rewrite("    steps = train(data, model)", SOLVE, description="").partition("DESCRIPTION: \n")[2]
    edges = "        return (x[:, :, 1:] - x[:, :, :-1]).abs().mean(1).flatten(1)"
    looks_around = rewrite(edges, f"        x = x - 9 * x.mean(0)\n{edges}", description="looks around")
    wanted, made = SOLVE.splitlines()[1], EDGES.splitlines()[-1]
    opposite = rewrite(wanted, f"{wanted} * -1", description="opposite")
    square = rewrite(made, f"{made[:-1]}, nn.Unflatten(1, (2, 5)))", description="square")
    crash = rewrite(SOLVE.splitlines()[0], "    raise RuntimeError('no step')", description="crash")
    seen, saved = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda it, path: (seen.append(it.axes[0].get_ylim()), saved(it, path)))
    how = {"tag": "t", "time_budget": 0.3, "startup_s": 60.0, "pictures": True}
    llm(checkout, server, learns, looks_around, opposite, square, crash, **how)
    assert checkout.session(experiments=1, **how) == 0  # goes on, with the search
    found = [f"{row['status']} {row['accuracy'][:4]} {row['description']}" for row in checkout.rows()]
    assert found[:2] == ["keep 0.10 baseline", "maybe 0.20 learns (too good to believe at once)"]
    assert found[2] == "verify 0.10 repeat of 0001 (to judge 0002 by)"
    assert found[3].startswith("keep 0.20 learns (confirms 0002; this run alone: 0.20")
    assert found[4].startswith("invalid 0.00 looks around (log probabilities are not finite, or change by")
    assert found[5].startswith("discard 0.0") and found[7] == "crash 0.00 crash (RuntimeError: no step)"
    assert found[6].startswith("invalid 0.00 square (wrong output: forward must return plain logits of shape (N, 10)")
    assert checkout.rows()[8]["proposer"] == "search" and found[8].startswith("discard 0.2")
    report = (checkout.root / "runs" / "t" / "report.md").read_text()
    assert re.search(r"\| tiny \| 5 \| 1 \| 1 \| 0\.2\d+ \| 0\.1\d+ \|", report) and "| search | 1 | 0 |" in report
    assert (checkout.root / "runs" / "t" / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert seen and all(0 < low < 0.1 and high > 0.2 for low, high in seen)  # nothing that is better is cut off


def test_a_task_in_a_folder_of_any_repository_has_rows_tag_and_data_of_its_own(checkout):
    place = shutil.copytree(TASKS / "circles", checkout.root / "tasks" / "circles")
    (checkout.root / ".gitignore").unlink()
    commit_all(checkout)
    search = ("--task", "tasks/circles", "--proposer", "search", "--experiments")
    done = checkout.run(*search, "2")
    assert done.returncode == 0, done
    tag = checkout.git("symbolic-ref", "--short", "HEAD").removeprefix("autoresearch/")
    lines = (place / "results.tsv").read_text().splitlines()
    assert tag.startswith("circles-") and lines[0].split("\t")[1] == "sum_of_radii" and len(lines) == 3
    assert checkout.rows() == [] and not (checkout.root / "runs").exists()
    assert checkout.git("status", "--porcelain") == "?? tasks/circles/results.tsv"
    assert set(checkout.git("log", "--format=", "--name-only", "main..HEAD").split()) <= {"tasks/circles/train.py"}
    assert checkout.run(*search, "1").returncode == 0 and len((place / "results.tsv").read_text().splitlines()) == 4
    for how in "--status", "--report":
        assert f"autoresearch/{tag}" in checkout.run(how, "--task", "tasks/circles").stdout
    assert "circles" not in checkout.run("--status").stderr  # the folder of agent.py has no rows yet
    refused = checkout.run("--proposer", "search", "--sandbox", "off")
    assert refused.returncode == 2 and "is of another task" in refused.stderr
    checkout.git("checkout", "-q", "main")
    done = checkout.run("--proposer", "search", "--sandbox", "off", "--experiments", "1", "--tag", "toy")
    (row,) = checkout.rows()
    assert done.returncode == 0 and row["tag"] == "toy" and "val_bpb" in row


BAD_TASKS = {
    "no brief": ("program.md", None, "has no program.md: a task is a folder with"),
    "not prepared": ("prepare.py", "raise SystemExit('no data')", "the data could not be prepared"),
    "no metric": ("prepare.py", ("sum_of_radii", ""), "has no valid metric"),
    "a wrong kind": ("prepare.py", ('"noise": 0.0', '"noise": "none"'), "has no valid noise"),
    "not a number": ("prepare.py", ('"noise": 0.0', '"noise": math.nan'), "has no valid noise"),
    "no val": ("prepare.py", ('"judged": {"val": []}', '"judged": {"test": []}'), "has no valid judged"),
    "no such file": ("prepare.py", ('"handed": []', '"handed": ["x"]'), "has no valid handed"),
    "half a range": ("prepare.py", ("[0.0, 13.0]", "[0.0, None]"), "has no valid plausible"),
}


@pytest.mark.parametrize("what", BAD_TASKS)
def test_a_folder_that_is_no_task_is_one_line(checkout, what):
    name, change, words = BAD_TASKS[what]
    place = shutil.copytree(TASKS / "circles", checkout.root / "tasks" / "circles")
    text = (place / name).read_text()
    (place / name).write_text(text.replace(*change) if isinstance(change, tuple) else change or "")
    if change is None:
        (place / name).unlink()
    commit_all(checkout)
    done = checkout.run("--task", str(place), "--proposer", "search")
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, done
    assert checkout.git("status", "--porcelain") == ""


def test_the_metric_alone_describes_a_task_a_changed_judge_another_and_an_implausible_score_none(checkout):
    place = shutil.copytree(TASKS / "circles", checkout.root / "tasks" / "circles")
    judge = re.sub(r'    meta \|= \{"(metric|noise).*\n', "", (place / "prepare.py").read_text())
    judge = judge.replace('    meta |= {"required": [', '    meta = {"metric": "sum_of_radii", "noise": 0}  # [')
    (place / "prepare.py").write_text(judge)
    commit_all(checkout)
    args = ("--task", str(place), "--sandbox", "off", "--proposer", "search", "--experiments", "1", "--tag")
    assert (done := checkout.run(*args, "a")).returncode == 0 and "sum_of_radii (lower is better)" in done.stdout
    assert "300 s" not in done.stdout and "counts no noise" in done.stdout
    (place / "prepare.py").write_text(judge.replace('"noise": 0}', '"noise": 0, "plausible": [5, 9]}'))
    checkout.git("checkout", "-q", "main")
    done = checkout.run(*args, "b")
    assert done.returncode == 2 and re.search(r"crash .*scoring: no score between 5 and 9", done.stdout)
    done = checkout.run(*args[:-3], "--verify")
    assert done.returncode == 2 and "counts no noise: there is nothing to verify" in done.stderr


@pytest.mark.parametrize("name, most", [("circles", 250), ("distances", 200), ("images", None)])
def test_an_example_is_short_and_keeps_the_rules_that_its_brief_states(name, most, tmp_path):
    lengths = {file: len((TASKS / name / file).read_text().splitlines()) for file in ("prepare.py", "train.py")}
    assert lengths["prepare.py"] <= 120 and lengths["train.py"] <= 150
    text = (TASKS / name / "train.py").read_text()
    task = agent.Task(Path(), "score", required=("main", "load", "start", "finish"))
    task = task if most is None else replace(task, max_digits=most)
    assert not agent.faults_of(text, task.required, task.max_digits)
    if most is not None:
        assert f"more than {most}, which any table" in (TASKS / name / "program.md").read_text()
        for table in [round(i / 71, 2) for i in range(52)], "0" * most, [10**i for i in range(30)]:
            with pytest.raises(agent.EditError, match=f"over {most} digits in literals are a result"):
                agent.guard(f"{text}KNOWN = {table!r}\n", text, {}, task)
