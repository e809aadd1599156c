"""Untrusted checkpoints are data: nothing that a file says is run, nothing outside is read, sizes are not believed."""

import argparse
import builtins
import dataclasses
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
import yaml

from nemo_minitron.architecture import Architecture, RopeScaling
from nemo_minitron.checkpoints.checkpoint import open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.file_bytes import InMemory, whole
from nemo_minitron.checkpoints.formats.base import WriteOptions
from nemo_minitron.checkpoints.formats.gguf import header as gguf_header
from nemo_minitron.checkpoints.formats.nemo1 import config as nemo1
from nemo_minitron.checkpoints.names import canonical_shapes
from nemo_minitron.checkpoints.storage.pickle_writer import Call, Global, Instance, dumps
from nemo_minitron.checkpoints.tensors import Runs, in_memory
from nemo_minitron.checkpoints.tokenizer import Tokenizer
from nemo_minitron.conversion.inspect import describe
from nemo_minitron.errors import CheckpointError

ARCHITECTURE = Architecture(
    num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2, kv_channels=4,
    vocab_size=32, seq_length=16,
)  # fmt: skip


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in canonical_shapes(ARCHITECTURE).items()
    }


def make(folder: Path, kind: str) -> Path:
    """A valid tiny checkpoint: nemo1, zarr, ckpt, nemo2, bridge, megatron-lm, hf or gguf; archives are unpacked."""
    tensors = {name: in_memory(value) for name, value in weights().items()}
    if kind == "gguf":
        file = folder.with_suffix(".gguf")
        write_checkpoint(file, kind, ARCHITECTURE, tensors, letters(), {})
        return file
    if kind in ("nemo2", "bridge", "hf"):
        write_checkpoint(folder, kind, ARCHITECTURE, tensors, None, {}, WriteOptions(shard_bytes=2000))
        return folder
    if kind == "megatron-lm":
        return as_megatron_lm(make(folder, "bridge"), in_zip_of(ARGUMENTS))
    folder.mkdir()
    if kind == "ckpt":
        (folder / "model_config.yaml").write_text(nemo1.write_yaml(ARCHITECTURE, "bfloat16", None, "torch_dist"))
        torch.save({f"model.{name}": value for name, value in weights().items()}, folder / "model_weights.ckpt")
        return folder
    archive = folder.with_suffix(".nemo")
    backend = WriteOptions(weights="zarr" if kind == "zarr" else "torch_dist")
    write_checkpoint(archive, "nemo1", ARCHITECTURE, tensors, None, {}, backend)
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder


def letters() -> Tokenizer:
    """A byte-level BPE of a few letters and their merges, as its files."""
    words = {
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "model": {"type": "BPE", "vocab": dict(zip("abcdefgh", range(8))) | {"ab": 8}, "merges": ["a b"]},
    }  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "h"}
    files = {"tokenizer.json": json.dumps(words).encode(), "tokenizer_config.json": json.dumps(settings).encode()}
    return Tokenizer(files={name: InMemory(Path(name), 0, len(data), data) for name, data in files.items()})


def as_megatron_lm(folder: Path, common: bytes) -> Path:
    """A checkpoint of Bridge's with this common state in place of its description."""
    iteration = folder / "iter_0000000"
    (iteration / "run_config.yaml").unlink()
    (iteration / "common.pt").write_bytes(common)
    return folder


#: What Megatron-LM keeps of the arguments of ARCHITECTURE.
ARGUMENTS = argparse.Namespace(
    **{name: getattr(ARCHITECTURE, name) for name in (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
        "seq_length", "normalization", "layernorm_epsilon", "add_bias_linear", "rotary_base", "rotary_percent",
        "init_method_std",
    )},
    group_query_attention=True, swiglu=True, untie_embeddings_and_output_weights=True, position_embedding_type="rope",
    params_dtype=torch.bfloat16,
)  # fmt: skip


def in_zip_of(arguments: argparse.Namespace) -> bytes:
    file = io.BytesIO()
    torch.save({"args": arguments, "iteration": 0}, file)
    return file.getvalue()


def read_all(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in open_checkpoint(path).tensors.items()}


@pytest.fixture
def bait(tmp_path, monkeypatch) -> Path:
    """A file that appears if anything hostile runs."""
    return tmp_path / "executed"


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickles(bait: Path) -> dict[str, bytes]:
    """Pickles that would run something, or change something, if they were loaded as pickle loads."""
    path = str(bait)
    named = {
        "open": pickle.dumps(Calls(open, path, "w")),
        "os.system": pickle.dumps(Calls(os.system, f"touch {path}")),
        "eval": pickle.dumps(Calls(builtins.eval, f"open({path!r}, 'w')")),
        "exec": pickle.dumps(Calls(builtins.exec, f"open({path!r}, 'w')"), protocol=0),
        "getattr": pickle.dumps(Calls(getattr, Calls(__import__, "os"), "system")),
        "import": dumps(Call(Global("importlib", "import_module"), ("antigravity",))),
        "nested name": b"\x80\x04\x8c\x26torch.distributed.checkpoint.metadata\x8c\x0bos.system  \x93.",
        "method of an allowed module": b"\x80\x04\x8c\x0ftorch._utils   \x8c\x05_load\x93.",
        "torch.hub": dumps(Call(Global("torch.hub", "load"), ("x/y", "z"))),
        "numpy": dumps(Call(Global("numpy.core.multiarray", "_reconstruct"), ())),
        "functools": dumps(Call(Global("functools", "partial"), (Global("os", "system"), "true"))),
        "old instance": f"(ios\nsystem\nS'touch {path}'\no.".encode(),
        "INST": f"(S'touch {path}'\nios\nsystem\n.".encode(),
        "extension": b"\x80\x02\x82\x01.",
        "persistent id": b"Phttp://x\n.",
        "state for a class": dumps(Instance(Global("builtins", "dict"), {"__init__": 1})),
    }
    return named


