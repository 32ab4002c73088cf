"""`python -m jobs.prepare RECIPE`: the same as `orchestrator prepare RECIPE`, as the entry point of a Ray job."""

from jobs import enter

if __name__ == "__main__":
    enter("prepare")
