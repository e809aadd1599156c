"""GGUF in and out, beside the gguf library, transformers' reader of GGUF, and the directory that it was made from."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import gguf
import numpy
import pytest
import torch

from models import FAMILIES, build, equal, save, stored
from nemo_minitron.architecture import Architecture, RopeScaling
from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoints import sentencepiece
from nemo_minitron.checkpoints.checkpoint import open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.formats.base import WriteOptions
from nemo_minitron.checkpoints.formats.gguf import config, splits
from nemo_minitron.checkpoints.names import canonical_shapes
from nemo_minitron.checkpoints.tensors import BLOCK, Computed
from nemo_minitron.checkpoints.tokenizer import from_directory
from nemo_minitron.cli.main import main
from nemo_minitron.config import ConvertConfig, validated
from nemo_minitron.conversion.convert import convert
from nemo_minitron.conversion.inspect import describe
from nemo_minitron.data.synthetic.corpus import documents
from nemo_minitron.data.tokenizer import train_bpe
from nemo_minitron.errors import CheckpointError, ConfigError, OutputExistsError

TYPES = gguf.GGMLQuantizationType
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PAGE = "\n".join(documents("encyclopedic", "train", 600, 7)) + (
    "\r\n  I'LL go; 12345 x\t\ty _under_ don't 3.14 <|endoftext|> Überall Eis… 你好 ١٢٣  \n\n end "
)
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def run(source: Path, output: Path, **settings) -> Path:
    convert(validated(ConvertConfig(source=str(source), output=str(output), **{"verify": "tensors", **settings})))
    return output


def model(family: str, dtype: torch.dtype, folder: Path, **sizes) -> Path:
    """A Hugging Face directory with a tokenizer of two tokens fewer than it has rows."""
    save(family, dtype, folder, **{"vocab_size": 260, **sizes})
    train_bpe([PAGE] * 2, 258, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


#: Sizes that llama.cpp loads where it does not those of the family.
LOADED = {
    "mistral-window": {"sliding_window": 64},
    "qwen25-tied": {"head_dim": 16},
    "minitron-width": {"hidden_size": 128},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_keeps_every_bit(family, dtype, tmp_path):
    start = model(family, DTYPES[dtype], tmp_path / "start", **LOADED.get(family, {}))
    file = run(start, tmp_path / "model.gguf")
    end = run(file, tmp_path / "end", to="hf")
    kept = stored(start)
    if family in ("nemotron", "minitron-width"):  # gains are stored, not their distance from 1: rounded in float32
        kept = {name: as_gain(value) if "norm.weight" in name else value for name, value in kept.items()}
    found = stored(end)
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name].float(), kept[name].float()) for name in kept)
    assert dtype == "fp16" or family in ("nemotron", "minitron-width") or equal(found, kept)
    before, after = (open_checkpoint(path).architecture for path in (start, end))
    lost = {"family": after.family, "init_method_std": after.init_method_std, "sliding_window": None}
    assert after == dataclasses.replace(before, **lost)
    assert after.family == ("llama" if before.family == "mistral" else before.family)


def as_gain(value: torch.Tensor) -> torch.Tensor:
    """A norm's weight, once 1 was added and taken away in float32."""
    return (value.float() + 1) - 1


