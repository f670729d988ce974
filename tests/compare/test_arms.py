"""The copies that keep two passes apart, and the private parts of Lightning that the arms rely on."""

from __future__ import annotations

import inspect
import random
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection, _ResultMetric
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics import MetricCollection, SumMetric
from torchmetrics.classification import BinaryPrecision, BinaryRecall
from transformers import BatchEncoding
from transformers.modeling_outputs import CausalLMOutput

from laser_callback.passes.copies import copy_data, is_record
from laser_callback.passes.state import Own, Start

# ---- copies ----------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    a: Any
    b: Any


@dataclass(frozen=True)
class Frozen:
    x: Any
    unset: Any = field(init=False)


class Plain:
    def __init__(self) -> None:
        self.x = [torch.zeros(2)]

    def judge(self) -> None:
        """What a decorator may mark."""


class Graph:
    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.lock = object()

    def clone(self) -> Graph:
        return Graph(self.x.clone())


def _first_tensor(value: Any) -> Tensor:
    """Whatever the container, the tensor that it holds."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (dict, UserDict)):
        return _first_tensor(next(iter(value.values())))
    if isinstance(value, (list, tuple, deque)):
        return _first_tensor(value[0])
    return _first_tensor(value.x)


@pytest.mark.parametrize(
    "build",
    [
        lambda t: t,
        lambda t: [t],
        lambda t: (t, "text"),
        lambda t: Pair(t, {1}),
        lambda t: {"a": {"b": [t]}},
        lambda t: OrderedDict(a=t),
        lambda t: defaultdict(list, {"a": [t]}),
        lambda t: deque([t], maxlen=3),
        lambda t: UserDict(a=t),
        lambda t: BatchEncoding({"input_ids": t}),
        lambda t: Frozen([t]),
        lambda t: CausalLMOutput(logits=t),
        lambda t: Graph(t),
        lambda t: Plain(),
    ],
)
def test_copies_are_of_the_same_kind_and_share_nothing(build: Any) -> None:
    value = build(torch.arange(3.0))
    new = copy_data(value)
    assert type(new) is type(value)
    before = _first_tensor(value).clone()
    assert torch.equal(_first_tensor(new), before)
    _first_tensor(new).add_(1)
    assert torch.equal(_first_tensor(value), before)


def test_special_containers_keep_what_makes_them_special() -> None:
    counts = copy_data(Counter("abca"))
    counts["new"] += 1
    assert copy_data(defaultdict(list))["missing"] == []
    assert copy_data(deque([1, 2], maxlen=2)).maxlen == 2
    output = copy_data(CausalLMOutput(logits=torch.zeros(1)))
    assert output.logits is output["logits"]
    assert not hasattr(copy_data(Frozen(1)), "unset")
    assert copy_data(torch.Size([2, 3])) == torch.Size([2, 3])


def test_aliases_stay_aliases_and_cycles_end() -> None:
    tensor, shared = torch.zeros(1), [1]
    value: dict[str, Any] = {"a": tensor, "b": [tensor, shared], "c": shared}
    value["self"] = value
    new = copy_data(value)
    assert new["a"] is new["b"][0]
    assert new["b"][1] is new["c"]
    assert new["self"] is new
    assert new["a"] is not tensor


def test_what_is_not_data_is_kept() -> None:
    model, parameter, lock = nn.Linear(2, 2), nn.Parameter(torch.zeros(1)), object()
    new = copy_data([model, parameter, lock, len, int])
    assert [a is b for a, b in zip(new, [model, parameter, lock, len, int], strict=True)] == [True] * 5


@pytest.mark.parametrize("inference", [False, True])
def test_tensors_keep_requires_grad_and_dtype(inference: bool) -> None:
    tensors = [torch.zeros(2, requires_grad=True), torch.zeros(2, dtype=torch.bfloat16), torch.eye(2).to_sparse()]
    with torch.inference_mode(inference):
        new = copy_data(tensors)
    assert [t.dtype for t in new] == [t.dtype for t in tensors]
    assert new[0].requires_grad
    assert new[0].grad_fn is None
    assert new[2].layout is torch.sparse_coo


def test_generators_go_on_by_themselves() -> None:
    generators = [
        torch.Generator().manual_seed(1),
        np.random.default_rng(1),
        random.Random(1),
        np.random.RandomState(1),
    ]

    def draw(owned: list[Any]) -> list[float]:
        return [float(torch.rand((), generator=owned[0])), owned[1].random(), owned[2].random(), owned[3].rand()]

    draw(generators)
    new = copy_data(generators)
    drawn = draw(new)
    assert draw(generators) == drawn
    assert draw(new) == draw(generators)


def test_records_are_objects_of_plain_values_only() -> None:
    with_a_model, empty = Plain(), Plain()
    with_a_model.model = nn.Linear(1, 1)
    del empty.x
    assert is_record(Plain())
    for value in (with_a_model, empty, Plain, nn.Linear(1, 1), TensorDataset(torch.zeros(1)), "text", [1], random):
        assert not is_record(value)
    function = with_a_model.judge.__func__
    function.marked = True  # as decorators mark what they decorate
    assert not is_record(function)
    assert copy_data({"judge": with_a_model.judge})["judge"] == with_a_model.judge


# ---- the module's state ----------------------------------------------------------------------------------------------


class Keeper(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.metrics = MetricCollection([BinaryPrecision(), BinaryRecall()])
        self.body = nn.Sequential(nn.Linear(2, 2))
        self.outputs: list[int] = []
        self.n = 0


def test_compute_groups_share_their_states_in_each_arm() -> None:
    module, user, arm = Keeper(), Keeper(), Keeper()  # the last two are what each arm would be alone
    state = Own(Start(module))

    def update(keeper: Keeper, target: Tensor) -> tuple[bool, Any]:
        keeper.metrics.update(torch.ones(4), target.int())
        values = {name: float(value) for name, value in keeper.metrics.compute().items()}
        precision, recall = keeper.metrics._modules.values()
        return precision.tp is recall.tp, (values, keeper.metrics.compute_groups, int(recall.tp), recall.update_count)

    shared = []
    for _ in range(3):
        got = update(module, torch.ones(4))
        assert got == update(user, torch.ones(4))
        with state:
            got_of_arm = update(module, torch.tensor([0, 0, 1, 0]))
        assert got_of_arm == update(arm, torch.tensor([0, 0, 1, 0]))
        shared += [got[0], got_of_arm[0]]
    assert shared[-1]
    assert shared[-2]


def test_what_an_arm_creates_or_deletes_is_its_own() -> None:
    module = Keeper()
    state = Own(Start(module))
    with state:
        module.total = SumMetric()
        module.body.seen = SumMetric()
        module.note = object()
        del module.n
        module.outputs = [1]
        module.body.register_buffer("count", torch.ones(1))
    assert not hasattr(module, "total")
    assert not hasattr(module.body, "seen")
    assert not hasattr(module, "note")
    assert not hasattr(module.body, "count")
    assert (module.n, module.outputs) == (0, [])
    assert list(module._modules) == ["metrics", "body"]
    with state:
        assert (module.outputs, module.body.count.item()) == ([1], 1)
        assert not hasattr(module, "n")
        module.total.update(2.0)
        assert module.total.compute() == 2


def test_layers_keep_their_order_and_are_shared() -> None:
    module = Keeper()
    state = Own(Start(module))
    module.body.append(nn.ReLU())  # by the user's pass
    with state:
        assert [type(layer).__name__ for layer in module.body] == ["Linear", "ReLU"]
    assert [type(layer).__name__ for layer in module.body] == ["Linear", "ReLU"]


def test_an_arm_that_fails_keeps_what_it_has_done_and_gives_back_the_rest() -> None:
    module = Keeper()
    state = Own(Start(module))

    def interrupted() -> None:
        with state:
            module.outputs.append(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert module.outputs == []
    with state:
        assert module.outputs == [1]


# ---- what the arms need of Lightning ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (
            _LoggerConnector,
            "on_batch_start on_batch_end on_epoch_end epoch_end_reached update_eval_epoch_metrics "
            "_evaluation_epoch_end",
        ),
        (_ResultCollection, "_get_cache _forked_name reset"),
        (_EvaluationLoop, "_build_kwargs _build_step_args_from_hook_kwargs _is_sequential num_dataloaders"),
        (pl.Trainer, "loggers sanity_checking _evaluation_loop _results"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_lightning_has_the_parts_that_the_arms_use(owner: type, names: str) -> None:
    assert [name for name in names.split() if not hasattr(owner, name)] == []


def test_lightning_keeps_its_state_where_the_arms_look_for_it(tmp_path: Any) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    connector = vars(trainer._logger_connector)
    assert {"_callback_metrics", "_logged_metrics", "_progress_bar_metrics", "_current_fx"} <= connector.keys()
    assert {"_results", "_logged_outputs", "_data_fetcher"} <= vars(trainer.validate_loop).keys()
    assert list(inspect.signature(_LoggerConnector.on_batch_start).parameters) == ["self", "batch", "dataloader_idx"]
    assert {"_current_fx_name", "_metric_attributes", "_trainer"} <= vars(pl.LightningModule()).keys()
    used = {"value", "cumulated_batch_size", "meta", "has_reset", "is_tensor"}
    source = inspect.getsource(_ResultMetric)
    assert all(f"self.{name}" in source or f'"{name}"' in source for name in used)
    hooks = {name for name in vars(nn.Module()) if name.startswith("_forward_")}
    assert hooks == {
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    }
