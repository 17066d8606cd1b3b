"""Where Prefect meets shardmill: cache policy, retry condition, executors, workbench, names, logs.

The store is the truth and Prefect a thin layer over it: a task's key is its job key, and a result record counts only
when it is one of ours and says what the store says. Nothing here computes, and nothing here changes bytes.
"""
