"""Files that others wrote are never trusted: hostile or damaged model folders, tokenizers, mirrors, tables and texts are refused in one line."""

import json
import os
import random
import shutil
import struct

import pytest
import rehearsal
import torch
from conftest import tiny_gpt2
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kn import KnGPT2LMHeadModel, compress, corpora, glue, kinds, mirror, real, saved, sources
from kn.train import load_model

SCRIPT = '<script>alert("1")</script><img src=x onerror=alert(1)>'


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
        found += [lambda: KnGPT2LMHeadModel.from_pretrained(folder), lambda: AutoModelForCausalLM.from_pretrained(folder)]
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
        refused(load, "has no model.safetensors (pytorch_model.bin may run code when it is loaded and is not read): save the model with save_pretrained")
    assert not (tmp_path / "ran").exists()


def test_code_in_a_configuration_is_not_run(model, tmp_path):
    mark = tmp_path / "ran"
    (model / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil:\n    pass\n")
    configure(model, auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}, trust_remote_code=True, models="evil", architectures=["evil.Evil"])
    for load in loaders(model):
        assert type(load()).__name__ in ("GPT2LMHeadModel", "KnGPT2LMHeadModel")
    assert not mark.exists()


ABSURD = [("n_layer", 10**9), ("vocab_size", 10**12), ("n_embd", -8), ("n_head", 0), ("n_positions", 2**40), ("n_embd", "8"), ("n_layer", True), ("n_layer", 2.5), ("n_inner", 10**10)]


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


@pytest.mark.parametrize("harm", ["header cut", "tail cut", "empty", "header of 2^60", "header no JSON", "offsets outside", "text"])
def test_damaged_weights(model, harm):
    path = model / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")
    header[name]["data_offsets"] = [0, 2**50]
    text = json.dumps(header).encode()
    made = {
        "header cut": content[:50], "tail cut": content[:-20], "empty": b"", "header of 2^60": struct.pack("<Q", 2**60) + content[8:], "header no JSON": content[:8] + b"(" * length + content[8 + length :],
        "offsets outside": struct.pack("<Q", len(text)) + text + content[8 + length :], "text": b"not weights at all",
    }  # fmt: skip
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
    refused(lambda: load_model(model), f"{model} lacks 1 of the model's weights, such as {first}: save the whole model there again")
    configure(model, n_layer=5)
    refused(lambda: load_model(model), f"{model} lacks 13 of the model's weights, such as transformer.h.0.")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/part.safetensors", "part.bin", "nothing.safetensors", "", "..", "a\u0000b.safetensors", 7, ["x"]])
def test_weight_maps_stay_in_their_folder(model, name):
    (model / "model.safetensors").rename(model.parent / "secret.safetensors")
    (model / "part.bin").write_text("x")
    (model / saved.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"transformer.wte.weight": name}}))
    for load in loaders(model):
        refused(load, saved.INDEX)


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '{"model_type": 3}', "{}", '{"x": "' + "y" * 2**21 + '"}', "\ud800"], ids=lambda c: c[:12])
def test_a_configuration_that_is_none(model, content):
    (model / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    refused(lambda: load_model(model), "config.json")
    refused(lambda: saved.check(model.parent / "nowhere"), "config.json is missing: ", "is no folder of a saved model")


def test_tokenizers_run_no_code(tmp_path):
    mark, folder = tmp_path / "ran", tmp_path / "tokenizer"
    shutil.copytree(kinds.ASSETS / "mini" / "tokenizer", folder)
    assert saved.tokenizer(folder).eos_token_id == 0
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}))
    refused(lambda: saved.tokenizer(folder), "asks for code of its own (auto_map), which is not run: save the tokenizer as a plain one")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for content in ("", "[]", "[" * 100_000, '{"version": "1.0", "model": {"type": "Evil"}}'):
        (folder / "tokenizer.json").write_text(content)
        refused(lambda: saved.tokenizer(folder), str(folder))
    assert not mark.exists()


# ---------------------------------------------------------------- mirrors and files of text


@pytest.fixture
def small(tmp_path):
    """A mirror of one task and one page of text."""
    folder = tmp_path / "mirror"
    rows = [{"texts": (f"a {i}", f"b {i}"), "label": i % 2} for i in range(6)]
    for split in ("train", "dev", "test"):
        rehearsal.write_glue(folder / "glue", "rte", split, rows)
    rehearsal.write(folder / "wikitext" / "train-00000-of-00001.parquet", {"text": [" = One = \n", " text \n"]})
    items = {}
    for name in ("glue", "wikitext"):
        files = [p.relative_to(folder / name).as_posix() for p in (folder / name).rglob("*.parquet")]
        items[name] = {"repository": "r", "kind": "dataset", "revision": "main", "commit": "0" * 40, "files": mirror.record(folder / name, files)}
    mirror.write_manifest(folder, items)
    return folder


@pytest.mark.parametrize("name", ["../../outside.parquet", "/etc/passwd", "..", "", "a\nb.parquet", "a/../../b"])
def test_names_that_lead_out_of_a_mirror(small, name):
    state = json.loads((small / "mirror.json").read_text())
    state["items"]["glue"]["files"] = {name: [1, "0" * 64]}
    (small / "mirror.json").write_text(json.dumps(state))
    for call in (lambda: sources.manifest(small), lambda: mirror.problems(small)):
        refused(call, f"{name!r} leads out of the mirror", "put the file itself there", kind=sources.SourceError)


