"""The keys of every stage of every profile: a changed key throws away finished work, days of it for paper.

A key that has to change is changed in the same commit (`python tests/suite/test_stage_keys.py` writes the
file anew), with the reason in LOG.md.
"""

import hashlib
import json
from pathlib import Path
from unittest import mock

import pytest

from kn.paper import NOTEBOOKS
from kn.suite import planner, profiles
from kn.suite.plan import plan_stages

FILE = Path(__file__).with_name("stage_keys.json")
OVERRIDES = (  # integers where fractions are allowed, and the reverse: a key tells 1 from 1.0
    "pretrain.epochs=2", "ablation.learning_rate=1", "text.sample=1", "readings.logit_term=1",
    "readings.temperature=3", "beyond.shares=0.1,1", "beyond.glue_shares=0,1", "compression.rank=2",
    "glue.max_length=32", "finetune_glue.alphas=1,0,0,0.5", "model.dropout=0",
)  # fmt: skip
CASES = [
    (name, precision, overrides)
    for precision in ("bf16", "fp32")
    for name in profiles.PROFILES
    for overrides in ((), OVERRIDES)
    if precision == "bf16" or not overrides
]


def keys(name, precision, overrides):
    """{kind: number of stages and a digest over their paths} of all notebooks with two seeds.

    What follows the machine (packages, assets, mirror) is left out.
    """
    outside = {
        "precision": lambda device="cpu": precision,
        "package_versions": lambda names: dict.fromkeys(names, "1"),
        "asset_digest": lambda folder: "asset",
    }
    with mock.patch.multiple(planner, **outside), mock.patch.object(planner, "digest", lambda *_: {}):
        plan, _ = plan_stages(profiles.load(name, overrides), NOTEBOOKS, 2, without_mirror=True)
    found: dict[str, list[str]] = {}
    for item in plan:
        found.setdefault(item.kind, []).append(item.path)
    return {
        kind: f"{len(paths)} {hashlib.sha256(chr(10).join(sorted(paths)).encode()).hexdigest()[:12]}"
        for kind, paths in found.items()
    }


def case(name, precision, overrides):
    return f"{name}-{precision}{'-set' if overrides else ''}"


@pytest.mark.parametrize("arguments", CASES, ids=lambda arguments: case(*arguments))
def test_no_key_has_changed(arguments):
    assert keys(*arguments) == json.loads(FILE.read_text())[case(*arguments)]


if __name__ == "__main__":
    FILE.write_text(json.dumps({case(*arguments): keys(*arguments) for arguments in CASES}, indent=1) + "\n")
