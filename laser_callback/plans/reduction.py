"""One cut of a plan: a :class:`Reduction` says which matrix and how much of it is kept, in Python or as text."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

import regex

from laser_callback.plans.rank_rules import RANK_RULES, Run, canonical_rule, fixed_rank, listed_places, mean_rank
from laser_callback.support.reading import shown
from laser_callback.support.suggest import clipped

STACK = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(\.\d+)*")
"""The path of a layer stack, or a part of it."""
_REDUCTION = re.compile(
    r"""^(?:/(?P<regex>[^/]+)/                                        # a pattern for the whole module name, or
      |(?:(?P<stack>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*(?:\.\d+)*?)\.)?  # stack
       (?P<layer>\*|-?\d{1,9}|\d{1,9}-\d{1,9})\.                      # layer
       (?P<matrix>[A-Za-z_]\w*(?:\.\w+)*))                            # kind, group or module name
      (?:\[(?P<expert>\d{1,9})\])?
      @(?P<rho>[^:@]+?)
      (?::(?P<options>.+))?$""",
    re.VERBOSE,
)
_NO_LAYER = re.compile(r"([A-Za-z_][\w.-]*)(@[^@]+)$")
"""A name as PEFT's ``target_modules`` has them."""
_ENDS = {"first": 0, "last": -1}
_OUTSIDE = re.compile(r"(?:^|\.)(?:wte|wpe|lm_head|\w*embed\w*)$")
"""Names of what no layer holds, in most models."""
_MATRIX = re.compile(r"[A-Za-z_]\w*(\.\w+)*|/[^/#\s]+/")  # no module name holds a slash, and `#` starts a comment


