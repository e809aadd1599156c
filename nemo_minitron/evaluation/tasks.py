"""Every task that `minitron evaluate` is asked for, with its data, loaded once for all checkpoints."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import Manifest
from nemo_minitron.config import DataConfig, EvaluateConfig
from nemo_minitron.errors import ConfigError, DataError
from nemo_minitron.evaluation import facts, lm_eval_api, perplexity, suite, summarization
from nemo_minitron.evaluation.loading import quiet_transformers

#: Tasks of this package's own; all others are lm-evaluation-harness's, or stand in custom_tasks.
OWN = (perplexity.TASK, "facts", summarization.TASK)


class PreparedTasks:
    """Every task with its data, loaded once for all checkpoints.

    Raises:
        ConfigError, DataError: a task's data is missing or unusable.
    """

    def __init__(self, config: EvaluateConfig):
        self.config = config
        names = config.task_names
        own: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.questions: list[dict[str, Any]] = []
        self.documents: list[str] = []
        self.articles: list[summarization.Article] = []
        with quiet_transformers():
            if "facts" in names:
                self.questions = self._questions()
                own += facts.tasks(self.questions)
            if perplexity.TASK in names:
                self.documents = self._documents()
                own.append(perplexity.task(self.documents))
            if summarization.TASK in names:
                self.articles = summarization.load_articles(config)
            self.loaded = self._loaded(own, [name for name in names if name not in OWN])

    def _loaded(self, own: list[dict[str, Any]], others: list[str]) -> dict[str, Any]:
        loaded = lm_eval_api.load(lm_eval_api.task_manager(include_defaults=False), own) if own else {"tasks": {}}
        loaded = {"tasks": {}, "groups": {}, "group_map": {}} | loaded
        self.shown = [task["task"] for task in own]
        if others:
            config = self.config
            asked = suite.load_tasks(
                others, task_data=config.task_data, shots=config.num_fewshot, allow_code=config.allow_code
            )
            self.shown += asked.names
            self.notes += [f"{name} is left out: {why}" for name, why in asked.left_out.items()]
            for kind, entries in asked.loaded.items():
                loaded[kind] |= entries
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=self.config.seed)
        return loaded

    @property
    def has_windows(self) -> bool:
        """Whether a task scores texts whole, window by window."""
        return any(task.get_config("output_type") == "loglikelihood_rolling" for task in self.loaded["tasks"].values())

    def _questions(self) -> list[dict[str, Any]]:
        from nemo_minitron.data.sources import open_corpus

        data = data_config(self.config)
        if data.source != "embedded":
            raise DataError(
                f"tasks=facts asks about the embedded corpus, and {self.config.corpus} is {data.source}: give "
                "corpus=embedded, or a folder that `minitron data source=embedded` made"
            )
        documents = open_corpus(data).splits["train"]()
        return facts.stated_questions(data, documents, self.config.limit or facts.QUESTIONS, self.config.seed)

    def _documents(self) -> list[str]:
        from nemo_minitron.data.sources import open_corpus

        documents = open_corpus(data_config(self.config)).splits[self.config.split]()
        return [text for text in itertools.islice(documents, self.config.limit) if text.strip()]


def data_config(config: EvaluateConfig) -> DataConfig:
    """The settings with which `minitron data` made, or would make, the corpus."""
    place = Path(config.corpus).expanduser()
    if not (place / "manifest.json").is_file():
        return DataConfig(
            source=config.corpus,
            text_key=config.text_key,
            domain=config.domain,
            words=config.words,
            seed=config.corpus_seed,
            output="",
        )
    manifest = Manifest.read(place)
    if manifest.stage != "data":
        raise ConfigError(
            f"corpus = {place} was made by `{manifest.stage}`, not by `minitron data`", "minitron evaluate"
        )
    known = {field.name for field in dataclasses.fields(DataConfig)}
    return DataConfig(**{name: value for name, value in manifest.config.items() if name in known})
