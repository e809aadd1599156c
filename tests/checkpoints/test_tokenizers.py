"""Tokenizers and settings of generation as people have them, through every format and command."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from models import save
from nemo_minitron.checkpoints import sentencepiece as sentencepiece_file
from nemo_minitron.checkpoints import tokenizer as tokenizers
from nemo_minitron.checkpoints.checkpoint import open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.tensors import in_memory
from nemo_minitron.checkpoints.tokenizer import from_directory
from nemo_minitron.cli.main import main
from nemo_minitron.config import ConvertConfig
from nemo_minitron.conversion.convert import convert
from nemo_minitron.data.synthetic.corpus import documents
from nemo_minitron.data.tokenizer import load_tokenizer, save_tokenizer, train_bpe
from nemo_minitron.errors import CheckpointError

PIECES = 200
TEXT = "to be or not to be, that is the question"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 9085657\n".format("0" * 64)
#: As transformers 5.24 writes it for a tokenizer with two further special tokens.
TRANSFORMERS_5 = {
    "backend": "tokenizers", "bos_token": "<|endoftext|>", "clean_up_tokenization_spaces": False,
    "eos_token": "<|endoftext|>", "extra_special_tokens": ["<|im_start|>", "<|im_end|>"], "is_local": True,
    "local_files_only": False, "model_max_length": 1000000000000000019884624838656, "pad_token": "<|endoftext|>",
    "tokenizer_class": "TokenizersBackend",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def trained(folder: Path, size: int = 259) -> Path:
    train_bpe([TEXT] * 10, size, folder)
    return folder


def model_with(folder: Path, **config) -> Path:
    """A model of 259 tokens; its own config.json and generation_config.json name no special tokens."""
    save("llama2", torch.float32, folder)
    loaded = json.loads((folder / "config.json").read_text())
    for name in tokenizers.SPECIAL_TOKENS:
        loaded.pop(name, None)
    (folder / "config.json").write_text(json.dumps({**loaded, **config}))
    (folder / "generation_config.json").unlink()
    return folder


def run(source: Path, output: Path, **settings) -> Path:
    convert(ConvertConfig(source=str(source), output=str(output), verify="none", **settings))
    return output


def through_all(start: Path, folder: Path) -> dict[str, Path]:
    """The checkpoint in every format, each made of the one before."""
    nemo2 = run(start, folder / "nemo2")
    archive = run(nemo2, folder / "a.nemo")
    return {"nemo2": nemo2, "archive": archive, "hf": run(archive, folder / "hf", to="hf")}


def by_transformers(folder: Path | str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_a_tokenizer_of_transformers_5_works_in_every_format_and_for_transformers_4(tmp_path):
    start = trained(model_with(tmp_path / "start"), 257)
    plain = by_transformers(start)
    plain.add_special_tokens({"additional_special_tokens": TRANSFORMERS_5["extra_special_tokens"]})
    plain.save_pretrained(start)
    (start / "special_tokens_map.json").unlink()
    (start / "tokenizer_config.json").write_text(json.dumps(TRANSFORMERS_5))
    text = f"<|im_start|>{TEXT}<|im_end|>"
    save_tokenizer(load_tokenizer(str(start)), str(start), tmp_path / "data")
    places = [open_checkpoint(path).tokenizer for path in through_all(start, tmp_path).values()]
    for place in (tokenizers.loadable(str(start)), tmp_path / "data", tmp_path / "hf", *places):
        found = by_transformers(place)
        assert found.encode(text) == plain.encode(text)
        assert found.decode(plain.encode(text), skip_special_tokens=True) == TEXT
        assert found.additional_special_tokens == TRANSFORMERS_5["extra_special_tokens"]
    written = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    same = TRANSFORMERS_5.keys() - {"tokenizer_class", "extra_special_tokens"}
    assert {key: written[key] for key in same} == {key: TRANSFORMERS_5[key] for key in same}


def test_a_users_own_directory_is_used_as_it_is_where_that_is_possible(tmp_path):
    folder = str(trained(tmp_path / "tokenizer"))
    assert tokenizers.loadable(folder) == folder
    assert tokenizers.loadable("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"


def test_the_class_that_only_config_json_tells_travels_along(tmp_path):
    """Qwen 2's files without tokenizer_config.json: transformers looks at config.json's model_type."""
    start = save("qwen2", torch.float32, tmp_path / "start")
    definition = json.loads((trained(tmp_path / "bpe") / "tokenizer.json").read_text())
    (start / "vocab.json").write_text(json.dumps(definition["model"]["vocab"]))
    (start / "merges.txt").write_text("\n".join(" ".join(pair) for pair in definition["model"]["merges"]))
    expected = by_transformers(start)
    assert "Qwen2" in type(expected).__name__
    save_tokenizer(load_tokenizer(str(start)), str(start), tmp_path / "data")
    places = [open_checkpoint(path).tokenizer for path in (start, *through_all(start, tmp_path).values())]
    for place in (tmp_path / "data", tmp_path / "hf", *places):
        found = by_transformers(place)
        assert type(found) is type(expected) and found.encode(TEXT) == expected.encode(TEXT)
    other = save("llama2", torch.float32, tmp_path / "llama")
    with pytest.raises(CheckpointError, match="tokenizer is that of a qwen2 model, and the model a llama"):
        run(other, tmp_path / "mixed", to="hf", tokenizer=str(start))
    assert not (tmp_path / "mixed").exists()


def test_further_templates_of_conversations_travel_along(tmp_path):
    start = trained(model_with(tmp_path / "start"))
    tokenizer = by_transformers(start)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ messages }} {{ tools }}"}
    tokenizer.save_pretrained(start)
    template = Path(tokenizers.TEMPLATES) / "tool_use.jinja"
    assert (start / template).is_file()
    save_tokenizer(load_tokenizer(str(start)), str(start), tmp_path / "data")
    places = [Path(open_checkpoint(path).tokenizer) for path in (start, *through_all(start, tmp_path).values())]
    for place in (tmp_path / "data", tmp_path / "hf", *places):
        assert (place / template).read_bytes() == (start / template).read_bytes()
        assert by_transformers(place).chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", '{"version": "1.0", "model"', "cannot be loaded"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "Quantum", "vocab": {}}}', "cannot be loaded"),
        ("tokenizer.json", "", "cannot be loaded"),
        ("tokenizer_config.json", '{"tokenizer_class": "NobodysTokenizer"}', "NobodysTokenizer"),
        ("tokenizer_config.json", '{"tokenizer_class": 7, "eos_token": ', "cannot be loaded"),
        ("tokenizer.json", POINTER, "tokenizer.json is a Git-LFS pointer, not the file itself: run `git lfs pull`"),
        ("model.safetensors", POINTER, "model.safetensors is a Git-LFS pointer"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "evaluate", "data"])
def test_a_file_that_is_not_what_it_should_be_is_one_message(command, name, content, message, tmp_path, capsys):
    start = trained(model_with(tmp_path / "start"))
    (start / "special_tokens_map.json").unlink(missing_ok=True)
    (start / name).write_text(content)
    if command == "data" and name == "model.safetensors":
        return
    arguments = {
        "generate": [str(start), "to be"],
        "evaluate": [str(start), "tasks=[perplexity]", "limit=1"],
        "data": [f"output={tmp_path / 'out'}", f"tokenizer={start}", "words=20000"],
    }[command]
    assert main([command, *arguments]) == 1
    said = capsys.readouterr().err
    assert message in said and "internal error" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["archive", "nemo2", "hf"])
def test_a_pointer_in_place_of_weights_says_what_to_do(kind, tmp_path, capsys):
    place = through_all(model_with(tmp_path / "start"), tmp_path)[kind]
    file = {"archive": place, "nemo2": place / "weights" / "__0_0.distcp", "hf": place / "model.safetensors"}[kind]
    file.write_text(POINTER)
    assert main(["inspect", str(place)]) == 1
    assert "is a Git-LFS pointer, not the file itself: run `git lfs pull`" in capsys.readouterr().err


def test_a_token_beyond_the_embedding_is_told_before_it_is_looked_up(tmp_path, capsys):
    start = trained(model_with(tmp_path / "start"))
    larger = trained(tmp_path / "larger", 300)
    assert max(load_tokenizer(str(larger)).encode(TEXT)) > 259
    for arguments in (["generate", str(start), TEXT], ["evaluate", str(start), "tasks=[perplexity]", "limit=1"]):
        assert main([*arguments, f"tokenizer={larger}"]) == 1
        said = capsys.readouterr().err
        assert "the tokenizer makes the token" in said and "has 259 rows" in said


# Sizes and special tokens


def sentencepiece_model(folder: Path, **settings) -> Path:
    """A model of 200 pieces by SentencePiece's own trainer."""
    import sentencepiece

    folder.mkdir()
    text = folder.parent / "text"
    text.write_text("\n".join(documents("encyclopedic", "train", 20_000, 1234)))
    model = str(folder / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=model, vocab_size=PIECES, minloglevel=2, **settings
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pad_id": 3},
        {"bos_id": -1, "eos_id": 1, "unk_id": 0},
        {"bos_id": 5, "eos_id": 6, "pad_id": 7, "unk_id": 2, "bos_piece": "<B>", "eos_piece": "<E>"},
    ],
)
def test_a_sentencepiece_model_is_read_as_its_own_library_reads_it(settings, tmp_path):
    import sentencepiece

    folder = sentencepiece_model(tmp_path / "model", **settings)
    theirs = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    found = sentencepiece_file.read((folder / "tokenizer.model").read_bytes())
    assert list(found.pieces) == [theirs.id_to_piece(number) for number in range(theirs.get_piece_size())]
    ids = {"unk": theirs.unk_id(), "bos": theirs.bos_id(), "eos": theirs.eos_id(), "pad": theirs.pad_id()}
    assert found.ids == {name: number for name, number in ids.items() if number >= 0}
    tokenizer = from_directory(folder)
    assert tokenizer.size() == theirs.get_piece_size() == PIECES
    assert tokenizer.special_tokens() == {f"{name}_token_id": found.ids[name] for name in found.ids if name != "unk"}


