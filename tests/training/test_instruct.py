"""Instruction tuning: the loss of answers, adapters on frozen weights, and what is merged from them."""

import json

import pytest
import torch

from hf import read_weights
from models import SMALL
from nemo_minitron import config as c
from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.conversion.convert import convert
from nemo_minitron.errors import ConfigError
from nemo_minitron.megatron import lora, weights
from nemo_minitron.pruning.command import prune
from nemo_minitron.training.finetune import finetune

PAIRS = [(f"Where is town {n}?", f"Town {n} lies on river {n % 3}.") for n in range(40)]
DIM, ALPHA = 4, 8
LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    """Text2text rows in LMFlow's form, a sixth of them for validation."""
    folder = tmp_path_factory.mktemp("rows")
    for split, pairs in (("train", PAIRS[:34]), ("validation", PAIRS[34:])):
        instances = [{"input": asked, "output": answer} for asked, answer in pairs]
        (folder / f"{split}.json").write_text(json.dumps({"type": "text2text", "instances": instances}))
    return str(folder)


@pytest.fixture(scope="module")
def students(tiny, tmp_path_factory) -> dict:
    """A pruned Llama, Mistral and Qwen 3 with head sizes of their own, and Nemotron, each with its tokenizer."""
    import transformers

    folder = tmp_path_factory.mktemp("students")
    found = {"pruned": folder / "pruned"}
    prune(tiny.pruning(found["pruned"], hidden_size=96, ffn_hidden_size=192, drop_layers=[3]))
    for name, kind, sizes in (
        ("mistral", "Mistral", {"head_dim": 24, "sliding_window": None}),
        ("nemotron", "Nemotron", {}),
        ("qwen3", "Qwen3", {"head_dim": 24}),
    ):
        torch.manual_seed(1)
        settings = getattr(transformers, f"{kind}Config")(**{**SMALL, "vocab_size": 512, **sizes})
        found[name] = folder / name
        getattr(transformers, f"{kind}ForCausalLM")(settings).save_pretrained(found[name])
        transformers.AutoTokenizer.from_pretrained(tiny.data / "tokenizer").save_pretrained(found[name])
    return found


def tuning(tiny, student, rows, output, steps=12, scheme="lora", dropout=0.0, keep=False, **fields) -> c.FinetuneConfig:
    training = tiny.training(output, steps, restore_from_path=str(student))
    training["model"].data = c.ModelDataConfig(instructions=rows, seq_length=64, num_workers=0)
    training["model"].optim.lr = 1e-2
    peft = c.PeftConfig(scheme=scheme, dim=DIM, alpha=ALPHA, dropout=dropout, keep_adapter=keep)
    return c.validated(c.FinetuneConfig(**training, peft=peft, monitor="last", **fields))


