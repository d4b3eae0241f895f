"""transformers' Trainer with the losses of eq. 2-5: cross-entropy alone, ILKD, or vanilla KD."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import Trainer

from kn.distill.capture import NO_LABELS, capture, should_chunk_logits
from kn.distill.ilkd import streaming_ilkd_loss, vanilla_kd_loss
from kn.distill.large_vocabulary import IGNORE_INDEX, chunked_logit_kd

METHODS = ("none", "ilkd", "vanilla")
TERMS = ("embedding", "attention", "hidden", "cross_entropy", "logits")
EPOCH_STATE = "epoch_rng_state.pth"  # in a checkpoint: PyTorch's random state at the start of its epoch


@dataclass(frozen=True)
class DistillationConfig:
    """Distillation method, "none" (cross-entropy), "ilkd" (eq. 5) or "vanilla" (logits), and its settings."""

    method: str = "none"
    alphas: tuple[float, float, float, float] = (0.5, 0.5, 0.5, 0.1)
    direction: str = "student_teacher"
    hidden_point: str = "c_proj"
    logit_term: float = 0.0  # reading "vanilla KD" for KnGPT2: weight of a logit KL added to eq. 5
    kd_weight: float = 0.5  # of vanilla KD against the cross-entropy
    temperature: float = 2.0


class DistillTrainer(Trainer):
    """Trainer with the loss of a DistillationConfig (eq. 5 or vanilla KD); logs every term under its name.
    Raises ValueError for an unknown method, or where method and teacher do not go together."""

    def __init__(
        self, *args, distillation: DistillationConfig = DistillationConfig(),
        teacher: nn.Module | None = None, **kwargs,
    ):
        super().__init__(*args, **kwargs)
        method = distillation.method
        if method not in METHODS:
            raise ValueError(f"distillation method {method!r} is unknown: allowed are {', '.join(METHODS)}")
        if (teacher is None) != (method == "none"):
            got = "no" if teacher is None else "a"
            raise ValueError(f"distillation method {method!r} and {got} teacher do not go together")
        self._refuse_unsupported(method == "ilkd")
        self.term_sums: dict[str, Tensor] = {}  # since the last log
        self.steps_summed = 0
        self.model_accepts_loss_kwargs = False  # every loss here is a mean over the micro-batch
        if method == "ilkd" and not distillation.alphas[3] and not distillation.logit_term:
            self._freeze_unreached()
        if teacher is not None:
            teacher = teacher.eval().requires_grad_(False).to(self.args.device)
            if self.args.bf16 and self.args.device.type == "cuda":
                teacher = teacher.to(torch.bfloat16)  # what autocast would multiply in anyway
        self.distillation, self.teacher = distillation, teacher
        self.is_language_model = hasattr(self.model, "lm_head")
        self.needs_labels = method != "ilkd" or bool(distillation.alphas[3])

    def _refuse_unsupported(self, ilkd: bool) -> None:
        """ValueError for what Trainer does in a compute_loss or a model that are not its own here."""
        args, names = self.args, ("label_smoothing_factor", "use_liger_kernel", "parallelism_config")
        found = {name: getattr(args, name) for name in names} | {"compute_loss_func": self.compute_loss_func}
        found |= {"deepspeed": self.is_deepspeed_enabled, "fsdp": self.is_fsdp_enabled}
        if ilkd:  # whose hooks neither a compiled graph nor DataParallel's copies call
            found |= {"torch_compile": args.torch_compile, "n_gpu": args.n_gpu * (args.n_gpu > 1)}
        if refused := [name for name, value in found.items() if value]:
            raise ValueError(f"DistillTrainer cannot honour {refused[0]}={found[refused[0]]!r}: leave it out")

    def _freeze_unreached(self) -> None:
        """Freeze head and last norm, which only cross-entropy reaches: DDP would wait for their gradients."""
        # a tied head's parameters are the embedding's, which eq. 2 trains
        embedding = {id(parameter) for parameter in self.model.get_input_embeddings().parameters()}
        head = getattr(self.model, "lm_head", None) or self.model.score
        for parameter in (*head.parameters(), *self.model.transformer.ln_f.parameters()):
            parameter.requires_grad_(id(parameter) in embedding)

    def floating_point_ops(self, inputs):
        """Not counted: Trainer walks over all modules for it at every step, 2.5 of 54 ms at mini's size."""
        return 0

    def _run_epoch(self, **of):
        """One epoch, resumed in its middle or not: the same batches, in the first process's order.
        Trainer forgets the random state that made the order, accelerate's processes the epoch's number."""
        state = Path(of["resume_from_checkpoint"] or "") / EPOCH_STATE
        if of["resume_from_checkpoint"] and of["epoch"] == of["epochs_trained"] and state.is_file():
            torch.set_rng_state(torch.load(state, weights_only=True))
        if self.args.world_size > 1 and self.args.train_sampling_strategy == "group_by_length":
            torch.set_rng_state(broadcast(torch.get_rng_state().to(self.args.device)).cpu())
        of["train_dataloader"].set_epoch(of["epoch"])
        self.epoch_state = torch.get_rng_state()
        super()._run_epoch(**of)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            torch.save(self.epoch_state, Path(output_dir) / EPOCH_STATE)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """A step's micro-batches, and of each the shares in the whole batch's items that weigh its terms.
        Raises ValueError for a whole batch without a real token or without a label that the loss needs."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        parts = len(batches) * self.args.world_size
        if not parts or parts == 1 and device.type != "cpu":  # a GPU would wait for the counts
            return batches, None
        counts = torch.stack([self._count_items(inputs) for inputs in batches]).to(device)
        totals = self.accelerator.reduce(counts.sum(0)).cpu()
        if not totals[0] or self.needs_labels and not totals[1]:
            problem = NO_LABELS if totals[0] else "no real token, its attention_mask is 0"
            raise ValueError(f"a batch of {totals[2]} rows has {problem}: there is nothing to learn from")
        return batches, iter((counts.cpu().double() * parts / totals.clamp(min=1)).tolist())

    def _count_items(self, inputs: dict) -> Tensor:
        """What the losses are means over: (real tokens, known labels, rows), int64."""
        ids, mask, labels = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("labels")
        mask = torch.ones_like(ids) if mask is None else mask
        labels = ids.new_zeros(0) if labels is None else labels[:, 1:] if self.is_language_model else labels
        return torch.stack([mask.sum(), (labels != IGNORE_INDEX).sum(), mask.new_tensor(len(ids))])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        method = self.distillation.method
        tokens, known, rows = (1.0, 1.0, 1.0) if num_items_in_batch is None else next(num_items_in_batch)
        weights = dict.fromkeys(TERMS, tokens) | {"cross_entropy": known}
        weights["logits"] = tokens if self.is_language_model else rows
        unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
        inputs = inputs if known else unlabelled  # without a label the mean would be NaN
        if model.training and method == "ilkd":
            loss, terms, output = self._ilkd_loss(model, inputs, unlabelled, return_outputs, weights)
        else:
            output = model(**inputs)
            loss = output.loss * known if known else output.logits.sum() * 0.0
            terms = {"cross_entropy": output.loss if known else loss}
            if model.training and method == "vanilla":
                with torch.no_grad():
                    teacher_logits = self.teacher(**unlabelled).logits
                terms["logits"] = self._logit_kd(output.logits, teacher_logits, inputs)
                weight = self.distillation.kd_weight
                loss = (1 - weight) * loss + weight * weights["logits"] * terms["logits"]
        if model.training:
            self.steps_summed += 1
            for name, value in terms.items():
                self.term_sums[name] = self.term_sums.get(name, 0.0) + weights[name] * value.detach()
        return (loss, output) if return_outputs else loss

    def _ilkd_loss(self, model: nn.Module, inputs: dict, unlabelled: dict, with_output: bool, weights: dict):
        """(eq. 5 + logit_term·vanilla KD, its terms before weighting, Captured of the student).
        Large logits are made in chunks unless outputs are returned."""
        config, teacher, student = self.distillation, self.teacher, self.accelerator.unwrap_model(model)
        has_logit_term, labels = bool(config.logit_term), inputs.get("labels")
        may_chunk = has_logit_term and not with_output and labels is not None
        chunked = may_chunk and should_chunk_logits(student, labels)
        needs_logits = has_logit_term and not chunked
        with_logits = needs_logits or with_output
        captured = capture(student, config.hidden_point, wrapper=model, logits=with_logits, **inputs)
        alphas = [alpha * weights[name] for alpha, name in zip(config.alphas, TERMS, strict=False)]
        options = (alphas, config.direction, config.hidden_point, needs_logits)
        # teacher_output: logits if needs_logits, else the last hidden states
        loss, terms, teacher_output = streaming_ilkd_loss(captured, teacher, *options, **unlabelled)
        if chunked:
            terms["logits"] = chunked_logit_kd(
                captured.last_hidden_state, student.lm_head.weight, teacher_output, teacher.lm_head.weight,
                inputs.get("attention_mask"), config.temperature,
            )
        elif has_logit_term:
            terms["logits"] = self._logit_kd(captured.logits, teacher_output, inputs)
        if has_logit_term:
            loss = loss + config.logit_term * weights["logits"] * terms["logits"]
        if self.needs_labels and not weights["cross_entropy"]:
            loss = loss + captured.logits.sum() * 0.0  # DDP waits for a gradient of the head
        return loss, terms, captured

    def _logit_kd(self, student_logits: Tensor, teacher_logits: Tensor, inputs: dict) -> Tensor:
        """Vanilla KD over real tokens (b, t, v); a classifier's logits (b, labels) have no padding."""
        mask = inputs.get("attention_mask") if student_logits.ndim == 3 else None
        return vanilla_kd_loss(student_logits, teacher_logits, mask, self.distillation.temperature)

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.steps_summed:
            for name, total in self.term_sums.items():
                logs = {**logs, name: float(self.accelerator.reduce(total / self.steps_summed, "mean"))}
            self.term_sums, self.steps_summed = {}, 0
        super().log(logs, *args, **kwargs)