@pytest.mark.parametrize("family", ["llama2", "llama31", "llama32-tied", "minitron-width", "qwen25-tied", "qwen2"])
def test_transformers_reads_the_same_model(family, tmp_path):
    """By its own table of GGUF; of rotary scaling, which it passes over, nothing is compared but weights."""
    from transformers import AutoModelForCausalLM

    sizes = LOADED.get(family, {})
    start = model(family, torch.float32, tmp_path / "start", **sizes)
    file = run(start, tmp_path / "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    expected = build(family, torch.float32, vocab_size=260, **sizes)
    for (name, parameter), wanted in zip(theirs.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted, rtol=0, atol=2e-7 if "norm" in name else 0, msg=name)


def written(path: Path) -> gguf.GGUFReader:
    """A file as the gguf library reads it."""
    return gguf.GGUFReader(path)


def numbers_of(tensor: gguf.ReaderTensor) -> torch.Tensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape).copy())


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_matrices_are_of_the_type_that_is_wanted(kind, tmp_path):
    """Against gguf's own quantisation of the weights that transformers has; vectors are F32 always."""
    start = model("llama2", torch.float32, tmp_path / "start")
    file = run(start, tmp_path / "model.gguf", gguf_type=kind, verify="logits")
    reader, weights = written(file), build("llama2", torch.float32, vocab_size=260).state_dict()
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert all(found == (TYPES.F32 if "norm" in name else TYPES[kind]) for name, found in types.items())
    stored_as = {tensor.name: tensor for tensor in reader.tensors}
    for ours, theirs in {"model.embed_tokens": "token_embd", "model.layers.1.mlp.down_proj": "blk.1.ffn_down",
                         "model.layers.0.self_attn.v_proj": "blk.0.attn_v", "lm_head": "output"}.items():  # fmt: skip
        wanted = gguf.quants.quantize(weights[f"{ours}.weight"].numpy(), TYPES[kind])
        assert numpy.array_equal(stored_as[f"{theirs}.weight"].data.view(numpy.uint8), wanted.view(numpy.uint8))
    assert (
        reader.get_field("general.file_type").contents()
        == gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]
    )
    again = open_checkpoint(file, quantized=True)
    assert (again.quantization is not None) == (kind == "Q8_0")
    assert again.stored_precisions[kind] == 16 + 5 * (kind == "F32")
    if kind == "Q8_0":
        said = describe(again)["warnings"][0]
        assert said.startswith("the weights are quantised (Q8_0, by llama.cpp): the file holds weights only")
        assert "server" not in said and "what quantising lost stays lost" in said
        with pytest.raises(CheckpointError, match="is quantised .Q8_0, by llama.cpp.: give the model"):
            open_checkpoint(file)
        twice = run(file, tmp_path / "twice.gguf", gguf_type=kind)
        assert all(
            numpy.array_equal(one.data, other.data) for one, other in zip(reader.tensors, written(twice).tensors)
        )


def test_rows_without_whole_blocks_are_said_and_kept_in_half_precision(tmp_path, capsys):
    start = model("llama2", torch.bfloat16, tmp_path / "start", hidden_size=72, head_dim=16)
    file = run(start, tmp_path / "model.gguf", gguf_type="Q8_0")
    assert "rows of 72 numbers have no whole blocks of 32: such matrices are F16" in capsys.readouterr().err
    assert {t.tensor_type for t in written(file).tensors if len(t.shape) == 2} == {TYPES.F16, TYPES.Q8_0}


