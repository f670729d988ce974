"""The four example sets of a search: screen, race, confirm and guard.

Contract: the sets share no example, and no subject where subjects are known; which example lands where depends on the
data and the seed alone. Only ``screen`` may be a part of ``race``, where no examples are set aside for it: both only
select. Nothing here knows models.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, cast

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Subset

from laser_callback.data.datamodule import FactsDataModule, TextWindows
from laser_callback.data.encoding import EncodedFact
from laser_callback.data.example_set import ExampleSet, Loader, indivisible, kept_whole, taken_apart
from laser_callback.data.facts import DEFAULT_SIZES, deal, draw, subject_key
from laser_callback.data.lm_eval.documents import TaskDocuments
from laser_callback.data.row_scores import Role
from laser_callback.stats.priors import constant_share

SETS = ("screen", "race", "confirm", "guard")
SCREEN_EXAMPLES = 100
"""Examples of ``race`` to screen on, where none are set aside for it."""

_GIVE_SETS = (
    "or give the sets yourself: {'screen': loader, 'race': loader, 'confirm': loader, 'guard': loader}, without an "
    "example in common"
)


class ExampleSets:
    """screen, race, confirm and guard; made by :meth:`of` or :meth:`reference`.

    Attributes:
        sizes: examples in each set that there is.
        metric: what a search improves by default, as the data says; ``None`` if it does not.
        notes: what a reader should know about how the sets were made.
    """

    def __init__(
        self,
        sets: Mapping[str, ExampleSet],
        texts: Mapping[str, Loader],
        seed: int,
        notes: Sequence[str],
        metric: str | None = None,
    ) -> None:
        self._sets, self._texts, self._seed, self.notes = dict(sets), dict(texts), seed, list(notes)
        self.metric = metric
        self.sizes = {name: len(sets[name].places) for name in SETS if name in sets}

    @classmethod
    def of(
        cls,
        data: FactsDataModule | LightningDataModule | Loader | Mapping[str, Loader],
        *,
        sizes: Mapping[str, int | float] = DEFAULT_SIZES,
        seed: int = 0,
        groups: Sequence[str] | None = None,
        subjects: Sequence[Hashable] | None = None,
        text_windows: int = 32,
    ) -> ExampleSets:
        """Make the sets.

        A :class:`FactsDataModule` is split by subject and stratified by group. For ``screen`` each fact becomes one
        prompt, drawn from its prompt and paraphrases: cheap, and no single wording decides. Any other dataloader, or
        data module's validation dataloader, is split by index; its examples are loaded as before, but in order. A
        mapping is taken as it is.

        Args:
            data: a data module (which is set up for validation), a dataloader, or a dataloader for each of "race",
                "confirm" and, if there are any, "screen" and "guard".
            sizes: shares (float) or numbers (int) of examples; ``screen`` and ``guard`` may be left out.
            seed: of the split and of all that is dealt later.
            groups: the group of each example of a dataloader's dataset, to stratify by.
            subjects: the subject of each example of a dataloader's dataset; those of one subject stay together.
            text_windows: the most windows of running text in each of ``race``, from the first half of the text, and
                ``guard``, from the second; at least 2.

        Raises:
            TypeError: if ``data`` is nothing of the above.
            ValueError: for sizes that the examples do not allow, groups or subjects of another length, arguments that
                the data has no use for, sets that share examples, and facts or text that are too few.
            MisconfigurationException: for a dataloader that cannot be split, with the cure.
        """
        if isinstance(data, Mapping):
            if groups is not None or subjects is not None or dict(sizes) != dict(DEFAULT_SIZES):
                raise ValueError(
                    "`sizes`, `groups` and `subjects` must be left out where `data` holds the sets already."
                )
            given = _given(data)
            sets, notes = _with_screen(given, seed)
            return cls(sets, {}, seed, [*_in_common(given), *notes])
        if unknown := [name for name in sizes if name not in SETS]:
            raise ValueError(f"`sizes` must name sets among {', '.join(SETS)}, got {unknown}.")
        if missing := [name for name in ("race", "confirm") if name not in sizes]:
            raise ValueError(f"`sizes` must hold race and confirm, got none for {', '.join(missing)}.")
        whole = _whole(data, groups, subjects)
        texts = _texts(data, text_windows)
        dealt = deal(whole.subjects, whole.groups, sizes, seed)
        split = {name: whole.subset([i for i, owner in enumerate(dealt) if owner == name]) for name in sizes}
        sets, notes = _with_screen(split, seed)
        return cls(sets, texts, seed, notes, _metric(data))

    @classmethod
    def reference(cls, data: FactsDataModule | LightningDataModule | Loader | Mapping[str, Loader]) -> ExampleSets:
        """The split of the paper's code: race is the first fifth in file order, confirm the rest.

        There is no screen and no guard, and subjects may be on both sides. A mapping is taken as it is.

        Raises:
            As :meth:`of`.
        """
        if isinstance(data, Mapping):
            given = _given(data)
            return cls(given, {}, 0, _in_common(given))
        whole = _whole(data, None, None)
        count = len(whole.places)
        if count < 5:
            raise ValueError(f"`data` must have at least 5 examples, of which the first fifth selects; got {count}.")
        parts = {"race": range(count // 5), "confirm": range(count // 5, count)}
        sets = {name: whole.subset(part) for name, part in parts.items()}
        return cls(sets, _texts(data, 32), 0, [], _metric(data))

    @property
    def writes(self) -> bool:
        """Whether answers are written."""
        return self._sets["race"].writes

    def loader(self, name: str, part: Sequence[int] | None = None, *, batches: int = 1, writes: bool = True) -> Loader:
        """A set, or the examples at some positions of it, in the given order.

        Batches are as the data makes them, or smaller, so that there are at least ``batches``. Without ``writes``, and
        for the screen, the model is not to write answers, but to tell the loss of those that should be written.

        Raises:
            ValueError: if there is no such set.
            MisconfigurationException: if a part is asked of a dataloader that cannot be taken apart.
        """
        found, writes = self._set(name), writes and name != "screen"
        found = found if part is None else self._divisible(name).subset(part)
        return found.loader(batches, writes=writes)

    def deal(self, name: str, parts: Sequence[int | float]) -> list[list[int]]:
        """Deal the positions of a set to parts of these sizes (shares or numbers), whole subjects together.

        Each part has its share of every group, and is in a random order in which its every stretch has, too: the first
        of its examples stand for all.

        Raises:
            ValueError: if there is no such set, or the parts do not fit it.
            MisconfigurationException: for a dataloader that cannot be taken apart.
        """
        found = self._divisible(name)
        seed = f"{self._seed}/{name}"
        try:
            owners = deal(found.subjects, found.groups, {str(i): size for i, size in enumerate(parts)}, seed)
        except ValueError as error:
            raise ValueError(f"`parts` must fit {name!r}, got {list(parts)}: {error}") from error
        dealt = []
        for number in range(len(parts)):
            positions = [i for i, owner in enumerate(owners) if owner == str(number)]
            dealt.append([positions[i] for i in found.subset(positions).spread(seed)])
        return dealt

    def subjects(self, name: str) -> int:
        """How many subjects the examples of a set are about; without subjects, how many examples there are.

        Raises:
            ValueError: if there is no such set.
        """
        return len(set(self._set(name).subjects))

    def constant_answer(self, name: str) -> float:
        """The share of a set's facts whose answer is the most common one of its group; 0 for other examples.

        Raises:
            ValueError: if there is no such set.
        """
        found = self._set(name)
        items = [] if found.whole is not None else [found.dataset[place] for place in found.places]
        facts = [item.fact for item in items if isinstance(item, EncodedFact)]
        return constant_share([fact.answer for fact in facts], [fact.group for fact in facts]) if facts else 0.0

    def text(self, name: str) -> Loader | None:
        """Windows of running text for ``"race"`` or ``"guard"``, which share none; ``None`` if the data has no text.

        Raises:
            ValueError: for another name.
        """
        if name not in ("race", "guard"):
            raise ValueError(f"`name` must be 'race' or 'guard', got {name!r}; no other set has text.")
        return self._texts.get(name)

    @property
    def text_metrics(self) -> Sequence[str]:
        """What is measured on running text; empty if the data has none."""
        text = self._texts.get("guard")
        return () if text is None else cast("Subset[Any]", text.dataset).dataset.metrics  # type: ignore[attr-defined]

    def _set(self, name: str) -> ExampleSet:
        if name not in self._sets:
            raise ValueError(f"`name` must be one of {', '.join(self.sizes)}, got {name!r}.")
        return self._sets[name]

    def _divisible(self, name: str) -> ExampleSet:
        if self._set(name).whole is not None:
            raise MisconfigurationException(
                f"the set {name!r} cannot be taken apart: {indivisible(self._sets[name].loader())}"
            )
        return self._sets[name]


# ---- from data to sets -----------------------------------------------------------------------------------------------


def _whole(data: Any, groups: Sequence[str] | None, subjects: Sequence[Hashable] | None) -> ExampleSet:
    """All examples of the data as one set."""
    if isinstance(data, FactsDataModule):
        if data.split is not None:
            raise ValueError(f"`data` must have split=None, since its facts are split here, got {data.split!r}.")
        if groups is not None or subjects is not None:
            raise ValueError("`groups` and `subjects` must be None for facts, which have their own.")
        data.setup("validate")
        facts = [item.fact for item in data.encoded]
        options = {"batch_size": data.batch_size, "collate_fn": data.collate, "num_workers": data.num_workers}
        keys, names = [subject_key(fact) for fact in facts], [fact.group for fact in facts]
        return ExampleSet(data.encoded, list(range(len(facts))), keys, names, options)
    if isinstance(data, LightningDataModule):
        data.prepare_data()
        data.setup("validate")
        loaders = data.val_dataloader()
        data = loaders[0] if isinstance(loaders, (list, tuple)) and len(loaders) == 1 else loaders
        if not isinstance(data, DataLoader):
            got = f"{len(loaders)} of them" if isinstance(loaders, (list, tuple)) else type(loaders).__name__
            raise MisconfigurationException(
                f"the data module must have one validation DataLoader to split, got {got}; give that one as `data`, "
                f"{_GIVE_SETS}"
            )
    if not isinstance(data, DataLoader):
        raise TypeError(
            f"`data` must be a FactsDataModule, a LightningDataModule, a DataLoader, or a mapping of {', '.join(SETS)} "
            f"to DataLoaders, got {type(data).__name__}."
        )
    if reason := indivisible(data):
        raise MisconfigurationException(f"`data` cannot be split into sets: {reason}; {_GIVE_SETS}")
    return taken_apart(data, groups, subjects)


def _given(data: Mapping[str, Loader]) -> dict[str, ExampleSet]:
    """The sets of a mapping, checked."""
    if unknown := [name for name in data if name not in SETS]:
        raise ValueError(f"`data` must map {', '.join(SETS)} to DataLoaders, got {unknown}.")
    if missing := [name for name in ("race", "confirm") if name not in data]:
        raise ValueError(f"`data` must have DataLoaders for race and confirm, got none for {', '.join(missing)}.")
    sets: dict[str, ExampleSet] = {}
    for name, loader in data.items():
        if not isinstance(loader, DataLoader):
            raise TypeError(f"`data[{name!r}]` must be a DataLoader, got {type(loader).__name__}.")
        reason = indivisible(loader)
        if reason and name == "race":
            raise MisconfigurationException(f"the set 'race' is used in parts, but cannot be taken apart: {reason}")
        sets[name] = kept_whole(name, loader) if reason else taken_apart(loader, None, None)
        if not sets[name].places:
            raise ValueError(f"`data[{name!r}]` must have examples, got none.")
    contents = {name: found.contents() for name, found in sets.items()}
    for one, other in combinations([name for name in SETS if name in sets], 2):
        if (one, other) == ("screen", "race"):
            continue
        shared = len(sets[one].roots() & sets[other].roots()) or len(contents[one] & contents[other])
        if shared:
            raise ValueError(f"`data` must hold sets without a common example, but {one} and {other} share {shared}.")
    return sets


def _in_common(sets: Mapping[str, ExampleSet]) -> list[str]:
    """What to tell of subjects and values that chose and confirm: what was learnt of them is no news there."""
    confirmed, raced = sets["confirm"].fingerprints(), set(sets["race"].fingerprints())
    equal = sum(one in raced for one in confirmed)
    if confirmed and 2 * equal >= len(confirmed):  # a few may be alike by chance
        told = f"{equal:,} of {len(confirmed):,} examples of the confirm set have all values of one of the race"
        return [f"{told}: if they are the same, nothing is confirmed"]
    keys = {name: _subjects_of_facts(found) for name, found in sets.items()}
    chosen = keys.get("screen", set()) | keys["race"]
    shared = [(name, len(keys[name] & chosen)) for name in ("confirm", "guard") if name in keys]
    return [
        f"{count:,} of {len(keys[name]):,} subjects of the {name} set are in the race or the screen, too: what is "
        "shown there is of other facts, but not of other subjects"
        for name, count in shared
        if count
    ]


def _subjects_of_facts(found: ExampleSet) -> set[str]:
    is_of_facts = found.whole is None and isinstance(found.dataset[found.places[0]], EncodedFact)
    return set(found.subjects) if is_of_facts else set()


def _with_screen(sets: dict[str, ExampleSet], seed: int) -> tuple[dict[str, ExampleSet], list[str]]:
    """The sets with one for the screen, and a note if that is a part of the race; of facts, one prompt each."""
    notes = []
    if "screen" not in sets:
        race = sets["race"]
        positions = sorted(race.spread(f"{seed}/screen")[:SCREEN_EXAMPLES])
        sets = {**sets, "screen": race.subset(positions)}
        notes.append(f"the screen uses {len(positions)} of the race examples, since none are set aside for it")
    screen = sets["screen"]
    items = [screen.dataset[place] for place in screen.places] if screen.whole is None else []
    if items and all(isinstance(item, EncodedFact) for item in items):
        prompts = [_one_prompt(item, seed) for item in items]
        sets = {**sets, "screen": replace(screen, dataset=prompts, places=list(range(len(prompts))))}
    return sets, notes


def _one_prompt(item: EncodedFact, seed: int) -> EncodedFact:
    """The fact with one of its wordings, drawn by seed, and neither choices nor neighbours."""
    rows = [row for row in item.rows if row.role in (Role.PROMPT, Role.PARAPHRASE)]
    chosen = int(draw(item.fact.id, f"{seed}/prompt"), 16) % len(rows)
    prompt = (item.fact.prompt, *item.fact.paraphrases)[chosen]
    fact = replace(item.fact, prompt=prompt, paraphrases=(), choices=(), neighbours=())
    return EncodedFact(fact, (replace(rows[chosen], role=Role.PROMPT),))


def _metric(data: Any) -> str | None:
    return data.metric if isinstance(data, FactsDataModule) else None


def _texts(data: Any, most: int) -> dict[str, Loader]:
    """Windows from all over the first half of the text for race, and of the second for guard.

    Neighbours tell of the same things: no two of them are on two sides, and what is in the middle is in neither.
    """
    windows = data.text if isinstance(data, FactsDataModule) else None
    if not isinstance(windows, (TextWindows, TaskDocuments)):
        return {}
    if most < 2 or len(windows) < 5:
        raise ValueError(
            "`text` must have at least 5 windows and `text_windows` be at least 2, since one window has no variance; "
            f"got {len(windows)} and {most}."
        )
    count = min(len(windows), 2 * most + 1)
    places = [i * len(windows) // count for i in range(count)]
    options = {
        "batch_size": max(1, data.batch_size // 4),  # as in FactsDataModule
        "collate_fn": windows.collate,
        "num_workers": data.num_workers,
    }
    half = (count - 1) // 2
    parts = {"race": places[:half], "guard": places[-half:]}
    return {name: DataLoader(Subset(windows, part), **options) for name, part in parts.items()}
