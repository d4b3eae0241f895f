"""One run of the reproduction: profiles and their settings, the plan of stages, the store of their results,
the stages' work (kn.suite.work), worker processes, cost estimates. Importing and planning need no torch."""

from kn.suite.plan import plan_stages
from kn.suite.profiles import load
from kn.suite.run import make_records
from kn.suite.store import Stage, Store

__all__ = ["Stage", "Store", "load", "make_records", "plan_stages"]