def answer_loss(folder, pairs) -> float:
    """Mean loss of the answers' tokens in float64, by transformers, from texts put together here."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for asked, answer in pairs:
        prompt = tokenizer(f"{asked}\n", add_special_tokens=False)["input_ids"]
        reply = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + reply])).logits[0]
        predicted = logits[len(prompt) - 1 : -1].log_softmax(-1)
        total -= float(predicted[range(len(reply)), reply].sum())
        count += len(reply)
    return total / count


@pytest.fixture(scope="module")
def tuned(tiny, students, rows, tmp_path_factory):
    """Name of a student -> what its LoRA run left, with a look at the model just before and after the merge."""
    folder, seen = tmp_path_factory.mktemp("tuned"), {}
    merge = lora.merge_adapters
    tokens = torch.arange(5, 37)[None]

    def logits(model):
        with torch.no_grad():
            return model.eval()(tokens, torch.arange(32)[None], None)

    def watched(model):
        entry = {"trained": [name for name, value in model.named_parameters() if value.requires_grad]}
        entry["base"] = {name: value.detach().clone() for name, value in model.named_parameters()}
        entry["adapted"] = logits(model)
        entry["factors"] = {name: lora.factors(wrapper) for name, wrapper in lora.wrapped_layers(model).items()}
        merge(model)
        entry["merged"] = logits(model)
        entry["weights"] = {name: value.detach().clone() for name, value in model.named_parameters()}
        seen["last"] = entry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "merge_adapters", watched)
        for name, student in students.items():
            output = folder / name
            manifest = finetune(tuning(tiny, student, rows, output, keep=True, to="hf"))
            seen[name] = {"output": output, "manifest": manifest, "student": student, **seen.pop("last")}
    return seen


NAMES = ("pruned", "mistral", "nemotron", "qwen3")


@pytest.mark.parametrize("name", NAMES)
def test_the_answers_loss_falls_and_is_that_of_float64_arithmetic(tuned, name):
    validation = tuned[name]["manifest"].metrics["validation"]
    losses = [entry["lm_loss"] for entry in validation]
    assert losses[-1] < losses[0] - 0.1
    assert losses[-1] == pytest.approx(answer_loss(tuned[name]["output"], PAIRS[34:]), abs=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_only_adapters_train_and_every_layer_has_them(tuned, name):
    run = tuned[name]
    layers = open_checkpoint(run["student"]).architecture.num_layers
    assert all(lora.ADAPTER in parameter for parameter in run["trained"])
    assert len(run["trained"]) == 2 * len(LINEAR) * layers
    source = open_checkpoint(run["student"]).tensors
    shift = 1.0 if name == "nemotron" else 0.0  # Megatron's local norm holds gamma, the checkpoint gamma - 1
    left = set(source)
    for parameter, value in run["base"].items():
        if lora.ADAPTER in parameter:
            assert float(value.abs().max()) > 0
            continue
        canonical = parameter.replace(".to_wrap", "").replace(
            "input_layernorm.", "self_attention.linear_qkv.layer_norm_"
        )
        canonical = canonical.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
        gamma = shift if canonical.endswith(("layernorm.weight", "layer_norm_weight")) else 0.0
        assert torch.equal(value, source[canonical].read() + gamma), parameter
        left.remove(canonical)
    assert not left


@pytest.mark.parametrize("name", NAMES)
def test_the_merge_is_float64_arithmetic_rounded_once(tuned, name):
    run = tuned[name]
    for layer, (down, up, scale) in run["factors"].items():
        base = run["base"][f"{layer}.to_wrap.weight"]
        assert (down.shape, up.shape, scale) == ((DIM, base.shape[1]), (base.shape[0], DIM), ALPHA / DIM)
        wanted = torch.from_numpy(base.double().numpy() + 2.0 * (up.double().numpy() @ down.double().numpy()))
        assert torch.equal(run["weights"][f"{layer}.weight"], wanted.float())
    assert not torch.allclose(run["merged"], run["merged"].roll(1, 1), atol=1e-2)
    assert torch.allclose(run["merged"], run["adapted"], atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_kept_adapter_is_hugging_face_pefts(tuned, name, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tuned[name]["student"]
    if name == "pruned":
        convert(c.ConvertConfig(source=str(base), output=str(tmp_path / "base"), to="hf", verify="none"))
        base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float64)
    tokens = torch.arange(5, 37)[None]
    with torch.no_grad():
        plain = model(tokens).logits
        adapted = PeftModel.from_pretrained(model, tuned[name]["output"] / "adapter")(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tuned[name]["output"], torch_dtype=torch.float64)(tokens).logits
    assert float((adapted - plain).abs().max()) > 1e-2
    assert torch.allclose(adapted, merged, atol=2e-5)


def test_nemos_lora_cannot_be_put_in_as_it_is_without_transformer_engine(students):
    """Why megatron.lora stands in for Transformer Engine's names; where it is installed this has nothing to show."""
    from nemo.collections.llm.peft import lora as nemo_lora
    from nemo.utils.import_utils import UnavailableError

    if nemo_lora.HAVE_TE:
        pytest.skip("Transformer Engine is installed")
    with pytest.raises(UnavailableError):
        nemo_lora.LoRA().transform(torch.nn.Identity(), name="linear_qkv")


