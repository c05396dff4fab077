"""Plants faults of training from outside the product, and records which of them a run names.

The plan is `plan.yaml`: 25 faults, each with its effect and the words of its cause, and 12 healthy runs. Its author wrote
it before the first run, and had read no rule. A fault is a configuration, a data set, or a function of `plants.py` that
changes objects of a running rank. No file of the product is edited.

Rule, fixed before the first run:

- A statement is one hint or error of the console, one line of `moe-dist status`, or one line of the report's findings.
- A place names a fault if one statement has a match for every pattern of `cause`, ignoring case.
- A fault is `named` if console, status and report name it, and the console at most 60 steps after `effect`, or no later
  than the first evaluation after `effect`. A run that is refused before its first step is `named` if the console's error
  names it.
- `partly`: a place names it, but not all three, or too late. `symptom`: there is a hint or an error, but none names the
  cause. `silent`: neither.
- A healthy run passes if it ends with exit code 0 and each of its hints is true. A reader judges the hints in
  `judged.yaml`.
"""
