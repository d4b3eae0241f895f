"""What may be loaded from a folder somebody else wrote: safetensors and JSON of plausible sizes; nothing that runs code or lies elsewhere.

check(folder)         its configuration, looked at before any memory is taken for a model
one_line_load_errors(folder)   the loaders' errors as one line that names the folder
tokenizer(folder)     its tokenizer, from JSON alone
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer

LARGEST = 2**20  # bytes of a configuration; of an index of weights 64 times as many
SIZES = {  # the greatest that is believed: what is larger is a slip or an attack
    "vocab_size": 2**24, "n_positions": 2**22, "n_embd": 2**16, "n_layer": 1024, "n_head": 1024, "n_inner": 2**19, "num_labels": 2**16,
    "hidden_size": 2**16, "intermediate_size": 2**19, "num_hidden_layers": 1024, "num_attention_heads": 1024, "num_key_value_heads": 1024, "max_position_embeddings": 2**22, "head_dim": 2**16,
}  # fmt: skip
INDEX = "model.safetensors.index.json"


def read(path: Path, largest: int = LARGEST) -> dict:
    """A JSON object; ValueError says what is wrong with the file."""
    try:
        if path.stat().st_size > largest:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, at most {largest:,} are read")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("an object wanted")
        return found
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {path.parent} is no folder of a saved model") from None
    except RecursionError:
        raise ValueError(f"{path} is damaged (nested too deeply): save the model there again") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}): save the model there again") from None


def validate_checkpoint(folder: Path | str) -> dict:
    """The configuration of a saved model, where it and the weights' headers can be believed; ValueError in one line otherwise."""
    folder = Path(folder)
    config = read(folder / "config.json")
    for name, greatest in SIZES.items():
        value = config.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= greatest):
            raise ValueError(f"{folder / 'config.json'}: {name} {str(value)[:40]} is no size of a model, allowed are 1 to {greatest:,}")
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{folder / 'config.json'} names no model_type: {folder} is no folder of a saved model")
    for name in weights(folder):
        with one_line_load_errors(folder), safe_open(folder / name, "pt"):
            pass
    return config


def weights(folder: Path) -> list[str]:
    """Names of the weight files; ValueError where they are not safetensors in the folder itself."""
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    if not (folder / INDEX).is_file():
        others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".pkl"))
        more = f" ({others[0]} may run code when it is loaded and is not read)" if others else ""
        raise ValueError(f"{folder} has no model.safetensors{more}: save the model with save_pretrained, which writes safetensors")
    listed = read(folder / INDEX, 64 * LARGEST).get("weight_map")
    names = sorted(set(listed.values())) if isinstance(listed, dict) and all(isinstance(name, str) for name in listed.values()) else []
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise ValueError(f"{folder / INDEX}: {name!r} is no safetensors file of the folder")
    if not names:
        raise ValueError(f"{folder / INDEX} names no files: save the model there again")
    return names


@contextlib.contextmanager
def one_line_load_errors(folder: Path) -> Iterator[None]:
    """Errors of the loaders, of many kinds, become a ValueError of one line; what the machine lacks (memory, disk) stays as it is."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{folder}: its weights are damaged ({str(error).splitlines()[0]}): save the model there again") from None
    except (MemoryError, OSError):
        raise
    except Exception as error:
        if "allocate memory" in str(error) or "out of memory" in str(error) or str(error).startswith(str(folder)):
            raise
        said = "a weight has another shape than config.json says" if "ignore_mismatched_sizes" in str(error) else f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise ValueError(f"{folder} cannot be loaded ({said}): its config.json, its weights and what was asked for must fit one another") from None


def load_tokenizer(folder: Path):
    """The tokenizer saved in a folder; never code of that folder. ValueError in one line where there is none."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings = read(folder / name, 64 * LARGEST)
            if "auto_map" in settings:
                raise ValueError(f"{folder / name} asks for code of its own (auto_map), which is not run: save the tokenizer as a plain one")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizers raise plain Exception for a damaged file
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{folder} holds no tokenizer that can be read ({lines[0][:160]}): save it there again") from None
