"""One reduced arm of a comparison: its cut, what Lightning keeps for it, whether the cut acts, and its logged keys."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchmetrics import MetricCollection

from laser_callback.compare import arms
from laser_callback.compare.options import RunOptions
from laser_callback.passes.copies import kept
from laser_callback.passes.metric_states import Added, Kept, Recorder
from laser_callback.passes.values import is_plain, parts
from laser_callback.passes.watch import Watch, may_keep_weights
from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.short import brief
from laser_callback.results.examples import Logged
from laser_callback.spectra.cut import CutSpectrum
from laser_callback.stats.outcomes import Outcomes
from laser_callback.support.interrupts import whole
from laser_callback.surgery.replay import LayerReplay
from laser_callback.surgery.swap import reduced

Growth = Mapping[str, tuple[float, float]]


class ReducedPassError(RuntimeError):
    """An exception that the reduced pass of a plan has raised, and the original's has not; its cause is that one."""


class ReducedArm:
    """One reduced arm in a run.

    Args:
        name: of the plan.
        control: ``""``, or the name of a control's pass: ``"zeroed"``, ``"random"``, ``"noise 1"``, ...
        cut: what is put in place for its passes.
        arm: what Lightning and the module keep for it.
        kept: where what its metrics' states become is told.
    """

    def __init__(self, name: str, control: str, cut: reduced, arm: arms.Arm, kept: Kept) -> None:
        self.name = name
        self.control = control
        self.cut = cut
        self.arm = arm
        self.metrics: MetricCollection | None = None
        self.seconds = 0.0
        self.factorise_seconds = 0.0
        self.spectra: list[CutSpectrum] = []
        self.growth: Growth = {}
        self.states: Added = {}  # what the latest batch has added to those of the module's metrics
        self.recorder = Recorder(arm.module, "", kept)
        self._watch: Watch | None = None
        self._checkpoints: OriginalsInCheckpoints | None = None
        self._passes = 0
        self._differs = False
        self._asked = True  # whether the cut acts
        self._probed = False
        self._blind = ""  # why that could not be seen

    @property
    def key(self) -> str:
        """Under which its results stand."""
        return f"{self.name}.{self.control}" if self.control else self.name

    @property
    def group(self) -> str:
        """The control that it is a pass of, ``"noise"`` of several; empty for a plan."""
        return self.control.partition(" ")[0]

    def run(
        self, batch: Any, batch_idx: int, dataloader_idx: int | None, replaying: AbstractContextManager[Any]
    ) -> Any:
        """The step on ``batch``, with the cut in place.

        Raises:
            MisconfigurationException: if the step writes to a weight that is cut.
        """
        self.cut.prepare()  # may take long, and can be interrupted
        rarely = self._passes & (self._passes + 1) == 0  # the first pass, and then ever more seldom
        self._passes += 1
        with self._in_place(), self.arm.active(), replaying:
            if self._watch is None:
                self._watch = Watch(self.cut)
                self._watch.compare_contents()
            self.recorder.begin()
            output = self.arm.step(batch, batch_idx, dataloader_idx)
            self.states = self.recorder.added()
            if rarely:
                self._watch.compare_contents()
            self._refuse_writing(self._watch.written or self.cut.written_to())
            return kept(output)  # now: what the step keeps, and goes on writing to, is about to be put away

    @whole
    def _in_place(self) -> Generator[None, None, None]:
        if self._checkpoints is None:
            matrices = [matrix for matrix, _ in self.cut.matrices]
            self._checkpoints = OriginalsInCheckpoints(self.arm.module, matrices)
        with self._checkpoints.within(), self.cut, LayerReplay.paused():
            yield

    def active(self) -> AbstractContextManager[None]:
        """Within: the cut is in place, and the module and the trainer hold what is this arm's."""
        self.cut.prepare()
        return self._active()

    @whole
    def _active(self) -> Generator[None, None, None]:
        with self._in_place(), self.arm.active():
            yield

    def _refuse_writing(self, names: list[str]) -> None:
        if names:
            raise MisconfigurationException(
                f"the evaluation step writes to {', '.join(names)} itself, as weight averaging does, in the place of "
                f"what {brief(self.cut.plan)!r} has made of it: what comes out is not the cut model's. Put such "
                "weights in place before the evaluation, or evaluate without them"
            )

    def compare(self, original: Growth, outputs: Any, output: Any) -> bool:
        """Whether the latest batch lets one ask if the cut acts: nothing differs, or a continuous value is the same.

        Right and wrong are often the same on a batch, and say nothing.
        """
        logged = [(original.get(key), value) for key, value in self.growth.items()]
        pairs = [(a and a[0], b[0]) for a, b in logged] + _pairs(outputs, output)
        same = [_same(a, b) for a, b in pairs]
        unlikely = any(same and _is_continuous(b) for same, (_, b) in zip(same, pairs, strict=True))
        self._differs |= not all(same)
        self._asked = all(same) or unlikely
        if all(same) and unlikely and may_keep_weights():
            self._blind = "code was compiled in this process, and may keep weights of its own, as frozen graphs do"
        return self._asked

    @property
    def is_settled(self) -> bool:
        """Whether it is known that the cut acts, or there is nothing to ask."""
        used = self._probed and self._watch is not None and not self._watch.unused
        return (used and not self._blind) or (self._differs and not self._asked)

    def twin(self) -> arms.Arm | None:
        """Ahead of a pass: what :meth:`probe` needs; ``None`` when no question is open, and in most passes."""
        rarely = self._passes & (self._passes + 1) == 0
        if not rarely or self.is_settled:
            return None
        if self._passes == 0 and not self.arm.has_started:
            return self.arm.beginner()
        with self.arm.active():
            return self.arm.twin()

    def probe(self, twin: arms.Arm, batch: Any, batch_idx: int, dataloader_idx: int | None, replaying: Any) -> None:
        """Repeat the pass to look at its weights. Its results are dropped: to be looked at may change a rounding."""
        assert self._watch is not None
        try:
            with self.active(), twin.active(), replaying, self._watch.passing():
                twin.step(batch, batch_idx, dataloader_idx)
        except Exception as error:
            self._blind = f"to look at them fails ({type(error).__name__}: {error})"
            return
        self._probed = True
        self._refuse_writing(self._watch.written)

    def why_not(self) -> str:
        """At the end: why nothing can be said of the cut; empty if it acted. "No difference" needs weights in use."""
        unused = self._watch.unused if self._watch is not None and self._probed else []
        plan = f"the plan {brief(self.cut.plan)!r}"
        if self._differs:
            if unused:
                rank_zero_warn(f"{plan}: no pass that was looked at read {', '.join(unused)}: this part was not tried")
            return ""
        if unused:
            why = (
                f"{plan}: its reduced passes did not read the weight of {', '.join(unused)}, so the cut could not act, "
                "and nothing is compared. The usual causes are features that are kept from an earlier pass "
                "(functools.cache, an attribute), a captured or frozen graph, and layers that these data do not reach: "
                "clear what is kept in `on_validation_start`, or cut what is used"
            )
        elif self._blind:
            why = (
                f"{plan}: nothing that was logged or returned differs in any bit, and whether its weights were used "
                f"cannot be seen: {self._blind}. Nothing is compared: log or return the loss as well"
            )
        else:
            return ""
        rank_zero_warn(why)
        return why

    def named(self, error: Exception, where: str) -> Exception:
        """``error`` with the plan's name."""
        if isinstance(error, MisconfigurationException):
            return error
        control = f" ({self.control} control)" if self.control else ""
        return ReducedPassError(
            f"the reduced pass of the plan {brief(self.cut.plan)!r}{control} fails {where}, where the original's does "
            f"not: {type(error).__name__}: {error}"
        )


