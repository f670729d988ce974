"""A result's tables and pictures for the experiment loggers of a Trainer: TensorBoard, CSV files, Weights & Biases.

The numbers themselves are logged by :class:`~laser_callback.compare.LaserCallback` as any other metric is; here is
what no scalar can hold.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from laser_callback.plans.short import brief
from laser_callback.reports.pictures import figures, save_figures
from laser_callback.reports.row_text import cell_text
from laser_callback.results.candidates import to_rows
from laser_callback.results.comparison import LaserResult
from laser_callback.results.flips import Parted, flip_metric, flips, parted
from laser_callback.results.search import SearchResult
from laser_callback.support.files import write_atomically

Table = list[dict[str, Any]]
_COLUMNS = (
    *("metric", "original", "reduced", "delta", "lower", "upper", "fixed", "broken"),
    *("p", "p_adjusted", "n", "test", "role", "verdict", "note"),
)
_AHEAD = ("delta", "lower", "upper", "p")


def publish(
    result: LaserResult | SearchResult, loggers: Logger | Iterable[Logger], step: int = 0, prefix: str = "laser"
) -> None:
    """Send tables and pictures of ``result`` to ``loggers``, on the first rank.

    TensorBoard gets the tables as text, with plans in short, and a mark on the first word that only one model has
    written; a CSVLogger's folder gets a CSV file per table and a PNG file per picture.

    Args:
        result: of a comparison or a search.
        loggers: such as ``trainer.loggers``. One of a kind that is not known is warned about and left out.
        step: such as ``trainer.global_step``.
        prefix: of the names.
    """
    found = tables(result)
    for logger in [loggers] if isinstance(loggers, Logger) else loggers:
        if isinstance(logger, TensorBoardLogger):
            for name, table in found.items():
                logger.experiment.add_text(f"{prefix}/{name}", _markdown(table), step)
            for name, figure in figures(result).items():
                logger.experiment.add_figure(f"{prefix}/{name}", figure, step, close=False)
        elif isinstance(logger, WandbLogger):
            for name, table in found.items():
                rows = [[_plain(cell) for cell in row.values()] for row in table]
                logger.log_table(f"{prefix}/{name}", list(table[0]), rows, step=step)
            for name, figure in figures(result).items():
                logger.log_image(f"{prefix}/pictures/{name}", [figure], step=step)
        elif isinstance(logger, CSVLogger):
            folder = Path(logger.log_dir) / f"{prefix}-{step}"
            for name, table in found.items():
                write_atomically(folder / f"{name}.csv", _csv(table))
            save_figures(result, folder)
        else:
            kinds = "TensorBoard, CSV and Weights & Biases"
            rank_zero_warn(f"{type(logger).__name__} gets no tables and pictures, only the scalars: they go to {kinds}")


def tables(result: LaserResult | SearchResult) -> dict[str, Table]:
    """Flat tables by name, none of them empty.

    These are ``comparison``; ``written``, the examples fixed and broken, where answers were written; and of a search
    also ``candidates``.
    """
    compared = result.confirmed if isinstance(result, SearchResult) else result
    found = {} if compared is None else {"comparison": _comparison(compared), "written": _written(compared)}
    if isinstance(result, SearchResult):
        found["candidates"] = to_rows(result.candidates)
    return {name: table for name, table in found.items() if table}


def _comparison(result: LaserResult) -> Table:
    """One row per plan or control, and metric; of a control also what the plan has more (``ahead``)."""
    arms = [(name, "", arm) for name, arm in result.arms.items()]
    arms += [(name, kind, arm) for name, controls in result.controls.items() for kind, arm in controls.items()]
    table: Table = []
    for name, control, arm in arms:
        ahead = {row.metric: row.to_dict() for row in arm.ahead}
        for row in arm.rows:
            more = {f"ahead_{column}": ahead.get(row.metric, {}).get(column) for column in _AHEAD}
            own = {column: row.to_dict()[column] for column in _COLUMNS}
            table.append({"name": name, "control": control, "plan": arm.plan, **own, **more})
    return table


def _written(result: LaserResult) -> Table:
    """One row per plan, and example that it has fixed or broken, with what both models have written."""
    table: Table = []
    examples = result.examples.to_rows()
    for name in result.arms:
        row = flip_metric(result, name)
        for flip in [] if row is None else flips(examples, name, row):
            if flip.written_before:
                own = {"name": name, "outcome": flip.outcome}
                own |= {"id": flip.id, "prompt": flip.prompt, "answer": flip.answer}
                wrote = zip(("original", "reduced"), parted(flip.written_before, flip.written_after), strict=True)
                table.append(own | dict(wrote))
    return table


def _csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]))
    writer.writeheader()
    writer.writerows({column: _plain(cell) for column, cell in row.items()} for row in table)
    return text.getvalue()


def _markdown(table: Table) -> str:
    lines = [list(table[0]), ["---"] * len(table[0]), *([_text(*cell) for cell in row.items()] for row in table)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(cell: Any) -> Any:
    return "".join(cell) if isinstance(cell, Parted) else cell


def _text(column: str, cell: Any) -> str:
    if isinstance(cell, Parted):
        word = cell.other.lstrip()
        space = cell.other.removesuffix(word)
        marked = cell_text(f"{cell.same}{space}\0{word or '(end)'}\1{cell.rest}")
        return marked.replace("\0", "<strong>").replace("\1", "</strong>")
    if column in ("plan", "base") and cell:
        return cell_text(brief(cell))
    return cell_text("" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else cell)
