"""Settings of `minitron data`."""

import dataclasses
import re
from typing import Any

from nemo_minitron.config.schemas.base import Config, at_least, one_of, text_key_problems

#: Names of a source's folder, and what lies beside these folders.
FOLDER = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
TAKEN = ("tokenizer", "manifest.json", "partial.json", "logs")


@dataclasses.dataclass(kw_only=True)
class DataConfig(Config):
    """What `minitron data` makes: a corpus, tokenised, in Megatron's indexed format."""

    output: str = "???"
    """Folder to make: {train,validation,test}.{bin,idx}, tokenizer/, and for the embedded corpus questions.jsonl."""
    source: str = "embedded"
    """`embedded`, `prose`, `wikitext103`, or the path of a folder or file: .txt, .tokens, .md, .jsonl, .json, .parquet;
    all but the last also as .gz or .zst."""
    sources: Any = None
    """Several of them in place of source, {wiki:PATH,code:PATH}: a folder in output for each, with one tokenizer, for
    model.data.blend. Rows of chats are not tokenised here: they are named in the blend by their own folder."""
    text_key: str = "text"
    """Field of JSON rows, or column of parquet files, that holds the text; a field inside another behind a dot, a.b."""
    domain: str = "encyclopedic"
    """Of the embedded corpus: `broad` (for pretraining) or `encyclopedic` (the flow's own)."""
    words: int = 2_000_000
    """Of the embedded corpus: words in the training split; validation and test have a tenth each."""
    limit_documents: int | None = None
    """Use only the first so many documents of each split."""
    tokenizer: str | None = None
    """Hugging Face name or directory; none: a byte-level BPE is trained on the training split."""
    vocab_size: int = 2048
    """Size of the BPE that is trained when no tokenizer is given, special tokens included."""
    workers: int = 1
    """Processes that tokenise."""
    seed: int = 1234
    """Seed of the generator and of splits that have to be carved out."""
    overwrite: bool = False
    """Replace an output that was made from something else."""

    def problems(self) -> list[str]:
        problems = at_least(1, workers=self.workers, words=self.words, limit_documents=self.limit_documents)
        problems += [] if self.sources is None else self._source_problems()
        problems += one_of("domain", self.domain, ("broad", "encyclopedic"))
        problems += text_key_problems(self.text_key)
        if self.tokenizer is None and self.vocab_size < 300:
            problems.append(
                f"vocab_size = {self.vocab_size} must be at least 300: 256 bytes, special tokens and merges"
            )
        if self.output == "???":
            problems.append("output is missing: name the folder to make, output=DIR")
        return problems

    def _source_problems(self) -> list[str]:
        """What is wrong with the names and paths of several sources."""
        if not isinstance(self.sources, dict) or not self.sources:
            return [
                f"sources = {self.sources!r} must be names with paths; quoted, since shells take braces apart: "
                "'sources={wiki:PATH,code:PATH}'"
            ]
        problems = [] if self.source == "embedded" else ["source and sources: give one"]
        for name, path in self.sources.items():
            if not FOLDER.fullmatch(str(name)) or str(name) in TAKEN:
                problems.append(f"sources: {name!r} cannot be the name of a source: it is a folder in output")
            if not isinstance(path, str) or not path:
                problems.append(f"sources: {name} is {path!r}, and must be a path, or a corpus that source may name")
        return problems
