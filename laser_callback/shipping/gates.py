"""Gates: may this plan ship?

A short list of demands, declared beforehand and each judged on its own data: a gain that must be shown, and bounds on
how much worse the rest may become. Contract: a plan is accepted if every gate passes. A gate that fails, or that the
data cannot decide, keeps the original model, with the reason. A gate that nothing can be judged by is an error before
the work. The demands themselves are :mod:`laser_callback.stats.gates`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from laser_callback.compare.measure import Lab
from laser_callback.compare.reduced_arm import ReducedPassError
from laser_callback.data.datamodule import FactsDataModule
from laser_callback.data.facts import subject_key
from laser_callback.data.probes import ProbesDataModule
from laser_callback.data.scoring import CURES
from laser_callback.plans.plan import LaserPlan
from laser_callback.results.comparison import LaserResult
from laser_callback.results.gates import GateVerdict
from laser_callback.stats.constraint import Constraint
from laser_callback.stats.gain import Gain
from laser_callback.stats.gates import Gate, judge_all, parse_gate
from laser_callback.stats.outcomes import PairedResult
from laser_callback.support.reading import read_plain, shown

_NAME = re.compile(r"\w[\w. -]{0,49}(?<! )")  # part of a gate's text, and of file names


def check_names(argument: str, names: Iterable[Any]) -> None:
    """Raise ValueError for a name of data that cannot be part of a gate and of a file's name."""
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name == "data":
            raise ValueError(
                f"`{argument}` must have names of at most 50 letters, digits, spaces, '_', '-' and '.', other than "
                f"'data', which is the main data's: got {shown(name)}"
            )


def read_gates(gates: Any) -> list[Gate]:
    """Gates from their texts, from a mapping of metrics to what is demanded of them, or from a YAML file of either.

    Args:
        gates: such as ``["accuracy: gain", "perplexity <= +2 %"]`` or ``{"accuracy": "gain", "perplexity": "ratio <
            1.02"}``; a :class:`Path`, or such a list with names of ``.yaml`` or ``.yml`` files in it.

    Raises:
        ValueError: if there are none, or one cannot be read.
        OSError: if a file cannot be read.

    >>> [str(gate) for gate in read_gates({"accuracy": "gain, alpha 0.01", "perplexity": "ratio < 1.02"})]
    ['accuracy: gain, alpha 0.01', 'perplexity <= +2 %']
    """
    return _some(_read(gates, set()))


def _some(found: Sequence[Gate]) -> list[Gate]:
    if not found:
        raise ValueError("`gates` must hold at least one gate, such as 'first_token_accuracy: gain', got none")
    return list(found)


def _read(gates: Any, files: set[Path]) -> Sequence[Gate]:
    if isinstance(gates, Gate):
        return [gates]
    if isinstance(gates, Path) or (isinstance(gates, str) and gates.endswith((".yaml", ".yml"))):
        file = Path(gates).resolve()
        if file in files:
            raise ValueError(f"`gates`: the file {str(gates)!r} is named twice, or names itself")
        files.add(file)
        return read_plain(gates, "gates", lambda data: _some(_read(data or [], files)), yaml_form=True)
    if isinstance(gates, str):
        return [parse_gate(gates)]
    if isinstance(gates, Mapping):
        return [parse_gate(f"{key}: {demand}") for key, demand in gates.items()]
    if isinstance(gates, Sequence):
        return [gate for item in gates for gate in _read(item, files)]
    raise ValueError(f"`gates` must be texts, a mapping or a YAML file, got {shown(gates)}")


