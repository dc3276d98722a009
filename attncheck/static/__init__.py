"""What can be said of an environment from its files alone: any environment's, and nothing of it is imported.

`installed` reads which distributions there are (or takes a list of versions that are only planned),
`extensions` says why a compiled one will not load, `faults` says the same from what a loader printed. What is
made of it stands in the rules ATN402 and ATN405 on; `attncheck.envcheck` runs them all.
"""
