"""What attribution costs beside the forward pass that it needs: ``python -m benchmarks``.

models      synthetic checkpoints of named sizes, made on the spot
peers       other libraries' models of the same weights, without a download
byhand      activations that someone saved, projected without this library
contenders  the calls that are compared, by name
agree       the proof that they say the same, before anything is timed
timing      interleaved runs in one process
memory      the peak of one call, in a process of its own
compare     all of these for one setting after another
bars        what this library wants to reach, case by case
options     what a user asked for, refused before any work where it must be
report      tables, Markdown, JSON, the machine
curves      how time and memory grow with the prompt, as a picture
"""
