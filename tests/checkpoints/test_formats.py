"""Every family through every format: bits, logits, and what Megatron and transformers themselves write and read."""

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from models import FAMILIES, build, equal, save, stored
from nemo_minitron.artifacts import fingerprint
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.tensors import same_bits
from nemo_minitron.config import ConvertConfig, validated
from nemo_minitron.conversion.convert import convert
from nemo_minitron.errors import CheckpointError, MinitronError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def run(source: Path, output: Path, **settings) -> Path:
    convert(validated(ConvertConfig(source=str(source), output=str(output), **{"verify": "tensors", **settings})))
    return output


def as_in_llama31(family: str) -> dict:
    """Changes to a family whose rotary scaling is made for few positions: Megatron-Bridge knows Llama 3.1's only."""
    scaling = FAMILIES[family][1].get("rope_scaling")
    return {"rope_scaling": {**scaling, "original_max_position_embeddings": 8192}} if scaling else {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_through_all_formats_keeps_every_bit(family, dtype, tmp_path):
    start = save(family, DTYPES[dtype], tmp_path / "start", shard="100KB", **as_in_llama31(family))
    backend = "zarr" if dtype == "fp32" else "torch_dist"
    archive = run(start, tmp_path / "archive.nemo", weights=backend)
    nemo2 = run(archive, tmp_path / "nemo2")
    bridge = run(nemo2, tmp_path / "bridge", to="bridge")
    end = run(bridge, tmp_path / "end", to="hf")
    again = run(end, tmp_path / "again.nemo", weights=backend)
    back = run(run(bridge, tmp_path / "nemo2-again"), tmp_path / "bridge-again", to="bridge")
    assert equal(stored(start), stored(end))
    first, last = open_checkpoint(archive).tensors, open_checkpoint(again).tensors
    assert all(same_bits(first[name], last[name]) for name in first.keys() | last.keys())
    weights = Path("iter_0000000") / "__0_0.distcp"
    assert (back / weights).read_bytes() == (bridge / weights).read_bytes()
    architectures = [open_checkpoint(path).architecture for path in (start, archive, nemo2, bridge, end, again, back)]
    assert all(architecture == architectures[0] for architecture in architectures)
    assert architectures[0].parameters() == build(family, torch.float32).num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_and_megatron_compute_the_same(family, tmp_path, monkeypatch):
    """Source by transformers, NeMo-2 by Megatron's own strict loader, export by transformers: fp32, 1e-4 relative.

    Megatron's model is NeMo's, and the one that Megatron Core builds alone, bit for bit.
    """
    from nemo_minitron.conversion.verify import logits
    from nemo_minitron.megatron import session as engine

    start = save(family, torch.float32, tmp_path / "start")
    nemo2 = run(start, tmp_path / "nemo2")
    archive = run(nemo2, tmp_path / "archive.nemo")
    end = run(archive, tmp_path / "end", to="hf")
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = build(family, torch.float32)(tokens).logits
    bridged = [] if as_in_llama31(family) else [run(archive, tmp_path / "bridge", to="bridge")]
    for path in (nemo2, archive, *bridged, end):
        found = logits(open_checkpoint(path), tokens)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), path
    assert json.loads((end / "config.json").read_text())["architectures"] == [
        type(build(family, torch.float32)).__name__
    ]
    found = logits(open_checkpoint(nemo2), tokens)
    monkeypatch.setattr(engine, "has_nemo", lambda: False)
    assert torch.equal(logits(open_checkpoint(nemo2), tokens), found)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_configs_of_megatron_core_alone_are_those_of_nemo(family, bf16, tmp_path, monkeypatch):
    """Every field that Megatron Core knows."""
    from dataclasses import fields

    from megatron.core.transformer import TransformerConfig

    from nemo_minitron.megatron import session as engine
    from nemo_minitron.megatron.layout import Layout

    architecture = open_checkpoint(save(family, torch.float32, tmp_path)).architecture
    layout = Layout(cuda=False, bf16=bf16)
    nemo = engine.model_config(architecture, layout, local_spec=True)
    monkeypatch.setattr(engine, "has_nemo", lambda: False)
    alone = engine.model_config(architecture, layout, local_spec=True)
    assert type(alone) is TransformerConfig and type(nemo) is not TransformerConfig
    different = {field.name: (getattr(nemo, field.name), getattr(alone, field.name)) for field in fields(alone)}
    assert {name: pair for name, pair in different.items() if told(pair[0]) != told(pair[1])} == {}


