"""The parallel model with real numbers on real ranks, against the unsharded one with the same weights.

`comparing` (torch-free, one level up) starts two things: `unsharded`, one process that runs the reference,
and a `rank` for each of the mesh, under torchrun. Both run the same `calls` and record what each module takes
and gives (`recording`) and some of what it calls (`watching`). Then the first process judges: `readings` puts
the ranks' tensors together, `judging` compares, `causes` says what the wrong values are equal to.
"""
