"""Reports: records of finished stages become tables, intervals, verdicts, plots and pages.

One rule everywhere: a difference holds if the 95 % interval of the seed-paired difference leaves 0 on the
claimed side; perplexities are compared as ratios, that is by the difference of their logarithms. Names are
imported when first used: a plan needs neither pandas nor matplotlib."""

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
