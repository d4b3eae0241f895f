"""Checks of saved models from untrusted folders: safetensors and JSON of plausible sizes, and no code."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

CONFIG_MAX_BYTES = 2**20
INDEX_MAX_BYTES = 2**26  # index of the weight files, tokenizer
CONFIG_MAX = {  # largest plausible values: anything larger is a mistake or an attack on memory
    "vocab_size": 2**24, "n_positions": 2**22, "n_embd": 2**16, "n_layer": 1024, "n_head": 1024,
    "n_inner": 2**19, "num_labels": 2**16, "hidden_size": 2**16, "intermediate_size": 2**19,
    "num_hidden_layers": 1024, "num_attention_heads": 1024, "num_key_value_heads": 1024,
    "max_position_embeddings": 2**22, "head_dim": 2**16,
}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".pkl")  # may run code when loaded


def read_json(path: Path, max_bytes: int = CONFIG_MAX_BYTES) -> dict:
    """A JSON object from a file. Raises ValueError, one line, if it is missing, too large or damaged."""
    try:
        if path.stat().st_size > max_bytes:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, at most {max_bytes:,} are read")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("expected an object")
        return value
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {path.parent} is no folder of a saved model") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise ValueError(f"{path} is damaged ({reason}): save the model there again") from None


def validate_checkpoint(folder: Path | str) -> dict:
    """The configuration of a saved model. Raises ValueError if it or a weight file is implausible."""
    folder = Path(folder)
    path = folder / "config.json"
    config = read_json(path)
    for name, largest in CONFIG_MAX.items():
        value = config.get(name, 1)
        if value is not None and not (type(value) is int and 0 < value <= largest):
            problem = f"{path}: {name} {str(value)[:40]} is no size of a model"
            raise ValueError(f"{problem}, allowed are 1 to {largest:,}")
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path} names no model_type: {folder} is no folder of a saved model")
    for name in weight_files(folder):
        with one_line_load_errors(folder), safe_open(folder / name, "pt"):
            pass
    return config


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files. Raises ValueError if they are not safetensors files in the folder itself."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLE_SUFFIXES)
        found = f" ({pickles[0]} may run code when it is loaded and is not read)" if pickles else ""
        remedy = "save the model with save_pretrained, which writes safetensors"
        raise ValueError(f"{folder} has no {SAFE_WEIGHTS_NAME}{found}: {remedy}")
    weight_map = read_json(index, INDEX_MAX_BYTES).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{index} names no files: save the model there again")
    for name in set(names):
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise ValueError(f"{index}: {name!r} is no safetensors file of the folder")
    return sorted(set(names))


@contextlib.contextmanager
def one_line_load_errors(folder: Path) -> Iterator[None]:
    """Raise the loaders' errors as a ValueError of one line; lack of memory or disk stays as it is."""
    try:
        yield
    except SafetensorError as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"{folder}: its weights are damaged ({line}): save the model there again") from None
    except (MemoryError, OSError):
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        if "allocate memory" in message or "out of memory" in message or message.startswith(str(folder)):
            raise
        reason = f"{type(error).__name__}: {message[:160]}"
        if "ignore_mismatched_sizes" in message:
            reason = "a weight has another shape than config.json says"
        remedy = "its config.json, its weights and the arguments must fit one another"
        raise ValueError(f"{folder} cannot be loaded ({reason}): {remedy}") from None


def load_tokenizer(folder: Path):
    """The tokenizer saved in a folder; no code of the folder is run. Raises ValueError if there is none."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file() and "auto_map" in read_json(path, INDEX_MAX_BYTES):
            remedy = "save the tokenizer as a plain one"
            raise ValueError(f"{path} asks for code of its own (auto_map), which is not run: {remedy}")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizers raise plain Exception for a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        problem = f"{folder} holds no tokenizer that can be read ({reason})"
        raise ValueError(f"{problem}: save it there again") from None