@pytest.mark.parametrize("name", pickles(Path("x")))
@pytest.mark.parametrize("place", ["metadata", "ckpt", "piece", "arguments", "state of training"])
def test_a_pickle_that_calls_something_is_not_run(name, place, bait, tmp_path):
    content = pickles(bait)[name]
    if place == "metadata":
        folder = make(tmp_path / "c", "nemo2")
        (folder / "weights" / ".metadata").write_bytes(content)
    elif place == "ckpt":
        folder = make(tmp_path / "c", "ckpt")
        (folder / "model_weights.ckpt").write_bytes(in_zip(content))
    elif place == "arguments":
        folder = as_megatron_lm(make(tmp_path / "c", "bridge"), in_zip(content))
    elif place == "state of training":
        folder = make(tmp_path / "c", "bridge")
        (folder / "latest_train_state.pt").write_bytes(in_zip(content))
    else:  # a tensor's own description, inside a .distcp file
        folder = make(tmp_path / "c", "nemo1")
        replace_description(folder / "model_weights" / "__0_0.distcp", content)
    with pytest.raises(CheckpointError):
        read_all(folder)
    assert not bait.exists()


def in_zip(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def replace_description(path: Path, content: bytes) -> None:
    """Overwrites the pickles of all tensors in place, checksums too; what does not fit is cut."""
    data = bytearray(path.read_bytes())
    start = 0
    while (found := data.find(b"data.pkl\x80\x02ctorch._utils", start)) >= 0:
        begin = found + len("data.pkl")
        end = data.index(b".", data.index(b"OrderedDict", begin)) + 1
        old, new = bytes(data[begin:end]), content[: end - begin].ljust(end - begin, b".")
        data[begin:end] = new
        checksums = (struct.pack("<I", zlib.crc32(text)) for text in (old, new))
        data = bytearray(bytes(data).replace(*checksums))
        start = end
    assert start
    path.write_bytes(data)


@pytest.mark.parametrize("place", ["common.pt", "extra state", "entry in a ckpt"])
def test_what_is_passed_over_is_not_opened(place, bait, tmp_path):
    """Such files and entries may hold any pickle; the weights beside them are read."""
    hostile = pickle.dumps(Calls(open, str(bait), "w"))
    kind = "ckpt" if place.startswith("entry") else "zarr"
    folder = make(tmp_path / "c", kind)
    if place == "common.pt":
        (folder / "model_weights" / "common.pt").write_bytes(hostile)
    elif place == "extra state":
        key = "model.decoder.layers.mlp.linear_fc1._extra_state"
        (folder / "model_weights" / key).mkdir(exist_ok=True)
        (folder / "model_weights" / key / "shard_0_2.pt").write_bytes(hostile)
    else:
        state = {f"model.{name}": value for name, value in weights().items()}
        state["model.decoder.layers.0.mlp.linear_fc1._extra_state"] = io.BytesIO(hostile)
        torch.save(state, folder / "model_weights.ckpt")
    found = read_all(folder)
    assert all(torch.equal(found[name], value) for name, value in weights().items())
    assert not bait.exists()


def test_pickles_cannot_ask_for_memory(tmp_path):
    """A memo index of 2^31, and lengths that the file does not have."""
    folder = make(tmp_path / "c", "nemo2")
    bombs = [
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fab.",
        b"\x80\x02\x8b\xff\xff\xff\x7fab.",
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    ]
    for bomb in bombs:
        (folder / "weights" / ".metadata").write_bytes(bomb)
        tracemalloc.start()
        with pytest.raises(CheckpointError):
            open_checkpoint(folder)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
        tracemalloc.stop()


# Archives


def archive(tmp_path: Path, *members: tarfile.TarInfo, extra: bytes = b"") -> Path:
    """A valid archive with further members."""
    folder = make(tmp_path / "c", "nemo1")
    path = tmp_path / "hostile.nemo"
    with tarfile.open(path, "w") as opened:
        opened.add(folder, ".")
        for member in members:
            opened.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 1) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, target, size if kind == tarfile.REGTYPE else 0
    return made


@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        (member("/etc/cron.d/x"), "leads outside"),
        (member("../x"), "leads outside"),
        (member("a/../../x"), "leads outside"),
        (member("..\\x"), "leads outside"),
        (member("link", tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
        (member("link", tarfile.LNKTYPE, "model_config.yaml"), "is a link"),
        (member("device", tarfile.CHRTYPE), "is a special file"),
        (member("device", tarfile.BLKTYPE), "is a special file"),
        (member("fifo", tarfile.FIFOTYPE), "is a special file"),
        (member("./model_config.yaml"), "there twice"),
        (member("deeper/model_config.yaml"), "has 2 files called model_config.yaml"),
    ],
)
def test_members_that_a_checkpoint_does_not_have_are_refused(hostile, message, tmp_path):
    before = sorted(tmp_path.parent.rglob("x"))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(archive(tmp_path, hostile))
    assert sorted(tmp_path.parent.rglob("x")) == before