def test_links_that_lead_out_of_a_mirror(small, tmp_path):
    path = small / "glue" / "rte" / "train-00000-of-00001.parquet"
    path.rename(tmp_path / "outside.parquet")
    path.symlink_to(tmp_path / "outside.parquet")
    for call in (lambda: sources.glue_rows(small, "rte"), lambda: mirror.problems(small)):
        refused(call, "leads out of the mirror", kind=sources.SourceError)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"items": []}',
        '{"items": {"glue": 3}}',
        '{"items": {"glue": {"commit": 5, "files": {}}}}',
        '{"items": {"glue": {"commit": "0", "files": {"a": 3}}}}',
        "[" * 200_000,
        '{"items": {"glue": {"commit": "0", "files": {"a": ["x", 3]}}}}',
        '{"items": ' + "9" * 5000 + "}",
    ],
    ids=lambda c: c[:30],
)
def test_a_mirror_json_that_is_none(small, content):
    (small / "mirror.json").write_text(content)
    refused(lambda: sources.manifest(small), "mirror.json is damaged: fetch it again with `python -m kn mirror", kind=sources.SourceError)


def test_a_mirror_json_of_hundreds_of_megabytes_is_not_read(small):
    with (small / "mirror.json").open("wb") as file:
        file.truncate(sources.LARGEST + 1)  # without taking room
    refused(lambda: sources.manifest(small), "mirror.json is damaged", kind=sources.SourceError)


def test_random_damage_of_parquet_is_one_line_and_never_reaches_a_stage(small, monkeypatch):
    """Forty files: what pyarrow cannot read is named, and what it reads wrongly is found by its sha256 before a stage begins."""
    draw, path = random.Random(0), small / "glue" / "rte" / "train-00000-of-00001.parquet"
    content, wanted = path.read_bytes(), sources.glue_rows(small, "rte")["train"]
    monkeypatch.setenv("KN_MIRROR", str(small))
    settings = real.digest(("glue",))
    sources.verify(small, settings)
    for _ in range(40):
        made = bytearray(content)
        for _ in range(draw.randint(1, 6)):
            made[draw.randrange(len(made))] = draw.randrange(256)
        path.write_bytes(made[: draw.choice([len(made), len(made) // 2])])
        try:
            assert all(isinstance(text, str) for row in sources.glue_rows(small, "rte")["train"] for text in row["texts"])
        except sources.SourceError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        if path.read_bytes() != content:
            refused(lambda: sources.verify(small, settings), f"{path} is damaged (another content than mirror.json says): fetch it again", kind=sources.SourceError)
    path.write_bytes(content)
    assert sources.glue_rows(small, "rte")["train"] == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is no UTF-8 text (byte 0): it is damaged"),
        (b"", "is empty, expected a header line"),
        (b"index\tsentence1\n", "column 'sentence2' is missing, found: index, sentence1"),
        (b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n", "line 2: unknown label 'maybe'"),
        (b"index\tsentence1\tsentence2\tlabel\n0\ta\n", "line 2: 2 columns instead of 4"),
    ],
)
def test_damaged_tsv(tmp_path, content, message):
    (tmp_path / "dev.tsv").write_bytes(content)
    refused(lambda: glue.read_split(tmp_path / "dev.tsv", "rte", "dev"), str(tmp_path / "dev.tsv"), message)


SCORES = "row,seed,task,score\n"


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",
        b"",
        b"row\n1\n",
        (SCORES + "teacher,0,cola,nan\n").encode(),
        (SCORES + "teacher,0,cola,50,9\n").encode(),
        (SCORES + f"{SCRIPT},0,cola,50\n").encode(),
        (SCORES + "teacher,=1+1,cola,50\n").encode(),
        (SCORES + '"' + "x" * 200_000 + '",0,cola,5\n').encode(),
        (SCORES + "teacher,0,cola,50\nteacher,0,cola,60\n").encode(),
        (SCORES + "teacher,0,cola\n").encode(),
        b"\0" * 100,
    ],
    ids=lambda c: repr(c[-20:]),
)
def test_damaged_glue_scores(tmp_path, content):
    (tmp_path / "scores.csv").write_bytes(content)
    refused(lambda: glue.read_scores(tmp_path / "scores.csv", kinds.ROWS), str(tmp_path / "scores.csv"))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("wiki"),
        lambda c: c["web"].update(train=[7]),
        lambda c: c["web"].update(train=["changed"]),
        lambda c: c["web"].update(fingerprint="0" * 16),
        lambda c: c["web"].update(evil=1),
        lambda c: c.update(web=3),
        lambda c: c["web"].update(train="text"),
    ],
)
def test_a_corpus_file_that_is_none(tmp_path, change):
    """Its fingerprint covers every letter, so a changed one is no corpus of that name."""
    splits = (("a",), ("b",), ("c",))
    one = corpora.Corpus(*splits, corpora.fingerprint_of(splits))
    corpora.write({"web": one, "wiki": one}, tmp_path / "corpus.json")
    content = json.loads((tmp_path / "corpus.json").read_text())
    assert corpora.read(tmp_path / "corpus.json") == {"web": one, "wiki": one}
    change(content)
    (tmp_path / "corpus.json").write_text(json.dumps(content))
    refused(lambda: corpora.read(tmp_path / "corpus.json"), "is no corpus file (", "make it again with `python -m kn corpus")
