"""Models that others saved are never trusted: hostile or damaged folders of weights, configurations and
tokenizers are refused in one line."""

import json
import os
import random
import shutil
import struct

import pytest
import torch
from conftest import tiny_gpt2
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kn import KnGPT2LMHeadModel, compress
from kn.files import ASSETS
from kn.models import loading
from kn.suite.work.pretrained import load_model


def refused(call, *parts, kind=ValueError):
    """The call ends in this error, of one line with these parts."""
    with pytest.raises(kind) as error:
        call()
    said = str(error.value)
    assert "\n" not in said and all(part in said for part in parts), said


# ---------------------------------------------------------------- model folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved tiny GPT-2 and its compressed model."""
    folder = tmp_path_factory.mktemp("models")
    tiny_gpt2().save_pretrained(folder / "gpt2")
    compress(tiny_gpt2()).save_pretrained(folder / "kngpt2")
    return folder


@pytest.fixture(params=["gpt2", "kngpt2"])
def model(folders, tmp_path, request):
    """A copy of one of them, to be made hostile."""
    shutil.copytree(folders / request.param, tmp_path / "model")
    return tmp_path / "model"


def loaders(folder):
    """Every way a folder is loaded: a stage's, and for a compressed model its class and AutoModel."""
    found = [lambda: load_model(folder)]
    if "kronecker" in (folder / "config.json").read_text():
        found += [
            lambda: KnGPT2LMHeadModel.from_pretrained(folder),
            lambda: AutoModelForCausalLM.from_pretrained(folder)
        ]
    return found


def configure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite(folder, change):
    """Change the weights."""
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_the_copies_load(model):
    assert all(load().num_parameters() > 3000 for load in loaders(model))


def test_pickled_weights_are_refused(model, tmp_path):
    """Also with the good file beside them: nothing is unpickled."""
    torch.save({"weight": Evil(tmp_path / "ran")}, model / "pytorch_model.bin")
    assert all(load().num_parameters() for load in loaders(model))
    (model / "model.safetensors").unlink()
    for load in loaders(model):
        refused(
            load,
            "has no model.safetensors (pytorch_model.bin may run code when it is loaded and is not read): "
            "save the model with save_pretrained"
        )
    assert not (tmp_path / "ran").exists()


