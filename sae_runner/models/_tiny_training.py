"""Make a small causal language model from text: tokenizer, network, training, measurement."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sae_runner.data._packed import PackedText
from sae_runner.data.base import Dataset
from sae_runner.errors import ConfigError
from sae_runner.files import write_json
from sae_runner.models._artefact import chunks_of
from sae_runner.models._fitting import fit
from sae_runner.models._pretrained import load_tokenizer, quiet
from sae_runner.models._tokens import Tokens

END = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights, besides the text."""

    vocab_size: int
    n_layers: int
    d_model: int
    n_heads: int
    context: int
    prepend_bos: bool
    n_steps: int
    rows_per_step: int
    learning_rate: float
    seed: int

    def config(self) -> Any:
        """GPT-2's configuration (Radford et al. 2019) at these sizes, without dropout."""
        from transformers import GPT2Config

        return GPT2Config(
            architectures=["GPT2LMHeadModel"], vocab_size=self.vocab_size, n_layer=self.n_layers,
            n_embd=self.d_model, n_head=self.n_heads, n_positions=self.context, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
        )  # fmt: skip


def make(
    recipe: Recipe,
    dataset: Dataset,
    folder: Path,
    data_folder: Path,
    device: torch.device,
    kept: Path,
) -> None:
    """Write config, weights, tokenizer and `training.json` into `folder`.

    What was stopped in between goes on from what lies in `kept`.
    """
    train_tokenizer(dataset, recipe.vocab_size, folder)
    tokens = Tokens(
        load_tokenizer(str(folder), None),
        context=recipe.context, prepend_bos=recipe.prepend_bos, encoder=False,
    )  # fmt: skip
    packed = PackedText(dataset, tokens.encode, tokens.framing, tokens.hash(), data_folder)
    train_rows, heldout = (packed.rows[split].long() for split in ("train", "heldout"))
    network = initialise(recipe).to(device)
    train(network, train_rows, recipe, kept)
    losses = {
        "heldout_loss": next_token_loss(network, heldout, recipe.rows_per_step),
        "unigram_loss": unigram_loss(train_rows, heldout, recipe.vocab_size),
    }
    if not all(map(math.isfinite, losses.values())):
        raise ConfigError(f"model.learning_rate={recipe.learning_rate}: training diverged")
    with quiet():
        network.cpu().save_pretrained(folder)
    seen = recipe.n_steps * recipe.rows_per_step * (recipe.context - 1)
    report = {
        **losses, "unit": "nats per token", "n_tokens_trained": seen,
        "n_tokens_train": train_rows[:, 1:].numel(), "n_tokens_heldout": heldout[:, 1:].numel(),
        "recipe": asdict(recipe), "dataset": packed.manifest["source"],
    }  # fmt: skip
    write_json(folder / "training.json", report)


def train_tokenizer(dataset: Dataset, vocab_size: int, folder: Path) -> None:
    """Learn byte-level pairs (Sennrich et al. 2016) on the training documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def texts() -> Iterator[str]:
        for examples in chunks_of(dataset, dataset.ids("train")):
            yield from (example.value for example in examples)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END
    ).save_pretrained(folder)


def initialise(recipe: Recipe) -> Any:
    """The network with weights drawn as GPT-2's: N(0, 0.02²), residual outputs by 1/√(2L) less."""
    from transformers import GPT2LMHeadModel

    generator = torch.Generator().manual_seed(recipe.seed)
    # The library draws weights too, from the global generator, whose state is put back.
    with torch.random.fork_rng(devices=[]):
        network = GPT2LMHeadModel(recipe.config())
    shrink = (2 * recipe.n_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 2:
                std = 0.02 * (shrink if name.endswith("c_proj.weight") else 1.0)
                parameter.normal_(0.0, std, generator=generator)
    return network


def train(
    network: Any, rows: Int[Tensor, "rows context"], recipe: Recipe, kept: Path
) -> list[float]:
    """AdamW with warm-up, a cosine to a tenth of the peak, and clipping; the loss of every step."""
    matrices = [p for p in network.parameters() if p.ndim == 2]
    others = [p for p in network.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    return fit(
        network, optimizer, batches(len(rows), recipe),
        lambda indices: token_losses(network, rows[indices].to(network.device)).mean(),
        lambda step: rate(step, recipe.n_steps),
        n_steps=recipe.n_steps, kept=kept, what="tiny_lm", max_grad_norm=1.0,
    )  # fmt: skip


def rate(step: int, n_steps: int) -> float:
    """Share of the peak learning rate at a step."""
    warm_up = max(1, n_steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, n_steps - warm_up))


def batches(n_rows: int, recipe: Recipe) -> Iterator[Int[Tensor, " batch"]]:
    """Row indices of every step; each pass over the rows is shuffled anew."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    left = torch.zeros(0, dtype=torch.int64)
    for _ in range(recipe.n_steps):
        while len(left) < recipe.rows_per_step:
            left = torch.cat([left, torch.randperm(n_rows, generator=generator)])
        yield left[: recipe.rows_per_step]
        left = left[recipe.rows_per_step :]


def token_losses(network: Any, tokens: Int[Tensor, "rows context"]) -> Float[Tensor, " n"]:
    """Cross-entropy in nats of every token but the first of its row."""
    logits = network(input_ids=tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def next_token_loss(network: Any, rows: Int[Tensor, "rows context"], at_once: int) -> float:
    """Mean loss over all rows."""
    total = 0.0
    for part in torch.split(rows, at_once):
        total += token_losses(network, part.to(network.device)).double().sum().item()
    return total / rows[:, 1:].numel()


def unigram_loss(
    train: Int[Tensor, "rows context"], heldout: Int[Tensor, "heldout context"], vocab_size: int
) -> float:
    """Mean −ln p(token) over held-out text, p from training counts plus one: knows no context."""
    counts = torch.bincount(train[:, 1:].flatten(), minlength=vocab_size).double() + 1
    return float(-(counts / counts.sum()).log()[heldout[:, 1:].flatten()].mean())
