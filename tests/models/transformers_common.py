"""transformers' own common model tests, run on KnGPT2 and KnLlama from the pinned version's sources.

    pip install parameterized
    PYTHONPATH=. python tests/models/transformers_common.py [--sdist transformers-X.tar.gz]
                                                            [--out benchmarks/transformers-tests.csv]

The stock GPT-2 runs beside: what fails there too, for this machine or this tester, says nothing of KnGPT2.
The source distribution lacks the generation, export and configuration tests; they are left out. Not part of
the suite: it downloads 10 MB.
"""

import argparse
import csv
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = {
    "exporters": ("test_export", "ExportTesterMixin"), "generation": ("test_utils", "GenerationTesterMixin")
}
CASES = """
import unittest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model
from kn import KnGPT2Config, KnGPT2ForSequenceClassification, KnGPT2LMHeadModel, KnGPT2Model
from kn import KnLlamaConfig, KnLlamaForCausalLM, KnLlamaForSequenceClassification, KnLlamaModel
from transformers.models.auto import modeling_auto
from .test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

for kind in ("KnGPT2", "KnLlama"):  # the tests look class names up, to know which models take which labels
    modeling_auto.MODEL_MAPPING_NAMES[kind.lower()] = kind + "Model"
    language_model = {"KnGPT2": "KnGPT2LMHeadModel", "KnLlama": "KnLlamaForCausalLM"}[kind]
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind.lower()] = language_model
    classifier = kind + "ForSequenceClassification"
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[kind.lower()] = classifier


class Tester:
    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads = 13, 7, 32, 2, 4
    vocab_size, is_training, num_labels = 99, True, 3
    fields = {}

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return self.config_class(
            vocab_size=self.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=512, bos_token_id=1, eos_token_id=1, pad_token_id=1, **self.fields,
        )

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = random_attention_mask([self.batch_size, self.seq_length])
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


def case(name, config, models, **fields):
    tester = type(name + "Tester", (Tester,), {"config_class": config, "fields": fields})

    def setUp(self):
        self.model_tester = tester(self)

    return type(name, (ModelTesterMixin, unittest.TestCase), {
        "all_model_classes": models, "all_generative_model_classes": (), "pipeline_model_mapping": {},
        "setUp": setUp, "__module__": __name__,
    })


GPT2Test = case("GPT2Test", GPT2Config, (GPT2Model, GPT2LMHeadModel, GPT2ForSequenceClassification))
KnGPT2Test = case(
    "KnGPT2Test", KnGPT2Config, (KnGPT2Model, KnGPT2LMHeadModel, KnGPT2ForSequenceClassification)
)
KnGPT2TiedTest = case(
    "KnGPT2TiedTest", KnGPT2Config, (KnGPT2Model, KnGPT2LMHeadModel),
    kronecker={"head": "tied", "layers": "all"},
)
KnGPT2FoldedTest = case("KnGPT2FoldedTest", KnGPT2Config, (KnGPT2Model, KnGPT2LMHeadModel), folded=True)
KnLlamaTest = case(
    "KnLlamaTest", KnLlamaConfig, (KnLlamaModel, KnLlamaForCausalLM, KnLlamaForSequenceClassification),
    intermediate_size=48, num_key_value_heads=2,
)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "transformers-tests.csv")
    parser.add_argument("-k", default="", help="only tests that match, as pytest's -k")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pinned = version("transformers")
        if options.sdist is None:
            subprocess.run(
                [
                    sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d",
                    scratch, f"transformers=={pinned}",
                ],
                check=True,
            )
        with tarfile.open(options.sdist or next(folder.glob("transformers-*.tar.gz"))) as archive:
            archive.extractall(
                folder, [m for m in archive.getmembers() if "/tests/" in m.name and m.isfile()], filter="data"
            )
        home = folder / f"transformers-{pinned}"
        for name, (module, mixin) in ABSENT.items():
            (home / "tests" / name).mkdir()
            (home / "tests" / name / "__init__.py").touch()
            (home / "tests" / name / f"{module}.py").write_text(f"class {mixin}:\n    pass\n")
        (home / "tests" / "__init__.py").touch()
        (home / "tests" / "test_kn.py").write_text(CASES)
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "--junitxml",
            str(folder / "all.xml"), "tests/test_kn.py", *(["-k", options.k] if options.k else []),
        ]
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, cwd=home, env=variables)
        outcomes: dict[str, dict[str, tuple[str, str]]] = {}
        for test in ElementTree.parse(folder / "all.xml").iter("testcase"):
            problem = next((child for child in test if child.tag in ("failure", "error", "skipped")), None)
            words = "" if problem is None else " ".join((problem.get("message") or "").split())[:160]
            outcomes.setdefault(test.get("name"), {})[test.get("classname").rpartition(".")[2]] = (
                "passed" if problem is None else problem.tag, words
            )
    names = sorted({name for of in outcomes.values() for name in of})
    with options.out.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["test", *names, "words of the first that did not pass", "transformers"])
        for test, of in sorted(outcomes.items()):
            writer.writerow([
                test, *(of.get(name, ("not run", ""))[0] for name in names),
                next((words for _, words in of.values() if words), ""), pinned,
            ])
    for name in names:
        found = [of.get(name, ("not run", ""))[0] for of in outcomes.values()]
        print(name, {kind: found.count(kind) for kind in sorted(set(found))})


if __name__ == "__main__":
    main()
