"""`python -m jobs.promote RECIPE`: the same as `orchestrator promote RECIPE`, as the entry point of a Ray job."""

from jobs import enter

if __name__ == "__main__":
    enter("promote")
