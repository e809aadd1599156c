"""Settings of `minitron evaluate`, `generate` and `benchmark`."""

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import Any

from nemo_minitron.config.schemas.base import Config, at_least, one_of, text_key_problems, text_problems
from nemo_minitron.config.schemas.checkpoints import unnamed

DTYPES = ("auto", "32", "bf16", "fp16")
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(kw_only=True)
class InferenceSettings(Config):
    """How a checkpoint is loaded to be run by transformers."""

    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`."""
    dtype: str = "auto"
    """`32`, `bf16` or `fp16`; auto: the checkpoint's own on a GPU, 32 on a CPU."""
    tokenizer: str | None = None
    """Directory or hub name of the tokenizer; none: the checkpoint's own."""
    seed: int = 1234
    """Seed of everything random."""

    def problems(self) -> list[str]:
        problems = one_of("dtype", str(self.dtype), DTYPES)
        if self.device not in ("auto", "cpu", "cuda") and not self.device.removeprefix("cuda:").isdecimal():
            problems.append(f"device = {self.device!r} must be auto, cpu, cuda or cuda:N")
        return problems


def missing_models(models: list[str], what: str) -> list[str]:
    """A problem unless checkpoints are named, each once."""
    if not models or "" in models:
        return [f"models is missing: name {what}, models=[PATH,...]"]
    twice = sorted({model for model in models if models.count(model) > 1})
    return [f"models names {model} twice" for model in twice]


def names_problems(names: list[str], models: list[str]) -> list[str]:
    """What is wrong with the names that stand for checkpoints in tables."""
    if names and len(names) != len(models):
        return [f"names has {len(names)} entries for {len(models)} models: one each, or leave it"]
    return ["names must differ from each other"] if len(set(names)) < len(names) else []


@dataclasses.dataclass(kw_only=True)
class EvaluateConfig(InferenceSettings):
    """What `minitron evaluate` measures: checkpoints side by side, the first of them the reference."""

    models: list[str] = field(default_factory=list)
    """Checkpoints of any format; the first is what the others are compared with (the teacher)."""
    names: list[str] = field(default_factory=list)
    """What tables call them; none: the ends of their paths."""
    tasks: Any = "perplexity"
    """One or several, [a,b]: perplexity, facts, summarization, minitron (the published suite: MMLU 5-shot,
    HellaSwag 10, Winogrande 5, ARC-C 25, GSM8K 5, XLSum 3, HumanEval), minitron_card (the shots of the model cards:
    MMLU 5, all others 0), or any name of lm-evaluation-harness."""
    output: str | None = None
    """Folder to make: results.json, table.txt, samples.jsonl, manifest.json; none: only print."""
    overwrite: bool = False
    """Replace an output that was made from something else."""
    json: bool = False
    """Print JSON instead of the table."""
    corpus: str = "embedded"
    """Text of perplexity and facts: `embedded`, `prose`, `wikitext103`, a text file or folder as in `minitron data`, or
    a folder that `minitron data` made (its manifest says which text that was)."""
    text_key: str = "text"
    """With corpus=PATH: field or column that holds the text, as in `minitron data`."""
    domain: str = "encyclopedic"
    """With corpus=embedded: `encyclopedic` or `broad`."""
    words: int = 1_000_000
    """With corpus=embedded: words of its training split, as in `minitron data`; the presets' 1,000,000."""
    corpus_seed: int = 1234
    """With corpus=embedded, or a text without a test split: the seed that `minitron data` was given."""
    split: str = "test"
    """Split that perplexity reads: train, validation or test."""
    limit: int | None = None
    """Questions, documents or articles a task; none: all, but 400 questions of facts and 20 articles of
    summarization."""
    num_fewshot: int | None = None
    """Examples before each question of lm-evaluation-harness's own tasks; none: as each task says."""
    batch_memory_gb: float = 0.5
    """GB (10^9 bytes) that the activations of a forward pass may take, beside the weights: so many sequences are in a
    batch, one at least. Logits are worked out 64 MiB at a time."""
    batch_size: int | None = None
    """Sequences a forward pass at most; none: as many as batch_memory_gb holds."""
    max_length: int | None = None
    """Tokens of context; none: the model's own."""
    window: int = 2048
    """Tokens of the windows in which perplexity reads a document, at most the shortest model's length and max_length;
    figures of different windows do not compare."""
    log_every_n_steps: int = 10
    """Where standard error is no terminal, a line of progress every so many forward passes."""
    task_data: str | None = None
    """Folder with downloaded data sets, ORG/NAME in it as `hf download --local-dir` leaves them; none: the hub."""
    allow_code: bool = False
    """Let HumanEval and its like run the code that models write, on this machine, without a sandbox."""
    articles: str = "cnn_dailymail"
    """Of summarization: `cnn_dailymail`, or a .jsonl, .json or .parquet file with `article` and `highlights` (or `text`
    and `summary`)."""
    max_new_tokens: int = 100
    """Of summarization: tokens to generate."""
    max_input_tokens: int = 923
    """Of summarization: tokens of the article, from its start; less where the model is shorter."""
    prompt_suffix: str = " TL;DR: "
    """Of summarization: what follows the article."""

    @property
    def task_names(self) -> list[str]:
        """The tasks as a list."""
        chosen = self.tasks if isinstance(self.tasks, list | tuple) else str(self.tasks or "").split(",")
        return [str(task).strip() for task in chosen if str(task).strip()]

    def problems(self) -> list[str]:
        problems = super().problems()
        problems += missing_models(self.models, "at least one checkpoint") + names_problems(self.names, self.models)
        problems += [] if self.output is None else unnamed(self.output)
        problems += text_key_problems(self.text_key) + text_problems(prompt_suffix=self.prompt_suffix)
        problems += [] if self.task_names else ["tasks is empty: name at least one, tasks=perplexity"]
        problems += one_of("split", self.split, SPLITS) + one_of("domain", self.domain, ("broad", "encyclopedic"))
        problems += at_least(
            1,
            limit=self.limit,
            words=self.words,
            batch_size=self.batch_size,
            log_every_n_steps=self.log_every_n_steps,
            max_new_tokens=self.max_new_tokens,
            max_input_tokens=self.max_input_tokens,
        )
        problems += at_least(0, num_fewshot=self.num_fewshot) + at_least(
            2, max_length=self.max_length, window=self.window
        )
        problems += [] if self.batch_memory_gb > 0 else [f"batch_memory_gb = {self.batch_memory_gb} must be above 0"]
        if self.task_data is not None and not Path(self.task_data).is_dir():
            problems.append(f"task_data = {self.task_data} is not a folder")
        return problems


@dataclasses.dataclass(kw_only=True)
class GenerateConfig(InferenceSettings):
    """What `minitron generate` writes."""

    model: str = "???"
    """Checkpoint of any format."""
    prompt: str | None = None
    """Text to continue."""
    max_new_tokens: int = 64
    """Tokens to generate, unless the model ends the text before."""
    do_sample: bool = False
    """Draw tokens instead of taking the likeliest."""
    temperature: float = 1.0
    """With do_sample: softmax temperature."""
    top_p: float = 1.0
    """With do_sample: draw among the likeliest tokens that have this probability together."""
    top_k: int | None = None
    """With do_sample: draw among so many."""
    json: bool = False
    """Print JSON: prompt, text, tokens, seconds."""

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.model in ("???", ""):
            problems.append("model is missing: name the checkpoint, model=PATH")
        if self.prompt is None or not self.prompt.strip():
            problems.append('prompt is empty: give the text to continue, prompt="To be or not to be,"')
        problems += text_problems(prompt=self.prompt)
        problems += at_least(1, max_new_tokens=self.max_new_tokens, top_k=self.top_k)
        problems += [] if self.temperature > 0 else [f"temperature = {self.temperature} must be above 0"]
        problems += [] if 0 < self.top_p <= 1 else [f"top_p = {self.top_p} must be above 0 and at most 1"]
        chosen = [name for name, default in (("temperature", 1.0), ("top_p", 1.0), ("top_k", None))
                  if getattr(self, name) != default]  # fmt: skip
        if chosen and not self.do_sample:
            problems.append(f"{', '.join(chosen)} has no effect on greedy decoding: do_sample=true draws tokens")
        return problems


@dataclasses.dataclass(kw_only=True)
class BenchmarkConfig(InferenceSettings):
    """What `minitron benchmark` measures: the speed and size of checkpoints, as ratios to the first."""

    models: list[str] = field(default_factory=list)
    """Checkpoints of any format; the first is what the others are compared with (the teacher)."""
    names: list[str] = field(default_factory=list)
    """What the table calls them; none: the ends of their paths."""
    batch_size: int = 1
    """Sequences at once."""
    prompt_tokens: int | None = None
    """Random tokens that prefill reads; none: 1024, or three quarters of the shortest model's length."""
    new_tokens: int | None = None
    """Tokens that decode makes; none: 128, or a quarter of the shortest model's length."""
    rounds: int = 7
    """Rounds that are measured; in each, every checkpoint has its turn."""
    warmup_rounds: int = 2
    """Rounds before, not measured."""
    output: str | None = None
    """Folder to make: results.json, table.txt, manifest.json; none: only print."""
    overwrite: bool = False
    """Replace an output that was made from something else."""
    json: bool = False
    """Print JSON instead of the table."""

    def problems(self) -> list[str]:
        problems = super().problems()
        problems += missing_models(self.models, "at least one checkpoint") + names_problems(self.names, self.models)
        problems += [] if self.output is None else unnamed(self.output)
        problems += at_least(1, batch_size=self.batch_size, prompt_tokens=self.prompt_tokens, rounds=self.rounds)
        return problems + at_least(2, new_tokens=self.new_tokens) + at_least(0, warmup_rounds=self.warmup_rounds)
