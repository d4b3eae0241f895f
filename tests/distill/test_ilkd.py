"""Eq. 2-5 against naive loops in float64, values and gradients, with padding, and both KL directions."""

import math
from importlib import import_module

import pytest
import torch
from conftest import largest_tensor, tiny_gpt2
from transformers import TrainingArguments

from kn import DistillTrainer, KroneckerSpec, capture, compress, ilkd_loss, vanilla_kd_loss
from kn.distill import DistillationConfig

IDS = torch.tensor([[5, 6, 7, 8, 9, 3], [1, 2, 3, 4, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
# padding on the left and holes: keys that only the mask hides from later queries
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1]])
EXACT = 1e-11


def naive_attention_kl(q_s, k_s, q_t, k_t, mask, direction):
    """Eq. 3 as loops: softmax over the allowed keys of each valid query, KL, mean."""
    total, count = 0.0, 0
    b, h, t, e_s = q_s.shape
    e_t = q_t.shape[-1]
    for i in range(b):
        for j in range(h):
            for query in range(t):
                if not mask[i, query]:
                    continue
                keys = [key for key in range(query + 1) if mask[i, key]]
                s = torch.stack([q_s[i, j, query] @ k_s[i, j, key] / math.sqrt(e_s) for key in keys]).softmax(
                    0
                )
                r = torch.stack([q_t[i, j, query] @ k_t[i, j, key] / math.sqrt(e_t) for key in keys]).softmax(
                    0
                )
                first, second = (s, r) if direction == "student_teacher" else (r, s)
                total = total + sum(p * (p.log() - o.log()) for p, o in zip(first, second, strict=True))
                count += 1
    return total / count


def models():
    teacher = tiny_gpt2(dtype=torch.float64)
    return teacher, compress(teacher)


@pytest.mark.parametrize("hidden_point", ["c_proj", "block"])
def test_ilkd_terms_against_naive_loops(hidden_point):
    teacher, student = models()
    labels = IDS.masked_fill(MASK == 0, -100)
    s = capture(student, hidden_point, input_ids=IDS, attention_mask=MASK, labels=labels)
    with torch.no_grad():
        t = capture(teacher, hidden_point, input_ids=IDS, attention_mask=MASK)
        states = teacher.transformer(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
    assert torch.equal(t.embedding, states[0])
    if hidden_point == "block":
        assert torch.allclose(t.hidden[0], states[1], atol=EXACT)
    loss, terms = ilkd_loss(s, t, (0.5, 0.4, 0.3, 0.2), MASK)
    valid = [(i, j) for i in range(2) for j in range(6) if MASK[i, j]]
    embedding = sum((s.embedding[p] - t.embedding[p]).square().sum() for p in valid) / (len(valid) * 8)
    hidden = sum(
        sum((a[p] - b[p]).square().sum() for p in valid) / (len(valid) * 8)
        for a, b in zip(s.hidden, t.hidden, strict=True)
    )
    attention = sum(
        naive_attention_kl(*layer, MASK, "student_teacher") for layer in zip(s.q, s.k, t.q, t.k, strict=True)
    )
    logp = student(IDS, attention_mask=MASK).logits.log_softmax(-1)
    pairs = [(i, j) for i in range(2) for j in range(5) if MASK[i, j + 1]]
    cross_entropy = -sum(logp[i, j, IDS[i, j + 1]] for i, j in pairs) / len(pairs)
    for name, naive in (
        ("embedding", embedding),
        ("attention", attention),
        ("hidden", hidden),
        ("cross_entropy", cross_entropy),
    ):
        # transformers computes the cross-entropy in float32
        assert abs(terms[name] - naive) < (1e-6 if name == "cross_entropy" else EXACT) * max(1, abs(naive)), (
            name
        )
    expected = 0.5 * embedding + 0.4 * attention + 0.3 * hidden + 0.2 * cross_entropy
    parameters = [p for p in student.parameters() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True),
        torch.autograd.grad(expected, parameters, allow_unused=True),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-6)  # through transformers' float32 cross-entropy


def test_attention_is_what_the_model_uses_before_dropout():
    """softmax(q·k) of the captured q and k is the map eager attention returns, with attention dropout on in
    training mode too.
    """
    model = tiny_gpt2(dtype=torch.float64, attn_pdrop=0.5)
    model.set_attn_implementation("eager")
    maps = model(IDS, output_attentions=True).attentions
    assert len(maps) == 4  # SDPA would silently return none
    taken = capture(model.train(), input_ids=IDS)
    # deeper layers see dropped-out inputs
    for q, k, wanted in list(zip(taken.q, taken.k, maps, strict=True))[:1]:
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(
            ~torch.ones(6, 6).tril().bool(), -torch.inf
        )
        assert torch.allclose(scores.softmax(-1), wanted, atol=EXACT)


def test_a_teacher_without_head_gives_the_same_loss():
    teacher, student = models()
    s = capture(student, input_ids=IDS, labels=IDS)
    full, body = (capture(teacher, head=head, input_ids=IDS) for head in (True, False))
    assert body.logits is None and ilkd_loss(s, full, (1, 1, 1, 1))[0] == ilkd_loss(s, body, (1, 1, 1, 1))[0]


def test_identical_models_lose_nothing_but_cross_entropy():
    teacher = tiny_gpt2(dtype=torch.float64)
    same = capture(teacher, input_ids=IDS, labels=IDS)
    loss, terms = ilkd_loss(same, same, (1.0, 1.0, 1.0, 0.0))
    assert abs(loss) < EXACT and terms["cross_entropy"] > 0


