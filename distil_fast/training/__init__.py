"""A lean trainer of the DistilBERT recipe on top of the fused losses; so far, what `distil-fast demo` runs.

Each file knows one thing: teacher, student, corpus, data, masking, mlm_head, trainer, evaluate, throughput, report;
demo.py alone puts them in order. Needs the extra `train`. Next: demo.py for the whole, trainer.py for the step.
"""
