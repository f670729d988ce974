"""``laser-callback report``: a finished comparison, search or cleanup once more: terminal, page or pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from laser_callback.cli.command import Answer
from laser_callback.finished.pairing import compare_runs
from laser_callback.finished.reading import read_run, run_of_rows
from laser_callback.reports.gate_terminal import print_cleanup
from laser_callback.reports.page import save_page
from laser_callback.reports.pictures import Result, save_figures
from laser_callback.reports.row_text import verdict
from laser_callback.reports.search_terminal import print_search
from laser_callback.reports.terminal import print_report
from laser_callback.results.cleanup import CleanupResult
from laser_callback.results.comparison import LaserResult
from laser_callback.results.search import SearchResult, result_of
from laser_callback.support.files import need_files, need_writable, need_writable_folder
from laser_callback.support.reading import read_json_lines, read_plain, typed


def report(
    result: Path,
    html: Path | None = None,
    pictures: Path | None = None,
    format: Literal["png", "svg", "pdf"] = "png",
    examples: Path | None = None,
    noise: Path | None = None,
) -> Answer:
    """Show the result of a comparison, a search or a cleanup: in the terminal, or if asked for as a page or pictures.

    Args:
        result: the JSON file that the comparison, the search or the cleanup has written.
        html: where to write a page, one file that loads nothing.
        pictures: a folder for pictures.
        format: of the pictures.
        examples: the outcomes of each example (.examples.jsonl), for the page; by default those beside the result.
        noise: those of the same comparison run once more under other arithmetic, such as with another batch size or
            precision: how many outcomes of the original differ by that alone is told beside the gain.
    """
    need_files(result=result, examples=examples, noise=noise)
    read = {"result": result, "examples": examples or result.with_suffix(".examples.jsonl"), "noise": noise}
    need_writable(read, html=html)
    need_writable_folder(pictures=pictures)
    found = read_result(result)
    rows = read_examples(result if examples is None else examples, must_exist=examples is not None)
    if (compared := found if isinstance(found, LaserResult) else found.confirmed) is not None:
        compared.examples.kept = rows
    if noise is not None:
        found = _with_noise(found, rows, result, noise)
    written: list[Path] = []
    if html is not None:
        save_page(found, html, rows)
        written.append(html)
    if pictures is not None:
        written += save_figures(found, pictures, format, rows)
    for path in written:
        print(f"written: {path}")
    if not written:
        if isinstance(found, CleanupResult):
            print_cleanup(found)
            if found.confirmed is not None:
                print_report(found.confirmed)
        elif isinstance(found, SearchResult):
            print_search(found)
        else:
            print_report(found)
    return Answer({"verdict": _verdicts(found), "written": [str(path) for path in written]})


def _with_noise(found: Result, rows: Sequence[Mapping[str, Any]], result: Path, noise: Path) -> Result:
    """The result with what its original answers otherwise in another run of it."""
    compared = found if isinstance(found, LaserResult) else found.confirmed
    if compared is None or not rows:
        raise ValueError(f"`noise` is held against the examples of a comparison, and {result} has none beside it")
    own = run_of_rows(rows, "original", str(result))
    rerun = compare_runs(own, own, again=read_run(noise, "noise")).rerun
    compared = replace(compared, rerun=rerun)
    return compared if isinstance(found, LaserResult) else replace(found, confirmed=compared)


def read_result(path: Path) -> Result:
    """The result in a JSON file.

    Raises:
        ValueError: if the file holds something else.
    """

    def made(data: Any) -> Result:
        cleaned = isinstance(data, Mapping) and "contenders" in data
        return replace(CleanupResult.from_dict(data), report=path) if cleaned else result_of(data)

    return read_plain(path, "result", made)


def read_examples(path: Path, must_exist: bool) -> list[dict[str, Any]]:
    """The lines of a file of examples, or of the one that goes with a result; none if that is not there."""
    places = [path]
    if path.suffix == ".json":  # a search's folder holds the confirm set's examples beside its result
        places = [path.with_suffix(".examples.jsonl"), path.with_name("confirm.examples.jsonl")]
    for place in places:
        if os.path.exists(place) or must_exist:
            return read_json_lines(place, "examples", partial(typed, dict[str, Any]))
    return []


def _verdicts(found: Result) -> str:
    if isinstance(found, LaserResult):
        return ". ".join(verdict(found, name) for name in found.arms)
    return found.verdict
