"""Token ids to training rows: which documents train, their order, how they are cut into rows, the loaders."""
