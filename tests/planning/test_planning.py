"""Plans against real Megatron models: parameters of every rank, what autograd keeps, operations; and the papers."""

import dataclasses
import itertools

import pytest

from nemo_minitron.architecture import Architecture
from nemo_minitron.megatron.layout import Layout
from nemo_minitron.planning import loss
from nemo_minitron.planning.activations import kept_at_the_end, kept_by_layer
from nemo_minitron.planning.flops import forward_flops, moment_flops, stage_flops, training_flops
from nemo_minitron.planning.layouts import Models, candidates
from nemo_minitron.planning.memory import all_ranks, moment_bytes, optimizer_bytes, stage_memory
from nemo_minitron.planning.run import Run, largest_parameter, rank_parameters, stage_layers
from nemo_minitron.published import KNOWN

LLAMA = Architecture(
    num_layers=3, hidden_size=64, ffn_hidden_size=176, num_attention_heads=4, num_query_groups=2, kv_channels=24,
    vocab_size=512, seq_length=64,
)  # fmt: skip
SHAPES = {
    "llama": LLAMA,
    "no groups": dataclasses.replace(LLAMA, num_query_groups=4),
    "nemotron": dataclasses.replace(
        LLAMA, family="nemotron", normalization="LayerNorm", layernorm_zero_centered_gamma=True,
        activation="squared_relu", gated_linear_unit=False, rotary_percent=0.5,
    ),
    "qwen2, tied": dataclasses.replace(
        LLAMA, family="qwen2", add_qkv_bias=True, share_embeddings_and_output_weights=True
    ),
    "qwen3": dataclasses.replace(LLAMA, family="qwen3", qk_layernorm=True),
}  # fmt: skip
GPUS = Layout(
    cuda=True, bf16=True, devices=8, tensor_parallel=8, sequence_parallel=True, micro_batch_size=1,
    global_batch_size=64,
)  # fmt: skip
BATCH = 2


def on_cpu(**layout) -> Run:
    return Run(layout=Layout(**{"cuda": False, "bf16": False, "micro_batch_size": BATCH, **layout}), seq_length=64)


@pytest.fixture
def megatron(tmp_path):
    """Makes real models of one rank: (architecture, bf16) -> model in training mode."""
    from nemo_minitron.megatron.forward import load_model, parallel_ranks
    from nemo_minitron.megatron.session import engine

    layout = Layout(cuda=False, bf16=False)
    with engine(1, tmp_path / "log"), parallel_ranks(layout, 1):
        yield lambda a, bf16=False: load_model(a, dataclasses.replace(layout, bf16=bf16), None).train()


def run_forward(model, length=64):
    import torch

    tokens = torch.randint(0, 512, (BATCH, length), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length).expand_as(tokens)
    return model(input_ids=tokens, position_ids=positions, attention_mask=None, labels=tokens)


def kept_by_autograd(model) -> int:
    """Bytes of the storages that a forward pass keeps for backward, parameters not counted."""
    import torch

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = run_forward(model)
    assert losses.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


def all_scores():
    """Torch's own arithmetic of attention: products that its counter sees on a CPU, of all scores, later keys' too."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_activations_are_what_autograd_keeps(megatron, name, bf16):
    a, run = SHAPES[name], on_cpu(bf16=bf16)
    one, three = (kept_by_autograd(megatron(a.with_sizes(num_layers=layers), bf16)) for layers in (1, 3))
    assert three - one == 2 * kept_by_layer(a, run)
    tokens, softmax = BATCH * 64, 4 * a.vocab_size * BATCH * 64
    whole = {"token ids": 8 * tokens, "labels": 8 * tokens, "labels not here": tokens}
    assert one == kept_by_layer(a, run) + kept_at_the_end(a, run) + softmax + sum(whole.values())


@pytest.mark.parametrize("name", SHAPES)
def test_operations_are_what_torch_counts(megatron, name):
    from torch.utils.flop_counter import FlopCounterMode

    a, tokens = SHAPES[name], BATCH * 64
    later = a.num_layers * 4 * (64 - 65 / 2) * a.num_attention_heads * a.kv_channels  # keys after a query's own
    model = megatron(a)
    with all_scores(), FlopCounterMode(display=False) as forward:
        losses = run_forward(model)
    assert forward.get_total_flops() == tokens * (forward_flops(a, 64) + later)
    with FlopCounterMode(display=False) as backward:
        losses.sum().backward()
    total = forward.get_total_flops() + backward.get_total_flops()
    assert total == tokens * (training_flops(a, 64) + 3 * later)


def test_second_moments_are_as_gathered(megatron):
    from torch.utils.flop_counter import FlopCounterMode

    from nemo_minitron.megatron.chunks import output_in_chunks
    from nemo_minitron.pruning.importance.moments import gathered

    model = megatron(LLAMA)
    with FlopCounterMode(display=False) as plain:
        run_forward(model)
    with FlopCounterMode(display=False) as counted, gathered(model) as sums:
        run_forward(model)
    assert counted.get_total_flops() - plain.get_total_flops() == BATCH * 64 * moment_flops(LLAMA)
    assert sum(total.nbytes for total in sums.sums.values()) == moment_bytes(LLAMA, 3, last=True)[0]
    later = LLAMA.num_layers * 4 * (64 - 65 / 2) * LLAMA.num_attention_heads * LLAMA.kv_channels
    chunked = output_in_chunks(model, losses=False)
    with all_scores(), FlopCounterMode(display=False) as scoring, gathered(model), chunked:
        run_forward(model)
    assert scoring.get_total_flops() == BATCH * 64 * (stage_flops("prune", LLAMA, None, 64) + later)


@pytest.mark.parametrize("tensor, pipeline", [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)])
@pytest.mark.parametrize("name", SHAPES)
def test_parameters_of_each_rank_are_those_of_megatron(tmp_path, name, tensor, pipeline):
    """Real Megatron models of every rank, one after another; torch's fake process group stands for the other ranks."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from nemo_minitron.megatron.forward import load_model
    from nemo_minitron.megatron.session import engine

    a, world = SHAPES[name], tensor * pipeline
    layout = Layout(cuda=False, bf16=False, devices=world, tensor_parallel=tensor, pipeline_parallel=pipeline)
    for rank in range(world):
        with engine(1, tmp_path / "log"):
            torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
            parallel_state.initialize_model_parallel(tensor, pipeline, create_gloo_process_groups=False)
            model_parallel_cuda_manual_seed(1)
            parameters = list(load_model(a, layout, None).parameters())
        stage = rank // tensor
        assert sum(parameter.numel() for parameter in parameters) == rank_parameters(a, layout, stage)
        assert max(parameter.numel() for parameter in parameters) == largest_parameter(a, layout, stage)


