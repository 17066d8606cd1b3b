"""Files that put shardmill on a Prefect server and its workers on machines; README.md is the runbook."""