QUANTISED = [
    kind for kind in TYPES if kind in gguf.quants._type_traits and kind not in (TYPES.F32, TYPES.F16, TYPES.BF16)
]


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_every_quantisation_is_what_the_library_makes_of_it(kind, tmp_path):
    """Random blocks, in a file of the library's writer, the permuted ones of query and key included."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    a = Architecture(num_layers=1, hidden_size=block, ffn_hidden_size=2 * block, num_attention_heads=2,
                     num_query_groups=1, kv_channels=block // 2, vocab_size=8, seq_length=32)  # fmt: skip
    random = numpy.random.default_rng(3)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    sizes(writer, a)
    plain = {}
    for name, rows, columns in matrices(a):
        data = random.integers(0, 256, (rows, columns // block * size), dtype=numpy.uint8)
        with numpy.errstate(all="ignore"):
            plain[name] = gguf.quants.dequantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        writer.add_tensor(name, numpy.ones(a.hidden_size, numpy.float32))
    finish(writer)
    found = open_checkpoint(tmp_path / "x.gguf", quantized=True)
    assert found.quantization.algorithm == kind.name and found.tokenizer_files is None
    tensors = {name: tensor.read().numpy() for name, tensor in found.tensors.items()}
    halves = [plain[f"blk.0.attn_{part}.weight"].reshape(-1, block // 4, 2, block).swapaxes(1, 2).reshape(-1, block)
              for part in "qk"]  # fmt: skip
    qkv = numpy.concatenate([*halves, plain["blk.0.attn_v.weight"]])
    fc1 = numpy.concatenate([plain["blk.0.ffn_gate.weight"], plain["blk.0.ffn_up.weight"]])
    for name, wanted in {"decoder.layers.0.self_attention.linear_qkv.weight": qkv,
                         "decoder.layers.0.mlp.linear_fc1.weight": fc1,
                         "decoder.layers.0.mlp.linear_fc2.weight": plain["blk.0.ffn_down.weight"],
                         "embedding.word_embeddings.weight": plain["token_embd.weight"]}.items():  # fmt: skip
        assert numpy.array_equal(tensors[name].view(numpy.uint32), wanted.view(numpy.uint32)), name


def matrices(a: Architecture) -> list[tuple[str, int, int]]:
    """Name, rows and columns of a Llama's matrices of one layer, tied."""
    query, key = a.num_attention_heads * a.kv_channels, a.num_query_groups * a.kv_channels
    inner = {"attn_q": (query, a.hidden_size), "attn_k": (key, a.hidden_size), "attn_v": (key, a.hidden_size),
             "attn_output": (a.hidden_size, query), "ffn_gate": (a.ffn_hidden_size, a.hidden_size),
             "ffn_up": (a.ffn_hidden_size, a.hidden_size), "ffn_down": (a.hidden_size, a.ffn_hidden_size)}  # fmt: skip
    layer = [(f"blk.0.{name}.weight", *shape) for name, shape in inner.items()]
    return [("token_embd.weight", a.vocab_size, a.hidden_size), *layer]


