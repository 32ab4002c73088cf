"""`python -m jobs.ensemble RECIPE`: the same as `orchestrator ensemble RECIPE`, as the entry point of a Ray job."""

from jobs import enter

if __name__ == "__main__":
    enter("ensemble")
