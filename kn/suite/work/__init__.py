"""The work of every kind of stage: work(stage, folder, store) -> metrics."""