def sizes(writer: gguf.GGUFWriter, a: Architecture) -> None:
    writer.add_block_count(a.num_layers)
    writer.add_context_length(a.seq_length)
    writer.add_embedding_length(a.hidden_size)
    writer.add_feed_forward_length(a.ffn_hidden_size)
    writer.add_head_count(a.num_attention_heads)
    writer.add_head_count_kv(a.num_query_groups)
    writer.add_layer_norm_rms_eps(a.layernorm_epsilon)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("head", [16, 64, 128])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rotary_scaling_is_that_of_transformers(head, factor):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    words = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192}  # fmt: skip
    described = LlamaConfig(head_dim=head, hidden_size=8 * head, num_attention_heads=8, rope_theta=500000.0,
                            rope_scaling={"rope_type": "llama3", **words})  # fmt: skip
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](described, "cpu")
    plain = 500000.0 ** (-torch.arange(0, head, 2).double() / head)
    scaling = RopeScaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
    ours = torch.from_numpy(config.rope_factors(scaling, 500000.0, head).copy())
    torch.testing.assert_close(plain / ours, theirs.double(), rtol=1e-6, atol=0)
    metadata = {"llama.rope.freq_base": 500000.0}
    assert config._scaling("llama", metadata, ours.numpy(), head, "x") == scaling
    for wrong in (
        ours.numpy() * 1.01,
        numpy.ones(head // 2, numpy.float32),
        ours.numpy()[1:],
        ours.numpy() * numpy.nan,
    ):
        with pytest.raises(CheckpointError, match="scales its rotary frequencies .rope_freqs.weight."):
            config._scaling("llama", metadata, wrong, head, "x")


# Tokenizers


def tokenizer_as(name: str, folder: Path) -> Path:
    """A byte-level BPE that splits texts in that way, with special tokens, one of a user's, and a template."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    split = splits.SPLITS[name]
    train_bpe([PAGE] * 3, 600, folder)
    words = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    words["pre_tokenizer"] = splits.pre_tokenizer(split)
    words["normalizer"] = {"type": "NFC"} if split.composed else None
    words["model"]["ignore_merges"] = split.whole
    (folder / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
    made = AutoTokenizer.from_pretrained(folder)
    made.add_tokens(["<mark>"])
    made.add_special_tokens({"additional_special_tokens": ["<|im_end|>"], "bos_token": AddedToken("<|begin|>")})
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    if name == "llama-bpe":
        put_first("<|begin|>", made.convert_tokens_to_ids("<|begin|>"), folder / "tokenizer.json")
    return folder


def put_first(token: str, number: int, file: Path) -> None:
    """Has a tokenizer.json put a token before each text, as Llama 3's does."""
    words = json.loads(file.read_text(encoding="utf-8"))
    first = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
    plain = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    words["post_processor"] = {"type": "Sequence", "processors": [plain, template]}
    file.write_text(json.dumps(words), encoding="utf-8")


def sentencepiece_tokenizer(folder: Path) -> Path:
    """SentencePiece's BPE as Llama 2 has it, with a token that a user added."""
    import sentencepiece

    folder.mkdir()
    (folder / "text").write_text(PAGE * 3, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=500, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        user_defined_symbols=["<|tool|>"], pad_id=-1, hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    (folder / "text").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "bos_token": "<s>",
                "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def without_its_model(folder: Path, space_before: bool = True) -> Path:
    """The same as transformers saves it: a tokenizer.json with merges, and no tokenizer.model."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}  # which takes tokenizer.json as it is
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if not space_before:
        words = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        words["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        (folder / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
    return folder


@pytest.mark.parametrize("before", [True, False])
def test_pieces_are_told_from_their_merges(before, tmp_path):
    """SentencePiece's BPE without tokenizer.model: equal ids to transformers' of the directory, and to the model's own
    scores in their order."""
    from transformers import AutoTokenizer

    start = sentencepiece_tokenizer(tmp_path / "t")
    scores = sentencepiece.read((start / "tokenizer.model").read_bytes()).scores
    without_its_model(start, before)
    save("llama2", torch.bfloat16, start, vocab_size=640)
    file = run(start, tmp_path / "model.gguf")
    fields = written(file).fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() == before
    found = fields["tokenizer.ggml.scores"].contents()[: len(scores)]
    merged = [number for number, score in enumerate(found) if score > min(found)]
    assert len(merged) > 100 and sorted(merged, key=lambda n: -scores[n]) == sorted(merged, key=lambda n: -found[n])
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[:4] == [2, 3, 3, 4] and kinds.count(6) == 256
    assert fields["tokenizer.ggml.unknown_token_id"].contents() == 0
    end = run(file, tmp_path / "end", to="hf")
    one, other = (AutoTokenizer.from_pretrained(place) for place in (start, end))
    assert other(PAGE).input_ids == one(PAGE).input_ids
    assert len({*one(PAGE).input_ids}) > 200


def test_merges_that_no_scores_make_are_refused(tmp_path):
    start = without_its_model(sentencepiece_tokenizer(tmp_path / "t"))
    save("llama2", torch.bfloat16, start, vocab_size=640)
    whole = json.loads((start / "tokenizer.json").read_text(encoding="utf-8"))
    merges, vocabulary = whole["model"]["merges"], whole["model"]["vocab"]
    by_whole = Counter("".join(pair) for pair in merges)
    several = next(number for number, pair in enumerate(merges) if by_whole["".join(pair)] > 1)
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    for change, message in (
        ({"merges": merges[:several] + merges[several + 1 :]}, "trained by merges and not by scores: it never merges"),
        ({"merges": [*merges[:several], *merges[several + 1 :], merges[several]]}, "made at several places"),
        ({"merges": [*merges, ["a", "§"]]}, "not whole: its merges are not of its tokens"),
        ({"merges": 3}, "not whole: its merges are no pairs"),
        ({"unk_token": None}, "no unknown token or not all 256 bytes"),
        ({"vocab": {token: number for token, number in vocabulary.items() if token != "<0x41>"}}, "not all 256 bytes"),
        ({"vocab": vocabulary | {"new": 2**40}}, "far beyond its tokens"),
        ({"dropout": 0.5}, "drops or passes over merges"),
        ({"type": "Unigram", "vocab": [["a", 0.0]]}, "is Unigram .* Unigram takes the likeliest split"),
    ):
        (start / "tokenizer.json").write_text(json.dumps({**whole, "model": {**whole["model"], **change}}))
        with pytest.raises(CheckpointError, match=message):
            run(start, tmp_path / "model.gguf")
    for change in ({"normalizer": None, "pre_tokenizer": metaspace}, {"normalizer": {"type": "NFC"}}):
        (start / "tokenizer.json").write_text(json.dumps({**whole, **change}))
        with pytest.raises(CheckpointError, match="changes or splits texts otherwise than llama.cpp's `llama`"):
            run(start, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "sentencepiece"])
def test_a_tokenizer_is_rebuilt(kind, tmp_path):
    """Equal ids on a page to the directory that it was made from; llama.cpp's keys; the template and special tokens."""
    from transformers import AutoTokenizer

    start = sentencepiece_tokenizer(tmp_path / "t") if kind == "sentencepiece" else tokenizer_as(kind, tmp_path / "t")
    save("llama2", torch.bfloat16, start, vocab_size=640)
    (start / "generation_config.json").unlink()
    words = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps({**words, "bos_token_id": None, "eos_token_id": None}))
    file = run(start, tmp_path / "model.gguf")
    end = run(file, tmp_path / "end", to="hf")
    before, after = (AutoTokenizer.from_pretrained(path) for path in (start, end))
    text = f"{PAGE} <mark><|im_end|> <s> <|tool|>x"
    assert after(text).input_ids == before(text).input_ids
    assert after.decode(after(PAGE).input_ids, skip_special_tokens=True) == before.decode(
        before(PAGE).input_ids, skip_special_tokens=True
    )
    conversation = [{"role": "user", "content": "hello"}]
    assert after.apply_chat_template(conversation, tokenize=False) == "user: hello\n"
    ids = [(found.bos_token_id, found.eos_token_id) for found in (before, after)]
    assert ids[0] == ids[1]
    fields = {key: field.contents() for key, field in written(file).fields.items() if not key.startswith("GGUF.")}
    assert fields["tokenizer.ggml.model"] == ("llama" if kind == "sentencepiece" else "gpt2")
    assert fields["tokenizer.ggml.pre"] == ("default" if kind == "sentencepiece" else kind)
    assert fields["tokenizer.ggml.add_bos_token"] == (kind in ("sentencepiece", "llama-bpe"))
    assert fields["tokenizer.chat_template"] == TEMPLATE
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 640 and len(before) < 640
    assert set(kinds[len(before) :]) == {int(gguf.TokenType.UNUSED)}
    for number, token in before.added_tokens_decoder.items():
        wanted = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
        assert (tokens[number], kinds[number]) in ((token.content, wanted), ("<unk>", gguf.TokenType.UNKNOWN))


def test_what_ends_a_turn_ends_a_text(tmp_path):
    start = model("llama2", torch.bfloat16, tmp_path / "start")
    (start / "generation_config.json").write_text('{"eos_token_id": [0, 7], "bos_token_id": 0}')
    file = run(start, tmp_path / "model.gguf")
    fields = written(file).fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 7
    assert open_checkpoint(file).generation["eos_token_id"] == [0, 7]


def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(tmp_path):
    start = model("llama2", torch.bfloat16, tmp_path / "start")
    whole = json.loads((start / "tokenizer.json").read_text(encoding="utf-8"))
    for change, message in (
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
            "splits texts in a way for which llama.cpp",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "splits texts in a way for which llama.cpp has no name here"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "neither byte-level BPE .* nor SentencePiece's"),
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "is no BPE"),
    ):
        (start / "tokenizer.json").write_text(json.dumps({**whole, **change}), encoding="utf-8")
        with pytest.raises(CheckpointError, match=message):
            run(start, tmp_path / "model.gguf")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (start / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="a GGUF holds its tokenizer, and the model has none; tokenizer=DIR"):
        run(start, tmp_path / "model.gguf")
    other = tmp_path / "other"
    train_bpe([PAGE], 300, other)
    with pytest.raises(CheckpointError, match="has 300 tokens, the embedding only 260 rows"):
        run(start, tmp_path / "model.gguf", tokenizer=str(other))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "start"]
    train_bpe([PAGE], 258, tmp_path / "fits")
    run(start, tmp_path / "model.gguf", tokenizer=str(tmp_path / "fits"))
    assert from_directory(tmp_path / "fits").size() == 258


