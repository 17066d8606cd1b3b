"""The four stages: plan, validate, quantize, finalize. Each reads, computes and writes; none knows Prefect."""
