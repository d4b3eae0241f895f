"""Any transformer with Kronecker products for weights: what KnGPT2 (gpt2.py) and KnLlama (llama.py) share, down to the parameter count."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kn.kronecker.layers import KroneckerEmbedding, KroneckerHead, KroneckerLinear
from kn.models import loading, model_card
from kn.models.config import KroneckerSpec
from kn.models.fold import fold, install_narrow

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Stock
else:
    _Stock = object  # the class that follows the mixin is one

FACTORED = (KroneckerLinear, KroneckerEmbedding, KroneckerHead)


class KroneckerModel(_Stock):
    """Mixin before a transformers model class: builds the factors from the configuration, initialises, resizes, folds, goes back to dense.

    A family sets blocks and table (module paths in its base model), matrices {path in a block: (side that shares an entry
    of A, stacked parts)}, out_proj (the one that spec.out_proj switches), narrow (what fold.py may fold) and dense_class.
    """

    blocks: str
    table: str
    matrices: dict[str, tuple[str, int]]
    out_proj: str
    narrow: tuple = ()
    dense_class: type[nn.Module]

    def post_init(self):
        base = self.base_model
        if base is self or not isinstance(base, KroneckerModel):  # else it has done so itself
            self._install(base, self.config.spec)
        if self.config.spec.head == "tied" and hasattr(self, "lm_head"):
            self.lm_head = KroneckerHead(base.get_submodule(self.table))
            for name, factor in list(self.lm_head.named_parameters()):  # transformers shares them below; while it loads they must be apart, or it takes the missing for loaded
                setattr(self.lm_head, name, nn.Parameter(torch.empty_like(factor)))
            path = f"{self.base_model_prefix}.{self.table}"
            self._tied_weights_keys = {"lm_head.A": f"{path}.A", "lm_head.B": f"{path}.B"}
        if self.can_generate():
            self.loss_type = "ForCausalLM"  # transformers reads it off the class name, finds nothing in GPT2LMHeadModel's, and its warning breaks torch.compile's graph
        super().post_init()  # transformers ties and initialises here, at the end of its __init__

    def _install(self, base: nn.Module, spec: KroneckerSpec) -> None:
        """Replace the chosen layers and the token embedding by empty Kronecker (or narrow) ones, in place."""
        blocks = base.get_submodule(self.blocks)
        plan = self.plan(len(blocks))
        narrow = install_narrow(blocks, plan, self.narrow) if self.config.folded else set()
        for name, (b_shape, rank) in plan.items():
            if name in narrow:
                continue
            index, _, path = name.partition(".")
            dense = blocks[int(index)].get_submodule(path)
            n, m = dense.weight.shape if is_conv1d(dense) else dense.weight.shape[::-1]
            try:
                layer = KroneckerLinear(n, m, b_shape, rank, dense.bias is not None, self.matrices[path][1])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            blocks[int(index)].set_submodule(path, layer.to(dense.weight.dtype))
        if spec.embedding:
            table = base.get_submodule(self.table)
            embedding = KroneckerEmbedding(table.num_embeddings, table.embedding_dim, spec.embedding_factor or spec.factor)
            base.set_submodule(self.table, embedding.to(table.weight.dtype))

    def plan(self, layers: int) -> dict[str, tuple[tuple[int, int], int]]:
        """{"layer.matrix": (B's shape, rank)} of all that the configuration compresses in blocks."""
        return self.config.spec.plan(layers, {path: side for path, (side, _) in self.matrices.items()}, self.out_proj)

    def _init_weights(self, module):
        if isinstance(module, (KroneckerLinear, KroneckerEmbedding)):
            module.reset_parameters(self.config.initializer_range)
        elif not isinstance(module, KroneckerHead) and not isinstance(getattr(module, "c_proj", None), KroneckerLinear):
            super()._init_weights(module)

    def _get_resized_embeddings(self, old_embeddings, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        if not isinstance(old_embeddings, KroneckerEmbedding):
            return super()._get_resized_embeddings(old_embeddings, new_num_tokens, pad_to_multiple_of, mean_resizing)
        rows = nn.Embedding.from_pretrained(old_embeddings.A.detach(), freeze=False)  # a token is a row of A: resized as any table
        rows = super()._get_resized_embeddings(rows, new_num_tokens, pad_to_multiple_of, mean_resizing)
        old_embeddings.A, old_embeddings.num_embeddings = nn.Parameter(rows.weight.detach()), rows.num_embeddings
        return old_embeddings

    def _get_resized_lm_head(self, old_lm_head, new_num_tokens=None, transposed=False, mean_resizing=True):
        if isinstance(old_lm_head, KroneckerHead):
            return KroneckerHead(self.base_model.get_submodule(self.table))  # the embedding has been resized
        return super()._get_resized_lm_head(old_lm_head, new_num_tokens, transposed, mean_resizing)

    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        """As transformers' own, of a folder that loading.validate_checkpoint finds plausible, and from safetensors alone unless `use_safetensors=False` is given."""
        whole = isinstance(folder, str | os.PathLike) and os.path.isfile(os.path.join(folder, "config.json")) and not {"subfolder", "gguf_file", "state_dict", "variant"} & set(kwargs)
        if not (whole and kwargs.setdefault("use_safetensors", True)):
            return super().from_pretrained(folder, *args, **kwargs)
        loading.validate_checkpoint(folder)
        with loading.one_line_load_errors(folder):
            return super().from_pretrained(folder, *args, **kwargs)

    def fold(self):
        """The same function for inference, exactly narrower in its compressed layers: see fold.py."""
        return fold(self)

    def to_dense(self):
        """A stock transformers model (float rounding aside) with equal logits; ValueError for a folded model."""
        if self.config.folded:
            raise ValueError("to_dense needs the model before fold(): narrow layers cannot be widened again")
        own = ("kronecker", "folded", "provenance", "model_type", "architectures")
        fields = {k: v for k, v in self.config.to_dict().items() if k not in own}
        config = self.dense_class.config_class(**fields)
        config._attn_implementation = self.config._attn_implementation
        with torch.device(self.device):
            dense = self.dense_class(config).to(self.dtype)
        dense.load_state_dict(dense_state(self, dense))
        if self.can_generate():
            dense.generation_config = copy.deepcopy(self.generation_config)
        return dense.train(self.training)

    def save_pretrained(self, save_directory, *args, tokenizer=None, evaluation: dict[str, object] | None = None, **kwargs):
        """As transformers' own, and a model card; `tokenizer` is saved beside, `evaluation` {what: value} becomes the card's table."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(save_directory)
        model_card.write(self, save_directory, count_parameters(self), evaluation)


def is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # transformers' layer with an in×out weight


def dense_state(model: KroneckerModel, dense: nn.Module) -> dict[str, Tensor]:
    """State dictionary for `dense`, every Kronecker layer multiplied out to its layout (Conv1D is in×out)."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, FACTORED):
            del state[f"{name}.A"], state[f"{name}.B"]
            weight = module.weight.detach()
            state[f"{name}.weight"] = (weight.T if is_conv1d(dense.get_submodule(name)) else weight).contiguous()
    return state


def count_parameters(model: nn.Module) -> dict[str, int]:
    """{"total", "without_head"}: a tied head counts once; `without_head` leaves out an untied output head (Table 3). TypeError for what is no model of transformers."""
    if not isinstance(model, nn.Module) or not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"count_parameters takes a model of transformers, got {type(model).__name__}")
    total = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    table = {id(p) for p in model.get_input_embeddings().parameters()}
    own = 0 if head is None else sum(p.numel() for p in head.parameters() if id(p) not in table)
    return {"total": total, "without_head": total - own}
