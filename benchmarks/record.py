"""Where the figures of a benchmark are kept, for programs to read."""

import json
from pathlib import Path

FOLDER = Path("exps/benchmarks")


def record(name, facts):
    """Append the figures of one run, a dict, to exps/benchmarks/NAME.jsonl as a line of JSON, and say so."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.jsonl"
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"benchmark": name} | facts) + "\n")
    print(f"figures as JSON: the last line of {path}")