@dataclass(frozen=True)
class Reduction:
    """One cut: which matrix, and how much of it is kept.

    Every cut does the same: it lines up the components of the matrix from the largest to the smallest, takes out some
    of them, and multiplies these by ``scale``. With the defaults the components are the singular directions, and all
    but the first k are taken out: the truncated SVD.

    Args:
        layer: index in the layer stack; negative counts from the end; ``"20-27"`` is a range with both ends; ``"*"`` is
            every layer; ``None`` only with a ``/regex/`` as ``matrix``.
        matrix: a kind (``fc_in``), a group (``attn``, ``mlp``, ``writes``, ``all``), the end of a module's name
            (``mlp.down_proj``), or ``/regex/`` that matches a whole module name, whatever its layer.
        rho: the fraction of the maximum rank that is kept, in [0, 1] (paper, section 4: k = floor(rho * min(m, n)));
            0 is the zero matrix, 1 changes nothing. Or a rule in ``RANK_RULES`` of :mod:`laser_callback.plans`.
        stack: a part of the layer stack's path, where a model has several (``decoder``).
        expert: one expert of a mixture-of-experts matrix; all of them by default.
        keep: ``"head"`` keeps the first k components, ``"tail"`` removes these and keeps the others.
        band: with ``keep="head"``: how many are removed behind the first k, as a fraction like rho, in (0, 1]. The
            smallest stay if it does not reach to the end: rho 0.1 and band 0.6 keep the first 10 % and the last 30 %.
        scale: what is removed is multiplied by this factor instead of dropped; 0 drops it, 1 changes nothing.
        of: ``"rank"``: components are singular directions, as in the paper. ``"entries"``: they are the entries, from
            the largest magnitude on (the paper's code calls this pruning); rho and band are fractions of their number.
            ``"reference"``: singular directions as the paper's code finds them, by ``torch.svd_lowrank``.
        blocks: cut the rows in so many groups of neighbours, as equal as can be, and reduce each like a matrix of its
            own (arXiv 2510.20800).
        cut: ``"weight"``, or ``"delta"``: the difference to what the model was fine-tuned from, and nothing else
            (delta mode). Then a ``base`` is needed wherever the plan is used.
        metric: ``"inputs"`` takes the singular directions of the matrix in the metric of its inputs, those of W S with
            S S' their second moments, so that what is removed changes the outputs least (SVD-LLM, arXiv 2403.07378,
            section 3.1). They are not in the weights: a search finds them, and a recipe brings them along.
        norm: ``"whole"`` multiplies what is left so that it has the Frobenius norm of the whole (arXiv 2510.00553 does
            so with the first direction of what reinforcement learning has changed).
        bias: ``"cut"``, with a rho of 0: the layer's bias goes with its matrix, so that the layer gives nothing.
        noise: in place of the cut, add Gaussian noise with the Frobenius norm of what the cut removes; the number is
            its seed. For comparison: does any change of this size do the same?

    Raises:
        ValueError, TypeError: naming the field, what was expected and what was got.
    """

    layer: int | str | None
    matrix: str
    rho: float | str
    stack: str | None = None
    expert: int | None = None
    keep: str = "head"
    band: float = 1.0
    scale: float = 0.0
    of: str = "rank"
    blocks: int = 1
    cut: str = "weight"
    metric: str = "none"
    norm: str = "part"
    bias: str = "kept"
    noise: int | None = None

    def __post_init__(self) -> None:
        _check_layer(self.layer, self.matrix)
        if not isinstance(self.matrix, str):
            raise TypeError(f"`matrix` must be a kind, a group, a module name or /regex/, got {shown(self.matrix)}")
        if not _MATRIX.fullmatch(self.matrix):
            raise ValueError(f"`matrix` must be a kind, a group, a module name or /regex/, got {shown(self.matrix)}")
        if self.matrix.startswith("/"):
            try:
                regex.compile(self.matrix[1:-1])
            except (regex.error, RecursionError, OverflowError, MemoryError) as error:
                reason = str(error) or "it is nested too deeply"
                raise ValueError(f"`matrix` {shown(self.matrix)} is not a regular expression: {reason}") from None
        object.__setattr__(self, "rho", _check_rho(self.rho))
        if self.stack is not None and (not isinstance(self.stack, str) or not STACK.fullmatch(self.stack)):
            raise ValueError(f"`stack` must be (a part of) a layer stack's name or None, got {shown(self.stack)}")
        if self.stack is not None and self.layer is None:
            raise ValueError(f"`stack` goes with a `layer`; put {shown(self.stack)} into the /regex/ instead")
        if self.expert is not None and (type(self.expert) is not int or self.expert < 0):
            raise ValueError(f"`expert` must be a non-negative integer or None, got {shown(self.expert)}")
        for field, known in _WORDS.items():
            if getattr(self, field) not in known:
                names = ", ".join(map(repr, known[:-1]))
                raise ValueError(f"`{field}` must be {names} or {known[-1]!r}, got {shown(getattr(self, field))}")
        object.__setattr__(self, "band", _check_number(self.band, "band"))
        if not 0 < self.band <= 1:
            raise ValueError(f"`band` must be a number above 0 and at most 1, got {shown(self.band)}")
        if self.keep == "tail" and self.band != 1:
            raise ValueError(f"`band` goes with keep='head'; keep='tail' removes the first k, got band {self.band}")
        object.__setattr__(self, "scale", _check_number(self.scale, "scale"))
        if type(self.blocks) is not int or self.blocks < 1:
            raise ValueError(f"`blocks` must be a positive integer, got {shown(self.blocks)}")
        if self.noise is not None and (type(self.noise) is not int or self.noise < 0):
            raise ValueError(f"`noise` must be a seed, a non-negative integer, or None, got {shown(self.noise)}")
        self._check_together()

    def _check_together(self) -> None:
        """What each field says may be right, and both not."""
        joint = listed_places(self.rho) is not None or mean_rank(self.rho) is not None
        if self.of == "entries" and isinstance(self.rho, str):
            raise ValueError(f"`rho` must be a number with of='entries': the rule {self.rho!r} needs singular values")
        if self.of == "entries" and self.norm == "whole":
            raise ValueError("norm='whole' goes with of='rank': of entries it is not offered")
        if joint and (self.blocks != 1 or self.band != 1):
            raise ValueError(f"`blocks` and `band` do not go with {self.rho}: both count from the largest on")
        if self.bias == "cut":
            own = {"rho": self.rho, **{name: getattr(self, name) for name in ("keep", "of", "band", "norm")}}
            other = [f"{name} {value}" for name, value in own.items() if value != {**_OPTIONS, "rho": 0}[name]]
            if other:
                raise ValueError(f"bias='cut' goes with a cut that keeps nothing, rho 0, got {', '.join(other)}")
        if self.metric == "inputs" and (self.of != "rank" or self.blocks != 1 or self.norm != "part"):
            raise ValueError("metric='inputs' goes with of='rank', blocks=1 and norm='part', the plain cut")
        if self.metric == "inputs" and self.cut == "delta":
            raise ValueError(
                "metric='inputs' goes with cut='weight': nothing finds the directions of a difference in that metric. "
                "The difference is cut by its own directions, without `metric`"
            )
        if self.of == "reference":
            own = {name: getattr(self, name) for name in ("keep", "band", "scale", "blocks", "cut", "metric", "norm")}
            other = [name for name, value in own.items() if value != _OPTIONS[name]]
            if other or isinstance(self.rho, str):
                raise ValueError(
                    "of='reference' keeps the head at a numeric rho and drops the rest, as the paper's code does, got "
                    + (f"rho {self.rho}" if isinstance(self.rho, str) else ", ".join(other))
                )

    def __str__(self) -> str:
        stack = f"{self.stack}." if self.stack else ""
        layer = "" if self.layer is None else f"{self.layer}."
        expert = "" if self.expert is None else f"[{self.expert}]"
        rho = self.rho if isinstance(self.rho, str) else _number(self.rho)
        values = {name: getattr(self, name) for name, default in _OPTIONS.items() if getattr(self, name) != default}
        options = [f"{name}={_number(v) if isinstance(v, float) else v}" for name, v in values.items()]
        return f"{stack}{layer}{self.matrix}{expert}@{rho}{':' if options else ''}{','.join(options)}"

    def rank(self, max_rank: int) -> int:
        """The rank k = floor(rho * max_rank), at least 1 when rho > 0; or what ``k2`` or a list of places counts."""
        if (runs := listed_places(self.rho)) is not None:
            return sum(stop - start for start, stop in runs)
        if (rank := fixed_rank(self.rho)) is not None:
            return min(rank, max_rank)
        if isinstance(self.rho, str):
            raise TypeError(f"the rank of {self} depends on the spectrum; see `spectrum.Spectrum.rank`")
        if self.of == "reference":
            return int(max_rank * self.rho)  # in floating point, as in the paper's code: it may be one lower, and 0
        return part_of(self.rho, max_rank)

    @property
    def is_ruled(self) -> bool:
        """Whether its rank depends on singular values."""
        return isinstance(self.rho, str) and fixed_rank(self.rho) is None and listed_places(self.rho) is None

    def removed(self, first: int, size: int) -> tuple[Run, ...]:
        """Which of ``size`` components are removed, as ascending runs, if rho counts the ``first`` of them.

        Raises:
            ValueError: if rho lists a place that there is not.
        """
        counted: tuple[Run, ...] = ((0, first),)
        if (listed := listed_places(self.rho)) is not None:
            counted = listed
            if counted[-1][1] > size:
                raise ValueError(f"{clipped(self)} names place {counted[-1][1] - 1}, of {size}, counted from 0")
        if self.keep == "tail":
            removed = counted
        elif listed is None:
            removed = ((first, min(first + part_of(self.band, size), size)),)
        else:
            ends = [0, *(end for run in counted for end in run), size]
            removed = tuple(zip(ends[::2], ends[1::2], strict=True))
        return tuple((start, stop) for start, stop in removed if start < stop)

    @property
    def is_spectral(self) -> bool:
        """Whether it takes out singular directions of the whole matrix, or of its difference to the base."""
        return self.of == "rank" and self.blocks == 1 and self.metric == "none"

    @property
    def is_scaling(self) -> bool:
        """Whether it multiplies the whole matrix by ``scale``, for which nothing needs to be known of it."""
        return self.rho == 0 and self.keep == "head" and self.band == 1 and self.norm == "part" and self.of == "rank"

    @property
    def needs_inputs(self) -> bool:
        """Whether what it keeps is not in the weights: it follows from what goes into the matrix."""
        return self.metric == "inputs" and not self.is_scaling

    @property
    def is_truncation(self) -> bool:
        """True for the plain truncated SVD of the whole matrix: the first k singular directions and nothing else."""
        return all(getattr(self, name) == default for name, default in _OPTIONS.items())

    @classmethod
    def parse(cls, text: str) -> Reduction:
        """Read one reduction from its text form, ``[stack.]layer.matrix[expert]@(rho|rule)[:option=value,...]``."""
        match = _REDUCTION.match(text.strip())
        if match is None:
            raise ValueError(
                f"cannot read the reduction {shown(text.strip())}: expected "
                "[stack.]layer.matrix[expert]@rho[:option=value,...], e.g. 27.fc_in@0.01 or decoder.-1.mlp@0.1"
                + _without_layer(text.strip())
            )
        part = match.groupdict()
        options: dict[str, Any] = {}
        for option in (part["options"] or "").split(","):
            key, equals, value = (piece.strip() for piece in option.partition("="))
            if not option:
                continue
            if not equals or key not in _OPTIONS or key in options:
                known = ", ".join(f"{name}=" for name in _OPTIONS)
                raise ValueError(
                    f"cannot read the option {shown(option)} in {shown(text.strip())}: options are {known}"
                )
            options[key] = _int(value, key) if key in ("blocks", "noise") else value
        layer = part["layer"]
        return cls(
            layer=int(layer) if layer and re.fullmatch(r"-?\d+", layer) else layer,
            matrix=f"/{part['regex']}/" if part["regex"] else part["matrix"],
            rho=part["rho"].strip(),
            stack=part["stack"],
            expert=None if part["expert"] is None else int(part["expert"]),
            **options,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults; the inverse of ``Reduction(**fields)``."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


_OPTIONS = {f.name: f.default for f in fields(Reduction) if f.name not in ("layer", "matrix", "rho", "stack", "expert")}
_WORDS = {
    "keep": ("head", "tail"),
    "of": ("rank", "entries", "reference"),
    "cut": ("weight", "delta"),
    "metric": ("none", "inputs"),
    "norm": ("part", "whole"),
    "bias": ("kept", "cut"),
}


def _without_layer(text: str) -> str:
    """What may be meant by a name without the number of a layer."""
    name = _NO_LAYER.match(text)
    if name is None:
        return ""
    if end := re.match(r"(?:(.+)\.)?(first|last)\.(.+)", name[1]):
        stack = f"{end[1]}." if end[1] else ""
        return f"; of the {end[2]} layer: {clipped(f'{stack}{_ENDS[end[2]]}.{end[3]}{name[2]}')}"
    if _OUTSIDE.search(name[1]):
        pattern = re.escape(name[1])
        return f"; outside of all layers, by its module's name: {clipped(f'/(.*[.])?{pattern}/{name[2]}')}"
    matrix = "all" if name[1] == "all-linear" else name[1]
    return f"; in every layer: {clipped(f'*.{matrix}{name[2]}')}"


def _check_layer(layer: Any, matrix: Any) -> None:
    is_regex = isinstance(matrix, str) and len(matrix) > 2 and matrix[0] == matrix[-1] == "/"
    if is_regex != (layer is None):
        raise ValueError(
            f"`layer` must be given, except with a /regex/ as `matrix`; got {shown(layer)} with {shown(matrix)}"
        )
    if layer is None or layer == "*" or (isinstance(layer, int) and not isinstance(layer, bool)):
        return
    match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", layer) if isinstance(layer, str) else None
    if match and int(match[1]) <= int(match[2]):
        return
    raise ValueError(f"`layer` must be an integer, a range such as '20-27', or '*', got {shown(layer)}")


def _check_rho(rho: Any) -> float | str:
    if isinstance(rho, str) and (rule := canonical_rule(rho)):
        return rule
    wanted = f"a number in [0, 1] or one of {', '.join(RANK_RULES)}"
    if isinstance(rho, str) and (percent := re.fullmatch(r"(\d\d?(?:\.\d{1,9})?|100)\s*%", rho)):
        raise ValueError(f"`rho` must be {wanted}, got {shown(rho)}, did you mean {float(percent[1]) / 100:.12g}?")
    number = _check_number(rho, "rho", wanted)
    if not 0 <= number <= 1:
        raise ValueError(f"`rho` must be {wanted}, got {shown(rho)}")
    return number


def _check_number(value: Any, field: str, wanted: str = "a finite number") -> float:
    """``value`` as a float; it may be text, since YAML reads 1e-3 as such."""
    number = None if isinstance(value, bool) or not isinstance(value, (int, float, str)) else value
    with suppress(ValueError, OverflowError):
        number = None if number is None else float(number)
    if not isinstance(number, float) or not math.isfinite(number):
        raise ValueError(f"`{field}` must be {wanted}, got {shown(value)}")
    return number + 0.0  # no -0.0, which the text form does not show


def part_of(share: float, size: int) -> int:
    """``share`` of ``size``, rounded down, but of a share above 0 at least 1.

    The product is rounded to 9 decimals before the floor, since 0.29 * 100 is 28.999... in binary.
    """
    return max(math.floor(round(share * size, 9)), 1 if share > 0 else 0)


def _int(text: str, field: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise ValueError(f"`{field}` must be an integer from 0 on, got {shown(text)}")
    return int(text)


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)
