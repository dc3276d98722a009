"""A finding as a maintainer wants to receive it: with a script that was run and showed it. Torch-free.

`choosing` finds the cases of a finding among those that our own planner makes: a report is data, from
anywhere, and no text of it becomes code. `calls` has the operator's call written down, `scripts` puts the
script together, `confirming` runs it, and `page` is what a format lays out.
"""
