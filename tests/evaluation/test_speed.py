"""Speed, size and memory, side by side."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import models
from nemo_minitron.cli.main import main
from nemo_minitron.config import BenchmarkConfig
from nemo_minitron.evaluation.speed import Runner


def test_a_deep_model_is_slower_and_larger_and_ratios_are_to_the_first(small_models, tmp_path, capsys):
    deep = models.save("nemo-14487", torch.float32, tmp_path / "deep")
    output = tmp_path / "out"
    given = [str(small_models["nemo2"]), str(deep), "names=[shallow,deep]", f"output={output}"]
    assert main(["benchmark", *given, "rounds=3", "warmup_rounds=1"]) == 0
    table = capsys.readouterr().out
    results = json.loads((output / "results.json").read_text())
    shallow, other = results["models"]
    assert results["prompt_tokens"] == 48 and results["new_tokens"] == 16
    assert set(shallow["ratios"].values()) == {1.0}
    counts = [sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(path).parameters())
              for path in (small_models["llama2"], deep)]  # fmt: skip
    assert [shallow["parameters"], other["parameters"]] == counts
    assert other["ratios"]["parameters"] == pytest.approx(counts[1] / counts[0])
    assert other["bytes_on_disk"] == sum(file.stat().st_size for file in deep.iterdir())
    # Eleven times the layers: no noise hides that.
    assert other["ratios"]["decode_tokens_per_second"] < 0.5 < 2 < other["ratios"]["first_token_seconds"]
    for model in results["models"]:
        assert model["peak_memory_bytes"] > 4 * model["parameters"]
        rate = model["prefill_tokens_per_second"]
        assert rate["lowest"] <= rate["median"] <= rate["highest"]
        assert 48 / rate["median"] == pytest.approx(model["first_token_seconds"]["median"])
    assert other["peak_memory_bytes"] > shallow["peak_memory_bytes"]
    assert "shallow" in table and "(1.00x)" in table and "prefill tok/s" in table


def test_the_decode_that_is_timed_is_transformers_greedy_one(small_models):
    config = BenchmarkConfig(models=["-"], prompt_tokens=20, new_tokens=8, device="cpu")
    runner, made = Runner(str(small_models["nemotron"]), config), []
    step = runner._step
    runner._step = lambda tokens, cache: made.append(step(tokens, cache)) or made[-1]
    runner.round()
    expected = runner.model.generate(
        runner.prompt, attention_mask=torch.ones_like(runner.prompt), max_new_tokens=8, do_sample=False, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    assert torch.cat(made, 1).tolist() == expected[:, 20:].tolist()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "models is missing"),
        (["/nowhere"], "/nowhere does not exist"),
        (["{llama2}", "prompt_tokens=60", "new_tokens=10"], "= 70 must be at most 64"),
        (["{llama2}", "rounds=0"], "rounds = 0 must be at least 1"),
    ],
)
def test_bad_input_is_one_message(small_models, capsys, arguments, expected):
    given = [str(small_models["llama2"]) if argument == "{llama2}" else argument for argument in arguments]
    assert main(["benchmark", *given]) != 0
    said = capsys.readouterr()
    assert expected in said.err and not said.out and "Traceback" not in said.err
