"""``laser-callback compare``: two finished runs, from their logs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from laser_callback.cli.command import Answer, notes
from laser_callback.finished.pairing import compare_runs
from laser_callback.finished.reading import read_run
from laser_callback.reports.row_text import verdict
from laser_callback.reports.terminal import print_report
from laser_callback.support.files import need_writable


def compare(
    a: Path,
    b: Path,
    tasks: str | list[str] | None = None,
    metric: str | None = None,
    weights: Literal["size", "equal"] = "size",
    noise: Path | None = None,
    html: Path | None = None,
    output: Path | None = None,
) -> Answer:
    """Compare two finished runs, example by example: no model is run.

    A run is a folder or file of samples of lm-eval (--log_samples), a log of Inspect as JSON, or a JSONL or CSV file of
    {id, outcomes..., prompt?, answer?, prediction?, group?, cluster?, task?}, in which outcomes are numbers.

    Args:
        a: the run that B is compared with, such as the model before a change: changes are B minus A.
        b: the run whose gain is asked for.
        tasks: those to compare, such as gsm8k,arc_easy; by default all that both have. Of several a mean carries the
            claim.
        metric: the metric that carries the claim, declared beforehand; of several tasks, the metric of each.
        weights: of the tasks in their mean, by their numbers of examples or all the same.
        noise: another run of A's model on the same examples, such as with another batch size or precision: how much of
            what differs does by arithmetic alone.
        html: where to write a page, one file that loads nothing.
        output: where to write the result as JSON, with the outcomes of each example beside it (.examples.jsonl).
    """
    need_writable({"a": a, "b": b, "noise": noise}, html=html, output=output)
    with notes():
        one, other = read_run(a, "a"), read_run(b, "b")
        again = None if noise is None else read_run(noise, "noise")
    listed = [task.strip() for task in tasks.split(",")] if isinstance(tasks, str) else tasks or ()
    result = compare_runs(one, other, tasks=listed, metric=metric, weights=weights, again=again)
    for what, why in result.not_compared.items():
        result.not_compared[what] = why.replace("`metric`", "`--metric`")
    print_report(result)
    if html is not None:
        from laser_callback.reports.page import save_page  # matplotlib takes its time

        save_page(result, html)
    if output is not None:
        result.to_json(output)
        result.examples.write(output.with_suffix(".examples.jsonl"))
    for path in (html, output):
        if path is not None:
            print(f"written: {path}")
    return Answer({"verdict": verdict(result, "laser"), **result.to_dict()})