def test_padding_rows_of_an_archive_with_a_sentencepiece_model_are_not_exported(tmp_path):
    """NeMo writes no vocab_padding: what is beyond the tokenizer's tokens, to a multiple of 128, is padding."""
    folder = sentencepiece_model(tmp_path / "model")
    start = open_checkpoint(save("llama3", torch.float32, tmp_path / "start"))
    tensors = dict(start.tensors)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tensors[name] = in_memory(torch.cat([tensors[name].read()[:PIECES], torch.zeros(56, 64)]))
    architecture = start.architecture.with_sizes(vocab_size=256)
    (tmp_path / "nemo").mkdir()
    write_checkpoint(tmp_path / "a.nemo", "nemo1", architecture, tensors, from_directory(folder), {})
    with tarfile.open(tmp_path / "a.nemo") as opened:
        opened.extractall(tmp_path / "nemo", filter="data")
    config = yaml.safe_load((tmp_path / "nemo" / "model_config.yaml").read_text())
    del config["override_vocab_size"], config["vocab_padding"]
    (tmp_path / "nemo" / "model_config.yaml").write_text(yaml.safe_dump(config))
    assert open_checkpoint(tmp_path / "nemo").architecture.vocab_padding == 56
    end = run(tmp_path / "nemo", tmp_path / "end", to="hf")
    written = json.loads((end / "config.json").read_text())
    assert (written["vocab_size"], written["bos_token_id"], written["eos_token_id"]) == (PIECES, 1, 2)