def _pairs(a: Any, b: Any) -> list[tuple[Any, Any]]:
    """The tensors and numbers that two steps have returned, side by side."""
    mine, other = _leaves(a), _leaves(b)
    if len(mine) != len(other):
        return [(None, other)]
    return [(x, y) for x, y in zip(mine, other, strict=True) if isinstance(x, (Tensor, float))]


def _leaves(returned: Any) -> list[Any]:
    leaves = [leaf.values if isinstance(leaf, Outcomes) else leaf for leaf in pytree.tree_leaves(returned)]
    found = [part for leaf in leaves for part in (isinstance(leaf, Tensor) and parts(leaf)) or [leaf]]
    return [leaf for leaf in found if not isinstance(leaf, Tensor) or is_plain(leaf)]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
    return type(a) is type(b) and bool(a == b)


def _is_continuous(value: Any) -> bool:
    """Whether a value is no count, and so would hardly be the same by chance."""
    if isinstance(value, Tensor):
        value = value.detach().float() if value.itemsize == 1 else value.detach()  # with 8 bits there is no arithmetic
        return value.is_floating_point() and bool((value != value.round()).any())
    return isinstance(value, float) and not value.is_integer()


# ---- keys ----------------------------------------------------------------------------------------------------------


def published(
    reductions: Sequence[ReducedArm],
    original: Mapping[str, Logged],
    logged: Mapping[str, Mapping[str, Logged]],
    options: RunOptions,
) -> list[tuple[str, Tensor, str, Logged]]:
    """Of each plan what it logs and its difference to the original: name, value, the module's key, how it is logged.

    Args:
        reductions: the reduced arms.
        original: what the original has logged.
        logged: what each arm has, by the arm's key.
        options: of the comparison.

    Raises:
        MisconfigurationException: if a name is that of another value.
    """
    found: list[tuple[str, Tensor, str, Logged]] = []
    for reduction in reductions:
        if reduction.control:
            continue
        several = len(options.plans) > 1 or reduction.name != options.key_prefix
        prefix = f"{options.key_prefix}/{reduction.name}" if several else options.key_prefix
        for key, value in logged[reduction.key].items():
            found.append((f"{prefix}/{key}", value.value, key, value))
            if key in original:
                delta = value.value - original[key].value.to(value.value.device)
                found.append((f"{prefix}/delta/{key}", delta, key, value))
    taken = set(original)
    for name, *_ in found:
        if name in taken:  # Lightning would average the two without a word
            raise MisconfigurationException(
                f"LaserCallback would log {name!r}, but there is another value of this name: rename the module's "
                f"metric, or give LaserCallback another `key_prefix` than {options.key_prefix!r}"
            )
        taken.add(name)
    return found


