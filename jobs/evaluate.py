"""`python -m jobs.evaluate RECIPE`: the same as `orchestrator evaluate RECIPE`, as the entry point of a Ray job."""

from jobs import enter

if __name__ == "__main__":
    enter("evaluate")
