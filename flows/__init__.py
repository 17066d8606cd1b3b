"""Flows: order, fan-out and the form; import each by its module, since a flow has its module's name."""
