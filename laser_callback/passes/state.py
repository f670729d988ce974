"""Everything that an evaluation step may write to, kept apart for two passes over one batch.

:class:`RandomState` holds the global generators. :class:`Start` is what the evaluation could reach and write to when it
began, and :class:`Own` one arm's own contents of that. What a pass writes elsewhere (files, other processes, globals,
what a C library keeps) cannot be told apart.

This file knows torch, but nothing of Lightning's loops.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric

from laser_callback.passes.places import (
    Attributes,
    ModuleAttributes,
    ModuleContent,
    ParameterAttributes,
    Place,
)
from laser_callback.passes.reach import reachable
from laser_callback.passes.values import TensorValues, Values, is_plain, size
from laser_callback.passes.witness import Running, Unmoved, Witness
from laser_callback.support.interrupts import catch_up, closed, opened, undisturbed


class RandomState(NamedTuple):
    """The state of Python's, NumPy's, torch's and CUDA's global generators."""

    states: dict[str, Any]

    @classmethod
    def now(cls) -> RandomState:
        """The current state."""
        return cls(_collect_rng_states())

    def set(self) -> None:
        """Make it the current state."""
        _set_rng_states(self.states)


Changes = list[tuple[Place, Any]]


class Start:
    """What the module and what surrounds it hold when an evaluation begins: where each arm starts from.

    Memory: one copy, for all arms, of what an evaluation could write to; of tensors and arrays of more than 2^20
    elements only until the first batch has shown that they stay as they are.

    Args:
        module: the user's module.
        others: what else its steps can reach, by name: the datamodule, datasets, callbacks.
        isolate: attributes of the module of which each arm gets a deep copy of its own, such as ``"evaluator"``.
        trusting: go on where the two passes cannot be kept apart.

    Raises:
        MisconfigurationException: for a name in ``isolate`` that the module does not have.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        others: Mapping[str, Any] | None = None,
        isolate: Iterable[str] = (),
        trusting: bool = False,
    ) -> None:
        self.module = module
        self.isolate = tuple(isolate)
        self.trusting = trusting
        self._others = others or {}
        running: list[Running] = []
        self.places = reachable({"module": module, **self._others}, running)
        for name in self.isolate:
            try:
                attrgetter(name)(module)
            except AttributeError as error:
                raise MisconfigurationException(f"`isolate` names {name!r}, which the module does not have") from error
        apart = tuple(f"module.{name}" for name in self.isolate)
        self._large = [place for place in self.places if isinstance(place, Values) and place.is_large]
        self._large = [place for place in self._large if not place.name.startswith(apart)] if apart else self._large
        self._running = [one for one in running if not (apart and one.name.startswith(apart))]
        large = set(self._large)
        self.places = [place for place in self.places if place not in large]
        for place in self.places:
            place.begin()
        self._fixed: list[Witness] = []
        self._named: list[tuple[dict[str, Any], str, str]] = []  # where modules keep parameters: under which name
        self._there: list[Any] = []
        self._isolated: list[tuple[str, Tensor, int]] = []

    def again(self) -> Start:
        """The same from what all of it holds now."""
        again = Start(self.module, self._others, self.isolate, self.trusting)
        movers = {id(place.owner) for place in self.places if isinstance(place, Values) and place.is_large}
        for place in again._large:
            if id(place.owner) in movers:
                place.begin()
                again.places.append(place)
        return again

    def first_batch(self) -> None:
        """Ahead of the first batch, after all hooks that come before it."""
        # By now callbacks may have exchanged the model, buffers and all (weight averaging).
        models = [child for child in self.module.modules() if not isinstance(child, (pl.LightningModule, Metric))]
        buffers = {id(buffer) for child in models for buffer in child.buffers(recurse=False)}
        for place in self.places:
            if isinstance(place, TensorValues) and id(place.owner) in buffers:
                place.begin()
        for place in self._large:
            if place.name.startswith("module"):
                place.begin()
                self.places.append(place)
            elif not isinstance(place, TensorValues):  # which tells by its version, also later
                self._fix(place)
        # Those that the module has in a list are not among its own; those of an exchanged model have not been reached.
        reached = [place for place in self.places if isinstance(place, ParameterAttributes)]
        parameters = {place.owner: place.name[7:] for place in reached if place.name.startswith("module.")}
        parameters |= {parameter: name for name, parameter in self.module.named_parameters()}
        for parameter, name in parameters.items():
            if not is_plain(parameter):
                continue
            if any(_is_in(name, attribute) for attribute in self.isolate):
                self._isolated.append((name, parameter, parameter.data_ptr()))
            else:
                self._fixed.append(Unmoved(name, parameter, f"the parameter `{name}`"))

        for path, child in self.module.named_modules():
            for name in child._parameters:
                self._named.append((child._parameters, name, f"{path}.{name}".lstrip(".")))

    def _after_first_pass(self) -> None:
        """What is large and has stayed as it was, is forgotten."""
        for place in [place for place in self.places if isinstance(place, Values)]:
            unseen = not place.is_as_at_first()
            place.moves = unseen and place.holds(place.start)  # written to behind torch's back
            if place.is_large and not unseen:
                self.places.remove(place)
                place.start = None
        mover = {id(place.owner) for place in self.places if isinstance(place, Values)}
        for place in self._large:
            if id(place.owner) not in mover and (place.name.startswith("module") or isinstance(place, TensorValues)):
                self._fix(place)
        self.check()

    def _fix(self, place: Values) -> None:
        text = f"`{place.name}` of {size(place.owner):,} elements"
        self._fixed.append(Unmoved(place.name, place.owner, text))

    def ahead(self) -> None:
        """Ahead of anything that a pass runs: how far is what can only be seen to move on."""
        for one in self._running:
            one.look()

    def after(self, first: bool = False) -> None:
        """After it. ``first``: that was the user's own pass over the first batch.

        Raises:
            MisconfigurationException: names what has moved on, or if the step trains.
        """
        if first:
            self._after_first_pass()
        self._refuse([one for one in self._running if one.has_moved()])

    def look(self) -> None:
        """Ahead of the reduced passes: what the user's own has written to is looked at closely after them."""
        self.ahead()
        for fixed in self._fixed:
            fixed.look()
        self._there = [held.get(name) for held, name, _ in self._named]

    def also(self, name: str, values: list[Any]) -> None:
        """What somebody else than a pass has put into the place ``name``: all arms start from what it holds now."""
        known = {id(place.owner) for place in (*self.places, *self._large)}
        for place in reachable({name: values}, self._running):
            if id(place.owner) not in known and place.owner is not values:
                place.begin()
                self.places.append(place)

    def refuse_cut(self) -> None:
        """While a cut is in place: an arm's copy of a weight would not be cut with it.

        Raises:
            MisconfigurationException: if an attribute of ``isolate`` holds a weight that is cut.
        """
        for name, parameter, pointer in self._isolated:
            if parameter.data_ptr() != pointer:
                held = next(attribute for attribute in self.isolate if _is_in(name, attribute))
                raise MisconfigurationException(
                    f"`isolate` names {held!r}, which holds `{name}`, a weight that the plan cuts: the reduced pass "
                    "would use a copy of it that is not cut. Name the part of it that the step writes to, or cut "
                    "another weight"
                )

    def check(self) -> None:
        """Whether something has moved that cannot be put back.

        Raises:
            MisconfigurationException: names it, and the cure.
        """
        moved = [] if self.trusting else [fixed for fixed in (*self._running, *self._fixed) if fixed.has_moved()]
        for (held, key, name), was in zip(self._named, self._there, strict=False):  # none before the first look
            if held.get(key) is not was and not self.trusting:
                held[key] = was
                moved.append(Witness(name, f"the parameter `{name}` for another"))
        self._refuse(moved)

    def _refuse(self, moved: list[Witness]) -> None:
        if not moved or self.trusting:
            return
        first, more = moved[0], f" and {len(moved) - 1} more" if moved[1:] else ""
        name = first.name.removeprefix("module.").split(".")[0].split("[")[0]
        cure = f"With `isolate=[{name!r}]` each has a copy of that attribute of its own"
        if not first.has_a_copy() or (isinstance(first, Running) and not first.name.startswith("module.")):
            cure = "Make it anew in `on_validation_start`, or keep a list and an index in its place"
        raise MisconfigurationException(
            f"the evaluation step changes {first.text}{more}: the original's pass and the reduced one would both "
            f"write there. {cure}. Or set `skip_isolation=True`, if the passes may see each other's changes"
        )


