"""LaserModule: a standalone LightningModule around a Hugging Face language model that scores answers to facts.

It brings its own :class:`~laser_callback.compare.LaserCallback` when it has a plan, so that
``Trainer().validate(LaserModule(model, tokenizer, plan="27.fc_in@0.01"), datamodule=facts)`` is a whole comparison. It
is also an ordinary module that trains on the facts' answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from laser_callback.compare.ab_test import ABTest
from laser_callback.compare.both import AnswersOfBoth, TextOfBoth
from laser_callback.compare.callback import LaserCallback
from laser_callback.compare.language_model import (
    context_length,
    is_masked,
    load_language_model,
    logits_at,
    logits_of,
    refuse_too_long,
    token_texts,
)
from laser_callback.compare.trainer import check_strategy
from laser_callback.compare.writing import write
from laser_callback.data import probes
from laser_callback.data.generation import EXACT_MATCH, ExactMatch, WrittenError
from laser_callback.data.row_scores import AnswerScores, Role, RowScores, score_rows
from laser_callback.data.scoring import (
    IGNORED,
    METRICS,
    AnswerMetric,
    BitsPerByte,
    Perplexity,
    UnitMean,
    rows_said,
    target_nll,
    windows_of,
)
from laser_callback.plans.plan import LaserPlan
from laser_callback.reports.terminal import print_ab
from laser_callback.results.ab_test import ABResult
from laser_callback.results.comparison import LaserResult
from laser_callback.stats.outcomes import WINDOW, Outcomes
from laser_callback.support.pretrained import load_tokenizer
from laser_callback.surgery.recipe import Recipe

_SHARES_OF_FACTS = (
    "first_token_accuracy",
    "answer_accuracy",
    "top5_accuracy",
    "top10_accuracy",
    "choice_accuracy",
    "summed_choice_accuracy",
    "paraphrase_robustness",
)  # one 0/1 outcome per fact


PRIMARY = "first_token_accuracy"
"""The metric that carries the claim of facts."""


class LaserModule(pl.LightningModule):
    """Score the answers of a causal or masked language model, original against reduced.

    A model that also takes images or sound is causal if it goes through text alone.

    Logs the metrics of ``METRICS``, ``perplexity`` of running text, and
    ``refusal_rate`` and ``answer_rate`` of refusal probes, each only where its data is there, and returns their
    per-example values from its steps. Where the data lets answers be written (``generation``) it logs ``exact_match``,
    or what a task of ``lm_eval`` judges by, and, of what should be written, ``log_loss``; each example's
    ``continuation`` is returned. A comparison has numbers of both models beside them: ``kl`` and ``top1_agreement`` of
    text, ``answer_kl`` and ``answer_top1_agreement`` of facts, ``neighbour_agreement``.

    Args:
        model: a transformers model, or its folder or hub name.
        tokenizer: the model's tokenizer; by default the one in the model's folder.
        plan: what to cut (see :class:`LaserCallback`); ``None`` for a plain evaluation. A ``LaserCallback`` among the
            trainer's callbacks takes precedence.
        primary: the metric that carries the claim; where answers are written, by default ``exact_match``, or the first
            one of a task of ``lm_eval``.
        controls: also run the controls of each plan, as in :class:`LaserCallback`.
        report: see :class:`LaserCallback`.
        learning_rate: of AdamW in ``fit``.
        ab_fraction: in ``predict``, send this share of the examples, chosen by a hash of their ids, to the reduced
            model and the others to the original; :attr:`ab_result` compares the two groups.
        ab_seed: of that choice.
        allow_missing: load a model of which weights are missing or have other shapes: they are random, and a warning
            names them.

    Raises:
        MisconfigurationException: if ``tokenizer`` is missing, the model is neither causal nor masked, or
            ``ab_fraction`` is not in [0, 1] or without one plan.

    Example::

        module = LaserModule("HuggingFaceTB/SmolLM2-135M-Instruct", plan="28.fc_up@0.01")
        Trainer().validate(module, datamodule=FactsDataModule("facts.jsonl", tokenizer=module.tokenizer))
        module.result["laser"]["first_token_accuracy"].p
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        *,
        plan: LaserPlan | str | dict[str, str] | None = None,
        primary: str | None = PRIMARY,
        controls: bool = False,
        report: bool | str = True,
        learning_rate: float = 1e-5,
        ab_fraction: float | None = None,
        ab_seed: int = 0,
        allow_missing: bool = False,
    ) -> None:
        super().__init__()
        if ab_fraction is not None and not 0 <= ab_fraction <= 1:
            raise MisconfigurationException(f"`ab_fraction` must be in [0, 1], got {ab_fraction}")
        if ab_fraction is not None and not isinstance(plan, (LaserPlan, str)):
            raise MisconfigurationException(f"`ab_fraction` needs one `plan` to route to, got {plan!r}")
        if tokenizer is None:
            if not isinstance(model, str):
                raise MisconfigurationException("`tokenizer` must be given when `model` is not a folder or hub name")
            tokenizer = model
        self.model = load_language_model(model, allow_missing) if isinstance(model, str) else model
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.masked = is_masked(self.model)
        self.plan = plan
        self.primary = primary
        self.controls = controls
        self.report = report
        self.learning_rate = learning_rate
        self.ab_fraction = ab_fraction
        self.ab_seed = ab_seed
        self.metrics = nn.ModuleDict({name: metric() for name, metric in METRICS.items()})
        self.metrics.update({EXACT_MATCH: ExactMatch(), "perplexity": Perplexity()})
        self.metrics.update({name: probes.ProbeRate() for name in probes.RATES})
        self.context = context_length(self.model)
        self._laser: LaserCallback | None = None
        self._ab: ABTest | None = None
        self._ab_result: ABResult | None = None

    @property
    def claim(self) -> str | None:
        """The metric that carries the claim on the data of the trainer."""
        data: Any = getattr(self._trainer, "datamodule", None)
        writes = getattr(data, "generation", None) is not None
        return data.metric if writes and self.primary == PRIMARY else self.primary

    @property
    def result(self) -> LaserResult:
        """The outcome of the latest comparison by the module's own callback; see :class:`LaserResult`.

        Raises:
            RuntimeError: if the module has no plan, or no evaluation has finished.
        """
        if self._laser is None:
            raise RuntimeError("there is no result: give LaserModule a `plan` and run `trainer.validate()` or `test()`")
        return self._laser.result

    @property
    def ab_result(self) -> ABResult:
        """The outcome of the latest prediction with ``ab_fraction``.

        Raises:
            RuntimeError: if there was none.
        """
        if self._ab_result is None:
            raise RuntimeError("there is no A/B result: give LaserModule `plan` and `ab_fraction`, run `predict()`")
        return self._ab_result

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        """The module's own LaserCallback, unless the trainer has one or is not going to evaluate."""
        trainer = self.trainer
        others = [c for c in trainer.callbacks if isinstance(c, LaserCallback) and not isinstance(c, _OwnCallback)]
        if self.plan is None or others or trainer.state.fn == "predict":
            return []
        self._laser = _OwnCallback(self)
        return [self._laser]

    # ---- steps ------------------------------------------------------------------------------------------------------

    @override
    def forward(self, **inputs: Any) -> Any:
        """The wrapped model's forward."""
        return self.model(**inputs)

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean negative log probability per answer token over the facts' prompts and paraphrases, in nats."""
        scores = self._scores(batch)
        loss = -scores.mean_log_prob[scores.is_asked].mean()
        self.log("train_loss", loss, batch_size=scores.facts, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Score one batch of facts, text or probes; returns each example's outcomes under the metrics' names."""
        return self._step(batch)

    @override
    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """The same as :meth:`validation_step`."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """What :meth:`validation_step` returns, as plain tensors and lists, and counted in no metric.

        With ``ab_fraction``, each example's outcomes are those of the model it is routed to, named under ``arm``.
        """
        if self._ab is not None:
            return self._ab.step(lambda part: self._step(part, count=False), batch, dataloader_idx)
        outcomes = self._step(batch, count=False)
        return {name: value.values if isinstance(value, Outcomes) else value for name, value in outcomes.items()}

    @override
    def on_predict_start(self) -> None:
        """Begin the A/B test, if one is asked for."""
        self._ab = self._ab_result = None
        if self.ab_fraction is not None and self.plan is not None:
            check_strategy(self.trainer)
            if isinstance(self.report, str) and not self.report.endswith(".json"):
                raise MisconfigurationException(f"an A/B test writes JSON: `report` is {self.report!r}")
            self._ab = ABTest(self, Recipe.of(self.plan), self.ab_fraction, self.ab_seed)

    @override
    def on_predict_epoch_end(self) -> None:
        """End it: compare the arms over all ranks."""
        if self._ab is None:
            return
        better = {name: cast("UnitMean", metric).higher_is_better for name, metric in self.metrics.items()}
        self._ab_result, self._ab = self._ab.result(self.claim, better), None
        if self.trainer.is_global_zero and isinstance(self.report, str):
            self._ab_result.to_json(self.report)
        if self.trainer.is_global_zero and self.report:
            print_ab(self._ab_result)

    @override
    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted evaluation, or one without data for a metric, has left in the metrics."""
        for metric in self.metrics.values():
            cast("UnitMean", metric).reset()

    @override
    def on_test_epoch_start(self) -> None:
        """The same as :meth:`on_validation_epoch_start`."""
        self.on_validation_epoch_start()

    @override
    def on_validation_epoch_end(self) -> None:
        """Log the metrics that have data on any rank."""
        for name, metric in cast("Iterable[tuple[str, UnitMean]]", self.metrics.items()):
            with metric.sync_context():
                has_data, count = metric.has_data, int(metric.count)
                nothing = isinstance(metric, ExactMatch) and metric.says_nothing
            if nothing:
                rank_zero_warn(
                    f"`{name}` judges nothing: of {count:,} continuations none holds an answer. See what is written "
                    "(`continuation` in the examples file), and what `extract` looks for"
                )
            if has_data:
                self.log(name, metric, metric_attribute=f"metrics.{name}")

    @override
    def on_test_epoch_end(self) -> None:
        """The same as :meth:`on_validation_epoch_end`."""
        self.on_validation_epoch_end()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the trainable parameters."""
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.learning_rate)

    def _step(self, batch: dict[str, Any], count: bool = True) -> dict[str, Any]:
        if "chunks" in batch:
            return self._facts_step(batch, count)
        return self._probes_step(batch, count) if "should_refuse" in batch else self._text_step(batch, count)

    def _facts_step(self, batch: dict[str, Any], count: bool = True) -> dict[str, Any]:
        scores = self._scores(batch)
        outcomes: dict[str, Any] = {name: batch[name] for name in ("id", "group", "prompt")}
        writes = "asked" in batch
        for name, metric in self.metrics.items():
            if isinstance(metric, AnswerMetric) and (name == "log_loss" or not writes):
                if count:
                    metric.update(scores)
                total, units = metric.tally(scores)
                if name in _SHARES_OF_FACTS:
                    outcomes[name] = Outcomes(total / units, kind="binary")
                else:
                    outcomes[name] = Outcomes(total / units, None if name == "log_loss" else units, "mean")
        # Facts of one subject are not independent, and a prompt that comes again is its own subject.
        outcomes["cluster"] = [subject.strip().casefold() for subject in batch["subject"]]
        return outcomes | (self._written(batch, count) if writes else self._said(scores, batch))

    def _written(self, batch: dict[str, Any], count: bool) -> dict[str, Any]:
        """What is written, if that is asked for, and whether it is right."""
        asked = batch["asked"]
        if not asked:
            return {}
        owner = torch.arange(len(batch["id"]))
        refuse_too_long(self.context, [asked["attention_mask"]], owner, batch["id"], asked["max_new_tokens"])
        written = write(self.model, self.tokenizer, asked)
        found: dict[str, Any] = {
            "near_ties": written.near_ties.double(),  # no outcome that is claimed
            "continuation": written.texts,
        }
        for name, judged, binary, higher_is_better in asked["judged"](written.texts, batch):
            right = torch.tensor([each.right for each in judged], dtype=torch.float64, device=self.device)
            metric = self._metric(name, ExactMatch if higher_is_better else WrittenError)
            if count:
                cast("ExactMatch", metric).update(right, [each.said for each in judged])
            found[name] = Outcomes(right, kind="binary" if binary else "mean")
            if binary:
                found[f"answer/{name}"] = [each.answer for each in judged]
                found[f"prediction/{name}"] = [each.said for each in judged]
        return found

    def _metric(self, name: str, kind: type[UnitMean]) -> UnitMean:
        """A metric of the data's own, made when it is first seen."""
        if name not in self.metrics:
            self.metrics[name] = kind().to(self.device)
        return cast("UnitMean", self.metrics[name])

    def _said(self, scores: AnswerScores, batch: dict[str, Any]) -> dict[str, Any]:
        """What the prior checks look at: right answers and what the model says, as each metric has it."""
        prompts = (scores.role == Role.PROMPT).nonzero()[:, 0]
        prompts = prompts[scores.fact[prompts].argsort()]  # (F,)
        first = torch.cat([chunk["first"] for chunk in batch["chunks"]])
        parts = [chunk["targets"].where(chunk["target_mask"], -1) for chunk in batch["chunks"]]
        width = max(part.shape[1] for part in parts)
        targets = torch.cat([nn.functional.pad(part, (0, width - part.shape[1]), value=-1) for part in parts])
        whole = self._texts(targets[prompts])
        neighbours = {"neighbour_accuracy": [None] * scores.facts} if (scores.role == Role.NEIGHBOUR).any() else {}
        chosen = {name: self._texts(targets[rows]) for name, rows in rows_said(scores).items()}
        said = {"answer_accuracy": self._texts(scores.tokens[prompts]), **chosen}
        return {
            # Of the metrics of first tokens.
            "answer": self._texts(targets[prompts].gather(1, first[prompts][:, None])),
            "prediction": self._texts(scores.first_token[prompts][:, None]),
            **{f"answer/{name}": none for name, none in neighbours.items()},  # each has its own: no prior check
            **{f"answer/{name}": whole for name in said},
            **{f"prediction/{name}": texts for name, texts in said.items()},
        }

    def _texts(self, tokens: Tensor) -> list[str]:
        """Rows of tokens, padded with -1, as texts. Two tokens are one text only if they are one token."""
        found, places = tokens.unique(return_inverse=True)
        known = found[found >= 0].tolist()
        each = [""] * (len(found) - len(known)) + token_texts(self.tokenizer, known)
        return ["".join(each[i] for i in row) for row in places.tolist()]

    def _text_step(self, batch: dict[str, Any], count: bool = True) -> dict[str, Any]:
        if self.masked:
            raise MisconfigurationException(
                "perplexity is defined for causal models; leave out `text` for a masked one"
            )
        documents = "windows" in batch  # of a task of lm_eval, each in windows of its own
        windows, counted = batch["windows"] if documents else [windows_of(batch)], batch.get("weights", {})
        unit = "example" if documents else WINDOW
        totals, both = torch.zeros(2, len(batch["id"]), dtype=torch.float64, device=self.device), TextOfBoth()
        for part in windows:
            ids, mask, targets, owner = (part[name] for name in ("input_ids", "attention_mask", "targets", "owner"))
            refuse_too_long(self.context, [mask], owner, batch["id"])
            logits = logits_of(self.model, ids, mask)
            totals = totals.index_add(1, owner, torch.stack(target_nll(logits, targets)).double())
            both.add(logits, targets != IGNORED, owner)
        both.tell(len(batch["id"]), unit)
        nll, tokens = totals
        outcomes = {}
        for name, units in {"perplexity": tokens, **counted}.items():  # words and bytes are of a task of lm_eval
            bits = name == "bits_per_byte"
            values = (nll / units / (math.log(2) if bits else 1)).where(units > 0, math.nan)  # of an empty text
            outcomes[name] = Outcomes(values, units, "mean" if bits else "log_ratio", unit)
            metric = self._metric(name, BitsPerByte if bits else Perplexity)
            if count:
                cast("Perplexity", metric).update(nll, units)
        return {"id": batch["id"], **outcomes}

    def _probes_step(self, batch: dict[str, Any], count: bool = True) -> dict[str, Any]:
        owner, new = torch.arange(len(batch["id"])), batch["rule"]["max_new_tokens"]
        refuse_too_long(self.context, [batch["attention_mask"]], owner, batch["id"], new)
        asked = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        said = write(self.model, self.tokenizer, {**asked, "max_new_tokens": new, "stop": ()}).texts
        outcomes = probes.outcomes(said, batch)
        for name, values in outcomes.items():
            if count:
                cast("probes.ProbeRate", self.metrics[name]).update(values)
        rates = {name: Outcomes(values, kind="binary") for name, values in outcomes.items()}
        return {"id": batch["id"], "group": batch["group"], "continuation": said, **rates}

    def _scores(self, batch: dict[str, Any]) -> AnswerScores:
        masks = [chunk["attention_mask"] for chunk in batch["chunks"]]
        refuse_too_long(self.context, masks, batch["row_fact"], batch["id"])
        both = AnswersOfBoth(batch)
        scores = AnswerScores.gather([self._score(chunk, both) for chunk in batch["chunks"]], batch)
        both.tell(scores)
        return scores

    def _score(self, chunk: dict[str, Tensor], both: AnswersOfBoth) -> RowScores:
        """Score one padded chunk of rows, computing logits at the answers' positions only."""
        mask = chunk["target_mask"]
        rows = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)[mask]
        with logits_at(self.model, rows, chunk["positions"][mask]):
            logits = logits_of(self.model, chunk["input_ids"], chunk["attention_mask"])
        both.add(logits[0], mask)
        return score_rows(logits[0], chunk["targets"], mask, chunk["first"])


class _OwnCallback(LaserCallback):
    """A LaserModule's own callback. It may stay in a trainer that then runs another module, and rests there."""

    def __init__(self, module: LaserModule) -> None:
        assert module.plan is not None
        super().__init__(module.plan, primary=module.claim, controls=module.controls, report=module.report)
        self._module = module

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if pl_module is self._module and stage != "predict":
            self.primary = self._module.claim  # what it is judged by, data may know only now
            super().setup(trainer, pl_module, stage)

    @override
    def is_active(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        return pl_module is self._module and super().is_active(trainer, pl_module)