@pytest.mark.parametrize(
    "size", [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"\xff" + b"\0" * 10 + b"\x01"]
)
def test_sizes_in_tar_headers_that_lie_end_at_once(size, tmp_path):
    """Negative ones sent tarfile backwards, for ever (CVE-2025-8194)."""
    header = bytearray(member("x").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    for kind in (tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        header[156:157] = kind
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        path = tmp_path / "hostile.nemo"
        path.write_bytes(bytes(header) + b"\0" * 1024)
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_a_gzip_that_unpacks_to_far_too_much_is_refused(tmp_path, monkeypatch):
    import gzip

    from nemo_minitron.checkpoints import files

    monkeypatch.setattr(files, "UNPACKED_SPARE", 1 << 20)
    with gzip.open(tmp_path / "bomb.nemo", "wb") as packed:
        packed.write(bytes(8 << 20))
    with pytest.raises(CheckpointError, match="unpacks to more than"):
        open_checkpoint(tmp_path / "bomb.nemo")


# Configurations


def edit_json(path: Path, change) -> None:
    loaded = json.loads(path.read_text())
    change(loaded)
    path.write_text(json.dumps(loaded))


def config_of(loaded: dict) -> dict:
    return next(node for key, node in loaded["objects"].items() if key.startswith("llama_config"))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("Qwen3MoEConfig", {}, "Qwen3-MoE: not yet"),
        ("Qwen3Config30B_A3B", {}, "Qwen3-MoE: not yet"),
        ("Qwen3Config235B_A22B", {}, "Qwen3-MoE: not yet"),
        ("Qwen3Config", {"num_moe_experts": 8}, "Qwen3-MoE: not yet"),
        ("LlamaConfig", {"num_moe_experts": 8}, "mixture of experts: not yet"),
        ("Llama33NemotronSuper49BConfig", {}, "layers of several shapes .*Super and Ultra.*: not yet; .*AutoBridge"),
        ("Llama31NemotronUltra253BConfig", {}, "layers of several shapes"),
        ("LlamaConfig", {"heterogeneous_layers_config_encoded_json": "{}"}, "layers of several shapes"),
        ("Llama32EmbeddingConfig1B", {}, "tokens attend both ways"),
        ("Llama32Reranker500MConfig", {}, "tokens attend both ways"),
        ("LlamaBidirectionalConfig", {}, "tokens attend both ways"),
        ("Llama4ScoutExperts16Config", {}, "Llama 4: not yet"),
        ("NemotronHConfig8B", {}, "Nemotron-H, .*: not yet"),
        ("Qwen25VLConfig7B", {}, "Qwen-VL, .*: not yet"),
        ("Phi3ConfigMini", {}, "Phi-3, Phi-4 and Phi-4-mini: not yet; Megatron Core has no LongRoPE"),
    ],
)
def test_a_model_that_is_no_dense_decoder_of_a_family_is_refused_by_name(name, fields, message, tmp_path):
    folder = make(tmp_path / "c", "nemo2")

    def change(loaded):
        config = config_of(loaded)
        loaded["objects"][config["metadata"]["key"]]["items"][0][1]["name"] = name
        config["items"] += [
            [f"Attr(name='{field}')", {"type": "leaf", "value": value}] for field, value in fields.items()
        ]

    edit_json(folder / "context" / "io.json", change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_a_llama_nemotron_of_llamas_shape_is_a_llama(tmp_path):
    """NeMo's Llama31NemotronNano8BConfig, by what its class says where the file says nothing."""
    folder = make(tmp_path / "c", "nemo2")

    def change(loaded):
        loaded["objects"][config_of(loaded)["metadata"]["key"]]["items"][0][1]["name"] = "Llama31NemotronNano8BConfig"

    edit_json(folder / "context" / "io.json", change)
    assert open_checkpoint(folder).architecture == dataclasses.replace(ARCHITECTURE, rope_scaling=RopeScaling())


def test_io_json_that_names_a_callable_names_it_in_vain(bait, tmp_path):
    """As activation, as class of the config: read as names, which fit or not."""
    folder = make(tmp_path / "c", "nemo2")
    hostile = {"type": "pyref", "module": "os", "name": "system"}

    def activation(loaded):
        for item in config_of(loaded)["items"]:
            if item[0] == "Attr(name='activation_func')":
                item[1] = hostile

    edit_json(folder / "context" / "io.json", activation)
    with pytest.raises(CheckpointError, match="activation = 'system' must be one of"):
        open_checkpoint(folder)

    def config_class(loaded):
        key = config_of(loaded)["metadata"]["key"]
        loaded["objects"][key]["items"][0][1] = hostile

    folder = make(tmp_path / "d", "nemo2")
    edit_json(folder / "context" / "io.json", config_class)
    with pytest.raises(CheckpointError, match="names the config class system"):
        open_checkpoint(folder)
    assert not bait.exists()


@pytest.mark.parametrize(
    "text",
    [
        "[]", "3", "null", '{"objects": [], "root": {"key": "a"}}', '{"objects": {"a": 3}, "root": {"key": "a"}}',
        '{"objects": {"a": {"items": 3}}, "root": {"key": "a"}}', '{"objects": {}, "root": {"key": {}}}',
        '{"objects": {"a": {"items": [["Attr(name=\'model\')", {"type": "ref", "key": "a"}]]}}, "root": {"key": "a"}}',
        "[" * 200_000, '{"a": 1e999999}', "\xff",
    ],
)  # fmt: skip
def test_io_json_of_any_other_kind_is_refused(text, tmp_path):
    folder = make(tmp_path / "c", "nemo2")
    (folder / "context" / "io.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch executed']",
        "num_layers: !!python/name:os.system",
        "a: &a [1, 2]\nb: {<<: {c: d}}",
        "&a [*a]",
        "- just\n- a list",
        "a: [1, 2",
        "\x00",
        "{" * 10_000,
    ],
)
@pytest.mark.parametrize("kind", ["nemo1", "nemo2", "bridge"])
def test_yaml_with_tags_or_tricks_is_refused(text, kind, bait, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make(tmp_path / "c", kind)
    names = {"nemo1": "model_config.yaml", "nemo2": "context/model.yaml", "bridge": "iter_0000000/run_config.yaml"}
    (folder / names[kind]).write_text(text)
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)
    assert not bait.exists()


