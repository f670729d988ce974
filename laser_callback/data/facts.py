"""Facts: what a language model is asked, from a file to disjoint sets.

Contract: a :class:`Fact` that exists is well-formed; :func:`read_facts` names file, line and reason of a row that is
not; :func:`split_facts` deals facts to sets that share no subject. Nothing here knows tokens or batches.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from laser_callback.support.files import need_files
from laser_callback.support.reading import need_unicode, read_text, shown
from laser_callback.support.suggest import clipped

DEFAULT_SIZES: Mapping[str, float] = {"screen": 0.1, "race": 0.3, "confirm": 0.4, "guard": 0.2}
"""Shares of the four sets. ``confirm`` is the largest, since only its number is a result."""


class Record(Protocol):
    """What a row of a file becomes."""

    @property
    def id(self) -> str:
        """Unique name within a data set."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any], default_id: str) -> Record:
        """Build it from a row, or raise a ValueError that says what is wrong with it."""


R = TypeVar("R", bound=Record)

# ---------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True)
class Neighbour:
    """A prompt near to a fact, with an answer of its own, which a change of the model should leave as it is.

    Attributes:
        prompt: text before the answer, without a trailing space.
        answer: the right answer, without spaces around it.

    Raises:
        ValueError: if one of them is no such text.
    """

    prompt: str
    answer: str

    def __post_init__(self) -> None:
        for name in ("prompt", "answer"):
            if not isinstance(value := getattr(self, name), str):
                raise ValueError(f"`{name}` must be a string, got {shown(value)}.")
            need_unicode(**{name: value})
        _check_prompt("prompt", self.prompt)
        _check_answer("answer", self.answer)

    @classmethod
    def from_row(cls, row: Any) -> Neighbour:
        """Build it from a mapping with these two fields; others are ignored.

        Raises:
            ValueError: as the class, and if one of them is missing.
        """
        if not isinstance(row, Mapping):
            raise ValueError(f"it must be an object with `prompt` and `answer`, got {shown(row)}.")
        for name in ("prompt", "answer"):
            if row.get(name) is None:
                raise ValueError(f"`{name}` is missing; it has {sorted(map(str, row))}.")
        return cls(row["prompt"], row["answer"])


def _check_prompt(name: str, text: str) -> None:
    if not text.strip() or text.endswith(" "):
        raise ValueError(f"`{name}` must be text that does not end in a space (one is added), got {text!r}.")


def _check_answer(name: str, text: str) -> None:
    if not text or text != text.strip():
        raise ValueError(f"`{name}` must be text without spaces around it (one is added), got {text!r}.")