def told(value):
    """What tells a field's value; partial functions, which draw the first weights, are made anew for each config."""
    return (value.func, value.args, value.keywords) if isinstance(value, functools.partial) else value


@pytest.mark.parametrize("family", ["llama31", "minitron-width", "qwen2", "qwen3"])
def test_bf16_weights_compute_the_same(family, tmp_path):
    """From bf16 bits, both sides in fp32: nothing but the order of sums differs."""
    from nemo_minitron.conversion.verify import logits

    start = save(family, torch.bfloat16, tmp_path / "start")
    nemo2 = run(start, tmp_path / "nemo2", verify="logits")
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(1))
    kind = type(build(family, torch.bfloat16))
    with torch.no_grad():  # loaded, not cast: a cast rounds the rotary frequencies too
        exact = kind.from_pretrained(start, torch_dtype=torch.float32)(tokens).logits
        rounded = kind.from_pretrained(start, torch_dtype=torch.bfloat16)(tokens).logits.float()
    found = logits(open_checkpoint(nemo2), tokens)
    assert (found - exact).abs().max() <= 1e-4 * exact.abs().max()
    assert (found - rounded).abs().max() <= 2 * (rounded - exact).abs().max()  # within bf16's own rounding


def sample(tmp_path: Path, family: str = "llama3") -> Path:
    """A small Hugging Face checkpoint with a tokenizer."""
    from nemo_minitron.data.tokenizer import train_bpe

    folder = save(family, torch.float32, tmp_path / "sample")
    train_bpe(["to be or not to be"] * 10, 257, folder)
    return folder


