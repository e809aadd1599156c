"""`minitron quantize` on tiny models of every family, against dequantisers written here from the definitions."""

import copy
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from models import LLAMA31
from nemo_minitron import config as c
from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.formats.huggingface import directory as huggingface
from nemo_minitron.conversion.convert import convert
from nemo_minitron.errors import CheckpointError, ConfigError, DataError, EngineError, OutputExistsError
from nemo_minitron.quantization import export
from nemo_minitron.quantization.command import quantize

SIZES = {
    "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 321, "max_position_embeddings": 64,
}  # fmt: skip
#: Name -> (transformers' name before Config, changes to SIZES); pruned in width: the head size is not hidden / heads.
MODELS = {
    "llama": ("Llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA31}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-width": ("Llama", {"head_dim": 64}),
    "llama-depth": ("Llama", {"num_hidden_layers": 1}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 64}),
    "nemotron": ("Nemotron", {}),
    "nemotron-width": ("Nemotron", {"head_dim": 64}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 64}),
    "llama-256": ("Llama", {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}),
    "llama-160": ("Llama", {"hidden_size": 160, "head_dim": 32}),
}
WORDS = ("alpha", "beta", "gamma", "delta", "tree", "house", "river", "stone")
#: Relative error of all weights together that each format leaves on normally distributed ones, with room.
ERRORS = {"fp8": (0.02, 0.03), "int4_awq": (0.08, 0.16), "int8_sq": (0.004, 0.06)}
ALGORITHMS = {"fp8": "FP8", "int4_awq": "W4A16_AWQ", "int8_sq": "W8A8_SQ_PER_CHANNEL"}


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """A text, its tokenizer, and models that are made when they are asked for."""
    from nemo_minitron.data.tokenizer import train_bpe

    root = tmp_path_factory.mktemp("shelf")
    generator = numpy.random.Generator(numpy.random.PCG64(0))
    documents = [" ".join(generator.choice(WORDS, 60)) for _ in range(120)]
    (root / "text.txt").write_text("\n\n".join(documents))
    train_bpe(documents, 320, root / "tokenizer")
    return root


