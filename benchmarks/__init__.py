"""The cost of attribution on top of its forward pass: ``python -m benchmarks``.

models      synthetic checkpoints of named sizes, made on the spot
peers       the same weights as models of other libraries, without a download
byhand      activations that someone saved, projected without this library
contenders  the calls that are compared, by name
agree       the check that all give the same numbers, before anything is timed
timing      interleaved runs in one process
memory      the peak of one call, in a process of its own
compare     all of these for one setting after another
bars        the limits that this library sets itself, case by case
options     the command's options, checked before any work
report      tables, Markdown, JSON, the machine
curves      time and memory over prompt length, as a picture
"""
