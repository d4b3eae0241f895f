"""Empty texts, texts that spell a special token, sequences of one token, masks and labels of nothing."""

import pytest
import torch
from conftest import tiny_gpt2

import kn
from kn.data import documentation, glue, hub_datasets
from kn.distill import chunked_logit_kd, vanilla_kd_loss
from kn.files import ASSETS
from kn.models.loading import load_tokenizer
from kn.suite import evaluate

TOKENIZER = load_tokenizer(ASSETS / "mini" / "tokenizer")
END, BLANK = TOKENIZER.eos_token_id, TOKENIZER(" ")["input_ids"]
SPELLED = "The end <|endoftext|>"


def encode(*texts, length=16):
    rows = [{"texts": pair, "label": index % 2, "index": index} for index, pair in enumerate(texts)]
    return glue.encode(TOKENIZER, rows, length)["input_ids"]


def test_an_empty_text_is_a_blank():
    word = TOKENIZER("word")["input_ids"]
    assert encode(("",), ("word",)) == [BLANK, word] and len(BLANK) == 1 and BLANK != [END]
    assert encode(("",), ("",)) == [BLANK, BLANK]
    found = encode(("word", ""), ("", "word"), ("", ""), ("word", "word"))
    assert found == [[*word, END, *BLANK], [*BLANK, END, *word], [*BLANK, END, *BLANK], [*word, END, *word]]


@pytest.mark.parametrize("pairs", [[("",), ("",)], [("a b",), ("",)], [("a b c", ""), ("", "a"), ("", "")]])
def test_a_classifier_reads_the_last_token_of_every_row(pairs):
    """Not the first text's last word: GPT-2's classifier skips end-of-text, which is also the padding."""
    model = tiny_gpt2(labels=2, vocab_size=len(TOKENIZER), pad_token_id=END)
    ids = encode(*pairs)
    inputs = evaluate.pad(ids, END)
    hidden = model.score(model.transformer(**inputs).last_hidden_state)
    last = torch.stack([hidden[row, len(ids[row]) - 1] for row in range(len(ids))])
    assert torch.equal(model(**inputs).logits, last)
    assert evaluate.predict(model, ids) == last.argmax(-1).tolist()


def test_a_row_without_a_token_is_refused():
    for rows, index in (([[1], []], 1), ([[], []], 0)):
        message = f"^row {index} has no token: an empty text is encoded as a blank$"
        with pytest.raises(ValueError, match=message):
            evaluate.pad(rows, 0)


def test_a_special_token_in_a_text_is_text():
    (ids,) = encode((SPELLED,), length=64)
    assert END not in ids and TOKENIZER.decode(ids) == SPELLED
    (pair,) = encode((SPELLED, SPELLED), length=64)
    assert pair == [*ids, END, *ids]
    rows = documentation.pack(TOKENIZER, (SPELLED, SPELLED), len(ids) + 1)
    assert rows.tolist() == [[*ids, END]] * 2
    builder = hub_datasets.TokenRowBuilder(TOKENIZER, len(ids) + 1, end_of_text=True)
    builder.add(SPELLED)
    assert builder.finish()[0].tolist() == [[*ids, END]]


IDS = torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(0))
NOTHING = r"^labels has no label to predict \(all are -100, or of rows of one token\): their mean loss is"


@pytest.mark.parametrize("ids", [IDS, IDS[:, :1]])
def test_labels_of_nothing_are_refused(ids):
    model = tiny_gpt2()
    labels = ids if ids.shape[1] == 1 else torch.full_like(ids, -100)
    with pytest.raises(ValueError, match=NOTHING):
        kn.capture(model, input_ids=ids, labels=labels)
    with pytest.raises(ValueError, match=NOTHING):
        kn.capture(tiny_gpt2(labels=2), input_ids=ids, labels=torch.full((2,), -100))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("masked", ["a row", "all rows"])
@pytest.mark.parametrize("direction", ["student_teacher", "teacher_student"])
def test_a_mask_of_zeros_gives_zeros(attention, masked, direction):
    teacher, mask = tiny_gpt2(seed=1, attn_implementation=attention), torch.ones_like(IDS)
    student = kn.compress(tiny_gpt2(attn_implementation=attention), kn.KroneckerSpec())
    mask[0 if masked == "a row" else slice(None)] = 0
    inputs = {"input_ids": IDS, "attention_mask": mask}
    captured, target = kn.capture(student, **inputs), kn.capture(teacher, **inputs)
    loss, terms = kn.ilkd_loss(captured, target, (0.5, 0.5, 0.5, 0.0), mask, direction)
    terms["logits"] = vanilla_kd_loss(captured.logits, target.logits, mask.float())
    sides = (torch.randn(2, 6, 8, requires_grad=True), student.lm_head.weight, torch.randn(2, 6, 8))
    terms["chunked"] = chunked_logit_kd(*sides, teacher.lm_head.weight, mask)
    (loss + terms["logits"] + terms["chunked"]).backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert all(value.isfinite().all() for value in (loss, *terms.values(), *gradients))
    if masked == "all rows":
        assert not any(g.any() for g in gradients)
        assert loss == 0 and all(value == 0 for value in terms.values())
        return
    row = {"input_ids": IDS[1:]}
    sides = kn.capture(student, **row), kn.capture(teacher, **row)
    alone, _ = kn.ilkd_loss(*sides, (0.5, 0.5, 0.5, 0.0), None, direction)
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)


def test_a_sequence_of_one_token():
    """Its one key gets all attention: eq. 3 is 0, the other terms are those of one position."""
    student, teacher = kn.compress(tiny_gpt2(), kn.KroneckerSpec()), tiny_gpt2(seed=1)
    ids = IDS[:, :1]
    captured, target = kn.capture(student, input_ids=ids), kn.capture(teacher, input_ids=ids)
    loss, terms = kn.ilkd_loss(captured, target, (0.5, 0.5, 0.5, 0.0))
    loss.backward()
    assert abs(terms["attention"]) < 1e-6 and terms["hidden"] > 0 and loss.isfinite()
    folded, generated = student.eval().fold(), {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(student.generate(ids, **generated), folded.generate(ids, **generated))