# Files


def test_a_split_file_is_read_when_whole(tmp_path):
    start = model("llama31", torch.bfloat16, tmp_path / "start")
    file = run(start, tmp_path / "model.gguf")
    parts = split(file, tmp_path / "parts", 3)
    whole_tensors = open_checkpoint(file).tensors
    for place in (parts[0], parts[1], parts[2], tmp_path / "parts"):
        found = open_checkpoint(place)
        assert all(torch.equal(found.tensors[name].read(), tensor.read()) for name, tensor in whole_tensors.items())
        assert found.size == sum(part.stat().st_size for part in parts) and found.tokenizer_files is not None
    kept = parts[1].read_bytes()
    parts[1].unlink()
    for place in (parts[0], parts[2], tmp_path / "parts"):
        with pytest.raises(CheckpointError, match="of 3: big-00002-of-00003.gguf is not beside it"):
            open_checkpoint(place)
    parts[1].write_bytes(parts[0].read_bytes())
    with pytest.raises(CheckpointError, match="00002-of-00003.gguf is not part 2 of 3"):
        open_checkpoint(parts[0])
    parts[1].write_bytes(kept)
    renamed = parts[0].rename(parts[0].with_name("first.gguf"))
    with pytest.raises(CheckpointError, match="parts are found by their names"):
        open_checkpoint(renamed)


