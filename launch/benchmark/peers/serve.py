"""Run a peer of `launch.benchmark` in the peer's own environment: `python serve.py of_NAME`.

Each request is a line of JSON, and so is its answer:

    {"load": "inputs.npz"}               {}
    {"run": "forward"}                   {"ms": 12.3}
    {"save": "forward", "to": "x.npz"}   {}

Before the first request comes {"versions": {...}}. A peer is a module with VERSIONS,
`load(arrays)`, and `run(work)`, which returns a function that gives the results as NumPy arrays.
"""

import importlib
import json
import os
import sys
import time

import numpy as np


def main(module):
    # What libraries print must not end up among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer = importlib.import_module(module)

    def answer(**content):
        print(json.dumps(content, allow_nan=False), file=answers, flush=True)

    answer(versions=peer.VERSIONS)
    for line in sys.stdin:
        request = json.loads(line)
        if "load" in request:
            with np.load(request["load"]) as arrays:
                peer.load(dict(arrays))
            answer()
        elif "run" in request:
            began = time.perf_counter()
            peer.run(request["run"])
            answer(ms=1e3 * (time.perf_counter() - began))
        else:
            results = peer.run(request["save"])
            np.savez(request["to"], **results())
            answer()


if __name__ == "__main__":
    main(sys.argv[1])