def test_a_torn_sentencepiece_model_is_refused_where_it_is_used(tmp_path, capsys):
    folder = sentencepiece_model(tmp_path / "model")
    whole = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: it is no SentencePiece model, or it was cut off"):
        load_tokenizer(str(folder))
    assert from_directory(folder).size() is None
    start = model_with(tmp_path / "start")
    assert main(["convert", str(start), str(tmp_path / "out"), "--to", "hf", f"tokenizer={folder}", "verify=none"]) == 1
    assert "cut off; copy it again" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["config", "map", "decoder", "vocabulary"])
def test_special_tokens_are_those_that_transformers_finds(how, tmp_path):
    folder = trained(tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"bos_token": {"__type": "AddedToken", "content": "b"}, "eos_token": "<|endoftext|>"}
    del config["pad_token"]
    (folder / "special_tokens_map.json").unlink()
    if how == "map":
        del config["added_tokens_decoder"]
        names = {name: config.pop(name) for name in ("bos_token", "eos_token")}
        (folder / "special_tokens_map.json").write_text(json.dumps(names))
    elif how == "decoder":  # a list that tokenizer.json does not know: it gets the next id, whatever it says
        config["added_tokens_decoder"]["300"] = {"content": "<|end|>", "special": True}
    elif how == "vocabulary":
        definition = json.loads((folder / "tokenizer.json").read_text())
        (folder / "vocab.json").write_text(json.dumps(definition["model"]["vocab"]))
        (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in definition["model"]["merges"]))
        (folder / "tokenizer.json").unlink()
        config |= {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>"}
        config["added_tokens_decoder"]["259"] = {"content": "<|end|>", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours = by_transformers(folder), from_directory(folder)
    assert ours.special_tokens() == {"bos_token_id": theirs.bos_token_id, "eos_token_id": theirs.eos_token_id}
    assert ours.size() == len(theirs) - (how == "decoder")


# Settings of generation


def test_settings_of_generation_stay_in_every_format(tmp_path):
    from transformers import GenerationConfig

    start = trained(model_with(tmp_path / "start"))
    settings = {"bos_token_id": 257, "eos_token_id": [1, 2, 258], "pad_token_id": 3, "temperature": 0.6, "top_p": 0.9,
                "do_sample": True, "repetition_penalty": 1.1}  # fmt: skip
    (start / "generation_config.json").write_text(json.dumps({**settings, "transformers_version": "4.40.0"}))
    for path in through_all(start, tmp_path).values():
        assert open_checkpoint(path).generation == settings
    found = GenerationConfig.from_pretrained(tmp_path / "hf").to_dict()
    assert {name: found[name] for name in settings} == settings
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert [written[name] for name in tokenizers.SPECIAL_TOKENS] == [257, [1, 2, 258], 3]


def test_special_tokens_that_a_checkpoint_does_not_name_are_the_tokenizers(tmp_path):
    """transformers would take 1 and 2, which are other tokens."""
    from transformers import AutoConfig, GenerationConfig

    start = trained(model_with(tmp_path / "start"))
    expected = by_transformers(start).eos_token_id
    for pad, name in ((None, "pads-with-the-end"), ("b", "pads-with-another")):
        config = json.loads((start / "tokenizer_config.json").read_text())
        (start / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": pad or config["pad_token"]}))
        end = through_all(start, tmp_path / name)["hf"]
        ids = [expected, expected, by_transformers(end).pad_token_id if pad else None]
        for found in (AutoConfig.from_pretrained(end), GenerationConfig.from_pretrained(end)):
            assert [getattr(found, token) for token in tokenizers.SPECIAL_TOKENS] == ids
    bare = run(model_with(tmp_path / "bare"), tmp_path / "end", to="hf")
    for found in (AutoConfig.from_pretrained(bare), GenerationConfig.from_pretrained(bare)):
        assert found.bos_token_id is None and found.eos_token_id is None


def test_a_continuation_ends_at_the_tokenizers_end_where_the_checkpoint_names_none(tmp_path, capsys):
    """Token 2, which transformers' Llama takes for the end, is one like others."""
    start = trained(model_with(tmp_path / "start"))
    weights = {name: tensor.read() for name, tensor in open_checkpoint(start).tensors.items()}
    end = by_transformers(start).eos_token_id

    def said(token: int) -> list[int]:
        """What a model says that finds `token` the likeliest after anything."""
        output = torch.zeros(259, 64)
        output[token] = weights["decoder.final_layernorm.weight"].sign()
        tensors = {name: in_memory(value) for name, value in weights.items()}
        tensors["embedding.word_embeddings.weight"] = in_memory(torch.ones(259, 64))
        tensors["output_layer.weight"] = in_memory(output)
        for name in tensors:
            if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                tensors[name] = in_memory(torch.zeros(weights[name].shape))
        folder = tmp_path / f"says-{token}"
        write_checkpoint(folder, "nemo2", open_checkpoint(start).architecture, tensors, from_directory(start), {})
        assert main(["generate", str(folder), "to be", "max_new_tokens=5", "--json"]) == 0
        return json.loads(capsys.readouterr().out)["token_ids"]

    assert said(2) == [2] * 5
    assert said(end) == [end]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"eos_token_id": "</s>"}', "eos_token_id = '</s>' is no token's id"),
        ('{"pad_token_id": [1]}', "pad_token_id = a list is no token's id"),
        ("[1]", "generation_config.json is not a mapping"),
        ("{", "generation_config.json is not JSON"),
        ('{"num_beams": "many"}', "mend or remove generation_config.json"),
        ('{"cache_implementation": "nobodys"}', "does not take its settings of generation"),
    ],
)
def test_settings_that_are_none_are_refused_by_name(settings, message, tmp_path, capsys):
    start = trained(model_with(tmp_path / "start"))
    (start / "generation_config.json").write_text(settings)
    assert main(["generate", str(start), "to be", "max_new_tokens=2"]) == 1
    assert message in capsys.readouterr().err


