"""Every reading of the paper that could turn a verdict, switched one at a time: which stages that changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from kn.suite.plan import OBJECTIVES, StagePlanner
from kn.suite.profiles import Profile
from kn.suite.store import Stage

SWITCHES = {  # reading: (part of the profile, the field, its other value)
    "even layers instead of odd ones": ("compression", "layers", "even"),
    "‖B‖ = 1 instead of √σ for A and B": ("compression", "scale", "unit_b"),
    "KL(teacher ‖ student) in eq. 3": ("readings", "direction", "teacher_student"),
    "output of the block in eq. 4": ("readings", "hidden_point", "block"),
    "a logit term (vanilla KD) beside eq. 5": ("readings", "logit_term", 0.5),
    "ILKD in Table 4's fine-tuning": ("readings", "table4_ilkd", True),
    "ILKD in Table 7's MNLI": ("readings", "table7_ilkd", True),
}


def switched(profile: Profile, name: str) -> Profile:
    """The profile with one reading switched; ValueError for an unknown reading."""
    if name not in SWITCHES:
        raise ValueError(f"reading {name!r} is unknown: allowed are {', '.join(SWITCHES)}")
    part, field, value = SWITCHES[name]
    return dataclasses.replace(profile, **{part: dataclasses.replace(getattr(profile, part), **{field: value})})


def stages(profile: Profile, name: str, seeds: Iterable[int], tasks: tuple[str, ...], without_mirror: bool = False) -> list[Stage]:
    """What a switched reading makes anew, of the seeds and GLUE tasks that the profile has for this."""
    plan, chosen = StagePlanner(switched(profile, name), without_mirror), [task for task in profile.ledger.tasks if task in tasks]
    seeds, found = list(seeds)[: profile.ledger.seeds], []
    part, field, _ = SWITCHES[name]
    for seed in seeds:
        if field == "table4_ilkd":
            found.append(plan.finetune_lm("student", seed))
        elif field == "table7_ilkd":
            found += [plan.finetune_glue(f"ablation_{arm}", "mnli", seed) for arm in ("none", "lm_kd") if "mnli" in tasks]
        else:
            arms = OBJECTIVES if part == "compression" else ("lm_kd",)
            found += [plan.pretrain("web", "lm_kd", seed), *(plan.pretrain("wiki", arm, seed) for arm in arms if arm != "kd"), plan.finetune_lm("student", seed)]
            found += [plan.finetune_glue(row, task, seed) for row in ("student", "student_ilkd") for task in chosen]
    return found
