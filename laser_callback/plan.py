"""What to cut: a :class:`Reduction` is one (layer, matrix, rho), a :class:`LaserPlan` a set of them.

A plan is data: it names matrices and does not hold any. ``plan.resolve(model)`` finds what it names. The same plan has
a text form (``27.fc_in@0.01, -1.fc_out@0.1``), a YAML and a JSON form, and each converts into the others without loss.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from laser_callback.matrices import GROUPS, KINDS, WeightMatrix, describe, find_matrices

RANK_RULES = ("entropy", "gavish-donoho", "marchenko-pastur")
"""Names that may stand in place of a number for rho: the rank is chosen from the matrix' spectrum alone."""

_REDUCTION = re.compile(
    r"""^(?:/(?P<regex>.+)/                                           # a pattern for the whole module name, or
      |(?:(?P<stack>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*(?:\.\d+)*?)\.)?  # stack
       (?P<layer>\*|-?\d+|\d+-\d+)\.                                  # layer
       (?P<matrix>[A-Za-z_]\w*(?:\.\w+)*))                            # kind, group or module name
      (?:\[(?P<expert>\d+)\])?
      @(?P<rho>[^:@]+?)
      (?::(?P<options>.+))?$""",
    re.VERBOSE,
)
_STACK = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(\.\d+)*")
_MATRIX = re.compile(r"[A-Za-z_]\w*(\.\w+)*|/[^/#\s]+/")  # no module name holds a slash, and `#` starts a comment
_PAPER_NAMES = {
    "U_in": "fc_in",
    "U_out": "fc_out",
    "W_q": "q_proj",
    "W_k": "k_proj",
    "W_v": "v_proj",
    "W_o": "out_proj",
}