def test_yaml_in_which_aliases_multiply_costs_nothing(tmp_path):
    """Nine lines that stand for 10^9 values: they are shared in memory, and never printed."""
    folder = make(tmp_path / "c", "nemo1")
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    for name in ("num_layers", "activation", "position_embedding_type", "normalization", "kv_channels", "rotary_base"):
        config = yaml.safe_load((folder / "model_config.yaml").read_text())
        config.pop(name)
        text = "\n".join([*lines, yaml.safe_dump(config), f"{name}: *a9"])
        (folder / "c.yaml").write_text(text)
        os.replace(folder / "c.yaml", folder / "model_config.yaml")
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(folder)
        assert len(str(caught.value)) < 1000
        folder = make(tmp_path / name, "nemo1")


@pytest.mark.parametrize("kind", ["nemo1", "bridge", "megatron-lm", "hf"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("layers", 10**12), ("layers", -1), ("layers", "2"), ("layers", 2.5), ("layers", [2]), ("heads", 0),
     ("hidden", 1 << 40), ("hidden", {"a": 1}), ("heads", float("nan"))],
)  # fmt: skip
def test_sizes_in_a_configuration_are_not_believed(kind, name, value, tmp_path):
    folder = make(tmp_path / "c", kind)
    names = {
        "layers": "num_hidden_layers" if kind == "hf" else "num_layers",
        "heads": "num_attention_heads",
        "hidden": "hidden_size",
    }
    if kind == "bridge":
        path = folder / "iter_0000000" / "run_config.yaml"
        config = yaml.safe_load(path.read_text())
        config["model"][names[name]] = value
        path.write_text(yaml.safe_dump(config))
    elif kind == "megatron-lm":
        arguments = argparse.Namespace(**{**vars(ARGUMENTS), names[name]: value})
        (folder / "iter_0000000" / "common.pt").write_bytes(in_zip_of(arguments))
    elif kind == "hf":
        edit_json(folder / "config.json", lambda loaded: loaded.update({names[name]: value}))
    else:
        config = yaml.safe_load((folder / "model_config.yaml").read_text())
        (folder / "model_config.yaml").write_text(yaml.safe_dump({**config, names[name]: value}))
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["layernorm_epsilon", "rotary_base"])
def test_a_number_beyond_all_numbers_is_refused(name, tmp_path):
    folder = make(tmp_path / "c", "nemo1")
    config = yaml.safe_load((folder / "model_config.yaml").read_text())
    (folder / "model_config.yaml").write_text(yaml.safe_dump({**config, name: 10**400}))
    with pytest.raises(CheckpointError, match="is not a number"):
        open_checkpoint(folder)


def test_what_run_config_says_to_call_is_not_called(bait, tmp_path, monkeypatch):
    """As model, as activation, as argument, as tokenizer; Bridge would call it."""
    monkeypatch.chdir(tmp_path)
    call = {"_target_": "os.system", "_args_": [f"touch {bait}"], "_call_": True}
    for place in ("model", "activation_func", "params_dtype", "tokenizer", "checkpoint"):
        folder = make(tmp_path / place, "bridge")
        path = folder / "iter_0000000" / "run_config.yaml"
        config = yaml.safe_load(path.read_text())
        holder = config if place in config else config["model"]
        holder[place] = call if place != "model" else {**config["model"], **call}
        path.write_text(yaml.safe_dump(config))
        if place in ("model", "activation_func"):
            with pytest.raises(CheckpointError, match="os.system"):
                open_checkpoint(folder)
        else:
            assert len(read_all(folder)) == len(weights())
    assert not bait.exists()


# Names and sizes of weights


