"""Reports: records of finished stages become tables, intervals, verdicts, plots and pages.

table(4, records, "mini")             a line per cell: paper, ours ± sd (n), delta, verdict
trends(records)                       the paper's orderings, each held, not held or undecided
average(records, "student", "dev")    mean over the GLUE tasks, per seed
informative(records)                  the tasks on which the teacher clearly beats the simple baselines
plot(4, records), show(frame)         a matplotlib figure; a table for display in a notebook
write_table, write_beyond, write_ledger, write_index, write_front    CSV and HTML on disk

One rule everywhere: a difference holds if the 95 % interval of the seed-paired difference leaves 0 on the
claimed side; perplexities are compared as ratios, that is by the difference of their logarithms. Names are
imported when first used: a plan needs neither pandas nor matplotlib.
"""

from importlib import import_module

_MODULE_OF = {
    "COLUMNS": "table_builder", "machine_independent_facts": "table_builder", "table": "table_registry",
    "beyond_table": "table_registry", "plot": "table_registry", "training_settings": "table_registry",
    "beyond_claims": "beyond", "trends": "orderings", "average": "metrics", "informative": "metrics",
    "interval": "statistics", "judge": "statistics", "show": "write", "by_seed": "write",
    "write_table": "write", "write_beyond": "write", "write_ledger": "write", "write_index": "write",
    "write_front": "write", "failed_notebook_page": "pages",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'kn.report' has no attribute {name!r}")
    return getattr(import_module(f"kn.report.{_MODULE_OF[name]}"), name)
