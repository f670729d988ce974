"""What a command line goes through before its command's module is imported: help, and mistakes in options."""

from __future__ import annotations

import inspect
import re
from argparse import ArgumentError
from collections.abc import Callable, Iterable
from typing import Any

from laser_callback.cli.mistakes import told_plainly
from laser_callback.cli.quick.parser import LIGHTNING, is_current, options_of, quick_parser, table

_LOOKS = re.compile(r"--(print_config|[\w.]+\.help)(=.*)?")
"""Options that show something in place of a run."""


def checked(command: str, arguments: list[str]) -> list[str]:
    """Show help if it is asked for, and refuse what the command would refuse.

    Accepts what only a class can judge, such as the options of a module of one's own.

    Returns:
        the arguments that the command is called with.

    Raises:
        ArgumentError: for an option that does not exist, is missing, or has another type.
        ValueError: for options that do not go together.
        SystemExit: after help.
    """
    if command not in table()["commands"]:
        return arguments
    if "--help=all" in arguments:
        if not is_current(command):
            return ["--help"]  # takes its time
        arguments = ["--help"]
    elif {"-h", "--help"} & {*arguments}:
        quick_parser(command, short=command in LIGHTNING).parse_args(["--help"])
    if any(map(_LOOKS.fullmatch, arguments)):
        return arguments
    known, classes = _known(command, arguments)
    parser = quick_parser(command)
    with told_plainly(parser):
        given = parser.parse_args(known)
    if not is_current(command):
        return arguments
    missing = [one.name for one in options_of(command) if one.required and one.type is None]
    if missing := [name for name in missing if name not in classes and given.get(name) is None]:
        raise ArgumentError(None, f"the following arguments are required: --{', --'.join(missing)}")
    rule = _RULES.get(command)
    if rule is not None and not classes & {"module"}:  # which may be null
        names = {option.name.replace(".", "_"): option.name for option in options_of(command)}
        rule(**{name: given.get(names[name]) for name in inspect.signature(rule).parameters if name in names})
    return arguments


def _known(command: str, arguments: Iterable[str]) -> tuple[list[str], set[str]]:
    """The arguments whose options have a description that holds, and the names of the others."""
    classes = [option.name for option in options_of(command) if option.kind == "option" and option.type is None]
    known, others, drop = [], set(), False
    for argument in arguments:
        if re.match(r"-+[a-zA-Z]", argument):
            name = argument.partition("=")[0].lstrip("-").rstrip("+")
            drop = any(f"{name}.".startswith(f"{one}.") for one in classes)
            drop |= not is_current(command) and not name.startswith("laser.")
            if drop:
                others.add(name.partition(".")[0])
        if not drop:
            known.append(argument)
    return known, others


# ---- options that go together ----------------------------------------------------------------------------------------


def need_subject(model: Any, facts: Any, module: Any = None, data: Any = None, facts_from: str = "`--facts`") -> None:
    """Refuse all but a model and facts, or a module and data."""
    given = [one is not None for one in (model, facts, module, data)]
    if given not in ([True, True, False, False], [False, False, True, True]):
        raise ValueError(f"give `--model` and {facts_from}, or `--module` and `--data`")


def need_facts_or_judge(model: Any, facts: Any, judge: Any, module: Any = None, data: Any = None) -> None:
    """As :func:`need_subject`, for a search."""
    need_subject(model, judge if facts is None else facts, module, data, "`--facts` or `--judge`")


def need_laser_plan(laser_plan: Any) -> None:
    """Refuse to validate or test without a plan."""
    if laser_plan is None:
        raise ValueError("`laser.plan` must say what to cut, e.g. --laser.plan 27.fc_in@0.01; got none")


def need_plan_of_own(model: Any, plan: Any) -> None:
    """Refuse a model of one's own without a plan."""
    if model is not None and plan is None:
        raise ValueError("`--plan` must say what to cut in a model of your own, e.g. --plan 28.fc_up@0.01")


def need_plan_or_result(plan: Any, result: Any) -> None:
    """Refuse to export without a plan, or a result that may recommend one."""
    if plan is None and result is None:
        raise ValueError("`--plan` is missing, and no result recommends one")


_RULES: dict[str, Callable[..., None]] = {
    "demo": need_plan_of_own,
    "validate": need_laser_plan,
    "test": need_laser_plan,
    "search": need_facts_or_judge,
    "gate": need_subject,
    "rollout": need_subject,
    "export": need_plan_or_result,
}
