"""Third-party packages that are not there: what to install, by the extra of this package that brings them.

The extras are in pyproject.toml; what has no extra here comes with the package itself.
"""

from collections.abc import Sequence

from nemo_minitron.errors import MissingPackageError
from nemo_minitron.packages.versions import has_module

NAME = "nemo-minitron"
ENGINE, EVALUATE, NOTEBOOKS = "engine", "evaluate", "notebooks"
#: Modules that every command may import.
CORE = (
    "hydra",
    "huggingface_hub",
    "jinja2",
    "markupsafe",
    "matplotlib",
    "numpy",
    "omegaconf",
    "safetensors",
    "tqdm",
    "yaml",
)
#: Modules of several extras.
MODELS = ("datasets", "gguf", "peft", "pyarrow", "sentencepiece", "tiktoken", "tokenizers", "torch", "transformers")
#: Extra -> modules that it brings, beyond CORE.
EXTRAS = {
    ENGINE: (
        *MODELS, "invoke", "lightning", "megatron", "modelopt", "nemo", "nemo_run", "pulp", "pytorch_lightning",
        "tensorboard", "tensorstore", "torchx", "typer", "zarr",
    ),
    EVALUATE: (*MODELS, "lm_eval", "rouge_score"),
    NOTEBOOKS: ("IPython",),
}  # fmt: skip


def require(module: str, who: str, extras: Sequence[str] = (ENGINE,)) -> None:
    """Raises MissingPackageError where the top-level `module`, which `who` needs, is not installed."""
    if not has_module(module):
        raise MissingPackageError(f"{who} needs {module}{_remedy(module, extras)}")


def missing_package(error: ModuleNotFoundError, who: str, extras: Sequence[str]) -> MissingPackageError | None:
    """The error that a user can act on where a third-party module was not found; None where it is no such thing.

    Args:
        who: what needs it.
        extras: extras that bring all that `who` needs.
    """
    module = error.name or ""
    package = module.partition(".")[0]
    if package in ("", __package__):
        return None
    if not has_module(package):
        return MissingPackageError(f"{who} needs {package}{_remedy(package, extras)}")
    if package not in CORE and not any(package in modules for modules in EXTRAS.values()):
        return None
    from importlib import metadata

    held = [f"{name} {metadata.version(name)}" for name in metadata.packages_distributions().get(package, ())]
    holder = " and ".join(sorted({*held})) or package
    return MissingPackageError(f"{who} needs {module}, which {holder}, installed here, lacks{_remedy(package, extras)}")


def _remedy(package: str, extras: Sequence[str]) -> str:
    """What to install, as the end of a sentence."""
    if package in CORE:
        return f": pip install {NAME}"
    bringing = [extra for extra, modules in EXTRAS.items() if package in modules]
    if not bringing:
        return ", which is not installed here"
    chosen = extras if {*extras} & {*bringing} else bringing[:1]
    return f": pip install '{NAME}[{','.join(chosen)}]'"
