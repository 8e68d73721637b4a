"""Preference training: what `trainer.train` and `trainer.evaluate` do where `loss_type` is a preference loss.

Nothing of upstream lies under this folder. The modules stand in the order of the data: `rows`, `tokens`, `pairs`,
`batches`, `logps`, `objective`, `step`, `run`, whose `train_preference` and `evaluate_preference` are the way in.
"""

VERSION = "0.1.0"
