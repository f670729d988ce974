"""Real signals at random moments around each context of the package: python tests/benchmarks/interrupt_storm.py 20000

A SIGALRM whose handler raises KeyboardInterrupt strikes at a random microsecond of entry, a short body and exit, as
often as the argument says, shared among the contexts: the shorter, the more. Prints for each context how many struck,
how often anything was left behind after that, and what: weights, patches, hooks, flags, handlers, generators, open
contexts. Exits with 1 where anything was.
"""

from __future__ import annotations

import argparse
import gc
import logging
import random
import signal
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))

from small_models import gpt2
from toy import Toy, make_data
from trainers import evaluating

from laser_callback import LaserCallback, merged, reduced
from laser_callback.compare.arms import Arm
from laser_callback.compare.reduced_arm import ReducedArm
from laser_callback.compare.trainer import left_as_found, quiet_trainer
from laser_callback.passes.metric_states import Kept
from laser_callback.passes.state import Own, RandomState, Start
from laser_callback.passes.watch import WritesRefused
from laser_callback.passes.windows import Windows
from laser_callback.plans.kinds import MLP_KINDS
from laser_callback.plans.matrices import find_matrices
from laser_callback.search.screen import GradientScreen
from laser_callback.shipping.thin import factored
from laser_callback.spectra.store import Spectra
from laser_callback.support import interrupts
from laser_callback.surgery import interception, swap
from laser_callback.surgery.record import recorded
from laser_callback.surgery.replay import LayerReplay

PLAN = "1.mlp@0.2"
Work = Callable[[], None]