@dataclass(frozen=True)
class Reduction:
    """One cut: which matrix, and how much of it is kept.

    Args:
        layer: index in the layer stack; negative counts from the end; ``"20-27"`` is a range with both ends; ``"*"`` is
            every layer; ``None`` only with a ``/regex/`` as ``matrix``.
        matrix: a kind (``fc_in``), a group (``attn``, ``mlp``, ``all``), the end of a module's name
            (``mlp.down_proj``), or ``/regex/`` that matches a whole module name, whatever its layer.
        rho: the fraction of the maximum rank that is kept, in [0, 1] (paper, section 4: k = floor(rho * min(m, n)));
            0 is the zero matrix, 1 changes nothing. Or the name of a rule in :data:`RANK_RULES`.
        stack: a part of the layer stack's path, where a model has several (``decoder``).
        expert: one expert of a mixture-of-experts matrix; all of them by default.
        keep: ``"head"`` keeps the k largest singular values, ``"tail"`` keeps the others instead.
        scale: what is removed is multiplied by this factor instead of dropped; 0 drops it, 1 changes nothing.

    Raises:
        ValueError, TypeError: naming the field, what was expected and what was got.
    """

    layer: int | str | None
    matrix: str
    rho: float | str
    stack: str | None = None
    expert: int | None = None
    keep: str = "head"
    scale: float = 0.0

    def __post_init__(self) -> None:
        _check_layer(self.layer, self.matrix)
        if not isinstance(self.matrix, str):
            raise TypeError(f"`matrix` must be a kind, a group, a module name or /regex/, got {self.matrix!r}")
        if not _MATRIX.fullmatch(self.matrix):
            raise ValueError(f"`matrix` must be a kind, a group, a module name or /regex/, got {self.matrix!r}")
        if self.matrix.startswith("/"):
            try:
                re.compile(self.matrix[1:-1])
            except re.error as error:
                raise ValueError(f"`matrix` {self.matrix!r} is not a regular expression: {error}") from None
        object.__setattr__(self, "rho", _check_rho(self.rho))
        if self.stack is not None and (not isinstance(self.stack, str) or not _STACK.fullmatch(self.stack)):
            raise ValueError(f"`stack` must be (a part of) a layer stack's name or None, got {self.stack!r}")
        if self.stack is not None and self.layer is None:
            raise ValueError(f"`stack` goes with a `layer`; put {self.stack!r} into the /regex/ instead")
        if self.expert is not None and (type(self.expert) is not int or self.expert < 0):
            raise ValueError(f"`expert` must be a non-negative integer or None, got {self.expert!r}")
        if self.keep not in ("head", "tail"):
            raise ValueError(f"`keep` must be 'head' or 'tail', got {self.keep!r}")
        if isinstance(self.scale, str):  # YAML reads 1e-3 as text
            object.__setattr__(self, "scale", _float(self.scale, "scale"))
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale):
            raise ValueError(f"`scale` must be a finite number, got {self.scale!r}")
        object.__setattr__(self, "scale", float(self.scale) + 0.0)  # no -0.0, which the text form does not show

    def __str__(self) -> str:
        stack = f"{self.stack}." if self.stack else ""
        layer = "" if self.layer is None else f"{self.layer}."
        expert = "" if self.expert is None else f"[{self.expert}]"
        rho = self.rho if isinstance(self.rho, str) else _number(self.rho)
        options = [f"keep={self.keep}"] if self.keep != "head" else []
        options += [f"scale={_number(self.scale)}"] if self.scale != 0 else []
        return f"{stack}{layer}{self.matrix}{expert}@{rho}{':' if options else ''}{','.join(options)}"

    def rank(self, max_rank: int) -> int:
        """The rank k = floor(rho * max_rank), at least 1 when rho > 0. Only for a numeric rho.

        The product is rounded to 9 decimals before the floor, since 0.29 * 100 is 28.999... in binary.
        """
        if isinstance(self.rho, str):
            raise TypeError(f"the rank of {self} depends on the spectrum; see `spectrum.Spectrum.rank`")
        return max(math.floor(round(self.rho * max_rank, 9)), 1 if self.rho > 0 else 0)

    @classmethod
    def parse(cls, text: str) -> Reduction:
        """Read one reduction from its text form, ``[stack.]layer.matrix[expert]@(rho|rule)[:option=value,...]``."""
        match = _REDUCTION.match(text.strip())
        if match is None:
            raise ValueError(
                f"cannot read the reduction {text.strip()!r}: expected "
                "[stack.]layer.matrix[expert]@rho[:option=value,...], e.g. 27.fc_in@0.01 or decoder.-1.mlp@0.1"
            )
        part = match.groupdict()
        options: dict[str, Any] = {}
        for option in (part["options"] or "").split(","):
            key, equals, value = (piece.strip() for piece in option.partition("="))
            if not option:
                continue
            if not equals or key not in ("keep", "scale") or key in options:
                raise ValueError(f"cannot read the option {option!r} in {text.strip()!r}: options are keep=, scale=")
            options[key] = _float(value, key) if key == "scale" else value
        layer = part["layer"]
        return cls(
            layer=int(layer) if layer and re.fullmatch(r"-?\d+", layer) else layer,
            matrix=f"/{part['regex']}/" if part["regex"] else part["matrix"],
            rho=part["rho"].strip() if part["rho"].strip() in RANK_RULES else _float(part["rho"], "rho"),
            stack=part["stack"],
            expert=None if part["expert"] is None else int(part["expert"]),
            **options,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults; the inverse of ``Reduction(**fields)``."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True, eq=False)
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
        object.__setattr__(self, "reductions", tuple(reductions))
        if not self.reductions:
            raise ValueError("`reductions` must hold at least one Reduction, got none")
        for reduction in self.reductions:
            if not isinstance(reduction, Reduction):
                raise TypeError(f"`reductions` must hold Reduction objects, got {type(reduction).__name__}")
        targets = [(r.stack, r.layer, r.matrix, r.expert) for r in self.reductions]
        for reduction, target in zip(self.reductions, targets, strict=True):
            if targets.count(target) > 1:
                raise ValueError(f"the plan names one matrix twice: {reduction}")

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

    @classmethod
    def parse(cls, text: str) -> LaserPlan:
        """Read a plan from its text form: reductions separated by commas or line breaks.

        >>> LaserPlan.parse("27.fc_in@0.01, -1.fc_out@0.1") == LaserPlan.parse("-1.fc_out@0.1, 27.fc_in@0.01")
        True
        """
        if not isinstance(text, str):
            raise TypeError(f"`text` must be a string such as '27.fc_in@0.01', got {type(text).__name__}")
        # A comma inside /.../ belongs to the regular expression; one before `option=` continues the options.
        pieces = [piece for piece in re.split(r"[,\n](?=(?:[^/]*/[^/]*/)*[^/]*$)", text) if piece.strip()]
        reductions: list[str] = []
        for piece in pieces:
            if reductions and "@" not in piece and "=" in piece:
                reductions[-1] += "," + piece
            else:
                reductions.append(piece)
        return cls(Reduction.parse(reduction) for reduction in reductions)

    @classmethod
    def of(cls, plan: LaserPlan | str | Mapping[str, Any] | Iterable[Any]) -> LaserPlan:
        """A plan from a plan, its text, its dictionary form, or an iterable of reductions (objects, text or fields)."""
        if isinstance(plan, LaserPlan):
            return plan
        if isinstance(plan, str):
            return cls.parse(plan)
        if isinstance(plan, Mapping):
            if set(plan) != {"reductions"}:
                raise ValueError(f"a plan's dictionary has the one key 'reductions', got {sorted(map(str, plan))}")
            plan = plan["reductions"]
        if not isinstance(plan, Iterable):
            raise TypeError(f"`plan` must be a LaserPlan, its text or a list of reductions, got {type(plan).__name__}")
        return cls(_reduction_of(item) for item in plan)

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
        return cls([Reduction(layer="*" if ell == -1 else ell, matrix=matrix, rho=rho)])

    @classmethod
    def from_file(cls, path: str | Path) -> LaserPlan:
        """Read a plan from ``.yaml``/``.yml``, ``.json``, or else text (``#`` starts a comment)."""
        path = Path(path)
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml"):
            return cls.of(yaml.safe_load(text))
        if path.suffix == ".json":
            return cls.of(json.loads(text))
        return cls.parse("\n".join(line.partition("#")[0] for line in text.splitlines()))

    def to_file(self, path: str | Path) -> None:
        """Write the plan in the form that the file's ending names; see :meth:`from_file`."""
        path = Path(path)
        if path.suffix in (".yaml", ".yml"):
            path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")
        elif path.suffix == ".json":
            path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        else:
            path.write_text("\n".join(map(str, self.reductions)) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """``{"reductions": [{"layer": 27, "matrix": "fc_in", "rho": 0.01}, ...]}``"""
        return {"reductions": [reduction.to_dict() for reduction in self.reductions]}

    def resolve(self, model: nn.Module | Sequence[WeightMatrix]) -> list[tuple[WeightMatrix, Reduction]]:
        """The matrices of ``model`` (or of what was found in one) that the plan names, in the model's order.

        Raises:
            ValueError: if a reduction matches nothing (the message lists what exists), is ambiguous, or two reductions
                meet in one matrix.
        """
        matrices = find_matrices(model) if isinstance(model, nn.Module) else list(model)
        chosen: dict[int, Reduction] = {}
        for reduction in self.reductions:
            for position in _select(matrices, reduction):
                if position in chosen:
                    raise ValueError(
                        f"the reductions {chosen[position]} and {reduction} both cut `{matrices[position].name}`"
                    )
                chosen[position] = reduction
        return [(matrices[position], chosen[position]) for position in sorted(chosen)]


# ---- selection -------------------------------------------------------------------------------------------------------


def _select(matrices: list[WeightMatrix], reduction: Reduction) -> list[int]:
    """Positions of the matrices that a reduction names."""
    candidates = [i for i, matrix in enumerate(matrices) if _matches_name(matrix, reduction)]
    if reduction.layer is not None:
        candidates = [i for i in candidates if _matches_stack(matrices[i], reduction)]
        depth: Counter[str | None] = Counter()
        for matrix in matrices:
            depth[matrix.stack] = max(depth[matrix.stack], 1 + (matrix.layer or 0))
        candidates = [i for i in candidates if matrices[i].layer in _layers(reduction.layer, depth[matrices[i].stack])]
        stacks = {matrices[i].stack for i in candidates}
        if len(stacks) > 1:
            names = ", ".join(sorted(str(stack) for stack in stacks))
            part = _STACK.search(min(map(str, stacks)))
            raise ValueError(
                f"the reduction {reduction} fits several layer stacks ({names}): put the stack's name in front"
                + (f", e.g. {replace(reduction, stack=part[0])}" if part else "")
            )
    if reduction.expert is not None:
        candidates = [i for i in candidates if matrices[i].expert == reduction.expert]
    if not candidates:
        raise ValueError(f"the reduction {reduction} matches no matrix of the model. It has:\n{describe(matrices)}")
    for i in candidates:
        if matrices[i].kind is None and len(matrices[i].parameter_names) > 1:
            names = ", ".join(matrices[i].parameter_names)
            raise ValueError(f"the reduction {reduction} would cut a tied weight, and with it each of {names}")
    return candidates


def _matches_name(matrix: WeightMatrix, reduction: Reduction) -> bool:
    wanted = reduction.matrix
    if wanted.startswith("/"):
        # A module by its name or a parameter by any of its names: a tied weight is refused rather than not found.
        names = [re.sub(r"\[\d+\]$", "", matrix.name), re.sub(r"\[.*", "", matrix.name)]
        names += [name.removesuffix(".weight") for name in matrix.parameter_names]
        return any(re.fullmatch(wanted[1:-1], name) for name in names)
    if wanted in GROUPS:
        return matrix.kind in GROUPS[wanted]
    if wanted in KINDS:
        return matrix.kind == wanted
    path = re.sub(r"\[.*", "", matrix.path_in_layer) or "weight"
    # `q_proj` of PEFT is a module around `q_proj.base_layer`: the name of the model as it was works too.
    return any(f".{name}".endswith(f".{wanted}") for name in (path, path.removesuffix(".base_layer")))


def _matches_stack(matrix: WeightMatrix, reduction: Reduction) -> bool:
    if matrix.stack is None:
        return False
    # `decoder` names the stack `model.decoder.layers`; `decoder.layers` and the full path do so too.
    wanted = reduction.stack
    return wanted is None or f".{wanted}." in f".{matrix.stack}."


def _layers(layer: int | str, depth: int) -> range:
    if layer == "*":
        return range(depth)
    if isinstance(layer, str):
        first, last = map(int, layer.split("-"))
        return range(first, last + 1) if last < depth else range(0)
    index = layer + depth if layer < 0 else layer
    return range(index, index + 1)


# ---- validation ------------------------------------------------------------------------------------------------------


def _check_layer(layer: Any, matrix: Any) -> None:
    is_regex = isinstance(matrix, str) and len(matrix) > 2 and matrix[0] == matrix[-1] == "/"
    if is_regex != (layer is None):
        raise ValueError(f"`layer` must be given, except with a /regex/ as `matrix`; got {layer!r} with {matrix!r}")
    if layer is None or layer == "*" or (isinstance(layer, int) and not isinstance(layer, bool)):
        return
    match = re.fullmatch(r"(\d+)-(\d+)", layer) if isinstance(layer, str) else None
    if match and int(match[1]) <= int(match[2]):
        return
    raise ValueError(f"`layer` must be an integer, a range such as '20-27', or '*', got {layer!r}")


def _check_rho(rho: Any) -> float | str:
    if isinstance(rho, str):
        return rho if rho in RANK_RULES else _check_rho(_float(rho, "rho"))
    if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not 0 <= rho <= 1:  # NaN fails the comparison
        raise ValueError(f"`rho` must be a number in [0, 1] or one of {', '.join(RANK_RULES)}, got {rho!r}")
    return float(rho)


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


def _float(text: str, field: str) -> float:
    try:
        return float(text)
    except ValueError:
        rules = f" or one of {', '.join(RANK_RULES)}" if field == "rho" else ""
        raise ValueError(f"`{field}` must be a number{rules}, got {text.strip()!r}") from None


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)
