"""The published suite on stand-in data in the hub's layout: shots, scores, and what is said of missing data."""

import json

import pytest
from lm_eval.api.model import LM

from nemo_minitron.cli.main import main
from nemo_minitron.config import EvaluateConfig
from nemo_minitron.errors import ConfigError, DataError
from nemo_minitron.evaluation import command as harness
from nemo_minitron.evaluation import custom_tasks as made
from nemo_minitron.evaluation import lm_eval_api, suite


def lines(folder, name: str, rows: list[dict]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    # Rows differ: examples that equal the question are not drawn.
    numbered = (json.dumps(row).replace("NUMBER", f"{name[:2]}{number}") for number, row in enumerate(rows))
    (folder / name).write_text("".join(f"{row}\n" for row in numbered))
    return name


def card(folder, configs: dict[str, dict[str, str]]) -> None:
    """The README that says which file is which split."""
    text = ["---", "configs:"]
    for name, files in configs.items():
        text += [f"- config_name: {name}", "  data_files:"]
        text += [line for split, file in files.items() for line in (f"  - split: {split}", f"    path: {file}")]
    (folder / "README.md").write_text("\n".join([*text, "---", ""]))


@pytest.fixture(scope="module")
def task_data(tmp_path_factory):
    """Every data set of the suite, with questions whose right answer says `right` (MMLU: B)."""
    root = tmp_path_factory.mktemp("task_data")
    folder = root / "Rowan" / "hellaswag"
    row = {"activity_label": "Tea", "ctx_a": "A cup stands there NUMBER.", "ctx_b": "someone",
           "endings": ["is wrong.", "is right.", "falls.", "sings."], "label": "1", "ind": 1, "split": "x",
           "split_type": "x", "source_id": "x", "ctx": "A cup"}  # fmt: skip
    files = {split: lines(folder, f"{split}.jsonl", [row] * 14) for split in ("train", "validation")}
    card(folder, {"default": files})
    folder = root / "allenai" / "winogrande"
    row = {"sentence": "The cup broke because _ fell NUMBER.", "option1": "right", "option2": "wrong", "answer": "1"}
    card(folder, {"winogrande_xl": {s: lines(folder, f"{s}.jsonl", [row] * 8) for s in ("train", "validation")}})
    folder = root / "allenai" / "ai2_arc"
    row = {"id": "1", "question": "Which NUMBER?", "choices": {"text": ["wrong", "right"], "label": ["A", "B"]},
           "answerKey": "B"}  # fmt: skip
    files = {split: lines(folder, f"{split}.jsonl", [row] * 30) for split in ("train", "validation", "test")}
    card(folder, {"ARC-Challenge": files})
    folder = root / "openai" / "gsm8k"
    row = {"question": "How many NUMBER?", "answer": "So many.\n#### 42"}
    card(folder, {"main": {split: lines(folder, f"{split}.jsonl", [row] * 8) for split in ("train", "test")}})
    folder = root / made.XLSUM / "english"
    row = {"id": "1", "url": "u", "title": "t", "text": "A long right text NUMBER.", "summary": "right summary"}
    for split in ("train", "test"):
        lines(folder, f"{split}.jsonl", [row] * 12)
    folder = root / made.HUMANEVAL
    row = {"task_id": "0", "prompt": "def double(x):\n", "canonical_solution": "    return 2 * x\n",
           "test": "def check(f):\n    assert f(2) == 4\n", "entry_point": "double"}  # fmt: skip
    card(folder, {"openai_humaneval": {"test": lines(folder, "test.jsonl", [row])}})
    return root


class Scripted(LM):
    """Likes what says `right`, writes what it is told to, and notes every prompt."""

    def __init__(self, written: str):
        super().__init__()
        self.written, self.prompts = written, []

    def loglikelihood(self, requests):
        self.prompts += [request.args for request in requests]
        asked = ["".join(request.args).split("\n\n")[-1] for request in requests]  # without the examples before it
        return [(0.0 if "right" in text else -9.0, False) for text in asked]

    def generate_until(self, requests):
        self.prompts += [request.args for request in requests]
        return [self.written] * len(requests)

    def loglikelihood_rolling(self, requests):
        raise AssertionError


def run(name: str, shots: int, data, written: str = ""):
    part = next(part for part in suite.SUITES["minitron"] if part.name == name)._replace(shots=shots)
    with made.own_cache():
        loaded = suite._load(part, str(data))
    model = Scripted(written)
    metrics, _ = harness.run_harness(model, loaded, EvaluateConfig(models=["-"], limit=2, allow_code=True))
    return metrics[name], model.prompts


@pytest.mark.parametrize(
    ("name", "shots", "mark", "written", "metric"),
    [
        ("hellaswag", 10, "Tea: A cup stands there", "", "acc"),
        ("winogrande", 5, "The cup broke because", "", "acc"),
        ("arc_challenge", 25, "Question:", "", "acc"),
        ("gsm8k", 5, "How many", "So many.\n#### 42", "exact_match (strict-match)"),
        ("xlsum_en", 3, "Article:", "right summary", "rougeL"),
        ("humaneval", 0, "def double", "    return x + x\n", "pass_at_1"),
    ],
)
def test_each_task_runs_with_its_shots_and_knows_right_from_wrong(task_data, name, shots, mark, written, metric):
    published = {part.name: part.shots for part in suite.SUITES["minitron"]}
    assert published[name] == shots
    metrics, prompts = run(name, shots, task_data, written)
    assert metrics[metric]["value"] == (100.0 if metric == "rougeL" else 1.0)
    assert all("".join(map(str, prompt)).count(mark) == shots + 1 for prompt in prompts), prompts[0]
    if shots:
        _, prompts = run(name, 0, task_data, written)
        assert all("".join(map(str, prompt)).count(mark) == 1 for prompt in prompts)


def test_cards_have_shots_for_mmlu_alone():
    shots = {part.name: part.shots for part in suite.SUITES["minitron_card"]}
    assert shots.pop("mmlu") == 5 and set(shots.values()) == {0}
    assert shots.keys() | {"mmlu"} == {part.name for part in suite.SUITES["minitron"]}


def test_mmlu_is_read_from_the_folder_for_all_its_subjects(tmp_path):
    """Two subjects stand for the 57: a group's tasks share one data set, whose place is theirs."""
    tags = ("stem", "other", "social_sciences", "humanities")
    named = [name for tag in tags for name in lm_eval_api.members(suite._index(), f"mmlu_{tag}_tasks")]
    subjects = sorted(name.removeprefix("mmlu_") for name in named)
    assert len(subjects) == 57
    assert set(lm_eval_api.data_sets(suite._index(), "mmlu")) == {"cais/mmlu"}
    folder = tmp_path / "cais" / "mmlu"
    row = {"question": "Which NUMBER?", "choices": ["w", "right", "w", "w"], "answer": 1, "subject": "x"}
    files = {split: lines(folder, f"{split}.jsonl", [row] * 6) for split in ("dev", "test")}
    card(folder, dict.fromkeys(subjects, files))
    with made.own_cache():
        loaded = suite._load(suite.Part("mmlu", 5, "cais/mmlu"), str(tmp_path))
    assert len(loaded["tasks"]) == 57 and "mmlu" in loaded["groups"]
    assert {task.config.num_fewshot for task in loaded["tasks"].values()} == {5}
    assert {task.config.dataset_path for task in loaded["tasks"].values()} == {str(folder)}


def test_code_that_fails_hangs_or_leaves_early_does_not_pass(monkeypatch):
    monkeypatch.setattr(made, "HUMANEVAL_SECONDS", 1)
    doc = {"prompt": "def double(x):\n", "test": "def check(f):\n    assert f(2) == 4\n", "entry_point": "double"}
    written = {"    return 2 * x\n": 1.0, "    return x\n": 0.0, "    while True: pass\n": 0.0, "    oops(\n": 0.0,
               "    raise SystemExit(0)\n": 0.0}  # fmt: skip
    assert {code: made.pass_at_1(doc, [code])["pass_at_1"] for code in written} == written


def test_the_suite_from_the_command_line(task_data, small_models, capsys):
    """All but MMLU and HumanEval, on a model that knows nothing."""
    tasks = "[hellaswag,winogrande,xlsum]"
    arguments = [str(small_models["llama2"]), f"tasks={tasks}", f"task_data={task_data}", "limit=2"]
    assert main(["evaluate", *arguments]) == 2
    assert "xlsum is not a task" in capsys.readouterr().err
    arguments[1] = "tasks=[hellaswag,winogrande]"
    assert main(["evaluate", *arguments, "num_fewshot=1"]) == 0
    said = capsys.readouterr().out
    assert "hellaswag acc_norm" in said and "winogrande acc" in said


def test_missing_data_is_named_all_at_once_with_the_commands_that_get_it(tmp_path, monkeypatch):
    for place in (None, str(tmp_path)):
        with pytest.raises(DataError) as error:
            suite.load_tasks(["minitron"], task_data=place, shots=None, allow_code=True)
        for part in suite.SUITES["minitron"]:
            assert f"hf download --repo-type dataset {part.dataset}" in str(error.value)
        assert f"--local-dir {place or 'DIR'}/cais/mmlu" in str(error.value)


def test_the_suite_leaves_out_code_that_nobody_allowed(task_data):
    parts, left_out = suite._parts(["minitron"], None, allow_code=False)
    assert "humaneval" not in [part.name for part in parts] and "allow_code=true" in left_out["humaneval"]
    with pytest.raises(ConfigError, match="allow_code=true"):
        part = next(part for part in suite.SUITES["minitron"] if part.name == "humaneval")
        with made.own_cache():
            loaded = suite._load(part, str(task_data))
        suite.refuse_code(loaded["tasks"])


def test_an_unknown_task_is_answered_with_the_nearest(small_models, capsys):
    assert main(["evaluate", str(small_models["llama2"]), "tasks=hellaswagg"]) == 2
    assert "did you mean hellaswag" in capsys.readouterr().err
    assert main(["evaluate", str(small_models["llama2"]), "tasks=perplexty"]) == 2
    assert "perplexity" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "models is missing"),
        (["/nowhere"], "/nowhere does not exist"),
        (["{llama2}", "{llama2}"], "twice"),
        (["{llama2}", "tasks=[]"], "tasks is empty"),
        (["{llama2}", "names=[a,b]"], "names has 2 entries for 1 models"),
        (["{llama2}", "task_data=/nowhere"], "task_data = /nowhere is not a folder"),
        (["{llama2}", "corpus=/nowhere"], "/nowhere does not exist"),
    ],
)
def test_bad_input_is_one_message(small_models, capsys, arguments, expected):
    given = [str(small_models["llama2"]) if argument == "{llama2}" else argument for argument in arguments]
    assert main(["evaluate", *given]) != 0
    said = capsys.readouterr()
    assert expected in said.err and not said.out and "Traceback" not in said.err