def test_names_that_lead_outside_are_refused(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(4096))
    (tmp_path / "tokenizer.model").write_bytes(b"secret")
    folder = make(tmp_path / "a", "nemo2")
    metadata = folder / "weights" / ".metadata"
    metadata.write_bytes(metadata.read_bytes().replace(b"__0_0.distcp", b"../../secret"))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        open_checkpoint(folder)
    folder = make(tmp_path / "b", "hf")
    edit_json(
        folder / "model.safetensors.index.json",
        lambda loaded: loaded["weight_map"].update({"model.norm.weight": "../secret"}),
    )
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        open_checkpoint(folder)
    folder = make(tmp_path / "c", "nemo1")
    config = yaml.safe_load((folder / "model_config.yaml").read_text())
    for name in ("nemo:../tokenizer.model", str(tmp_path / "tokenizer.model")):
        config["tokenizer"] = {"library": "sentencepiece", "model": name}
        (folder / "model_config.yaml").write_text(yaml.safe_dump(config))
        assert open_checkpoint(folder).tokenizer_files is None
    folder = make(tmp_path / "d", "nemo2")
    for name in ("../..", str(tmp_path), "../../secret"):
        tokenizer = [["Attr(name='pretrained_model_name')", {"type": "leaf", "value": name}]]

        def point(loaded, tokenizer=tokenizer):
            loaded["objects"]["t"] = {"items": tokenizer}
            model = next(node for key, node in loaded["objects"].items() if key.startswith("llama_model"))
            model["items"] = [*model["items"][:1], ["Attr(name='tokenizer')", {"type": "ref", "key": "t"}]]

        edit_json(folder / "context" / "io.json", point)
        found = open_checkpoint(folder).tokenizer_files
        assert found is None or not found.files


def safetensors_header(folder: Path, change) -> None:
    path = next(folder.glob("*.safetensors"))
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(next(value for key, value in header.items() if key != "__metadata__"))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [10**9, 10**9]}, {"shape": [-1, 16]}, {"shape": [1 << 63, 1 << 63]}, {"shape": "ab"},
        {"shape": [1.5]},
        {"data_offsets": [0, 1 << 62]}, {"data_offsets": [-4, 0]}, {"data_offsets": [64, 0]}, {"data_offsets": [0]},
        {"dtype": "F4096"}, {"dtype": []}, {"shape": None}, {"shape": [True, True]},
    ],
)  # fmt: skip
def test_headers_of_safetensors_that_lie_are_refused(change, tmp_path):
    folder = make(tmp_path / "c", "hf")
    safetensors_header(folder, lambda entry: entry.update(change))
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        read_all(folder)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("length", [1 << 62, 10**8, 0])
def test_a_header_length_that_lies_is_refused(length, tmp_path):
    folder = make(tmp_path / "c", "hf")
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2, 10**12, 16]}, {"chunks": [0, 1, 1]}, {"chunks": [-1, 32, 16]}, {"chunks": [1, 1, 1]},
        {"compressor": {"id": "zlib"}}, {"filters": [{"id": "delta"}]}, {"order": "F"}, {"dtype": "|O"},
        {"dtype": "<f4"}, {"dimension_separator": "/"}, {"shape": {}}, {"chunks": [1, 32, 17]},
    ],
)  # fmt: skip
def test_zarr_arrays_that_lie_are_refused(change, tmp_path):
    folder = make(tmp_path / "c", "zarr")
    key = "model.decoder.layers.self_attention.linear_qkv.weight"
    edit_json(folder / "model_weights" / key / ".zarray", lambda loaded: loaded.update(change))
    with pytest.raises(CheckpointError):
        read_all(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (struct.pack("<i", 32), struct.pack("<i", -32)),
        (struct.pack("<i", 32), struct.pack("<i", 1 << 30)),
        (struct.pack("<i", 16), struct.pack("<i", 0)),
        (b"offset", b"offzet"),
        (b"ctorch\nbfloat16\n", b"ctorch\ncomplex8\n"),
        (b"ctorch\nbfloat16\n", b"ctorch\nfloat64\n "),
    ],
)
def test_metadata_that_lies_is_refused(old, new, tmp_path):
    folder = make(tmp_path / "c", "nemo2")
    path = folder / "weights" / ".metadata"
    path.write_bytes(path.read_bytes().replace(old, new))
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        read_all(folder)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [((32, 16), (1, 32), 0), ((32, 16), (0, 0), 0), ((32, 16), (16, 1), 10**9), ((10**9, 16), (16, 1), 0),
     ((32, 16), (-16, 1), 0), ((32, 16), (16, 1), -1), ((32, 16), (16,), 0)],
)  # fmt: skip
def test_views_that_reach_outside_their_storage_are_refused(shape, stride, offset, tmp_path):
    from nemo_minitron.checkpoints.storage.pickle_writer import Persistent

    folder = make(tmp_path / "c", "ckpt")
    storage = ("storage", Global("torch", "BFloat16Storage"), "0", "cpu", 512)
    hooks = Call(Global("collections", "OrderedDict"), ())
    arguments = (Persistent(storage), offset, shape, stride, False, hooks)
    tensor = Call(Global("torch._utils", "_rebuild_tensor_v2"), arguments)
    with zipfile.ZipFile(folder / "model_weights.ckpt", "w") as written:
        written.writestr("archive/data.pkl", dumps({"model.embedding.word_embeddings.weight": tensor}))
        written.writestr("archive/data/0", bytes(1024))
    with pytest.raises(CheckpointError):
        read_all(folder)