class Gates:
    """Gates with their data.

    Args:
        gates: as for :func:`read_gates`.
        data: what ``trainer.validate`` takes: a data module or dataloaders, with examples that nothing was chosen by.
        others: more such data by name. The metrics of the data ``"safety"`` are named ``safety/refusal_rate`` and so
            on in gates.
        controls: also run the controls of the plan on the data of a gain.
        seed: of the random control and of the noise.

    Raises:
        ValueError, OSError: if a gate cannot be read.
        ValueError: if a name of the others cannot be part of a gate and of a file's name.
    """

    def __init__(
        self, gates: Any, data: Any, others: Mapping[str, Any] | None = None, *, controls: bool = False, seed: int = 0
    ) -> None:
        self.gates = read_gates(gates)
        check_names("others", others or {})
        self.data: dict[str, Any] = {"": data, **(others or {})}
        self._controls, self._seed = controls, seed
        self._home: dict[str, str] = {}  # the data that a metric comes from

    def prepare(self, lab: Lab, plan: LaserPlan) -> None:
        """Try the plan on the first batch of everything, so that what cannot be judged is said before the work.

        Warns of a bound on right and wrong that the data are too few to show.

        Raises:
            ValueError: for a metric that does not exist, or is not an average over examples; for a gain whose better
                direction is not known, or that the original has the best of by definition; for data that no gate
                names, and data whose metrics have one name.
        """
        rows: list[PairedResult] = []
        self._home = {}
        for name, data in self.data.items():
            result = lab.compare(plan, _first(data), primary=None, controls=False, limit_batches=1)
            for row in _named(name, result):
                if row.metric in self._home:
                    raise ValueError(f"two of the data have a metric {row.metric!r}: give `others` other names")
                self._home[row.metric] = name
                rows.append(row)
        judge_all(self.gates, rows, cures=CURES)
        shares = {row.metric for row in rows if row.kind == "binary"}
        for gate in self.gates:
            if isinstance(gate, Constraint) and gate.key in shares:
                name = self._home[gate.key]
                if reason := gate.too_few(_count(self.data[name], gate.key.removeprefix(f"{name}/"))):
                    rank_zero_warn(f"{f'`others[{name!r}]`' if name else '`data`'}: {reason}")
        not_means = {row.metric: row.note for row in rows if row.kind is None}
        of_both = {row.metric for row in rows if row.kind == "pair"}
        for gate in self.gates:
            if isinstance(gate, Gain) and gate.key in of_both:
                raise ValueError(
                    f"the gate '{gate}' can never pass: the original has the best {gate.key!r} by definition; bound it"
                )
            if gate.key in not_means:
                raise ValueError(f"the gate '{gate}' can never be decided: {gate.key!r} is {not_means[gate.key]}")
        used = {self._home[gate.key] for gate in self.gates}
        if unused := [name for name in self.data if name and name not in used]:
            raise ValueError(f"`others` has {', '.join(unused)}, which no gate names: leave it out, or add a gate")

    def measure(self, lab: Lab, plan: LaserPlan) -> dict[str, LaserResult]:
        """Compare original and plan on all data that gates name. After :meth:`prepare`."""
        return self.measure_by(partial(lab.compare, plan))

    def measure_by(self, compare: Callable[..., LaserResult]) -> dict[str, LaserResult]:
        """The same, by ``compare(data, primary=..., controls=..., seed=...)``, for what is no plan."""
        results = {}
        for name, data in self.data.items():
            own = [gate for gate in self.gates if self._home[gate.key] == name]
            gains = [gate.key.removeprefix(f"{name}/") for gate in own if isinstance(gate, Gain)]
            if own:
                controls = self._controls and bool(gains)
                primary = gains[0] if gains else None
                found = compare(data, primary=primary, controls=controls, seed=self._seed)
                better = {g.key: g.direction == "max" for g in own if isinstance(g, Gain) and g.direction}
                results[name] = found.directed({key.removeprefix(f"{name}/"): of for key, of in better.items()})
        return results

    def judge(self, plan: LaserPlan | None, measured: Callable[[], Mapping[str, LaserResult]]) -> GateVerdict:
        """What the gates say to what is ``measured``; a plan whose passes fail is not accepted."""
        try:
            return self.verdict(plan, measured())
        except ReducedPassError as error:
            return GateVerdict(plan, [], {}, str(error))

    def verdict(self, plan: LaserPlan | None, results: Mapping[str, LaserResult]) -> GateVerdict:
        """What the gates say to what was measured."""
        judgements = []
        for gate in self.gates:
            name = self._home[gate.key]
            checks = results[name]["laser"].prior_checks.items()
            full = {key: f"{name}/{key}" if name else key for key, _ in checks}
            priors = {full[key]: replace(of, metric=full[key]) for key, of in checks}
            judgements += judge_all([gate], _named(name, results[name]), priors)
        return GateVerdict(plan, judgements, dict(results))


def _named(name: str, result: LaserResult) -> list[PairedResult]:
    """The rows of a comparison, their metrics named as in gates."""
    return [replace(row, metric=f"{name}/{row.metric}") if name else row for row in result["laser"].rows]


def _count(data: Any, metric: str) -> int:
    """How many independent examples a metric can have, at most; of data that do not tell any number."""
    if isinstance(data, ProbesDataModule):
        of = {"refusal_rate": "refuse", "answer_rate": "answer"}[metric]
        return sum(probe.should == of for probe, _ in data.probes)
    if isinstance(data, FactsDataModule):
        return len({subject_key(item.fact) for item in data.encoded})
    loaders = loaders_of(data)
    sized = all(isinstance(getattr(loader, "dataset", None), Sized) for loader in loaders)
    return sum(len(loader.dataset) for loader in loaders) if sized else sys.maxsize


def loaders_of(data: Any) -> Sequence[Any]:
    """The dataloaders that ``trainer.validate`` would run."""
    if isinstance(data, LightningDataModule):
        data.prepare_data()
        data.setup("validate")
        data = data.val_dataloader()
    return data if isinstance(data, (list, tuple)) else [data]


def _first(data: Any) -> Any:
    """What shows in one batch which metrics there are: facts with each role of a row, probes of each kind, if any."""
    if not isinstance(data, (FactsDataModule, ProbesDataModule)):
        return data
    data.setup("validate")
    text: list[Any] = []
    shown: dict[Any, Any] = {}
    if isinstance(data, FactsDataModule):
        for fact in data.encoded:
            shown |= {row.role: fact for row in fact.rows}
        loaders = data.val_dataloader()
        text = loaders[1:] if isinstance(loaders, list) else []
    else:
        shown = {item[0].should: item for item in data.probes}
    each_once = list({id(item): item for item in shown.values()}.values())  # a fact may have rows of several roles
    few = cast("Dataset[Any]", each_once)  # a list has all that a Dataset needs
    return [DataLoader(few, batch_size=len(each_once), collate_fn=data.collate), *text]
