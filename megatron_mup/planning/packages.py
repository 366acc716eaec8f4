"""The packages that a machine may have, and what each missing one costs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass

from megatron_mup.planning.findings import Finding, Verdict


@dataclass(frozen=True)
class Package:
    """A package that the project names.

    Attributes:
        name: as the registry has it.
        module: what is imported; where another package of that name exists, a module that only the right one has.
        needed: whether runs need it.
        cost: what is missing without it.
    """

    name: str
    module: str
    needed: bool
    cost: str


PACKAGES = (
    Package("torch", "torch", True, "nothing runs"),
    Package("numpy", "numpy", True, "nothing runs"),
    Package("tyro", "tyro", True, "no flags"),
    Package("pyyaml", "yaml", True, "no recipes"),
    Package("rich", "rich", True, "no progress bar"),
    Package("sentencepiece", "sentencepiece", False, "no --tokenizer-type SentencePieceTokenizer"),
    Package("tensorboard", "tensorboard", False, "no --tensorboard-dir"),
    Package("matplotlib", "matplotlib", False, "no pictures of curves"),
    Package("triton", "triton", False, "torch.compile and the kernels of Muon fall back to plain PyTorch on GPUs"),
    Package("wandb", "wandb", False, "no --wandb-project"),
    Package("prometheus-client", "prometheus_client", False, "no --prometheus-port"),
    Package("jinja2", "jinja2", False, "no reports of runs"),
    Package("transformers", "transformers", False, "checkpoints can't be compared with Hugging Face's models"),
    Package("safetensors", "safetensors", False, "no conversion to and from Hugging Face's files"),
    Package("tokenizers", "tokenizers", False, "no --tokenizer-type HuggingFaceTokenizer"),
    Package("tiktoken", "tiktoken", False, "no --tokenizer-type TikTokenizer"),
    Package("pyarrow", "pyarrow", False, "tools/preprocess_data.py reads no parquet"),
    Package("zstandard", "zstandard", False, "tools/preprocess_data.py reads no .zst"),
    Package("transformer-engine", "transformer_engine", False, "no --transformer-impl transformer_engine"),
    Package("deepspeed", "deepspeed", False, "no --distributed-engine deepspeed"),
    # The registry has another package of this name, without these modules.
    Package("apex", "apex.optimizers", False, "no --adam-impl apex, no --norm-impl apex"),
)


def found(module: str) -> bool:
    """Whether a module could be imported; it isn't."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def version(name: str) -> str:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"


def check_packages() -> list[Finding]:
    """One finding for what is there, and one for each package that isn't."""
    there = [package for package in PACKAGES if found(package.module)]
    findings = [Finding("packages", Verdict.GOOD, ", ".join(f"{p.name} {version(p.name)}" for p in there))]
    for package in PACKAGES:
        if package in there:
            continue
        verdict = Verdict.BAD if package.needed else Verdict.NOTE
        other = package.name == "apex" and found("apex")
        text = "the apex here is not NVIDIA's" if other else "missing"
        findings.append(Finding(package.name, verdict, f"{text}: {package.cost}"))
    return findings