def test_stages_share_all_layers():
    for layers, stages in itertools.product(range(1, 40), range(1, 9)):
        if layers >= stages:
            shared = stage_layers(layers, stages)
            assert len(shared) == stages and sum(shared) == layers and min(shared) > 0


def test_a_window_keeps_its_blocks_and_their_masks(megatron, monkeypatch):
    from nemo_minitron.megatron import attention
    from nemo_minitron.planning import activations

    for block in (16, 40, 64):
        monkeypatch.setattr(attention, "BLOCK", block)
        monkeypatch.setattr(activations, "BLOCK", block)
        attention._hidden.cache_clear()
        a, run = dataclasses.replace(LLAMA, sliding_window=10), on_cpu()
        one, three = (kept_by_autograd(megatron(a.with_sizes(num_layers=layers))) for layers in (1, 3))
        assert three - one == 2 * kept_by_layer(a, run)
        plain = kept_by_autograd(megatron(LLAMA.with_sizes(num_layers=1)))
        masks = one - plain - kept_by_layer(a, run) + kept_by_layer(LLAMA, run)
        assert masks == activations.global_buffer(a, run) > 0 == activations.global_buffer(LLAMA, run)
    assert kept_by_layer(LLAMA, dataclasses.replace(run, seq_length=8192)) == 128 * kept_by_layer(LLAMA, run)


def test_loss_and_attention_work_in_the_planned_pieces():
    from nemo_minitron.distillation.losses import divergences, fused
    from nemo_minitron.megatron import attention
    from nemo_minitron.planning import activations

    assert activations.BLOCK == attention.BLOCK
    assert (loss.CPU_CHUNK, loss.CUDA_CHUNK) == (fused.CPU_CHUNK, fused.CUDA_CHUNK)
    assert loss.CHUNK_TOKENS == fused.CHUNK_TOKENS
    assert (loss.CPU_BLOCK, loss.CUDA_BLOCK) == (divergences.CPU_BLOCK, divergences.CUDA_BLOCK)
    assert divergences.Divergence().buffers == loss.BLOCKS


@pytest.mark.parametrize(
    "name, parameters, without_embeddings",
    [
        ("nemotron4_15b", 15.6, 12.5),
        ("minitron_8b", 8.27, 6.2),
        ("minitron_4b", 4.19, 2.6),
        ("llama31_8b", 8.0, None),
        ("llama31_minitron_4b_width", 4.5, 3.7),
        ("llama31_minitron_4b_depth", 4.5, 3.5),
        ("mistral_nemo_12b", 12.2, None),
        ("mn_minitron_8b", 8.4, 7.3),
        ("llama31_70b", 70.6, None),
        ("qwen3_0.6b", 0.6, 0.44),
        ("qwen3_1.7b", 1.7, 1.4),
        ("qwen3_4b", 4.0, 3.6),
        ("qwen3_6b", 6.0, None),
        ("qwen3_8b", 8.2, 6.95),
        ("qwen3_14b", 14.8, 13.2),
        ("qwen3_32b", 32.8, 31.2),
    ],
)
def test_known_models_have_the_published_sizes(name, parameters, without_embeddings):
    a = KNOWN[name]
    assert not a.problems()
    assert a.parameters() / 1e9 == pytest.approx(parameters, abs=0.06)
    if without_embeddings:
        assert a.non_embedding_parameters() / 1e9 == pytest.approx(without_embeddings, abs=0.06)


