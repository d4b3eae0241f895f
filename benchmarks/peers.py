"""tensorly-torch's FactorizedLinear for speed.py, which starts this in an environment of its own.

It asks for one timing at a time.

    python -m venv peers && peers/bin/pip install tensorly-torch==0.5.0 tensorly==0.10.0 torch==2.13.0 \\
        numpy scipy opt-einsum packaging

A block tensor train of two cores and rank 1 is A ⊗ B. Reads {"case", "inputs", "outputs", "b", "rows",
"backward", "threads"} lines, builds the layers, and answers each "factorized" or "reconstructed" line with
the seconds of one call.
"""

import json
import sys
import time

import torch
from tltorch import FactorizedLinear

for line in sys.stdin:
    if line.startswith("{"):
        asked = json.loads(line)
        torch.set_num_threads(asked["threads"])
        (m2, n2), n, m = asked["b"], asked["inputs"], asked["outputs"]
        x = torch.randn(asked["rows"], n, requires_grad=asked["backward"])
        grad = torch.randn(asked["rows"], m)
        made = {
            how: FactorizedLinear(
                (n // n2, n2), (m // m2, m2), factorization="blocktt", rank=1, implementation=how
            )
            for how in ("factorized", "reconstructed")
        }
        continue
    layer = made[line.strip()]
    started = time.perf_counter()
    if asked["backward"]:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(grad)
    else:
        with torch.no_grad():
            layer(x)
    print(time.perf_counter() - started, flush=True)
