"""What is on the hub after a push, and what a process that is not the main one writes."""

from types import SimpleNamespace

import pytest
import transformers
from conftest import tiny_gpt2
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoTokenizer

import kn
from kn.files import ASSETS

TOKENIZER = AutoTokenizer.from_pretrained(ASSETS / "mini" / "tokenizer")
MODEL = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
WITH_TOKENIZER = MODEL | {"tokenizer.json", "tokenizer_config.json"}


class Hub:
    """A hub that keeps what was uploaded, with the content at that moment."""

    def __init__(self, card=None):
        self.files, self.card = {}, card

    def create_repo(self, repo_id, **_):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, operations, **_):
        for item in operations:
            with open(item.path_or_fileobj, "rb") as file:
                self.files[item.path_in_repo] = file.read()
        return "pushed"

    def load(self, *_, **__):
        if self.card is None:
            raise EntryNotFoundError("there is none")
        return ModelCard(self.card)


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(transformers.modeling_utils, "hf_api", lambda: hub)
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: hub)
    monkeypatch.setattr(transformers.utils.hub.ModelCard, "load", hub.load)
    return hub


def student():
    return kn.compress(tiny_gpt2(), kn.KroneckerSpec())


@pytest.mark.parametrize("method", ["push_to_hub", "save_pretrained"])
@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_the_card_and_the_tokenizer_are_uploaded(hub, tmp_path, method, with_tokenizer):
    model, ours = student(), {"evaluation": {"perplexity": 20.46}}
    ours |= {"tokenizer": TOKENIZER} if with_tokenizer else {}
    if method == "push_to_hub":
        assert model.push_to_hub("me/model", tags=["mine"], **ours) == "pushed"
    else:
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/model", **ours)
        assert (tmp_path / "README.md").read_bytes() == hub.files["README.md"]
    assert set(hub.files) == (WITH_TOKENIZER if with_tokenizer else MODEL)
    card = ModelCard(hub.files["README.md"].decode())
    assert "| perplexity | 20.46 |" in card.content and "automatically generated" not in card.content
    assert card.data.tags == ["mine"] * (method == "push_to_hub") + ["kronecker", "compression", "kngpt2"]
    hub.files.clear()
    model.push_to_hub("me/model")  # nothing of the last push is left over
    assert set(hub.files) == MODEL and b"20.46" not in hub.files["README.md"]


def test_somebody_s_own_card_on_the_hub_stays(hub):
    hub.card = "---\ntags: [theirs]\n---\nTheir own words."
    student().push_to_hub("me/model")
    assert b"Their own words." in hub.files["README.md"] and b"kronecker" not in hub.files["README.md"]


@pytest.mark.parametrize("push", [False, True])
def test_another_process_than_the_main_one_writes_nothing(hub, tmp_path, push):
    student().save_pretrained(tmp_path / "a", is_main_process=False, tokenizer=TOKENIZER, push_to_hub=push)
    student().save_pretrained(tmp_path / "a", False, tokenizer=TOKENIZER, push_to_hub=push)
    assert not list((tmp_path / "a").iterdir()) and not hub.files
    student().save_pretrained(tmp_path / "a", True, tokenizer=TOKENIZER)
    assert {path.name for path in (tmp_path / "a").iterdir()} == WITH_TOKENIZER


def test_saving_says_nothing(tmp_path, capfd):
    """huggingface_hub warned of a card without metadata at every save of a run."""
    for _ in range(2):  # a new card, then the one that is there
        kn.compress(tiny_gpt2()).save_pretrained(tmp_path)
    said = capfd.readouterr()
    assert "card" not in (said.out + said.err).lower()
