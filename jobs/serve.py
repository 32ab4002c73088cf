"""`python -m jobs.serve RECIPE`: the same as `orchestrator serve RECIPE`, as the entry point of a Ray job."""

from jobs import enter

if __name__ == "__main__":
    enter("serve")
