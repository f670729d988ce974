"""What to cut: a :class:`LaserPlan` is a set of reductions.

A plan is data: it names matrices and does not hold any. ``plan.resolve(model)`` finds what it names. The same plan has
a text form (``27.fc_in@0.01, -1.fc_out@0.1``), a YAML and a JSON form, and each converts into the others without loss.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from laser_callback.plans.kinds import GROUPS, KINDS
from laser_callback.plans.matrices import WeightMatrix, find_matrices
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.selection import Catalogue, UncuttableError, select
from laser_callback.plans.short import brief
from laser_callback.support.files import need_files, write_atomically
from laser_callback.support.reading import read_plain, read_text, shown
from laser_callback.support.suggest import clipped

_PAPER_NAMES = {
    "U_in": "fc_in",
    "U_out": "fc_out",
    "W_q": "q_proj",
    "W_k": "k_proj",
    "W_v": "v_proj",
    "W_o": "out_proj",
}
_FILES = (".yaml", ".yml", ".json", ".txt")


@dataclass(frozen=True, eq=False, repr=False)
class LaserPlan:
    """A set of reductions. Order carries no meaning: equality and hash ignore it.

    Args:
        reductions: any iterable of :class:`Reduction`.

    Raises:
        ValueError: if it is empty or names one matrix twice in the same words (overlap in other words is found when the
            plan meets a model, in :meth:`resolve`).
    """

    reductions: tuple[Reduction, ...]

    def __init__(self, reductions: Iterable[Reduction]) -> None:
        if isinstance(reductions, str):
            raise TypeError(
                f"`reductions` must be Reduction objects; text is read by LaserPlan.parse({shown(reductions)})"
            )
        object.__setattr__(self, "reductions", tuple(reductions))
        if not self.reductions:
            raise ValueError("`reductions` must hold at least one Reduction, got none")
        for reduction in self.reductions:
            if not isinstance(reduction, Reduction):
                raise TypeError(f"`reductions` must hold Reduction objects, got {type(reduction).__name__}")
        targets = Counter((r.stack, r.layer, r.matrix, r.expert) for r in self.reductions)
        for r in self.reductions:
            if targets[r.stack, r.layer, r.matrix, r.expert] > 1:
                raise ValueError(f"the plan names one matrix twice: {clipped(r)}")

    def __iter__(self) -> Iterator[Reduction]:
        return iter(self.reductions)

    def __len__(self) -> int:
        return len(self.reductions)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LaserPlan) and frozenset(self.reductions) == frozenset(other.reductions)

    def __hash__(self) -> int:
        return hash(frozenset(self.reductions))

    def __str__(self) -> str:
        return ", ".join(map(str, self.reductions))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({brief(self)!r})"

    @property
    def directions(self) -> Any:
        """What its cuts need and the weights do not say: a recipe may bring it along, a plan alone has none."""
        return None

    def check_weights(self, found: Iterable[WeightMatrix], base: Any) -> None:
        """Look whether a recipe was made for the matrices that it has ``found``; a plan alone is for any."""

    def part(self, reductions: Collection[Reduction]) -> LaserPlan:
        """These of its reductions."""
        return LaserPlan(reductions)

    @property
    def needs_directions(self) -> bool:
        """Whether it cuts in the metric of the inputs anywhere, and so needs :attr:`directions`."""
        return any(reduction.needs_inputs for reduction in self.reductions)

    @property
    def cuts_delta(self) -> bool:
        """Whether it cuts the difference to a base anywhere, and so needs one."""
        return any(reduction.cut == "delta" for reduction in self.reductions)

    @classmethod
    def parse(cls, text: str) -> LaserPlan:
        """Read a plan from its text form: reductions separated by commas or line breaks.

        >>> LaserPlan.parse("27.fc_in@0.01, -1.fc_out@0.1") == LaserPlan.parse("-1.fc_out@0.1, 27.fc_in@0.01")
        True
        """
        if not isinstance(text, str):
            raise TypeError(f"`text` must be a string such as '27.fc_in@0.01', got {type(text).__name__}")
        reductions: list[list[str]] = []
        for piece in pieces(text):
            # A comma before `option=` continues the options.
            if reductions and "@" not in piece and "=" in piece:
                reductions[-1].append(piece)
            else:
                reductions.append([piece])
        return LaserPlan(Reduction.parse(",".join(reduction)) for reduction in reductions)

    @classmethod
    def of(cls, plan: LaserPlan | str | Mapping[str, Any] | Iterable[Any]) -> LaserPlan:
        """A plan from a plan, its text or file, its dictionary, or an iterable of reductions, their texts or fields.

        Raises:
            FileNotFoundError: if text is named like a file, and there is none.
        """
        if isinstance(plan, LaserPlan):
            return plan
        if isinstance(plan, str):
            if Path(plan).suffix in _FILES:
                need_files(plan=plan)
            return cls.from_file(plan) if os.path.isfile(plan) else cls.parse(plan)
        if isinstance(plan, Mapping):
            if "matrices" in plan:
                raise ValueError(
                    "this is a recipe, whose hashes and stored directions a plan would lose: give it, or its file, in "
                    "place of the plan, or read it with `laser_callback.surgery.Recipe.of`"
                )
            if set(plan) != {"reductions"}:
                raise ValueError(f"a plan's dictionary has the one key 'reductions', got {sorted(map(str, plan))}")
            plan = plan["reductions"]
            if isinstance(plan, (str, Mapping)):
                raise ValueError(f"`reductions` must be a list, got {shown(plan)}")
        if not isinstance(plan, Iterable):
            raise TypeError(f"`plan` must be a LaserPlan, its text or a list of reductions, got {type(plan).__name__}")
        return LaserPlan(_reduction_of(item) for item in plan)

    @classmethod
    def from_paper(cls, tau: str, ell: int, rho: float) -> LaserPlan:
        """A plan from the paper's triple (arXiv 2312.13558, section 4 and Table 1).

        Args:
            tau: the matrix type: ``U_in``, ``U_out``, ``W_q``, ``W_k``, ``W_v``, ``W_o`` (or a kind or group of this
                package). For gated MLPs U_in is the gate projection, as in the reference implementation.
            ell: the layer; -1 means every layer, as in the reference implementation.
            rho: the fraction of the maximum rank that is kept.
        """
        matrix = _PAPER_NAMES.get(tau, tau)
        if matrix not in KINDS and matrix not in GROUPS:
            known = ", ".join([*_PAPER_NAMES, *KINDS, *GROUPS])
            raise ValueError(f"`tau` must be one of {known}, got {tau!r}")
        return LaserPlan([Reduction(layer="*" if ell == -1 else ell, matrix=matrix, rho=rho)])

    @classmethod
    def from_file(cls, path: str | Path) -> LaserPlan:
        """Read a plan from ``.yaml``/``.yml``, ``.json``, or else text (``#`` starts a comment)."""
        path = Path(path)
        if path.suffix in (".yaml", ".yml", ".json"):
            return read_plain(path, "plan", cls._of_data)
        text = read_text(path, "plan")
        try:
            return cls.parse("\n".join(line.partition("#")[0] for line in text.split("\n")))
        except ValueError as error:
            raise ValueError(f"`plan`: {path}: {error}") from error

    @classmethod
    def _of_data(cls, data: Any) -> LaserPlan:
        """A plan from what a file holds: text in it is a plan's, and names no other file."""
        if isinstance(data, str):
            return cls.parse(data)
        if not isinstance(data, (Mapping, list)):
            raise ValueError(f"expected a plan, {{reductions: [...]}}, its text or a list, got {shown(data)}")
        return cls.of(data)

    def to_file(self, path: str | Path) -> None:
        """Write the plan in the form that the file's ending names; see :meth:`from_file`."""
        path = Path(path)
        if path.suffix in (".yaml", ".yml"):
            text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        elif path.suffix == ".json":
            text = json.dumps(self.to_dict(), indent=2) + "\n"
        else:
            text = "\n".join(map(str, self.reductions)) + "\n"
        write_atomically(path, text)

    def to_dict(self) -> dict[str, Any]:
        """``{"reductions": [{"layer": 27, "matrix": "fc_in", "rho": 0.01}, ...]}``"""
        return {"reductions": [reduction.to_dict() for reduction in self.reductions]}

    def resolve(self, model: nn.Module | Sequence[WeightMatrix]) -> list[tuple[WeightMatrix, Reduction]]:
        """The matrices of ``model`` (or of what was found in one) that the plan names, in the model's order.

        Where a reduction cuts biases too, each stands behind its matrix.

        Raises:
            ValueError: if a reduction matches nothing (the message lists what exists), is ambiguous, names what cannot
                be cut (then also a TypeError), or two reductions meet in one matrix.
        """
        found = find_matrices(model) if isinstance(model, nn.Module) else model
        matrices = found if isinstance(found, Catalogue) else Catalogue(found)
        chosen: dict[int, Reduction] = {}
        for reduction in self.reductions:
            for position in select(matrices, reduction):
                if position in chosen:
                    one, other = clipped(chosen[position]), clipped(reduction)
                    raise ValueError(f"the reductions {one} and {other} both cut `{matrices[position].name}`")
                chosen[position] = reduction
        resolved: list[tuple[WeightMatrix, Reduction]] = []
        for position in sorted(chosen):
            matrix, reduction = matrices[position], chosen[position]
            resolved.append((matrix, reduction))
            if reduction.bias == "cut" and (bias := matrix.bias) is not None:
                if bias.obstacle:
                    raise UncuttableError(f"the reduction {clipped(reduction)} cuts `{bias.name}`: {bias.obstacle}")
                resolved.append((bias, reduction))
        return resolved


def check_base(plans: Iterable[LaserPlan], given: bool) -> None:
    """Look whether there is a base where one is needed, and none where none is.

    Raises:
        ValueError: naming a plan, and what to do.
    """
    plans = tuple(plans)
    needs = [plan for plan in plans if plan.cuts_delta]
    if needs and not given:
        raise ValueError(
            f"the plan {brief(needs[0])} cuts the difference to what the model was fine-tuned from: give that as "
            "`base`, on the command line --base"
        )
    if given and not needs:
        raise ValueError(
            f"`base` is given, and {brief(plans[0])} cuts the weights themselves: to cut the difference to the base "
            "add cut=delta to the plan, as in 27.fc_in@0.1:cut=delta; else leave `base` out"
        )


def check_directions(plans: Iterable[LaserPlan]) -> None:
    """Look whether the plans that need directions which are in no weights bring them along.

    Raises:
        ValueError: naming a reduction, and what to do.
    """
    for plan in plans:
        if plan.needs_directions and plan.directions is None:
            raise ValueError(
                f"the plan {brief(plan)} cuts in the metric of the inputs, and what it keeps is neither in the weights "
                "nor in a plan's text: give the recipe in its place, the search's `result.recipe` or its file"
            )


def pieces(text: str) -> list[str]:
    """What stands between commas or line breaks; those inside of /.../ belong to the regular expression."""
    return [piece for piece in re.findall(r"(?:/[^/]*/|[^,\n])+", text) if piece.strip()]


# ---- validation ------------------------------------------------------------------------------------------------------


def _reduction_of(item: Any) -> Reduction:
    if isinstance(item, Reduction):
        return item
    if isinstance(item, str):
        return Reduction.parse(item)
    if isinstance(item, Mapping):
        unknown = set(item) - {f.name for f in fields(Reduction)}
        missing = {"matrix", "rho"} - set(item)
        if unknown or missing:
            problem = f"unknown {sorted(unknown)}" if unknown else f"missing {sorted(missing)}"
            raise ValueError(f"a reduction has the fields {', '.join(f.name for f in fields(Reduction))}: {problem}")
        return Reduction(**{"layer": None, **item})
    raise TypeError(f"a reduction must be a Reduction, its text or its fields, got {type(item).__name__}")