def test_tokenizer_and_generation_settings_travel(tmp_path):
    start = sample(tmp_path)
    (start / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6}')
    end = run(run(start, tmp_path / "nemo2"), tmp_path / "end", to="hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (end / name).read_bytes() == (start / name).read_bytes()
    settings = json.loads((end / "generation_config.json").read_text())
    assert settings == {"bos_token_id": 1, "eos_token_id": [1, 2], "temperature": 0.6}  # the first from config.json
    archive = open_checkpoint(run(start, tmp_path / "a.nemo"))
    assert archive.tokenizer_files.files["tokenizer.json"].read() == (start / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_is_only_named_travels_with_a_warning_or_is_put_in(tmp_path, capsys):
    start = sample(tmp_path)
    archive = run(start, tmp_path / "a.nemo")
    unpacked = tmp_path / "unpacked"
    with tarfile.open(archive) as opened:
        opened.extractall(unpacked, filter="data")
    shutil.rmtree(unpacked / "tokenizer")
    config = yaml.safe_load((unpacked / "model_config.yaml").read_text())
    config["tokenizer"]["type"] = "meta-llama/Llama-3.1-8B"
    (unpacked / "model_config.yaml").write_text(yaml.safe_dump(config))
    for output, to in ((tmp_path / "named", "nemo2"), (tmp_path / "named.nemo", "nemo1")):
        found = open_checkpoint(run(unpacked, output, to=to)).tokenizer_files
        assert (found.name, dict(found.files)) == ("meta-llama/Llama-3.1-8B", {})
        assert "only named in the checkpoint" in capsys.readouterr().err
    put_in = open_checkpoint(run(unpacked, tmp_path / "put-in", tokenizer=str(start)))
    assert put_in.tokenizer_files.files["tokenizer.json"].read() == (start / "tokenizer.json").read_bytes()


def test_padding_of_the_vocabulary_is_made_noted_and_trimmed(tmp_path):
    """259 rows padded to 384 for tensor parallel; an export has the 259 again, bit for bit."""
    start = save("llama2", torch.bfloat16, tmp_path / "start")
    padded = run(start, tmp_path / "padded", pad_vocab_to_multiple_of=128)
    assert open_checkpoint(padded).architecture.vocab_size == 384
    archive = open_checkpoint(run(padded, tmp_path / "padded.nemo"))
    assert (archive.architecture.vocab_size, archive.architecture.vocab_padding) == (384, 125)
    assert not archive.tensors["output_layer.weight"].read()[259:].any()
    end = run(tmp_path / "padded.nemo", tmp_path / "end", to="hf")
    assert equal(stored(start), stored(end))
    whole = run(padded, tmp_path / "whole", to="hf", vocab_size=384)
    assert json.loads((whole / "config.json").read_text())["vocab_size"] == 384


def test_another_precision_is_torchs_own_rounding(tmp_path):
    start = save("qwen2", torch.float32, tmp_path / "start")
    end = run(start, tmp_path / "end", to="hf", dtype="bf16", verify="logits")
    rounded = {name: value.bfloat16() for name, value in stored(start).items()}
    assert equal(rounded, stored(end))


def test_a_conversion_that_went_wrong_is_found(tmp_path):
    """What verify compares with is what was to be written, so one wrong bit in one sampled tensor is enough."""
    from nemo_minitron.checkpoints.tensors import in_memory
    from nemo_minitron.conversion import verify

    start = open_checkpoint(save("llama3", torch.float32, tmp_path / "start"))
    result = open_checkpoint(run(start.path, tmp_path / "nemo2"))
    verify.compare_tensors(start.tensors, result, 0)
    norm = start.tensors["decoder.final_layernorm.weight"].read()
    norm[3] += 1e-6
    with pytest.raises(CheckpointError, match="decoder.final_layernorm.weight is not what was to be written"):
        verify.compare_tensors({**start.tensors, "decoder.final_layernorm.weight": in_memory(norm)}, result, 0)
    other = save("llama3", torch.float32, tmp_path / "other")
    weights = stored(other)
    weights["model.layers.1.self_attn.q_proj.weight"][:16] *= 1.01
    from safetensors.torch import save_file

    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="logits differ"):
        verify.compare_logits(open_checkpoint(other), result, 0)


def test_converting_reads_one_tensor_at_a_time(tmp_path):
    """Peak memory: the largest tensor and a constant, though the checkpoint is many times that."""
    import tracemalloc

    from nemo_minitron.architecture import Architecture
    from nemo_minitron.checkpoints.checkpoint import write_checkpoint
    from nemo_minitron.checkpoints.names import canonical_shapes
    from nemo_minitron.checkpoints.tensors import BLOCK, Computed

    architecture = Architecture(
        num_layers=24, hidden_size=512, ffn_hidden_size=2048, num_attention_heads=8, kv_channels=64, vocab_size=1024
    )
    made = {
        name: Computed(shape, "float32", lambda shape=shape: torch.ones(shape))
        for name, shape in canonical_shapes(architecture).items()
    }
    write_checkpoint(tmp_path / "hf", "hf", architecture, made, None, {})
    largest = max(tensor.nbytes for tensor in made.values())
    hops = (("hf", "nemo2", "nemo2"), ("nemo2", "a.nemo", "nemo1"), ("a.nemo", "b", "bridge"), ("b", "again", "hf"))
    for source, output, to in hops:
        checkpoint = open_checkpoint(tmp_path / source)
        tracemalloc.start()
        write_checkpoint(tmp_path / output, to, checkpoint.architecture, checkpoint.tensors, None, {})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < largest + 3 * BLOCK < sum(tensor.nbytes for tensor in made.values()) / 5
    assert equal(stored(tmp_path / "hf"), stored(tmp_path / "again"))


CONVERT = """
import sys
from nemo_minitron.cli.main import main

sys.exit(main(["convert", *sys.argv[1:], "verify=none"]))
"""


def test_converting_needs_neither_nemo_nor_megatron_nor_torch(tmp_path):
    start = save("llama31", torch.bfloat16, tmp_path / "start")
    script = CONVERT.replace("sys.exit(main", "code = (main") + (
        "\nengines = [name for name in ('nemo', 'megatron', 'modelopt', 'torch') if name in sys.modules]"
        "\nassert not engines, engines\nsys.exit(code)"
    )
    for source, output in ((start, tmp_path / "nemo2"), (tmp_path / "nemo2", tmp_path / "a.nemo")):
        subprocess.run([sys.executable, "-c", script, str(source), str(output)], check=True)
    script = script.replace('"verify=none"', '"verify=tensors", "to=hf"')
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.nemo"), str(tmp_path / "end")], check=True)
    assert equal(stored(start), stored(tmp_path / "end"))


def written(folder: Path) -> int:
    """Bytes in a folder that somebody else is writing to."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(root, name)).st_size
    return total


@pytest.mark.parametrize("output", ["nemo2", "a.nemo"])
def test_a_kill_at_any_moment_leaves_nothing_that_looks_finished(output, tmp_path):
    """SIGKILL after a seeded share of the output is written; the next try makes the very same result."""
    import random
    import time

    start = save("nemo-14487", torch.float32, tmp_path / "start")
    reference = run(start, tmp_path / "reference" / output)
    chance = random.Random(7)
    for _ in range(4):
        limit = chance.randrange(200_000, 6_000_000)
        child = subprocess.Popen([sys.executable, "-c", CONVERT, str(start), str(tmp_path / output)])
        partial = tmp_path / f".{output}.partial"
        deadline = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < deadline:
            if written(partial) >= limit:
                break
        child.kill()
        child.wait()
        if (tmp_path / output).exists():  # it was faster
            break
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path / output)
    assert fingerprint(run(start, tmp_path / output)) == fingerprint(reference)


def test_a_full_disk_leaves_no_half_result(tmp_path):
    start = save("llama3", torch.float32, tmp_path / "start")
    limited = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n{CONVERT}"
    done = subprocess.run(
        [sys.executable, "-c", limited, str(start), str(tmp_path / "a.nemo")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"no space left on the disk of {tmp_path}/a.nemo while writing it")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["start"]


def test_a_result_that_does_not_fit_is_refused_before_the_first_write(tmp_path):
    from nemo_minitron.conversion.writing import check_room

    with pytest.raises(MinitronError, match=r"needs 1000000.0 GB, the disk has .* GB left"):
        check_room(tmp_path / "a.nemo", 10**15)


def test_what_transformers_cannot_express_is_refused_before_anything_is_written(tmp_path):
    from nemo_minitron.architecture import Architecture
    from nemo_minitron.checkpoints.checkpoint import write_checkpoint
    from nemo_minitron.checkpoints.names import canonical_shapes
    from nemo_minitron.checkpoints.tensors import in_memory

    architecture = Architecture(
        family="gpt", num_layers=1, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, vocab_size=16,
        activation="gelu", gated_linear_unit=False, normalization="LayerNorm",
    )  # fmt: skip
    tensors = {name: in_memory(torch.ones(shape)) for name, shape in canonical_shapes(architecture).items()}
    write_checkpoint(tmp_path / "nemo2", "nemo2", architecture, tensors, None, {})
    with pytest.raises(CheckpointError, match="family gpt has no class there"):
        run(tmp_path / "nemo2", tmp_path / "hf", to="hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nemo2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma'; known here are llama, mistral, nemotron, qwen2, qwen3"),
        ({"model_type": "qwen3_moe"}, "Qwen3-MoE: not yet"),
        ({"model_type": "phi3"}, "Phi-4-mini: not yet; Megatron Core has no LongRoPE, .*partial rotary"),
        ({"model_type": "nemotron-nas"}, "layers of several shapes .*: not yet; .*AutoBridge takes this one"),
        ({"block_configs": [{"ffn": {"ffn_mult": 2.625}}]}, "layers of several shapes .*block_configs"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn'"),
        ({"attention_bias": True}, "biases in both or neither"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new' is not known"),
        ({"intermediate_size": 100}, "gate_proj.weight is \\(96, 64\\), config.json makes it \\(100, 64\\)"),
        ({"num_hidden_layers": 3}, "missing model.layers.2"),
        ({"num_hidden_layers": 1}, "left over model.layers.1"),
        ({"vocab_size": None}, "does not state vocab_size"),
        ({"num_attention_heads": -4}, "num_attention_heads = -4 is not a size"),
    ],
)
def test_a_hugging_face_configuration_that_does_not_fit_is_refused_by_name(changes, message, tmp_path):
    start = save("llama3", torch.float32, tmp_path / "start")
    config = json.loads((start / "config.json").read_text())
    config.pop("rope_parameters", None)  # transformers 5 writes it, and a change must not contradict it
    (start / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(start)


def test_what_lies_beside_the_weights_is_passed_over(tmp_path):
    """Old buffers, a stored copy of tied embeddings, modelopt_state, and config.json as transformers 5 writes it."""
    from safetensors.torch import save_file

    start = save("llama32-tied", torch.float32, tmp_path / "start")
    before = open_checkpoint(start)
    tensors = stored(start)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, start / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((start / "config.json").read_text())
    if "rope_parameters" not in config:
        config["rope_parameters"] = {**config.pop("rope_scaling"), "rope_theta": config.pop("rope_theta")}
    config["dtype"] = config.pop("dtype", config.pop("torch_dtype", "float32"))
    (start / "config.json").write_text(json.dumps(config))
    after = open_checkpoint(start)
    assert after.architecture == before.architecture
    assert after.tensors.keys() == before.tensors.keys()
    nemo2 = run(start, tmp_path / "nemo2")
    (nemo2 / "weights" / "modelopt_state").mkdir()
    (nemo2 / "weights" / "modelopt_state" / "__0_0.distcp").write_bytes(b"anything")
    assert open_checkpoint(nemo2).architecture == before.architecture


def test_verify_runs_both_models_where_they_fit_and_compares_bits_where_not(tmp_path, monkeypatch):
    from nemo_minitron.conversion import verify

    source = open_checkpoint(save("llama3", torch.float32, tmp_path / "start"))
    assert verify.resolve("auto", source) == "logits"
    monkeypatch.setattr(verify, "_available_memory", lambda: 4 * source.architecture.parameters())
    assert verify.resolve("auto", source) == "tensors"
    assert verify.resolve("logits", source) == "logits"


def test_a_result_is_verified_later_if_more_is_asked_of_it(tmp_path, capsys):
    start = save("llama3", torch.float32, tmp_path / "start")
    once = ConvertConfig(source=str(start), output=str(tmp_path / "nemo2"), verify="none")
    assert convert(once).metrics["verified"] == "none"
    again = ConvertConfig(source=str(start), output=str(tmp_path / "nemo2"), verify="tensors")
    assert convert(again).metrics["verified"] == "tensors"


def test_two_conversions_to_one_target_at_once_do_not_corrupt_it(tmp_path):
    """One makes it; the other is told so, or finds it made."""
    start = save("nemo-14487", torch.float32, tmp_path / "start")
    output = tmp_path / "a.nemo"
    children = [
        subprocess.Popen([sys.executable, "-c", CONVERT, str(start), str(output)], stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    messages = [child.communicate()[1] for child in children]
    codes = [child.returncode for child in children]
    assert 0 in codes
    assert all("is being made by another process" in said for said, code in zip(messages, codes) if code)
    assert equal(stored(run(output, tmp_path / "end", to="hf")), stored(start))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nemo", "end", "start"]


def test_inspect_tells_what_is_there_and_what_is_odd(tmp_path, capsys):
    from nemo_minitron.cli.main import main

    start = save("minitron-width", torch.bfloat16, tmp_path / "start")
    assert main(["inspect", str(start)]) == 0
    text = capsys.readouterr().out
    for part in ("nemotron", "head size 32", "LayerNorm with gamma stored minus 1", "on 50% of each head", "bfloat16"):
        assert part in text
    assert "heads 4 x head size 32 = 128, not the hidden size 48" in text
    assert "there is no tokenizer" in text
    assert main(["inspect", str(run(start, tmp_path / "a.nemo")), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["parameters"] == build("minitron-width", torch.float32).num_parameters()
    assert described["format"] == "NeMo-1 archive (.nemo)"
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_settings_and_checkpoints_know_the_same_formats():
    """config stands below checkpoints and has a table of its own of what settings call a format."""
    from dataclasses import fields

    from nemo_minitron.checkpoints.formats.table import FORMATS
    from nemo_minitron.config.schemas.formats import OPTIONS, OUTPUT_FORMATS

    assert FORMATS.keys() == OUTPUT_FORMATS.keys()
    assert all(name == entry.name for name, entry in FORMATS.items())
    assert {name for entry in OUTPUT_FORMATS.values() for name in entry.options} == OPTIONS.keys()
    assert OPTIONS.keys() <= {field.name for field in fields(ConvertConfig)}


def test_a_new_format_is_a_class_and_a_line_in_each_table(tmp_path, monkeypatch, capsys):
    """Nothing else asks for a format's name: one that is made here is read, written, inspected and refused options."""
    from nemo_minitron.architecture import Architecture
    from nemo_minitron.checkpoints.formats.base import Contents, Format
    from nemo_minitron.checkpoints.formats.table import FORMATS
    from nemo_minitron.checkpoints.tensors import in_memory
    from nemo_minitron.config import InspectConfig
    from nemo_minitron.config.schemas.formats import OUTPUT_FORMATS, OutputFormat
    from nemo_minitron.conversion.inspect import inspect
    from nemo_minitron.errors import ConfigError

    class StateDict(Format):
        name, title, folder_mark = "state", "state dict", "model.pt (state dict)"

        def detect(self, path):
            return (path / "model.pt").is_file()

        def read(self, path):
            return Contents(
                architecture=Architecture.from_dict(json.loads((path / "model.json").read_text())),
                tensors={name: in_memory(value) for name, value in torch.load(path / "model.pt").items()},
                tokenizer_files=None,
                generation={},
                size=(path / "model.pt").stat().st_size,
                layout="pt",
                remarks=("it was made for a test",),
            )

        def write(self, path, model, options):
            path.mkdir(exist_ok=True)
            (path / "model.json").write_text(json.dumps(model.architecture.to_dict()))
            torch.save({name: tensor.read() for name, tensor in model.tensors.items()}, path / "model.pt")

    monkeypatch.setitem(FORMATS, "state", StateDict())
    monkeypatch.setitem(OUTPUT_FORMATS, "state", OutputFormat(name="state"))
    start = save("llama3", torch.bfloat16, tmp_path / "start")
    made = run(start, tmp_path / "made", to="state")
    end = run(made, tmp_path / "end", to="hf", verify="logits")
    assert equal(stored(start), stored(end))
    inspect(InspectConfig(source=str(made)))
    shown = capsys.readouterr().out
    assert "state dict, weights in pt" in shown and "it was made for a test" in shown
    with pytest.raises(ConfigError, match="vocab_size is for Hugging Face; the result is state"):
        run(start, tmp_path / "other", to="state", vocab_size=100)
    with pytest.raises(CheckpointError, match=r"config.json \(Hugging Face\) or model.pt \(state dict\)"):
        open_checkpoint(tmp_path)
