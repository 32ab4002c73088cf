"""`python -m jobs.train RECIPE`: the same as `orchestrator train RECIPE`, as the entry point of a Ray job."""

from jobs import enter

if __name__ == "__main__":
    enter("train")
