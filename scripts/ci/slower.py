#!/usr/bin/env python3
"""Runs moectl and makes what it measured slower: a seeded regression, to test a gate with.

    MOECTL=target/release/moectl SLOWER=1.1 scripts/ci/slower.py bench ... -o FOLDER

Every time in FOLDER/run.json is multiplied by SLOWER, every rate divided by it.
"""

import json
import os
import subprocess
import sys


def main():
    factor = float(os.environ.get("SLOWER", "1.0"))
    status = subprocess.call([os.environ["MOECTL"], *sys.argv[1:]])
    if status != 0:
        return status
    path = os.path.join(sys.argv[sys.argv.index("-o") + 1], "run.json")
    with open(path) as file:
        run = json.load(file)
    for context in run["contexts"]:
        for repetition in context["repetitions"]:
            for time in ("ttft_ms", "e2e_ms"):
                repetition[time] *= factor
            for rate in ("prefill_tok_s", "decode_tok_s"):
                repetition[rate] /= factor
            repetition["itl_ms"] = [ms * factor for ms in repetition["itl_ms"]]
    with open(path, "w") as file:
        json.dump(run, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