def model(shelf: Path, name: str, dtype=torch.float32) -> Path:
    """A Hugging Face directory with random weights, norms included, and the shelf's tokenizer."""
    import shutil

    import transformers

    folder = shelf / f"{name}-{dtype}".replace("torch.", "")
    if folder.is_dir():
        return folder
    kind, changes = MODELS[name]
    torch.manual_seed(0)
    settings = {**SIZES, **copy.deepcopy(changes)}  # transformers 5 adds to rope_scaling
    made = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    made.to(dtype).save_pretrained(folder)
    for file in (shelf / "tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def settings(shelf: Path, source: Path, output: Path, **fields) -> c.QuantizeConfig:
    data = c.CalibrationDataConfig(source=str(shelf / "text.txt"))
    chosen = {"num_samples": 8, "seq_length": 32, "data": data, "accelerator": "cpu", **fields}
    return c.validated(c.QuantizeConfig(source=str(source), output=str(output), **chosen))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def plain_weight(tensors: dict[str, torch.Tensor], layer: str, group: int = 128) -> numpy.ndarray:
    """A linear layer's numbers in float64, from the definitions: e4m3 bit by bit, nibbles one by one."""
    weight, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"].double().numpy()
    if weight.dtype == torch.float8_e4m3fn:
        bits = weight.view(torch.uint8).numpy().astype(int)
        sign, exponent, mantissa = 1 - 2 * (bits >> 7), (bits >> 3) & 15, bits & 7
        values = sign * numpy.where(exponent, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9) * scale
    elif weight.dtype == torch.int8:
        values = weight.numpy().astype(float) * scale.reshape(-1, 1)
    else:
        packed = weight.numpy()
        values = numpy.empty((2 * packed.shape[0], packed.shape[1]))
        for half in (0, 1):
            nibble = (packed >> (4 * half)) & 15
            values[half::2] = numpy.where(nibble < 8, nibble, nibble.astype(int) - 16)
        for column in range(values.shape[1]):
            values[:, column] *= scale[:, column // group]
    before = tensors.get(f"{layer}.pre_quant_scale")
    return values if before is None else values * before.double().numpy()


def in_groups(weight: torch.Tensor) -> torch.Tensor:
    """A weight rounded to 4 bits, each 128 columns of a row with a scale of their own."""
    groups = weight.reshape(weight.shape[0], -1, 128)
    scale = groups.abs().amax(dim=2, keepdim=True) / 7
    return ((groups / scale).round() * scale).reshape(weight.shape)


def logits(folder: Path, kind: str, state: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    import transformers

    loaded = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(str(folder), torch_dtype=torch.float32)
    if state is not None:
        loaded.load_state_dict(state, strict=not loaded.config.tie_word_embeddings)
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return loaded.eval()(tokens).logits


@pytest.mark.parametrize("qformat", ["fp8", "int4_awq", "int8_sq"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-width", "mistral", "nemotron-width", "qwen2", "qwen3"])
def test_what_is_exported_is_the_model_to_the_formats_precision(name, qformat, shelf, tmp_path):
    """Read by the definitions alone, put into transformers' model, its logits are the source's but for rounding."""
    kind, source, output = MODELS[name][0], model(shelf, name), tmp_path / "out"
    manifest = quantize(settings(shelf, source, output, qformat=qformat))

    tensors = stored(output)
    layers = [entry.removesuffix(".weight_scale") for entry in tensors if entry.endswith(".weight_scale")]
    per_layer = 7 if kind != "Nemotron" else 6
    assert len(layers) == 2 * per_layer == len(manifest.details["linears"])
    mine = {layer: plain_weight(tensors, layer) for layer in layers}
    theirs = huggingface.dequantized(output, "float32")
    for layer, values in mine.items():
        assert numpy.allclose(theirs[f"{layer}.weight"].read().double().numpy(), values, rtol=1e-6, atol=0), layer

    scales = ("_scale",)
    state = {entry: value.float() for entry, value in tensors.items() if not entry.endswith(scales)}
    state |= {f"{layer}.weight": torch.from_numpy(values).float() for layer, values in mine.items()}
    expected, found = logits(source, kind), logits(source, kind, state)
    away = float((found - expected).norm() / expected.norm())
    if qformat == "int4_awq":  # no further away than plain rounding in groups of 128 is
        rounded = {
            **stored(source),
            **{f"{entry}.weight": in_groups(stored(source)[f"{entry}.weight"]) for entry in layers},
        }
        limit = 1.25 * float((logits(source, kind, rounded) - expected).norm() / expected.norm())
    else:
        limit = {"fp8": 0.12, "int8_sq": 0.15}[qformat]
    assert 1e-4 < away < limit

    low, high = ERRORS[qformat]
    assert low < manifest.metrics["relative_error"] < high
    assert manifest.metrics["worst_step"] <= 1
    source_tensors = stored(source)
    if qformat != "int4_awq":  # which folds scales into norms
        down = f"model.layers.1.{'mlp.down_proj'}"
        reference = source_tensors[f"{down}.weight"].double().numpy()
        error = numpy.linalg.norm(mine[down] - reference) / numpy.linalg.norm(reference)
        reported = next(entry["error"] for entry in manifest.details["linears"] if entry["name"] == down)
        assert abs(error - reported) < 1e-4

    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["quant_algo"] == ALGORITHMS[qformat]
    # ModelOpt 0.46 names the embedding, too.
    assert set(config["quantization_config"]["ignore"]) - {"model.embed_tokens"} == {"lm_head"}
    assert config["torch_dtype"] == "bfloat16" and config["architectures"] == [f"{kind}ForCausalLM"]
    assert config["head_dim"] == MODELS[name][1].get("head_dim", 32)
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not list(output.glob(".*"))


def test_a_quantised_directory_is_recognised_converted_and_kept_out_of_training(shelf, tmp_path, capsys):
    source, output = model(shelf, "llama-width"), tmp_path / "out"
    quantize(settings(shelf, source, output, qformat="int4_awq"))
    from nemo_minitron.conversion.inspect import inspect

    capsys.readouterr()
    inspect(c.InspectConfig(source=str(output)))
    shown = capsys.readouterr().out
    version = importlib.metadata.version("nvidia-modelopt")
    assert f"quantised          W4A16_AWQ, groups of 128, by modelopt {version}" in shown
    assert "uint8 (14 tensors)" in shown
    with pytest.raises(CheckpointError, match="the teacher .* is quantised \\(W4A16_AWQ.*minitron convert"):
        open_checkpoint(output, "teacher")

    manifest = convert(c.ConvertConfig(source=str(output), output=str(tmp_path / "plain"), to="hf"))
    assert manifest.metrics["verified"] == "tensors"
    plain, tensors = stored(tmp_path / "plain"), stored(output)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    for name, value in plain.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.weight_scale" in tensors:
            expected = torch.from_numpy(plain_weight(tensors, layer))
            assert value.dtype == torch.bfloat16 and torch.allclose(value.double(), expected, rtol=2.0**-8, atol=0), (
                name
            )
        else:
            assert torch.equal(value, tensors[name]), name
    expected = logits(source, "Llama")
    assert (logits(tmp_path / "plain", "Llama") - expected).norm() < 0.5 * expected.norm()

    convert(c.ConvertConfig(source=str(output), output=str(tmp_path / "nemo2")))
    back = open_checkpoint(tmp_path / "nemo2").tensors["decoder.layers.1.self_attention.linear_qkv.weight"].read()
    assert torch.equal(back[:64], plain["model.layers.1.self_attn.q_proj.weight"][:64])
    with pytest.raises(ConfigError, match="runs quantised weights"):
        convert(c.ConvertConfig(source=str(output), output=str(tmp_path / "other"), verify="logits"))


def test_bf16_is_the_model_rounded_and_needs_no_data(shelf, tmp_path):
    source = model(shelf, "nemotron-width")
    config = settings(shelf, source, tmp_path / "out", qformat="bf16", data=c.CalibrationDataConfig())
    manifest = quantize(config)
    rounded = {name: value.bfloat16() for name, value in stored(source).items()}
    written = stored(tmp_path / "out")
    assert rounded.keys() == written.keys() and all(torch.equal(rounded[name], written[name]) for name in rounded)
    assert manifest.metrics["relative_error"] == 0 and manifest.metrics["tensors_unchanged"] == len(rounded)


@pytest.mark.parametrize("qformat", ["fp8", "int8_sq", "bf16"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "nemotron-width"])
def test_ranks_of_a_tensorrt_llm_checkpoint_put_together_are_the_model(name, qformat, shelf, tmp_path):
    source, output = model(shelf, name), tmp_path / "out"
    manifest = quantize(settings(shelf, source, output, qformat=qformat, export="trtllm", tp_size=2, pp_size=2))

    config = json.loads((output / "config.json").read_text())
    nemotron, kind = name.startswith("nemotron"), MODELS[name][0]
    expected = {
        "architecture": f"{kind}ForCausalLM", "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_size": MODELS[name][1].get("head_dim", 32),
        "vocab_size": 321, "decoder": "gpt" if nemotron else "llama", "hidden_act": "relu2" if nemotron else "silu",
        "rotary_pct": 0.5 if nemotron else 1.0, "rotary_base": 500000.0 if name == "llama" else 10000.0,
        "mapping": {"world_size": 4, "tp_size": 2, "pp_size": 2},
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    assert config["quantization"]["quant_algo"] == ALGORITHMS.get(qformat)
    if name == "llama":
        assert config["rotary_scaling"] == LLAMA31
    assert sorted(file.name for file in output.glob("*.safetensors")) == [
        f"rank{rank}.safetensors" for rank in range(4)
    ]
    assert (output / "tokenizer" / "tokenizer.json").is_file()

    from safetensors.torch import load_file

    ranks = [load_file(output / f"rank{rank}.safetensors") for rank in range(4)]
    theirs = stored(source)
    for number in (0, 1):  # one layer a pipeline stage
        first, second = ranks[2 * number], ranks[2 * number + 1]
        down = torch.cat([_values(rank, "transformer.layers.0.mlp.proj") for rank in (first, second)], dim=1)
        up = torch.cat([_values(rank, "transformer.layers.0.mlp.fc") for rank in (first, second)])
        gate = "up_proj" if nemotron else "gate_proj"
        for found, part in ((down, "down_proj"), (up, gate)):
            reference = theirs[f"model.layers.{number}.mlp.{part}.weight"]
            bound = (
                0.15 if nemotron and qformat == "int8_sq" else 0.04
            )  # smoothing moves a squared ReLU's outliers here
            assert (found - reference).norm() < bound * reference.norm(), (number, part)
        query = [_values(rank, "transformer.layers.0.attention.qkv") for rank in (first, second)]
        rows = 2 * expected["head_size"]
        reference = theirs[f"model.layers.{number}.self_attn.q_proj.weight"]
        assert (torch.cat([part[:rows] for part in query]) - reference).norm() < 0.04 * reference.norm()
    norm = theirs["model.layers.0.input_layernorm.weight"].bfloat16().float()
    found = ranks[0]["transformer.layers.0.input_layernorm.weight"]
    assert torch.equal(found, (norm + 1 if nemotron else norm).bfloat16())
    table = torch.cat([rank["transformer.vocab_embedding.weight"] for rank in ranks[:2]])
    assert torch.equal(table[:321], theirs["model.embed_tokens.weight"].bfloat16())
    assert manifest.metrics["worst_step"] <= 1


def _values(rank: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A rank's part of a linear layer in fp32 (not of int4)."""
    values = rank[f"{name}.weight"].float()
    if (scale := rank.get(f"{name}.weights_scaling_factor")) is not None:
        values = values * (scale if scale.numel() == 1 else scale[:, None])
    before = rank.get(f"{name}.prequant_scaling_factor")
    return values if before is None else values * before.float()


def test_int4_in_a_tensorrt_llm_checkpoint(shelf, tmp_path):
    output = tmp_path / "out"
    fields = {"qformat": "int4_awq", "export": "trtllm", "tp_size": 2}
    manifest = quantize(settings(shelf, model(shelf, "llama-256"), output, **fields))
    config = json.loads((output / "config.json").read_text())
    assert config["quantization"]["quant_algo"] == "W4A16_AWQ" and config["quantization"]["group_size"] == 128
    low, high = ERRORS["int4_awq"]
    assert low < manifest.metrics["relative_error"] < high and manifest.metrics["worst_step"] <= 1
    with pytest.raises(CheckpointError, match="is a TensorRT-LLM checkpoint .*trtllm-build reads it"):
        open_checkpoint(output)


def test_modelopt_packs_160_columns_wrong_without_a_word_and_so_they_are_refused(shelf, tmp_path):
    source = model(shelf, "llama-160", torch.bfloat16)
    with pytest.raises(ConfigError) as refused:
        quantize(settings(shelf, source, tmp_path / "out", qformat="int4_awq"))
    assert "hidden_size 160 mod 128 = 32" in str(refused.value)
    assert "nearest legal: prune.hidden_size=128 or prune.hidden_size=256" in str(refused.value)
    assert not list(tmp_path.iterdir())

    loaded = export.load(source, "cpu")
    config = settings(shelf, source, tmp_path / "out", qformat="int4_awq")
    with export.chatter_to(tmp_path / "log"):
        export.calibrate(loaded, torch.randint(0, 300, (4, 32)), config)
        from modelopt.torch.export import export_hf_checkpoint

        export_hf_checkpoint(loaded, export_dir=tmp_path / "packed")
    tensors, reference = stored(tmp_path / "packed"), stored(source)["model.layers.0.self_attn.q_proj.weight"].double()
    norms = [
        stored(folder)["model.layers.0.input_layernorm.weight"].double() for folder in (tmp_path / "packed", source)
    ]
    fold = (norms[0] / norms[1]).numpy()
    assert json.loads((tmp_path / "packed" / "hf_quant_config.json").read_text())["quantization"]["group_size"] == 128
    values = plain_weight(tensors, "model.layers.0.self_attn.q_proj", 128) * fold
    error = numpy.linalg.norm(values - reference.numpy()) / numpy.linalg.norm(reference.numpy())
    assert error > 0.2  # 0.12 where columns fill groups of 128
    with pytest.raises(CheckpointError, match="160 columns do not divide into groups of 128"):
        huggingface.dequantized(tmp_path / "packed")


def test_damage_done_by_an_export_is_found_and_nothing_is_left(shelf, tmp_path, monkeypatch):
    """ModelOpt's own result with one weight changed by two steps of the format."""
    from safetensors.torch import load_file, save_file

    real = export.export

    def damaged(*arguments):
        real(*arguments)
        file = arguments[3] / "model.safetensors"
        tensors = load_file(file)
        numbers = tensors["model.layers.1.mlp.down_proj.weight"]
        numbers[3, 5] += 3 if numbers[3, 5] < 100 else -3
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(export, "export", damaged)
    with pytest.raises(EngineError, match="model.layers.1.mlp.down_proj came out .* as far from the source"):
        quantize(settings(shelf, model(shelf, "llama"), tmp_path / "out", qformat="int8_sq"))
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]


def test_the_calibration_text_is_read_by_its_key(shelf, tmp_path):
    from nemo_minitron.quantization.calibration import prepare

    source, text = model(shelf, "llama", torch.bfloat16), (shelf / "text.txt").read_text()
    rows = [json.dumps({"body": {"en": part}}) + "\n" for part in text.split("\n\n")]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("".join(rows) * 20)
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    drawn = []
    for file, key in (("rows.jsonl", "body.en"), ("rows", "body.en"), (shelf / "text.txt", "text")):
        data = c.CalibrationDataConfig(source=str(tmp_path / file), text_key=key)
        config = settings(shelf, source, tmp_path / "out", qformat="fp8", data=data)
        drawn.append(prepare(config, open_checkpoint(source)).draw())
    assert torch.equal(drawn[0], drawn[2]) and drawn[1].shape == drawn[0].shape


@pytest.mark.parametrize("name", ["llama", "nemotron"])
def test_calibration_ranges_are_those_of_the_text(name, shelf, tmp_path):
    """input_scale of FP8 is the largest input of the layer over 448, measured here with a hook."""
    import transformers

    source, output = model(shelf, name, torch.bfloat16), tmp_path / "out"
    config = settings(shelf, source, output, qformat="fp8")
    quantize(config)
    from nemo_minitron.quantization.calibration import prepare

    sequences = prepare(config, open_checkpoint(source)).draw()
    assert sequences.shape == (8, 32) and sequences.max() < 320
    loaded = getattr(transformers, f"{MODELS[name][0]}ForCausalLM").from_pretrained(source, torch_dtype=torch.bfloat16)
    largest = []
    down = loaded.model.layers[1].mlp.down_proj
    down.register_forward_pre_hook(lambda module, inputs: largest.append(float(inputs[0].abs().max())))
    with torch.no_grad():
        for batch in sequences.split(4):
            loaded.eval()(batch)
    scale = float(stored(output)["model.layers.1.mlp.down_proj.input_scale"])
    assert scale == pytest.approx(max(largest) / 448, rel=1e-3)


def test_the_flows_own_data_and_checkpoints_go_in(tiny, tmp_path):
    """A NeMo-2 student in fp32, calibrated on a folder of `minitron data`; a second run finds it done."""
    config = c.QuantizeConfig(
        source=str(tiny.teacher),
        output=str(tmp_path / "out"),
        data=c.CalibrationDataConfig(source=str(tiny.data)),
        num_samples=16,
        accelerator="cpu",
    )
    first = quantize(config)
    assert first.details["sequence_length"] == 64
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert quantize(config).created == first.created
    checkpoint = open_checkpoint(tmp_path / "out", quantized=True)
    assert checkpoint.architecture == open_checkpoint(tiny.teacher).architecture
    from nemo_minitron.evaluation.loss import evaluate_loss

    losses = []
    for path in (tiny.teacher, tmp_path / "out"):
        fields = tiny.training(tmp_path / f"loss-{path.name}", restore_from_path=str(path))
        measured = evaluate_loss(c.LossConfig(**fields, splits=["test"], limit_batches=4))
        losses.append(measured.metrics["test"]["loss"])
    assert 0 < abs(losses[1] - losses[0]) < 0.05
    config.qformat = "int8_sq"
    with pytest.raises(OutputExistsError, match="other settings \\(qformat\\)"):
        quantize(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qformat": "nvfp4"}, "qformat = 'nvfp4' must be one of fp8, int4_awq, int8_sq, bf16"),
        ({"export": "onnx"}, "export = 'onnx' must be one of hf, trtllm"),
        ({"data": c.CalibrationDataConfig()}, "data.source is missing"),
        ({"qformat": "int4_awq", "server": "vllm"}, "vLLM does not load ModelOpt's int4_awq .* qformat=fp8"),
        ({"qformat": "int4_awq", "server": "sglang"}, "SGLang does not load ModelOpt's int4_awq"),
        ({"qformat": "int8_sq", "server": "trtllm"}, "does not load ModelOpt's int8_sq .*export=trtllm"),
        ({"export": "trtllm", "server": "vllm"}, "vLLM loads Hugging Face directories only: give export=hf"),
        ({"output": "x.nemo"}, "named like an archive"),
        ({"tp_size": 0}, "tp_size = 0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(fields, message):
    with pytest.raises(ConfigError, match=message):
        data = c.CalibrationDataConfig(source="text.txt")
        c.validated(c.QuantizeConfig(**{"source": "a", "output": "b", "data": data, **fields}))


@pytest.mark.parametrize(
    ("name", "fields", "error", "message"),
    [
        ("llama", {"tp_size": 4}, ConfigError, "num_query_groups 2 mod 4 = 2; .* divides it \\(1, 2\\)"),
        ("llama", {"pp_size": 3}, ConfigError, "num_layers 2 mod 3"),
        ("llama", {"qformat": "int4_awq", "export": "trtllm", "tp_size": 2}, ConfigError,
         "on each of 2 ranks: hidden_size 128 mod 256"),
        ("llama", {"qformat": "int4_awq", "tp_size": 2}, ConfigError, "heads x head size 4 x 32 = 128 mod 256 = 128; "
         "nearest legal: prune.num_attention_heads=8"),
        ("qwen2", {"export": "trtllm"}, ConfigError, "no TensorRT-LLM checkpoint of qwen2 models; .*export=hf"),
        ("qwen3", {"export": "trtllm"}, ConfigError, "no TensorRT-LLM checkpoint of qwen3 models; .*export=hf"),
        ("llama", {"num_samples": 9999}, DataError, "9999 sequences of 32 are 319968: give num_samples=\\d+"),
        ("llama", {"seq_length": 65}, ConfigError, "seq_length = 65 is above the model's 64"),
        ("llama", {"accelerator": "gpu"}, EngineError, "no GPU"),
        ("llama", {"data": c.CalibrationDataConfig(source="nowhere.txt")}, DataError, "nowhere.txt does not exist"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_refused_before_any_work(
    name, fields, error, message, shelf, tmp_path, monkeypatch
):
    if "accelerator" in fields:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=message):
        quantize(settings(shelf, model(shelf, name), tmp_path / "out", **fields))
    assert not list(tmp_path.iterdir())


def test_what_is_there_already_is_not_replaced(shelf, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(OutputExistsError, match="would be overwritten"):
        quantize(settings(shelf, model(shelf, "llama"), tmp_path / "out", qformat="bf16"))
    assert (tmp_path / "out" / "mine").read_text() == "kept"
    quantize(settings(shelf, model(shelf, "llama"), tmp_path / "out", qformat="bf16", overwrite=True))
    assert Manifest.read(tmp_path / "out").stage == "quantize"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "the weights are quantised \\(gptq\\); known here are ModelOpt's"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantised \\(modelopt, NVFP4\\)"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "is not what FP8 stores"),
    ],
)
def test_quantisation_of_other_kinds_is_refused_by_name(changes, message, shelf, tmp_path):
    output = tmp_path / "out"
    quantize(settings(shelf, model(shelf, "llama"), output, qformat="int8_sq"))
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, "quantization_config": changes}))
    (output / "hf_quant_config.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(output, quantized=True)


def test_the_command_prints_errors_and_the_commands_that_serve_it(shelf, tmp_path):
    output = tmp_path / "out"
    run = subprocess.run(
        [sys.executable, "-m", "nemo_minitron", "quantize", str(model(shelf, "llama")), "qformat=fp8", "export=hf",
         f"output={output}", f"data.source={shelf / 'text.txt'}", "num_samples=8", "seq_length=32", "tp_size=2",
         "accelerator=cpu"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert f"trtllm-serve {output} --tp_size 2" in run.stdout
    assert f"vllm serve {output} --quantization modelopt --tensor-parallel-size 2" in run.stdout
    assert f"python -m sglang.launch_server --model-path {output} --quantization modelopt_fp8 --tp-size 2" in run.stdout
    assert "mlp.down_proj" in run.stdout and "relative_error: 0.02" in run.stdout
    assert all(line.startswith("calibrate: sample ") for line in run.stderr.splitlines()), run.stderr