def test_code_in_a_configuration_is_not_run(model, tmp_path):
    mark = tmp_path / "ran"
    (model / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil:\n    pass\n")
    configure(
        model, auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        trust_remote_code=True, models="evil", architectures=["evil.Evil"]
    )
    for load in loaders(model):
        assert type(load()).__name__ in ("GPT2LMHeadModel", "KnGPT2LMHeadModel")
    assert not mark.exists()


ABSURD = [
    ("n_layer", 10**9), ("vocab_size", 10**12), ("n_embd", -8), ("n_head", 0), ("n_positions", 2**40),
    ("n_embd", "8"), ("n_layer", True), ("n_layer", 2.5), ("n_inner", 10**10)
]


@pytest.mark.parametrize(("field", "value"), ABSURD)
def test_absurd_sizes_are_refused_before_memory_is_taken(model, field, value):
    configure(model, **{field: value})
    for load in loaders(model)[:2]:  # AutoConfig has words of its own for other types
        refused(load, f"config.json: {field} {value} is no size of a model, allowed are 1 to ")


@pytest.mark.parametrize(
    "fields",
    [
        {"vocab_size": 60},
        {"n_embd": 12},
        {"n_head": 3},
        {"activation_function": "os.system"},
        {"layer_norm_epsilon": "x"},
        {"kronecker": {"evil": 1}},
        {"kronecker": {"layers": "import os"}},
        {"kronecker": {"factor": 3}},
        {"kronecker": {"shapes": {"*": "2x1"}}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit(model, fields):
    """Or asks for packages: one line that names the folder."""
    if "kronecker" in fields and model.joinpath("config.json").read_text().count("kngpt2") == 0:
        configure(model, **fields)
        assert load_model(model).num_parameters() == 4032  # a stock GPT-2 has no Kronecker settings
        return
    configure(model, **fields)
    for load in loaders(model)[:2]:
        refused(load, str(model), "cannot be loaded")


@pytest.mark.parametrize(
    "harm", ["header cut", "tail cut", "empty", "header of 2^60", "header no JSON", "offsets outside", "text"]
)
def test_damaged_weights(model, harm):
    path = model / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")
    header[name]["data_offsets"] = [0, 2**50]
    text = json.dumps(header).encode()
    made = {
        "header cut": content[:50],
        "tail cut": content[:-20],
        "empty": b"",
        "header of 2^60": struct.pack("<Q", 2**60) + content[8:],
        "header no JSON": content[:8] + b"(" * length + content[8 + length :],
        "offsets outside": struct.pack("<Q", len(text)) + text + content[8 + length :],
        "text": b"not weights at all",
    }
    path.write_bytes(made[harm])
    for load in loaders(model):
        refused(load, f"{model}: its weights are damaged (", "save the model there again")


def test_random_bytes_in_weights_end_in_one_line_or_in_the_same_shapes(folders, tmp_path):
    """Sixty files with changed bytes in the header: refused, or loaded with every weight in its place."""
    draw = random.Random(0)
    content = (folders / "gpt2" / "model.safetensors").read_bytes()
    shutil.copytree(folders / "gpt2", tmp_path / "model")
    for _ in range(60):
        made = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            made[draw.randrange(8 + struct.unpack("<Q", content[:8])[0])] = draw.randrange(256)
        (tmp_path / "model" / "model.safetensors").write_bytes(made)
        try:
            assert load_model(tmp_path / "model").num_parameters() == 4032
        except ValueError as error:
            assert "\n" not in str(error) and str(tmp_path / "model") in str(error)


def test_missing_and_misshapen_weights(model):
    first = sorted(load_file(model / "model.safetensors"))[3]
    rewrite(model, lambda state: state.update({first: torch.zeros(3, 5)}))
    for load in loaders(model):
        refused(load, f"{model} cannot be loaded (a weight has another shape than config.json says)")
    rewrite(model, lambda state: state.pop(first))
    refused(
        lambda: load_model(model),
        f"{model} lacks 1 of the model's weights, such as {first}: save the whole model there again"
    )
    configure(model, n_layer=5)
    refused(lambda: load_model(model), f"{model} lacks 13 of the model's weights, such as transformer.h.0.")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors", "/etc/passwd", "sub/part.safetensors", "part.bin", "nothing.safetensors", "",
        "..", "a\u0000b.safetensors", 7, ["x"]
    ]
)
def test_weight_maps_stay_in_their_folder(model, name):
    (model / "model.safetensors").rename(model.parent / "secret.safetensors")
    (model / "part.bin").write_text("x")
    (model / loading.SAFE_WEIGHTS_INDEX_NAME).write_text(
        json.dumps({"metadata": {}, "weight_map": {"transformer.wte.weight": name}})
    )
    for load in loaders(model):
        refused(load, loading.SAFE_WEIGHTS_INDEX_NAME)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "[" * 100_000, '{"model_type": 3}', "{}", '{"x": "' + "y" * 2**21 + '"}', "\ud800"],
    ids=lambda c: c[:12]
)
def test_a_configuration_that_is_none(model, content):
    (model / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    refused(lambda: load_model(model), "config.json")
    refused(
        lambda: loading.validate_checkpoint(model.parent / "nowhere"), "config.json is missing: ",
        "is no folder of a saved model"
    )


def test_tokenizers_run_no_code(tmp_path):
    mark, folder = tmp_path / "ran", tmp_path / "tokenizer"
    shutil.copytree(ASSETS / "mini" / "tokenizer", folder)
    assert loading.load_tokenizer(folder).eos_token_id == 0
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}})
    )
    refused(
        lambda: loading.load_tokenizer(folder),
        "asks for code of its own (auto_map), which is not run: save the tokenizer as a plain one"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for content in ("", "[]", "[" * 100_000, '{"version": "1.0", "model": {"type": "Evil"}}'):
        (folder / "tokenizer.json").write_text(content)
        refused(lambda: loading.load_tokenizer(folder), str(folder))
    assert not mark.exists()