def test_vanilla_kd_against_a_loop():
    torch.manual_seed(0)
    s, t = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    p, q = (t / 2).softmax(-1), (s / 2).softmax(-1)
    naive = 4 * sum(p[i, j] * (p[i, j].log() - q[i, j].log()) for i in range(3) for j in range(5)) / 3
    assert abs(vanilla_kd_loss(s, t) - naive) < EXACT


def test_errors_say_what_is_allowed():
    teacher, student = models()
    s, t = capture(student, input_ids=IDS), capture(teacher, input_ids=IDS)
    with pytest.raises(ValueError, match="student saw no labels"):
        ilkd_loss(s, t, (0.5, 0.5, 0.5, 0.1))
    shallow = capture(tiny_gpt2(n_layer=2), input_ids=IDS)
    with pytest.raises(ValueError, match="the student has 4 layers, the teacher 2"):
        ilkd_loss(s, shallow, (0.5, 0.5, 0.5, 0.0))
    with pytest.raises(ValueError, match="hidden_point 'ln' is unknown: allowed are 'c_proj', 'block'"):
        capture(teacher, "ln", input_ids=IDS)


@pytest.mark.parametrize("method", ["none", "ilkd", "vanilla"])
def test_trainer_logs_every_term(tmp_path, method):
    teacher = tiny_gpt2()
    student = compress(teacher).train()
    data = [
        {"input_ids": torch.randint(1, 50, (8,), generator=torch.Generator().manual_seed(i))}
        for i in range(8)
    ]
    data = [{**row, "labels": row["input_ids"]} for row in data]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    before = student.transformer.h[1].mlp.c_fc.A.detach().clone()
    trainer = DistillTrainer(
        model=student,
        args=arguments,
        train_dataset=data,
        distillation=DistillationConfig(method),
        teacher=None if method == "none" else teacher,
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    wanted = {
        "none": {"cross_entropy"},
        "ilkd": {"embedding", "attention", "hidden", "cross_entropy"},
        "vanilla": {"cross_entropy", "logits"},
    }[method]
    assert len(lines) == 2 and all(wanted <= set(line) for line in lines)
    if method == "ilkd":
        parts = lines[0]
        # the log rounds to 4 digits
        assert (
            abs(
                parts["loss"]
                - 0.5 * (parts["embedding"] + parts["attention"] + parts["hidden"])
                - 0.1 * parts["cross_entropy"]
            )
            < 1e-3
        )
    assert (
        not torch.equal(before, student.transformer.h[1].mlp.c_fc.A)
        and not any(p.requires_grad for p in teacher.parameters())
        or method == "none"
    )


def test_trainer_refuses_a_missing_teacher(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="distillation method 'ilkd' and no teacher do not go together"):
        DistillTrainer(model=tiny_gpt2(), args=arguments, distillation=DistillationConfig("ilkd"))


@pytest.mark.parametrize("head", ["dense", "tied"])
def test_without_cross_entropy_what_no_term_reaches_is_frozen(tmp_path, head):
    """The head and the last norm; a tied head is the embedding, which eq. 2 trains."""
    teacher = tiny_gpt2()
    student = compress(teacher, KroneckerSpec(head=head))
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    DistillTrainer(
        model=student,
        args=arguments,
        distillation=DistillationConfig("ilkd", alphas=(0.5, 0.5, 0.5, 0.0)),
        teacher=teacher,
    )
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    assert frozen == {"transformer.ln_f.weight", "transformer.ln_f.bias"} | (
        {"lm_head.weight"} if head == "dense" else set()
    )


@pytest.fixture
def few_logits(monkeypatch):
    monkeypatch.setattr(import_module("kn.distill.capture"), "CHUNKING_MIN_LOGITS", 0)


@pytest.mark.parametrize("head", ["dense", "tied"])
@pytest.mark.parametrize("labels", [IDS, IDS.masked_fill(MASK == 0, -100)], ids=["all", "some left out"])
def test_the_loss_without_logits_is_the_loss_with_them(few_logits, head, labels):
    """Value and every gradient, float64; transformers' own cross-entropy is float32, so the reference is
    torch's.
    """
    teacher = tiny_gpt2(dtype=torch.float64)
    student = compress(teacher, KroneckerSpec(head=head))
    found = capture(student, logits=False, input_ids=IDS, attention_mask=MASK, labels=labels)
    assert found.logits is None
    logits = student(IDS, attention_mask=MASK).logits
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert abs(found.loss - wanted) < 1e-6  # the result is handed out as float32
    parameters = list(student.parameters())
    for a, b in zip(
        torch.autograd.grad(found.loss, parameters, allow_unused=True),
        torch.autograd.grad(wanted, parameters, allow_unused=True),
        strict=True,
    ):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-9)


def test_small_logits_are_made_as_before():
    student = compress(tiny_gpt2())
    assert capture(student, logits=False, input_ids=IDS, labels=IDS).logits is not None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_map_and_no_logits_in_a_step(few_logits, attention):
    """Every tensor of an ILKD step, forward and backward: with SDPA the largest grows with the length, not
    with its square; with eager it does (so the test can fail).
    """
    found = []
    for length in (512, 1024, 2048):
        teacher = tiny_gpt2(n_positions=2048, vocab_size=3000, attn_implementation=attention)
        student = compress(teacher)
        ids = torch.randint(0, 3000, (1, length), generator=torch.Generator().manual_seed(0))
        with largest_tensor() as seen:
            with torch.no_grad():
                t = capture(teacher, head=False, input_ids=ids)
            ilkd_loss(capture(student, logits=False, input_ids=ids, labels=ids), t, (0.5, 0.5, 0.5, 0.1))[
                0
            ].backward()
        found.append(seen[0])
    maps = 2 * 2048**2  # 2 heads
    if attention == "sdpa":
        assert found[2] <= 4.2 * found[0] and found[2] < maps / 4, found
    else:
        assert found[2] >= maps, found