@dataclass(frozen=True)
class Fact:
    """One thing to know: a prompt and the answer that should follow it after a space.

    Attributes:
        id: unique name within a data set.
        prompt: text before the answer, without a trailing space.
        answer: the right answer, without spaces around it.
        paraphrases: other prompts for the same answer.
        choices: the closed set of answers, the right one among them; empty for an open question.
        subject: what the fact is about; the prompt if empty. Facts of one subject never part in a split.
        group: relation or category, for stratified splits and baselines per group; may be empty.
        answers: other answers that are right, too, where answers are written.
        rationale: where answers are written, what should stand ahead of the answer, as in "3 + 4 = 7. ####".
        neighbours: other prompts with their own answers, which should stay as they are.

    Raises:
        ValueError: if a field has the wrong type, is empty, or contradicts another.
    """

    id: str
    prompt: str
    answer: str
    paraphrases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    subject: str = ""
    group: str = ""
    answers: tuple[str, ...] = ()
    rationale: str = ""
    neighbours: tuple[Neighbour, ...] = ()

    def __post_init__(self) -> None:
        for name in ("id", "prompt", "answer", "subject", "group", "rationale"):
            if not isinstance(value := getattr(self, name), str):
                raise ValueError(f"`{name}` must be a string, got {shown(value)}.")
            need_unicode(**{name: value})
        for name in ("paraphrases", "choices", "answers"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
                raise ValueError(f"`{name}` must be a list of strings, got {shown(value)}.")
            for text in value:
                need_unicode(**{name: text})
        for name, text in (("prompt", self.prompt), *(("paraphrases", text) for text in self.paraphrases)):
            _check_prompt(name, text)
        others = (*(("choices", text) for text in self.choices), *(("answers", text) for text in self.answers))
        for name, text in (("answer", self.answer), *others):
            _check_answer(name, text)
        if not isinstance(self.neighbours, tuple) or not all(isinstance(one, Neighbour) for one in self.neighbours):
            raise ValueError(f"`neighbours` must be a tuple of Neighbour, got {shown(self.neighbours)}.")
        if self.choices and (self.answer not in self.choices or len(set(self.choices)) < 2):
            raise ValueError(f"`choices` must hold the answer {self.answer!r} and another, got {list(self.choices)}.")
        if self.rationale != self.rationale.strip():
            raise ValueError(
                f"`rationale` must be text without spaces around it (one is added), got {self.rationale!r}."
            )
        if not self.subject:
            object.__setattr__(self, "subject", self.prompt)

    @property
    def accepted(self) -> tuple[str, ...]:
        """All answers that are right."""
        return (self.answer, *self.answers)

    @property
    def written(self) -> str:
        """What should be written to the prompt: the rationale, if there is one, and the answer."""
        return f"{self.rationale} {self.answer}" if self.rationale else self.answer

    @classmethod
    def from_row(cls, row: Mapping[str, Any], default_id: str) -> Fact:
        """Build a fact from a record with the fields of this class, and ``meta: {subject, relation}`` as a fallback.

        Fields other than prompt and answer that are absent, null or empty get their defaults; unknown ones are ignored.

        Raises:
            ValueError: as the class, and if the prompt or the answer is missing.
        """
        if not isinstance(row, Mapping):
            raise ValueError(f"a row must be an object with `prompt` and `answer`, got {shown(row)}.")
        for name in ("prompt", "answer"):
            if row.get(name) is None:
                raise ValueError(f"`{name}` is missing; the row has {sorted(map(str, row))}.")
        if not isinstance(meta := row.get("meta") or {}, Mapping):
            raise ValueError(f"`meta` must be an object, got {shown(meta)}.")

        def texts(name: str) -> Any:  # whatever is not a list goes through, to be refused with its value
            value = row.get(name) or ()
            return tuple(value) if isinstance(value, list) else value

        def neighbours() -> tuple[Neighbour, ...]:
            if not isinstance(listed := row.get("neighbours") or [], (list, tuple)):
                raise ValueError(f"`neighbours` must be a list of prompts with answers, got {shown(listed)}.")
            found = []
            for number, item in enumerate(listed, 1):
                try:
                    found.append(item if isinstance(item, Neighbour) else Neighbour.from_row(item))
                except ValueError as error:
                    raise ValueError(f"`neighbours`, number {number}: {error}") from error
            return tuple(found)

        id_ = default_id if row.get("id") in (None, "") else row["id"]
        return cls(
            id=str(id_) if isinstance(id_, int) else id_,
            prompt=row["prompt"],
            answer=row["answer"],
            paraphrases=texts("paraphrases"),
            choices=texts("choices"),
            subject=row.get("subject") or meta.get("subject") or "",
            group=row.get("group") or meta.get("relation") or "",
            answers=texts("answers"),
            rationale=row.get("rationale") or "",
            neighbours=neighbours(),
        )


def read_facts(path: str | Path) -> list[Fact]:
    """Read facts from a ``.jsonl``, ``.csv`` or ``.parquet`` file, in file order.

    Fields are those of :class:`Fact`, only ``prompt`` and ``answer`` are required; a missing id becomes the running
    number, from 1. In CSV, ``paraphrases``, ``choices``, ``answers``, ``neighbours`` and ``meta`` hold JSON. Blank
    lines are skipped.

    Raises:
        ValueError: if a row is malformed (with file, line and reason), there are none, or the suffix is another.
        FileNotFoundError: if there is no such file.
        ModuleNotFoundError: for Parquet without pyarrow.
    """
    return read_records(path, Fact)


def read_records(path: str | Path, kind: type[R]) -> list[R]:
    """Records of any kind, read as :func:`read_facts` reads facts."""
    path = Path(path)
    if (reader := _READERS.get(path.suffix.lower())) is None:
        raise ValueError(f"`path` must end in one of {', '.join(_READERS)}, got {str(path)!r}.")
    need_files(path=path)
    read, parse = reader
    return check_rows(read(path), parse, str(path), "line", kind)


def records_of(source: str | Path | Sequence[R | Mapping[str, Any]], kind: type[R]) -> list[R]:
    """Records of any kind: from a file, as :func:`read_facts` reads facts, or themselves, or as mappings."""
    if isinstance(source, (str, Path)):
        return read_records(source, kind)
    return check_rows(enumerate(source), lambda row: row, "`path`", "item", kind)


def check_rows(
    rows: Iterable[tuple[int, Any]], parse: Callable[[Any], Any], source: str, unit: str, kind: type[R]
) -> list[R]:
    """Records from numbered raw rows (records pass as they are); an error begins with the source, the unit, its number.

    Raises:
        ValueError: if a row is malformed, an id comes twice, or there are no rows.
    """
    records: dict[str, R] = {}
    number_of: dict[str, int] = {}
    for number, row in rows:
        try:
            record = row if isinstance(row, kind) else cast("R", kind.from_row(parse(row), str(len(records) + 1)))
            if record.id in records:
                raise ValueError(f"`id` must be unique, got {record.id!r} as in {unit} {number_of[record.id]}.")
        except ValueError as error:
            raise ValueError(f"{source}, {unit} {number}: {error}") from error
        records[record.id], number_of[record.id] = record, number
    if not records:
        raise ValueError(f"`path` must hold at least one {kind.__name__.lower()}, got none in {source}.")
    return list(records.values())


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON, {error.msg} at character {error.pos + 1} of {shown(text)}.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nested as deeply
        raise ValueError(f"invalid JSON, {error} in {shown(text)}.") from error


_JSON_CELLS = ("paraphrases", "choices", "answers", "neighbours", "meta")


def _parse_csv(row: dict[Any, Any]) -> dict[Any, Any]:
    if None in row:
        raise ValueError(f"the row has more cells than the header, from {row[None][0]!r} on; quote cells with commas.")
    return row | {name: _parse_json(row[name]) for name in _JSON_CELLS if row.get(name)}


def _read_jsonl(path: Path) -> Iterator[tuple[int, str]]:
    lines = read_text(path, "path").split("\n")  # and at nothing else: JSON text may hold U+2028
    yield from ((number, line.strip()) for number, line in enumerate(lines, 1) if line.strip())


def read_csv(path: Path) -> Iterator[tuple[int, dict[Any, Any]]]:
    """The rows of a CSV file, each with the number of its last line; cells beyond the header are under ``None``.

    Cells are parted by commas, or by semicolons or tabs where the header has these and no comma.
    """
    text = read_text(path, "path")
    header = text.partition("\n")[0]
    delimiter = next((sign for sign in ";\t" if sign in header and "," not in header), ",")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    before = csv.field_size_limit(max(len(text), 1))  # by default 131,072 characters, for all readers of the process
    try:
        names = [name for name in reader.fieldnames or () if name]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{path}: expected a name of its own for each column, got {twice[0]!r} twice.")
        yield from [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: expected CSV: {error}.") from error
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading {path} needs pyarrow: `pip install pyarrow`, or save as .jsonl.") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these
        raise ValueError(f"{path}: expected a Parquet file: {clipped(error)}") from error
    yield from enumerate(rows, 1)


_READERS: dict[str, tuple[Callable[[Path], Iterable[tuple[int, Any]]], Callable[[Any], Any]]] = {
    ".jsonl": (_read_jsonl, _parse_json),
    ".csv": (read_csv, _parse_csv),
    ".parquet": (_read_parquet, lambda row: row),
}

# --------------------------------------------------------------------------------------------- splits


def split_facts(facts: Sequence[Fact], sizes: Mapping[str, int | float], seed: int) -> dict[str, list[Fact]]:
    """Deal facts to disjoint sets, whole subjects at a time, each set with its share of every group.

    Which set a fact lands in depends on the facts and the seed, not on their order. Subjects are compared without
    regard to case.

    Args:
        facts: the facts to deal.
        sizes: of the sets, as in :func:`deal`.
        seed: of the deal.

    Returns:
        For each name the facts of the set, in the order of ``facts``.

    Raises:
        ValueError: as :func:`deal`.
    """
    set_of_fact = deal([subject_key(fact) for fact in facts], [fact.group for fact in facts], sizes, seed)
    sets: dict[str, list[Fact]] = {name: [] for name in sizes}
    for fact, name in zip(facts, set_of_fact, strict=True):
        if name is not None:
            sets[name].append(fact)
    return sets


def subject_key(fact: Fact) -> str:
    """What facts of one subject have in common: the subject without regard to case."""
    return fact.subject.strip().casefold()


def deal(
    subjects: Sequence[str], groups: Sequence[str], sizes: Mapping[str, int | float], seed: int | str
) -> list[str | None]:
    """Deal examples to disjoint sets, whole subjects at a time, each set with its share of every group.

    A set takes a subject only while there is room, so with one example per subject all sizes are exact; with larger
    subjects they are as near as whole subjects allow. The deal depends on the subjects' names, not on their order.

    Args:
        subjects: of each example.
        groups: of each example.
        sizes: for each set a fraction of all examples (float) or their number (int). What is left over goes to no set.
        seed: of the deal.

    Returns:
        For each example the name of its set, or ``None``.

    Raises:
        ValueError: if a size is negative or NaN, the sizes exceed the examples, or a set would be empty.
    """
    count = len(subjects)
    wanted = {name: size if isinstance(size, int) else size * count for name, size in sizes.items()}
    if not all(size >= 0 for size in wanted.values()) or sum(wanted.values()) > count * (1 + 1e-9):
        raise ValueError(
            f"`sizes` must be fractions that sum to at most 1, or counts up to the {count} examples, got {dict(sizes)}."
        )
    members: dict[str, list[str]] = defaultdict(list)
    for subject, group in zip(subjects, groups, strict=True):
        members[subject].append(group)
    units = []
    for subject, owned in members.items():
        counts = Counter(owned)
        units.append((subject, min(counts, key=lambda group: (-counts[group], group)), len(owned)))
    set_of_subject = _deal(units, wanted, seed)
    dealt = [set_of_subject[subject] for subject in subjects]
    if empty := [name for name in sizes if name not in dealt]:
        needed = max((math.ceil(1 / size) for size in sizes.values() if 0 < size < 1), default=len(sizes))
        raise ValueError(
            f"`sizes` must leave examples for every set, got none for {empty} of {count} examples with {len(members)} "
            f"subjects at {dict(sizes)}; give examples of at least {max(needed, len(sizes))} subjects, or larger sizes."
        )
    return dealt


def sample_facts(facts: Sequence[Fact], count: int, seed: int) -> list[Fact]:
    """A seeded sample of ``count`` facts with the groups' shares of all, in the order of ``facts``; all if fewer.

    Raises:
        ValueError: if ``count`` is below 1.
    """
    if count < 1:
        raise ValueError(f"`limit` must be at least 1, got {count}.")
    dealt = _deal([(fact.id, fact.group, 1) for fact in facts], {"sample": min(count, len(facts))}, seed)
    return [fact for fact in facts if dealt[fact.id]]


def draw(text: str, seed: int | str) -> str:
    """A random hexadecimal number. A hash and no generator: what one name draws does not depend on the others."""
    return hashlib.sha256(f"{seed}/{text}".encode()).hexdigest()


def _deal(units: list[tuple[str, str, int]], wanted: Mapping[str, float], seed: int | str) -> dict[str, str | None]:
    """Deal (name, group, size) units to sets of about the ``wanted`` total sizes; ``None`` is the rest.

    The units stand in line, group by group, groups and units within them in an order drawn from the seed, and each
    goes to the set that is furthest behind its share of the line so far (of those with room). Every stretch of the
    line, hence every group, is so dealt in the sets' proportions.
    """
    total = sum(size for _, _, size in units)
    shares: dict[str | None, float] = {None: max(0.0, total - sum(wanted.values()))}
    shares.update(wanted.items())
    # Whole numbers that sum to the total, by largest remainder.
    targets = {name: int(share + 1e-9) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: targets[name] - shares[name])
    for name in by_remainder[: total - sum(targets.values())]:
        targets[name] += 1
    dealt: dict[str, str | None] = {}
    have = dict.fromkeys(targets, 0)
    seen = 0
    for name, _, size in sorted(units, key=lambda unit: (draw(unit[1], seed), draw(unit[0], seed))):
        seen += size
        with_room = [key for key in targets if have[key] + size <= targets[key]]
        open_sets = with_room or [key for key in targets if targets[key]]
        dealt[name] = chosen = max(open_sets, key=lambda key: targets[key] * seen / total - have[key])
        have[chosen] += size
    return dealt
