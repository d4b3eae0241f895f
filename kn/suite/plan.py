"""The stages that each table needs, in an order in which every stage comes after its inputs."""

from collections.abc import Iterable, Sequence

from kn.data import glue
from kn.paper import BEYOND, LEDGER, TABLES
from kn.suite.planner import COMPRESSION_GRID, OBJECTIVES, ROWS, STARTS, TASKS, StagePlanner, glue_row
from kn.suite.readings import SWITCHES, switched_stages
from kn.suite.settings import Profile
from kn.suite.store import Stage


def table_of(kind: str, fields: dict) -> int | str:
    """The first table that makes a stage of this kind, or "beyond": a value of `--only`."""
    if kind in ("aligned", "heal", "compressed") or "@" in str(fields.get("row")):
        return "beyond"
    if kind == "finetune_glue":
        return 7 if fields["row"].startswith("ablation") else 5
    if kind == "pretrain":
        return 7 if fields["on"] == "wiki" else 3
    return {"shapes": 1, "finetune_lm": 4, "twins": 5, "glue": 5, "twin_check": 5, "score": 6}.get(kind, 3)


def table_stages(
        planner: StagePlanner, table: int | str, seeds: Iterable[int], tasks: tuple[str, ...]) -> list[Stage]:
    """The stages whose records a table, or a notebook beyond the tables, reads; ValueError for others."""
    p, seeds = planner, list(seeds)
    match table:
        case 1:
            return [p.shapes]
        case 2:
            return [p.pretrain("web", "lm_kd", 0), p.finetune_glue("student_ilkd", tasks[0], 0)]
        case 3:
            students = [p.pretrain("web", "lm_kd", seed) for seed in seeds]
            return [p.shapes, p.teacher, p.pretrained("baseline"), p.decompose, *students, p.corpus]
        case 4:
            students = [p.pretrain("web", "lm_kd", seed) for seed in seeds]
            names = ("teacher", "baseline", "student")
            finetuned = [p.finetune_lm(name, seed) for seed in seeds for name in names]
            return [p.teacher, p.pretrained("baseline"), *students, *finetuned]
        case 5 | 6:
            finetuned = [p.finetune_glue(row, t, seed) for seed in seeds for row in ROWS for t in tasks]
            scores = [p.score(row, tasks, seed) for seed in seeds for row in ROWS] if table == 6 else []
            checks = [p.shortcut_check(task, check) for task in tasks for check in p.profile.checks
                      if check == "random" or len(glue.TASKS[task].texts) == 2]
            return [p.glue_tasks, *finetuned, *checks, *scores]
        case 7:
            pretrained = [p.pretrain("wiki", name, seed) for seed in seeds for name in OBJECTIVES]
            arms = ("none", *OBJECTIVES) if "mnli" in tasks else ()
            finetuned = [p.finetune_glue(f"ablation_{arm}", "mnli", seed) for seed in seeds for arm in arms]
            return [p.decompose, p.teacher, *pretrained, *finetuned]
        case "beyond_compression":
            models = [p.compressed(*item, seed) for seed in seeds for item in COMPRESSION_GRID]
            return [p.teacher, p.pretrained("baseline"), *models]
        case "beyond_alignment":
            beyond = p.profile.beyond
            shares, glue_shares = (0.0, *beyond.shares), beyond.glue_shares
            pairs = [(start, share) for start in STARTS for share in shares]
            models = [p.light_pretrained(start, share, seed) for seed in seeds for start, share in pairs]
            rows = [glue_row(start, share) for start in STARTS for share in glue_shares]
            chosen = [task for task in beyond.tasks if task in tasks]
            finetuned = [p.finetune_glue(row, t, seed) for seed in seeds for row in rows for t in chosen]
            finetuned += [p.finetune_glue("teacher", task, seed) for seed in seeds for task in chosen]
            return [p.corpus, p.teacher, *models, *finetuned]
    raise ValueError(f"table {table} does not exist: allowed are 1 to 7, {', '.join(BEYOND)} and {LEDGER}")


def plan_stages(
        profile: Profile, tables: Sequence[int | str] = TABLES, seeds: int = 1, tasks: Sequence[str] = TASKS,
        without_mirror: bool = False) -> tuple[list[Stage], list[Stage]]:
    """(all stages in order, those whose records the tables read); ValueError for unknown tables or tasks.
    "claims" reads the records of all tables and each switched one; without_mirror is for cost estimates."""
    if not isinstance(seeds, int) or isinstance(seeds, bool) or not 1 <= seeds <= 999:
        raise ValueError(f"seeds is {seeds!r}: an integer from 1 to 999 is needed")
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"task {unknown[0]!r} is unknown: allowed are {', '.join(TASKS)}")
    planner, tasks, ordered = StagePlanner(profile, without_mirror), tuple(tasks), dict[str, Stage]()
    named = dict.fromkeys([*TABLES, *tables] if LEDGER in tables else tables)
    read = {stage.path: stage for table in named if table != LEDGER
            for stage in table_stages(planner, table, range(seeds), tasks)}
    switched = [stage for name in SWITCHES if LEDGER in named
                for stage in switched_stages(profile, name, range(seeds), tasks, without_mirror)]

    def add(stage: Stage) -> None:
        if stage.path not in ordered:
            for need in stage.inputs:
                add(need)
            ordered[stage.path] = stage

    for stage in (*read.values(), *switched):
        add(stage)
    return list(ordered.values()), list(read.values())
