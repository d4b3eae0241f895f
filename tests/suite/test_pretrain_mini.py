"""The recipe of mini's pretrained models, on a few documents and steps: whole, resumed, and fit for use as
assets."""

import json
import runpy
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, tiny_gpt2

from kn.data import documentation
from kn.files import file_sha256
from kn.suite import input_digests, pretrain_mini, profiles
from kn.suite.store import Store
from kn.suite.work.pretrained import load_model

SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "pretrain_mini.py"))
TINY = replace(profiles.TEACHER, steps=6, batch=4, warmup=2)


def run(folder, stop_at=None):
    """Six steps with a checkpoint every second; `stop_at` raises in that step's forward pass."""
    model, calls = tiny_gpt2(attn_implementation="eager"), []

    def count(module, *_):
        calls.append(module.training)
        if calls.count(True) == stop_at:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(count)
    rows = torch.randint(0, 50, (24, 16), generator=torch.Generator().manual_seed(0))
    pretrain_mini.train(model, rows, rows[:4], folder, TINY, log_every=1, valid_every=2)
    return model, [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (folder / "log.jsonl").read_text().splitlines()
    ]


def test_a_stopped_training_goes_on_from_its_checkpoint(tmp_path):
    whole, log = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stop_at=6)
    resumed, again = run(tmp_path / "stopped")
    assert again == log and [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_rebuild_from_text_to_assets(tmp_path):
    sentences = " ".join(
        f"The extra package says {word} things about the {word} part of the library."
        for word in ("many", "some", "few", "other")
    )
    (tmp_path / "extra" / "more").mkdir(parents=True)
    (tmp_path / "extra" / "more" / "__init__.py").write_text(f'"""{sentences}"""\n')
    profile = replace(
        profiles.TEST, model=replace(profiles.MINI.model, width=16, layers=2, heads=2, vocabulary=400)
    )
    store = Store(tmp_path / "store").open()
    for _ in range(2):  # the second call finds everything done and leaves the same files
        assert SCRIPT["rebuild"](store, tmp_path / "extra", profile, (TINY, replace(TINY, steps=4))) == 0
        sums = (store.home / "rebuild" / "mini" / "SHA256SUMS").read_text()
    assets = store.home / "rebuild" / "mini"
    assert input_digests.asset_digest.__wrapped__(assets / "teacher") == file_sha256(
        assets / "SHA256SUMS"
    )
    assert "baseline/model.safetensors" in sums
    teacher, baseline = load_model(assets / "teacher"), load_model(assets / "baseline")
    assert teacher.config.n_layer == 2 and baseline.config.n_layer == 1 and teacher.config.vocab_size == 400
    measured = {
        name: json.loads((assets / name / "recipe.json").read_text())["measured"]
        for name in ("teacher", "baseline")
    }
    assert measured["teacher"]["data_bytes"] == measured["baseline"]["data_bytes"] + len(sentences)
    assert (measured["teacher"]["steps"], measured["baseline"]["steps"]) == (6, 4)
    assert measured["teacher"]["valid_perplexity"] > 1


def test_further_documentation_never_holds_an_evaluation_document(tmp_path):
    held = "This sentence of an evaluation document must never come back in any training text at all."
    fresh = "Another sentence of the same package nobody has seen may well join the training text."
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "__init__.py").write_text(f'"""{held}\n\n{fresh}"""\n')
    built = {"web": documentation.Corpus((), (held,), (), ""), "wiki": documentation.Corpus((), (), (), "")}
    assert SCRIPT["extra_documents"](tmp_path, built) == (fresh,)
