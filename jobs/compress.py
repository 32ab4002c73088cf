"""`python -m jobs.compress RECIPE`: the same as `orchestrator compress RECIPE`, as the entry point of a Ray job."""

from jobs import enter

if __name__ == "__main__":
    enter("compress")
