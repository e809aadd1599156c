"""`minitron generate` says what transformers says."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_minitron.cli.main import main

PROMPT = "To be or not to be,"


def by_transformers(folder, prompt=PROMPT, **options) -> list[int]:
    """The model card's quickstart, on a Hugging Face directory."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    inputs = tokenizer.encode(prompt, return_tensors="pt")
    return model.generate(inputs, max_new_tokens=12, pad_token_id=tokenizer.pad_token_id, **options)[0].tolist()


@pytest.mark.parametrize(
    ("given", "same_as"),
    [("llama2", "llama2"), ("nemo2", "llama2"), ("nemo1", "nemotron"), ("minitron-width", "minitron-width"),
     ("depth", "depth"), ("mistral-nemo", "mistral-nemo"), ("mistral-depth", "mistral-depth")],
)  # fmt: skip
def test_any_format_continues_as_transformers_does(small_models, capsys, given, same_as):
    assert main(["generate", str(small_models[given]), PROMPT, "max_new_tokens=12", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    expected = by_transformers(small_models[same_as], do_sample=False)
    prompt = AutoTokenizer.from_pretrained(small_models[same_as]).encode(PROMPT)
    assert answer["token_ids"] == expected[len(prompt) :] and answer["prompt_tokens"] == len(prompt)
    assert answer["text"].startswith(PROMPT) and answer["text"] == PROMPT + answer["continuation"]


def test_the_text_is_printed_and_nothing_else(small_models, capsys):
    assert main(["generate", str(small_models["llama2"]), PROMPT, "max_new_tokens=12"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(small_models["llama2"])
    expected = tokenizer.decode(by_transformers(small_models["llama2"], do_sample=False), skip_special_tokens=True)
    assert capsys.readouterr().out == expected + "\n"


def test_sampling_follows_the_seed(small_models, capsys):
    def say(seed: int) -> list[int]:
        options = ["do_sample=true", "temperature=1.5", f"seed={seed}", "max_new_tokens=12", "--json"]
        assert main(["generate", str(small_models["llama2"]), PROMPT, *options]) == 0
        return json.loads(capsys.readouterr().out)["token_ids"]

    assert say(1) == say(1) != say(2)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/nowhere", PROMPT], "/nowhere does not exist"),
        (["{llama2}", ""], "prompt is empty"),
        (["{llama2}", "caf\udce9"], "prompt = 'caf\\udce9' is not UTF-8 text"),
        (["{llama2}"], "prompt is empty"),
        (["{llama2}", PROMPT, "temperature=0.5"], "no effect on greedy decoding"),
        (["{llama2}", "word " * 200], "the model's length is 64"),
        (["{llama2}", PROMPT, "tokenizer=/nowhere"], "tokenizer /nowhere"),
        (["{llama2}", PROMPT, "device=tpu"], "must be auto, cpu, cuda"),
        (["{llama2}", PROMPT, "device=cuda:99"], "GPUs that torch can use"),
        (["{bare}", PROMPT], "has no tokenizer"),
    ],
)
def test_bad_input_is_one_message(small_models, tmp_path, capsys, arguments, expected):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(small_models["llama2"] / name)
    places = {"{llama2}": str(small_models["llama2"]), "{bare}": str(bare)}
    assert main(["generate", *(places.get(argument, argument) for argument in arguments)]) != 0
    said = capsys.readouterr()
    assert expected in said.err and not said.out and "Traceback" not in said.err
