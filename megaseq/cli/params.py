"""`megaseq params`: lists, shows, compares, explains and checks params, without data and without a device."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaseq.base import MegaseqError, ParamsBase, params_from_yaml, registry
from megaseq.base.errors import AsText, must
from megaseq.base.fields import doc_of, fields_of, hints_of, type_text
from megaseq.base.params import brief
from megaseq.cli import overrides

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_NAME_HELP = "a registered experiment, a run directory, or a params file (.txt or .yaml)"


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = subparsers.add_parser(
        "params",
        help="list, show, compare, explain and check params",
        description="Answers questions about params. Needs neither data nor a device.",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    listing = actions.add_parser("list", help="list the registered experiments")
    listing.set_defaults(run=run_list)

    show = actions.add_parser("show", help="print all params of an experiment or run")
    show.add_argument("name", metavar="NAME", help=_NAME_HELP)
    overrides.add_arguments(show)
    show.add_argument("--origins", action="store_true", help="say where each value was set")
    show.add_argument("--yaml", action="store_true", help="as YAML that -c reads back")
    show.add_argument(
        "--changed",
        action="store_true",
        help="as YAML, only what differs from the registered experiment or, with nothing overridden, from the defaults",
    )
    show.add_argument("--deepspeed", action="store_true", help="the JSON that DeepSpeed's engine is given for ZeRO")
    show.set_defaults(run=run_show)

    diff = actions.add_parser("diff", help="print the params in which two experiments, runs or files differ")
    diff.add_argument("first", metavar="A", help=_NAME_HELP)
    diff.add_argument("second", metavar="B", help="what A is compared with")
    diff.set_defaults(run=run_diff)

    explain = actions.add_parser("explain", help="say what a param means, its type, and who set it where")
    explain.add_argument("name", metavar="NAME", help=_NAME_HELP)
    explain.add_argument("path", metavar="PATH", help="path of the param, such as task.encoder.num_layers")
    overrides.add_arguments(explain)
    explain.set_defaults(run=run_explain)

    check = actions.add_parser("check", help="list every problem; exit code 1 when there is one")
    check.add_argument("names", nargs="*", metavar="NAME", help=f"{_NAME_HELP}; default: every experiment")
    check.set_defaults(run=run_check)


def load(name: str) -> ParamsBase:
    """Returns the params of an experiment by its name, or those that a run directory or a file holds.

    Raises:
        RegistryError: There is no file and no experiment of that name.
        ParamsError: The directory has no params, or the file cannot be read as params.
    """
    path = Path(name)
    if path.is_dir():
        # The text also remembers who set what; the YAML does not.
        found = [path / file for file in ("params.txt", "params.yaml") if (path / file).is_file()]
        if not found:
            raise must(name, "be a run directory, with params.yaml in it", AsText("without"), "Check the path")
        path = found[0]
    if not path.is_file():
        params: ParamsBase = registry.params(name)
        return params
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise must(name, "be a readable UTF-8 file", AsText(str(error)), "Check the file") from None
    if path.suffix == ".txt":
        return ParamsBase.from_text(content, filename=str(path))
    if path.suffix in (".yaml", ".yml"):
        from_yaml: ParamsBase = params_from_yaml(content, filename=str(path))
        return from_yaml
    raise must(name, "end in .txt or .yaml", AsText(path.suffix or "without an ending"), "Rename the file")


def run_list(arguments: argparse.Namespace) -> int:
    """Prints name and purpose of each experiment."""
    names = registry.names()
    width = max(map(len, names), default=0)
    for name in names:
        doc = (registry.get(name).__doc__ or "").strip().split("\n")[0]
        print(f"{name:{width}}  {doc}".rstrip())
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    """Prints params as text or YAML, or what DeepSpeed is told of them."""
    params = _loaded(arguments)
    if arguments.deepspeed:
        print(json.dumps(_deepspeed(params), indent=2))
    elif arguments.changed:
        base, basis = _basis(params, overridden=bool(arguments.config or arguments.overrides or arguments.data_dir))
        print(f"# What differs from {basis}.")
        print(params.to_yaml(changed_only=True, base=base, origins=arguments.origins), end="")
    elif arguments.yaml:
        print(params.to_yaml(origins=arguments.origins), end="")
    else:
        print(params.to_text(origins=arguments.origins), end="")
    return 0


def run_diff(arguments: argparse.Namespace) -> int:
    """Prints the differing lines; nothing when there are none."""
    for line in load(arguments.first).diff(load(arguments.second)):
        print(line)
    return 0


def run_explain(arguments: argparse.Namespace) -> int:
    """Prints value, type, meaning and history of one param."""
    params = _loaded(arguments)
    path: str = arguments.path
    value = params.get(path)
    print(f"{path} : {brief(value) if not isinstance(value, type) else value.__qualname__}")
    for title, text in _facts(params, path=path):
        for number, line in enumerate(textwrap.wrap(text, 100) or [""]):
            print(f"  {'' if number else title:9}{line}".rstrip())
    latest, *earlier = reversed(params.history(path))
    print(f"  {'set by':9}{latest.origin}")
    for write in earlier:
        print(f"  {'before':9}{write.value}  # {write.origin}")
    if isinstance(value, ParamsBase):
        print("  params")
        for name in fields_of(type(value)):
            doc = doc_of(type(value), name).split("\n")[0]
            print(f"    {name} : {brief(value.get(name))}{f'  # {doc}' if doc else ''}")
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    """Prints all problems of all named params; returns 1 when there is one."""
    failed = False
    for name in arguments.names or registry.names():
        try:
            problems = [str(problem) for problem in load(name).check()]
        except MegaseqError as error:
            problems = str(error).split("\n")
        except NotImplementedError as error:
            problems = [str(error)]
        failed = failed or bool(problems)
        print(f"{name}: {'ok' if not problems else f'{len(problems)} to mend'}")
        for problem in problems:
            print(f"  {problem}")
    return 1 if failed else 0


def _deepspeed(params: ParamsBase) -> dict[str, Any]:
    from megaseq.train.experiment import Run
    from megaseq.train.updaters.deepspeed_config import deepspeed_config

    if not isinstance(params, Run.Params):
        raise must("--deepspeed", "be asked of a run or an experiment", params.cls.__name__, "Name one of these")
    if params.parallel.zero.stage == 0:
        raise must(
            "parallel.zero.stage",
            "be 1, 2 or 3 for DeepSpeed to be used",
            0,
            "Without ZeRO there is no JSON; add, for example, parallel.zero.stage=1",
        )
    return deepspeed_config(params.parallel)


def _loaded(arguments: argparse.Namespace) -> ParamsBase:
    return overrides.apply(
        load(arguments.name),
        configs=arguments.config,
        overrides=arguments.overrides,
        data_dir=arguments.data_dir,
    )


def _basis(params: ParamsBase, *, overridden: bool) -> tuple[ParamsBase, str]:
    name = params.get("name") if "name" in params else ""
    registered = None
    if isinstance(name, str) and name in registry.names():
        registered = registry.params(name)
    if registered is not None and (overridden or registered != params):
        return registered, f"the experiment {name}"
    return type(params)(), f"the defaults of {params.cls.__name__}"


def _facts(params: ParamsBase, *, path: str) -> list[tuple[str, str]]:
    above, _, last = path.rpartition(".")
    if last == "cls":
        doc = (params.get(above) if above else params).cls.__doc__ or ""
        return [("type", "a Configurable class"), ("meaning", doc.strip().split("\n")[0])]
    from megaseq.base import access, paths

    owner, name = access.owner_of(params, keys=paths.split(path))
    doc = " ".join(doc_of(type(owner), name).split())
    facts = [("type", type_text(hints_of(type(owner))[name])), ("of", owner.cls.__qualname__)]
    return [*facts, ("meaning", doc)] if doc else facts
