"""The processes of a run: what they agree on, and how a lost one is noticed."""
