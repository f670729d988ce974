"""``laser-callback gate`` and ``laser-callback rollout``: may this plan ship? The exit code says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from laser_callback.cli.command import Answer, Exit
from laser_callback.cli.subject import facts_for, subject
from laser_callback.compare.module import LaserModule
from laser_callback.data.generation import Generation
from laser_callback.data.lm_eval.source import file_of
from laser_callback.data.probes import ProbesDataModule
from laser_callback.plans.plan import LaserPlan, check_base, check_directions
from laser_callback.reports.gate_terminal import print_rollout
from laser_callback.shipping.gates import read_gates
from laser_callback.shipping.rollout import StagedRollout, in_parts, in_steps
from laser_callback.spectra.delta import BaseWeights
from laser_callback.spectra.store import Spectra
from laser_callback.support.files import need_files, need_writable
from laser_callback.surgery.recipe import Recipe


def rollout(
    *,
    plan: str,
    gates: str | list[str],
    model: str | None = None,
    facts: Path | None = None,
    text: Path | None = None,
    probes: Path | None = None,
    others: dict[str, Path] | None = None,
    module: pl.LightningModule | None = None,
    data: pl.LightningDataModule | None = None,
    base: str | None = None,
    stages: str | list[str] | None = None,
    steps: float | list[float] | None = None,
    gain_at: Literal["each", "last"] = "each",
    controls: bool = False,
    limit: int = 0,
    batch_size: int = 64,
    chat: bool = False,
    system: str | None = None,
    generation: Generation | None = None,
    allow_missing: bool = False,
    folder: Path | None = None,
    resume: bool = False,
    accelerator: str = "auto",
    precision: str | None = None,
    seed: int = 0,
    output: Path = Path("laser-rollout.json"),
) -> Answer:
    """Put a plan into a model stage by stage; keep the last stage that passes all gates.

    The exit code is 0 if the whole plan is accepted, and 3 if the original or a part of the plan is kept.

    Args:
        plan: what to cut, or a plan file (.yaml, .json or .txt).
        gates: what is demanded, e.g. "first_token_accuracy: gain", "perplexity: ratio < 1.02", or a YAML file of gates.
        model: folder or hub name of a Hugging Face language model; goes with facts.
        facts: a JSONL, CSV or Parquet file of {id, prompt, answer, paraphrases?, choices?, subject?, group?} that the
            plan was not chosen by.
        text: a UTF-8 text file, for gates on perplexity.
        probes: a file of {id?, prompt, should: refuse or answer}, for gates on probes/refusal_rate, probes/answer_rate.
        others: more facts by name, for gates on {name}/{metric}.
        module: instead of a model, a LightningModule class of your own; goes with data.
        data: a LightningDataModule class with a validation dataloader.
        base: for a plan that cuts the difference to what the model was fine-tuned from, as in 27.fc_in@0.1:cut=delta:
            that model's folder, hub name or checkpoint.
        stages: the plans to go through before the last, in order; by default one more reduction at a time, of a plan
            with more than eight its layers in at most eight parts.
        steps: instead, cut the whole plan at these rhos first.
        gain_at: demand gains of each stage, or of the last only.
        controls: run beside each stage its matrices zeroed, random matrices cut at the same rho, and noise
            as large as the cut.
        limit: use a seeded sample of so many facts, stratified by group; 0 for all.
        batch_size: facts in a batch.
        chat: put each prompt into the model's chat template, as a user's message that the answer replies to.
        system: the system message of that chat.
        generation: let the model write its answers, and judge these: {max_new_tokens, stop, extract, match, normalise}.
        allow_missing: go on with a model of which weights are missing: they are random, and a warning names them.
        folder: keep each finished stage here.
        resume: go on with the rollout in the folder.
        accelerator: as in Lightning's Trainer; auto takes CUDA or the CPU.
        precision: as in Lightning's Trainer.
        seed: of the sample and the controls.
        output: where to write the result as JSON.
    """
    if stages is not None and steps is not None:
        raise ValueError("give `--stages` or `--steps`, not both")
    whole = Recipe.of(plan)
    if stages is not None:
        declared = [*map(LaserPlan.parse, [stages] if isinstance(stages, str) else stages), whole]
    elif steps is not None:
        declared = in_steps(whole, [steps] if isinstance(steps, float) else steps)
    else:
        declared = in_parts(whole)
    check_base(declared, base is not None)
    check_directions(declared)
    read_gates(gates)
    read = {"probes": probes, **{f"others.{name}": file_of(path) for name, path in (others or {}).items()}}
    need_files(**read)
    need_writable({"plan": plan, "facts": facts, "text": text, **read}, output=output)
    options: dict[str, Any] = {"limit": limit, "batch_size": batch_size, "seed": seed, "chat": chat, "system": system}
    judged, examples = subject(
        model, facts, module, data, text, generation=generation, allow_missing=allow_missing, **options
    )
    sources: dict[str, pl.LightningDataModule] = {}
    if isinstance(judged, LaserModule) and model is not None:
        sources = {name: facts_for(judged, path, **options) for name, path in (others or {}).items()}
        if probes is not None:
            sources["probes"] = ProbesDataModule(probes, judged.tokenizer, system=system)
    elif probes is not None or others is not None:
        raise ValueError("`--probes` and `--others` go with `--model`")
    staged = StagedRollout(
        judged,
        declared,
        gates,
        examples,
        others=sources,
        gain_at=gain_at,
        controls=controls,
        spectra=None if base is None else Spectra.default(BaseWeights(base, judged)),
        folder=folder,
        resume=resume,
        accelerator=accelerator,
        precision=precision,
        seed=seed,
    )
    try:
        staged.run()
    except KeyboardInterrupt:
        staged.result.to_json(output)
        raise
    staged.result.to_json(output)
    print_rollout(staged.result)
    print(f"\nresult: {output}")
    return Answer(staged.result.to_dict(), Exit.DONE if staged.result.complete else Exit.KEPT_ORIGINAL)


def gate(*, plan: str, gates: str | list[str], output: Path = Path("laser-gate.json"), **options: Any) -> Answer:
    """Judge a plan by gates, at once: a rollout of one stage.

    The exit code is 0 if the plan is accepted, and 3 if the original is kept.

    Args:
        plan: what to cut, or a plan file (.yaml, .json or .txt).
        gates: what is demanded, e.g. "first_token_accuracy: gain", "perplexity: ratio < 1.02", or a YAML file of gates.
        output: where to write the result as JSON.
        **options: those of ``rollout``.
    """
    return rollout(
        plan=plan,
        gates=gates,
        stages=[],
        steps=None,
        gain_at="each",
        folder=None,
        resume=False,
        output=output,
        **options,
    )
