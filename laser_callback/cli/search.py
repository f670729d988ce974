"""``laser-callback search``: from a model and a file of facts, or a LightningModule and its data, to a plan."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from laser_callback.cli.command import Answer, Exit, notes
from laser_callback.cli.report import read_examples
from laser_callback.cli.subject import subject
from laser_callback.data.generation import Generation
from laser_callback.data.lm_eval.source import is_lm_eval
from laser_callback.plans.target import RHOS
from laser_callback.reports.page import save_page
from laser_callback.reports.search_terminal import print_search
from laser_callback.results.search import SearchResult
from laser_callback.search.search import LaserSearch, Method
from laser_callback.support.files import need_writable


def search(
    model: str | None = None,
    facts: Path | None = None,
    judge: str | None = None,
    text: Path | None = None,
    module: pl.LightningModule | None = None,
    data: pl.LightningDataModule | None = None,
    objective: str | list[str] | None = None,
    direction: Literal["max", "min"] | None = None,
    loss: str | None = None,
    race: str | None = None,
    constraints: str | list[str] | None = None,
    base: str | None = None,
    within: str = "*.all",
    rhos: float | list[float] | None = None,
    strategies: str | list[str] | None = None,
    candidates: int = 40,
    max_reductions: int = 1,
    min_gain: float = 0.05,
    limit: int = 0,
    batch_size: int = 64,
    chat: bool = False,
    system: str | None = None,
    generation: Generation | None = None,
    allow_missing: bool = False,
    method: Method = "screened",
    controls: bool = True,
    minutes: float | None = None,
    folder: Path | None = None,
    resume: bool = False,
    accelerator: str = "auto",
    precision: str | None = None,
    seed: int = 0,
    output: Path = Path("laser-search.json"),
    html: Path | None = None,
    plan: Path | None = None,
    quiet: bool = False,
) -> Answer:
    """Search for the cuts that help a model on a task, and confirm the best on unseen examples.

    The exit code is 0 if a plan is recommended, and 3 if the original is.

    Args:
        model: folder or hub name of a Hugging Face language model; goes with facts or judge.
        facts: a JSONL, CSV or Parquet file of {id, prompt, answer, paraphrases?, choices?, subject?, group?}.
        judge: instead of facts, lm_eval:TASK, a task of lm-evaluation-harness (its name, or a YAML file) that is
            multiple choice or lets answers be written; the objective is then its metric; e.g. "lm_eval:gsm8k" or
            "lm_eval:arc_easy?num_fewshot=5&include_path=my_tasks".
        text: a UTF-8 text file; perplexity on it must hold.
        module: instead of a model, a LightningModule class of your own; goes with data.
        data: a LightningDataModule class whose validation dataloader is split into the search's sets.
        objective: keys that validation_step logs; the mean of their changes is improved, the first carries the claim.
        direction: whether the objective is better high or low, where the metric does not say so.
        loss: a logged key, lower is better, that helps to tell candidates apart.
        race: the key by which candidates race ahead of the last round, the loss or the first objective; where answers
            are written, by default the loss of those that should be.
        constraints: how much worse a key may become, e.g. "perplexity <= +2 %".
        base: folder, hub name or checkpoint that the model was fine-tuned from, for strategies that edit the
            difference to it.
        within: where to look, as plan text without rho, e.g. "20-29.mlp, *.q_proj".
        rhos: fractions of the rank to try; by default those of the paper's code, and 0.
        strategies: what proposes candidates, between commas; laser,components,drop by default, with a base also delta.
            laser: every matrix at every rho. components: single directions of a matrix taken out, by the gradient.
            drop: layers, or their attention or MLP, left out. whitened: every matrix, its outputs changed least.
            blocks: head by head. Of what fine-tuning has changed (with a base), delta: as a whole by one rule;
            delta-all: embeddings, head and biases too; delta-matrices: matrix by matrix; delta-components: single
            directions; intruders: new directions made smaller. To compare with, every matrix at every rho in another
            order: late-mlp, laser-rmt, gavish-donoho, entropy, random; reference: as the paper's code cuts.
        candidates: how many of those that are proposed race.
        max_reductions: stop composing at so many candidates.
        min_gain: warn if the examples are too few to confirm a gain of this size.
        limit: use a seeded sample of so many facts, stratified by group; 0 for all.
        batch_size: facts in a batch.
        chat: put each prompt into the model's chat template, as a user's message that the answer replies to.
        system: the system message of that chat.
        generation: let the model write its answers, and judge these: {max_new_tokens, stop, extract, match, normalise}.
        allow_missing: go on with a model of which weights are missing: they are random, and a warning names them.
        method: screened; exhaustive, all candidates on all race examples; or paper, all of them as the paper's code
            cuts and selects.
        controls: confirm beside the plan its matrices zeroed, random matrices cut at the same rho, and noise
            as large as the cut.
        minutes: race only as many candidates as fit into so much time.
        folder: keep each finished step here.
        resume: go on with the search in the folder.
        accelerator: as in Lightning's Trainer; auto takes CUDA or the CPU.
        precision: as in Lightning's Trainer.
        seed: of the sets, the order of examples and the controls.
        output: where to write the result as JSON; the outcomes of the confirm set's examples go beside it as JSONL.
        html: where to write the result as a page.
        plan: where to write the recommended plan (.yaml, .json or .txt), if there is one.
        quiet: print the verdict only.
    """
    if judge is not None:
        if facts is not None or not is_lm_eval(judge):
            raise ValueError(f"`--judge` must be lm_eval:TASK, without `--facts`, got {judge!r} and facts {facts}")
        facts = Path(judge)
    options: dict[str, Any] = {"limit": limit, "batch_size": batch_size, "seed": seed, "chat": chat, "system": system}
    options["generation"] = generation
    need_writable({"facts": facts, "text": text}, output=output, html=html, plan=plan)
    found = LaserSearch(
        *subject(
            model,
            facts,
            module,
            data,
            text,
            facts_from="`--facts` or `--judge`",
            allow_missing=allow_missing,
            **options,
        ),
        objective=objective,
        direction=direction,
        loss=loss,
        race=race,
        constraints=[constraints] if isinstance(constraints, str) else constraints,
        base=base,
        within=within,
        rhos=RHOS if rhos is None else [rhos] if isinstance(rhos, float) else rhos,
        strategies=strategies,
        candidates=candidates,
        max_reductions=max_reductions,
        min_gain=min_gain,
        method=method,
        controls=controls,
        minutes=minutes,
        folder=folder,
        resume=resume,
        accelerator=accelerator,
        precision=precision,
        progress=not quiet,
        seed=seed,
    )
    try:
        with notes():
            found.run()
    except KeyboardInterrupt:
        print(f"so far: {found.result.reason}", file=sys.stderr)
        _write(found.result, output, html, folder)
        raise
    _write(found.result, output, html, folder)
    if plan is not None and found.result.plan is not None:
        found.result.plan.to_file(plan)
    if quiet:
        print(found.result.verdict)
    else:
        print_search(found.result)
        print(f"\nresult: {output}{f', page: {html}' if html else ''}")
    return Answer(found.result.to_dict(), Exit.KEPT_ORIGINAL if found.result.plan is None else Exit.DONE)


def _write(result: SearchResult, output: Path, html: Path | None, folder: Path | None) -> None:
    result.to_json(output)
    if result.confirmed is not None and result.confirmed.examples.batches:
        result.confirmed.examples.write(output.with_suffix(".examples.jsonl"))
    if html is not None:
        # A search that was resumed may have its examples in the folder only.
        kept = [] if folder is None else read_examples(folder / "result.json", must_exist=False)
        save_page(result, html, kept or None)
