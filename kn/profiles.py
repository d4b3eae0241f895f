"""Every number a run uses: the profiles mini, midi, paper and one for tests, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TextSettings:
    """Where text comes from and how it is cut; packages are import names, shares are (valid, test) by file."""

    web: tuple[str, ...] = (
        "torch", "transformers", "pandas", "numpy", "matplotlib", "sklearn", "huggingface_hub", "datasets", "IPython",
        "pydantic", "accelerate", "prompt_toolkit", "rich", "PIL", "tornado", "jupyter_server", "joblib", "fsspec",
        "pyarrow", "narwhals", "nbconvert", "traitlets", "jinja2", "coverage", "filelock", "anyio",
    )  # fmt: skip
    wiki: tuple[str, ...] = ("sympy", "scipy", "networkx", "mpmath")
    web_shares: tuple[float, float] = (0.10, 0.10)
    wiki_shares: tuple[float, float] = (0.06, 0.12)
    sample: float = 0.10  # share of the web documents that KnGPT2's pre-training sees (paper §3.3: 10 % of OpenWebText)
    sample_seed: int = 0
    vocabulary: int = 4608  # V = 6·L·d keeps the paper's proportions between embedding and blocks
    context: int = 128  # tokens