# ---- checkpoints ----------------------------------------------------------------------------------------------------


class OriginalsInCheckpoints:
    """What ``state_dict`` says while an arm's weights are reduced: the originals.

    Signal handlers find these in place, since reduced passes step aside for them. Other threads (a timer, asynchronous
    saving) do not wait for that, and a step may save by itself.

    Args:
        model: the module with all that share its parameters.
        matrices: what will be reduced, with the original weights in place.
    """

    def __init__(self, model: nn.Module, matrices: Sequence[WeightMatrix]) -> None:
        originals = {id(matrix.parameter): matrix.parameter.data for matrix in matrices}
        self._hooks: list[tuple[nn.Module, _Originals]] = []
        for module in model.modules():
            own = {name: originals[id(p)] for name, p in module._parameters.items() if id(p) in originals}
            if own and not isinstance(module, torch.jit.ScriptModule):  # which takes no such hook
                self._hooks.append((module, _Originals(own)))

    @whole
    def within(self) -> Generator[None, None, None]:
        """Around a pass."""
        handles = [module.register_state_dict_post_hook(hook) for module, hook in self._hooks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Originals:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        for name, tensor in self._tensors.items():
            if f"{prefix}{name}" in state_dict:
                state_dict[f"{prefix}{name}"] = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return _Originals, ({},)  # a copy of the module has weights of its own