def split(file: Path, folder: Path, count: int) -> list[Path]:
    """The parts of a file, each written by the gguf library's writer as llama-gguf-split does."""
    folder.mkdir()
    reader, places = written(file), []
    groups = numpy.array_split(numpy.arange(len(reader.tensors)), count)
    for number, group in enumerate(groups):
        places.append(folder / f"big-{number + 1:05}-of-{count:05}.gguf")
        writer = gguf.GGUFWriter(places[-1], "llama")
        for key, field in reader.fields.items() if number == 0 else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                kinds = field.types
                writer.add_key_value(key, field.contents(), kinds[0], sub_type=kinds[-1] if len(kinds) > 1 else None)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for index in group:
            tensor = reader.tensors[index]
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        finish(writer)
    return places


def test_a_result_is_one_file_with_its_manifest_beside_it(tmp_path):
    start = model("llama2", torch.bfloat16, tmp_path / "start")
    file = run(start, tmp_path / "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "model.gguf.manifest.json", "start"]
    first = Manifest.read(file)
    run(start, file)
    assert Manifest.read(file) == first
    with pytest.raises(OutputExistsError, match="gguf_type"):
        run(start, file, gguf_type="F16")
    run(start, file, gguf_type="F16", overwrite=True)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(OutputExistsError, match="not the output of an earlier run"):
        run(start, file, gguf_type="F16")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gguf_type": "Q4_K_M"}, "`llama-quantize out.gguf out.Q4_K_M.gguf Q4_K_M`"),
        ({"gguf_type": "iq2_xs"}, "`llama-quantize out.gguf out.IQ2_XS.gguf IQ2_XS`"),
        ({"gguf_type": "F8"}, "gguf_type = 'F8'"),
        ({"gguf_type": "F16", "output": "out"}, "gguf_type is for gguf; the result is nemo2: output=NAME.gguf"),
        (
            {"to": "gguf", "output": "out"},
            "to = gguf makes a GGUF file, but out is not named like one: name it out.gguf",
        ),
        ({"to": "hf"}, "is named like a GGUF file: leave .gguf off, or to=gguf"),
        ({"weights": "zarr"}, "weights = zarr is for .nemo archives"),
    ],
)
def test_settings_that_do_not_go_with_it(settings, message):
    with pytest.raises(ConfigError) as caught:
        validated(ConvertConfig(**{"source": "in", "output": "out.gguf", **settings}))
    assert message in str(caught.value)