def _is_in(name: str, attribute: str) -> bool:
    return name == attribute or name.startswith((f"{attribute}.", f"{attribute}["))


class Own(AbstractContextManager["Own"]):
    """One arm's own contents of everything that it could write to. Within the block they are in place.

    What is put in place is what each thing holds, not the thing: a metric that is also an alias, a member of a
    collection, or captured in a closure stays the same object. What the arm makes itself, such as a new metric, is
    reached from there, and gone with it.

    Args:
        start: where it starts from. Its places are shared by all arms.
        exchange: what this arm has in the place of an object that the module may hold (a logger); else that object.
    """

    def __init__(self, start: Start, exchange: Callable[[Any], Any] | None = None) -> None:
        self.start = start
        self._exchange = exchange
        self._mine: dict[Place, Any] = {}
        self._outside: Changes = []  # empty unless in place
        self._is_aside = False
        for name in start.isolate:
            self._isolate(name)
        if exchange is not None:
            for place in start.places:
                content = self._mine.get(place, place.start)
                if (mine := _exchanged(content, exchange)) is not content:
                    self._mine[place] = mine

    def _isolate(self, name: str) -> None:
        path, _, attribute = name.rpartition(".")
        owner = attrgetter(path)(self.start.module) if path else self.start.module
        memo = {id(shared): shared for shared in (self.start.module, self.start.module._trainer)}
        try:
            new = copy.deepcopy(getattr(owner, attribute), memo)
        except TypeError as error:
            raise MisconfigurationException(f"`isolate` names {name!r}, which cannot be copied: {error}") from error
        for place in [place for place in self.start.places if place.owner is owner]:
            mine = self._mine.get(place, place.start)
            if isinstance(place, Attributes):
                self._mine[place] = {**mine, attribute: new} if attribute in mine else mine
            elif isinstance(place, ModuleAttributes):  # a slot of that name comes first
                of = "children" if attribute in mine.children else "attributes"
                self._mine[place] = mine._replace(**{of: {**getattr(mine, of), attribute: new}})

    @undisturbed
    def __enter__(self) -> Own:
        try:
            opened(self, partial(_put_back, self._outside))
            self._put_in()
            catch_up()
            return self
        except BaseException:
            _put_back(self._outside)
            closed(self)
            raise

    @undisturbed
    def __exit__(self, *_: object) -> None:
        try:
            self._take_out()
        finally:
            _put_back(self._outside)
            closed(self)

    def _put_in(self) -> None:
        self._outside.clear()
        moved: list[Place] = []
        for place in self.start.places:  # all are read before any is written: views share their elements
            mine = self._mine.get(place, place.start)
            if place.holds(mine):
                self._outside.append((place, mine))
            else:
                self._outside.append((place, place.read()))
                moved.append(place)
        for place in moved:
            place.write(self._mine.get(place, place.start))

    def _take_out(self) -> None:
        """Keep what has become of this arm's, and leave in ``_outside`` what is to be put back."""
        moved: Changes = []
        for place, outside in self._outside:
            mine = self._mine.get(place, place.start)
            stays = place.holds(mine)
            if not stays:
                self._mine[place] = place.read()
            if not stays or mine is not outside:
                moved.append((place, outside))
        self._outside[:] = moved

    @undisturbed
    def suspend(self) -> None:
        """Make room for a signal handler."""
        self._is_aside = bool(self._outside)
        self._take_out()
        _put_back(self._outside)

    @undisturbed
    def resume(self) -> None:
        """End what :meth:`suspend` began; what the handler has changed outside stays changed there."""
        if self._is_aside:
            self._put_in()


def _exchanged(content: Any, exchange: Callable[[Any], Any]) -> Any:
    """What a place holds, with some objects exchanged; the very content where there are none, or it has very many."""
    if isinstance(content, ModuleContent):
        attributes = _exchanged(content.attributes, exchange)
        return content if attributes is content.attributes else content._replace(attributes=attributes)
    if not isinstance(content, (dict, list)):
        return exchange(content)
    if len(content) > 1000:
        return content
    old = content.values() if isinstance(content, dict) else content
    new = list(map(exchange, old))
    if all(map(operator.is_, old, new)):
        return content
    return dict(zip(content, new, strict=True)) if isinstance(content, dict) else new


def _put_back(outside: Changes) -> None:
    for place, content in outside:
        place.write(content)
    outside.clear()