class World:
    """What is to be the same after an interrupt."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = [(name, module) for name, module in model.named_modules()]
        self.weights = [(p, p.detach().clone()) for p in model.parameters()]
        self.before = self.now()

    def now(self) -> dict[str, Hashable]:
        modules = dict(self.modules)
        states = RandomState.now().states
        return {
            "weights": tuple(bool(torch.equal(p, value)) for p, value in self.weights),
            "storage": tuple(p.data_ptr() for p, _ in self.weights),
            "requires_grad": tuple(p.requires_grad for p, _ in self.weights),
            "gradients": tuple(p.grad is None for p, _ in self.weights),
            "parameter hooks": tuple(len(p._post_accumulate_grad_hooks or ()) for p, _ in self.weights),
            "modules": tuple((name, id(module)) for name, module in self.model.named_modules()),
            "hooks": tuple(
                len(getattr(module, name))
                for module in modules.values()
                for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
            ),
            "patches": tuple("forward" in vars(module) for module in modules.values()),
            "call": id(nn.Module.__call__),
            "watches": len(interception._open),
            "cuts": len(swap._in_place),
            "mode": tuple(module.training for module in modules.values()),
            "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            "handlers": tuple(str(signal.getsignal(n)) for n in sorted(signal.valid_signals())),
            "open contexts": len(interrupts._handlers._contexts),
            "waiting": len(interrupts._handlers._waiting),
            "log level": logging.getLogger("lightning.pytorch").level,
            "warnings": (id(warnings.filters), id(warnings.showwarning)),
            "random": (hash(states["python"]), states["numpy"][1].tobytes(), states["torch"].numpy().tobytes()),
        }

    def left(self) -> list[str]:
        now = self.now()
        return [name for name, value in self.before.items() if now[name] != value]


def comes_from_interrupt(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def within(make: Callable[[], AbstractContextManager[Any]]) -> Work:
    def work() -> None:
        with make():
            sum(range(100))

    return work


def contexts() -> dict[str, tuple[nn.Module, Work]]:
    """By name: what is changed, and entry, body and exit."""
    spectra = Spectra(memory_bytes=2**30)
    model = gpt2()
    cut = reduced(model, PLAN, spectra)
    cut.prepare()
    found: dict[str, tuple[nn.Module, Work]] = {
        "reduced": (model, within(lambda: cut)),
        "reduced, factorised": (model, within(lambda: reduced(model, PLAN, spectra))),
        "recorded": (model, within(lambda: recorded(model, PLAN, spectra))),
        "factored": (model, within(lambda: factored(model, PLAN, spectra))),
    }

    replay = LayerReplay(model, {"arm": [matrix for matrix, _ in cut.matrices]})
    ids = torch.arange(6)[None]

    def recording() -> None:
        with torch.inference_mode(), replay.record():
            model(ids)
        with torch.inference_mode(), replay.replay("arm"):
            model(ids)

    def recording_alone() -> None:
        with replay.record():
            sum(range(100))
        with replay.replay("arm"):
            sum(range(100))

    found["record, replay"] = model, recording_alone
    found["record, replay of passes"] = model, recording

    config = peft.LoraConfig(r=2, target_modules=["c_proj"], init_lora_weights=False, fan_in_fan_out=True)
    adapted = peft.get_peft_model(gpt2(), config).eval()
    found["merged"] = adapted, within(lambda: merged(adapted))

    module = Toy()
    trainer = evaluating(module)
    start = Start(module)
    start.first_batch()
    own = Own(start)
    found["Own"] = module, within(lambda: own)
    found["WritesRefused"] = module, within(lambda: WritesRefused(module))
    arm = Arm(trainer, module, "validation", start, Windows(start, True))
    reduced_arm = ReducedArm("arm", "", reduced(module, PLAN, spectra), arm, Kept(on=True))
    reduced_arm.cut.prepare()
    found["ReducedArm._in_place"] = module, within(reduced_arm._in_place)
    found["ReducedArm.active"] = module, within(reduced_arm.active)

    def screening() -> None:
        screen = GradientScreen([m for m in find_matrices(module) if m.kind in MLP_KINDS], spectra)
        with left_as_found(trainer, module, [screen]):
            screen.setup(trainer, module, "validate")
            screen.on_validation_start(trainer, module)
            module.eval()
            sum(range(100))
            screen.teardown(trainer, module, "validate")

    found["screen's hooks"] = module, screening
    found["quiet_trainer"] = module, within(lambda: quiet_trainer("cpu"))

    trained = Toy().train()

    def validating() -> None:
        with quiet_trainer("cpu") as run, left_as_found(run, trained, []):
            rng = RandomState.now()
            run.validate(trained, make_data(), verbose=False)
            rng.set()  # a DataLoader draws a seed for its workers

    found["a validation"] = trained, validating

    def comparing() -> None:
        callback = LaserCallback(PLAN, report=False)
        with quiet_trainer("cpu", callbacks=[callback]) as run, left_as_found(run, trained, [callback]):
            rng = RandomState.now()
            run.validate(trained, make_data(), verbose=False)
            rng.set()

    found["a comparison"] = trained, comparing
    return found


def length_of(work: Work) -> float:
    """Seconds without an interrupt."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def storm(model: nn.Module, work: Work, length: float, count: int, rng: random.Random) -> tuple[int, Counter[str]]:
    """How many struck, and what was left behind."""

    armed = False

    def handler(*_: Any) -> None:
        if armed:  # a signal that another thread has taken may come late
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handler)
    world, struck, left = World(model), 0, Counter[str]()
    try:
        for _ in range(count):
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, max(1e-6, rng.uniform(0, 1.1 * length)))
                work()
                armed = False
            except BaseException as error:  # of Lightning's, whose own clean-up was struck
                if not comes_from_interrupt(error):
                    raise
                struck += 1
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            if names := world.left():
                gc.collect()  # what nobody refers to any more, but for a cycle of the trainer's
                if names := world.left():
                    left.update(names)
                    world = World(model)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return struck, left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("count", type=int, help="rounds, shared among the contexts")
    parser.add_argument("--only", nargs="+", default=[""], help="the contexts with one of these in their name")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    rng = random.Random(0)
    all_of_them = {n: c for n, c in contexts().items() if any(part in n for part in arguments.only)}
    print(f"{'context':26} {'rounds':>7} {'struck':>7} {'left behind':>11} {'ms each':>8} {'s in all':>8}")
    lengths = {name: length_of(work) for name, (_, work) in all_of_them.items()}
    shares = {name: length**-0.5 for name, length in lengths.items()}
    failed = 0
    for name, (model, work) in all_of_them.items():
        count, begin = round(arguments.count * shares[name] / sum(shares.values())), time.perf_counter()
        struck, left = storm(model, work, lengths[name], count, rng)
        failed += left.total()
        times = f"{lengths[name] * 1e3:8.2f} {time.perf_counter() - begin:8.1f}"
        print(f"{name:26} {count:7} {struck:7} {left.total():11} {times}  {dict(left) or ''}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