def test_what_llama_cpp_does_not_compute_is_refused_before_anything_is_written(tmp_path):
    start = model("mistral-window", torch.bfloat16, tmp_path / "start")
    with pytest.raises(CheckpointError, match="no sliding window, and this one's, 8 tokens"):
        run(start, tmp_path / "model.gguf")
    for family, message in (
        ("qwen25-tied", "heads 4 x head size 8 = 32"),
        ("minitron-width", "4 x head size 32 = 128"),
    ):
        with pytest.raises(CheckpointError, match=f"llama.cpp loads no .*{message} are not the hidden size"):
            run(model(family, torch.bfloat16, tmp_path / family), tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_mistral_comes_back_as_llama_and_that_is_said(tmp_path, capsys):
    run(model("mistral", torch.bfloat16, tmp_path / "start"), tmp_path / "model.gguf", verify="logits")
    assert "note: mistral is llama in GGUF: read back, it is llama" in capsys.readouterr().err


def test_a_model_is_asked_and_evaluated_as_it_is(tmp_path, capsys):
    """`generate` on the GGUF says what it says on the directory; and `inspect` describes it."""
    start = model("llama31", torch.float32, tmp_path / "start")
    file = run(start, tmp_path / "model.gguf")
    said = []
    for place in (start, file):
        assert main(["generate", str(place), "The river", "max_new_tokens=12", "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert said[0] == said[1]
    assert main(["inspect", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "GGUF file (llama.cpp), weights in GGUF" in shown and "scaled as in Llama 3.1 (factor 8)" in shown


def test_converting_reads_one_tensor_at_a_time(tmp_path):
    import tracemalloc

    a = Architecture(
        num_layers=24, hidden_size=512, ffn_hidden_size=2048, num_attention_heads=8, kv_channels=64, vocab_size=1024
    )
    train_bpe([PAGE], 300, tmp_path / "t")
    made = {name: Computed(shape, "float32", lambda shape=shape: torch.ones(shape))
            for name, shape in canonical_shapes(a).items()}  # fmt: skip
    write_checkpoint(tmp_path / "hf", "hf", a, made, from_directory(tmp_path / "t"), {})
    largest = max(tensor.nbytes for tensor in made.values())
    for source, output, to, kind in (("hf", "a.gguf", "gguf", None), ("hf", "b.gguf", "gguf", "Q8_0"),
                                     ("a.gguf", "c", "hf", None), ("b.gguf", "d", "hf", None)):  # fmt: skip
        checkpoint = open_checkpoint(tmp_path / source, quantized=True)
        options = WriteOptions(gguf_type=kind)
        tracemalloc.start()
        write_checkpoint(tmp_path / output, to, a, checkpoint.tensors, checkpoint.tokenizer_files, {}, options)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < largest + 3 * BLOCK + (4 << 20), (source, output)
    assert equal(stored(tmp_path / "hf"), stored(tmp_path / "c"))


CONVERT = """
import sys
from nemo_minitron.cli.main import main

code = main(["convert", *sys.argv[1:], "verify=tensors"])
engines = [name for name in ("nemo", "megatron", "modelopt", "torch", "transformers") if name in sys.modules]
assert not engines, engines
assert "gguf" not in sys.modules
sys.exit(code)
"""


def test_plain_numbers_need_neither_torch_nor_the_gguf_library(tmp_path):
    start = model("llama31", torch.bfloat16, tmp_path / "start")
    for source, output, to in ((start, tmp_path / "a.gguf", "gguf"), (tmp_path / "a.gguf", tmp_path / "end", "hf")):
        subprocess.run([sys.executable, "-c", CONVERT, str(source), str(output), f"to={to}"], check=True)
    assert equal(stored(start), stored(tmp_path / "end"))


def test_a_missing_library_names_what_to_install(tmp_path, monkeypatch):
    from nemo_minitron.errors import MissingPackageError
    from nemo_minitron.packages import extras

    start = model("llama2", torch.bfloat16, tmp_path / "start")
    file = run(start, tmp_path / "a.gguf", gguf_type="Q8_0")
    has_module = extras.has_module
    monkeypatch.setattr(extras, "has_module", lambda name: name != "gguf" and has_module(name))
    with pytest.raises(MissingPackageError, match=r"needs gguf: pip install 'nemo-minitron\[evaluate\]'"):
        open_checkpoint(file, quantized=True)
    with pytest.raises(MissingPackageError, match="Q8_0 needs gguf: pip install"):
        run(start, tmp_path / "b.gguf", gguf_type="Q8_0")
