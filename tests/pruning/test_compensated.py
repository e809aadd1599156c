"""The compensated cut on transformers' models of every family: what must not change does not, the rest is refitted."""

import copy
import dataclasses

import pytest
import torch

from activations import moments
from models import build, equal, stored
from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import ImportanceScores
from nemo_minitron.checkpoints.checkpoint import open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.tensors import in_memory
from nemo_minitron.config import PruneTargets
from nemo_minitron.errors import CheckpointError
from nemo_minitron.pruning.command import prune
from nemo_minitron.pruning.compensated import CompensatedCut, Settings
from nemo_minitron.pruning.cut import choose
from nemo_minitron.pruning.plan import plan_cut

GRID = {"hidden_size_divisor": 16, "ffn_hidden_size_divisor": 16, "num_layers_divisor": 1}
FAMILIES = ("llama31", "llama-biases", "mistral-nemo", "nemotron", "qwen2", "qwen3")
TIED = ("llama32-tied", "qwen25-tied", "qwen3-tied")
TOKENS = 512


@dataclasses.dataclass
class Case:
    """A teacher on disk and in transformers, and its scores."""

    folder: object
    model: torch.nn.Module
    tokens: torch.Tensor
    scores: ImportanceScores

    def __post_init__(self):
        self.checkpoint = open_checkpoint(self.folder)
        self.ffn = self.checkpoint.architecture.ffn_hidden_size

    def cut(self, settings: Settings | None = None, folds=None, **targets) -> tuple[CompensatedCut, Architecture]:
        wanted = PruneTargets(**GRID, **targets)
        plan = plan_cut(self.checkpoint.architecture, wanted, self.scores, method="compensated")
        kept = choose(self.scores, self.checkpoint.architecture, plan.width)
        made = CompensatedCut(
            self.checkpoint.tensors, plan, kept, self.scores.moments, folds or {}, settings or Settings()
        )
        return made, Architecture.from_dict(plan.student)

    def student(self, place, **options) -> torch.nn.Module:
        """The student as transformers loads it."""
        import transformers

        made, architecture = self.cut(**options)
        write_checkpoint(place, "hf", architecture, made.cut(), None, {})
        return transformers.AutoModelForCausalLM.from_pretrained(place, torch_dtype=torch.float32).eval()

    def loss_to(self, student: torch.nn.Module) -> float:
        """Mean squared difference of the logits."""
        with torch.no_grad():
            return float((student(self.tokens).logits - self.model(self.tokens).logits).pow(2).mean())