def test_a_token_weighs_the_same_in_every_micro_batch(tiny, students, rows, tmp_path):
    """All weights train; answers differ in length, so that a mean of means would be another loss."""
    histories = []
    for size in (1, 8):
        config = tuning(tiny, students["pruned"], rows, tmp_path / str(size), steps=4, scheme="none")
        config.model.micro_batch_size = size
        histories.append(finetune(config).metrics["train"])
    for one, other in zip(*histories, strict=True):
        assert one["lm_loss"] == pytest.approx(other["lm_loss"], abs=1e-5)
    first, second = (read_weights(tmp_path / name) for name in ("1", "8"))
    assert all(torch.allclose(second[name], value, atol=2e-4) for name, value in first.items())


def test_two_tensor_parallel_ranks_equal_one(tiny, students, rows, tmp_path):
    histories = []
    for ranks in (1, 2):
        config = tuning(tiny, students["pruned"], rows, tmp_path / str(ranks), steps=3)
        config.trainer.devices = config.model.tensor_model_parallel_size = ranks
        histories.append(finetune(config).metrics)
    for one, other in zip(histories[0]["train"], histories[1]["train"], strict=True):
        assert one["lm_loss"] == pytest.approx(other["lm_loss"], abs=1e-5)
    first, second = (read_weights(tmp_path / name) for name in ("1", "2"))
    assert all(torch.allclose(second[name], value, atol=1e-4) for name, value in first.items())


def test_the_best_step_of_adapters_becomes_the_result(tiny, students, tmp_path, monkeypatch):
    """Training on one answer that is nothing like those in validation: an early validation is the best."""
    rows = tmp_path / "rows"
    rows.mkdir()
    for split, pairs in (("train", [("a", "z z z z")] * 4), ("validation", PAIRS[34:])):
        lines = [json.dumps({"input": asked, "output": answer}) for asked, answer in pairs]
        (rows / f"{split}.jsonl").write_text("\n".join(lines))
    config = tuning(tiny, students["pruned"], str(rows), tmp_path / "best", steps=6, to="hf")
    config.monitor, config.trainer.val_check_interval = None, 1
    kept, reload = [], weights.reload
    monkeypatch.setattr(weights, "reload", lambda model, step: (kept.extend(read_weights(step)), reload(model, step)))
    metrics = finetune(config).metrics
    assert kept and all(lora.ADAPTER in name for name in kept)
    losses = {entry["step"]: entry["lm_loss"] for entry in metrics["validation"]}
    best = min(losses, key=losses.get)
    assert metrics["result_step"] == best < 6
    assert losses[best] == pytest.approx(answer_loss(tmp_path / "best", PAIRS[34:]), abs=2e-5)


def test_the_manifest_says_what_became_of_the_rows_and_an_equal_run_is_done(tiny, students, rows, tmp_path, tuned):
    metrics = tuned["pruned"]["manifest"].metrics
    assert metrics["template"] == "plain"
    assert (metrics["rows"], metrics["validation_rows"], metrics["rows_dropped"]) == (40, 6, 0)
    before = Manifest.read(tuned["pruned"]["output"]).created
    again = tuning(tiny, students["pruned"], rows, tuned["pruned"]["output"], keep=True, to="hf")
    assert finetune(again).created == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: setattr(config.model.data, "data_prefix", "/d"), "give one"),
        (lambda config: setattr(config.peft, "scheme", "none"), "keep_adapter needs scheme=lora"),
        (lambda config: setattr(config.model, "nemo_path", "a.nemo"), "leaves a folder beside the weights"),
        (lambda config: setattr(config.peft, "target_modules", ["q_proj"]), "target_modules = 'q_proj' must be one of"),
        (lambda config: setattr(config.instruct, "validation_share", 1.0), "validation_share = 1.0 must be above 0"),
        (lambda config: setattr(config.instruct, "template", "chatml"), "template = 'chatml' must be one of"),
    ],
)
def test_settings_that_cannot_be_are_refused(tiny, rows, tmp_path, change, message):
    config = tuning(tiny, tiny.teacher, rows, tmp_path / "x", keep=True)
    change(config)
    with pytest.raises(ConfigError, match=message):
        c.validated(config)


def test_distill_takes_no_instructions(tiny, rows, tmp_path):
    fields = tiny.training(tmp_path / "x", restore_from_path="s", kd_teacher_restore_from_path="t")
    fields["model"].data.instructions = rows
    with pytest.raises(ConfigError, match="model.data.instructions is for finetune"):
        c.validated(c.DistillConfig(**fields))
