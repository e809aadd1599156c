"""Training on instructions: the loss of answers, adapters on frozen weights and what is merged from them, distillation,
and rows packed into sequences."""

import json

import pytest
import torch

from hf import llama, read_weights
from models import SMALL
from nemo_minitron import config as c
from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.conversion.convert import convert
from nemo_minitron.distillation.command import distill
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


@pytest.mark.usefixtures("forked_ranks")
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


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
#: Eight to train on, which are one step, and three to validate on: a system's words, two answers, of any length.
TALKS = [
    [
        *([("system", f"Say {n}.")] if n % 3 == 0 else []),
        ("user", "Where?"), ("assistant", "By river " + "and hill " * (n % 4)),
        *([("user", f"Town {n}?"), ("assistant", "Old.")] if n % 2 else []),
    ]
    for n in range(11)
]  # fmt: skip
#: The sequences of 160 tokens that the eight are packed into.
PACKED = 4
HIDDEN = c.HiddenLossConfig(weight=0.5, pairs=[[3, 4]])


@pytest.fixture(scope="module")
def talks(tiny, tmp_path_factory) -> dict:
    """Folders: chats, a tokenizer with a template for them, and a student that is a layer less than the teacher."""
    import transformers

    root = tmp_path_factory.mktemp("talks")
    for split, chats in (("train", TALKS[:8]), ("validation", TALKS[8:])):
        messages = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
        (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, messages)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.data / "tokenizer")
    tokenizer.chat_template = CHAT
    student = tmp_path_factory.mktemp("talkers")
    tokenizer.save_pretrained(student / "tokenizer")
    prune(tiny.pruning(student / "student", drop_layers=[3]))
    return {"rows": str(root), "tokenizer": str(student / "tokenizer"), "student": str(student / "student")}


def distilling(tiny, talks, output, steps=1, packing=False, kd=None, **model) -> c.DistillConfig:
    """Each step has all rows: a global batch of eight, or of the four sequences that they are packed into."""
    fields = tiny.training(output, steps, restore_from_path=talks["student"], tokenizer=talks["tokenizer"])
    fields["model"].kd_teacher_restore_from_path = str(tiny.teacher)
    fields["model"].data = c.ModelDataConfig(instructions=talks["rows"], seq_length=160, num_workers=0, packing=packing)
    for name, value in ({"micro_batch_size": 1, "global_batch_size": PACKED} if packing else {}).items():
        setattr(fields["model"], name, value)
    for name, value in model.items():
        setattr(fields["model"], name, value)
    fields["trainer"].devices = model.get("tensor_model_parallel_size", 1) * model.get(
        "pipeline_model_parallel_size", 1
    )
    return c.validated(c.DistillConfig(**fields, kd=kd or c.KDConfig(lm_weight=0.5, hidden=HIDDEN), monitor="last"))


def answers(talks, chats, *, whole=False):
    """Tokens of each chat, and which of them are an answer's, from texts put together here."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(talks["tokenizer"])
    for chat in chats:
        ids, learnt, prompt = [], [], ""
        for role, text in chat:
            parts = [(f"{prompt}<assistant>", False), (f"{text}</assistant>\n", True)] if role == "assistant" else []
            prompt = "" if parts else f"{prompt}<{role}>{text}</{role}>\n"
            for part, answer in parts:
                piece = tokenizer(part, add_special_tokens=False)["input_ids"]
                ids, learnt = ids + piece, learnt + [answer or whole] * len(piece)
        yield torch.tensor(ids), torch.tensor(learnt)


def losses_of(tiny, talks, student, chats, *, whole=False) -> dict[str, float]:
    """Each loss a learnt token of row after row alone, in float64, from transformers' logits of both models."""
    from torch.nn.functional import cosine_similarity, cross_entropy

    models = [llama(path, open_checkpoint(path).architecture).double() for path in (student, tiny.teacher)]
    states: list = []
    for model, layer in zip(models, (3, 4)):  # a block's own output: transformers' last hidden state is behind the norm
        model.model.layers[layer - 1].register_forward_hook(
            lambda _, __, output: states.append(output[0] if isinstance(output, tuple) else output)
        )
    sums = torch.zeros(4, dtype=torch.float64)
    for ids, learnt in answers(talks, chats, whole=whole):
        states.clear()
        with torch.no_grad():
            own, target = (model(ids[None, :-1]).logits[0].log_softmax(-1) for model in models)
        each = (
            (target.exp() * (target - own)).sum(-1),
            cross_entropy(own, ids[1:], reduction="none"),
            1 - cosine_similarity(*(state.reshape(len(own), -1) for state in states), dim=-1),
            torch.ones(len(own)),
        )
        sums += torch.stack([(value * learnt[1:]).sum() for value in each])
    return dict(zip(("kd_loss", "lm_loss", "cosine_3-4"), (sums[:3] / sums[3]).tolist()))


@pytest.fixture(scope="module")
def distilled(tiny, talks, tmp_path_factory) -> dict:
    """Distilled on rows each on its own, and packed: packing -> folder and manifest."""
    root = tmp_path_factory.mktemp("distilled")
    found = {}
    for packing in (False, True):
        found[packing] = (root / str(packing), distill(distilling(tiny, talks, root / str(packing), 4, packing)))
    return found


