"""AutoModel loads, generates, folds and densifies, whichever of kn and transformers is imported first."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_gpt2

from kn import KroneckerSpec, compress

IDS = torch.tensor([[5, 6, 7, 8, 9, 3], [1, 2, 3, 4, 5, 6]])
SCRIPT = """
import sys, torch
{imports}
folder = sys.argv[1]
ids = torch.tensor({ids})
saved = torch.load(folder + "/logits.pt", weights_only=True)
model = {auto}.from_pretrained(folder).eval()
assert torch.equal(model(ids).logits, saved), "logits"
assert torch.allclose(model.fold()(ids).logits, saved, atol=1e-5), "fold"
dense = model.to_dense()
assert type(dense).__module__.startswith("transformers.")
assert torch.allclose(dense(ids).logits, saved, atol=1e-5), "dense"
assert type(AutoConfig.from_pretrained(folder)).__name__ == "KnGPT2Config"
if "Causal" in type({auto}).__name__ + {auto!r}:
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, **options), model.fold().generate(ids, **options)), "generate"
print("all equal", type(model).__name__)
"""


def in_a_fresh_process(folder, imports, auto="AutoModelForCausalLM"):
    code = SCRIPT.format(imports=imports, ids=IDS.tolist(), auto=auto)
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}
    for name, labels, spec in (
        ("lm", 0, KroneckerSpec()), ("tied", 0, KroneckerSpec(head="tied")),
        ("classifier", 3, KroneckerSpec()),
    ):
        folders[name] = tmp_path_factory.mktemp(name)
        student = compress(tiny_gpt2(labels), spec).eval()
        student.save_pretrained(folders[name])
        torch.save(student(IDS).logits.detach(), folders[name] / "logits.pt")
    return folders


@pytest.mark.parametrize(
    ("what", "imports", "auto"),
    [
        (
            "lm",
            "import kn\nfrom transformers import AutoConfig, AutoModelForCausalLM",
            "AutoModelForCausalLM",
        ),
        (
            "tied",
            "from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel\nimport kn",
            "AutoModelForCausalLM",
        ),
        (
            "classifier",
            "import kn\nfrom transformers import GPT2Config, Trainer, AutoTokenizer, AutoConfig\n"
            "from transformers import AutoModelForSequenceClassification",
            "AutoModelForSequenceClassification",
        ),
    ],
    ids=["kn first", "kn last, tied head", "kn before modules that import each other in circles, classifier"],
)
def test_any_order_of_imports(saved, what, imports, auto):
    assert sorted(p.suffix for p in saved[what].glob("model*")) == [".safetensors"]
    head = auto.removeprefix("AutoModelFor").replace("CausalLM", "LMHeadModel").replace("Seq", "ForSeq")
    assert in_a_fresh_process(saved[what], imports, auto) == f"all equal KnGPT2{head}"


def test_a_quick_import_brings_neither_torch_nor_transformers():
    code = (
        "import kn, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules; "
        "assert 'compress' in dir(kn); print(kn.__all__)"
    )
    environment = {**os.environ, "KN_QUICK_IMPORT": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, env=environment)
