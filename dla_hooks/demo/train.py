"""Trains the demonstration model: ``python -m dla_hooks.demo.train --out FOLDER``.

Training is reproducible in this sense: on the same machine, with the same library versions, the
same seed and the same number of threads, every run gives the same weights, bit for bit. Elsewhere
sums may be taken in another order, and the weights, though as good, will differ.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dla_hooks.demo.batches import Batch, batch_of
from dla_hooks.demo.corpus import TASKS, Example, held_out, literal_examples
from dla_hooks.demo.lessons import TAUGHT, Watched
from dla_hooks.demo.settings import Settings, Stage
from dla_hooks.demo.tokenizer import build_tokenizer


@dataclass(frozen=True)
class Accuracy:
    """Shares of held-out prompts, from 0 to 1."""

    top: float
    """The answer has the highest logit of the whole vocabulary."""
    versus_incorrect: float
    """The answer has a higher logit than the incorrect continuation."""


def new_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """An untrained model for the tokenizer; its weights depend on the settings' seed only."""
    torch.manual_seed(settings.seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=settings.positions,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        n_inner=settings.inner,
        # GPT-2's own function, computed in one pass instead of eight.
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPT2LMHeadModel(config)


def _learning_rate(step: int, stage: Stage) -> float:
    """A linear rise and then a cosine fall to nothing, which settles the weights at the end."""
    rise = min(1.0, (step + 1) / stage.warmup_steps)
    return stage.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / stage.steps))


def train(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, report: bool = False
) -> GPT2LMHeadModel:
    """Train a new model on freshly generated text and return it, ready for evaluation.

    After each stage the weights are rounded to half precision, as they are stored.
    """
    model = new_model(settings, tokenizer)
    for stage in settings.stages:
        model.train()
        _train(model, stage, settings, tokenizer, report)
        model.half().float()
    model.eval()
    return model


def _train(
    model: GPT2LMHeadModel,
    stage: Stage,
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
    report: bool,
) -> None:
    """One stage, with an optimizer of its own."""
    rng = random.Random(settings.seed)
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    # Two batches a step, because the lists of the last task are twice as long as the sentences
    # of the others, which would otherwise be half padding.
    groups = (TASKS[:-1], TASKS[-1:])
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, stage)
        losses: list[float] = []
        for tasks in groups:
            loss = _loss(model, batch_of(tasks, tokenizer, settings, rng), stage)
            # Every task counts the same.
            (loss * len(tasks) / len(TASKS)).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if report and (step + 1) % 250 == 0:
            shown = ", ".join(f"{loss:.3f}" for loss in losses)
            sys.stdout.write(f"step {step + 1}: loss {shown} (sentences, lists)\n")
            sys.stdout.flush()


def _loss(model: GPT2LMHeadModel, batch: Batch, stage: Stage) -> torch.Tensor:
    """Of the next words, of what MLPs wrote, and of what taught heads did not."""
    with Watched(model, batch.looks) as watched:
        logits = model(batch.tokens, position_ids=batch.positions, use_cache=False).logits
    each = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none"
    )
    each = each + stage.mlp_price * watched.mlp_share()[:, :-1].flatten()
    weight = batch.weights[:, 1:].flatten()
    loss = (each * weight).sum() / weight.sum()
    if stage.looking or stage.others_price:
        for task in [task for task in batch.looks if task in TAUGHT]:
            off, others = watched.lesson(task, batch)
            loss = loss + (stage.looking * off + stage.others_price * others) / len(batch.looks)
    return loss


@torch.no_grad()
def accuracy(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    bos: bool = False,
) -> Accuracy:
    """How often the model answers the examples right, with or without a BOS token in front."""
    start = [tokenizer.bos_token_id] if bos else []
    prompts = [start + list(ids) for ids in tokenizer([e.prompt for e in examples])["input_ids"]]
    last = torch.tensor([len(prompt) - 1 for prompt in prompts])
    tokens = torch.full((len(prompts), int(last.max()) + 1), tokenizer.pad_token_id)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    logits = model(tokens, use_cache=False).logits
    rows = torch.arange(len(prompts))
    final = logits[rows, last]
    answers = torch.tensor([_single_token(tokenizer, e.answer) for e in examples])
    incorrect = torch.tensor([_single_token(tokenizer, e.incorrect) for e in examples])
    return Accuracy(
        top=(final.argmax(-1) == answers).double().mean().item(),
        versus_incorrect=(final[rows, answers] > final[rows, incorrect]).double().mean().item(),
    )


def _single_token(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    ids = list(tokenizer(text)["input_ids"])
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(f"{text!r} is not one known token")
    return int(ids[0])


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save weights rounded to half precision, to be loaded as float32, and the tokenizer."""
    copy.deepcopy(model).half().save_pretrained(folder)
    model.config.dtype = torch.float32
    # Loading follows the type the configuration names. Half precision is only for storage: on a
    # processor it is slow, and its logits are too coarse to compare contributions.
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The class gets the name under which every supported version of transformers knows it; newer
    # ones would write a name that older ones refuse.
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(settings, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, load again and report the accuracy on held-out prompts."""
    parser = argparse.ArgumentParser(
        prog="python -m dla_hooks.demo.train", description=main.__doc__
    )
    parser.add_argument("--out", type=Path, default=Path("demo-model"), help="folder to write")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    start = time.perf_counter()
    tokenizer = build_tokenizer()
    settings = Settings(seed=options.seed)
    save(train(settings, tokenizer, report=True), tokenizer, options.out)
    seconds = time.perf_counter() - start

    # What is judged is what was saved: the rounding is part of the model.
    model = GPT2LMHeadModel.from_pretrained(options.out, local_files_only=True).eval()
    size = sum(file.stat().st_size for file in options.out.iterdir())
    sys.stdout.write(
        f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {size:,} bytes, "
        f"trained in {seconds:.0f} s\n"
    )
    for bos in (False, True):
        sys.stdout.write(
            f"held out, {'with' if bos else 'without'} BOS (top of all, against one)\n"
        )
        for task in TASKS:
            found = accuracy(model, tokenizer, held_out(task, 1000), bos)
            sys.stdout.write(f"  {task:16} {found.top:7.1%} {found.versus_incorrect:7.1%}\n")
        found = accuracy(model, tokenizer, literal_examples(), bos)
        sys.stdout.write(f"  {'examples':16} {found.top:7.1%} {found.versus_incorrect:7.1%}\n")


if __name__ == "__main__":
    main()