def test_attention_looks_at_the_causal_half_only():
    a = KNOWN["llama31_8b"]
    half = forward_flops(a, 8192)
    assert half - forward_flops(a, 1) == pytest.approx(4 * (8193 / 2 - 1) * 32 * 128 * 32)
    assert training_flops(a, 8192) == 3 * half
    window = dataclasses.replace(a, sliding_window=1)
    assert forward_flops(window, 8192) == pytest.approx(half - 4 * 32 * 4096 * (8193 / 2 - 1))
    # The rule of thumb, 6 operations a parameter in the matrices, at a length where attention is nothing.
    matrices = a.parameters() - a.vocab_size * a.hidden_size
    assert training_flops(a, 1) == pytest.approx(6 * matrices, rel=1e-3)
    student = KNOWN["llama31_minitron_4b_width"]
    assert stage_flops("distill", a, student, 8192) == half + training_flops(student, 8192)


def test_the_optimizer_is_shared_by_data_parallel_ranks_on_gpus_alone():
    two = dataclasses.replace(GPUS, tensor_parallel=4)
    assert optimizer_bytes(100, Run(layout=two, seq_length=8)) == 600
    assert optimizer_bytes(100, Run(layout=GPUS, seq_length=8)) == 1200
    assert optimizer_bytes(100, on_cpu(bf16=True)) == 1200
    assert optimizer_bytes(100, on_cpu()) == 800
    assert optimizer_bytes(100, on_cpu(devices=4)) == 800


TEACHER, STUDENT = KNOWN["llama31_8b"], KNOWN["llama31_minitron_4b_width"]


def needed(stage, **changes) -> int:
    layout = dataclasses.replace(GPUS, **{key: value for key, value in changes.items() if key != "seq_length"})
    run = Run(layout=layout, seq_length=changes.get("seq_length", 8192), fused_loss=not layout.sequence_parallel)
    return stage_memory(stage, TEACHER, STUDENT, run).peak.total


@pytest.mark.parametrize("stage", ["finetune", "distill"])
def test_more_ranks_need_no_more_memory_each_and_more_work_needs_more(stage):
    for sequence in (False, True):
        shares = [needed(stage, tensor_parallel=size, sequence_parallel=sequence and size > 1) for size in (1, 2, 4, 8)]
        assert shares == sorted(shares, reverse=True)
    nodes = [needed(stage, num_nodes=count) for count in (1, 2, 4, 8)]
    assert nodes == sorted(nodes, reverse=True) and nodes[0] > nodes[-1]
    for name, values in {"micro_batch_size": (1, 2, 4), "seq_length": (2048, 4096, 8192)}.items():
        grown = [needed(stage, **{name: value}) for value in values]
        assert grown == sorted(grown) and grown[0] < grown[-1]
    assert needed(stage, sequence_parallel=True) < needed(stage, sequence_parallel=False)


def test_the_first_pipeline_stage_holds_the_most_micro_batches():
    layout = dataclasses.replace(GPUS, tensor_parallel=2, pipeline_parallel=4)
    ranks = all_ranks("finetune", TEACHER, None, Run(layout=layout, seq_length=4096))
    kept = [rank.peak.activations for rank in ranks]
    assert kept[0] == 4 * kept[2] // 2 and kept == sorted(kept, reverse=True)
    few = dataclasses.replace(layout, global_batch_size=2)
    assert all_ranks("finetune", TEACHER, None, Run(layout=few, seq_length=4096))[0].peak.activations == kept[2]


def test_candidates_are_all_layouts_best_first():
    run = Run(layout=GPUS, seq_length=8192)
    listed = candidates(Models(teacher=TEACHER, student=STUDENT), run, ("finetune", "distill"), 80e9, auto=True)
    sizes = [(one.run.layout.tensor_parallel, one.run.layout.pipeline_parallel) for one in listed]
    assert sorted(sizes) == [(t, p) for t in (1, 2, 4, 8) for p in (1, 2, 4, 8) if t * p <= 8]
    fitting = [one for one in listed if one.problem is None]
    assert fitting == listed[: len(fitting)] and all(one.total <= 80e9 and one.micro_batch >= 1 for one in fitting)
    assert all(one.total > 80e9 for one in listed[len(fitting) :] if one.possible)
    for one in listed:
        if one.micro_batch:
            layout = dataclasses.replace(one.run.layout, micro_batch_size=2 * one.micro_batch)
            larger = dataclasses.replace(one.run, layout=layout)
            peaks = [stage_memory(stage, TEACHER, STUDENT, larger).peak.total for stage in ("finetune", "distill")]
            assert max(peaks) > 80e9 or GPUS.global_batch_size % (layout.micro_batch_size * larger.data_parallel)