def make_case(name: str, folder, **sizes: int) -> Case:
    model = build(name, torch.float32, **sizes)
    model.save_pretrained(folder)
    a = open_checkpoint(folder).architecture
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, 256, (16, TOKENS // 16), generator=generator)
    scores = ImportanceScores(
        hidden=torch.rand(2 * a.num_layers, a.hidden_size, generator=generator),
        ffn=torch.rand(a.num_layers, a.ffn_hidden_size, generator=generator),
        heads=torch.rand(a.num_layers, a.num_attention_heads * a.kv_channels, generator=generator),
        block_influence=torch.rand(a.num_layers, generator=generator),
        moments=moments(model, tokens, a.normalization == "LayerNorm", a.layernorm_epsilon),
    )
    return Case(folder, model, tokens, scores)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    found: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in found:
            found[name] = make_case(name, tmp_path_factory.mktemp("compensated") / name)
        return found[name]

    return case


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rotated_model_is_the_teacher(cases, name, tmp_path):
    case = cases(name)
    student = case.student(tmp_path / "student", settings=Settings(rotate=True), ffn_hidden_size=case.ffn)
    with torch.no_grad():
        expected, found = case.model(case.tokens).logits, student(case.tokens).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    before = case.model.state_dict()["model.layers.0.mlp.down_proj.weight"]
    assert not torch.allclose(student.state_dict()["model.layers.0.mlp.down_proj.weight"], before, atol=1e-3)


@pytest.mark.parametrize("name", TIED)
def test_a_tied_teacher_rotated_and_untied_is_the_teacher(cases, name, tmp_path):
    case = cases(name)
    student = case.student(tmp_path / "student", untie=True, ffn_hidden_size=case.ffn)
    with torch.no_grad():
        expected, found = case.model(case.tokens).logits, student(case.tokens).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    made, architecture = case.cut(untie=True, ffn_hidden_size=case.ffn)
    a = case.checkpoint.architecture
    assert architecture.parameters() == a.parameters() + a.vocab_size * a.hidden_size
    assert made.summary()["output_matrix"] == "untied"


@pytest.mark.parametrize("name", TIED)
def test_a_tied_student_at_full_size_is_the_teacher_where_only_equal_gains_are_mixed(cases, name, tmp_path):
    """Gains of both signs, zeros and equal ones among them."""
    case = cases(name)
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        model.model.norm.weight[:6] = torch.tensor([0.0, 0.0, -1.0, -1.0, 2.0, 2.0])
    model.save_pretrained(tmp_path / "teacher")
    other = dataclasses.replace(case, folder=tmp_path / "teacher", model=model)
    exact = Settings(rotate=True, gain_tolerance=0.0)
    student = other.student(tmp_path / "student", settings=exact, ffn_hidden_size=case.ffn)
    assert student.config.tie_word_embeddings
    with torch.no_grad():
        expected, found = model(case.tokens).logits, student(case.tokens).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    basis = other.cut(settings=exact, ffn_hidden_size=case.ffn)[0].basis
    mixed = [(column != 0).nonzero().flatten().tolist() for column in basis.T[:, :6] if (column != 0).any()]
    assert sorted(set(map(tuple, mixed))) == [(0, 1), (2, 3), (4, 5)]


@pytest.mark.parametrize("name", TIED)
def test_a_tied_student_stays_tied_and_is_as_near_as_an_untied_one(cases, name, tmp_path):
    case = cases(name)
    tied = case.student(tmp_path / "tied", hidden_size=48)
    assert tied.config.tie_word_embeddings
    untied = case.student(tmp_path / "untied", hidden_size=48, untie=True)
    assert case.loss_to(tied) < 1.1 * case.loss_to(untied)


@pytest.mark.parametrize("value, said", [(0.0, "are all 0"), (float("nan"), "are not all finite")])
def test_a_final_norm_that_lets_nothing_through_is_refused(cases, tmp_path, value, said):
    case = cases(TIED[0])
    model = copy.deepcopy(case.model)
    torch.nn.init.constant_(model.model.norm.weight, value)
    model.save_pretrained(tmp_path / "teacher")
    config = c.PruneConfig(
        model=c.PruneModelConfig(restore_from_path=str(tmp_path / "teacher")),
        prune=c.PruneTargets(**GRID, hidden_size=48, scores_path=str(tmp_path / "scores")),
        export=c.ExportConfig(save_path=str(tmp_path / "student")),
    )
    with pytest.raises(CheckpointError, match=f"final norm .*{said}"):
        prune(c.validated(config))
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.parametrize("tolerance", [-0.1, 1.5])
def test_a_tolerance_off_its_range_is_refused(tolerance):
    assert PruneTargets(hidden_size=48, gain_tolerance=tolerance).problems() == [
        f"gain_tolerance = {tolerance} must lie from 0 to 1"
    ]


PARTS = {
    "hidden": {"hidden_size": 48},
    "ffn": {"ffn_hidden_size": 48},
    "heads": {"num_attention_heads": 2},
    "all": {"hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 2},
}


def plain_student(case: Case, place, **targets) -> torch.nn.Module:
    """The same cut without compensation."""
    import transformers

    from nemo_minitron.pruning.cut import cut

    plan = plan_cut(case.checkpoint.architecture, PruneTargets(**GRID, **targets), case.scores)
    kept = choose(case.scores, case.checkpoint.architecture, plan.width)
    student = Architecture.from_dict(plan.student)
    write_checkpoint(place, "hf", student, cut(case.checkpoint.tensors, plan, kept), None, {})
    return transformers.AutoModelForCausalLM.from_pretrained(place, torch_dtype=torch.float32).eval()


@pytest.mark.parametrize("name", [*FAMILIES, TIED[0]])
@pytest.mark.parametrize("part", PARTS)
def test_what_is_cut_has_the_students_shape_and_loses_less_than_the_plain_cut(cases, name, part, tmp_path):
    case = cases(name)
    compensated = case.student(tmp_path / "compensated", **PARTS[part])
    plain = plain_student(case, tmp_path / "plain", **PARTS[part])
    shapes = {key: value.shape for key, value in plain.state_dict().items()}
    assert {key: value.shape for key, value in compensated.state_dict().items()} == shapes
    assert case.loss_to(compensated) < case.loss_to(plain)


def test_rows_columns_and_rotation_commute(cases, tmp_path):
    """One cut of everything is the cut of FFN and heads, then of the hidden size by the same basis."""
    case = cases("llama31")
    targets = {"ffn_hidden_size": 64, "num_attention_heads": 2}
    together, _ = case.cut(hidden_size=48, **targets)
    first, architecture = case.cut(**targets)
    write_checkpoint(tmp_path / "first", "hf", architecture, first.cut(), None, {})
    between = open_checkpoint(tmp_path / "first")
    plan = plan_cut(between.architecture, PruneTargets(**GRID, hidden_size=48), case.scores, method="compensated")
    second = CompensatedCut(between.tensors, plan, choose(None, between.architecture, {}), case.scores.moments, {},
                            Settings())  # fmt: skip
    expected = second.cut()
    for name, tensor in together.cut().items():
        assert torch.allclose(tensor.read(), expected[name].read(), atol=1e-4), name


@pytest.mark.parametrize(
    ("name", "sizes", "targets"),
    [
        # Qwen2.5 0.5B: 14 heads in 2 groups, tied.
        ("qwen25-0.5b", {}, {"hidden_size": 96, "ffn_hidden_size": 480, "num_attention_heads": 8}),
        # 3B (hidden 2048, FFN 11008, 16 heads in 2 groups, tied), divided by 16.
        ("qwen25-tied", {"hidden_size": 128, "intermediate_size": 688, "num_attention_heads": 16},
         {"hidden_size": 96, "ffn_hidden_size": 512, "num_attention_heads": 8}),
        # 72B (hidden 8192, FFN 29568, 64 heads in 8 groups), divided by 64: an FFN that is on no grid.
        ("qwen2", {"hidden_size": 128, "intermediate_size": 462, "num_attention_heads": 64, "num_key_value_heads": 8},
         {"hidden_size": 96, "ffn_hidden_size": 320, "num_attention_heads": 32}),
    ],
)  # fmt: skip
def test_qwen25s_shapes_are_cut_and_converted(name, sizes, targets, tmp_path):
    from nemo_minitron.conversion.convert import convert

    case = make_case(name, tmp_path / "teacher", **sizes)
    student = case.student(tmp_path / "student", **targets)
    said = {"hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size",
            "num_attention_heads": "num_attention_heads"}  # fmt: skip
    assert {key: getattr(student.config, said[key]) for key in targets} == targets
    assert case.loss_to(student) < case.loss_to(plain_student(case, tmp_path / "plain", **targets))
    for folder in ("teacher", "student"):
        source = tmp_path / folder
        for number, form in enumerate(("bridge", "nemo1", "nemo2", "hf")):
            output = tmp_path / f"{folder}-{number}{'.nemo' if form == 'nemo1' else ''}"
            convert(c.validated(c.ConvertConfig(source=str(source), output=str(output), to=form, verify="tensors")))
            source = output
        assert equal(stored(tmp_path / folder), stored(source))


@pytest.mark.parametrize("name", ["llama31", "nemotron", "qwen25-tied"])
def test_readers_and_norms_share_a_size_as_the_teachers_do(cases, name):
    """Norms of a fifth of the gain before readers of five times the weights are the same teacher.

    Its cut is the same, too, and has them in the same proportion: a gain is not left to the readers.
    """
    case = cases(name)
    made, _ = case.cut(hidden_size=32)
    shift = 1.0 if case.checkpoint.architecture.layernorm_zero_centered_gamma else 0.0

    def resized(tensors):
        sizes = {}
        for key, tensor in tensors.items():
            value = tensor.read().double()
            if ".layer_norm_weight" in key:
                value = (value + shift) * 0.2 - shift
            elif ".layer_norm_bias" in key:
                value = value * 0.2
            elif key.endswith(("linear_qkv.weight", "linear_fc1.weight")):
                value = value * 5
            sizes[key] = value
        return sizes

    teacher = {key: in_memory(value.float()) for key, value in resized(case.checkpoint.tensors).items()}
    wanted = PruneTargets(**GRID, hidden_size=32)
    plan = plan_cut(case.checkpoint.architecture, wanted, case.scores, method="compensated")
    kept = choose(case.scores, case.checkpoint.architecture, plan.width)
    other = CompensatedCut(teacher, plan, kept, case.scores.moments, {}, Settings()).cut()
    expected = resized(made.cut())
    assert other.keys() == expected.keys()
    for key, tensor in other.items():
        assert torch.allclose(tensor.read().double(), expected[key], rtol=1e-4, atol=1e-5), key


def test_a_fold_is_a_change_of_the_fc2_before_the_block_alone(cases):
    case = cases("nemo-14487")
    h = case.checkpoint.architecture.hidden_size
    fold = torch.randn(h, h, generator=torch.Generator().manual_seed(1)) * 0.1
    made, _ = case.cut(folds={"3": fold}, drop_layers=[4, 5])
    student, teacher = made.cut(), case.checkpoint.tensors
    fc2 = "decoder.layers.2.mlp.linear_fc2.weight"
    m = torch.randn(5, case.checkpoint.architecture.ffn_hidden_size)
    before = m @ teacher[fc2].read().T
    assert torch.allclose(m @ student[fc2].read().T, before + before @ fold, atol=1e-4)
    for name, tensor in student.items():
        number = int(name.split(".")[2]) if name.startswith("decoder.layers.") else -1
        source = name.replace(f"layers.{number}.", f"layers.{number + 2}.") if number > 2 else name
        assert name == fc2 or torch.equal(tensor.read(), teacher[source].read()), name


def test_merged_heads_change_the_queries_and_leave_the_rest(cases):
    case = cases("nemo-14487")
    merged, _ = case.cut(settings=Settings(merge_heads=True), num_attention_heads=8)
    made, teacher = merged.cut(), case.checkpoint.tensors
    a = case.checkpoint.architecture
    d, name = a.kv_channels, "decoder.layers.0.self_attention.linear_qkv.weight"
    groups = teacher[name].read().view(a.num_query_groups, 4, d, -1)  # two queries, key, value
    found = made[name].read().view(a.num_query_groups, 3, d, -1)
    best = case.scores.heads[0].sqrt().view(a.num_query_groups, 2, d).norm(dim=2).argmax(dim=1)
    for group in range(a.num_query_groups):
        query = 2 * groups[group, best[group]] - groups[group, 1 - best[group]]
        assert torch.allclose(found[group, 0], query, atol=1e-6)
        assert torch.equal(found[group, 1:], groups[group, 2:])
    proj = "decoder.layers.0.self_attention.linear_proj.weight"
    columns = torch.cat([torch.arange(d) + d * (2 * group + int(best[group])) for group in range(a.num_query_groups)])
    assert torch.equal(made[proj].read(), teacher[proj].read()[:, columns])


def test_bf16_is_kept_and_near_the_exact_cut(cases, tmp_path):
    case = cases("llama31")
    exact, _ = case.cut(hidden_size=48, ffn_hidden_size=64)
    half = {name: tensor.read().bfloat16() for name, tensor in case.checkpoint.tensors.items()}
    write_checkpoint(tmp_path / "half", "hf", case.checkpoint.architecture, _lazy(half), None, {})
    rounded = Case(tmp_path / "half", case.model, case.tokens, case.scores)
    made, _ = rounded.cut(hidden_size=48, ffn_hidden_size=64)
    for name, tensor in made.cut().items():
        value, expected = tensor.read(), exact.cut()[name].read()
        assert value.dtype == torch.bfloat16
        assert (value.float() - expected).norm() < 0.02 * expected.norm(), name


def _lazy(tensors):
    from nemo_minitron.checkpoints.tensors import in_memory

    return {name: in_memory(tensor) for name, tensor in tensors.items()}
