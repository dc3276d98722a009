"""A whole model before it is deployed: one pass on fake tensors, then its attention calls with real numbers.

`auditing` (torch-free) is the way from a request to a report. The pass runs the user's code, in a child
process (`fakepass`): it builds the model on a fake process group and records, op by op, what DTensor does
(`recorder`), going on past what it refuses (`carry`).
"""