def test_a_big_endian_file_is_refused(tmp_path):
    folder = make(tmp_path / "c", "ckpt")
    path = folder / "model_weights.ckpt"
    with zipfile.ZipFile(path) as read:
        records = {name: read.read(name) for name in read.namelist()}
    with zipfile.ZipFile(path, "w") as written:
        for name, content in records.items():
            written.writestr(name, b"big" if name.endswith("byteorder") else content)
    with pytest.raises(CheckpointError, match="big-endian"):
        open_checkpoint(folder)


# GGUF


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def text(value: bytes) -> bytes:
    return u64(len(value)) + value


def gguf_file(
    keys: bytes = b"", count: int = 0, tensors: bytes = b"", number: int = 0, data: bytes = b"", version: int = 3
) -> bytes:
    head = b"GGUF" + u32(version) + u64(number) + u64(count) + keys + tensors
    return head + bytes(-len(head) % 32) + data


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + u32(kind) + value


def entry(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + u32(len(shape)) + b"".join(map(u64, shape)) + u32(kind) + u64(offset)


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return u32(kind) + u64(count) + values


NESTED = u32(9) + u64(1)
GGUF_FILES = {
    "nothing": (b"", "does not begin with GGUF"),
    "magic only": (b"GGUF", "truncated or damaged"),
    "version 1": (gguf_file(version=1), "of GGUF version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "keys without end": (gguf_file(count=1 << 62), "claims 4611686018427387904 keys"),
    "tensors without end": (gguf_file(number=(1 << 64) - 1), "tensors, for which it is too short"),
    "length of a key": (gguf_file(u64(1 << 63) + b"a", 1), "asks for 9223372036854775808 bytes"),
    "length of a string": (gguf_file(key(b"a", 8, u64((1 << 64) - 1)), 1), "asks for 18446744073709551615 bytes"),
    "no UTF-8": (gguf_file(key(b"a", 8, text(b"\xff\xfe" * 8)), 1), "not UTF-8"),
    "kind of a value": (gguf_file(key(b"a", 13, u64(0)), 1), "unknown kind 13"),
    "kind of an element": (gguf_file(key(b"a", 9, array(99, 1, u64(0))), 1), "unknown kind 99"),
    "numbers without end": (gguf_file(key(b"a", 9, array(4, 1 << 40)), 1), "claims 1099511627776 numbers"),
    "size that overflows": (gguf_file(key(b"a", 9, array(10, 1 << 61)), 1), "claims 2305843009213693952 numbers"),
    "strings without end": (gguf_file(key(b"a", 9, array(8, 1 << 50)), 1), "elements of an array"),
    "arrays in arrays": (gguf_file(key(b"a", 9, NESTED * 5000 + array(0, 0)), 1), "more than 4 deep"),
    "a key twice": (gguf_file(key(b"a", 4, u32(1)) * 2, 2), "is there twice"),
    "alignment 0": (gguf_file(key(b"general.alignment", 4, u32(0)), 1), "no power of two"),
    "alignment 3": (gguf_file(key(b"general.alignment", 4, u32(3)), 1), "no power of two"),
    "alignment without end": (gguf_file(key(b"general.alignment", 4, u32(1 << 31)), 1), "no power of two"),
    "alignment in words": (gguf_file(key(b"general.alignment", 8, text(b"32")), 1), "no power of two"),
    "dimensions without end": (gguf_file(tensors=text(b"t") + u32(1 << 31) + bytes(64), number=1), "dimensions"),
    "no dimensions": (gguf_file(tensors=text(b"t") + u32(0) + bytes(64), number=1), "has 0 dimensions"),
    "shape that overflows": (gguf_file(tensors=entry(b"t", (1 << 33, 1 << 33)), number=1), "is truncated"),
    "shape that overflows to nothing": (gguf_file(tensors=entry(b"t", (1 << 32, 1 << 32)), number=1), "is truncated"),
    "largest shape": (gguf_file(tensors=entry(b"t", ((1 << 64) - 1,) * 4), number=1), "is truncated"),
    "half a block": (gguf_file(tensors=entry(b"t", (31,), 8), number=1, data=bytes(34)), "no whole blocks of 32"),
    "unknown type": (gguf_file(tensors=entry(b"t", (32,), 4), number=1, data=bytes(64)), "type 4, which is not read"),
    "type of whole numbers": (gguf_file(tensors=entry(b"t", (32,), 26), number=1, data=bytes(128)), "type I32"),
    "offset outside": (gguf_file(tensors=entry(b"t", (8,), 0, 1 << 62), number=1, data=bytes(32)), "lies at byte"),
    "offset that overflows": (
        gguf_file(tensors=entry(b"t", (8,), 0, (1 << 64) - 32), number=1, data=bytes(32)), "lies at byte"
    ),
    "offset between": (gguf_file(tensors=entry(b"t", (8,), 0, 4), number=1, data=bytes(64)), "lies at byte 4"),
    "one upon the other": (
        gguf_file(tensors=entry(b"a", (8,)) + entry(b"b", (8,)), number=2, data=bytes(64)), "'b' lies at byte 0"
    ),
    "a name twice": (
        gguf_file(tensors=entry(b"a", (8,)) + entry(b"a", (8,), 0, 32), number=2, data=bytes(64)), "is there twice"
    ),
    "more than it says": (gguf_file(tensors=entry(b"a", (8,)), number=1, data=bytes(96)), "its header describes"),
}  # fmt: skip


@pytest.mark.parametrize("name", GGUF_FILES)
def test_a_gguf_that_lies_is_refused(name, tmp_path):
    """Counts, lengths, kinds, alignment, shapes and offsets: nothing is believed, and little memory asked for."""
    data, message = GGUF_FILES[name]
    (tmp_path / "x.gguf").write_bytes(data)
    gguf_header.read(whole(make(tmp_path / "c", "gguf")))  # so that what it imports is not counted
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "x.gguf")
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def rewritten(path: Path, change, leave_out: str = "") -> Path:
    """A GGUF with other metadata, its tensors as they are."""
    found = gguf_header.read(whole(path))
    metadata = dict(found.metadata)
    change(metadata)
    tensors = [
        (entry.name, entry.kind, entry.shape, Runs(entry.shape, entry.kind.dtype, (entry.data,)))
        for entry in found.tensors.values()
        if entry.name != leave_out
    ]
    with path.with_name("changed.gguf").open("wb") as file:
        gguf_header.write(file, metadata, tensors)
    return path.with_name("changed.gguf")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"general.architecture": "qwen3moe"}, "Qwen3-MoE: not yet; of the family qwen3moe nothing is read"),
        ({"llama.rope.freq_base": 0.0}, "rotary_base = 0.0 is not a number that a model can have"),
        ({"llama.rope.freq_base": float("inf")}, "rotary_base = inf is not a number that a model can have"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "layernorm_epsilon = -1.0 is not a number that a model can"),
        ({"general.architecture": 3}, "holds a model of the family 3"),
        ({"general.architecture": "../../x"}, "holds a model of the family"),
        ({"llama.block_count": 3}, "contradicts itself: llama.block_count: 3 by its description, 2 found"),
        ({"llama.block_count": 2_000_000_000}, "contradicts itself"),
        ({"llama.block_count": ["2", "2"]}, "num_layers = a list is not a size"),
        ({"llama.embedding_length": 8}, "contradicts itself: columns of token_embd.weight"),
        ({"llama.feed_forward_length": [24, 12]}, "ffn_hidden_size = a list is not a size"),
        ({"llama.attention.head_count": 0}, "num_attention_heads = 0 is not a size"),
        ({"llama.attention.head_count": 8}, "contradicts itself: parameters"),
        ({"llama.attention.head_count": True}, "num_attention_heads = True is not a size"),
        ({"llama.attention.head_count_kv": 3}, "must be a multiple of num_query_groups 3"),
        ({"llama.attention.key_length": 0}, "kv_channels = 0 is not a size"),
        ({"llama.attention.value_length": 8}, "contradicts itself: llama.attention.value_length"),
        ({"llama.rope.dimension_count": 2}, "contradicts itself: llama.rope.dimension_count"),
        ({"llama.rope.dimension_count": "four"}, "contradicts itself: llama.rope.dimension_count"),
        ({"llama.attention.layer_norm_rms_epsilon": "small"}, "layernorm_epsilon = 'small' is not a number"),
        ({"llama.context_length": "16"}, "seq_length = '16' is not a size"),
        ({"llama.rope.scaling.type": "yarn"}, "scales its rotary frequencies .yarn."),
        ({"llama.rope.scaling.type": 7}, "scales its rotary frequencies .linear."),
        ({"llama.rope.scale_linear": 4.0}, "scales its rotary frequencies .linear."),
        ({"llama.attention.sliding_window": 8}, "sliding_window = 8 is not something a llama model here does"),
        ({"tokenizer.ggml.model": "bert"}, "has a tokenizer of the kind 'bert'"),
        ({"tokenizer.ggml.model": 7}, "has a tokenizer of the kind 7"),
        ({"tokenizer.ggml.model": "llama"}, "have no scores"),
        ({"tokenizer.ggml.pre": "falcon"}, "split as 'falcon'"),
        ({"tokenizer.ggml.pre": 3}, "split as 3"),
        ({"tokenizer.ggml.tokens": 7}, "not whole: 0 tokens"),
        ({"tokenizer.ggml.tokens": ["a"] * 32}, "not whole: 32 tokens, some of them none or twice"),
        ({"tokenizer.ggml.tokens": list("abcdefgh")}, "its tokens' kinds are not those of its tokens"),
        ({"tokenizer.ggml.token_type": "1"}, "its tokens' kinds are not those of its tokens"),
        ({"tokenizer.ggml.merges": ["a x"]}, "its merges are not of its tokens"),
        ({"tokenizer.ggml.merges": [1]}, "its merges are not of its tokens"),
        ({"tokenizer.ggml.merges": "a b"}, "its merges are not of its tokens"),
        ({"tokenizer.ggml.eos_token_id": 32}, "are no tokens of its 32"),
        ({"tokenizer.ggml.eos_token_id": "h"}, "are no tokens of its 32"),
        ({"tokenizer.chat_template": 5}, "is no text"),
        ({"tokenizer.chat_template.../../x": "evil"}, "is no name of a template"),
        ({"split.count": 2, "split.no": 0}, "parts are found by their names"),
        ({"split.count": "2"}, "a part of a GGUF split in '2'"),
    ],
)
def test_metadata_of_a_gguf_that_lie_are_refused(changed, message, tmp_path):
    path = rewritten(make(tmp_path / "c", "gguf"), lambda metadata: metadata.update(changed))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["blk.1.attn_k.weight", "output_norm.weight", "token_embd.weight"])
