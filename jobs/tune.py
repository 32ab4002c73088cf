"""`python -m jobs.tune RECIPE`: the same as `orchestrator tune RECIPE`, as the entry point of a Ray job."""

from jobs import enter

if __name__ == "__main__":
    enter("tune")
