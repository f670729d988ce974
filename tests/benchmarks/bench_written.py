"""A whole search by what a model writes: python tests/benchmarks/bench_written.py [FOLDER]

SmolLM2-135M-Instruct, dequantised from 4 bits, on word problems of one addition or subtraction, with a worked example
in front of each. Candidates race by the log loss of the worked answer; finalists, and the plan that is confirmed, write
theirs. Printed is the result; FOLDER, if given, keeps the problems, the run and its page.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
import time
import warnings
from pathlib import Path

from laser_callback import LaserModule, LaserSearch
from laser_callback.data import FactsDataModule, Generation
from laser_callback.data.demo_model import demo_model_folder
from laser_callback.reports import print_search

SHOT = "Question: Ann has 6 pens and finds 5 more. How many pens does she have?\nAnswer: 6 + 5 = 11\n\n"
STORIES = {
    "+": (
        "{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?",
        "There are {a} {thing} in a box. {name} puts in {b} more. How many {thing} are in the box?",
        "{name} found {a} {thing} in the morning and {b} in the evening. How many {thing} did {name} find?",
        "{name} has {a} {thing}. A friend has {b}. How many {thing} do they have together?",
        "On one shelf are {a} {thing}, on another {b}. How many {thing} does {name} see?",
    ),
    "-": (
        "{name} has {a} {thing} and gives away {b}. How many {thing} are left?",
        "Of {a} {thing}, {name} loses {b}. How many {thing} does {name} still have?",
        "{name} had {a} {thing} and sold {b} of them. How many {thing} remain?",
        "There are {a} {thing} in a bag. {name} takes out {b}. How many {thing} stay in the bag?",
        "{name} needs {a} {thing} and has {b}. How many {thing} are missing?",
    ),
}
NAMES = ("Tom", "Lea", "Omar", "Mia", "Jon", "Eva", "Sam", "Nora", "Ben", "Ida", "Max", "Zoe")
THINGS = ("apples", "books", "coins", "stamps", "shells", "cards", "pears", "stones", "nuts", "balls")


def problems(n: int, seed: int = 0) -> list[dict[str, str]]:
    """That many problems, of which no two ask for the same sum or difference with the same words."""
    draw, found = random.Random(seed), {}
    while len(found) < n:
        sign = draw.choice("+-")
        a, b = draw.randint(3, 40), draw.randint(2, 20)
        story = draw.choice(STORIES[sign])
        if (sign == "-" and b >= a) or (story, a, b) in found:
            continue
        text = story.format(name=draw.choice(NAMES), thing=draw.choice(THINGS), a=a, b=b)
        answer = a + b if sign == "+" else a - b
        found[story, a, b] = {
            "id": f"problem {len(found)}",
            "prompt": f"{SHOT}Question: {text}\nAnswer:",
            "rationale": f"{a} {sign} {b} =",
            "answer": str(answer),
            "group": "sum" if sign == "+" else "difference",
        }
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where the problems and the run are kept")
    parser.add_argument("--problems", type=int, default=1000, help="how many")
    parser.add_argument("--resume", action="store_true", help="go on with the run in FOLDER")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in problems(options.problems)), encoding="utf-8")
    written = Generation(max_new_tokens=16, stop=("\n",), extract=r"= (-?\d+)")
    module = LaserModule(str(demo_model_folder(print)))
    facts = FactsDataModule(str(file), module.tokenizer, generation=written, batch_size=50)
    began = time.monotonic()
    found = LaserSearch(module, facts, folder=folder / "run", resume=options.resume).run()
    print_search(found)
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
