"""Readings of the paper that could turn a verdict, switched one at a time, and the stages that change."""

from collections.abc import Iterable
from dataclasses import replace

from kn.suite.planner import StagePlanner
from kn.suite.settings import Profile
from kn.suite.store import Stage

SWITCHES = {  # reading: (part of the profile, its field, the other value)
    "even layers instead of odd ones": ("compression", "layers", "even"),
    "‖B‖ = 1 instead of √σ for A and B": ("compression", "scale", "unit_b"),
    "KL(teacher ‖ student) in eq. 3": ("readings", "direction", "teacher_student"),
    "output of the block in eq. 4": ("readings", "hidden_point", "block"),
    "a logit term (vanilla KD) beside eq. 5": ("readings", "logit_term", 0.5),
    "ILKD in Table 4's fine-tuning": ("readings", "table4_ilkd", True),
    "ILKD in Table 7's MNLI": ("readings", "table7_ilkd", True),
}


def switch_reading(profile: Profile, name: str) -> Profile:
    """The profile with one reading switched; ValueError for an unknown reading."""
    if name not in SWITCHES:
        raise ValueError(f"reading {name!r} is unknown: allowed are {', '.join(SWITCHES)}")
    part, field, value = SWITCHES[name]
    return replace(profile, **{part: replace(getattr(profile, part), **{field: value})})


def switched_stages(
    profile: Profile, name: str, seeds: Iterable[int], tasks: tuple[str, ...], without_mirror: bool = False
) -> list[Stage]:
    """The stages that a switched reading changes, for the profile's ledger seeds and GLUE tasks."""
    planner = StagePlanner(switch_reading(profile, name), without_mirror)
    part, field, _ = SWITCHES[name]
    stages = []
    for seed in list(seeds)[: profile.ledger.seeds]:
        if field == "table7_ilkd":
            arms = ("none", "lm_kd") if "mnli" in tasks else ()
            stages += [planner.finetune_glue(f"ablation_{arm}", "mnli", seed) for arm in arms]
            continue
        if field == "table4_ilkd":
            stages.append(planner.finetune_lm("student", seed))
            continue
        objectives = ("lm", "lm_kd") if part == "compression" else ("lm_kd",)
        stages.append(planner.pretrain("web", "lm_kd", seed))
        stages += [planner.pretrain("wiki", objective, seed) for objective in objectives]
        stages.append(planner.finetune_lm("student", seed))
        chosen = [task for task in profile.ledger.tasks if task in tasks]
        stages += [planner.finetune_glue(row, t, seed) for row in ("student", "student_ilkd") for t in chosen]
    return stages
