"""One run: settings, plan, store, the stages' work, processes and their costs."""