def close_runs(one, other, weights=2e-4) -> bool:
    """Whether two runs' losses of each step and validation, and their weights, are equal within rounding."""
    (first, mine), (second, others) = one, other
    for kind in ("train", "validation"):
        for expected, got in zip(mine.metrics[kind], others.metrics[kind], strict=True):
            assert got == pytest.approx(expected, abs=2e-5)
    expected, got = read_weights(first), read_weights(second)
    return all(torch.allclose(got[name], value, atol=weights) for name, value in expected.items())


def test_distillation_learns_the_answers_of_chats(tiny, talks, distilled):
    """The first step's losses, and the last validation's, which is of the result."""
    output, manifest = distilled[False]
    metrics = manifest.metrics
    assert (metrics["template"], metrics["rows"], metrics["validation_rows"]) == ("chat", 11, 3)
    first = {name: metrics["train"][0][name] for name in ("kd_loss", "lm_loss", "cosine_3-4")}
    assert first == pytest.approx(losses_of(tiny, talks, talks["student"], TALKS[:8]), abs=1e-5)
    last = {name: value for name, value in metrics["validation"][-1].items() if name != "step"}
    assert last == pytest.approx(losses_of(tiny, talks, output, TALKS[8:]), abs=2e-5)
    assert metrics["train"][-1]["lm_loss"] < first["lm_loss"] - 0.5


def test_prompts_are_learnt_where_they_are_asked_for(tiny, talks, tmp_path):
    config = distilling(tiny, talks, tmp_path / "all", packing=True)
    config.instruct.answers_only = False
    first = distill(config).metrics["train"][0]
    expected = losses_of(tiny, talks, talks["student"], TALKS[:8], whole=True)
    assert {name: first[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_packed_rows_distil_as_each_on_its_own(distilled):
    """And a token weighs the same in a micro batch of four rows as in one packed sequence."""
    assert close_runs(distilled[False], distilled[True])
    metrics = distilled[True][1].metrics
    assert (metrics["sequences"], metrics["validation_sequences"]) == (PACKED, 2)
    assert metrics["padding"] < 0.3 < metrics["padding_unpacked"]
    assert distilled[True][1].details["notes"][-1].startswith(f"packed: 8 rows in {PACKED} sequences of 160: ")


def test_a_packed_run_that_was_stopped_goes_on_bit_for_bit(tiny, talks, distilled, tmp_path, monkeypatch):
    from nemo_minitron.training import loop

    make = loop.history_callback

    def stopping(*arguments):
        history = make(*arguments)
        end = history.on_train_batch_end

        def on_train_batch_end(trainer, *rest):
            end(trainer, *rest)
            if trainer.global_step == 3:
                raise KeyboardInterrupt

        history.on_train_batch_end = on_train_batch_end
        return history

    with monkeypatch.context() as patch:
        patch.setattr(loop, "history_callback", stopping)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            distill(distilling(tiny, talks, tmp_path / "stopped", 4, packing=True))
    resumed = distill(distilling(tiny, talks, tmp_path / "stopped", 4, packing=True))
    output, whole = distilled[True]
    assert resumed.metrics["train"] == whole.metrics["train"]
    assert resumed.metrics["validation"] == whole.metrics["validation"]
    weights, others = read_weights(output), read_weights(tmp_path / "stopped")
    assert all(torch.equal(others[name], value) for name, value in weights.items())


def test_the_control_is_finetune_and_packing_changes_neither(tiny, talks, tmp_path):
    runs = {}
    for packing in (False, True):
        config = distilling(
            tiny, talks, tmp_path / f"control{packing}", 2, packing, kd=c.KDConfig(kd_weight=0, lm_weight=1)
        )
        config.model.kd_teacher_restore_from_path = None
        runs[packing] = (tmp_path / f"control{packing}", distill(config))
    fields = {name: getattr(config, name) for name in ("trainer", "model", "monitor")}
    fields["model"].nemo_path = str(tmp_path / "tuned")
    tuned = finetune(c.validated(c.FinetuneConfig(**fields)))
    assert tuned.metrics["train"] == runs[True][1].metrics["train"]
    assert close_runs(runs[False], runs[True])


@pytest.mark.usefixtures("forked_ranks")
def test_two_data_parallel_ranks_distil_packed_rows_as_one(tiny, talks, distilled, tmp_path):
    config = distilling(tiny, talks, tmp_path / "two", 4, packing=True)
    config.trainer.devices = 2
    assert close_runs(distilled[True], (tmp_path / "two", distill(config)), weights=5e-4)


@pytest.mark.usefixtures("forked_ranks")
def test_two_pipeline_stages_distil_packed_rows_as_one(tiny, talks, tmp_path):
    """Without losses on hidden states, which need one stage."""
    runs = []
    for ranks in (1, 2):
        kd, folder = c.KDConfig(lm_weight=0.5), tmp_path / str(ranks)
        config = distilling(tiny, talks, folder, 4, packing=True, kd=kd, pipeline_model_parallel_size=ranks)
        runs.append((folder, distill(config)))
    assert close_runs(*runs, weights=5e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch_size": 2}, "model.data.packing needs model.micro_batch_size=1, not 2"),
        (
            {"context_parallel_size": 2, "global_batch_size": 4},
            "model.data.packing takes no model.context_parallel_size",
        ),
        ({"data": c.ModelDataConfig(data_prefix="d", packing=True)}, "text fills its samples already"),
        ({"data": c.ModelDataConfig(data_prefix="d", instructions="i")}, "give one"),
    ],
)
def test_packing_that_cannot_be_is_refused(tiny, talks, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        distilling(tiny, talks, tmp_path / "x", packing=True, **change)