def test_an_output_layer_that_is_not_the_embedding_it_is_tied_to_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    start = save("llama32-tied", torch.float32, tmp_path / "start")
    tensors = load_file(start / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][7, 7] += 1
    save_file(tensors, start / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lm_head.weight differs .* tie_word_embeddings=false"):
        open_checkpoint(start)
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    found = open_checkpoint(start).tensors["output_layer.weight"].read()
    assert torch.equal(found, tensors["lm_head.weight"])


def test_tokenizer_files_are_known_by_one_list():
    known = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3", "merges.txt",
             "additional_chat_templates/rag.jinja", "qwen.tiktoken", "tekken.json", "chat_template.jinja")  # fmt: skip
    other = ("config.json", "model.safetensors", "original/tokenizer.model", "tokenizer.jsonl", "readme.txt",
             "additional_chat_templates/x/y.jinja", "a/b.tiktoken")  # fmt: skip
    assert all(map(tokenizers.is_file, known)) and not any(map(tokenizers.is_file, other))


def test_a_model_trained_here_from_random_weights_has_the_tokenizers_end(tiny, tmp_path):
    from transformers import AutoConfig

    end = run(tiny.teacher, tmp_path / "hf", to="hf")
    expected = by_transformers(end).eos_token_id
    assert expected == load_tokenizer(str(tiny.data / "tokenizer")).eos_token_id != 2
    found = AutoConfig.from_pretrained(end)
    assert (found.bos_token_id, found.eos_token_id) == (expected, expected)
