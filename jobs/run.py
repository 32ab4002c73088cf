"""`python -m jobs.run RECIPE`: the same as `orchestrator run RECIPE`, as the entry point of a Ray job."""

from jobs import enter

if __name__ == "__main__":
    enter("run")
