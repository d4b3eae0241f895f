"""The paper's names of tasks, rows and models, by the keys that records use."""

from kn.suite.planner import TASKS as TASK_KEYS

TASKS = dict(zip(TASK_KEYS, ("CoLA", "RTE", "MRPC", "SST-2", "MNLI", "QNLI", "QQP"), strict=True))
GLUE_ROWS = {"teacher": "GPT-2 Small", "baseline": "DistilGPT2", "baseline_kd": "DistilGPT2 + KD",
             "student": "KnGPT2", "student_ilkd": "KnGPT2 + ILKD"}
MODELS = {key: GLUE_ROWS[key] for key in ("teacher", "baseline", "student")}
ABLATION = {"none": "KnGPT2", "lm": "KnGPT2 + LM", "kd": "KnGPT2 + KD", "lm_kd": "KnGPT2 + LM + KD"}
