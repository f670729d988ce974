"""A small model with a planted effect: one early attention matrix carries a tail that hurts, and cutting it heals.

A small Llama learns facts (subject, relation) -> object behind random filler. One attention matrix is trained
at a low rank. Then random singular directions, all below its own, are added to it: a tail of noise, as the LASER paper
supposes to be in MLP weights of late layers, put where a search of late MLPs cannot find it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from laser_callback.plans.reduction import Reduction
from laser_callback.plans.target import Target, targets
from laser_callback.spectra.spectrum import Spectrum

SUBJECTS, RELATIONS, OBJECTS, FILLER = 64, 4, 32, 28  # tokens of each sort
PROMPT = 6  # tokens: filler, the subject anywhere among it, the relation last


class FactRecall(pl.LightningModule):
    """Predicts the object behind the prompt; returns each fact's log loss."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def losses(self, prompts: Tensor, objects: Tensor) -> Tensor:
        logits = self.model(input_ids=prompts, use_cache=False, logits_to_keep=1).logits[:, -1]
        return F.cross_entropy(logits, objects, reduction="none")

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> dict[str, Any]:
        losses = self.losses(*batch)
        self.log("log_loss", losses.mean(), batch_size=len(losses))
        return {"log_loss": losses}


@dataclass
class Planted:
    """The model with its tail, and what belongs to it.

    Attributes:
        module: the model.
        target: the matrix that carries the tail.
        rank: of what it was before, so that keeping this rank heals it.
        healthy, sick: mean log loss on ``race`` before and after planting.
        screen, race: examples, (prompts, objects).
    """

    module: FactRecall
    target: Target
    rank: int
    healthy: float
    sick: float
    screen: tuple[Tensor, Tensor]
    race: tuple[Tensor, Tensor]

    def loader(self, batch_size: int) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*self.screen), batch_size=batch_size)

    def truth(self, found: Sequence[Target], rhos: Sequence[float]) -> dict[Reduction, float]:
        """Change of the mean log loss on ``race`` under every cut, one after the other."""
        changes = {}
        base = _mean_loss(self.module, self.race)
        for target in found:
            (matrix,) = target.matrices
            data = matrix.parameter.data
            spectrum = Spectrum.of(data)
            for rho in rhos:
                matrix.parameter.data = spectrum.reduce(data, target.at(rho))
                changes[target.at(rho)] = _mean_loss(self.module, self.race) - base
                matrix.parameter.data = data
        return changes


def plant(
    *,
    layer: int = 0,
    kind: str = "v_proj",
    rank: int = 6,
    tail: float = 0.8,
    layers: int = 3,
    subjects: int = SUBJECTS,
    steps: int = 300,
    seed: int = 0,
) -> Planted:
    """Train, and add to ``layer``'s ``kind`` a tail with singular values of ``tail`` times the head's smallest."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=SUBJECTS + RELATIONS + OBJECTS + FILLER,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=PROMPT,
        )
        module = FactRecall(LlamaForCausalLM(config))
        answers = torch.randint(OBJECTS, (subjects, RELATIONS)) + SUBJECTS + RELATIONS
        (target,) = [t for t in targets(module) if t.address == {"layer": layer, "matrix": kind}]
        weight = target.matrices[0].parameter
        low_rank = nn.Parameter(torch.randn(2, 64, rank) / 8)
        _train(module, answers, weight, low_rank, steps)
        module.eval()

        screen, race = _examples(answers, 100), _examples(answers, 300)
        healthy = _mean_loss(module, race)
        u, s, v = torch.linalg.svd(weight.data.double())
        noise = torch.linalg.qr(torch.randn(64 - rank, 64 - rank, dtype=torch.float64)).Q
        weight.data += (tail * s[rank - 1] * u[:, rank:] @ noise @ v[rank:]).float()
    return Planted(module, target, rank, healthy, _mean_loss(module, race), screen, race)


def _train(module: FactRecall, answers: Tensor, weight: nn.Parameter, low_rank: nn.Parameter, steps: int) -> None:
    """Adam on random batches, with ``weight`` held at the product of two factors that have singular values alike."""
    optimizer = torch.optim.AdamW([low_rank, *(p for p in module.parameters() if p is not weight)], fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    weight.requires_grad_(False)
    for _ in range(steps):
        weight.data = _orthonormal_product(low_rank.detach())
        weight.requires_grad_(True)
        module.losses(*_examples(answers, 4 * len(answers))).mean().backward()
        # The chain rule through the product, by hand, since the model reads a parameter.
        _orthonormal_product(low_rank).backward(weight.grad)
        weight.grad = None
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    weight.data = _orthonormal_product(low_rank.detach())


def _orthonormal_product(low_rank: Tensor) -> Tensor:
    left, right = (torch.linalg.qr(factor).Q for factor in low_rank)
    return 2 * left @ right.T


def _examples(answers: Tensor, count: int) -> tuple[Tensor, Tensor]:
    subject, relation = torch.randint(len(answers), (count,)), torch.randint(RELATIONS, (count,))
    prompts = torch.randint(FILLER, (count, PROMPT)) + SUBJECTS + RELATIONS + OBJECTS
    prompts[torch.arange(count), torch.randint(PROMPT - 1, (count,))] = subject
    prompts[:, -1] = relation + SUBJECTS
    return prompts, answers[subject, relation]


@torch.no_grad()
def _mean_loss(module: FactRecall, examples: tuple[Tensor, Tensor]) -> float:
    return float(module.losses(*examples).double().mean())