def test_a_gguf_without_one_of_its_tensors_is_refused(name, tmp_path):
    path = rewritten(make(tmp_path / "c", "gguf"), lambda metadata: None, leave_out=name)
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


def test_a_gguf_without_a_tokenizer_is_read_and_that_is_said(tmp_path):
    def without(metadata: dict) -> None:
        for name in [name for name in metadata if name.startswith("tokenizer.")]:
            del metadata[name]

    found = open_checkpoint(rewritten(make(tmp_path / "c", "gguf"), without))
    assert found.tokenizer_files is None and found.generation == {}
    assert "there is no tokenizer; tokenizer=DIR puts one in (minitron convert)" in describe(found)["warnings"]
    assert all(torch.equal(found.tensors[name].read(), value) for name, value in weights().items())


# Damage


def files_of(kind: str) -> dict[str, str]:
    """Kind -> a file with weights."""
    return {
        "nemo1": "model_weights/__0_0.distcp", "nemo2": "weights/__0_0.distcp", "ckpt": "model_weights.ckpt",
        "zarr": "model_weights/model.output_layer.weight/0.0", "hf": "model-00001-of-*.safetensors",
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["nemo1", "nemo2", "ckpt", "zarr", "hf", "gguf"])
@pytest.mark.parametrize("cut", [1, 100, "half", "all"])
def test_truncated_weights_are_refused(kind, cut, tmp_path):
    folder = make(tmp_path / "c", kind)
    path = folder if folder.is_file() else next(folder.glob(files_of(kind)))
    size = path.stat().st_size
    left = {"half": size // 2, "all": 0}.get(cut, max(0, size - cut) if isinstance(cut, int) else 0)
    os.truncate(path, left)
    with pytest.raises(CheckpointError):
        read_all(folder)


@pytest.mark.parametrize("packed", ["w", "w:gz"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_truncated_archives_are_refused(packed, share, tmp_path):
    folder = make(tmp_path / "c", "nemo1")
    path = tmp_path / "a.nemo"
    with tarfile.open(path, packed) as opened:
        opened.add(folder, ".")
        members = opened.offset  # zeros follow, which fill the last record
    size = members if packed == "w" else path.stat().st_size
    os.truncate(path, int(size * share))
    with pytest.raises(CheckpointError):
        read_all(path)


def test_an_archive_without_its_end_is_refused(tmp_path):
    """As it is cut where a member ends."""
    path = tmp_path / "a.nemo"
    with tarfile.open(path, "w") as opened:
        opened.add(make(tmp_path / "c", "nemo1"), ".")
        members = opened.offset
    os.truncate(path, members + 512)
    read_all(path)
    os.truncate(path, members)
    with pytest.raises(CheckpointError, match="nothing ends the archive"):
        read_all(path)


@pytest.mark.parametrize("kind", ["nemo1", "nemo2", "ckpt"])
def test_a_flipped_bit_in_a_tensor_is_found_by_its_checksum(kind, tmp_path):
    folder = make(tmp_path / "c", kind)
    path = folder / files_of(kind)
    data = bytearray(path.read_bytes())
    wanted = weights()["output_layer.weight"].view(torch.uint8).numpy().tobytes()
    data[data.index(wanted) + 77] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="fails its checksum"):
        read_all(folder)
    from nemo_minitron.config import ConvertConfig
    from nemo_minitron.conversion.convert import convert

    with pytest.raises(CheckpointError, match="fails its checksum"):
        convert(ConvertConfig(source=str(folder), output=str(tmp_path / "out"), verify="none"))
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_reported(tmp_path):
    tensors = weights()
    tensors["decoder.layers.1.mlp.linear_fc2.weight"][0, :3] = float("nan")
    tensors["output_layer.weight"][3, 3] = float("inf")
    lazy = {name: in_memory(value) for name, value in tensors.items()}
    write_checkpoint(tmp_path / "c", "nemo2", ARCHITECTURE, lazy, None, {})
    found = describe(open_checkpoint(tmp_path / "c"), values=True)
    assert found["not_finite"] == {"decoder.layers.1.mlp.linear_fc2.weight": 3, "output_layer.weight": 1}
    assert "output_layer.weight has 1 values that are NaN or Inf" in found["warnings"]


def test_a_link_in_a_directory_of_the_hub_cache_is_followed(tmp_path):
    """The hub's cache keeps files as links to blobs; those are the user's own."""
    folder = make(tmp_path / "c", "hf")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        shutil.move(path, blobs / path.name)
        path.symlink_to(blobs / path.name)
    assert all(torch.equal(value, weights()[name]) for name, value in read_all(folder).items())
